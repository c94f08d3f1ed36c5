"""Alignment: how alike two tables are once one may be mapped onto the other.

The score is the mean over rows of cosine(row of X T, row of Y), X and Y centred by their column means, for T in

    identity     T = I
    orthogonal   T = argmin ||X T - Y|| over orthogonal T (Schoenemann 1966)
    linear       T = argmin ||X T - Y|| over all T, of least norm where that is not unique

A map is fitted on the rows it is scored on, so unrelated tables score above 0. The floor is the mean score against
Y[p] for the successive p of `numpy.random.default_rng(0).permutation(rows)`, the map fitted anew for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from tiedjax.errors import UserError

FITS = ("identity", "orthogonal", "linear")
DRAWS = 5
# Q = X (X'X)^(-1/2) loses orthogonality like eps / _GRAM_LIMIT = 2e-9; below the limit `lstsq` is asked instead.
_GRAM_LIMIT = 1e-7
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Score:
    """One fit's mean cosine beside its floor; None where no row has a direction."""

    score: float | None
    floor: float | None
    floor_standard_error: float | None
    floor_draws: int
    floor_closed_form: float
    corrected: float | None
    rows_left_out: int


@dataclass(frozen=True)
class Alignment:
    """Scores per fit of X mapped onto Y over `rows` rows."""

    rows: int
    width: int
    target_width: int
    scores: dict[str, Score]


def align(
    x_VD: np.ndarray,
    y_VD: np.ndarray,
    *,
    fits: Sequence[str] = FITS,
    rows: np.ndarray | None = None,
    draws: int = DRAWS,
) -> Alignment:
    """Scores of X mapped onto Y under each of `fits`, with floors.

    `rows` is a boolean [V] mask of the rows that count, for centring too. Rows without a direction (all zero once
    centred or mapped) are left out and counted. UserError: shapes that do not fit, or unequal widths with any fit but
    linear.
    """
    pair = _Pair(x_VD, y_VD, rows)
    orders = [np.arange(pair.rows)]
    rng = np.random.default_rng(0)
    orders += [rng.permutation(pair.rows) for _ in range(draws)]
    scores = {}
    for fit in fits:
        pair.check(fit)
        cosines = [pair.cosines(fit, order) for order in orders]
        means = [float(c[~np.isnan(c)].mean()) if not np.isnan(c).all() else None for c in cosines]
        scores[fit] = _score(
            means[0], [m for m in means[1:] if m is not None], int(np.isnan(cosines[0]).sum()), fit, pair
        )
    return Alignment(pair.rows, pair.x.shape[1], pair.y.shape[1], scores)


def row_cosines(x_VD: np.ndarray, y_VD: np.ndarray, fit: str, rows: np.ndarray | None = None) -> np.ndarray:
    """The cosine of each (masked) row under `fit`, float64 [V]; NaN for rows without a direction."""
    pair = _Pair(x_VD, y_VD, rows)
    pair.check(fit)
    return pair.cosines(fit, np.arange(pair.rows))


def closed_form_floor(fit: str, rows: int, width: int) -> float:
    """What two unrelated isotropic [rows, width] tables score, for rows well above width; at most 1.

    linear: each row keeps a share D/V of its squared length, which is a cosine of sqrt(D/V). orthogonal: the mean
    singular value of a D x D Gaussian matrix is (8 / 3 pi) sqrt(D) (quarter-circle law), divided by sqrt(V).
    """
    root = math.sqrt(width / rows) if rows else 1.0
    return {"identity": 0.0, "orthogonal": min(1.0, 8 / (3 * math.pi) * root), "linear": min(1.0, root)}[fit]


def correct(score: float | None, floor: float | None) -> float | None:
    """(score - floor) / (1 - floor): 0 is chance, 1 is identical; None where chance already reaches 1."""
    if score is None or floor is None or 1 - floor < 1e-6:
        return None
    return (score - floor) / (1 - floor)


def _score(score: float | None, floors: list[float], left_out: int, fit: str, pair: _Pair) -> Score:
    n = len(floors)
    floor = float(np.mean(floors)) if n else None
    return Score(
        score=score,
        floor=floor,
        floor_standard_error=float(np.std(floors, ddof=1) / math.sqrt(n)) if n > 1 else None,
        floor_draws=n,
        floor_closed_form=closed_form_floor(fit, pair.rows, pair.x.shape[1]),
        corrected=correct(score, floor),
        rows_left_out=left_out,
    )


class _Pair:
    """Two tables, centred in float64, and what their fits share."""

    def __init__(self, x_VD: np.ndarray, y_VD: np.ndarray, rows: np.ndarray | None):
        for name, table in [("first", x_VD), ("second", y_VD)]:
            if table.ndim != 2:
                raise UserError(f"align: the {name} table must have 2 dimensions [V, D], got {list(table.shape)}")
        if len(x_VD) != len(y_VD):
            raise UserError(f"align: the tables must have the same rows, got {len(x_VD)} and {len(y_VD)}")
        if rows is not None:
            x_VD, y_VD = x_VD[rows], y_VD[rows]
        self.rows = len(x_VD)
        self.x, self.x_zero = _centred(x_VD)
        self.y, self.y_zero = _centred(y_VD)
        self.x_norm, self.y_norm = _norms(self.x), _norms(self.y)
        self._basis: np.ndarray | None = None
        self._basis_known = False

    def check(self, fit: str) -> None:
        if fit not in FITS:
            raise UserError(f"align: no fit is named {fit!r}; the fits are {', '.join(FITS)}")
        if fit != "linear" and self.x.shape[1] != self.y.shape[1]:
            raise UserError(
                f"align: the {fit} fit needs equal widths, "
                f"got {self.x.shape[1]} and {self.y.shape[1]}; only linear takes both"
            )

    def cosines(self, fit: str, order: np.ndarray) -> np.ndarray:
        """cosine(row of X T, row of Y[order]) per row; NaN where either has no direction."""
        y, y_norm = self.y[order], self.y_norm[order]
        mapped = self._mapped(fit, y)
        norm = _norms(mapped) if fit == "linear" else self.x_norm
        zero = (self.x_norm <= self.x_zero) | (y_norm <= self.y_zero)
        if fit == "linear":
            zero |= norm <= self.y_zero
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(zero, np.nan, np.einsum("vd,vd->v", mapped, y) / (norm * y_norm))

    def _mapped(self, fit: str, y: np.ndarray) -> np.ndarray:
        if fit == "identity":
            return self.x
        if fit == "orthogonal":
            # The product in SciPy's order: where singular values vanish, rounding picks the rotation, and it is the
            # same one.
            u, _, vt = scipy.linalg.svd((y.T @ self.x).T)
            return self.x @ (u @ vt)
        basis = self._column_basis()
        if basis is None:
            return self.x @ np.linalg.lstsq(self.x, y, rcond=None)[0]
        return basis @ (basis.T @ y)

    def _column_basis(self) -> np.ndarray | None:
        """Orthonormal columns that span X's, from its Gram matrix; None when that would cost accuracy."""
        if not self._basis_known:
            self._basis_known = True
            values, vectors = np.linalg.eigh(self.x.T @ self.x)
            if values[0] > _GRAM_LIMIT * values[-1]:
                self._basis = self.x @ (vectors / np.sqrt(values))
        return self._basis


def _centred(table_VD: np.ndarray) -> tuple[np.ndarray, float]:
    """The table in float64, scaled by a power of two and centred; and the norm below which a row is rounding."""
    table = np.asarray(table_VD, np.float64)
    if not table.size:
        return table, 0.0
    peak = np.abs(table).max(axis=0)
    # A power of two changes no digit and keeps squares of very large and very small tables inside the range of floats.
    exponent = -int(np.frexp(peak.max())[1])
    table, peak = np.ldexp(table, exponent), np.ldexp(peak, exponent)
    rounding = 4 * _EPS * math.sqrt(len(table)) * float(np.linalg.norm(peak))
    return table - table.mean(axis=0), rounding


def _norms(table_VD: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("vd,vd->v", table_VD, table_VD))
