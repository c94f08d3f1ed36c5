"""The tensors of a model directory, read when they are asked for; the only file that knows how they are stored.

Names of files come from the directory's index and are not trusted: nothing is read outside it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tiedjax.errors import UserError
from tiedjax.files import parse_json, read_text, refuse_irregular
from tiedjax.npy import one_line

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BLOCK_BYTES = 2**24


class Tensor(NamedTuple):
    """One tensor: its file, shape, dtype (NumPy's name, or the file's own where NumPy has none), and how rows are read.

    `rows(a, b)` are its entries a to b - 1 along the first axis, in its own dtype.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    rows: Callable[[int, int], np.ndarray]

    @property
    def size(self) -> int:
        """Number of numbers."""
        return math.prod(self.shape)

    @property
    def whole(self) -> np.ndarray:
        """All of it, in its own dtype."""
        return self.rows(0, self.shape[0])

    def blocks(
        self, block_bytes: int = _BLOCK_BYTES, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """Ranges of rows of at most so many bytes of float32 each, that cover it, or its rows `start` to `stop` - 1."""
        width, end = max(1, math.prod(self.shape[1:])), self.shape[0] if stop is None else stop
        step = max(1, block_bytes // (4 * width))
        yield from ((a, min(a + step, end)) for a in range(start, end, step))


def inside(folder: Path, name: str) -> Path:
    """The file of this name in a model directory. UserError for a name that leads elsewhere.

    Where the directory is a snapshot in Hugging Face's cache, its files are links to the cache's blobs.
    """
    path = folder / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise UserError(f"{folder}: {name!r} is not the name of a file in it")
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if real.parent not in allowed:
        raise UserError(f"{path}: is a link that leads out of {folder}; copy the file there")
    return path


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model directory by name. UserError where they are missing, cut off, or cannot be read safely."""
    there = next((name for name in WEIGHTS if os.path.lexists(folder / name)), None)
    if there is None:
        raise UserError(f"{folder}: holds no weights; they are in {' or '.join(WEIGHTS)}")
    path = inside(folder, there)
    if not there.endswith(".index.json"):
        return _of_file(path)
    tensors: dict[str, Tensor] = {}
    shards: dict[str, dict[str, Tensor]] = {}
    for name, shard in _weight_map(path).items():
        if shard not in shards:
            file = inside(folder, shard)
            if not file.exists():
                raise UserError(f"{path}: names {shard}, which is not there; fetch the whole model")
            shards[shard] = _of_file(file)
        if name not in shards[shard]:
            raise UserError(f"{folder / shard}: lacks {name!r}, which {there} says is in it")
        tensors[name] = shards[shard][name]
    for shard, held in shards.items():
        if more := sorted(held.keys() - tensors.keys()):
            raise UserError(f"{folder / shard}: holds {more[0]!r}, which {there} does not name")
    return tensors


def _weight_map(path: Path) -> dict[str, str]:
    index = parse_json(read_text(path), str(path))
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise UserError(f"{path}: has no 'weight_map' of tensors' names to files")
    return names


def _of_file(path: Path) -> dict[str, Tensor]:
    try:
        refuse_irregular(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return read_safetensors(path) if path.suffix == ".safetensors" else _of_torch(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one .safetensors file by name. UserError for any other file."""
    import ml_dtypes  # noqa: F401  (teaches NumPy the name bfloat16)
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable .safetensors file: {one_line(error)}") from None

    begins = _begins(path)

    def reader(name: str, one: Any) -> Callable[[int, int], np.ndarray]:
        shape, dtype = one.get_shape(), _SAFETENSORS_DTYPES.get(one.get_dtype())
        width = math.prod(shape[1:])

        def rows(a: int, b: int) -> np.ndarray:
            try:
                if dtype is None or not shape:
                    return np.asarray(one[a:b] if shape else file.get_tensor(name))
                # Through the library pages of the file would count as memory of this process once they were read.
                at = begins[name] + a * width * np.dtype(dtype).itemsize
                values = np.fromfile(path, dtype, (b - a) * width, offset=at).reshape(b - a, *shape[1:])
            except Exception as error:  # of a dtype that NumPy does not know, or a file cut off since: of several kinds
                raise UserError(f"{path}: {name!r} cannot be read: {one_line(error)}") from None
            return values

        return rows

    return {
        name: Tensor(
            path,
            tuple(one.get_shape()),
            _SAFETENSORS_DTYPES.get(one.get_dtype(), one.get_dtype()),
            reader(name, one),
        )
        for name, one in slices.items()
    }


def _begins(path: Path) -> dict[str, int]:
    """Where in a .safetensors file, which can be read, the numbers of each tensor begin."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        about = json.loads(file.read(size))
    return {name: 8 + size + of["data_offsets"][0] for name, of in about.items() if name != "__metadata__"}


def _of_torch(path: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: takes torch to read: pip install torch, or save the model again as .safetensors"
        ) from None
    try:
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        found = {name: value.detach() for name, value in state.items() if isinstance(value, torch.Tensor)}
    except Exception as error:  # what unpickling raises has many kinds
        raise UserError(f"{path}: not weights that can be read safely: {one_line(error)}") from None

    def reader(name: str, value: Any) -> Callable[[int, int], np.ndarray]:
        import ml_dtypes

        def rows(a: int, b: int) -> np.ndarray:
            part = value[a:b] if value.ndim else value
            try:
                if part.dtype == torch.bfloat16:
                    return np.asarray(part.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16))
                return np.asarray(part.numpy())
            except (TypeError, RuntimeError) as error:  # of a dtype that NumPy does not know
                raise UserError(f"{path}: {name!r} cannot be read: {one_line(error)}") from None

        return rows

    return {
        name: Tensor(path, tuple(value.shape), str(value.dtype).removeprefix("torch."), reader(name, value))
        for name, value in found.items()
    }


def write_safetensors(path: Path, tensors: Mapping[str, tuple[np.ndarray, str]]) -> None:
    """Writes tensors, each in a dtype by NumPy's name, as transformers expects them."""
    import ml_dtypes  # noqa: F401  (teaches NumPy the name bfloat16)
    from safetensors.numpy import save_file

    # What is not contiguous it would write wrong, without a word.
    whole = {
        name: np.ascontiguousarray(values.astype(np.dtype(dtype), copy=False))
        for name, (values, dtype) in tensors.items()
    }
    path.touch()  # as other files are made: its own would be for nobody but its owner
    mode = path.stat().st_mode
    save_file(whole, path, metadata={"format": "pt"})
    path.chmod(mode)


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return all(a.rows(*block).tobytes() == b.rows(*block).tobytes() for block in a.blocks())
