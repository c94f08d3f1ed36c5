"""Projection: a picture of a table in the plane, and how far it can be trusted; the nearest rows of single tokens.

The picture is the projection onto the first two principal components, or openTSNE's layout. Its trustworthiness (Venna
and Kaski 2001, ICANN) asks whether rows that are neighbours in the picture are neighbours in the table.

Axes: V rows, D width, C components, Q rows asked for their neighbours, K neighbours, B rows of a block; N rows that
count, in `nearest` tokens that are asked for.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tiedjax.analysis.basis.blocked import column_means, gram, row_blocks
from tiedjax.analysis.basis.chance import Score, beside, exact_floor
from tiedjax.analysis.basis.directions import centre, unit_rows, with_direction
from tiedjax.analysis.basis.tables import check
from tiedjax.errors import UserError

METHODS = ("pca", "tsne")
NEAR = 10
NEIGHBOURS = 5  # nearest rows of each token that is asked for
EXACT_ROWS = 4096  # up to which every row is asked for its neighbours
SAMPLED_ROWS = 500
_COMPONENTS = 50  # of which openTSNE is given the rows, as is usual (Kobak and Berens 2019, Nature Communications 10)
_PERPLEXITY = 30.0
_BYTES = 2**28  # of one matrix of distances


@dataclass(frozen=True)
class Projection:
    """A point [x, y] for each of the `rows`, the share of the variance on each axis (None for tsne), and its trust."""

    method: str
    rows: int
    width: int
    coordinates: list[list[float]]
    explained: list[float] | None
    near: int
    trust: Score | None


@dataclass(frozen=True)
class Nearest:
    """The rows nearest to one token's by cosine, nearest first."""

    token: int
    neighbours: list[int]
    cosines: list[float]


@dataclass(frozen=True)
class Picture:
    """A table's projection, and the nearest rows of the tokens that were asked for."""

    projection: Projection
    nearest: list[Nearest]


def measure(
    table_VD: np.ndarray,
    tokens: Sequence[int] = (),
    *,
    kept_V: np.ndarray | None = None,
    neighbours: int = NEIGHBOURS,
    method: str = "pca",
    report: Callable[[str], None] = lambda line: None,
) -> Picture:
    """The projection of the rows that count, boolean [V] (default: all), and the nearest of these to each of `tokens`.

    UserError as of `project` and `nearest`.

    >>> table = np.array([[2.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [-2.0, -0.1]])
    >>> measure(table, [0], neighbours=1).nearest[0].neighbours
    [1]
    """
    table_ND = table_VD if kept_V is None else table_VD[kept_V]
    return Picture(project(table_ND, method, report=report), nearest(table_VD, list(tokens), neighbours, kept_V))


def project(
    table_VD: np.ndarray, method: str = "pca", *, report: Callable[[str], None] = lambda line: None
) -> Projection:
    """The projection of all rows, without trust where there are fewer than 5 rows.

    UserError: not [V, D] with D of at least 2, fewer than 3 rows, rows all equal, an unknown method, tsne without
    openTSNE.
    """
    if method not in METHODS:
        raise UserError(f"map: no method is named {method!r}; the methods are {', '.join(METHODS)}")
    if table_VD.ndim != 2 or table_VD.shape[1] < 2 or len(table_VD) < 3:
        raise UserError(
            f"map: a table must be [V, D] with V of at least 3 and D of at least 2, got {list(table_VD.shape)}"
        )
    check(table_VD, "map")
    report("principal components")
    if method == "tsne":
        points_V2, explained = _tsne(table_VD, report), None
    else:
        points_V2, explained = principal(table_VD, 2)
    report("trustworthiness")
    k = min(NEAR, (len(table_VD) - 1) // 2 - 1)
    return Projection(
        method=method,
        rows=len(table_VD),
        width=table_VD.shape[1],
        coordinates=points_V2.tolist(),
        explained=None if explained is None else explained.tolist(),
        near=k,
        trust=trustworthiness(table_VD, points_V2, k=k) if k else None,
    )


def principal(table_VD: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates on the first principal components, float64 [V, components], and their shares of the variance.

    Of the two directions of a component, the one is taken whose largest loading is positive. UserError where all rows
    are equal.
    """
    mean_D, least = centre(table_VD)
    gram_DD = gram(table_VD, mean_D)
    value_D, vector_DD = np.linalg.eigh(gram_DD)
    total = float(np.trace(gram_DD))
    if total <= len(table_VD) * least**2:
        raise UserError("map: the rows of the table are all equal; there is nothing to see")
    loadings_DC = vector_DD[:, ::-1][:, :components]
    largest_C = np.abs(loadings_DC).argmax(axis=0)
    loadings_DC = loadings_DC * np.sign(loadings_DC[largest_C, np.arange(loadings_DC.shape[1])])
    points_VC = np.empty((len(table_VD), loadings_DC.shape[1]))
    for block in row_blocks(len(table_VD), table_VD.shape[1], itemsize=8):
        points_VC[block] = (np.asarray(table_VD[block], np.float64) - mean_D) @ loadings_DC
    return points_VC, np.maximum(value_D[::-1][:components], 0) / total


def trustworthiness(table_VD: np.ndarray, points_V2: np.ndarray, *, k: int = NEAR) -> Score:
    """1 - 2 / (Q k (2V - 3k - 1)) * sum over Q rows and their k nearest in the picture of max(0, rank - k), the rank
    being that neighbour's in the table; Euclidean distances.

    Up to EXACT_ROWS rows Q is V; of more, SAMPLED_ROWS drawn by `numpy.random.default_rng(0)` are asked. UserError for
    k not from 1 to below V / 2.
    """
    V = len(table_VD)
    if not 1 <= k < V / 2:
        raise UserError(f"map: trustworthiness needs k from 1 to below {V / 2:g}, half the rows, got {k}")
    queries = np.arange(V)
    if V > EXACT_ROWS:
        queries = np.sort(np.random.default_rng(0).choice(V, SAMPLED_ROWS, replace=False))
    mean_D = column_means(table_VD)
    excess = 0
    for block in row_blocks(len(queries), V, itemsize=8, block_bytes=_BYTES):
        query_Q = queries[block]
        near_QK = np.argpartition(_distances(points_V2, np.zeros(2), query_Q), k - 1, axis=1)[:, :k]
        distance_QV = _distances(table_VD, mean_D, query_Q)
        for distance_V, near_K in zip(distance_QV, near_QK, strict=True):
            # How many others are closer than each neighbour.
            closer_K = np.searchsorted(np.sort(distance_V), distance_V[near_K])
            excess += int(np.maximum(closer_K + 1 - k, 0).sum())
    scale = 2 / (len(queries) * k * (2 * V - 3 * k - 1))
    score = 1 - scale * excess
    # By chance a neighbour's rank is uniform on 1 .. V - 1.
    surplus = np.arange(V - 1 - k, dtype=np.float64) + 1
    mean, square = surplus.sum() / (V - 1), np.square(surplus).sum() / (V - 1)
    floor = 1 - 2 / (2 * V - 3 * k - 1) * float(mean)
    deviation = scale * math.sqrt(len(queries) * k * float(square - mean**2))
    return beside(score, exact_floor(floor, deviation), rows=len(queries))


def nearest(table_VD: np.ndarray, tokens: list[int], k: int, kept_V: np.ndarray | None = None) -> list[Nearest]:
    """The k nearest other rows of single tokens by cosine, among `kept_V` (boolean [V]; default all).

    Rows of zeros are nobody's neighbours; a token whose own row is zero has none. Equal cosines come in order of ids.
    UserError for a token outside the table.
    """
    outside = [t for t in tokens if not 0 <= t < len(table_VD)]
    if outside:
        raise UserError(f"map: there is no token {outside[0]}; the table has {len(table_VD)} rows")
    unit_ND = _unit(table_VD[tokens])
    cosines_NV = np.empty((len(tokens), len(table_VD)))
    for block in row_blocks(len(table_VD), table_VD.shape[1], itemsize=8):
        cosines_NV[:, block] = unit_ND @ _unit(table_VD[block]).T
    cosines_NV[np.arange(len(tokens)), tokens] = np.nan
    if kept_V is not None:
        cosines_NV[:, ~kept_V] = np.nan
    nearest_rows = []
    for token, cosine_V in zip(tokens, cosines_NV, strict=True):
        order_K = np.argsort(-cosine_V, kind="stable")[:k]  # NaN last
        order_K = order_K[np.isfinite(cosine_V[order_K])]
        nearest_rows.append(Nearest(token, order_K.tolist(), np.clip(cosine_V[order_K], -1, 1).tolist()))
    return nearest_rows


def _unit(rows_ND: np.ndarray) -> np.ndarray:
    """Rows of length 1, float64; NaN for rows of zeros."""
    unit_ND = unit_rows(rows_ND)
    unit_ND[~with_direction(rows_ND)] = np.nan
    return unit_ND


def _distances(table_VD: np.ndarray, mean_D: np.ndarray, query_Q: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances [Q, V] of the asked rows to all, their own infinite."""
    query_QD = np.asarray(table_VD[query_Q], np.float64) - mean_D
    distance_QV = np.empty((len(query_Q), len(table_VD)))
    for block in row_blocks(len(table_VD), table_VD.shape[1], itemsize=8):
        rows_BD = np.asarray(table_VD[block], np.float64) - mean_D
        distance_QV[:, block] = np.square(rows_BD).sum(axis=1) - 2 * (query_QD @ rows_BD.T)
    distance_QV += np.square(query_QD).sum(axis=1, keepdims=True)
    distance_QV[np.arange(len(query_Q)), query_Q] = np.inf
    return distance_QV


def _tsne(table_VD: np.ndarray, report: Callable[[str], None]) -> np.ndarray:
    """openTSNE's layout of the leading principal components, begun from the first two; the same every time."""
    if importlib.util.find_spec("openTSNE") is None:
        raise UserError('map: tsne needs openTSNE, which is not installed: pip install "tiedjax[tsne]"')
    from openTSNE import TSNE

    points, _ = principal(table_VD, min(_COMPONENTS, table_VD.shape[1]))
    report("openTSNE")
    layout = TSNE(perplexity=min(_PERPLEXITY, (len(points) - 1) / 3), initialization="pca", random_state=0)
    return np.asarray(layout.fit(points), np.float64)
