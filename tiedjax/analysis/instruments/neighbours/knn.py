"""Neighbours: whether two tables place the same tokens near each other, without mapping one onto the other.

The score is the mean over rows i of |N_A(i) & N_B(i)| / k, N(i) the k nearest other rows by cosine (`neighbours`).
By chance it is k / (V - 1): with the rows of one table permuted uniformly at random, N_B(i) is a uniformly random set
of k of the V - 1 other rows. The floor is its mean over such permutations, as they come from
`numpy.random.default_rng(0)`, and has that expectation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tiedjax.analysis.basis.blocked import column_means, row_blocks
from tiedjax.analysis.basis.chance import correct
from tiedjax.analysis.basis.statistics import Interval, bootstrap_mean
from tiedjax.analysis.basis.strata import strata
from tiedjax.analysis.instruments.neighbours.search import Report, neighbours
from tiedjax.errors import UserError

K = 10
DRAWS = 10
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
_EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Overlap:
    """Mean share of common neighbours over `rows` rows beside its floor; corrected is None where chance reaches 1."""

    score: float
    floor: float
    floor_standard_error: float | None
    floor_draws: int
    floor_closed_form: float
    corrected: float | None
    rows: int


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
class Knn:
    """The overlap of two tables' neighbours: mean, spread over rows, by stratum; and each table's hubness.

    `histogram[n]` is the number of rows with n common neighbours; `interval` is of the score over rows.
    """

    k: int
    overlap: Overlap
    interval: Interval
    quantiles: dict[str, float]
    histogram: list[int]
    strata: dict[str, Overlap]
    hubness: tuple[Hubness, Hubness]


def knn(
    x_VD: np.ndarray,
    y_VD: np.ndarray,
    *,
    k: int = K,
    rows: np.ndarray | None = None,
    centre: bool = False,
    zero_rows: bool = False,
    draws: int = DRAWS,
    counts: np.ndarray | None = None,
    report: Report | None = None,
) -> tuple[Knn, int]:
    """The overlap of the k nearest neighbours in two tables of the same rows and any widths; rows left out of it.

    `rows` is a boolean [V] mask of the rows that count, as queries and as candidates. Rows of zeros (once centred, if
    `centre`) are left out too and counted, unless `zero_rows`: then their cosine to everything is 0. `counts` [V] or
    [2, V] makes strata by how often training showed a token. UserError: shapes that do not fit, k or fewer rows left.
    """
    found = both_neighbours(x_VD, y_VD, k, rows=rows, centre=centre, zero_rows=zero_rows, report=report)
    kept_counts = None if counts is None else np.asarray(counts)[..., found.kept]
    return compare(*found.indices, draws=draws, counts=kept_counts), found.rows_left_out


def compare(
    first_VK: np.ndarray, second_VK: np.ndarray, *, draws: int = DRAWS, counts: np.ndarray | None = None
) -> Knn:
    """The overlap of two tables' neighbours, as `neighbours` finds them; `counts` of their rows as of `knn`."""
    V, k = first_VK.shape
    common_V = shared(first_VK, second_VK)
    drawn = _permuted(first_VK, second_VK, draws)
    groups = {} if counts is None else strata(counts)
    closed = k / (V - 1)
    return Knn(
        k=k,
        overlap=_overlap(common_V, drawn, k, closed),
        interval=bootstrap_mean(common_V / k),
        quantiles={f"{q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(common_V / k, QUANTILES), strict=True)},
        histogram=np.bincount(common_V, minlength=k + 1).tolist(),
        strata={name: _overlap(common_V[mask], drawn[:, mask], k, closed) for name, mask in groups.items()},
        hubness=(hubness(first_VK), hubness(second_VK)),
    )


@dataclass(frozen=True)
class BothNeighbours:
    """`kept`: boolean [V], the rows that count; of these each table's neighbours [N, k]."""

    kept: np.ndarray
    rows_left_out: int
    indices: tuple[np.ndarray, np.ndarray]


def both_neighbours(
    x_VD: np.ndarray,
    y_VD: np.ndarray,
    k: int,
    *,
    rows: np.ndarray | None = None,
    centre: bool = False,
    zero_rows: bool = False,
    report: Report | None = None,
) -> BothNeighbours:
    """Both tables' neighbours over the rows that count; arguments and errors as of `knn`."""
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
    means = [column_means(t if rows is None else t[rows]) if centre else None for t in (x_VD, y_VD)]
    kept = wanted.copy()
    if not zero_rows:
        for table, mean in zip((x_VD, y_VD), means, strict=True):
            kept &= rows_with_direction(table, mean)
    left_out = int(wanted.sum() - kept.sum())
    if kept.sum() <= k:
        without = f" ({left_out} more have no direction)" if left_out else ""
        raise UserError(f"knn: {kept.sum()} rows{without}, but {k} neighbours need at least {k + 1}")
    indices = [
        neighbours(_prepared(table, kept, mean), k, report=report).indices_VK
        for table, mean in zip((x_VD, y_VD), means, strict=True)
    ]
    return BothNeighbours(kept, left_out, (indices[0], indices[1]))


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


def rows_with_direction(table_VD: np.ndarray, mean: np.ndarray | None = None) -> np.ndarray:
    """Boolean [V]: rows that differ from 0, or from the mean row by more than float32 rounds."""
    if mean is None:
        return np.asarray(table_VD.any(axis=1))
    found = np.empty(len(table_VD), bool)
    size = np.linalg.norm(mean)
    for block in row_blocks(len(table_VD), table_VD.shape[1], itemsize=8):
        found[block] = np.linalg.norm(np.asarray(table_VD[block], np.float64) - mean, axis=1) > _EPS * size
    return found


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


def _overlap(common_V: np.ndarray, drawn: np.ndarray, k: int, closed: float) -> Overlap:
    score, floors = float(common_V.mean()) / k, drawn.mean(axis=1) / k
    floor = float(floors.mean())
    error = float(floors.std(ddof=1)) / math.sqrt(len(floors)) if len(floors) > 1 else None
    return Overlap(score, floor, error, len(floors), closed, correct(score, floor), len(common_V))


def _prepared(table_VD: np.ndarray, kept: np.ndarray, mean: np.ndarray | None) -> np.ndarray:
    """The rows that count, centred if there is a mean; not copied if that changes nothing."""
    if kept.all() and mean is None:
        return table_VD
    values = table_VD[kept]
    if mean is not None:
        for block in row_blocks(len(values), values.shape[1], itemsize=8):
            values[block] = values[block] - mean
    return values
