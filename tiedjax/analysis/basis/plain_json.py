"""Results as plain JSON, without NumPy types and NaN, and back from it as the dataclasses that they were."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
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
    return plain if plain is None else _reader(kind)(plain)


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


def _as_it_is(plain: Any) -> Any:
    return plain


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """What makes a value of type `kind` of what is plain and not None; a type is taken apart once for all values."""
    if dataclasses.is_dataclass(kind):
        return _instance_reader(kind)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        (value_kind,) = (part_kind for part_kind in inner if part_kind is not type(None))
        return _reader(value_kind)
    readers = [_reader(part_kind) for part_kind in inner]
    if origin is list:
        return list if readers == [_as_it_is] else lambda plain: [_read(readers[0], value) for value in plain]
    if origin is tuple:
        return lambda plain: tuple(_read(reader, value) for reader, value in zip(readers, plain, strict=True))
    if origin is dict:
        return lambda plain: {inner[0](key): _read(readers[1], value) for key, value in plain.items()}
    return _as_it_is


def _read(reader: Callable[[Any], Any], plain: Any) -> Any:
    return plain if plain is None else reader(plain)


def _instance_reader(kind: Any) -> Callable[[Any], Any]:
    fields, hints = dataclasses.fields(kind), typing.get_type_hints(kind)
    names, needed = [f.name for f in fields], [f.name for f in fields if not _optional(f)]
    readers = {name: reader for name in names if (reader := _reader(hints[name])) is not _as_it_is}

    def read(plain: Mapping[str, Any]) -> Any:
        missing = [name for name in needed if name not in plain]
        if missing:
            raise UserError(f"results: there is no {missing[0]!r}; `tiedjax study` analyses the finished runs again")
        values = {name: plain[name] for name in names if name in plain}
        return kind(**values | {name: _read(readers[name], values[name]) for name in readers if name in values})

    return read


def _optional(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as JSON, whole or not at all. UserError when the file cannot be written."""
    write_atomically(path, json.dumps(to_plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
