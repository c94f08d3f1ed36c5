"""Token shards: `.npy` files that are written as the tokens come, without knowing how many there will be."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tiedjax.data.prepared import Segment

SHARD_TOKENS = 2**28


class ShardWriter:
    """Appends documents to `SPLIT-00000.npy`, `SPLIT-00001.npy`, ...; no document is divided between shards."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype) -> None:
        self.segments: list[Segment] = []
        self._folder, self._split, self._dtype = folder, split, dtype
        self._file: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def add(self, ids: npt.NDArray[Any]) -> None:
        """Appends one document's ids."""
        if self._file is None or self._count >= SHARD_TOKENS:
            self._close()
            self._open()
        assert self._file is not None
        self._file.write(ids.data)
        self._digest.update(ids.data)
        self._count += len(ids)

    def _open(self) -> None:
        self._path = self._folder / f"{self._split}-{len(self.segments):05d}.npy"
        self._file = open(self._path, "wb")  # noqa: SIM115 - closed by _close
        self._write_header(self._file, 0)
        self._offset = self._file.tell()
        self._digest, self._count = hashlib.sha256(), 0

    def _close(self) -> None:
        if self._file is None:
            return
        self._file.seek(0)
        self._write_header(self._file, self._count)
        assert self._file.tell() == self._offset, "NumPy leaves room in the header for any length"
        self._file.close()
        self._file = None
        size = self._path.stat().st_size
        digest = self._digest.hexdigest()
        self.segments.append(Segment(self._path.name, size, self._dtype.str, self._offset, 0, self._count, digest))

    def _write_header(self, file: BinaryIO, count: int) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, header)
