"""Values and names as people read them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from tiedjax.errors import UserError


def duration(seconds: float) -> str:
    """Seconds as a person reads them: 42 s, 3 min 05 s, 2 h 07 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s % 3600 // 60:02d} min"


def seconds(text: str, where: str) -> float:
    """What 90s, 8m or 1.5h stands for; UserError, which names `where`, for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if not match or not float(match[1]):
        raise UserError(f"{where}: must be a time such as 90s, 8m or 1.5h, got {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def binary(count: int) -> str:
    """Bytes as a person reads them: 0 B, 999.00 KiB, 1.50 GiB."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """'; did you mean X?' or, when nothing is near, nothing."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.7)
    return f"; did you mean {close[0]!r}?" if close else ""
