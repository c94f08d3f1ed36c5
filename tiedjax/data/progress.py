"""Progress as plain lines, at most one every few seconds; the caller decides where they go."""

from __future__ import annotations

import time
from collections.abc import Callable


class Progress:
    """Counts documents and tokens of one stage and reports them through `report`."""

    def __init__(self, stage: str, report: Callable[[str], None], total: int | None = None, every: float = 2.0) -> None:
        self._stage, self._report, self._total, self._every = stage, report, total, every
        self._start = self._last = time.monotonic()
        self.documents = self.tokens = 0

    def add(self, documents: int, tokens: int = 0) -> None:
        """Counts what was done since the last call."""
        self.documents += documents
        self.tokens += tokens
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self._report(self._line())

    def done(self) -> None:
        """Reports the final counts."""
        self._report(self._line())

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        total = f" of {self._total:,}" if self._total is not None else ""
        rate = f", {self.tokens:,} tokens ({self.tokens / seconds:,.0f} per second)" if self.tokens else ""
        return f"{self._stage}: {self.documents:,}{total} documents{rate}, {seconds:.1f} s"
