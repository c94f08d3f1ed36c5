"""Updates whose loss or gradient is not finite are left out, and one too many ends a run at its last finite state."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_tokens, slow_but, small_config
from programs import finish, start
from runs import STEPS, arguments, assert_same_run, rows, saved_state

from tiedjax import cli, load_run, loop, step, tying
from tiedjax.check import check
from tiedjax.config import (
    BodyOptimizerConfig,
    OptimizerConfig,
    RegularisersConfig,
    TableOptimizerConfig,
    TrainConfig,
    TyingConfig,
)
from tiedjax.data.batches import Batches
from tiedjax.data.prepare import prepare
from tiedjax.left_out import LeftOut
from tiedjax.sharding import make_mesh

pytestmark = pytest.mark.timeout(300)

Poison = Callable[[Sequence[int]], None]


def poisoned(sums: Sequence[int]) -> Callable[..., Any]:
    """`loss_and_gradients` that gives NaN throughout for batches whose token ids have one of these sums."""
    plain = step.loss_and_gradients

    def factory(*options: Any) -> Callable[..., Any]:
        compute = plain(*options)

        def gradients(params: Any, tokens_BS: jax.Array, *rest: Any) -> Any:
            bad = jnp.any(jnp.sum(tokens_BS) == jnp.asarray(sums))
            return jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), compute(params, tokens_BS, *rest))

        return gradients

    return factory


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[Poison]:
    """Poisons the batches with these sums of token ids until the end of the test."""

    def patch(sums: Sequence[int]) -> None:
        monkeypatch.setattr(step, "loss_and_gradients", poisoned(sums))
        step._make_steps.cache_clear()

    yield patch
    step._make_steps.cache_clear()


@pytest.fixture
def batches(finished: Path) -> Batches:
    """Those of every run here."""
    cfg = load_run(finished).config
    prepared = prepare(cfg.data, cfg.model.vocab_size, report=lambda line: None)
    return Batches(prepared, cfg.model.seq_len, cfg.data.batch_size, cfg.train.seed)


def sums(batches: Batches, *steps: int) -> list[int]:
    return [int(batches.at(step - 1).sum()) for step in steps]


# ---- The step ----


def bits(tree: Any) -> dict[str, bytes]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf).tobytes() for path, leaf in leaves}


def optimized(**changes: Any) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=1e-2, warmup_steps=2, **changes)


CONFIGS: dict[str, dict[str, Any]] = {
    "checked account": {"tying": TyingConfig(account="checked")},
    "rows": {"tying": TyingConfig(account="rows")},
    "untied": {"scheme": "untied"},
    **{
        kind: {"optimizer": optimized(tables=TableOptimizerConfig(kind=kind))}  # type: ignore[arg-type]
        for kind in ("sgd", "coupled", "by_role_matched", "by_role_lazy")
    },
    "lion": {"optimizer": optimized(tables=TableOptimizerConfig(kind="lion")), "tying": TyingConfig(account="off")},
    "muon": {"optimizer": optimized(body=BodyOptimizerConfig(kind="muon"), moments_dtype="bfloat16", clip_norm=None)},
    "controller": {"tying": TyingConfig(output_update_share=0.5)},
    "watched": {"tying": TyingConfig(untie_when="harm", untie_above=0.5)},
    "regularised": {},
}


@pytest.mark.parametrize(
    "name", slow_but(CONFIGS, "rows", "untied", "by_role_lazy", "muon", "controller", "regularised")
)
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(name: str, poison: Poison) -> None:
    """Of three in a row the first is left out, the second is one too many, and the third, finite, comes too late."""
    cfg = small_config(**CONFIGS[name], train=TrainConfig(steps=10, skip_nonfinite=1))
    if name == "regularised":
        cfg = dataclasses.replace(cfg, regularisers=RegularisersConfig(anchor=0.1, mean=0.1))
    good, bad = [random_tokens(cfg, seed) for seed in (0, 1)], random_tokens(cfg, 2)
    poison([int(bad.sum())])
    steps = step.make_steps(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    sample = steps.sampled and tying.sampled_rows(np.arange(cfg.model.table_rows), steps.sampled)
    given = tying.role_scale(cfg.tying), np.zeros(cfg.model.table_rows, np.int32)
    state, _ = steps.train(steps.init(jax.random.key(1), sample), good[0], *given)
    before = bits(state)

    state, metrics = steps.train(state, bad, *given)
    assert (int(state.step), int(state.skipped), int(metrics["skipped"])) == (2, 1, 1)
    assert np.isnan(metrics["loss"])
    assert bits(state) | {name: before[name] for name in ("step", "skipped")} == before
    assert all(np.isnan(metrics[name]) for name in metrics.keys() & {"input_update_norm", "output_update_share"})

    for tokens_BS in (bad, good[1]):
        state, metrics = steps.train(state, tokens_BS, *given)
        assert (int(state.step), int(state.skipped), int(metrics["skipped"])) == (2, -2, -2)
        assert bits(state) | {name: before[name] for name in ("step", "skipped")} == before


def test_an_update_after_one_that_was_left_out_is_the_next_of_the_schedule(poison: Poison) -> None:
    """Steps good, bad, good are steps good, good in all but the counts and the metrics that the step's number is in."""
    cfg = small_config(train=TrainConfig(steps=10, skip_nonfinite=1))
    first, second, bad = (random_tokens(cfg, seed) for seed in range(3))
    poison([int(bad.sum())])
    steps = step.make_steps(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    given = tying.role_scale(cfg.tying), np.zeros(cfg.model.table_rows, np.int32)

    def trained(*batches: np.ndarray) -> tuple[dict[str, bytes], dict[str, bytes]]:
        state = steps.init(jax.random.key(1))
        for tokens_BS in batches:
            state, metrics = steps.train(state, tokens_BS, *given)
        return bits(state._replace(step=0, skipped=0)), bits({**metrics, "skipped": 0})

    assert trained(first, bad, second) == trained(first, second)


# ---- Runs ----


def end_line(out: Path, failed: int, skipped: int = 0) -> str:
    state = f"the state before it is in {out}/checkpoints/{failed - 1}; " if failed > 1 else ""
    return (
        f"tiedjax: step {failed}: the loss is nan; {state}the windows of its batch are in {out}/not_finite.json; try a "
        f"lower optimizer.learning_rate, or leave it out with train.skip_nonfinite={skipped + 1}\n"
    )


@pytest.mark.parametrize("failed", slow_but([5, 6, STEPS, 1], 5, 1))
def test_a_run_ends_at_its_last_finite_state_and_goes_on_from_there(
    failed: int,
    text: Path,
    tmp_path: Path,
    finished: Path,
    batches: Batches,
    poison: Poison,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After 5, nothing is saved, so that step 6 is on its way when it is noticed; after 6 and the last, it is at once.

    Before 6 the state has the body's last update with it, which step 6 is to measure.
    """
    poison(sums(batches, failed))
    out, whole, skips = tmp_path / "run", tmp_path / "whole", {"train.skip_nonfinite": 1}
    assert cli.main(arguments(whole, text, skips)) == 0
    for _ in range(2):  # the second time it begins at the state that the first has left
        capsys.readouterr()
        assert cli.main(arguments(out, text)) == 77
        assert capsys.readouterr().err == end_line(out, failed)
        assert [path.name for path in (out / "checkpoints").iterdir()] == ([str(failed - 1)] if failed > 1 else [])
        assert rows(out) == rows(whole)[: failed - 1]
        assert json.loads((out / "not_finite.json").read_text()) == {
            "step": failed,
            "loss": None,
            "grad_norm": None,
            "state": failed - 1,
            "windows": batches.windows(failed - 1),
        }
        if failed > 1:
            assert check(out).whole, check(out).lines()
    capsys.readouterr()
    assert cli.main(arguments(out, text, skips)) == 0
    left_out = f"step {failed}: the loss is nan; the update is left out, 1 of the 1 that train.skip_nonfinite allows\n"
    assert capsys.readouterr().err == f"tiedjax: run: {left_out}"
    assert not (out / "not_finite.json").exists()
    assert_same_run(out, whole)
    assert check(out).whole, check(out).lines()
    lines = rows(out)
    assert [row["step"] for row in lines] == list(range(1, STEPS + 1))
    assert [row.get("skipped", 0) for row in lines] == [int(row["step"] >= failed) for row in lines]
    assert [row["step"] for row in lines if row["loss"] is None] == [failed]
    assert load_run(out).snapshot_steps == load_run(finished).snapshot_steps


def test_the_windows_that_are_named_are_those_of_the_batch(batches: Batches) -> None:
    for number in (0, 3):
        np.testing.assert_array_equal(batches._windows.read(batches.windows(number)), batches.at(number))


def test_one_more_than_are_allowed_ends_the_run(
    text: Path, tmp_path: Path, batches: Batches, poison: Poison, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in between, too: what was left out is counted on."""
    poison(sums(batches, 3, 5))
    whole, parts, skips = tmp_path / "whole", tmp_path / "parts", {"train.skip_nonfinite": 1}
    assert cli.main(arguments(whole, text, skips)) == 77
    err = capsys.readouterr().err
    left_out = "step 3: the loss is nan; the update is left out, 1 of the 1 that train.skip_nonfinite allows\n"
    assert err == f"tiedjax: whole: {left_out}" + end_line(whole, 5, skipped=1)
    assert cli.main(arguments(parts, text, {**skips, "train.stop_at": 4})) == 0
    assert int(saved_state(parts, 4)["skipped"]) == 1
    assert_same_run(parts, whole, 4)
    capsys.readouterr()
    for fewer in (1, 0):  # as many as were left out before may be too many by now
        assert cli.main(arguments(parts, text, {"train.skip_nonfinite": fewer})) == 77
        assert capsys.readouterr().err == end_line(parts, 5, skipped=1)


def test_a_state_that_an_update_made_infinite_is_not_saved(
    text: Path,
    tmp_path: Path,
    batches: Batches,
    poison: Poison,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poison(sums(batches, 4))
    monkeypatch.setattr(loop, "_all_finite", lambda state: int(state.step) != 3)
    out = tmp_path / "run"
    assert cli.main(arguments(out, text)) == 77
    assert capsys.readouterr().err == (
        "tiedjax: step 4: the loss is nan, after an update that was not finite; the windows of its batch are in "
        f"{out}/not_finite.json; try a lower optimizer.learning_rate\n"
    )
    assert not list((out / "checkpoints").iterdir())
    assert json.loads((out / "not_finite.json").read_text())["state"] is None


def test_what_is_said_names_what_was_not_finite() -> None:
    assert str(LeftOut(3, math.inf, math.nan)) == "step 3: the loss is inf"
    assert str(LeftOut(3, 2.5, math.inf)) == "step 3: the norm of the gradient is inf"
    assert str(LeftOut(3, 2.5, 0.5)) == "step 3: the norm of the gradient with its role scales is not finite"


# ---- A cluster ----


PRELUDE = """
import sys
sys.path.insert(0, "tests")
from tiedjax import step
from tiedjax.cli import main
from test_not_finite import poisoned
step.loss_and_gradients = poisoned({sums})
sys.exit(main(sys.argv[1:]))
"""


def two_processes(argv: Sequence[str], poisonous: Sequence[int]) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id"]
    program = PRELUDE.format(sums=list(poisonous))
    return [start(["-c", program, *argv, *flags, str(number)]) for number in range(2)]


@pytest.mark.slow
def test_two_processes_end_at_one_state_and_go_on_from_there(text: Path, tmp_path: Path, batches: Batches) -> None:
    out, whole, skips = tmp_path / "run", tmp_path / "whole", {"train.skip_nonfinite": 1}
    bad = sums(batches, 5)
    ends = [finish(process, status=77)[1] for process in two_processes(arguments(out, text), bad)]
    for error in ends:
        last = re.sub(r"^tiedjax: process \d failed: ", "tiedjax: ", error.splitlines(keepends=True)[-1])
        assert last == end_line(out, 5)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["4"]
    assert json.loads((out / "not_finite.json").read_text())["windows"] == batches.windows(4)
    for folder in (out, whole):
        for process in two_processes(arguments(folder, text, skips), bad):
            finish(process)
    assert_same_run(out, whole)
    assert [row["step"] for row in rows(out) if row["loss"] is None] == [5]
