"""What a run writes about itself, and what it tells the person who waits."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from tiedjax import metrics
from tiedjax.errors import UserError
from tiedjax.metrics import NO_DECILE, MetricsLog, Progress, duration, frequency_deciles
from tiedjax.run import read_metrics


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that `metrics` reads; a test moves it."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


# ---- Deciles ----


def test_deciles_are_equally_many_tokens_from_rare_to_frequent() -> None:
    counts_V = np.random.default_rng(0).permutation(np.arange(1, 101))
    deciles = frequency_deciles(counts_V)
    assert deciles.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(deciles), [10] * 10)
    np.testing.assert_array_equal(deciles, (counts_V - 1) // 10)


def test_tokens_that_never_occur_are_in_no_decile() -> None:
    counts_V = np.array([0, 5, 0, 1, 7, 0])
    deciles = frequency_deciles(counts_V)
    assert set(deciles[counts_V == 0]) == {NO_DECILE}
    assert deciles[3] < deciles[1] < deciles[4]
    assert deciles.max() <= 9
    assert set(frequency_deciles(np.zeros(4))) == {NO_DECILE}


def test_ties_are_cut_the_same_way_every_time_and_never_overtake() -> None:
    counts_V = np.repeat([3, 1, 2], 15)
    deciles = frequency_deciles(counts_V)
    np.testing.assert_array_equal(deciles, frequency_deciles(counts_V))
    order = np.argsort(counts_V, kind="stable")
    assert np.all(np.diff(deciles[order]) >= 0)
    sizes = np.bincount(deciles, minlength=10)
    assert sizes.max() - sizes.min() <= 1


# ---- metrics.jsonl ----


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1, "loss": 2.5, "grad_norm": float("inf"), "deciles": [1.0, float("nan"), -float("inf")]})
    log.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(f"a bare {name}")) == {
        "step": 1,
        "loss": 2.5,
        "grad_norm": None,
        "deciles": [1.0, None, None],
    }


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1, "loss": 2.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]
    log.close()


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    return path


def test_a_log_cut_by_a_crash_is_continued_without_a_gap_or_a_copy(tmp_path: Path) -> None:
    """Steps 1 to 5 were logged, 4 is the checkpoint, and the crash cut the line of step 6."""
    lines = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 6)]
    path = written(tmp_path, "".join(lines) + '{"step": 6, "lo')
    log = MetricsLog(tmp_path, 4)
    for step in (5, 6):
        log.write({"step": step, "loss": 1 / step})
    log.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert path.read_text().startswith("".join(lines))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_only_the_last_line_may_be_cut(tmp_path: Path) -> None:
    assert read_metrics(written(tmp_path, '{"step": 1}\n{"st')) == [{"step": 1}]
    assert read_metrics(written(tmp_path, "")) == []
    with pytest.raises(UserError, match="line 1 is not JSON"):
        read_metrics(written(tmp_path, '{"st\n{"step": 2}\n'))
    with pytest.raises(UserError, match="cannot be read"):
        read_metrics(tmp_path / "none.jsonl")


def test_a_run_without_tensorboard_is_no_less_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1, "loss": 2.5})
    log.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


FILLS = """
import os, pathlib, resource, sys
from tiedjax.metrics import MetricsLog
folder, obstacle = pathlib.Path(sys.argv[1]), sys.argv[2]
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
def fill(full):
    if obstacle == "limit":
        limit(140 if full else resource.RLIM_INFINITY)
    elif full:
        try:
            with (folder / "filler").open("wb", buffering=0) as filler:
                while filler.write(bytes(4096)):
                    pass
        except OSError:
            pass
    else:
        (folder / "filler").unlink()
log = MetricsLog(folder, 0)
for step in range(1, 12):
    if step in (2, 9):
        fill(step == 2)
    log.write({"step": step, "loss": 0.5, "text": "x" * (2000 if obstacle == "disk" else 20)})
    assert (folder / "metrics.jsonl").read_text().endswith("}\\n")
log.close()
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own with room for 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("obstacle", ["limit", "disk"])
def test_on_a_full_disk_lines_are_whole_or_not_there_and_go_on_when_there_is_room(
    tmp_path: Path, request: pytest.FixtureRequest, obstacle: str
) -> None:
    """No room from step 2 to step 8, but for what is left in the block or below the limit: half a line."""
    folder = request.getfixturevalue("small_disk") if obstacle == "disk" else tmp_path
    program = f"import importlib.util; importlib.util.find_spec = lambda name: None{FILLS}"
    result = subprocess.run(
        [sys.executable, "-c", program, str(folder), obstacle], capture_output=True, text=True, timeout=120
    )
    path = folder / "metrics.jsonl"
    rows = read_metrics(path)
    assert path.read_text().endswith("\n")
    steps = [row["step"] for row in rows]
    lost = 11 - len(rows)
    assert lost >= 5
    assert steps == [*range(1, 9 - lost), 9, 10, 11]
    assert [row.get("lines_lost") for row in rows] == [*[None] * (8 - lost), lost, None, None]
    reason = os.strerror(errno.ENOSPC if obstacle == "disk" else errno.EFBIG)
    assert result.stderr == (
        f"tiedjax: {path}: cannot be written: {reason}; the run goes on, and tries again at every line\n"
        f"tiedjax: {path} lost {lost} of 11 lines\n"
    )


def test_a_half_written_line_is_cut_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it could not be cut at once."""
    log, write = MetricsLog(tmp_path, 0), os.write
    log.write({"step": 1})

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def half(file: int, line: bytes) -> int:
        write(file, line[:5])
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(metrics.os, "write", half)
        patch.setattr(metrics.os, "ftruncate", fails)
        log.write({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"ste'
    log.write({"step": 3})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 3, "lines_lost": 1}]


@pytest.mark.parametrize(
    ("steps", "start", "every", "said"),
    [
        ({1: 0, 2: 0, 3: 0}, 3, 1, None),
        ({1: 0, 2: 0, 6: 3}, 6, 1, "lacks 3 lines, the first after step 2"),
        ({3: 2, 4: 0, 6: 1}, 6, 1, "lacks 3 lines, the first after step 0"),
        ({1: 0, 2: 0, 3: 0}, 4, 1, "lacks 1 line, the first after step 3"),
        ({}, 4, 1, "lacks 4 lines, the first after step 0"),
        ({1: 0, 4: 2, 5: 0}, 8, 1, "lacks 5 lines, the first after step 1"),
        ({1: 0, 2: 0, 10: 0, 12: 0}, 19, 10, None),
        ({1: 0, 2: 0, 10: 0, 12: 0}, 20, 10, "lacks 1 line, the first after step 12"),
        ({1: 0, 2: 0, 5: 2, 6: 0}, 2, 1, None),
    ],
)
def test_a_hole_is_said_when_the_run_is_taken_up_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: dict[int, int], start: int, every: int, said: str | None
) -> None:
    rows = [{"step": step} | ({"lines_lost": lost} if lost else {}) for step, lost in steps.items()]
    path = written(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):  # it is said again, and means the same, once a line follows on it
        log = MetricsLog(tmp_path, start, logged_every=every)
        assert capsys.readouterr().err == (f"tiedjax: {path}: {said}; the run goes on without\n" if said else "")
        log.write({"step": start + 1})
        log.close()


def test_a_file_that_cannot_be_opened_is_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    log = MetricsLog(tmp_path, 2, logged_every=1)
    log.write({"step": 3})
    path.rmdir()
    log.write({"step": 4})
    log.close()
    assert read_metrics(path) == [{"step": 4, "lines_lost": 3}]
    assert capsys.readouterr().err == (
        f"tiedjax: {path}: cannot be written: Is a directory; the run goes on, and tries again at every line\n"
        f"tiedjax: {path}: lacks 2 lines, the first after step 0; the run goes on without\n"
        f"tiedjax: {path} lost 1 of 2 lines\n"
    )


def test_what_was_evaluated_late_joins_its_line_or_stands_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, '{"step": 1}\n{"step": 2, "loss": 0.5}\n{"step": 3}\n')
    log = MetricsLog(tmp_path, 2)
    log.complete(2, {"eval_loss": 4.0})
    log.write({"step": 3})
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "loss": 0.5, "eval_loss": 4.0}, {"step": 3}]
    full = lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        log.complete(3, {"eval_loss": 5.0})
        patch.setattr(metrics.os, "write", full)
        log.write({"step": 4})
    log.complete(4, {"eval_loss": 6.0})
    log.close()
    assert read_metrics(path)[2:] == [{"step": 3}, {"step": 4, "eval_loss": 6.0, "lines_lost": 1}]
    assert capsys.readouterr().err == (
        f"tiedjax: {path}: cannot be written: No space left on device; the run goes on, and tries again at every line\n"
        f"tiedjax: {path} lost 2 of 5 lines\n"
    )


# ---- TensorBoard ----


def events(folder: Path) -> list[Any]:
    """Every event of the files in `folder`, oldest file first, each record checked by both of its sums."""
    decoded = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (size,), sums = struct.unpack("<Q", content[:8]), []
            head, body = content[:8], content[12 : 12 + size]
            sums = [*struct.unpack("<I", content[8:12]), *struct.unpack("<I", content[12 + size : 16 + size])]
            assert sums == [masked_crc32c(head), masked_crc32c(body)]
            decoded.append(Event.FromString(body))
            content = content[16 + size :]
    return decoded


def test_tensorboard_reads_every_scalar_and_where_a_run_was_taken_up_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 4)
    log.write({"step": 5, "loss": 2.5, "tokens": 640, "deciles": [1.0, 2.0]})
    log.write({"step": 6, "loss": float("inf"), "tokens": 768})
    log.close()
    version, start, *scalars = events(tmp_path / "tensorboard")
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (5, SessionLog.START)
    assert [(each.step, [(x.tag, x.simple_value) for x in each.summary.value]) for each in scalars] == [
        (5, [("loss", 2.5), ("tokens", 640.0)]),
        (6, [("loss", float("inf")), ("tokens", 768.0)]),
    ]
    assert all(abs(each.wall_time - time.time()) < 600 for each in (start, *scalars))


def test_scalars_are_on_disk_half_a_minute_later(tmp_path: Path, clock: list[float]) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2):
        log.write({"step": step, "loss": 2.5})
    while log._sinks[0]._arrived < 2:
        time.sleep(0.01)
    assert events(tmp_path / "tensorboard") == []
    clock[0] += metrics.FLUSH_SECONDS
    log.write({"step": 3, "loss": 2.5})
    for _ in range(500):  # its thread writes it soon
        if events(tmp_path / "tensorboard"):
            break
        time.sleep(0.01)
    assert [each.step for each in events(tmp_path / "tensorboard")[2:]] == [1, 2, 3]
    log.close()


@pytest.mark.parametrize("times", [0, 1, 50])
def test_a_full_disk_ends_tensorboard_with_one_line_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], times: int
) -> None:
    """Whichever write it is that fails first."""
    write, calls = EventsWriter.write_event, []

    def full(self: EventsWriter, event: Any) -> None:
        calls.append(event)
        if len(calls) > times:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, event)

    monkeypatch.setattr(EventsWriter, "write_event", full)
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 101):
        log.write({"step": step, "loss": 2.5})
    log.close()
    assert len(calls) == times + 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 100
    assert capsys.readouterr().err == (
        f"tiedjax: {tmp_path}/tensorboard: TensorBoard's files cannot be written: No space left on device; "
        "the run goes on, with every number in metrics.jsonl\n"
        f"tiedjax: {tmp_path}/tensorboard: TensorBoard's files lost 100 of 100 lines\n"  # what waited for a flush too
    )


# ---- Progress ----


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def run_progress(stream: io.StringIO, clock: list[float], seconds: float, steps: int = 10) -> str:
    progress = Progress("tied-0", steps, stream=stream)
    for step in range(1, steps + 1):
        progress.update(step, f"loss {10 - step}.0")
        clock[0] += seconds
    progress.end()
    return stream.getvalue()


def test_a_terminal_gets_one_line_that_renews_itself(clock: list[float]) -> None:
    shown = run_progress(Terminal(), clock, 1.0)
    assert shown.count("\n") == 1
    assert shown.endswith("\n")
    frames = shown.removesuffix("\n").split("\r\x1b[2K")[1:]
    assert len(frames) == 10
    assert frames[0] == "tied-0  1/10  loss 9.0"
    assert frames[4] == "tied-0  5/10  loss 5.0  5 s left"
    assert frames[-1] == "tied-0  10/10  loss 0.0"


def test_a_pipe_gets_plain_lines_now_and_then_and_the_last_one_once(clock: list[float]) -> None:
    shown = run_progress(io.StringIO(), clock, 2.0)
    assert "\r" not in shown
    assert "\x1b" not in shown
    assert [line.split()[1] for line in shown.splitlines()] == ["1/10", "4/10", "7/10", "10/10"]
    assert "12 s left" in shown.splitlines()[1]
    fast = run_progress(io.StringIO(), clock, 0.001)
    assert [line.split()[1] for line in fast.splitlines()] == ["1/10", "10/10"]


def test_time_left_comes_from_the_steps_after_the_first(clock: list[float]) -> None:
    """The first step compiles for a minute; the nine others take a second each."""
    stream = io.StringIO()
    progress = Progress("run", 10, stream=stream)
    clock[0] += 60
    progress.update(1, "")
    clock[0] += 5
    progress.update(6, "")
    assert stream.getvalue().splitlines()[-1].endswith("4 s left")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 00 s"),
        (42, "42 s"),
        (185, "3 min 05 s"),
        (7629, "2 h 07 min"),
        (360000, "100 h 00 min"),
    ],
)
def test_durations_read_well(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_terminal_that_is_gone_stops_nothing() -> None:
    class Gone(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    progress = metrics.Progress("run", 3, stream=Gone())
    progress.update(1, "loss 5.0")
    progress.end()
