"""Arrays in .npy and .npz files that may be anything.

NumPy evaluates a header as a literal of Python, allocates what it says, and lets through whatever that raises.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from tiedjax.errors import UserError
from tiedjax.files import refuse_irregular


def read_npy(path: Path, mmap: bool = False) -> np.ndarray:
    """The array of a .npy file, mapped read-only if asked for. UserError for any other file."""
    try:
        refuse_irregular(path)
        with path.open("rb") as file:
            _refuse_lie(file, path.stat().st_size)
        array: np.ndarray = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
        return array if mmap else array.view(np.ndarray)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:
        raise UserError(f"{path}: not a readable .npy file: {one_line(error)}") from None


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name. UserError for any other file."""
    try:
        refuse_irregular(path)
        with path.open("rb") as file:
            if file.read(6) == b"\x93NUMPY":
                raise ValueError("it holds one bare array; name it .npy")
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    _refuse_lie(file, entry.file_size)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:
        raise UserError(f"{path}: not a readable .npz file: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _refuse_lie(file: Any, size: int) -> None:
    """ValueError where a header promises more than the file holds, before anything is allocated for it."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    promised = dtype.itemsize
    for axis in shape:
        if type(axis) is not int or not 0 <= axis < 2**62:
            raise ValueError(f"its header gives the shape {list(shape)}")
        promised *= axis
    if not dtype.hasobject and promised > size - file.tell():
        raise ValueError(f"its header promises {promised:,} bytes, {max(size - file.tell(), 0):,} are there")
