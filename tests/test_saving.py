"""A disk that is full for a while costs nothing; one that stays full costs what came after the newest state."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import pytest
from conftest import slow_but
from runs import STEPS, arguments, assert_same_run

from tiedjax import cli, load_run, saving
from tiedjax.host import process

FULL = "[Errno 28] No space left on device"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "PAUSES", (0.0, 0.0, 0.0))


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[str, int], bool]) -> None:
    """Saves fail where `fails` says so of their folder and of how many times it has been tried."""
    finalize, tried = ocp.PyTreeCheckpointHandler.finalize, dict[str, int]()

    def full(self: Any, directory: Any) -> None:
        place = "/".join(str(directory).split("/")[-3:-1]).split(".")[0]
        tried[place] = tried.get(place, 0) + 1
        if fails(place, tried[place]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finalize(self, directory)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", full)


@pytest.mark.parametrize(
    "place", slow_but(["checkpoints/3", f"checkpoints/{STEPS}", f"snapshots/{STEPS}"], "checkpoints/3")
)
def test_a_save_that_fails_is_made_again(
    place: str,
    finished: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The first state, and what is saved at the end: the run waits for these."""
    out = tmp_path / "run"
    failing(monkeypatch, lambda where, times: where == place and times <= 2)
    assert cli.main(arguments(out, text, {"train.checkpoint_every": 3})) == 0
    said, stderr = capfd.readouterr()
    folder, step = place.split("/")
    assert said.count(f"{out / folder}: step {step} cannot be saved: {FULL}; it is tried again in 0 s\n") == 2
    assert "Traceback" not in stderr
    assert_same_run(out, finished)
    run = load_run(out)
    assert run.snapshot_steps == load_run(finished).snapshot_steps
    assert run.checkpoint_steps[-1] == STEPS


@pytest.mark.parametrize("place", slow_but(["checkpoints/6", "snapshots/4"], "checkpoints/6"))
def test_a_save_beside_training_that_fails_is_said_and_training_goes_on(
    place: str,
    finished: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of a state the next step's takes the place at once."""
    out = tmp_path / "run"
    failing(monkeypatch, lambda where, times: where == place)
    changes = {"train.checkpoint_every": 3, "train.keep_checkpoints": 9, "train.steps": STEPS}
    assert cli.main(arguments(out, text, changes)) == 0
    said, stderr = capfd.readouterr()
    folder, step = place.split("/")
    assert f"{out / folder}: step {step} cannot be saved: {FULL}; the run goes on without it\n" in said
    assert "Traceback" not in stderr
    assert_same_run(out, finished)
    run = load_run(out)
    if folder == "checkpoints":
        assert set(run.checkpoint_steps) - {7} == {3, STEPS}
    else:
        assert run.snapshot_steps == [step for step in load_run(finished).snapshot_steps if step != 4]


def test_a_disk_that_stays_full_ends_the_run_with_its_older_state(
    finished: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        failing(patch, lambda where, times: where == f"checkpoints/{STEPS}")
        assert cli.main(arguments(out, text, {"train.checkpoint_every": 4})) == 1
    assert capfd.readouterr().err == (
        f"tiedjax: {out / 'checkpoints'}: step {STEPS} cannot be saved: {FULL}; the newest there is that of step 4\n"
    )
    assert load_run(out).checkpoint_steps == [4]
    assert cli.main(arguments(out, text)) == 0
    assert_same_run(out, finished)


def room(monkeypatch: pytest.MonkeyPatch, *left: int) -> None:
    """What the disk has left, each time that it is asked; the last from then on."""
    answers = iter(left)
    now = [0]

    def usage(path: Any) -> Any:
        now[0] = next(answers, now[0])
        return shutil._ntuple_diskusage(10**9, 10**9 - now[0], now[0])  # type: ignore[attr-defined]

    monkeypatch.setattr(saving.shutil, "disk_usage", usage)


def test_a_run_that_cannot_fit_is_refused_before_it_writes(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    room(monkeypatch, 300_000)
    assert cli.main(arguments(out, text)) == 2
    stderr = capfd.readouterr().err
    assert stderr == (
        f"tiedjax: {out}: there is room for 292.97 KiB, and up to {stderr.split('up to ')[1].split(' will')[0]} will "
        "be written; free some, choose another --out, or see train.keep_checkpoints and train.snapshot_gib\n"
    )
    assert not [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_state_without_room_is_not_begun(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    room(monkeypatch, 10**8, 10**8, 1000, 10**8)
    assert cli.main(arguments(out, text)) == 0
    said = capfd.readouterr().out
    assert f"{out / 'snapshots'}: step 1 cannot be saved: it takes " in said
    assert ", and there is room for 1000 B; it is tried again in 0 s\n" in said
    assert load_run(out).snapshot_steps[:2] == [0, 1]


def test_states_are_saved_by_the_clock_too(
    finished: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of half a minute a step: every second step, beside those that are multiples of 5."""

    def clock() -> float:
        return next(times)

    times: Iterator[float] = iter(range(0, 10**6, 10))
    saved: list[int] = []
    save = saving.save

    def observed(checkpoints: Any, step: int, *args: Any, **kwargs: Any) -> None:
        if checkpoints.directory.name == "checkpoints":
            saved.append(step)
        save(checkpoints, step, *args, **kwargs)

    monkeypatch.setattr(saving, "save", observed)
    monkeypatch.setattr(process, "Requests", partial(process.Requests, clock=clock))
    out = tmp_path / "run"
    changes = {"train.checkpoint_minutes": 0.5, "train.checkpoint_every": 5, "train.eval_batches": 1}
    assert cli.main(arguments(out, text, changes)) == 0
    assert saved == [3, 5, 8]
    assert load_run(out).config.train.checkpoint_minutes == 0.5


def test_what_killed_and_failed_saves_have_left_is_removed(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert cli.main(arguments(out, text, {"train.stop_at": 2})) == 0
    for folder in ("checkpoints", "snapshots"):
        left = out / folder / "3.orbax-checkpoint-tmp" / "tree"
        left.mkdir(parents=True)
        (left / "half").write_bytes(b"...")
    assert cli.main(arguments(out, text, {"train.stop_at": 4})) == 0
    assert not list(out.rglob("*.orbax-checkpoint-tmp*"))
