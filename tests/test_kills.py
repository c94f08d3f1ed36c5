"""A process that is killed, at whatever moment, costs nothing: the same command ends with an undisturbed run's bits."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import slow_but
from programs import TESTS, finish, start
from runs import arguments, assert_same_run
from stores import Store, served
from test_study import results

from tiedjax import cli, load_run
from tiedjax.host import storage

Call = tuple[str, str, int, str]  # as kill_program.py takes it
CHANGES = {"train.checkpoint_every": 3, "train.keep_checkpoints": 1, "train.eval_every": 4}  # states of 3, 6 and 8


def before(function: str, pattern: str = "", number: int = 1) -> Call:
    return function, pattern, number, "before"


def after(function: str, pattern: str = "", number: int = 1) -> Call:
    return function, pattern, number, "after"


def appearing(path: str) -> Call:
    """The moment in which a file, written whole under another name, gets its own."""
    return before("os:replace", f"{path}$")


def removing(save: str) -> list[Call]:
    """In the middle of the removal of a save: some of its files are gone."""
    return [before("shutil:rmtree", f"{save}$"), before("os:rmdir")]


def killed(argv: list[str], calls: list[Call], **environment: str) -> None:
    """Runs a command until it kills itself; that it ends by itself, as it never came there, is an error."""
    command = [TESTS / "kill_program.py", json.dumps(calls), *argv]
    finish(start(command, **environment), status=-signal.SIGKILL)


def assert_undisturbed(run: Path, whole: Path) -> None:
    """States, lines, snapshots and what describes a run hold the same bits, and no unfinished save is left."""
    assert_same_run(run, whole)
    assert all(path.name.isdigit() for path in (run / "checkpoints").iterdir())
    assert {path.name for path in (run / "snapshots").iterdir()} == {
        path.name for path in (whole / "snapshots").iterdir()
    }
    one, other = load_run(run), load_run(whole)
    for step in other.snapshot_steps:
        assert one.tables(step).input.tobytes() == other.tables(step).input.tobytes(), step
    for name in ("config.yaml", "tokenizer.json", "token_counts.npy"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


# ---- A run on a disk ----

# What the process is killed at, each list one command's; and the steps of the states that lie there then.
RUN: dict[str, tuple[list[list[Call]], list[int]]] = {
    "before the counts of the run": ([[appearing("run/token_counts.npy")]], []),
    "before its config": ([[appearing("run/config.yaml")]], []),
    "in the first snapshot": ([[before("os:rename", "snapshots/0$")]], []),
    "before the first state": ([[before("tiedjax.checkpoint:Checkpoints.save", r"checkpoints 3\b")]], []),
    "in the first state": ([[before("os:rename", "checkpoints/3$")]], []),
    "between the first state and its record": ([[appearing("saved_state.json")]], [3]),
    "in an evaluation": (
        [[before("tiedjax.evaluation:Evaluation.__call__"), before("tiedjax.host.watchdog:Watchdog.alive", "", 2)]],
        [3],
    ),
    "in a line of metrics": ([[("os:write", '"step": 5,', 1, "half")]], [3]),
    "between lines of metrics and their sync": ([[before("tiedjax.metrics:MetricsLog.sync", "", 5)]], [3]),
    "between a snapshot and the state of its step": (
        [[before("tiedjax.checkpoint:Checkpoints.save", r"checkpoints 6\b")]],
        [3],
    ),
    "in a state": ([[before("os:rename", "checkpoints/6$")]], [3]),
    "in the removal of an older state": ([removing("checkpoints/3")], [3, 6]),
    "in the last state": ([[before("os:rename", "checkpoints/8$")]], [6]),
    "after the last state": ([[after("os:rename", "checkpoints/8$")]], [6, 8]),
    "before the log is closed": ([[before("tiedjax.recording:Recorder.close")]], [8]),
    "before the states are closed": ([[before("tiedjax.checkpoint:Checkpoints.close", "checkpoints$")]], [8]),
    "in the removal of a later snapshot, after a kill": (
        [[before("tiedjax.checkpoint:Checkpoints.save", r"checkpoints 6\b")], removing("snapshots/6")],
        [3],
    ),
}
PREPARATION: dict[str, Call] = {
    "a tokenizer is trained": after("tiedjax.data.tokenizer:train_bpe"),
    "shards are half written": before("tiedjax.data.shards:ShardWriter.add", number=40),
    "tokenizer.json is written, meta.json is not": before("tiedjax.data.prepared:fingerprint_of"),
    "the folder appears": before("os:rename", "prepared/[0-9a-f]{20}$"),
    "the counts appear": appearing("counts-16.npy"),
}
QUICK_RUN = (
    "in an evaluation",
    "in a line of metrics",
    "between a snapshot and the state of its step",
    "in the removal of an older state",
)


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert cli.main(arguments(out, text, CHANGES)) == 0
    return out


@pytest.mark.parametrize("moment", slow_but(RUN, *QUICK_RUN))
def test_a_run_that_was_killed(moment: str, undisturbed: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = arguments(out, text, CHANGES)
    kills, states = RUN[moment]
    for calls in kills:
        killed(argv, calls)
    assert storage.saved_steps(out / "checkpoints") == states
    assert cli.main(argv) == 0
    assert_undisturbed(out, undisturbed)


@pytest.mark.parametrize("moment", slow_but(PREPARATION, "shards are half written"))
def test_a_preparation_that_was_killed(
    moment: str, undisturbed: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIEDJAX_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    argv = arguments(out, text, CHANGES)
    killed(argv, [PREPARATION[moment]])
    assert cli.main(argv) == 0
    assert_undisturbed(out, undisturbed)
    (folder,) = (tmp_path / "cache" / "prepared").glob("[!.]*")
    assert not list(folder.parent.glob(".*.partial"))


# ---- A study ----

TRAINING: dict[str, Call] = {
    "between two runs": before("tiedjax.work:train_run", number=2),
    "inside a run": appearing("one-3/saved_state.json"),
    "in the last state of a run": before("os:rename", "one-3/checkpoints/8$"),
}
ANALYSIS: dict[str, Call] = {
    "the results appear": appearing("results.json"),
    "some figures are drawn": after("os:replace", r"figures/[^/]*\.png$", 2),
    "the report appears": appearing("report.html"),
}


@pytest.mark.parametrize("moment", slow_but(TRAINING, "between two runs"))
def test_the_training_of_a_study_that_was_killed(moment: str, study_folder: Path, tmp_path: Path) -> None:
    """Of one of its seeds; the runs are those of the study that nobody disturbed."""
    shutil.copy(study_folder / "CONFIG.yaml", tmp_path / "CONFIG.yaml")
    study = (study_folder / "STUDY.yaml").read_text()
    (tmp_path / "STUDY.yaml").write_text(study.replace("seeds: [3, 5]", "seeds: [3]"))
    argv = ["study", str(tmp_path / "STUDY.yaml"), "--out", str(tmp_path / "out"), "--workers", "1", "--train-only"]
    killed(argv, [TRAINING[moment]])
    assert cli.main(argv) == 0
    for name in ("two-3", "one-3"):
        assert_same_run(tmp_path / "out" / "runs" / name, study_folder / "study" / "runs" / name)


@pytest.mark.parametrize("moment", slow_but(ANALYSIS))
def test_the_analysis_of_a_study_that_was_killed(moment: str, study_folder: Path, tmp_path: Path) -> None:
    """Of results and report either the old ones are there or the new ones."""
    for name in ("killed", "whole"):
        shutil.copytree(study_folder / "study", tmp_path / name)
    command = ["study", str(study_folder / "STUDY.yaml"), "--workers", "1", "--analyse-only", "--instruments", "norms"]
    killed([*command, "--out", str(tmp_path / "killed")], [ANALYSIS[moment]])
    results(tmp_path / "killed")
    assert (tmp_path / "killed" / "report.html").read_text().endswith("</html>")
    for name in ("killed", "whole"):
        assert cli.main([*command, "--out", str(tmp_path / name)]) == 0
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    figures = [
        sorted(path.name for path in (tmp_path / name / "figures").glob("[!.]*")) for name in ("killed", "whole")
    ]
    assert figures[0] == figures[1]


# ---- A run in an object store ----

STORE: dict[str, tuple[Call, list[int]]] = {
    "before metrics are uploaded": (before("tiedjax.host.storage:write_atomically", "metrics.jsonl", 5), [3]),
    "between metrics and their state": (after("tiedjax.host.storage:write_atomically", "metrics.jsonl", 5), [3]),
    "a state is on its way": (after("tiedjax.checkpoint:Checkpoints.save", r"checkpoints 6\b"), [3]),
    "before the first state's record": (before("tiedjax.loop:write_atomically", "saved_state.json"), [3]),
    "before the lease is given back": (before("tiedjax.host.storage:Lease.__exit__"), [8]),
}


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with served() as store:
        yield store


@pytest.mark.parametrize("moment", slow_but(STORE))
def test_a_run_in_a_store_that_was_killed(
    moment: str, undisturbed: Path, text: Path, store: Store, tmp_path: Path
) -> None:
    name, (call, states) = re.sub("[^a-z0-9]+", "-", moment), STORE[moment]
    argv = arguments(f"gs://bucket/{name}", text, CHANGES)
    killed(argv, [call], **store.environment)
    committed = re.compile(rf"{name}/checkpoints/(\d+)/{storage.COMMITTED}")
    assert sorted(int(match[1]) for match in map(committed.fullmatch, store.objects(name)) if match) == states
    finish(start(["-m", "tiedjax", *argv], **store.environment))
    assert_undisturbed(store.download(name, tmp_path / "run"), undisturbed)
