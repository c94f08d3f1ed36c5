"""The words in which a config is refused."""

from __future__ import annotations

from typing import Any

from tiedjax.text import nearest


def explained(error: Any, valid: list[str]) -> str:
    """One of pydantic's errors in one line; `valid` are the sections and dotted keys that there are."""
    key = ".".join(map(str, error["loc"]))
    kind, given = error["type"], error["input"]
    if kind in {"unexpected_keyword_argument", "extra_forbidden"}:
        nested = "; write it as nested sections, not with a dot" if key in valid else nearest(key, valid)
        return f"unknown key {key!r}{nested}"
    if kind == "value_error":  # raised by a config's own check, which names the field
        return f"{key}.{error['ctx']['error']}" if key else str(error["ctx"]["error"])
    if kind == "literal_error":
        expected = error["ctx"]["expected"]
        return f"{key}: must be {expected}, got {given!r}{nearest(str(given), expected.split(chr(39)))}"
    wanted = error["msg"].removeprefix("Input should be ").rstrip(".")
    return f"{key}: must be {wanted}, got {given!r}"
