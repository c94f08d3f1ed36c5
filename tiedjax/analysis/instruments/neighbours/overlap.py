"""Neighbours: whether two tables place the same tokens near each other, without mapping one onto the other.

The score is the mean over rows i of |N_A(i) & N_B(i)| / k, N(i) the k nearest other rows by cosine (`neighbours`).
By chance it is k / (V - 1): with the rows of one table permuted uniformly at random, N_B(i) is a uniformly random set
of k of the V - 1 other rows. The floor is its mean over such permutations, as they come from
`numpy.random.default_rng(0)`, and has that expectation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from tiedjax.analysis.basis.chance import Score, beside_draws
from tiedjax.analysis.basis.directions import centre, with_direction
from tiedjax.analysis.basis.statistics import Interval, bootstrap_mean
from tiedjax.analysis.basis.strata import strata
from tiedjax.analysis.instruments.neighbours.search import Report, Searches
from tiedjax.errors import UserError

K = 10
DRAWS = 5
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Hubness:
    """How unevenly a table's rows are neighbours of others: N(i) counts the rows that have i among their k nearest.

    `skewness` is the third standardised moment of N (Radovanovic et al. 2010, JMLR 11), None where N does not vary;
    `orphans` the share of rows with N = 0; `largest` the largest N. Its mean is k.
    """

    skewness: float | None
    orphans: float
    largest: int


@dataclass(frozen=True)
class NeighbourOverlap:
    """The overlap of two tables' neighbours: mean, spread over rows, by stratum; and each table's hubness.

    `paper` is the overlap in the form of arXiv 2603.26663: all rows, rows of zeros too, not centred. `histogram[n]` is
    the number of rows with n common neighbours; `interval` is of the score over rows.
    """

    k: int
    overlap: Score
    paper: Score
    interval: Interval
    quantiles: dict[str, float]
    histogram: list[int]
    strata: dict[str, Score]
    hubness: tuple[Hubness, Hubness]


def measure(
    x_VD: np.ndarray,
    y_VD: np.ndarray,
    *,
    k: int = K,
    rows: np.ndarray | None = None,
    centred: bool = False,
    zero_rows: bool = False,
    draws: int = DRAWS,
    counts: np.ndarray | None = None,
    searches: Searches | None = None,
    report: Report | None = None,
) -> NeighbourOverlap:
    """The overlap of the k nearest neighbours in two tables of the same rows and any widths.

    `rows` is a boolean [V] mask of the rows that count, as queries and as candidates. Rows without a direction are left
    out too and counted, unless `zero_rows`: then the cosine of a row of zeros to everything is 0. `counts` [V] or
    [2, V] makes strata by how often training showed a token. `searches` remembers neighbours from one call to the next.
    UserError: shapes that do not fit, k or fewer rows left.

    >>> table = np.random.default_rng(0).normal(size=(50, 4))
    >>> turned = table[:, ::-1]
    >>> measure(table, turned).overlap.score
    1.0
    """
    searches = searches or Searches()
    both = paired_neighbours(
        x_VD, y_VD, k, rows=rows, centred=centred, zero_rows=zero_rows, searches=searches, report=report
    )
    every = both
    if not both.kept.all() or centred:
        every = paired_neighbours(x_VD, y_VD, k, zero_rows=True, searches=searches, report=report)
    kept_counts = None if counts is None else np.asarray(counts)[..., both.kept]
    return _compared(both, every, draws, {} if kept_counts is None else strata(kept_counts))


def _compared(
    both: PairedNeighbours, every: PairedNeighbours, draws: int, groups: Mapping[str, np.ndarray]
) -> NeighbourOverlap:
    first_VK, second_VK = both.indices
    V, k = first_VK.shape
    common_V = shared(first_VK, second_VK)
    drawn = _permuted(first_VK, second_VK, draws)
    closed = k / (V - 1)
    overlap = replace(_overlap(common_V, drawn, k, closed), rows_left_out=both.rows_left_out)
    everywhere = _overlap(shared(*every.indices), _permuted(*every.indices, draws), k, k / (len(every.kept) - 1))
    return NeighbourOverlap(
        k=k,
        overlap=overlap,
        paper=replace(everywhere, corrected=None),
        interval=bootstrap_mean(common_V / k),
        quantiles={f"{q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(common_V / k, QUANTILES), strict=True)},
        histogram=np.bincount(common_V, minlength=k + 1).tolist(),
        strata={name: _overlap(common_V[mask], drawn[:, mask], k, closed) for name, mask in groups.items()},
        hubness=(hubness(first_VK), hubness(second_VK)),
    )


@dataclass(frozen=True)
class PairedNeighbours:
    """`kept`: boolean [V], the rows that count; of these each table's neighbours [N, k]."""

    kept: np.ndarray
    rows_left_out: int
    indices: tuple[np.ndarray, np.ndarray]


def paired_neighbours(
    x_VD: np.ndarray,
    y_VD: np.ndarray,
    k: int,
    *,
    rows: np.ndarray | None = None,
    centred: bool = False,
    zero_rows: bool = False,
    searches: Searches | None = None,
    report: Report | None = None,
) -> PairedNeighbours:
    """Both tables' neighbours over the rows that count; arguments and errors as of `measure`."""
    searches = searches or Searches()
    for name, table in [("first", x_VD), ("second", y_VD)]:
        if table.ndim != 2:
            raise UserError(f"knn: the {name} table must have 2 dimensions [V, D], got {list(table.shape)}")
        if table.shape[1] < 2:
            raise UserError(f"knn: the {name} table has width {table.shape[1]}; directions need at least 2")
    if len(x_VD) != len(y_VD):
        raise UserError(f"knn: the tables must have the same rows, got {len(x_VD)} and {len(y_VD)}")
    if k < 1:
        raise UserError(f"knn: k must be at least 1, got {k}")
    wanted = np.ones(len(x_VD), bool) if rows is None else rows
    means: list[np.ndarray | None] = [None, None]
    kept = wanted.copy()
    for i, table in enumerate((x_VD, y_VD)):
        least = 0.0
        if centred:
            means[i], least = centre(table if rows is None else table[rows])
        if not zero_rows:
            kept &= with_direction(table, means[i], least)
    left_out = int(wanted.sum() - kept.sum())
    if kept.sum() <= k:
        without = f" ({left_out} more have no direction)" if left_out else ""
        raise UserError(f"knn: {kept.sum()} rows{without}, but {k} neighbours need at least {k + 1}")
    first, second = (
        searches.indices(table, kept, k, mean, report) for table, mean in zip((x_VD, y_VD), means, strict=True)
    )
    return PairedNeighbours(kept, left_out, (first, second))


def shared(first_VK: np.ndarray, second_VK: np.ndarray) -> np.ndarray:
    """How many indices two rows of neighbours have in common, int [V]; a row names none twice."""
    both = np.sort(np.concatenate([first_VK, second_VK], axis=1), axis=1)
    return (both[:, 1:] == both[:, :-1]).sum(axis=1)


def hubness(indices_VK: np.ndarray) -> Hubness:
    """How unevenly rows are named as neighbours."""
    times = np.bincount(indices_VK.ravel(), minlength=len(indices_VK)).astype(np.float64)
    apart = times - times.mean()
    variance = float(np.mean(apart**2))
    return Hubness(
        skewness=float(np.mean(apart**3)) / variance**1.5 if variance else None,
        orphans=float(np.mean(times == 0)),
        largest=int(times.max()),
    )


def _permuted(first_VK: np.ndarray, second_VK: np.ndarray, draws: int) -> np.ndarray:
    """Common neighbours per row with the second table's rows permuted, [draws, V]; no new search is needed."""
    rng = np.random.default_rng(0)
    drawn = np.empty((draws, len(first_VK)), np.int64)
    for i in range(draws):
        order = rng.permutation(len(first_VK))
        place = np.empty_like(first_VK, shape=len(order))
        place[order] = np.arange(len(order))
        drawn[i] = shared(first_VK, place[second_VK[order]])
    return drawn


def _overlap(common_V: np.ndarray, drawn: np.ndarray, k: int, closed: float) -> Score:
    score, floors = float(common_V.mean()) / k, drawn.mean(axis=1) / k
    return beside_draws(score, floors, closed_form=closed, rows=len(common_V))
