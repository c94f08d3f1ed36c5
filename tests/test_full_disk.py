"""Disks that are really full, under all that is written: it is said, nothing is half-written, room makes up for it.

Metrics and TensorBoard's files are in test_loop.py, saves that fail for a while in test_saving.py.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disks import enlarge, fill, kib, small_disk
from programs import finish, start
from runs import arguments, assert_same_run, rows

from tiedjax import cli, load_run, saving
from tiedjax.checkpoint import Checkpoints

FULL = "No space left on device"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "PAUSES", (0.0, 0.0, 0.0))


@pytest.fixture(params=["seen before", "met while writing"])
def _noticed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a disk is looked at before a save, or fills while that is written."""
    if request.param == "met while writing":
        monkeypatch.setattr(saving, "_refuse_without_room", lambda *_: None)


def fill_before_step(monkeypatch: pytest.MonkeyPatch, disk: Path, step: int) -> None:
    """Of those on this disk the save of this step finds room for nothing, those before have been completed."""
    save = Checkpoints.save

    def on_a_full_disk(self: Checkpoints, at: int, *rest: Any) -> None:
        if self.directory == disk and at == step and not (disk / "filler").exists():
            fill(disk, leave=8)
        save(self, at, *rest)

    monkeypatch.setattr(Checkpoints, "save", on_a_full_disk)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # each a traceback that nobody reads
@pytest.mark.usefixtures("_noticed")
@pytest.mark.parametrize(("folder", "without_room"), [("checkpoints", 6), ("snapshots", 4)])
def test_a_disk_on_which_the_next_save_has_no_room(
    folder: str,
    without_room: int,
    finished: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The first ones are there; the run ends loudly with its older state, and goes on from it once there is room."""
    out, changes = tmp_path / "run", {"train.checkpoint_every": 3}
    with small_disk(out / folder, 10_000) as disk:
        fill_before_step(monkeypatch, disk, without_room)
        assert cli.main(arguments(out, text, changes)) == 1
        said, stderr = capfd.readouterr()
        assert f"{disk}: step " in said
        assert re.fullmatch(
            rf"tiedjax: {re.escape(str(disk))}: step \d cannot be saved: .*; the newest there is that of step \d\n",
            stderr,
        )
        saved = load_run(out)
        if folder == "checkpoints":
            assert saved.checkpoint_steps == [3]
        else:
            assert saved.checkpoint_steps[-1] >= 3
            assert saved.snapshot_steps == [0, 1, 2]
        steps = [row["step"] for row in rows(out)]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) > 3
        enlarge(disk, 20_000)
        assert cli.main(arguments(out, text, changes)) == 0
        assert_same_run(out, finished)


NO_MORE_FILES = """
import sys, time
from pathlib import Path
from orbax.checkpoint._src.multihost import multihost
from tiedjax import saving
from tiedjax.checkpoint import Checkpoints
from tiedjax.cli import main
from tiedjax.host import ending

disk, multihost._DEFAULT_BARRIER_TIMEOUT, more = Path(sys.argv.pop(1)), int(sys.argv.pop(1)), int(sys.argv.pop(1))
saving.PAUSES, save = (0.0, 0.0, 0.0), Checkpoints.save

def with_two_left(self, at, *rest):
    if self.directory == disk and at == 4:
        made = iter(range(1000))
        try:
            while True:
                (disk / f"file-{next(made)}").touch()
        except OSError:
            (disk / "file-0").unlink(missing_ok=True)
            (disk / "file-1").unlink(missing_ok=True)
    save(self, at, *rest)

Checkpoints.save = with_two_left
status = main()
time.sleep(more)
ending.leave(status)
"""


@pytest.mark.parametrize(("patience", "more"), [(300, 0), (1, 3)])
def test_a_disk_that_takes_no_more_files_holds_no_process(patience: int, more: int, text: Path, tmp_path: Path) -> None:
    """Threads of the save would wait, for folders that cannot be made, for five minutes, and then say so."""
    out = tmp_path / "run"
    with small_disk(out / "snapshots", 20_000, files=300) as disk:
        run = [disk, str(patience), str(more), *arguments(out, text, {"train.checkpoint_every": 3})]
        _, stderr = finish(start(["-c", NO_MORE_FILES, *run]), seconds=60, status=1)
    cause = rf"tiedjax: {re.escape(str(disk))}: step \d cannot be saved: .*; the newest there is that of step 2\n"
    assert re.fullmatch(cause, stderr)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_full_disk_of_prepared_data(
    finished: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "cache", 16) as cache:
        monkeypatch.setenv("TIEDJAX_CACHE", str(cache))
        assert cli.main(arguments(tmp_path / "run", text)) == 2
        stderr = capfd.readouterr().err
        said = f"tiedjax: {cache}/prepared/KEY: cannot be written: {FULL}; name another folder\n"
        assert re.sub("prepared/[0-9a-f]{20}", "prepared/KEY", stderr) == said
        assert not files(cache)
        enlarge(cache, 10_000)
        assert cli.main(arguments(tmp_path / "run", text)) == 0
        assert_same_run(tmp_path / "run", finished)


def test_a_full_disk_of_token_counts(
    finished: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "cache", 1000) as cache:
        monkeypatch.setenv("TIEDJAX_CACHE", str(cache))
        assert cli.main(arguments(tmp_path / "run", text)) == 0
        shutil.rmtree(tmp_path / "run")
        (counts,) = cache.rglob("counts-16.npy")
        counts.unlink()
        filler = fill(cache)
        capfd.readouterr()
        assert cli.main(arguments(tmp_path / "run", text)) == 2
        assert capfd.readouterr().err == f"tiedjax: {counts}: cannot be written: {FULL}\n"
        assert not [path for path in files(cache) if path.name.startswith(".counts")]
        filler.unlink()
        assert cli.main(arguments(tmp_path / "run", text)) == 0
        assert_same_run(tmp_path / "run", finished)


def test_a_full_disk_of_compiled_programs_stops_no_run(finished: Path, text: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "compiled", 16) as compiled:
        fill(compiled)
        settings = {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        _, stderr = finish(start(["-m", "tiedjax", *arguments(tmp_path / "run", text)], **settings))
        assert "Traceback" not in stderr
        assert_same_run(tmp_path / "run", finished)


@pytest.fixture
def study(study_folder: Path, tmp_path: Path) -> Iterator[Path]:
    """What a study has written, on a disk of its own, and its runs on another."""
    whole = study_folder / "study"
    with small_disk(tmp_path / "study", 4 * kib(whole)) as disk:
        for name in ("results.json", "report.html"):
            shutil.copy(whole / name, disk / name)
        (disk / "runs").symlink_to(whole / "runs")
        yield disk


def contents(folder: Path, *names: str) -> list[bytes]:
    return [(folder / name).read_bytes() for name in names]


def test_a_full_disk_of_a_report(study: Path, capfd: pytest.CaptureFixture[str]) -> None:
    written = ("results.json", "report.html")
    old, filler = contents(study, *written), fill(study)
    assert cli.main(["report", str(study)]) == 2
    stderr = capfd.readouterr().err
    assert re.fullmatch(rf"tiedjax: {re.escape(str(study))}/\S+: cannot be written: {FULL}\n", stderr)
    assert contents(study, *written) == old
    assert {path.name for path in files(study)} == {*written, "filler"}
    filler.unlink()
    assert cli.main(["report", str(study)]) == 0


@pytest.mark.slow
def test_a_full_disk_of_results(study: Path, study_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    written = ("results.json", "report.html")
    old, filler = contents(study, *written), fill(study, leave=16)  # for what is written before
    command = ["study", str(study_folder / "STUDY.yaml"), "--out", str(study)]
    command += ["--workers", "1", "--analyse-only", "--instruments", "norms"]
    assert cli.main(command) == 2
    assert capfd.readouterr().err == f"tiedjax: {study}/results.json: cannot be written: {FULL}\n"
    assert contents(study, *written) == old
    filler.unlink()
    assert cli.main(command) == 0
