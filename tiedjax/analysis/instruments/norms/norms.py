"""Norm and frequency: where a token's vector lies against how often the token was a target.

Of each row: its L2 norm, its distance to the mean row, and its cosine to the mean row; the mean is over the rows that
count, each once.

Axes: V rows, N those that have the quantity, D width, B rows of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tiedjax.analysis.basis.blocked import row_blocks
from tiedjax.analysis.basis.chance import Score, beside, exact_floor
from tiedjax.analysis.basis.directions import centre
from tiedjax.analysis.basis.statistics import spearman, spearman_interval
from tiedjax.analysis.basis.strata import BIN_WIDTH, log_bins
from tiedjax.analysis.instruments.norms.probe import DRAWS, frequency_probe
from tiedjax.errors import UserError


@dataclass(frozen=True)
class Bin:
    """A quantity of the rows whose log10(count + 1) lies in [low, high)."""

    low: float
    high: float
    rows: int
    mean: float
    quantile_25: float
    median: float
    quantile_75: float


@dataclass(frozen=True)
class Curve:
    """A quantity by frequency bin, and its rank correlation with count over seen rows, which is 0 by chance."""

    mean: float | None
    spearman: Score
    bins: list[Bin]


@dataclass(frozen=True)
class Norms:
    """The quantities of every row by frequency, and how well a linear probe reads the frequency of seen rows."""

    rows: int
    seen_rows: int
    width: int
    norm: Curve
    distance_to_mean: Curve
    cosine_to_mean: Curve
    log_frequency: Score


def measure(table_VD: np.ndarray, count_V: np.ndarray, *, draws: int = DRAWS) -> Norms:
    """The quantities of each row against its token's count.

    `count_V` is how often each row's token occurred. Bins are BIN_WIDTH wide in log10(count + 1); never-seen tokens
    have a bin of their own at 0. Spearman's interval is `statistics.spearman_interval`'s, its deviation under
    independence 1 / sqrt(n - 1). Rows without a direction have no cosine. `draws` permutations of the counts make the
    probe's floor. UserError when the lengths differ or there is no row.

    >>> rare, frequent = np.eye(3), 2 * np.eye(3)
    >>> measure(np.concatenate([rare, frequent]), np.array([1, 1, 1, 9, 9, 9])).norm.spearman.score
    1.0
    """
    if len(count_V) != len(table_VD):
        raise UserError(f"norms: the table has {len(table_VD)} rows but there are counts for {len(count_V)} tokens")
    if not len(count_V):
        raise UserError("norms: no row is left to measure")
    norm_V, distance_V, cosine_V = _quantities(table_VD)
    seen_V = count_V > 0
    return Norms(
        rows=len(norm_V),
        seen_rows=int(seen_V.sum()),
        width=table_VD.shape[1],
        norm=curve(norm_V, count_V),
        distance_to_mean=curve(distance_V, count_V),
        cosine_to_mean=curve(cosine_V, count_V),
        log_frequency=frequency_probe(table_VD if seen_V.all() else table_VD[seen_V], count_V[seen_V], draws=draws),
    )


def row_norms(table_VD: np.ndarray) -> np.ndarray:
    """The L2 norm of each row, float64 [V]."""
    return _quantities(table_VD)[0]


def curve(value_V: np.ndarray, count_V: np.ndarray) -> Curve:
    """A quantity of each row against its token's count; NaN are left out and counted."""
    finite_V = np.isfinite(value_V)
    value_N, count_N = value_V[finite_V], count_V[finite_V]
    seen_N = count_N > 0
    n = int(seen_N.sum())
    correlation = spearman(value_N[seen_N], count_N[seen_N])
    span = spearman_interval(correlation, n)
    return Curve(
        mean=float(value_N.mean()) if len(value_N) else None,
        spearman=beside(
            correlation,
            exact_floor(0.0, deviation=1 / math.sqrt(n - 1) if n > 1 else None),
            rows=n,
            rows_left_out=int((~finite_V).sum()),
            interval=(span.low, span.high),
        ),
        bins=_bins(value_N, log_bins(count_N)),
    )


def _quantities(table_VD: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Norm, distance to the mean row, cosine to the mean row; float64 [V] each, NaN for a cosine of no direction."""
    mean_D, least = centre(table_VD)
    norm_V, distance_V, along_V = (np.empty(len(table_VD)) for _ in range(3))
    for block in row_blocks(len(table_VD), table_VD.shape[1], itemsize=8):
        x_BD = np.asarray(table_VD[block], np.float64)
        norm_V[block] = np.linalg.norm(x_BD, axis=1)
        distance_V[block] = np.linalg.norm(x_BD - mean_D, axis=1)
        along_V[block] = x_BD @ mean_D
    length = float(np.linalg.norm(mean_D))
    directed_V = (norm_V > 0) & (length > least)
    return norm_V, distance_V, np.divide(along_V, norm_V * length, out=np.full(len(norm_V), np.nan), where=directed_V)


def _bins(value_N: np.ndarray, bin_N: np.ndarray) -> list[Bin]:
    bins = []
    for i in np.unique(bin_N):
        inside_N = value_N[bin_N == i]
        low, high = (0.0, 0.0) if i < 0 else (float(i * BIN_WIDTH), float((i + 1) * BIN_WIDTH))
        q25, q50, q75 = (float(q) for q in np.quantile(inside_N, [0.25, 0.5, 0.75]))
        bins.append(Bin(low, high, len(inside_N), float(inside_N.mean()), q25, q50, q75))
    return bins
