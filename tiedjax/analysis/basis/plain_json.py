"""Results as plain JSON, without NumPy types and NaN, and back from it as the dataclasses that they were."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from tiedjax.errors import UserError
from tiedjax.files import write_atomically

T = TypeVar("T")

_PLAIN = (str, int, bool, type(None))


@dataclass(frozen=True)
class Measurement(Generic[T]):
    """What an instrument measured of one table, run or pair of tables of a study, and what names that.

    `role` is the table's, of a pair the subject's, whose other table has `reference_role`; "" for whole runs.
    """

    arm: str
    seed: int
    role: str
    reference_role: str
    value: T


def to_plain(value: Any) -> Any:
    """`value` as dicts, lists, strings, bools, numbers and None; NaN and infinities become None."""
    if type(value) in _PLAIN:  # most are; to ask whether they are mappings takes far longer
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return to_plain(value.tolist())
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if isinstance(value, str | int):
        return value
    return str(value)


def from_plain(kind: Any, plain: Any) -> Any:
    """The value of type `kind` that `to_plain` made `plain` of; keys that a dataclass has no field for do not count.

    UserError for a field that is missing.
    """
    if plain is None or kind is Any:
        return plain
    if dataclasses.is_dataclass(kind):
        return _instance(kind, plain)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        (value_kind,) = (part_kind for part_kind in inner if part_kind is not type(None))
        return from_plain(value_kind, plain)
    if origin is list:
        return [from_plain(inner[0], value) for value in plain]
    if origin is tuple:
        return tuple(from_plain(part_kind, value) for part_kind, value in zip(inner, plain, strict=True))
    if origin is dict:
        return {inner[0](key): from_plain(inner[1], value) for key, value in plain.items()}
    return plain


def measured(records: Iterable[Mapping[str, Any]], kind: type[T]) -> list[Measurement[T]]:
    """The records of a section that were measured, each with its value as the dataclass `kind`."""
    return [
        Measurement(
            record["arm"],
            record["seed"],
            record.get("subject_role", record.get("role", "")),
            record.get("reference_role", ""),
            from_plain(kind, record),
        )
        for record in records
        if "not_measured" not in record
    ]


def not_measured(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Why records of a section were not measured, each reason once."""
    return list(dict.fromkeys(record["not_measured"] for record in records if "not_measured" in record))


def _instance(kind: Any, plain: Mapping[str, Any]) -> Any:
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in plain and not _optional(f)]
    if missing:
        raise UserError(f"results: there is no {missing[0]!r}; `tiedjax study` analyses the finished runs again")
    kinds = {name: field_kind for name, field_kind in _fields(kind).items() if name in plain}
    return kind(**{name: from_plain(field_kind, plain[name]) for name, field_kind in kinds.items()})


@lru_cache
def _fields(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _optional(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as JSON, whole or not at all. UserError when the file cannot be written."""
    write_atomically(path, json.dumps(to_plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
