"""What a run writes about itself: metrics.jsonl, TensorBoard, and progress for the person who waits."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from tiedjax.files import write_atomically
from tiedjax.host.storage import Growing
from tiedjax.run import read_metrics
from tiedjax.text import duration

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
    """metrics.jsonl and, if tensorboardX is installed, tensorboard/ of one run, from the line after `step` on."""

    def __init__(self, directory: Path, step: int, may_write: Callable[[], None] = lambda: None):
        self._growing = Growing(directory, may_write)
        self._growing.fetch("metrics.jsonl")
        directory = self._growing.folder
        path = directory / "metrics.jsonl"
        if path.exists():
            kept = [row for row in read_metrics(path) if row["step"] <= step]
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
            self._growing.rewritten("metrics.jsonl")
        self._file = path.open("a", encoding="utf-8")
        self._board = _Board(directory / "tensorboard", step) if importlib.util.find_spec("tensorboardX") else None

    def write(self, row: dict[str, Any]) -> None:
        """Appends one step; non-finite numbers become null."""
        self._file.write(json.dumps(_finite(row), allow_nan=False) + "\n")
        self._file.flush()
        if self._board:
            scalars = {name: x for name, x in row.items() if name != "step" and not isinstance(x, list)}
            self._board.write(row["step"], scalars)

    def sync(self) -> None:
        """Returns when every line so far lies where the run does."""
        self._growing.sync()

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        if self._board:
            self._board.close()
        self._growing.close()


class _Board:
    """One event file of TensorBoard. A disk that takes no more ends it with one line on standard error, not the run.

    The thread that trains writes it itself: tensorboardX's SummaryWriter hands events to a thread, and once that has
    died of a full disk, the next event and the close wait for ever.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._folder, self._flushed_at = folder, time.monotonic()
        self._events: EventsWriter | None = None
        with self._ended_by_errors():
            folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(folder / "events"))
            self._add(step + 1, session_log=SessionLog(status=SessionLog.START))  # hides what a run before it did later

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Adds the scalars of one step; they are on disk within `FLUSH_SECONDS`, if steps go on."""
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        with self._ended_by_errors():
            self._add(step, summary=Summary(value=values))
            if self._events and time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
                self._flushed_at = time.monotonic()
                self._events.flush()

    def close(self) -> None:
        """Writes what is left."""
        with self._ended_by_errors():
            if self._events:
                self._events.close()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        if self._events:
            self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    @contextlib.contextmanager
    def _ended_by_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._events = None
            reason = f"{self._folder}: TensorBoard's files cannot be written: {error.strerror or error}"
            print(
                f"tiedjax: {reason}; the run goes on, with every number in metrics.jsonl", file=sys.stderr, flush=True
            )


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
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
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
            self._stream.write("\n")
            self._stream.flush()

    def _show(self) -> None:
        self._stream.write(f"\r\x1b[2K{self._unshown}" if self._live else f"{self._unshown}\n")
        self._stream.flush()
        self._unshown = None

    def _left(self, done: int, now: float) -> str:
        first, at = self._first or (done, now)
        if done <= first or done == self._total:
            return ""
        return f"  {duration((now - at) / (done - first) * (self._total - done))} left"
