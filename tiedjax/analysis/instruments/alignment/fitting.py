"""Fits of one table onto another, block by block: sums over rows, maps from them, cosines of the mapped rows.

Large float32 tables are multiplied in float32; sums over blocks, and what is solved from them, are float64.

Axes: V rows of a table, B rows of a block, D width of X, E width of Y.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg

from tiedjax.analysis.basis import linear_maps
from tiedjax.analysis.basis.blocked import MULTIPLIED, SCANNED, SMALL, at_once, in_turn, matmul, row_blocks
from tiedjax.analysis.basis.directions import rounding
from tiedjax.errors import UserError

FITS = ("identity", "orthogonal", "linear", "ridge")
SQUARE = ("identity", "orthogonal")  # need equal widths, and score the same either way
# A Gram matrix summed in either precision is trusted down to this reciprocal condition: its error moves no fitted
# value by more than 1 % in its worst direction, and a mean cosine by less than 1e-5.
_CONDITION = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-12}


class _Block(NamedTuple):
    """Some rows: their positions, which of Y's stand beside them, and both, centred."""

    positions: Any
    partners: Any
    x_BD: np.ndarray
    y_BE: np.ndarray


@dataclass(frozen=True)
class RowCosines:
    """Per fit, the cosine of each row of X T with its row of Y, NaN for rows without a direction; ridge's penalty."""

    cosines: dict[str, np.ndarray]
    penalty: float | None


class CentredRows:
    """The rows of a table [V, D] that count, scaled, and centred as they are read.

    `kept_V` is a boolean [V] mask, None where all count. A small table is read once and held in float64, so that every
    pair that it stands in shares it.
    """

    def __init__(self, table_VD: np.ndarray, kept_V: np.ndarray | None):
        if kept_V is not None and (np.shape(kept_V) != (len(table_VD),) or kept_V.dtype != np.bool_):
            raise UserError(
                f"kept_V: must be a mask, bool [{len(table_VD)}], got {kept_V.dtype} {list(np.shape(kept_V))}"
            )
        self._table, self._index = table_VD, None if kept_V is None or kept_V.all() else np.flatnonzero(kept_V)
        self.shape = (len(table_VD) if self._index is None else len(self._index), table_VD.shape[1])
        self.small, self.dtype = table_VD.size <= SMALL, table_VD.dtype
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
        self._peak_D = np.ldexp(peak_D, self._exponent)

    def read(self, positions: slice | np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Centred rows; not to be written to."""
        if self.small and dtype == np.float64:
            return self._held[positions] if isinstance(positions, slice) else self._held.take(positions, axis=0)
        return self._centred(positions, dtype)

    def norms(self, positions: slice | np.ndarray, rows_BD: np.ndarray) -> np.ndarray:
        """The norms of rows as `read` gives them, float64 [B]."""
        return self._held_norms[positions] if self.small and rows_BD.dtype == np.float64 else _norms(rows_BD)

    def least(self, dtype: np.dtype) -> float:
        """The norm up to which a row that is read in this precision is rounding."""
        return rounding(self._peak_D, self.shape[0], dtype)

    @functools.cached_property
    def _held(self) -> np.ndarray:
        return self._centred(slice(None), np.dtype(np.float64))

    @functools.cached_property
    def _held_norms(self) -> np.ndarray:
        return _norms(self._held)

    def _centred(self, positions: slice | np.ndarray, dtype: np.dtype) -> np.ndarray:
        raw_BD = self._raw(positions)
        scaled_BD = np.ldexp(raw_BD, self._exponent) if self._exponent else raw_BD
        return np.subtract(scaled_BD, self._mean.astype(dtype), dtype=dtype)

    def _raw(self, positions: slice | np.ndarray) -> np.ndarray:
        return self._table[positions if self._index is None else self._index[positions]]


class CentredTables:
    """Centred rows that are remembered, for tables that stand in several pairs over the same rows."""

    def __init__(self) -> None:
        # The rows keep their table: while it lives no other can have its id.
        self._rows: dict[tuple[int, bytes], CentredRows] = {}

    def rows(self, table_VD: np.ndarray, kept_V: np.ndarray) -> CentredRows:
        """The rows of the table that `kept_V`, boolean [V], keeps."""
        key = (id(table_VD), kept_V.tobytes())
        if key not in self._rows:
            self._rows[key] = CentredRows(table_VD, kept_V)
        return self._rows[key]


@dataclass
class _Sums:
    """Sums over some of the rows, centred at the mean of all: of x, y, x'y if a fit needs it, y'y and, once, x'x."""

    rows: int
    x_D: np.ndarray
    y_E: np.ndarray
    xy_DE: Any
    yy: float
    xx_DD: Any

    def __add__(self, other: _Sums) -> _Sums:
        added = lambda a, b: None if a is None or b is None else a + b
        return _Sums(
            self.rows + other.rows,
            self.x_D + other.x_D,
            self.y_E + other.y_E,
            added(self.xy_DE, other.xy_DE),
            self.yy + other.yy,
            added(self.xx_DD, other.xx_DD),
        )

    def centred(self) -> _Sums:
        """The same rows about their own means, which stay in `x_D` and `y_E`."""
        n = max(1, self.rows)
        x_D, y_E = self.x_D / n, self.y_E / n
        xx_DD = None if self.xx_DD is None else self.xx_DD - n * np.outer(x_D, x_D)
        xy_DE = None if self.xy_DE is None else self.xy_DE - n * np.outer(x_D, y_E)
        return _Sums(self.rows, x_D, y_E, xy_DE, self.yy - n * float(y_E @ y_E), xx_DD)


@dataclass(frozen=True)
class _FittedMaps:
    """The matrix of each fit (None: the identity), and the means they are about beyond those of all rows."""

    matrices: dict[str, np.ndarray | None]
    penalty: float | None
    x_mean_D: np.ndarray | None
    y_mean_E: np.ndarray | None


class Fitter:
    """Two tables and what their fits share from one order of Y's rows to the next.

    Both are over the same rows, in widths that `check_fits` let pass; `halves` asks for what fits on either half of the
    rows need.
    """

    def __init__(self, x: CentredRows, y: CentredRows, fits: Sequence[str], halves: bool):
        small = x.small and y.small  # then float64 costs nothing
        self._dtype = np.dtype(np.float64 if small else np.result_type(x.dtype, y.dtype, np.float32))
        self._run_two = in_turn if small else at_once
        self._x, self._y = x, y
        self._x_least, self._y_least = x.least(self._dtype), y.least(self._dtype)
        (self.rows, self.width), self.target_width, self.fits = x.shape, y.shape[1], fits
        self._fits_maps = set(fits) != {"identity"}
        self._halves: list[np.ndarray] = []
        if halves:
            shuffled_N = np.random.default_rng(1).permutation(self.rows)
            self._halves = [np.sort(shuffled_N[: self.rows // 2]), np.sort(shuffled_N[self.rows // 2 :])]
        self._solvers: dict[str, Any] = {}
        self._ridges: dict[str, linear_maps.Ridge] = {}

    def measure(self, order: np.ndarray | None = None, *, halves: bool = False) -> tuple[RowCosines, RowCosines | None]:
        """X mapped onto Y[order], in sample and, with `halves`, held out.

        The first call is the one without `order`, and with halves if any is to have them.
        """
        parts: Sequence[np.ndarray | None] = self._halves if halves else [None]
        sums = [self._sums(part, order) for part in parts]
        if order is None and "linear" in self.fits:
            sums = self._prepare(parts, sums)
        whole = self._fit("whole", functools.reduce(operator.add, sums))
        half_maps = [self._fit(f"half {i}", half_sums) for i, half_sums in enumerate(sums)] if halves else []
        in_sample = {fit: np.empty(self.rows) for fit in self.fits}
        held_out = {fit: np.empty(self.rows) for fit in self.fits if half_maps}
        for i, part in enumerate(parts):
            for block in self._blocks(part, order):
                self._score(block, whole, in_sample)
                if half_maps:
                    self._score(block, half_maps[1 - i], held_out)
        return RowCosines(in_sample, whole.penalty), RowCosines(held_out, None) if half_maps else None

    def _blocks(self, part: np.ndarray | None, order: np.ndarray | None) -> Iterator[_Block]:
        """The rows of a part beside those of Y[order]."""
        rows, width = self.rows if part is None else len(part), max(self._x.shape[1], self._y.shape[1])
        block_bytes = MULTIPLIED if self._fits_maps else SCANNED
        for block in row_blocks(rows, width, self._dtype.itemsize, block_bytes):
            positions = block if part is None else part[block]
            partners = positions if order is None else order[positions]
            reads = (
                functools.partial(self._x.read, positions, self._dtype),
                functools.partial(self._y.read, partners, self._dtype),
            )
            yield _Block(positions, partners, *self._run_two(*reads))

    def _sums(self, part: np.ndarray | None, order: np.ndarray | None) -> _Sums:
        D, E = self._x.shape[1], self._y.shape[1]
        with_xx = order is None and not {"linear", "ridge"}.isdisjoint(self.fits)
        xy_DE, xx_DD = np.zeros((D, E)) if self._fits_maps else None, np.zeros((D, D)) if with_xx else None
        total = _Sums(0, np.zeros(D), np.zeros(E), xy_DE, 0.0, xx_DD)
        for _, _, x_BD, y_BE in self._blocks(part, order):
            total.rows += len(x_BD)
            if part is not None:  # the rows of all are read about their means
                total.x_D += x_BD.sum(axis=0, dtype=np.float64)
                total.y_E += y_BE.sum(axis=0, dtype=np.float64)
            if "ridge" in self.fits:
                total.yy += float(np.vecdot(y_BE, y_BE).sum(dtype=np.float64))
            if self._fits_maps:
                total.xy_DE += matmul(x_BD.T, y_BE)
            if with_xx:
                total.xx_DD += matmul(x_BD.T, x_BD)
        return total

    def _prepare(self, parts: Sequence[np.ndarray | None], sums: list[_Sums]) -> list[_Sums]:
        """Solvers for the linear fit of the whole and of each half; all in float64 if float32 is too coarse.

        Once for all orders of Y's rows: the linear map is (X'X)^-1 X'Y, and an order changes only X'Y. A Cholesky
        factor of X'X is cheap but squares X's condition, so it serves only where `_CONDITION` trusts it. Sums in
        float32 that it does not trust are taken again in float64, for all fits and orders, so that scores and floors
        are computed alike; where even those are too coarse, X itself is brought to a triangle.
        """
        fitted: dict[str, tuple[np.ndarray | None, _Sums]] = {"whole": (None, functools.reduce(operator.add, sums))}
        if len(parts) == 2:
            fitted |= {f"half {i}": (part, sums[i]) for i, part in enumerate(parts)}
        for name, (part, part_sums) in fitted.items():
            centred = part_sums.centred()
            self._solvers[name] = linear_maps.well_conditioned(centred.xx_DD, _CONDITION[self._dtype])
            if self._solvers[name] is None and self._dtype == np.float32:
                self._dtype = np.dtype(np.float64)
                return self._prepare(parts, [self._sums(part, None) for part in parts])
            if self._solvers[name] is None:
                self._solvers[name] = linear_maps.from_triangle(self._triangle(part, centred.x_D), part_sums.rows)
        return sums

    def _triangle(self, part: np.ndarray | None, x_mean_D: np.ndarray) -> np.ndarray:
        """R of X = QR for the rows of a part about their mean, block by block."""
        triangle_DD = np.zeros((0, self._x.shape[1]))
        for _, _, x_BD, _ in self._blocks(part, None):
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

    def _score(self, block: _Block, maps: _FittedMaps, out: dict[str, np.ndarray]) -> None:
        """Writes cosine(row of X T, row of Y) of a block's rows to `out` at their positions."""
        positions, partners, x_BD, y_BE = block
        if maps.x_mean_D is None or maps.y_mean_E is None:
            x_norm_B, y_norm_B = self._x.norms(positions, x_BD), self._y.norms(partners, y_BE)
        else:
            x_BD = np.subtract(x_BD, maps.x_mean_D, dtype=x_BD.dtype)
            y_BE = np.subtract(y_BE, maps.y_mean_E, dtype=y_BE.dtype)
            x_norm_B, y_norm_B = _norms(x_BD), _norms(y_BE)
        for fit, matrix_DE in maps.matrices.items():
            image_BE = x_BD if matrix_DE is None else matmul(x_BD, matrix_DE.astype(x_BD.dtype))
            length_B = x_norm_B if fit in SQUARE else _norms(image_BE)
            zero_B = (x_norm_B <= self._x_least) | (y_norm_B <= self._y_least)
            if fit not in SQUARE:
                zero_B |= length_B <= self._y_least  # fitted values are of Y's size
            with np.errstate(invalid="ignore", divide="ignore"):
                out[fit][positions] = np.where(zero_B, np.nan, np.vecdot(image_BE, y_BE) / (length_B * y_norm_B))


def _norms(rows_BD: np.ndarray) -> np.ndarray:
    return np.sqrt(np.vecdot(rows_BD, rows_BD).astype(np.float64))


def check_fits(x_VD: np.ndarray, y_VE: np.ndarray, fits: Sequence[str]) -> None:
    """UserError: shapes that do not fit, an unknown fit, or unequal widths with a fit that needs equal ones."""
    for name, table in [("first", x_VD), ("second", y_VE)]:
        if table.ndim != 2:
            raise UserError(f"align: the {name} table must have 2 dimensions [V, D], got {list(table.shape)}")
    if len(x_VD) != len(y_VE):
        raise UserError(f"align: the tables must have the same rows, got {len(x_VD)} and {len(y_VE)}")
    if isinstance(fits, str):
        raise UserError(f"align: fits must be a list of names, got {fits!r}")
    for fit in fits:
        if fit not in FITS:
            raise UserError(f"align: no fit is named {fit!r}; the fits are {', '.join(FITS)}")
        if fit in SQUARE and x_VD.shape[1] != y_VE.shape[1]:
            raise UserError(
                f"align: the {fit} fit needs equal widths, got {x_VD.shape[1]} and {y_VE.shape[1]}; "
                "only linear and ridge take both"
            )
