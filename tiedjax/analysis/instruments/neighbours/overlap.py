"""Neighbours: whether two tables place the same tokens near each other, without mapping one onto the other.

The score is the mean over rows i of |N_A(i) & N_B(i)| / k, N(i) the k nearest other rows by cosine (`neighbours`).
By chance it is k / (V - 1): with the rows of one table permuted uniformly at random, N_B(i) is a uniformly random set
of k of the V - 1 other rows. The floor is its mean over such permutations, as they come from
`numpy.random.default_rng(0)`, and has that expectation.

Axes: V rows, N those that count, D width of X, E width of Y, K neighbours, J = 2 K, R row permutations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from tiedjax.analysis.basis.chance import Score, beside, drawn_floor
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
    y_VE: np.ndarray,
    *,
    k: int = K,
    kept_V: np.ndarray | None = None,
    centred: bool = False,
    zero_rows: bool = False,
    draws: int = DRAWS,
    counts: np.ndarray | None = None,
    searches: Searches | None = None,
    report: Report | None = None,
) -> NeighbourOverlap:
    """The overlap of the k nearest neighbours in two tables of the same rows and any widths.

    `kept_V` is a boolean [V] mask of the rows that count, as queries and as candidates. Rows without a direction are
    left out too and counted, unless `zero_rows`: then the cosine of a row of zeros to everything is 0. `counts` [V] or
    [2, V] makes strata by how often training showed a token. `searches` remembers neighbours from one call to the next.
    UserError: shapes that do not fit, k or fewer rows left.

    >>> table = np.random.default_rng(0).normal(size=(50, 4))
    >>> turned = table[:, ::-1]
    >>> measure(table, turned).overlap.score
    1.0
    """
    searches = searches or Searches()
    counting_pair = paired_neighbours(
        x_VD, y_VE, k, kept_V=kept_V, centred=centred, zero_rows=zero_rows, searches=searches, report=report
    )
    all_rows_pair = counting_pair
    if not counting_pair.kept_V.all() or centred:
        all_rows_pair = paired_neighbours(x_VD, y_VE, k, zero_rows=True, searches=searches, report=report)
    counts_2N = None if counts is None else np.asarray(counts)[..., counting_pair.kept_V]
    return _neighbour_overlap(counting_pair, all_rows_pair, draws, {} if counts_2N is None else strata(counts_2N))


def _neighbour_overlap(
    counting_pair: PairedNeighbours, all_rows_pair: PairedNeighbours, draws: int, groups: Mapping[str, np.ndarray]
) -> NeighbourOverlap:
    first_NK, second_NK = counting_pair.indices
    rows, k = first_NK.shape
    common_N = shared(first_NK, second_NK)
    chance_RN = _common_by_chance(first_NK, second_NK, draws)
    closed_form = k / (rows - 1)
    overlap = replace(_overlap(common_N, chance_RN, k, closed_form), rows_left_out=counting_pair.rows_left_out)
    paper_overlap = _overlap(
        shared(*all_rows_pair.indices),
        _common_by_chance(*all_rows_pair.indices, draws),
        k,
        k / (len(all_rows_pair.kept_V) - 1),
    )
    return NeighbourOverlap(
        k=k,
        overlap=overlap,
        paper=replace(paper_overlap, corrected=None),
        interval=bootstrap_mean(common_N / k),
        quantiles={f"{q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(common_N / k, QUANTILES), strict=True)},
        histogram=np.bincount(common_N, minlength=k + 1).tolist(),
        strata={
            name: _overlap(common_N[mask_N], chance_RN[:, mask_N], k, closed_form) for name, mask_N in groups.items()
        },
        hubness=(hubness(first_NK), hubness(second_NK)),
    )


@dataclass(frozen=True)
class PairedNeighbours:
    """`kept_V`: boolean [V], the rows that count; of these each table's neighbours [N, k]."""

    kept_V: np.ndarray
    rows_left_out: int
    indices: tuple[np.ndarray, np.ndarray]


def paired_neighbours(
    x_VD: np.ndarray,
    y_VE: np.ndarray,
    k: int,
    *,
    kept_V: np.ndarray | None = None,
    centred: bool = False,
    zero_rows: bool = False,
    searches: Searches | None = None,
    report: Report | None = None,
) -> PairedNeighbours:
    """Both tables' neighbours over the rows that count; arguments and errors as of `measure`."""
    searches = searches or Searches()
    for name, table_VD in [("first", x_VD), ("second", y_VE)]:
        if table_VD.ndim != 2:
            raise UserError(f"knn: the {name} table must have 2 dimensions [V, D], got {list(table_VD.shape)}")
        if table_VD.shape[1] < 2:
            raise UserError(f"knn: the {name} table has width {table_VD.shape[1]}; directions need at least 2")
    if len(x_VD) != len(y_VE):
        raise UserError(f"knn: the tables must have the same rows, got {len(x_VD)} and {len(y_VE)}")
    if k < 1:
        raise UserError(f"knn: k must be at least 1, got {k}")
    counting_V = np.ones(len(x_VD), bool) if kept_V is None else kept_V
    means: list[np.ndarray | None] = [None, None]
    neighbour_rows_V = counting_V.copy()
    for i, table_VD in enumerate((x_VD, y_VE)):
        least = 0.0
        if centred:
            means[i], least = centre(table_VD if kept_V is None else table_VD[kept_V])
        if not zero_rows:
            neighbour_rows_V &= with_direction(table_VD, means[i], least)
    left_out = int(counting_V.sum() - neighbour_rows_V.sum())
    if neighbour_rows_V.sum() <= k:
        without = f" ({left_out} more have no direction)" if left_out else ""
        raise UserError(f"knn: {neighbour_rows_V.sum()} rows{without}, but {k} neighbours need at least {k + 1}")
    first, second = (
        searches.indices(table_VD, neighbour_rows_V, k, mean, report)
        for table_VD, mean in zip((x_VD, y_VE), means, strict=True)
    )
    return PairedNeighbours(neighbour_rows_V, left_out, (first, second))


def shared(first_VK: np.ndarray, second_VK: np.ndarray) -> np.ndarray:
    """How many indices two rows of neighbours have in common, int [V]; a row names none twice."""
    sorted_VJ = np.sort(np.concatenate([first_VK, second_VK], axis=1), axis=1)
    return (sorted_VJ[:, 1:] == sorted_VJ[:, :-1]).sum(axis=1)


def hubness(indices_VK: np.ndarray) -> Hubness:
    """How unevenly rows are named as neighbours."""
    times_V = np.bincount(indices_VK.ravel(), minlength=len(indices_VK)).astype(np.float64)
    deviation_V = times_V - times_V.mean()
    variance = float(np.mean(deviation_V**2))
    return Hubness(
        skewness=float(np.mean(deviation_V**3)) / variance**1.5 if variance else None,
        orphans=float(np.mean(times_V == 0)),
        largest=int(times_V.max()),
    )


def _common_by_chance(first_NK: np.ndarray, second_NK: np.ndarray, draws: int) -> np.ndarray:
    """Common neighbours per row with the second table's rows permuted, [draws, V]; no new search is needed."""
    rng = np.random.default_rng(0)
    chance_RN = np.empty((draws, len(first_NK)), np.int64)
    for i in range(draws):
        order_N = rng.permutation(len(first_NK))
        place_N = np.empty_like(first_NK, shape=len(order_N))
        place_N[order_N] = np.arange(len(order_N))
        chance_RN[i] = shared(first_NK, place_N[second_NK[order_N]])
    return chance_RN


def _overlap(common_N: np.ndarray, chance_RN: np.ndarray, k: int, closed_form: float) -> Score:
    score, floor_R = float(common_N.mean()) / k, chance_RN.mean(axis=1) / k
    return beside(score, drawn_floor(floor_R, closed_form), rows=len(common_N))
