"""Norm and frequency: where a token's vector lies against how often the token was a target.

Of each row: its L2 norm, its distance to the mean row, and its cosine to the mean row; the mean is over the rows that
count, each once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tiedjax.analysis.basis.blocked import row_blocks
from tiedjax.analysis.basis.chance import Score, beside_exact
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
    norm, distance, cosine = _quantities(table_VD)
    seen = count_V > 0
    return Norms(
        rows=len(norm),
        seen_rows=int(seen.sum()),
        width=table_VD.shape[1],
        norm=curve(norm, count_V),
        distance_to_mean=curve(distance, count_V),
        cosine_to_mean=curve(cosine, count_V),
        log_frequency=frequency_probe(table_VD if seen.all() else table_VD[seen], count_V[seen], draws=draws),
    )


def row_norms(table_VD: np.ndarray) -> np.ndarray:
    """The L2 norm of each row, float64 [V]."""
    return _quantities(table_VD)[0]


def curve(value_V: np.ndarray, count_V: np.ndarray) -> Curve:
    """A quantity of each row against its token's count; NaN are left out and counted."""
    known = np.isfinite(value_V)
    value, count = value_V[known], count_V[known]
    seen = count > 0
    n = int(seen.sum())
    correlation = spearman(value[seen], count[seen])
    span = spearman_interval(correlation, n)
    return Curve(
        mean=float(value.mean()) if len(value) else None,
        spearman=beside_exact(
            correlation,
            0.0,
            deviation=1 / math.sqrt(n - 1) if n > 1 else None,
            rows=n,
            rows_left_out=int((~known).sum()),
            interval=(span.low, span.high),
        ),
        bins=_bins(value, log_bins(count)),
    )


def _quantities(table_VD: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Norm, distance to the mean row, cosine to the mean row; float64 [V] each, NaN for a cosine of no direction."""
    mean_D, least = centre(table_VD)
    norm, distance, along = (np.empty(len(table_VD)) for _ in range(3))
    for block in row_blocks(len(table_VD), table_VD.shape[1], itemsize=8):
        x_BD = np.asarray(table_VD[block], np.float64)
        norm[block] = np.linalg.norm(x_BD, axis=1)
        distance[block] = np.linalg.norm(x_BD - mean_D, axis=1)
        along[block] = x_BD @ mean_D
    length = float(np.linalg.norm(mean_D))
    known = (norm > 0) & (length > least)
    return norm, distance, np.divide(along, norm * length, out=np.full(len(norm), np.nan), where=known)


def _bins(value: np.ndarray, index: np.ndarray) -> list[Bin]:
    bins = []
    for i in np.unique(index):
        inside = value[index == i]
        low, high = (0.0, 0.0) if i < 0 else (float(i * BIN_WIDTH), float((i + 1) * BIN_WIDTH))
        q25, q50, q75 = (float(q) for q in np.quantile(inside, [0.25, 0.5, 0.75]))
        bins.append(Bin(low, high, len(inside), float(inside.mean()), q25, q50, q75))
    return bins
