"""Values and names as people read them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def duration(seconds: float) -> str:
    """Seconds as a person reads them: 42 s, 3 min 05 s, 2 h 07 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s % 3600 // 60:02d} min"


def nearest(name: str, valid: Iterable[str]) -> str:
    """'; did you mean X?' or, when nothing is near, nothing."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.7)
    return f"; did you mean {close[0]!r}?" if close else ""
