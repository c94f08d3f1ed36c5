"""A table that stays in its file: rows are read as they are asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from tiedjax.interop.tensors import Tensor

_PIECE_BYTES = 2**20  # of float32, read at once: what is read is small beside what it becomes


class Rows(NDArrayOperatorsMixin):
    """A [V, D] tensor as float32 (float64 if it is that): indexing by rows reads these alone, all else reads the whole.

    Whatever NumPy does with an array it does with this: the whole is then read for it, and not kept.
    """

    ndim = 2

    def __init__(self, tensor: Tensor):
        self._tensor = tensor
        self.shape = (tensor.shape[0], tensor.shape[1])
        self.size = tensor.size
        self.dtype = np.dtype(np.float64 if tensor.dtype == "float64" else np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        rows, *columns = index if isinstance(index, tuple) else (index,)
        if rows is None or rows is ... or not all(isinstance(column, slice | int) for column in columns):
            return np.asarray(self)[index]
        if isinstance(rows, slice) and rows.step in (None, 1):
            start, stop, _ = rows.indices(len(self))
            found = np.empty((max(stop - start, 0), self.shape[1]), self.dtype)
            for a, b in self._tensor.blocks(_PIECE_BYTES, start, stop):
                found[a - start : b - start] = self._tensor.rows(a, b)
        elif isinstance(rows, slice):
            found = self[np.arange(*rows.indices(len(self)))]
        elif np.ndim(rows) == 0:
            row = range(len(self))[int(rows)]
            return self[row : row + 1][(0, *columns)]
        else:
            found = self._chosen(np.asarray(rows))
        return found[(..., *columns)] if columns else found

    def _chosen(self, index: np.ndarray) -> np.ndarray:
        """Rows by a mask or by their numbers, in that order, read in the order of the file."""
        if index.dtype == bool:
            if index.shape != (len(self),):
                raise IndexError(f"a mask of shape {index.shape} for {len(self)} rows")
            index = np.flatnonzero(index)
        flat = np.where(index < 0, index + len(self), index).ravel()
        if flat.size and not (flat.min() >= 0 and flat.max() < len(self)):
            raise IndexError(f"a row out of {len(self)}")
        chosen = np.empty((flat.size, self.shape[1]), self.dtype)
        order = np.argsort(flat, kind="stable")
        sorted_rows = flat[order]
        for a, b in self._tensor.blocks(_PIECE_BYTES):
            first, last = np.searchsorted(sorted_rows, (a, b))
            if last > first:
                chosen[order[first:last]] = self._tensor.rows(a, b)[sorted_rows[first:last] - a]
        return chosen.reshape(*index.shape, self.shape[1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = np.empty(self.shape, dtype or self.dtype)
        for a, b in self._tensor.blocks(_PIECE_BYTES):
            whole[a:b] = self._tensor.rows(a, b)
        return whole

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        read = [np.asarray(each) if isinstance(each, Rows) else each for each in inputs]
        return getattr(ufunc, method)(*read, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what NumPy looks for before it asks for the whole, or pickling and copying
            raise AttributeError(name)
        return getattr(np.asarray(self), name)
