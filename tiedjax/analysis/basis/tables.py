"""What names tables: RUN, RUN@STEP, a model's directory or a file of arrays; #input, #output or #ARRAY picks one."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tiedjax.analysis.basis.blocked import row_blocks
from tiedjax.analysis.basis.tokens import token_strings
from tiedjax.errors import UserError
from tiedjax.files import place_and_step
from tiedjax.host import storage
from tiedjax.interop import ModelFolder, Rows, is_model_folder, missing_in_words, read_safetensors
from tiedjax.npy import read_npy, read_npz

ROLES = ("input", "output")
_RANGE = (1e-30, 1e30)  # whose squares and sums fit any float
_FORMS = "a run directory, RUN@STEP, a Hugging Face directory, or a .npy, .npz or .safetensors file"


@dataclass(frozen=True)
class Table:
    """One [V, D] table: the name it was asked for by, its values, and what is known of its tokens.

    `role` is input, output, shared (one table in both roles) or None (a file does not say). `counts` is int64 [2, V]:
    as input, as target. `tokenizer_path` is the run's tokenizer.json, `run_path` its directory, and `initial` gives the
    table of step 0, if the run holds it, and None where it had two tables then and has one now. `ids` int [V] are the
    rows' token ids; None where they are the row numbers. `has_token` says, where counts do not, which rows are of a
    token, boolean [V]: the others are padding.
    """

    name: str
    values: np.ndarray
    role: str | None = None
    counts: np.ndarray | None = None
    tokenizer_path: Path | None = None
    run_path: Path | None = None
    initial: Callable[[], np.ndarray | None] | None = None
    ids: np.ndarray | None = None
    has_token: Callable[[], np.ndarray] | None = None

    @property
    def sha256(self) -> str:
        """Hash of the shape (as two little-endian int64) and the float32 bytes, row by row."""
        return content_hash(self.values)

    @property
    def seen(self) -> np.ndarray | None:
        """Boolean [V]: tokens that occurred in training in either role; where counts are not known, rows of a token.

        None where neither is known.
        """
        if self.counts is not None:
            return seen_rows(self.counts)
        return None if self.has_token is None else self.has_token()

    def take(self, index: np.ndarray) -> Table:
        """The table of those rows alone, in that order, with their counts and token ids."""
        counts = None if self.counts is None else self.counts[:, index]
        return replace(self, values=self.values[index], counts=counts, ids=index, initial=None, has_token=None)

    def describe(self) -> dict[str, Any]:
        """Name, hash, role and shape, as every result states its inputs."""
        rows, width = self.values.shape
        return {"name": self.name, "sha256": self.sha256, "role": self.role, "rows": rows, "width": width}


def content_hash(table_VD: np.ndarray) -> str:
    """sha256 of the shape (as two little-endian int64) and the float32 bytes, row by row."""
    digest = hashlib.sha256(np.array(table_VD.shape, "<i8").tobytes())
    for block in row_blocks(*table_VD.shape):
        with np.errstate(over="ignore", under="ignore"):
            digest.update(np.ascontiguousarray(table_VD[block], dtype="<f4").data)
    return digest.hexdigest()


def seen_rows(counts: np.ndarray) -> np.ndarray:
    """Boolean [V] of [2, V] counts: tokens that occurred at all. Padding rows never do."""
    seen: np.ndarray = counts.sum(axis=0) > 0
    return seen


def read_table(text: str) -> Table:
    """The table that `text` names. UserError when there is none, more than one, or not a table of finite numbers."""
    place, pick = _split(text)
    path = storage.place(place, "table")
    if path.suffix in (".npy", ".npz", ".safetensors"):
        path = storage.cached(path)
    if path.suffix == ".npy":
        arrays = _Arrays.of({"": _read_npy(path)})
    elif path.suffix == ".npz":
        arrays = _Arrays.of(read_npz(path))
    elif path.suffix == ".safetensors":
        arrays = _read_safetensors(path)
    elif not storage.is_remote(path) and is_model_folder(path):
        return _read_model(text, path, pick)
    else:
        return _read_run(text, place, pick)
    key = _pick(text, arrays.dimensions, pick)
    return Table(text, checked(arrays.load(key), text), key if key in ROLES else pick if pick in ROLES else None)


@dataclass(frozen=True)
class _Arrays:
    """The arrays of a file: how many dimensions each has, and how one is read."""

    dimensions: dict[str, int]
    load: Callable[[str], np.ndarray]

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray]) -> _Arrays:
        return cls({name: values.ndim for name, values in arrays.items()}, arrays.__getitem__)


def names_model(place: str) -> bool:
    """Whether this is a Hugging Face directory on a disk."""
    path = storage.place(place, "run")
    return not storage.is_remote(path) and is_model_folder(path)


def open_run(place: str) -> Any:
    """The run in a directory. UserError when it is not one."""
    path = storage.place(place, "run")
    if not storage.exists(path):
        raise UserError(f"{place}: no such file or directory; tables are named by {_FORMS}")
    if not storage.exists(path / "config.yaml"):
        raise UserError(f"{place}: not a run (it holds no config.yaml); tables are named by {_FORMS}")
    from tiedjax.run import load_run  # here: it brings JAX and Orbax

    return load_run(path)


def read_counts(place: str) -> np.ndarray:
    """Token counts from a .npy file, [V] or [2, V]. UserError for anything else."""
    counts = _read_npy(storage.cached(storage.place(place, "--counts")))
    if counts.dtype.kind not in "iu" or counts.ndim not in (1, 2) or (counts.ndim == 2 and len(counts) != 2):
        raise UserError(
            f"{place}: counts must be integers of shape [V] or [2, V], got {counts.dtype} {list(counts.shape)}"
        )
    if counts.size and counts.min() < 0:
        raise UserError(f"{place}: counts must not be negative, got {counts.min()}")
    return counts


def checked(values: np.ndarray, where: str) -> np.ndarray:
    """`values` as a floating [V, D] array. UserError for other shapes, no rows, other types, NaN and infinities."""
    if values.ndim != 2:
        raise UserError(f"{where}: a table must have 2 dimensions [V, D], got shape {list(values.shape)}")
    if not values.size:
        raise UserError(f"{where}: the table is empty, its shape is {list(values.shape)}")
    if values.dtype.name in ("bfloat16", "float16") or values.dtype.kind in "iu":
        values = values.astype(np.float64 if values.dtype.kind in "iu" else np.float32)
    if values.dtype.kind != "f":
        raise UserError(f"{where}: a table must hold real numbers, got {values.dtype.name}")
    bad_V = np.concatenate([~np.isfinite(values[block]).all(axis=1) for block in row_blocks(*values.shape)])
    if bad_V.any():
        raise UserError(
            f"{where}: {int(bad_V.sum())} rows hold NaN or infinity, the first is row {int(bad_V.argmax())}"
        )
    return values


def _split(text: str) -> tuple[str, str | None]:
    """The place and what follows the last '#'; a path that exists as it stands is not cut."""
    if os.path.exists(text) or "#" not in text:
        return text, None
    place, _, pick = text.rpartition("#")
    return place, pick


def _read_run(text: str, place: str, pick: str | None) -> Table:
    place, step = place_and_step(place)
    if pick is not None and pick not in ROLES:
        raise UserError(f"{text}: {pick!r} is not a role; use #input or #output")
    from tiedjax.tying import as_roles, distinct  # here, as for the run: it brings JAX

    run = open_run(place)
    if step is not None and step not in run.snapshot_steps:
        raise UserError(f"{text}: no snapshot at step {step}; there are {_steps_in_words(run.snapshot_steps)}")
    tables = run.tables(step)
    by_role = distinct(tables)
    if len(by_role) > 1 and pick is None:
        raise UserError(f"{text}: the run has two tables; pick one with {text}#input or {text}#output")
    role = pick if pick in by_role else next(iter(by_role))
    return Table(
        text,
        checked(by_role[role], text),
        role,
        np.asarray(run.token_counts),
        run.tokenizer_path,
        run_path=storage.resolved(storage.place(place, "run")),
        initial=(lambda: as_roles(run.tables(0), [role]).get(role)) if 0 in run.snapshot_steps else None,
    )


def _steps_in_words(steps: list[int]) -> str:
    names = [str(s) for s in steps]
    return ", ".join(names if len(names) <= 12 else [*names[:6], "...", *names[-3:]]) or "none"


def _pick(text: str, dimensions: Mapping[str, int], pick: str | None) -> str:
    named = ", ".join(sorted(dimensions))
    if pick is not None and pick in dimensions:
        return pick
    if len(dimensions) == 1 and (pick is None or pick in ROLES):
        return next(iter(dimensions))
    if pick is not None:
        raise UserError(f"{text}: holds no array {pick!r}; it holds {named or 'none'}")
    matrices = [name for name, count in dimensions.items() if count == 2]
    if len(matrices) == 1:
        return matrices[0]
    raise UserError(f"{text}: holds {len(dimensions)} arrays ({named}); pick one with {text}#NAME")


def _read_npy(path: Path) -> np.ndarray:
    return read_npy(path, mmap=True).view(np.ndarray)


def _read_safetensors(path: Path) -> _Arrays:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    tensors = read_safetensors(path)
    dimensions = {name: len(tensor.shape) for name, tensor in tensors.items()}
    return _Arrays(dimensions, lambda name: tensors[name].rows(0, max(tensors[name].shape[:1], default=0)))


def _read_model(text: str, path: Path, pick: str | None) -> Table:
    if pick is not None and pick not in ROLES:
        raise UserError(f"{text}: {pick!r} is not a role; use #input or #output")
    model = ModelFolder(path)
    by_role = model.tables()
    if model.tie.tied:
        role = "shared"
    elif pick is None:
        raise UserError(f"{text}: the model has two tables; pick one with {text}#input or {text}#output")
    elif pick not in by_role:
        raise UserError(f"{text}: {missing_in_words(model)}")
    else:
        role = pick
    values: Any = Rows(by_role[role])

    def has_token() -> np.ndarray:
        strings = token_strings(model.tokenizer_path) if model.tokenizer_path else []
        tokens_V = np.zeros(len(values), bool)
        tokens_V[: len(strings)] = [string is not None for string in strings[: len(values)]]
        return tokens_V

    return Table(
        text,
        checked(values, text),
        role,
        tokenizer_path=model.tokenizer_path,
        run_path=path.resolve(),
        has_token=has_token if model.tokenizer_path else None,
    )


def check(table_VD: np.ndarray, where: str) -> None:
    """UserError for other than 2 dimensions, no rows, and numbers that are not finite or cannot be squared.

    `where` is the instrument that asks.
    """
    if table_VD.ndim != 2 or not table_VD.size:
        raise UserError(f"{where}: a table must have 2 dimensions [V, D] and rows, got shape {list(table_VD.shape)}")
    peak = 0.0
    for block in row_blocks(*table_VD.shape):
        block_BD = np.abs(table_VD[block])
        peak = max(peak, float(block_BD.max()) if np.isfinite(block_BD).all() else math.inf)
    if peak and not _RANGE[0] < peak < _RANGE[1]:
        raise UserError(f"{where}: the largest number of a table must lie between 1e-30 and 1e30, got {peak:g}")
