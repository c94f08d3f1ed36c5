"""Configs from YAML files and dotted overrides, and back to YAML.

A config file is YAML 1.2 and states only what differs from the defaults in `config`. Unknown keys, wrong types and
impossible combinations raise `UserError` with one line that names the key.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, cast

from tiedjax.config import RunConfig, leaf_fields
from tiedjax.config_errors import explained
from tiedjax.errors import UserError
from tiedjax.files import local_path
from tiedjax.host import storage
from tiedjax.text import nearest

ConfigT = TypeVar("ConfigT")
Kind = Literal["run", "study"]
_MOST_BYTES = 2**18  # of a config file
_MOST_VALUES, _DEEPEST = 2**16, 32  # of a config, with what aliases repeat


def packaged_configs(kind: Kind) -> dict[str, Path]:
    """The configs of runs, or of studies, that come with tiedjax, by their bare names."""
    package = Path(__file__).parent
    installed, source_tree = package / "configs", package.parent / "configs"
    folder = installed if installed.is_dir() else source_tree
    found = (folder / "studies" if kind == "study" else folder).glob("*.yaml")
    return {path.stem: path for path in sorted(found, key=lambda path: path.stem)}


def find_config(given: str, kind: Kind) -> Path:
    """The file of a config that is named by its path or, if it comes with tiedjax, by its bare name.

    A file wins over a name. UserError where there is neither.
    """
    path, named = local_path(given, "CONFIG"), packaged_configs(kind)
    if given in named and not path.is_file():
        return named[given]
    if not path.exists():
        kind_of_file, names = {"run": "run config", "study": "study"}[kind], ", ".join(named)
        raise UserError(
            f"{given}: no such file, and no {kind_of_file} of that name; there are {names}{nearest(path.stem, named)}"
        )
    return path


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML 1.2 file (1e-3 is a number, `no` a string, a repeated key an error)."""
    place = storage.place(path, "CONFIG")
    if not (storage.is_remote(place) or os.path.lexists(place)):
        raise UserError(f"{path}: no such file")
    return _mapping(_parse_yaml(storage.read_text(place, most=_MOST_BYTES), str(path)), str(path))


def parse_overrides(pairs: Mapping[str, str]) -> dict[str, Any]:
    """Dotted keys of a run config with their values as text, to a nested mapping; text stays text, the rest is YAML."""
    textual = {field.key: field.type for field in leaf_fields(RunConfig) if field.type.startswith(("str", "Literal"))}
    tree: dict[str, Any] = {}
    for key, text in pairs.items():
        if not text.isascii() and (shown := ascii(text)) and not _is_text(text):
            raise UserError(f"--{key}: must be text in UTF-8, got {shown}")
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        if key not in textual:
            node[leaf] = _parse_yaml(text, f"--{key}")
        else:
            node[leaf] = None if text == "null" and textual[key].endswith("None") else text
    return tree


def _is_text(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:  # bytes of the command line that are no UTF-8
        return False


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` on top, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def structure(cls: type[ConfigT], tree: Mapping[str, Any], where: str) -> ConfigT:
    """A checked config from a nested mapping; errors start with `where`."""
    import pydantic  # here, so that help and training with a ready config do not pay for it

    try:
        checked: ConfigT = _adapter(cast(Any, cls)).validate_json(json.dumps(tree, default=str))  # dates as text
        return checked
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        keys = [f.key for f in leaf_fields(cls)]
        sections = [key.partition(".")[0] for key in keys]
        raise UserError(f"{where}: {explained(first, sections + keys)}") from None


@functools.cache
def _adapter(cls: Any) -> Any:
    """What checks a config; to make it takes fifty times as long as to use it."""
    import pydantic

    return pydantic.TypeAdapter(cls)


def load_run_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """A run's config from a YAML file and dotted overrides ({"train.steps": "200"})."""
    tree = read_yaml(path)
    structure(RunConfig, tree, str(path))  # so that an error of the file is not blamed on the overrides
    return structure(RunConfig, merge(tree, parse_overrides(overrides or {})), "overrides")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a nested mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def to_tree(config: Any) -> dict[str, Any]:
    """Nested plain mapping of every field."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))


def to_yaml(config: Any) -> str:
    """YAML text of every field; reads back equal."""
    stream = io.StringIO()
    _yaml().dump(to_tree(config), stream)
    return stream.getvalue()


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    return yaml


def _parse_yaml(text: str, where: str) -> Any:
    from ruamel.yaml.error import YAMLError

    try:
        tree = _yaml().load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}:{place} is not YAML: {' '.join(str(problem).split())}") from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply, more than {_DEEPEST} levels") from None
    except Exception as error:  # what makes numbers, dates and keys of text lets through whatever that raises
        problem = " ".join(str(error).split()).partition(";")[0] or type(error).__name__
        raise UserError(f"{where}: is not YAML that can be read: {problem}") from None
    _size(tree, where, _DEEPEST, {})
    return tree


def _size(tree: Any, where: str, levels: int, known: dict[int, int]) -> int:
    """How many values a tree has if what aliases name is written out. UserError for too many, and for odd keys."""
    if not isinstance(tree, dict | list):
        return 1
    if levels == 0:
        raise UserError(f"{where}: is nested too deeply, more than {_DEEPEST} levels")
    if id(tree) not in known:
        total = 1
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if not isinstance(key, str | int | float | NoneType):
                raise UserError(f"{where}: a key must be text, got {key!r}")
            total += _size(value, where, levels - 1, known)
            if total > _MOST_VALUES:
                raise UserError(f"{where}: holds more than {_MOST_VALUES:,} values, with those that aliases repeat")
        known[id(tree)] = total
    return known[id(tree)]


def _mapping(tree: Any, where: str) -> dict[str, Any]:
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{where}: must hold a mapping of keys to values, got {type(tree).__name__}")
    return tree
