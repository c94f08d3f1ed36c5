"""Results as plain JSON: no NumPy types and no NaN."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tiedjax.files import write_atomically


def to_plain(value: Any) -> Any:
    """`value` as dicts, lists, strings, bools, numbers and None; NaN and infinities become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return to_plain(value.tolist())
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return str(value)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as JSON, whole or not at all. UserError when the file cannot be written."""
    write_atomically(path, json.dumps(to_plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
