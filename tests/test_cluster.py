"""Two real processes are one run; and the launchers start, stop and end exactly what they should."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from programs import REPOSITORY, environment, finish, start, until
from runs import STEPS, arguments, assert_same_run, rows, write_text

import tiedjax

LAUNCH = REPOSITORY / "launch"
STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test() -> Iterator[None]:
    """Whatever happened, the process group of every launcher ends with the test that started it."""
    yield
    while STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(STARTED.pop().pid, signal.SIGKILL)


def launch(script: str, *args: str | int | Path, devices: int = 1, path: Path | None = None) -> subprocess.Popen[str]:
    """Starts a launcher in a process group of its own, with `path` or this Python's programs found first."""
    first = path or Path(sys.executable).parent
    process = subprocess.Popen(
        ["bash", str(LAUNCH / script), *map(str, args)],
        cwd=REPOSITORY,
        env=environment(devices, PATH=f"{first}{os.pathsep}{os.environ['PATH']}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whoever runs the tests in the background may have SIGINT ignored, which a shell cannot undo.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    STARTED.append(process)
    return process


# ---- A run of two processes ----


def test_two_processes_are_the_run_of_one(finished: Path, text: Path, tmp_path: Path) -> None:
    """Parameters cut over both processes, two devices each: every line and parameter agrees to 1e-5."""
    out = tmp_path / "run"
    argv = arguments(out, text, {"mesh.fsdp": 4})[1:]
    stdout, stderr = finish(launch("local.sh", 2, *argv, devices=2))
    assert f"run  {STEPS}/{STEPS}" in stdout
    assert f"  {STEPS}/{STEPS}" not in stderr  # process 1 leaves speaking to process 0
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in finished.iterdir())
    assert [p.name for p in (out / "checkpoints").iterdir()] == [str(STEPS)]
    two, one = tiedjax.load_run(out), tiedjax.load_run(finished)
    assert two.snapshot_steps == one.snapshot_steps
    assert two.metrics.keys() == one.metrics.keys()
    for name in two.metrics.keys() - {"tokens_per_second"}:
        # Where two role gradients cancel, Adam divides both by nearly 0: rounding grows with what it makes of them.
        rtol = 1e-3 if "update" in name or "change" in name or name.startswith("m_") else 1e-5
        np.testing.assert_allclose(two.metrics[name], one.metrics[name], rtol=rtol, atol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), two.params(), one.params())
    np.testing.assert_array_equal(two.tables(0).input, one.tables(0).input)
    np.testing.assert_array_equal(two.token_counts, one.token_counts)


def test_sigterm_stops_both_processes_at_one_step_and_the_run_continues(text: Path, tmp_path: Path) -> None:
    changes = {"train.steps": 100_000, "train.snapshot_every": 100_000, "train.eval_batches": 1}
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = launch("local.sh", 2, *arguments(stopped, text, changes)[1:])
    until(lambda: (stopped / "metrics.jsonl").exists() and len(rows_so_far(stopped)) >= 5, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = finish(process, status=75)
    assert stderr.count("stopped by SIGTERM; the same command continues") == 2
    (step,) = (int(p.name) for p in (stopped / "checkpoints").iterdir())
    assert [row["step"] for row in rows(stopped)] == list(range(1, step + 1))
    last = {**changes, "train.stop_at": step + 3}
    finish(launch("local.sh", 2, *arguments(stopped, text, last)[1:]))
    finish(launch("local.sh", 2, *arguments(whole, text, last)[1:]))
    assert_same_run(stopped, whole, step + 3)


def rows_so_far(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


# ---- The launchers themselves, with a stand-in for tiedjax ----


def stand_in(folder: Path, body: str) -> Path:
    """A folder with a `tiedjax`; its `note` writes its pid to pid-I, I being its --process-id (its last argument)."""
    program = folder / "bin" / "tiedjax"
    program.parent.mkdir()
    note = f'for last; do :; done\nnote() {{ echo $$ > "{folder}/pid-$last"; }}'
    program.write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
    program.chmod(0o755)
    return program.parent


def pids(folder: Path) -> list[int]:
    return [int(text) for path in folder.glob("pid-*") if (text := path.read_text().strip())]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_first_failure_ends_the_others_and_is_passed_on(tmp_path: Path) -> None:
    fails = f"until [[ -s {tmp_path}/pid-0 && -s {tmp_path}/pid-2 ]]; do sleep 0.05; done; echo broken >&2; exit 7"
    waits = "sleep 600 & child=$!; trap 'kill $child; exit 143' TERM; note; wait"
    folder = stand_in(tmp_path, f"if ((last == 1)); then note; {fails}; fi\n{waits}")
    process = launch("local.sh", 3, "config.yaml", path=folder)
    _, stderr = finish(process, seconds=60, status=7)
    assert "[1] broken" in stderr
    assert not any(alive(pid) for pid in pids(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_once(tmp_path: Path, number: signal.Signals) -> None:
    """As a terminal does it: Ctrl-C goes to the whole process group; SIGTERM to the launcher alone."""
    body = "sleep 600 & child=$!\ntrap 'echo asked; kill $child; exit 143' TERM\necho ready; note\nwait"
    process = launch("local.sh", 2, "config.yaml", path=stand_in(tmp_path, body))
    until(lambda: len(pids(tmp_path)) == 2, process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    stdout, stderr = finish(process, seconds=60, status=143)
    assert stdout.splitlines() == ["ready", "asked"]
    assert stderr.splitlines() == ["[1] ready", "[1] asked"]
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_local_runs_what_its_dry_run_prints(tmp_path: Path) -> None:
    args = ["2", "a config.yaml", "--train.steps", "3", "--data.source", "text:*.txt"]
    stdout, _ = finish(launch("local.sh", "--dry-run", *args))
    printed = [shlex.split(line) for line in stdout.splitlines()]
    body = f'printf "%s\\n" "$@" > "{tmp_path}/args-$last"'
    finish(launch("local.sh", *args, path=stand_in(tmp_path, body)))
    assert len(printed) == 2
    for i, command in enumerate(printed):
        at = command.index("--coordinator") + 1
        assert command[:2] == ["tiedjax", "train"]
        assert command[2:at] == [*args[1:], "--coordinator"]
        assert command[at].startswith("127.0.0.1:")
        assert command[at + 1 :] == ["--processes", "2", "--process-id", str(i)]
        ran = (tmp_path / f"args-{i}").read_text().splitlines()
        assert [*ran[: at - 1], *ran[at:]] == [*command[1:at], *command[at + 1 :]]
    assert printed[0][at] == printed[1][at]


def test_the_other_launchers_print_what_they_would_run() -> None:
    stdout, _ = finish(launch("slurm.sbatch", "--dry-run", "configs/tiny.yaml", "--out", "a b"))
    (command,) = (shlex.split(line) for line in stdout.splitlines())
    assert command[0] == "srun"
    assert command[command.index("tiedjax") :] == ["tiedjax", "train", "configs/tiny.yaml", "--out", "a b"]
    stdout, _ = finish(launch("tpu_vm.sh", "--dry-run", "pod", "us-east5-a", "configs/tiny.yaml", "--out", "/mnt/a b"))
    *setup, last = (shlex.split(line) for line in stdout.splitlines())
    assert [command[0] for command in setup] == ["git", "gcloud", "gcloud"]
    assert last[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
    assert last[5:-1] == ["pod", "--zone=us-east5-a", "--worker=all"]
    on_the_worker = shlex.split(last[-1].removeprefix("--command="))
    assert on_the_worker == [
        "cd",
        "tiedjax",
        "&&",
        ".venv/bin/tiedjax",
        "train",
        "configs/tiny.yaml",
        "--out",
        "/mnt/a b",
    ]


@pytest.mark.parametrize(
    ("script", "before"), [("local.sh", ["2"]), ("slurm.sbatch", []), ("tpu_vm.sh", ["pod", "us-east5-a"])]
)
def test_every_launcher_runs_studies_too(script: str, before: list[str]) -> None:
    stdout, _ = finish(launch(script, *before, "study", "configs/studies/quick.yaml", "--dry-run"))
    assert "tiedjax study configs/studies/quick.yaml" in stdout.splitlines()[-1].replace("\\", "")
    assert "train" not in stdout


@pytest.mark.parametrize(
    ("script", "args"),
    [
        ("local.sh", []),
        ("local.sh", ["2"]),
        ("local.sh", ["2", "study", "--dry-run"]),
        ("local.sh", ["configs/tiny.yaml", "2"]),
        ("local.sh", ["0", "configs/tiny.yaml", "--dry-run"]),
        ("slurm.sbatch", ["--dry-run"]),
        ("tpu_vm.sh", ["pod", "us-east5-a"]),
        ("tpu_vm.sh", ["pod", "us-east5-a", "study"]),
    ],
)
def test_a_launcher_that_is_called_wrongly_says_so_in_one_line(script: str, args: list[str]) -> None:
    stdout, stderr = finish(launch(script, *args), status=2)
    assert stdout == ""
    assert stderr.count("\n") == 1
    assert f"usage: {'sbatch ' if script == 'slurm.sbatch' else ''}launch/{script}" in stderr


@pytest.mark.parametrize(
    ("script", "before"), [("local.sh", ["2"]), ("slurm.sbatch", []), ("tpu_vm.sh", ["pod", "us-east5-a"])]
)
@pytest.mark.parametrize("argument", ["gs://bucket/run", "--out=s3://bucket/run", "--data.source=text:gs://b/*.txt"])
def test_a_launcher_refuses_an_address_even_in_a_dry_run(script: str, before: list[str], argument: str) -> None:
    stdout, stderr = finish(launch(script, "--dry-run", *before, "configs/tiny.yaml", "--out", argument), status=2)
    assert stdout == ""
    scheme = "s3" if "s3:" in argument else "gs"
    assert stderr.startswith(
        f"launch/{script}: paths must be on a disk, got the {scheme}:// address '{argument}'; usage: "
    )
    assert stderr.count("\n") == 1


def test_processes_with_different_data_are_refused(text: Path, tmp_path: Path) -> None:
    """Each host prepares its own copy: another one on one of them would change the batches without a word."""
    other = write_text(tmp_path / "other.jsonl", seed=7)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = []
    for i, source in enumerate([text, other]):
        flags = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id", str(i)]
        both.append(start(["-m", "tiedjax", *arguments(tmp_path / "run", source), *flags]))
    try:
        errors = [process.communicate(timeout=120)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    refusals = {
        f"data.source: text:{source}: the processes have prepared different data (other files, another Python?); "
        "prepare it once and give all of them prepared:DIR"
        for source in (text, other)
    }
    # Whichever notices first speaks for itself, and the other may pass on what it said.
    last = [re.sub(r"^tiedjax: (process \d failed: )?", "", error.splitlines()[-1]) for error in errors]
    assert set(last) <= refusals
    assert all(process.returncode for process in both)
    assert not (tmp_path / "run" / "config.yaml").exists()
