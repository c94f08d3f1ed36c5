"""What a run writes about itself: metrics.jsonl, the sinks beside it, and progress for the person who waits."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from tiedjax.errors import UserError
from tiedjax.files import write_atomically
from tiedjax.host.storage import Growing
from tiedjax.run import read_metrics
from tiedjax.sinks import TITLES, Sink, Tracker, close, reason_of, say
from tiedjax.text import duration

METRICS = "metrics.jsonl"
NO_DECILE = -1
FLUSH_SECONDS = 30  # what TensorBoard shows may be this late


def frequency_deciles(counts_V: np.ndarray, bins: int = 10) -> np.ndarray:
    """int32 [V]: 0 (rarest tenth of the tokens that occur) to 9 (most frequent); -1 for tokens that never occur."""
    occurring = np.flatnonzero(counts_V)
    order = occurring[np.argsort(counts_V[occurring], kind="stable")]
    deciles = np.full(len(counts_V), NO_DECILE, np.int32)
    deciles[order] = np.arange(len(order)) * bins // max(len(order), 1)
    return deciles


class MetricsLog:
    """metrics.jsonl of one run, from the line after `step` on, and the sinks beside it.

    The thread that trains writes metrics.jsonl itself, before any sink: when a state is saved, the lines before it are
    there. A line that cannot be written is lost, which the next one that can be says (`lines_lost`); the run goes on.
    `logged_every` is `train.log_every` of the command before: it shows whether lines are missing at the end. `trackers`
    are names of `sinks.TITLES`; `config` is what they show beside the numbers. For a run in a store all of them write
    to a folder of this machine, which is uploaded while `may_write` does not raise.
    """

    def __init__(
        self,
        directory: Path,
        step: int,
        *,
        logged_every: int | None = None,
        trackers: Sequence[str] = (),
        label: str = "",
        config: dict[str, Any] | None = None,
        may_write: Callable[[], None] = lambda: None,
    ):
        self._growing = Growing(directory, may_write)
        for name in (METRICS, *(f"{kind}.json" for kind in trackers)):
            self._growing.fetch(name)
        local = self._growing.folder
        self._lines = _Lines(local / METRICS, directory / METRICS, step, logged_every)
        advice = lambda: "" if self._lines.lost else ", with every number in metrics.jsonl"
        self._sinks: list[Sink] = []
        if importlib.util.find_spec("tensorboardX"):
            board = _Board(local / "tensorboard", step)
            self._sinks.append(Sink(f"{directory / 'tensorboard'}: TensorBoard's files", board, advice))
        for kind in trackers:
            tracker = Tracker(kind, local, label or directory.name, config or {})
            self._sinks.append(Sink(f"{directory}: {TITLES[kind]}", tracker, advice))

    def write(self, row: dict[str, Any]) -> None:
        """Appends one step; non-finite numbers become null."""
        self._lines.append(row)
        scalars = {name: x for name, x in row.items() if name != "step" and not isinstance(x, list)}
        for sink in self._sinks:
            sink.write(row["step"], scalars)

    def complete(self, step: int, values: dict[str, Any]) -> None:
        """Adds these to the last line, which is that of `step`."""
        self._lines.complete(step, values)
        for sink in self._sinks:
            sink.write(step, values)

    def sync(self) -> bool:
        """Returns when every line so far lies where the run does, and whether it does."""
        return self._growing.sync()

    def close(self) -> None:
        """Closes all of them, and says what was lost; waits for sinks that hang for `sinks.PATIENCE` at most."""
        self._lines.close()
        close(self._sinks)
        self._growing.close()


class _Lines:
    """The file itself, to which lines are appended whole or not at all; what is said of it calls it `named`."""

    def __init__(self, path: Path, named: Path, step: int, logged_every: int | None):
        self._path, self._named, self._step, self._logged_every = path, named, step, logged_every
        self._file: int | None = None
        self._length = 0  # of the whole lines
        self._last: dict[str, Any] | None = None
        self._taken_up = self._said = False
        self._unsaid = 0  # lines lost since the last one that was written
        self.lost = self._total = 0
        try:
            self._open()
        except OSError as error:
            self._say_failed(error)

    def append(self, row: dict[str, Any]) -> None:
        """Writes a line and, if lines before it were lost, how many."""
        self._total += 1
        try:
            file = self._open()  # which may find lines missing
            row = row | ({"lines_lost": self._unsaid} if self._unsaid else {})
            self._write(file, _line(row))
        except (OSError, UserError) as error:
            self._unsaid += 1
            self._lose(error)
        else:
            self._last, self._unsaid = row, 0

    def complete(self, step: int, values: dict[str, Any]) -> None:
        """Adds values to the last line; where that of `step` was lost, they are a line of their own."""
        if self._last is None or self._last["step"] != step:
            self.append({"step": step, **values})
            return
        self._total += 1
        whole = self._last | values
        try:
            lines = self._path.read_bytes()[: self._length - len(_line(self._last))]
            write_atomically(self._path, lines + _line(whole))
            self.close_file()
        except (OSError, UserError) as error:
            self._lose(error)
        else:
            self._length, self._last = len(lines) + len(_line(whole)), whole

    def close(self) -> None:
        """Says how many lines this command has lost."""
        self.close_file()
        if self.lost:
            say(f"{self._named} lost {self.lost} of {self._total} lines")

    def close_file(self) -> None:
        """The next line opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            os.close(file)

    def _write(self, file: int, line: bytes) -> None:
        if os.fstat(file).st_size != self._length:  # a line that could not be cut then
            os.ftruncate(file, self._length)
        try:
            written = 0
            while written < len(line):
                written += os.write(file, line[written:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file, self._length)
            raise
        self._length += len(line)

    def _open(self) -> int:
        if self._file is None:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        if not self._taken_up:
            self._take_up(self._file)
            self._taken_up = True
        return self._file

    def _take_up(self, file: int) -> None:
        """Cuts the file after the line of the step that the run goes on from; says whether it has holes."""
        rows = list(takewhile(lambda row: row["step"] <= self._step, read_metrics(self._path, self._named)))
        content = self._path.read_bytes().splitlines(keepends=True)[: len(rows)]
        self._length, self._last = sum(map(len, content)), rows[-1] if rows else None
        os.ftruncate(file, self._length)
        steps = [0, *(row["step"] for row in rows)]
        holes = {before: row["lines_lost"] for before, row in zip(steps, rows, strict=False) if row.get("lines_lost")}
        if every := self._logged_every:
            behind = self._step // every - steps[-1] // every
            holes |= {steps[-1]: behind} if behind else {}
            self._unsaid += behind
        if holes:
            lines = "1 line" if sum(holes.values()) == 1 else f"{sum(holes.values())} lines"
            say(f"{self._named}: lacks {lines}, the first after step {min(holes)}; the run goes on without")

    def _lose(self, error: Exception) -> None:
        self.lost += 1
        if self.lost == 1:
            self._say_failed(error)

    def _say_failed(self, error: Exception) -> None:
        if not self._said:
            self._said = True
            cause = error.__context__ if isinstance(error, UserError) else error  # of the file system
            reason = reason_of(cause if isinstance(cause, Exception) else error)
            say(f"{self._named}: cannot be written: {reason}; the run goes on, and tries again at every line")


class _Board:
    """One event file of TensorBoard, which takes no more after its first error.

    tensorboardX's SummaryWriter would hand events to a thread, and once that has died of a full disk, the next event
    and the close wait for ever.
    """

    def __init__(self, folder: Path, step: int):
        self.over, self.unsure = False, 0
        self._folder, self._step, self._flushed_at = folder, step, time.monotonic()
        self._events: Any = None

    def open(self) -> None:
        """Begins an event file."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(self._folder / "events"))
        self._add(
            self._step + 1, session_log=SessionLog(status=SessionLog.START)
        )  # hides what a run before it did later

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Adds the scalars of one step; they are on disk within `FLUSH_SECONDS`, if steps go on."""
        from tensorboardX.proto.summary_pb2 import Summary

        with self._ended_by_errors():
            self._add(step, summary=Summary(value=[Summary.Value(tag=n, simple_value=x) for n, x in scalars.items()]))
            self.unsure += 1
            if self._events and time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
                self._flushed_at = time.monotonic()
                self._events.flush()
                self.unsure = 0

    def close(self) -> None:
        """Writes what is left."""
        with self._ended_by_errors():
            if self._events:
                self._events.close()
            self.unsure = 0

    def abandon(self) -> None:
        """Nothing can end a write to a disk that hangs."""

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        if self._events:
            self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    @contextlib.contextmanager
    def _ended_by_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._events, self.over = None, True
            raise


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(_finite(row), allow_nan=False).encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress:
    """One line that renews itself on a terminal, a plain line now and then elsewhere.

    The time left is extrapolated from the steps after the first.
    """

    def __init__(self, label: str, total: int, *, stream: TextIO | None = None):
        self._label, self._total = label, total
        self._stream: TextIO | None = stream or sys.stdout  # None where the process was started without one
        self._live = self._stream is not None and self._stream.isatty()
        self._every = 0.2 if self._live else 5.0
        self._shown_at = float("-inf")
        self._unshown: str | None = None
        self._first: tuple[int, float] | None = None  # the first step compiles; it says nothing about the rest

    def update(self, done: int, text: str) -> None:
        """Says where things stand, unless it was said just now."""
        now = time.monotonic()
        self._first = self._first or (done, now)
        self._unshown = f"{self._label}  {done}/{self._total}  {text}{self._left(done, now)}"
        if now - self._shown_at >= self._every:
            self._shown_at = now
            self._show()

    def end(self) -> None:
        """Says where things ended, if that was not said yet."""
        if self._unshown:
            self._show()
        if self._live and self._first:
            self._write("\n")

    def _show(self) -> None:
        self._write(f"\r\x1b[2K{self._unshown}" if self._live else f"{self._unshown}\n")
        self._unshown = None

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone: no reason not to save
            self._stream.write(text)
            self._stream.flush()

    def _left(self, done: int, now: float) -> str:
        first, at = self._first or (done, now)
        if done <= first or done == self._total:
            return ""
        return f"  {duration((now - at) / (done - first) * (self._total - done))} left"
