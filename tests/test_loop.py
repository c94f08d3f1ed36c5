"""A run through the real command line: complete, resumable bit for bit, and stopped by whatever stops it."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from disks import fill, small_disk
from programs import REPOSITORY, finish, start
from runs import STEPS, arguments, assert_same_run, rows, saved_state, start_commands, write_text

import tiedjax
from tiedjax import cli, continuing, load_run, loop, metrics, recording, sinks
from tiedjax.checkpoint import Checkpoints
from tiedjax.config import ModelConfig, RunConfig, TrainConfig
from tiedjax.config_files import load_run_config, to_tree, to_yaml
from tiedjax.data.prepare import prepare
from tiedjax.errors import UserError
from tiedjax.sharding import make_mesh
from tiedjax.step import decided
from tiedjax.step_metrics import StepMetrics

REQUIRED = {
    *("step", "loss", "tokens", "learning_rate", "grad_norm", "input_grad_norm", "output_grad_norm"),
    *("output_grad_share", "role_grad_cosine", "activation_grad_norm", "tokens_per_second"),
}


def refused(argv: list[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """The one line with which a command is refused."""
    capsys.readouterr()
    assert cli.main(argv) == status
    err = capsys.readouterr().err
    assert err.startswith("tiedjax: ")
    assert err.count("\n") == 1, err
    return err


# ---- What a run leaves ----


def test_every_key_of_the_metrics_is_documented(finished: Path) -> None:
    keys = {key for row in all_columns(finished) for key in row}
    assert "eval_loss" in keys
    documented = (REPOSITORY / "docs" / "formats.md").read_text(encoding="utf-8")
    assert not [key for key in keys if f"`{key}`" not in documented]


def test_the_run_directory_is_complete(finished: Path) -> None:
    cfg = load_run_config(finished / "config.yaml")
    assert cfg.train.steps == STEPS
    assert cfg.model.vocab_size == 320
    assert json.loads((finished / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    assert any((finished / "tensorboard").iterdir())
    assert sorted(int(p.name) for p in (finished / "snapshots").iterdir()) == [0, 1, 2, 4, 6, 8]
    assert [p.name for p in (finished / "checkpoints").iterdir()] == [str(STEPS)]
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == list(range(1, STEPS + 1))
    for row in lines:
        assert row.keys() >= REQUIRED
        assert row["tokens"] == row["step"] * 8 * 16
        share = row["output_grad_norm"] / (row["input_grad_norm"] + row["output_grad_norm"])
        assert row["output_grad_share"] == pytest.approx(share, rel=1e-6)
        assert row["activation_grad_norm"] > 0
        assert ("input_grad_norm_deciles" in row) == (row["step"] in {1, 2, 4, 6, 8})
        assert ("eval_loss" in row) == (row["step"] == STEPS)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert not [p for p in finished.rglob("*") if "tmp" in p.name and "tensorboard" not in p.parts]


def test_a_tokenizer_appears_whole_or_not_at_all(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(temporary: Path, path: Path) -> None:
        if path.name == "tokenizer.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        temporary.rename(path)

    monkeypatch.setattr(os, "replace", replace)
    prepared = SimpleNamespace(tokenizer_path=finished / "tokenizer.json")
    with pytest.raises(UserError) as caught:
        continuing.describe(RunConfig(), tmp_path, prepared, np.zeros((2, 3), np.int64))  # type: ignore[arg-type]
    assert str(caught.value) == f"{tmp_path / 'tokenizer.json'}: cannot be written: No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["token_counts.npy"]


def test_load_run_reads_what_the_contract_names(finished: Path) -> None:
    run = tiedjax.load_run(str(finished))
    assert run.name == finished.name
    assert run.config == load_run_config(finished / "config.yaml")
    assert run.snapshot_steps == [0, 1, 2, 4, 6, 8]
    assert run.metrics["step"].dtype == np.int64
    assert list(run.metrics["step"]) == list(range(1, STEPS + 1))
    assert run.metrics["loss"].dtype == np.float64
    assert run.metrics["input_grad_norm_deciles"].shape == (STEPS, 10)
    assert np.isnan(run.metrics["eval_loss"][:-1]).all()
    assert np.isfinite(run.metrics["eval_loss"][-1])
    assert run.tokenizer_path == finished / "tokenizer.json"
    first, last = run.tables(step=0), run.tables()
    for tables in (first, last):
        assert tables.tied
        assert tables.input is tables.output
        assert type(tables.input) is np.ndarray
        assert tables.input.dtype == np.float32
        assert tables.input.shape == (320, 16)
    assert not np.array_equal(first.input, last.input)
    params = run.params(step=STEPS)
    assert params.keys() == {"tables", "body"}
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
    np.testing.assert_array_equal(params["tables"]["shared"], last.input)
    h_BTD = run.model().apply(params["body"], jnp.zeros((1, 4, 16)))
    assert h_BTD.shape == (1, 4, 16)
    with pytest.raises(tiedjax.run.UserError, match="no snapshot of step 3; there are 0, 1, 2, 4, 6, 8"):
        run.tables(step=3)
    with pytest.raises(tiedjax.run.UserError, match=r"holds no config\.yaml"):
        tiedjax.load_run(finished / "snapshots")


def test_early_snapshots_may_be_rounded_and_nothing_else(finished: Path, text: Path, tmp_path: Path) -> None:
    """Begun without, continued with another schedule: each snapshot says how it was saved, and all read as float32."""
    out, changes = tmp_path / "run", {"train.early_snapshots_dtype": "bfloat16", "train.snapshot_every": 7}
    assert cli.main(arguments(out, text, {"train.stop_at": 1})) == 0
    assert cli.main(arguments(out, text, {**changes, "train.stop_at": 3})) == 0
    assert cli.main(arguments(out, text, {**changes, "train.snapshot_every": 2})) == 0
    rounded, whole, saves = load_run(out), load_run(finished), Checkpoints(out / "snapshots", create=False)
    assert rounded.snapshot_steps == [0, 1, 2, 4, 6, 8]
    assert [step for step in rounded.snapshot_steps if saves.about(step).get("rounded_to") == "bfloat16"] == [2]
    for step in rounded.snapshot_steps:
        table, expected = rounded.tables(step).input, whole.tables(step).input
        assert table.dtype == np.float32
        assert rounded.tables(step).tied
        np.testing.assert_array_equal(
            table, expected.astype(jnp.bfloat16).astype(np.float32) if step == 2 else expected
        )
    assert_same_run(out, finished)


def test_a_run_says_first_what_it_will_write(capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path) -> None:
    changes = {"train.checkpoint_every": 3, "train.stop_at": 1}
    assert cli.main(arguments(tmp_path / "run", text, changes)) == 0
    says = "run: will write 6 snapshots (252.80 KiB) and keep 2 of 3 states (268.80 KiB)\n"
    assert capsys.readouterr().out.count(says) == 1
    assert cli.main(arguments(tmp_path / "run", text, {"train.checkpoint_every": 3})) == 0
    assert "will write" not in capsys.readouterr().out, "it is said once"


def test_token_counts_are_those_of_the_training_windows(finished: Path) -> None:
    run = tiedjax.load_run(finished)
    windows = prepare(run.config.data, 320, report=lambda line: None).windows("train", 16)
    tokens_NS = windows.read(range(len(windows)))
    expected = [np.bincount(part.ravel(), minlength=320) for part in (tokens_NS[:, :-1], tokens_NS[:, 1:])]
    np.testing.assert_array_equal(run.token_counts, expected)


def test_saved_parameters_give_the_logged_held_out_loss(finished: Path) -> None:
    """Recomputed from the checkpoint with a NumPy float64 softmax over all held-out windows that were used."""
    run = tiedjax.load_run(finished)
    windows = prepare(run.config.data, 320, report=lambda line: None).windows("eval", 16)
    tokens_NS = windows.read(range(min(len(windows), 3 * 8)))
    params = run.params()
    x_NTD = params["tables"]["shared"][tokens_NS[:, :-1]]
    h_NTD = np.asarray(run.model().apply(params["body"], x_NTD), np.float64)
    logits_NTV = h_NTD @ params["tables"]["shared"].T.astype(np.float64)
    log_sum_NT = np.log(np.exp(logits_NTV).sum(-1))
    target_NT = np.take_along_axis(logits_NTV, tokens_NS[:, 1:, None], axis=-1)[..., 0]
    loss_N = (log_sum_NT - target_NT).mean(axis=1)
    for name, losses in [("eval_loss", loss_N), ("eval_loss_even", loss_N[::2]), ("eval_loss_odd", loss_N[1::2])]:
        assert run.metrics[name][-1] == pytest.approx(losses.mean(), abs=1e-5)


def test_a_second_text_is_evaluated_by_the_run_s_own_tokenizer(finished: Path, text: Path, tmp_path: Path) -> None:
    """It changes nothing else."""
    other = write_text(tmp_path / "other.jsonl", seed=7)
    changes = {"data.second_source": f"text:{other}", "train.stop_at": 4, "train.eval_every": 4}
    assert cli.main(arguments(tmp_path / "run", text, changes)) == 0
    assert cli.main(arguments(tmp_path / "run", text, {"data.second_source": f"text:{other}"})) == 0
    run = tiedjax.load_run(tmp_path / "run")
    own = dataclasses.replace(run.config.data, source=f"text:{other}", tokenizer=str(run.tokenizer_path))
    windows = prepare(own, 320, report=lambda line: None).windows("eval", 16)
    tokens_NS = windows.read(range(min(len(windows), 3 * 8)))
    params = run.params()
    U_VD = params["tables"]["shared"]
    h_NTD = np.asarray(run.model().apply(params["body"], U_VD[tokens_NS[:, :-1]]), np.float64)
    logits_NTV = h_NTD @ U_VD.T.astype(np.float64)
    target_NT = np.take_along_axis(logits_NTV, tokens_NS[:, 1:, None], axis=-1)[..., 0]
    expected = (np.log(np.exp(logits_NTV).sum(-1)) - target_NT).mean()
    second = run.metrics["second_eval_loss"]
    assert np.flatnonzero(np.isfinite(second)).tolist() == [3, STEPS - 1]
    assert second[-1] == pytest.approx(expected, abs=1e-5)
    assert second[-1] != pytest.approx(run.metrics["eval_loss"][-1], abs=1e-2)
    final, plain = saved_state(tmp_path / "run", STEPS), saved_state(finished, STEPS)
    assert all(final[name].tobytes() == plain[name].tobytes() for name in plain)


def test_a_second_text_that_is_nowhere_is_refused(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> None:
    assert cli.main(arguments(tmp_path / "run", text, {"data.second_source": f"text:{tmp_path}/none*"})) == 2
    assert capsys.readouterr().err == (
        f"tiedjax: data.second_source: missing corpus: no file matches '{tmp_path}/none*'; give a path or a glob of "
        "files\n"
    )


def test_a_tied_snapshot_is_one_array_and_an_untied_one_two(finished: Path, text: Path, tmp_path: Path) -> None:
    assert cli.main(arguments(tmp_path / "untied", text, {"tying.scheme": "untied", "train.stop_at": 1})) == 0
    tied, untied = saved_state(finished, STEPS), saved_state(tmp_path / "untied", 1)
    assert [name for name in tied if name.startswith("params/tables")] == ["params/tables/shared"]
    names = ["params/tables/input", "params/tables/output"]
    assert [name for name in untied if name.startswith("params/tables")] == names
    tables = tiedjax.load_run(tmp_path / "untied").tables(step=0)
    assert not tables.tied
    assert abs(np.sum(tables.input * tables.output)) < 0.1 * np.sum(tables.input**2)


# ---- Interrupted and continued ----


def test_continuing_is_bit_identical_on_one_device(finished: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert cli.main(arguments(out, text, {"train.stop_at": 4})) == 0
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["4"]
    assert cli.main(arguments(out, text)) == 0
    assert_same_run(out, finished)


def test_continuing_with_bfloat16_moments_is_bit_identical(text: Path, tmp_path: Path) -> None:
    whole, parts, changes = tmp_path / "whole", tmp_path / "parts", {"optimizer.moments_dtype": "bfloat16"}
    assert cli.main(arguments(whole, text, changes)) == 0
    assert cli.main(arguments(parts, text, {**changes, "train.stop_at": 4})) == 0
    assert cli.main(arguments(parts, text, changes)) == 0
    assert_same_run(parts, whole)
    moments = {name: leaf for name, leaf in saved_state(whole, STEPS).items() if "/mu/" in name or "/nu/" in name}
    assert moments
    assert {leaf.dtype.name for leaf in moments.values()} == {"bfloat16"}


def test_continuing_is_bit_identical_on_eight_devices(finished: Path, text: Path, tmp_path: Path) -> None:
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    commands = [
        arguments(whole, text, mesh),
        arguments(parts, text, {**mesh, "train.stop_at": 4}),
        arguments(parts, text, mesh),
    ]
    finish(start_commands(commands, devices=8))
    assert sorted(p.name for p in (parts / "checkpoints").iterdir()) == ["4", "8"]
    assert_same_run(whole, parts)
    # The run of eight devices reads on one, and is the run of one device up to rounding.
    eight, one = tiedjax.load_run(whole), tiedjax.load_run(finished)
    np.testing.assert_allclose(eight.metrics["loss"], one.metrics["loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(eight.metrics["eval_loss"], one.metrics["eval_loss"], rtol=0, atol=1e-5)
    assert eight.tables().tied
    np.testing.assert_array_equal(eight.tables(step=0).input, one.tables(step=0).input)
    assert jax.tree.map(np.shape, eight.params()) == jax.tree.map(np.shape, one.params())


def test_sigterm_checkpoints_and_the_same_command_continues(
    finished: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, write = tmp_path / "run", metrics.MetricsLog.write

    def write_and_ask(self: metrics.MetricsLog, row: dict[str, object]) -> None:
        write(self, row)
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricsLog, "write", write_and_ask)
        assert cli.main(arguments(out, text)) == 75
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert "stopped by SIGTERM; the same command continues" in capsys.readouterr().err
    (stopped,) = (int(p.name) for p in (out / "checkpoints").iterdir())
    assert 2 < stopped < STEPS
    assert [row["step"] for row in rows(out)] == list(range(1, stopped + 1))
    assert cli.main(arguments(out, text)) == 0
    assert_same_run(out, finished)


def test_a_killed_run_continues_from_its_last_checkpoint(finished: Path, text: Path, tmp_path: Path) -> None:
    """Killed without warning after step 7: 4 is the last checkpoint, and what came after it is done again."""
    out = tmp_path / "run"
    argv = arguments(out, text, {"train.checkpoint_every": 4})
    killer = f"""
import os, pathlib, signal, time
from tiedjax import metrics
write = metrics.MetricsLog.write
def write_and_die(self, row):
    write(self, row)
    while row["step"] == 7:
        if all(pathlib.Path({str(out)!r}, name).is_dir() for name in ("checkpoints/4", "snapshots/6")):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
metrics.MetricsLog.write = write_and_die
"""
    finish(start_commands([argv], before=killer), status=-signal.SIGKILL)
    assert [row["step"] for row in rows(out)] == list(range(1, 8))
    speeds = [json.loads(line)["tokens_per_second"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    for step in ("4", "6"):
        (out / "snapshots" / step / "marker").touch()
    assert cli.main(argv) == 0
    assert_same_run(out, finished)
    again = [json.loads(line)["tokens_per_second"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert again[:4] == speeds[:4]
    assert again[4:7] != speeds[4:7]
    assert (out / "snapshots" / "4" / "marker").exists()
    assert not (out / "snapshots" / "6" / "marker").exists()


def files(folder: Path) -> dict[str, bytes]:
    """All but the lock, which names its last holder."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_run_whose_states_are_gone_is_refused_and_left_as_it_is(
    finished: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    assert json.loads((out / "saved_state.json").read_text()) == {"step": STEPS}
    shutil.rmtree(out / "checkpoints")
    before = files(out)
    assert cli.main(arguments(out, text)) == 2
    assert capfd.readouterr().err == (
        f"tiedjax: {out}: a state was saved at step {STEPS}, but checkpoints/ holds none; bring it back, or choose "
        "another --out to begin anew\n"
    )
    assert files(out) == before


def test_a_state_that_was_committed_before_its_record_is_recorded(finished: Path, text: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    (out / "saved_state.json").unlink()
    assert cli.main(arguments(out, text)) == 0
    assert json.loads((out / "saved_state.json").read_text()) == {"step": STEPS}


def test_a_run_killed_before_its_first_checkpoint_begins_again_and_says_so(
    finished: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    killer = f"""
import os, pathlib, signal, time
from tiedjax import metrics
write = metrics.MetricsLog.write
def write_and_die(self, row):
    write(self, row)
    while row["step"] == 3:
        if all(pathlib.Path({str(out)!r}, "snapshots", step).is_dir() for step in "012"):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
metrics.MetricsLog.write = write_and_die
"""
    finish(start_commands([arguments(out, text)], before=killer), status=-signal.SIGKILL)
    assert not list((out / "checkpoints").glob("[0-9]*"))
    capfd.readouterr()
    assert cli.main(arguments(out, text)) == 0
    assert "run: ended before it had saved a state; it starts again from step 0\n" in capfd.readouterr().out
    assert_same_run(out, finished)


SIGNALLED_IN_A_SAVE = """
import os, pathlib, signal, threading, time
import orbax.checkpoint as ocp
from tiedjax import loop
save = ocp.PyTreeCheckpointHandler.finalize
def slow_and_signalled(self, directory):
    if "checkpoints/4" in str(directory) and "SIGNALLED" not in os.environ:
        os.environ["SIGNALLED"] = "yes"
        while not waiting.is_set():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIG)
        time.sleep(2)
    save(self, directory)
ocp.PyTreeCheckpointHandler.finalize = slow_and_signalled
waiting, wait = threading.Event(), loop.Checkpoints.wait
def observed_wait(self):
    if self.begun == 4 and self.directory.name == "checkpoints":
        waiting.set()
    wait(self)
loop.Checkpoints.wait = observed_wait
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_save_that_is_under_way_when_a_signal_comes_is_finished(
    finished: Path, text: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """The signal comes while the run waits for its last checkpoint, which takes two more seconds."""
    out = tmp_path / "run"
    before = SIGNALLED_IN_A_SAVE.replace("signal.SIG)", f"signal.{number.name})")
    changes = {"train.stop_at": 4, "train.checkpoint_every": 2}  # the loop itself waits for the first one
    process = start_commands([arguments(out, text, changes)], before=before)
    _, stderr = finish(process, seconds=120, status=75)
    assert stderr == f"tiedjax: stopped by {number.name}; the same command continues from there\n"
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["2", "4"]
    assert cli.main(arguments(out, text)) == 0
    assert_same_run(out, finished)


def test_a_checkpoint_is_begun_only_when_earlier_snapshots_are_complete(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a crash between the two could leave a checkpoint whose snapshot is never made again."""
    complete: dict[int, list[int]] = {}
    save = Checkpoints.save

    def observed(self: Checkpoints, step: int, *args: Any) -> None:
        if self.directory.name == "checkpoints":
            complete[step] = sorted(int(p.name) for p in (tmp_path / "run" / "snapshots").iterdir() if p.name.isdigit())
        save(self, step, *args)

    monkeypatch.setattr(Checkpoints, "save", observed)
    assert cli.main(arguments(tmp_path / "run", text, {"train.checkpoint_every": 4})) == 0
    assert complete == {4: [0, 1, 2, 4], STEPS: [0, 1, 2, 4, 6, STEPS]}


# ---- What surrounds the step ----


def test_tokens_per_second_are_those_of_the_clock(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of two steps, a clock that moves 0.5 s at every reading of metrics: 2 * 8 * 16 tokens in 2 * 0.5 s."""
    clock, fetched = [100.0], StepMetrics.fetched

    def reading(metrics: StepMetrics) -> dict[str, Any]:
        clock[0] += 0.5
        return fetched(metrics)

    monkeypatch.setattr(recording, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(StepMetrics, "fetched", reading)
    changes = {"train.log_every": 2, "train.snapshot_every": 100, "train.stop_at": 7, "train.eval_every": "null"}
    assert cli.main(arguments(tmp_path / "run", text, {"train.steps": 100, **changes})) == 0
    speeds = {row["step"]: row["tokens_per_second"] for row in all_columns(tmp_path / "run")}
    # Steps 1, 2 and 4 are written for their snapshots too.
    assert speeds == {1: 8 * 16 / 0.5, 2: 8 * 16 / 0.5, 4: 2 * 8 * 16 / 1.0, 6: 2 * 8 * 16 / 1.0}


def all_columns(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_devices_never_wait_for_the_host(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order: batch i + 1 is sent, step i is dispatched, and only then is anything read, of step i - 1 at most."""
    events: list[tuple[str, int]] = []
    make_steps, place, read = loop.make_steps, loop.sharding.global_batch, loop.jax.device_get
    dispatched: list[Any] = []

    def observed_steps(*args: Any) -> Any:
        steps = make_steps(*args)

        def train(*args: Any) -> Any:
            state, metrics = steps.train(*args)
            dispatched.append(metrics.numbers)
            events.append(("dispatch", len(dispatched)))
            return state, metrics

        return dataclasses.replace(steps, train=train)

    def observed_place(local: Any, *args: Any) -> Any:
        events.append(("send", sum(kind == "send" for kind, _ in events) + 1))
        return place(local, *args)

    def observed_read(tree: Any) -> Any:
        events.extend(("read", step) for step, numbers in enumerate(dispatched, 1) if numbers is tree)
        return read(tree)

    monkeypatch.setattr(loop, "make_steps", observed_steps)
    monkeypatch.setattr(loop.sharding, "global_batch", observed_place)
    monkeypatch.setattr(loop.jax, "device_get", observed_read)
    changes = {"train.stop_at": 7, "train.snapshot_every": 1000, "train.checkpoint_every": "null"}
    assert cli.main(arguments(tmp_path / "run", text, changes)) == 0
    expected = [("send", 1)]
    for step in range(1, 8):
        expected += [("send", step + 1), ("dispatch", step)]
        saves = step in {1, 2, 4, 7}  # snapshots, which read their own step, and the end
        expected += [("read", step - 1)] * (step - 1 in {3, 5, 6}) + [("read", step)] * saves
    assert events == expected


def test_an_argument_that_is_still_on_the_host_is_an_error(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.sharding, "global_batch", lambda local, *_: local)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        cli.main(arguments(tmp_path / "run", text))


@pytest.mark.slow
def test_a_run_is_the_same_up_to_rounding_as_users_compile_it(finished: Path, text: Path, tmp_path: Path) -> None:
    """With XLA's optimisations, which no other run of these tests has."""
    out = tmp_path / "run"
    finish(start(["-m", "tiedjax", *arguments(out, text)], optimized=True))
    ours, plain = load_run(out), load_run(finished)
    assert ours.metrics.keys() == plain.metrics.keys()
    for name in ours.metrics.keys() - {"tokens_per_second"}:
        # The starts differ in last bits. Where the roles' first gradients cancel in a number, Adam divides by nearly 0:
        # one number is most of these norms, and of what two programs make of it three digits are the same.
        first_update = 1e-3 if name.endswith("update_norm") else 1e-5
        for steps, near in [(slice(0, 1), first_update), (slice(1, None), 1e-5)]:
            pair = ours.metrics[name][steps], plain.metrics[name][steps]
            np.testing.assert_allclose(*pair, rtol=near, atol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), ours.params(), plain.params())


@pytest.mark.slow
def test_a_run_does_not_depend_on_the_compilation_cache(finished: Path, text: Path, tmp_path: Path) -> None:
    """Filled, used, and with entries that a killed process left incomplete: always the same bits."""
    cache = tmp_path / "cache"
    settings = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def run(name: str) -> dict[str, int]:
        finish(start(["-m", "tiedjax", *arguments(tmp_path / name, text)], **settings))
        assert_same_run(tmp_path / name, finished)
        return {path.name: path.stat().st_mtime_ns for path in cache.glob("*-cache")}

    filled = run("filled")
    assert any(name.startswith("jit_train-") for name in filled)
    assert run("used") == filled
    for path in cache.glob("*-cache"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run("incomplete")


def test_accelerators_keep_what_was_compiled_beside_the_prepared_data(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Path] = []
    monkeypatch.setattr(loop.process, "keep_compiled", kept.append)
    assert cli.main(arguments(tmp_path / "cpu", text, {"train.stop_at": 1})) == 0
    assert not kept
    monkeypatch.setattr(loop.jax, "default_backend", lambda: "gpu")
    assert cli.main(arguments(tmp_path / "gpu", text, {"train.stop_at": 1})) == 0
    assert kept == [Path(os.environ["TIEDJAX_CACHE"]) / "xla"]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own on which no byte is left."""
    with small_disk(tmp_path / "run" / "tensorboard", 64) as disk:
        fill(disk)
        yield disk


@pytest.mark.parametrize("obstacle", [pytest.param("file", marks=pytest.mark.slow), "full disk"])
def test_a_run_goes_on_without_tensorboard(
    finished: Path, text: Path, tmp_path: Path, request: pytest.FixtureRequest, obstacle: str
) -> None:
    out = tmp_path / "run"
    if obstacle == "full disk":
        request.getfixturevalue("full_disk")
        reason = "No space left on device"
    else:
        out.mkdir()
        (out / "tensorboard").write_text("not a folder")
        reason = "File exists"
    _, stderr = finish(start(["-m", "tiedjax", *arguments(out, text)]), seconds=120)
    assert stderr == (
        f"tiedjax: {out}/tensorboard: TensorBoard's files cannot be written: {reason}; "
        "the run goes on, with every number in metrics.jsonl\n"
        f"tiedjax: {out}/tensorboard: TensorBoard's files lost {STEPS} of {STEPS} lines\n"
    )
    assert_same_run(out, finished)


@pytest.mark.parametrize("obstacle", [pytest.param("folder", marks=pytest.mark.slow), "full disk"])
def test_a_run_goes_on_without_metrics_and_says_the_hole_when_it_is_continued(
    finished: Path, text: Path, tmp_path: Path, request: pytest.FixtureRequest, obstacle: str
) -> None:
    out = tmp_path / "run"
    path = out / "metrics.jsonl"
    if obstacle == "full disk":
        disk = request.getfixturevalue("full_disk")
        (disk / "metrics.jsonl").touch()
        path.symlink_to(disk / "metrics.jsonl")
        reason = "No space left on device"
    else:
        path.mkdir(parents=True)
        reason = "Is a directory"
    argv = ["-m", "tiedjax", *arguments(out, text, {"train.stop_at": 5})]
    _, stderr = finish(start(argv), seconds=120)
    assert [line for line in stderr.splitlines() if "tensorboard" not in line] == [
        f"tiedjax: {path}: cannot be written: {reason}; the run goes on, and tries again at every line",
        f"tiedjax: {path} lost 5 of 5 lines",
    ]
    if obstacle == "full disk":
        (disk / "filler").unlink()
    else:
        path.rmdir()
    _, stderr = finish(start(["-m", "tiedjax", *arguments(out, text)]), seconds=120)
    assert stderr == f"tiedjax: {path}: lacks 5 lines, the first after step 0; the run goes on without\n"
    a, b = saved_state(out, STEPS), saved_state(finished, STEPS)
    assert all(a[name].tobytes() == b[name].tobytes() for name in b)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row.get("lines_lost")) for row in found] == [(6, 5), (7, None), (8, None)]


def test_services_may_be_named_when_a_run_is_continued(
    finished: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """They get what is written from there on, the config, and what was evaluated; and change nothing."""
    pytest.importorskip("mlflow")
    out, store = tmp_path / "run", tmp_path / "store"
    monkeypatch.setattr(sinks, "PATIENCE", 120)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{store}")
    assert cli.main(arguments(out, text, {"train.stop_at": 5})) == 0
    assert not (out / "mlflow.json").exists()
    assert cli.main(arguments(out, text, {"train.sinks": "mlflow"})) == 0
    assert capfd.readouterr().err == ""
    assert_same_run(out, finished)
    (run,) = (path.parent for path in store.glob("*/*/metrics"))
    assert json.loads((out / "mlflow.json").read_text()) == {"run": run.name}
    told = [line.split()[1:] for line in (run / "metrics" / "loss").read_text().splitlines()]
    assert [(int(step), float(loss)) for loss, step in told] == [(r["step"], r["loss"]) for r in rows(out)[5:]]
    assert float((run / "metrics" / "eval_loss").read_text().split()[1]) == rows(out)[-1]["eval_loss"]
    assert (run / "params" / "tying.scheme").read_text() == "tied"


def test_only_the_main_process_of_a_cluster_has_sinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording.process, "is_main", lambda: False)
    recorder = recording.Recorder(RunConfig(train=TrainConfig(sinks="wandb")), tmp_path, "run", 2)
    values = {"loss": 1.0, "grad_norm": 1.0, "output_grad_share": 0.5, "skipped": 0}
    recorder.record(3, StepMetrics.of({name: jnp.array(value) for name, value in values.items()}), {}, deciles=False)
    recorder.flush()
    recorder.close()
    assert not list(tmp_path.iterdir())


# ---- Refused ----


def test_a_second_writer_of_one_run_directory_is_refused(
    finished: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    hold = f"""
import pathlib, sys
from tiedjax.host.storage import sole_writer
with sole_writer(pathlib.Path({str(out)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        assert refused(arguments(out, text), capsys, status=79) == (
            f"tiedjax: {out}: process {holder.pid} on {socket.gethostname()} is writing this run; wait for it or "
            "choose another --out\n"
        )
    finally:
        holder.kill()  # a hold must not outlive its process
        holder.communicate(timeout=30)
    assert cli.main(arguments(out, text)) == 0
    assert capsys.readouterr().out.endswith(f"{out.name}: nothing to do, 8 of 8 steps are done\n")


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("optimizer.learning_rate", "1e-3", "optimizer.learning_rate = 0.003, not 0.001"),
        ("tying.input_grad_scale", "5", "tying.input_grad_scale = 1.0, not 5.0"),
        ("tying.scheme", "untied", "tying.scheme = 'tied', not 'untied'"),
        ("train.steps", "9", "train.steps = 8, not 9"),
        ("train.seed", "1", "train.seed = 0, not 1"),
    ],
)
def test_another_config_in_the_same_directory_is_refused(
    finished: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: str, shown: str
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert refused(arguments(out, text, {key: value}), capsys) == (
        f"tiedjax: {out}: holds a run with {shown}; choose another --out or go back to it\n"
    )
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"} == {
        path: time for path, time in before.items() if path.name != ".lock"
    }


def test_how_often_things_are_written_may_change(finished: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert cli.main(arguments(out, text, {"train.stop_at": 2, "train.log_every": 3})) == 0
    assert cli.main(arguments(out, text, {"train.log_every": 3, "train.eval_every": 7, "mesh.data": 1})) == 0
    assert_same_state_with_fewer_lines(out, finished)


def assert_same_state_with_fewer_lines(out: Path, whole: Path) -> None:
    a, b = saved_state(out, STEPS), saved_state(whole, STEPS)
    assert all(a[name].tobytes() == b[name].tobytes() for name in b)
    expected = {row["step"]: row for row in rows(whole)}
    found = {row["step"]: row for row in rows(out)}
    assert list(found) == [1, 2, 3, 4, 6, 7, 8]  # every third, every snapshot, every evaluation
    assert "eval_loss" in found[7]
    for step, row in found.items():
        without = {key: value for key, value in row.items() if step != 7 or not key.startswith("eval_loss")}
        assert without == expected[step]


def test_other_text_under_the_same_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, out = write_text(tmp_path / "text.jsonl", seed=1), tmp_path / "run"
    assert cli.main(arguments(out, own, {"train.stop_at": 1})) == 0
    kept = {name: (out / name).read_bytes() for name in ("config.yaml", "tokenizer.json", "token_counts.npy")}
    write_text(own, seed=2)
    capsys.readouterr()
    assert cli.main(arguments(out, own)) == 2
    err = capsys.readouterr().err
    assert err == (
        f"tiedjax: {out / 'checkpoints' / '1'}: was trained on other data; bring that back or choose another --out\n"
    )
    assert {name: (out / name).read_bytes() for name in kept} == kept


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer.learning_rate": 1e37}, "step 1: the update is not finite"),
        ({"optimizer.learning_rate": 1e37, "optimizer.weight_decay": 1e6}, "step 1: the update is not finite"),
    ],
)
def test_a_run_that_diverges_ends_and_leaves_no_broken_checkpoint(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, float], says: str
) -> None:
    out = tmp_path / "run"
    argv = arguments(out, text, {**changes, "optimizer.warmup_steps": 0, "train.checkpoint_every": 1})
    capsys.readouterr()
    assert cli.main(argv) == 77
    err = capsys.readouterr().err
    assert err == f"tiedjax: {says}; try a lower optimizer.learning_rate\n"
    for step in (out / "checkpoints").iterdir():
        state = saved_state(out, int(step.name))
        assert all(np.isfinite(leaf).all() for leaf in state.values()), f"checkpoint {step.name}"
    for step in (out / "snapshots").iterdir():
        assert np.isfinite(tiedjax.load_run(out).tables(int(step.name)).input).all(), f"snapshot {step.name}"


def test_nothing_is_recorded_from_the_update_on_that_ends_the_run(tmp_path: Path) -> None:
    recorder = recording.Recorder(RunConfig(), tmp_path, "run", 2)
    for step, loss in ((3, jnp.nan), (4, 1.0)):
        values = {"loss": loss, "grad_norm": 2.0, "output_grad_share": 0.5, "skipped": -1}
        metrics = StepMetrics.of({name: jnp.array(value) for name, value in values.items()})
        recorder.record(step, metrics, {}, deciles=False)
    recorder.flush()
    recorder.close()
    assert str(recorder.ended_by) == "step 3: the loss is nan"
    assert not (tmp_path / "metrics.jsonl").read_text()


def test_the_resolved_config_is_saved(finished: Path, text: Path) -> None:
    """What the run says of itself is what was asked for, defaults included, and what was decided for it."""
    cfg = load_run_config(finished / "config.yaml")
    argv = arguments(finished, text)
    asked = load_run_config(argv[1], cli._overrides(cli._parse(argv)))
    assert asked.model.scan_layers is None
    assert to_tree(decided(asked, make_mesh(asked.mesh))) == to_tree(cfg)
    assert cfg.model.scan_layers is False


def test_layers_left_open_are_those_of_the_run_that_began(tmp_path: Path) -> None:
    """A run begun on an accelerator, where its layers were scanned, goes on anywhere."""
    cfg = RunConfig(model=ModelConfig(layers=2))
    assert continuing.as_begun(cfg, tmp_path).model.scan_layers is None
    begun = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, scan_layers=True))
    (tmp_path / "config.yaml").write_text(to_yaml(begun))
    assert continuing.as_begun(cfg, tmp_path) == begun
    unrolled = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, scan_layers=False))
    assert continuing.as_begun(unrolled, tmp_path) == unrolled  # refused later: what was asked for is not what is there


def test_a_run_that_was_read_can_be_copied_and_sent_to_another_process(finished: Path) -> None:
    run = load_run(finished)
    table = run.tables().input
    for again in (pickle.loads(pickle.dumps(run)), copy.deepcopy(run)):
        np.testing.assert_array_equal(again.tables().input, table)


@pytest.mark.parametrize("step", [4.0, True, "4"])
def test_a_step_that_is_no_whole_number_is_no_damage(step: Any, finished: Path) -> None:
    with pytest.raises(UserError) as error:
        load_run(finished).tables(step)
    assert str(error.value) == f"step: must be a whole number, got {step!r}"
    assert type(error.value) is UserError


def test_a_run_whose_metrics_are_gone_says_so(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError) as error:
        load_run(tmp_path / "run").metrics  # noqa: B018
    assert str(error.value) == (
        f"{tmp_path}/run/metrics.jsonl: has no line of steps 1 to 8; bring it back (tiedjax check {tmp_path}/run says "
        "what else is missing)"
    )


def test_reading_a_run_leaves_the_programs_own_errors_alone(finished: Path) -> None:
    """A task that nobody awaits is still told of; those of Orbax are not."""
    program = f"""
import asyncio, gc, tiedjax
tiedjax.load_run({str(finished)!r}).tables()
async def fails():
    raise ValueError("mine")
async def main():
    task = asyncio.create_task(fails())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    del task
    gc.collect()
asyncio.run(main())
fails()
"""
    _, err = finish(start(["-c", program]))
    assert "Task exception was never retrieved" in err
    assert "ValueError: mine" in err
    assert "coroutine 'fails' was never awaited" in err


def test_operations_name_every_option_that_may_change() -> None:
    page = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
    promised = page[page.index("The command that continues a run may change") :].split("\n* ")[0]
    missing = [key for key in continuing.MAY_CHANGE if not re.search(rf"[`.]{key.split('.')[1]}`|{key}", promised)]
    assert [key for key in missing if not key.startswith("mesh.")] == []
    assert "`--mesh.*`" in promised
