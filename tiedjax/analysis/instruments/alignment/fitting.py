"""Fits of one table onto another, block by block: sums over rows, maps from them, cosines of the mapped rows.

Large float32 tables are multiplied in float32; sums over blocks, and what is solved from them, are float64.

Axes: V rows of a table, B rows of a block, D width of X, E width of Y.
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

    def __init__(self, table_VD: np.ndarray, kept_V: np.ndarray | None, dtype: np.dtype):
        self._table, self._index = table_VD, None if kept_V is None else np.flatnonzero(kept_V)
        self.shape = (len(table_VD) if self._index is None else len(self._index), table_VD.shape[1])
        peak_D, total_D = np.zeros(self.shape[1]), np.zeros(self.shape[1])
        for block in row_blocks(*self.shape):
            raw_BD = self._raw(block)
            peak_D = np.maximum(peak_D, np.maximum(raw_BD.max(axis=0), -raw_BD.min(axis=0)))
            total_D += raw_BD.sum(axis=0, dtype=np.float64)
        # A power of two changes no digit and keeps squares of very large and very small tables inside the range of
        # floats.
        exponent = -int(np.frexp(peak_D.max(initial=0.0))[1])
        self._exponent = exponent if abs(exponent) > 16 else 0
        self._mean = np.ldexp(total_D / max(1, self.shape[0]), self._exponent)
        self.least = rounding(np.ldexp(peak_D, self._exponent), self.shape[0], dtype)

    def read(self, positions: slice | np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Centred rows, a copy."""
        raw_BD = self._raw(positions)
        scaled_BD = np.ldexp(raw_BD, self._exponent) if self._exponent else raw_BD
        return np.subtract(scaled_BD, self._mean.astype(dtype), dtype=dtype)

    def _raw(self, positions: slice | np.ndarray) -> np.ndarray:
        return self._table[positions if self._index is None else self._index[positions]]


@dataclass
class _Sums:
    """Sums over some of the rows, centred at the mean of all: of x, y, x'y, y'y and, once, x'x."""

    rows: int
    x_D: np.ndarray
    y_E: np.ndarray
    xy_DE: np.ndarray
    yy: float
    xx_DD: Any

    def __add__(self, other: _Sums) -> _Sums:
        xx_DD = None if self.xx_DD is None or other.xx_DD is None else self.xx_DD + other.xx_DD
        return _Sums(
            self.rows + other.rows,
            self.x_D + other.x_D,
            self.y_E + other.y_E,
            self.xy_DE + other.xy_DE,
            self.yy + other.yy,
            xx_DD,
        )

    def centred(self) -> _Sums:
        """The same rows about their own means, which stay in `x_D` and `y_E`."""
        n = max(1, self.rows)
        x_D, y_E = self.x_D / n, self.y_E / n
        xx_DD = None if self.xx_DD is None else self.xx_DD - n * np.outer(x_D, x_D)
        return _Sums(self.rows, x_D, y_E, self.xy_DE - n * np.outer(x_D, y_E), self.yy - n * float(y_E @ y_E), xx_DD)


@dataclass(frozen=True)
class _FittedMaps:
    """The matrix of each fit (None: the identity), and the means they are about beyond those of all rows."""

    matrices: dict[str, np.ndarray | None]
    penalty: float | None
    x_mean_D: np.ndarray | None
    y_mean_E: np.ndarray | None


class Fitter:
    """Two tables and what their fits share from one order of Y's rows to the next.

    `rows` is a boolean [V] mask of those that count; `halves` also fits on either half of them. UserError: shapes that
    do not fit, or unequal widths with a fit that needs equal ones.
    """

    def __init__(
        self, x_VD: np.ndarray, y_VE: np.ndarray, fits: Sequence[str], kept_V: np.ndarray | None, halves: bool
    ):
        _check(x_VD, y_VE, fits)
        small = max(x_VD.size, y_VE.size) <= SMALL  # then float64 costs nothing
        self._dtype = np.dtype(np.float64 if small else np.result_type(x_VD, y_VE, np.float32))
        self._run_two = in_turn if small else at_once
        self._x, self._y = self._run_two(
            lambda: _Rows(x_VD, kept_V, self._dtype), lambda: _Rows(y_VE, kept_V, self._dtype)
        )
        self.rows, self.fits = self._x.shape[0], fits
        self._parts: list[np.ndarray | None] = [None]
        if halves:
            shuffled_N = np.random.default_rng(1).permutation(self.rows)
            self._parts = [np.sort(shuffled_N[: self.rows // 2]), np.sort(shuffled_N[self.rows // 2 :])]
        self._solvers: dict[str, Any] = {}
        self._ridges: dict[str, linear_maps.Ridge] = {}

    def measure(self, order: np.ndarray | None = None) -> tuple[RowCosines, RowCosines | None]:
        """X mapped onto Y[order], in sample and, given halves, held out. The first call is the one without `order`."""
        sums = [self._sums(part, order) for part in self._parts]
        if order is None and "linear" in self.fits:
            sums = self._prepare(sums)
        whole = self._fit("whole", functools.reduce(operator.add, sums))
        half_maps = [self._fit(f"half {i}", half_sums) for i, half_sums in enumerate(sums)] if len(sums) == 2 else []
        in_sample = {fit: np.empty(self.rows) for fit in self.fits}
        held_out = {fit: np.empty(self.rows) for fit in self.fits if half_maps}
        for i, part in enumerate(self._parts):
            for positions, x_BD, y_BE in self._blocks(part, order):
                self._score(x_BD, y_BE, whole, positions, in_sample)
                if half_maps:
                    self._score(x_BD, y_BE, half_maps[1 - i], positions, held_out)
        return RowCosines(in_sample, whole.penalty), RowCosines(held_out, None) if half_maps else None

    def _blocks(self, part: np.ndarray | None, order: np.ndarray | None) -> Iterator[_Block]:
        """(positions, centred rows of X, centred rows of Y[order]) of a part, block by block."""
        rows, width = self.rows if part is None else len(part), max(self._x.shape[1], self._y.shape[1])
        for block in row_blocks(rows, width, self._dtype.itemsize):
            positions = block if part is None else part[block]
            partners = positions if order is None else order[positions]
            reads = (
                functools.partial(self._x.read, positions, self._dtype),
                functools.partial(self._y.read, partners, self._dtype),
            )
            yield positions, *self._run_two(*reads)

    def _sums(self, part: np.ndarray | None, order: np.ndarray | None) -> _Sums:
        D, E = self._x.shape[1], self._y.shape[1]
        with_xx = order is None and not {"linear", "ridge"}.isdisjoint(self.fits)
        total = _Sums(0, np.zeros(D), np.zeros(E), np.zeros((D, E)), 0.0, np.zeros((D, D)) if with_xx else None)
        for _, x_BD, y_BE in self._blocks(part, order):
            total.rows += len(x_BD)
            if part is not None:  # the rows of all are read about their means
                total.x_D += x_BD.sum(axis=0, dtype=np.float64)
                total.y_E += y_BE.sum(axis=0, dtype=np.float64)
            if "ridge" in self.fits:
                total.yy += float(np.vecdot(y_BE, y_BE).sum(dtype=np.float64))
            if set(self.fits) != {"identity"}:
                total.xy_DE += matmul(x_BD.T, y_BE)
            if with_xx:
                total.xx_DD += matmul(x_BD.T, x_BD)
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
        for name, (part, part_sums) in parts.items():
            centred = part_sums.centred()
            self._solvers[name] = linear_maps.well_conditioned(centred.xx_DD, _CONDITION[self._dtype])
            if self._solvers[name] is None and self._dtype == np.float32:
                self._dtype = np.dtype(np.float64)
                return self._prepare([self._sums(part, None) for part in self._parts])
            if self._solvers[name] is None:
                self._solvers[name] = linear_maps.from_triangle(self._triangle(part, centred.x_D), part_sums.rows)
        return sums

    def _triangle(self, part: np.ndarray | None, x_mean_D: np.ndarray) -> np.ndarray:
        """R of X = QR for the rows of a part about their mean, block by block."""
        triangle_DD = np.zeros((0, self._x.shape[1]))
        for _, x_BD, _ in self._blocks(part, None):
            stacked = np.concatenate([triangle_DD, x_BD - x_mean_D])
            triangle_DD = scipy.linalg.qr(stacked, mode="r", check_finite=False)[0][: self._x.shape[1]]
        return triangle_DD

    def _fit(self, name: str, sums: _Sums) -> _FittedMaps:
        centred = sums.centred()
        if centred.xx_DD is not None and "ridge" in self.fits:
            self._ridges[name] = linear_maps.Ridge(centred.xx_DD, centred.rows)
        matrices: dict[str, np.ndarray | None] = dict.fromkeys(self.fits)
        penalty = None
        if "orthogonal" in matrices:
            matrices["orthogonal"] = linear_maps.nearest_orthogonal(centred.xy_DE)
        if "linear" in matrices:
            matrices["linear"] = self._solvers[name](centred.xy_DE)
        if "ridge" in matrices:
            matrices["ridge"], penalty = self._ridges[name].solve(centred.xy_DE, centred.yy)
        # The rows are read about the means of all; those of a half lie elsewhere.
        return _FittedMaps(matrices, penalty, *((None, None) if name == "whole" else (centred.x_D, centred.y_E)))

    def _score(
        self, x_BD: np.ndarray, y_BE: np.ndarray, maps: _FittedMaps, positions: Any, out: dict[str, np.ndarray]
    ) -> None:
        """Writes cosine(row of X T, row of Y) of a block's rows to `out` [positions]."""
        if maps.x_mean_D is not None and maps.y_mean_E is not None:
            x_BD = np.subtract(x_BD, maps.x_mean_D, dtype=x_BD.dtype)
            y_BE = np.subtract(y_BE, maps.y_mean_E, dtype=y_BE.dtype)
        norm = lambda rows: np.sqrt(np.vecdot(rows, rows).astype(np.float64))
        x_norm_B, y_norm_B = norm(x_BD), norm(y_BE)
        for fit, matrix_DE in maps.matrices.items():
            image_BE = x_BD if matrix_DE is None else matmul(x_BD, matrix_DE.astype(x_BD.dtype))
            length_B = x_norm_B if fit in SQUARE else norm(image_BE)
            zero_B = (x_norm_B <= self._x.least) | (y_norm_B <= self._y.least)
            if fit not in SQUARE:
                zero_B |= length_B <= self._y.least  # fitted values are of Y's size
            with np.errstate(invalid="ignore", divide="ignore"):
                out[fit][positions] = np.where(zero_B, np.nan, np.vecdot(image_BE, y_BE) / (length_B * y_norm_B))


def _check(x_VD: np.ndarray, y_VE: np.ndarray, fits: Sequence[str]) -> None:
    for name, table in [("first", x_VD), ("second", y_VE)]:
        if table.ndim != 2:
            raise UserError(f"align: the {name} table must have 2 dimensions [V, D], got {list(table.shape)}")
    if len(x_VD) != len(y_VE):
        raise UserError(f"align: the tables must have the same rows, got {len(x_VD)} and {len(y_VE)}")
    for fit in fits:
        if fit not in FITS:
            raise UserError(f"align: no fit is named {fit!r}; the fits are {', '.join(FITS)}")
        if fit in SQUARE and x_VD.shape[1] != y_VE.shape[1]:
            raise UserError(
                f"align: the {fit} fit needs equal widths, got {x_VD.shape[1]} and {y_VE.shape[1]}; "
                "only linear and ridge take both"
            )
