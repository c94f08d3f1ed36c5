"""Fits of one table onto another, block by block: sums over rows, maps from them, cosines of the mapped rows.

Large float32 tables are multiplied in float32; sums over blocks, and what is solved from them, are float64.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

from tiedjax.analysis.basis import linear_maps
from tiedjax.analysis.basis.blocked import SMALL, at_once, in_turn, matmul, row_blocks
from tiedjax.analysis.basis.directions import rounding
from tiedjax.errors import UserError

FITS = ("identity", "orthogonal", "linear", "ridge")
SQUARE = ("identity", "orthogonal")  # need equal widths, and score the same either way
# A Gram matrix summed in either precision is trusted down to this reciprocal condition: its error moves no fitted
# value by more than 1 % in its worst direction, and a mean cosine by less than 1e-5.
_CONDITION = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-12}

_Block = tuple[Any, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class RowCosines:
    """Per fit, the cosine of each row of X T with its row of Y, NaN for rows without a direction; ridge's penalty."""

    cosines: dict[str, np.ndarray]
    penalty: float | None


class _Rows:
    """Rows of a table, scaled and centred as they are read; `least` is the norm below which a row is rounding."""

    def __init__(self, table_VD: np.ndarray, rows: np.ndarray | None, dtype: np.dtype):
        self._table, self._kept = table_VD, None if rows is None else np.flatnonzero(rows)
        self.shape = (len(table_VD) if self._kept is None else len(self._kept), table_VD.shape[1])
        peak, total = np.zeros(self.shape[1]), np.zeros(self.shape[1])
        for block in row_blocks(*self.shape):
            raw = self._raw(block)
            peak = np.maximum(peak, np.maximum(raw.max(axis=0), -raw.min(axis=0)))
            total += raw.sum(axis=0, dtype=np.float64)
        # A power of two changes no digit and keeps squares of very large and very small tables inside the range of
        # floats.
        exponent = -int(np.frexp(peak.max(initial=0.0))[1])
        self._exponent = exponent if abs(exponent) > 16 else 0
        self._mean = np.ldexp(total / max(1, self.shape[0]), self._exponent)
        self.least = rounding(np.ldexp(peak, self._exponent), self.shape[0], dtype)

    def read(self, where: slice | np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Centred rows, a copy."""
        raw = self._raw(where)
        scaled = np.ldexp(raw, self._exponent) if self._exponent else raw
        return np.subtract(scaled, self._mean.astype(dtype), dtype=dtype)

    def _raw(self, where: slice | np.ndarray) -> np.ndarray:
        return self._table[where if self._kept is None else self._kept[where]]


@dataclass
class _Sums:
    """Sums over some of the rows, centred at the mean of all: of x, y, x'y, y'y and, once, x'x."""

    rows: int
    x: np.ndarray
    y: np.ndarray
    xy: np.ndarray
    yy: float
    xx: Any

    def __add__(self, other: _Sums) -> _Sums:
        xx = None if self.xx is None or other.xx is None else self.xx + other.xx
        return _Sums(
            self.rows + other.rows, self.x + other.x, self.y + other.y, self.xy + other.xy, self.yy + other.yy, xx
        )

    def centred(self) -> _Sums:
        """The same rows about their own means, which stay in `x` and `y`."""
        n = max(1, self.rows)
        x, y = self.x / n, self.y / n
        xx = None if self.xx is None else self.xx - n * np.outer(x, x)
        return _Sums(self.rows, x, y, self.xy - n * np.outer(x, y), self.yy - n * float(y @ y), xx)


@dataclass(frozen=True)
class _FittedMaps:
    """The matrix of each fit (None: the identity), and the means they are about beyond those of all rows."""

    matrices: dict[str, np.ndarray | None]
    penalty: float | None
    x_mean: np.ndarray | None
    y_mean: np.ndarray | None


class Fitter:
    """Two tables and what their fits share from one order of Y's rows to the next.

    `rows` is a boolean [V] mask of those that count; `halves` also fits on either half of them. UserError: shapes that
    do not fit, or unequal widths with a fit that needs equal ones.
    """

    def __init__(self, x_VD: np.ndarray, y_VD: np.ndarray, fits: Sequence[str], rows: np.ndarray | None, halves: bool):
        _check(x_VD, y_VD, fits)
        small = max(x_VD.size, y_VD.size) <= SMALL  # then float64 costs nothing
        self._dtype = np.dtype(np.float64 if small else np.result_type(x_VD, y_VD, np.float32))
        self._both = in_turn if small else at_once
        self._x, self._y = self._both(lambda: _Rows(x_VD, rows, self._dtype), lambda: _Rows(y_VD, rows, self._dtype))
        self.rows, self.fits = self._x.shape[0], fits
        self._parts: list[np.ndarray | None] = [None]
        if halves:
            shuffled = np.random.default_rng(1).permutation(self.rows)
            self._parts = [np.sort(shuffled[: self.rows // 2]), np.sort(shuffled[self.rows // 2 :])]
        self._solvers: dict[str, Any] = {}
        self._ridges: dict[str, linear_maps.Ridge] = {}

    def measure(self, order: np.ndarray | None = None) -> tuple[RowCosines, RowCosines | None]:
        """X mapped onto Y[order], in sample and, given halves, held out. The first call is the one without `order`."""
        sums = [self._sums(part, order) for part in self._parts]
        if order is None and "linear" in self.fits:
            sums = self._prepare(sums)
        whole = self._fit("whole", functools.reduce(operator.add, sums))
        apart = [self._fit(f"half {i}", each) for i, each in enumerate(sums)] if len(sums) == 2 else []
        inside = {fit: np.empty(self.rows) for fit in self.fits}
        outside = {fit: np.empty(self.rows) for fit in self.fits if apart}
        for i, part in enumerate(self._parts):
            for where, x, y in self._blocks(part, order):
                self._score(x, y, whole, where, inside)
                if apart:
                    self._score(x, y, apart[1 - i], where, outside)
        return RowCosines(inside, whole.penalty), RowCosines(outside, None) if apart else None

    def _blocks(self, part: np.ndarray | None, order: np.ndarray | None) -> Iterator[_Block]:
        """(positions, centred rows of X, centred rows of Y[order]) of a part, block by block."""
        rows, width = self.rows if part is None else len(part), max(self._x.shape[1], self._y.shape[1])
        for block in row_blocks(rows, width, self._dtype.itemsize):
            where = block if part is None else part[block]
            partners = where if order is None else order[where]
            read = (
                functools.partial(self._x.read, where, self._dtype),
                functools.partial(self._y.read, partners, self._dtype),
            )
            yield where, *self._both(*read)

    def _sums(self, part: np.ndarray | None, order: np.ndarray | None) -> _Sums:
        X, Y = self._x.shape[1], self._y.shape[1]
        with_xx = order is None and not {"linear", "ridge"}.isdisjoint(self.fits)
        total = _Sums(0, np.zeros(X), np.zeros(Y), np.zeros((X, Y)), 0.0, np.zeros((X, X)) if with_xx else None)
        for _, x, y in self._blocks(part, order):
            total.rows += len(x)
            if part is not None:  # the rows of all are read about their means
                total.x += x.sum(axis=0, dtype=np.float64)
                total.y += y.sum(axis=0, dtype=np.float64)
            if "ridge" in self.fits:
                total.yy += float(np.vecdot(y, y).sum(dtype=np.float64))
            if set(self.fits) != {"identity"}:
                total.xy += matmul(x.T, y)
            if with_xx:
                total.xx += matmul(x.T, x)
        return total

    def _prepare(self, sums: list[_Sums]) -> list[_Sums]:
        """Solvers for the linear fit of the whole and of each half; all in float64 if float32 is too coarse.

        Once for all orders of Y's rows: the linear map is (X'X)^-1 X'Y, and an order changes only X'Y. A Cholesky
        factor of X'X is cheap but squares X's condition, so it serves only where `_CONDITION` trusts it. Sums in
        float32 that it does not trust are taken again in float64, for all fits and orders, so that scores and floors
        are computed alike; where even those are too coarse, X itself is brought to a triangle.
        """
        parts: dict[str, tuple[np.ndarray | None, _Sums]] = {"whole": (None, functools.reduce(operator.add, sums))}
        if len(sums) == 2:
            parts |= {f"half {i}": (part, sums[i]) for i, part in enumerate(self._parts)}
        for name, (part, each) in parts.items():
            about = each.centred()
            self._solvers[name] = linear_maps.well_conditioned(about.xx, _CONDITION[self._dtype])
            if self._solvers[name] is None and self._dtype == np.float32:
                self._dtype = np.dtype(np.float64)
                return self._prepare([self._sums(part, None) for part in self._parts])
            if self._solvers[name] is None:
                self._solvers[name] = linear_maps.from_triangle(self._triangle(part, about.x), each.rows)
        return sums

    def _triangle(self, part: np.ndarray | None, x_mean: np.ndarray) -> np.ndarray:
        """R of X = QR for the rows of a part about their mean, block by block."""
        triangle = np.zeros((0, self._x.shape[1]))
        for _, x, _ in self._blocks(part, None):
            stacked = np.concatenate([triangle, x - x_mean])
            triangle = scipy.linalg.qr(stacked, mode="r", check_finite=False)[0][: self._x.shape[1]]
        return triangle

    def _fit(self, name: str, sums: _Sums) -> _FittedMaps:
        about = sums.centred()
        if about.xx is not None and "ridge" in self.fits:
            self._ridges[name] = linear_maps.Ridge(about.xx, about.rows)
        matrices: dict[str, np.ndarray | None] = dict.fromkeys(self.fits)
        penalty = None
        if "orthogonal" in matrices:
            matrices["orthogonal"] = linear_maps.nearest_orthogonal(about.xy)
        if "linear" in matrices:
            matrices["linear"] = self._solvers[name](about.xy)
        if "ridge" in matrices:
            matrices["ridge"], penalty = self._ridges[name].solve(about.xy, about.yy)
        # The rows are read about the means of all; those of a half lie elsewhere.
        return _FittedMaps(matrices, penalty, *((None, None) if name == "whole" else (about.x, about.y)))

    def _score(self, x: np.ndarray, y: np.ndarray, fitted: _FittedMaps, where: Any, out: dict[str, np.ndarray]) -> None:
        """Writes cosine(row of X T, row of Y) of a block's rows to `out` [where]."""
        if fitted.x_mean is not None and fitted.y_mean is not None:
            x, y = np.subtract(x, fitted.x_mean, dtype=x.dtype), np.subtract(y, fitted.y_mean, dtype=y.dtype)
        norm = lambda rows: np.sqrt(np.vecdot(rows, rows).astype(np.float64))
        x_norm, y_norm = norm(x), norm(y)
        for fit, matrix in fitted.matrices.items():
            mapped = x if matrix is None else matmul(x, matrix.astype(x.dtype))
            length = x_norm if fit in SQUARE else norm(mapped)
            zero = (x_norm <= self._x.least) | (y_norm <= self._y.least)
            if fit not in SQUARE:
                zero |= length <= self._y.least  # fitted values are of Y's size
            with np.errstate(invalid="ignore", divide="ignore"):
                out[fit][where] = np.where(zero, np.nan, np.vecdot(mapped, y) / (length * y_norm))


def _check(x_VD: np.ndarray, y_VD: np.ndarray, fits: Sequence[str]) -> None:
    for name, table in [("first", x_VD), ("second", y_VD)]:
        if table.ndim != 2:
            raise UserError(f"align: the {name} table must have 2 dimensions [V, D], got {list(table.shape)}")
    if len(x_VD) != len(y_VD):
        raise UserError(f"align: the tables must have the same rows, got {len(x_VD)} and {len(y_VD)}")
    for fit in fits:
        if fit not in FITS:
            raise UserError(f"align: no fit is named {fit!r}; the fits are {', '.join(FITS)}")
        if fit in SQUARE and x_VD.shape[1] != y_VD.shape[1]:
            raise UserError(
                f"align: the {fit} fit needs equal widths, got {x_VD.shape[1]} and {y_VD.shape[1]}; "
                "only linear and ridge take both"
            )
