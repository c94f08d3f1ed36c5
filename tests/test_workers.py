"""Runs side by side are the runs of one after the other, and end as one program does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import slow_but
from programs import REPOSITORY, finish, start, until
from runs import SHRUNK, STEPS, arguments, assert_same_run, rows, start_commands, write_config, write_text

from tiedjax import load_run, study
from tiedjax.cli import main
from tiedjax.config_files import load_run_config, to_tree
from tiedjax.errors import StoreError, TakenOverError, UserError
from tiedjax.host.workers import Aside, Crew, ProcessEnded, Task
from tiedjax.plan import load_study

PROGRAM = """
import json, sys
from tiedjax.errors import TrainingError
from tiedjax.host.workers import Aside, Crew, ProcessEnded, Task
trees = json.loads(sys.argv[1])
train = "tiedjax.work:train_run"
tasks = [Task(out, train, {"config": tree, "out": out, "until": None}) for out, tree in trees.items()]
begins = lambda place, task: print("begins", place, flush=True)
try:
    with Crew(int(sys.argv[2]), int(sys.argv[3]), lambda line: print(line, flush=True)) as crew:
        results = crew.run(tasks, begins, lambda task, result: not result["finished"])
except TrainingError as error:
    print("failed:", error, flush=True)
    sys.exit(1)
print(json.dumps({"signal": crew.signal, "finished": [result["finished"] for result in results.values()]}), flush=True)
"""


def side_by_side(
    runs: Mapping[Path, Mapping[str, Any]], text: Path, workers: int = 2, threads: int = 2
) -> subprocess.Popen[str]:
    """Starts a process that trains shrunk configs/tiny.yaml with each of these changes, into the directories named."""
    trees = {}
    for out, changes in runs.items():
        values = {"data.source": f"text:{text}", **SHRUNK, "train.threads": threads, **changes}
        overrides = {key: str(value) for key, value in values.items()}
        trees[str(out)] = to_tree(load_run_config(REPOSITORY / "configs" / "tiny.yaml", overrides))
    return start(["-c", PROGRAM, json.dumps(trees), str(workers), str(threads)])


def lines(run: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return len((run / "metrics.jsonl").read_text().splitlines())
    return 0


def workers_of(parent: int) -> list[int]:
    """The processes whose parent this is, that are `tiedjax.host.workers`."""
    children = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(status[1]) == parent and b"tiedjax.host.workers" in (entry / "cmdline").read_bytes():
                children.append(int(entry.name))
    return children


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


ENDLESS = {"train.steps": 100_000, "train.snapshot_every": 100_000, "train.eval_batches": 1}


def test_runs_side_by_side_are_those_of_one_after_the_other(finished: Path, text: Path, tmp_path: Path) -> None:
    """Three runs for two workers, every bit; two of them share what one worker compiled."""
    runs: dict[Path, dict[str, Any]] = {tmp_path / "run": {}, tmp_path / "other": {"train.seed": 1}}
    runs[tmp_path / "untied"] = {"tying.scheme": "untied"}
    out, err = finish(side_by_side(runs, text))
    assert err == ""
    said = out.splitlines()
    assert [line for line in said if line.startswith("begins")] == ["begins 0", "begins 1", "begins 2"]
    for run in runs:
        assert any(line.startswith(f"{run.name}  {STEPS}/{STEPS}  loss ") for line in said)
    assert json.loads(said[-1]) == {"signal": None, "finished": [True, True, True]}
    assert_same_run(tmp_path / "run", finished)
    alone = tmp_path / "alone"
    assert main(arguments(alone, text, {"tying.scheme": "untied"})) == 0
    assert_same_run(tmp_path / "untied", alone)


def test_the_threads_of_a_run_are_recorded_and_had(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread in a worker and one in a process of its own: the same bits; what was not given is refused."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")  # XLA compiles for the threads that it has
    big = {"model.d_model": 64, "model.d_ff": 256, "model.seq_len": 64, "data.batch_size": 16, "train.threads": 1}
    finish(side_by_side({tmp_path / "one": big}, text, threads=1))
    finish(start_commands([arguments(tmp_path / "own", text, big)]))
    assert load_run(tmp_path / "one").config.train.threads == 1
    assert_same_run(tmp_path / "one", tmp_path / "own")
    finish(start_commands([arguments(tmp_path / "two", text, {**big, "train.threads": 2})]))
    assert rows(tmp_path / "one") != rows(tmp_path / "two"), "else this test would show nothing"


@pytest.mark.parametrize(
    ("raised", "known", "line"),
    [
        ("TakenOverError('lost')", TakenOverError, "lost"),
        ("StoreError('gone')", StoreError, "gone"),
        ("DamagedError('bits')", UserError, "bits"),
        ("OSError(5, 'the store answers: no', 'gs://b/a')", StoreError, "gs://b/a: the store answers: no"),
    ],
)
def test_a_call_fails_as_what_its_caller_knows(
    raised: str, known: type[Exception], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kind of error of a module that the caller has not loaded is what it is a kind of."""
    program = "from tiedjax.errors import StoreError, TakenOverError, UserError\nclass DamagedError(UserError): pass\n"
    (tmp_path / "failing.py").write_text(f"{program}def call():\n    raise {raised}\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    with pytest.raises(known) as caught, Crew(1, 1, print) as crew:
        crew.run([Task("fails", "failing:call", {})])
    assert (type(caught.value), str(caught.value)) == (known, line)


def test_a_call_aside_returns_or_fails_as_the_call_does(tmp_path: Path) -> None:
    aside = Aside(Task("pid", "os:getpid", {}))
    assert workers_of(os.getpid())
    assert aside.returned(seconds=60)
    assert aside.returned(), "it has not to be asked in time"
    assert not workers_of(os.getpid()), "its process ends with the call"
    aside.end()
    aside = Aside(Task("load", "tiedjax.data.prepared:load_prepared", {"directory": str(tmp_path)}))
    with pytest.raises(UserError) as caught:
        aside.returned(seconds=60)
    assert str(caught.value) == f"{tmp_path}: holds no prepared data; make some with: tiedjax data prepare"
    assert not workers_of(os.getpid())


def test_a_call_aside_is_ended_or_said_to_have_ended() -> None:
    aside = Aside(Task("wait", "signal:pause", {}))
    (worker,) = workers_of(os.getpid())
    began = time.monotonic()
    assert not aside.returned()
    assert not aside.returned(seconds=0.5)
    assert 0.4 < time.monotonic() - began < 10
    aside.end()
    assert not alive(worker)
    aside = Aside(Task("wait", "signal:pause", {}))
    os.kill(workers_of(os.getpid())[0], signal.SIGKILL)
    with pytest.raises(ProcessEnded) as caught:
        aside.returned(seconds=60)
    assert str(caught.value) == "wait: its process ended with status -9"
    aside.end()


def test_threads_that_cannot_be_had_are_refused(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tiedjax.host import platform_flags

    monkeypatch.setattr(platform_flags, "use_threads", lambda count: None)
    assert main(arguments(tmp_path / "run", text, {"train.threads": 3})) == 2
    assert capfd.readouterr().err == (
        "tiedjax: train.threads: 3 cannot be had in a process that runs JAX already; start it with NPROC=3 in its "
        "environment\n"
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_prefers_what_it_has_compiled_and_nothing_begins_too_early(workers: int) -> None:
    pid = partial(Task, function="os:getpid", arguments={})
    tasks = [pid("a", kind="x"), pid("b", kind="x", after=(3,)), pid("c", kind="y"), pid("d", kind="x", after=(0,))]
    begun: list[str] = []
    with Crew(workers, 1, lambda line: None) as crew:
        results = crew.run(tasks, lambda place, task: begun.append(task.name))
    assert sorted(results) == [0, 1, 2, 3]
    assert len(set(results.values())) <= workers
    assert [name for name in begun if name != "c"] == ["a", "d", "b"]
    assert begun[1 if workers == 2 else 3] == "c"


@pytest.mark.parametrize("number", slow_but([signal.SIGTERM, signal.SIGINT], signal.SIGTERM))
def test_a_signal_stops_every_run_with_its_state(number: signal.Signals, text: Path, tmp_path: Path) -> None:
    runs = {tmp_path / name: ENDLESS for name in ("a", "b", "c")}
    process = side_by_side(runs, text)
    until(lambda: min(lines(tmp_path / "a"), lines(tmp_path / "b")) >= 3, process)
    process.send_signal(number)
    out, _ = finish(process, seconds=60)
    assert json.loads(out.splitlines()[-1]) == {"signal": number, "finished": [False, False]}
    for name in "ab":
        (step,) = load_run(tmp_path / name).checkpoint_steps
        assert [row["step"] for row in rows(tmp_path / name)] == list(range(1, step + 1))
    assert not (tmp_path / "c").exists()


def test_the_first_failure_is_the_last_word_and_nothing_else_begins(text: Path, tmp_path: Path) -> None:
    diverging = {**ENDLESS, "optimizer.learning_rate": 1e30, "optimizer.warmup_steps": 0, "optimizer.clip_norm": "null"}
    process = side_by_side({tmp_path / "good": ENDLESS, tmp_path / "bad": diverging, tmp_path / "c": ENDLESS}, text)
    out, _ = finish(process, seconds=120, status=1)
    assert out.splitlines()[-1].startswith("failed: step ")
    assert "try a lower optimizer.learning_rate" in out.splitlines()[-1]
    assert not (tmp_path / "c").exists()


def test_a_worker_that_dies_is_said(text: Path, tmp_path: Path) -> None:
    process = side_by_side({tmp_path / "a": ENDLESS, tmp_path / "b": ENDLESS}, text)
    until(lambda: min(lines(tmp_path / "a"), lines(tmp_path / "b")) >= 3, process)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    out, _ = finish(process, seconds=60, status=1)
    last = out.splitlines()[-1]
    assert last in {f"failed: {tmp_path / name}: its process ended with status -9" for name in "ab"}


def test_no_worker_outlives_its_parent(text: Path, tmp_path: Path) -> None:
    """Killed without warning; the same command goes on at once, since nobody holds the runs any more."""
    process = side_by_side({tmp_path / "a": ENDLESS, tmp_path / "b": ENDLESS}, text)
    until(lambda: min(lines(tmp_path / "a"), lines(tmp_path / "b")) >= 3, process)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while any(map(alive, workers)):
        assert time.monotonic() < end, "a worker goes on without its parent"
        time.sleep(0.05)


def test_a_stopped_study_says_so_and_keeps_every_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command: what it is at, exit status 75, and the sentence that says what continues it."""
    monkeypatch.setenv("TIEDJAX_CACHE", str(tmp_path / "cache"))
    text = write_text(tmp_path / "text.jsonl")
    write_config(tmp_path / "config.yaml", text, ENDLESS)
    arms = "{untied: {tying: {scheme: untied}}, tied: {tying: {scheme: tied}}}"
    (tmp_path / "study.yaml").write_text(f"base: config.yaml\narms: {arms}\nseeds: [0]\n")
    out = tmp_path / "out"
    process = start(["-m", "tiedjax", "study", tmp_path / "study.yaml", "--out", out, "--workers", "2"])
    runs = [out / "runs" / name for name in ("untied-0", "tied-0")]
    until(lambda: min(map(lines, runs)) >= 3, process)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = finish(process, seconds=60, status=75)
    assert stdout.startswith(f"preparing text:{text} ...\nscan: ")
    assert stdout.count("preparing ") == 1
    assert "run 1 of 2: untied-0\nrun 2 of 2: tied-0\n" in stdout
    assert [stdout.count(f"\n{run.name}: compiling the train step ...\n") for run in runs] == [1, 1]
    assert stderr == "tiedjax: stopped by SIGTERM; the same command continues from there\n"
    assert [len(load_run(run).checkpoint_steps) for run in runs] == [1, 1]
    assert not (out / "results.json").exists()


def test_workers_follow_the_cores_and_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = load_study(REPOSITORY / "configs" / "studies" / "quick.yaml")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for cores, threads, asked, wanted in [(2, 1, None, 2), (8, 1, None, 8), (64, 1, None, 15), (8, 1, 3, 3)]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert plan.threads == threads
        assert study.workers_for(plan, asked) == wanted
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert study.workers_for(plan) == 1


def test_arms_with_other_threads_are_refused(tmp_path: Path) -> None:
    quick = REPOSITORY / "configs" / "quick.yaml"
    path = tmp_path / "study.yaml"
    arms = "arms: {untied: {tying: {scheme: untied}}, tied: {train: {threads: 1}}}"
    path.write_text(f"base: {quick}\n{arms}\n")
    with pytest.raises(UserError, match=r"train\.threads: must be one number for all arms, got \[1, 2\]"):
        load_study(path)


def test_an_error_whose_kind_a_crew_does_not_know_keeps_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(
        "from tiedjax.checkpoint import DamagedError\ndef read():\n    raise DamagedError('step 5: is damaged')\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with Crew(1, 1, print) as crew, pytest.raises(UserError) as caught:
        crew.run([Task("reading", "broken:read", {})])
    assert str(caught.value) == "step 5: is damaged"
