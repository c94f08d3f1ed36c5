"""Ends a process in which no step ends any more: a collective whose other end is gone waits for ever."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from tiedjax.errors import Status
from tiedjax.host import signals

TIMES = 10  # the median step, which a step may take
REMEMBERED = 101  # steps whose median that is


class Watchdog:
    """Calls `end` with a line and a status, in another thread, when nothing is `alive` for long.

    Long is `limit` seconds, or ten times the median step if that is longer. It waits from the first call of `alive` on,
    and not while something compiles. Without a limit it does nothing.
    """

    def __init__(
        self, limit: float | None, end: Callable[[str, int], Any], clock: Callable[[], float] = time.monotonic
    ):
        self._limit, self._end, self._clock = limit, end, clock
        self._steps: deque[float] = deque(maxlen=REMEMBERED)
        self._alive_at: float | None = None
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._limit is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def alive(self, *, step: bool = False) -> None:
        """Something has ended: a step, or what takes about as long."""
        now = self._clock()
        if step and self._alive_at is not None:
            self._steps.append(now - self._alive_at)
        self._alive_at = now

    def late(self) -> float | None:
        """For how many seconds nothing has ended, if that is too long."""
        if self._limit is None or self._alive_at is None:
            return None
        if signals.is_brief():
            self._alive_at = self._clock()
            return None
        passed = self._clock() - self._alive_at
        usual = TIMES * statistics.median(self._steps) if self._steps else 0.0
        return passed if passed > max(self._limit, usual) else None

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            if (late := self.late()) is not None:
                self._end(f"no step has ended for {late:.0f} s; the same command continues from there", Status.STALLED)
