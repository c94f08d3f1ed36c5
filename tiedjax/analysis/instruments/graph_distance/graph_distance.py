"""Spectral distance: how far apart two tables' neighbour graphs lie once both are embedded in one space.

A and B are the hollow adjacency matrices of every row's k nearest by cosine, made symmetric as (A + A') / 2: two rows
are joined with weight 1 where each is among the other's nearest, and with 1/2 where only one is. That is the form of
arXiv 2603.26663; the corrected form differs from it only in the rows that count. The omnibus matrix
[[A, (A + B) / 2], [(A + B) / 2, B]] has 2V eigenpairs; with U and S the `eigenpairs` largest in magnitude,
Z = U sqrt|S|, whose first V rows embed A, the last V rows B:

    distance = ||Za - Zb|| / min(||Za||, ||Zb||), spectral norms            (arXiv 2305.05126)

0 is the same graph. The floor is the distance with the rows of one table permuted by the successive permutations of
`numpy.random.default_rng(0)`: the same two graphs, but no longer of the same tokens.

Axes: V rows that count, D width of X, E width of Y, K neighbours, N = 2 V, P eigenpairs, B vectors of a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from tiedjax.analysis.basis.blocked import at_once, few_threads, in_turn
from tiedjax.analysis.basis.chance import Score, beside, drawn_floor
from tiedjax.analysis.instruments.graph_distance.eigenpairs import SPACE_PER_PAIR, NotConverged, leading
from tiedjax.analysis.instruments.neighbours.overlap import paired_neighbours
from tiedjax.analysis.instruments.neighbours.search import Report, Searches
from tiedjax.errors import UserError

K = 64
# A quarter of the paper's: the quick study's 25 pairs then take seconds and not minutes, and so does a command.
EIGENPAIRS = 32
PAPER_EIGENPAIRS = 128
DRAWS = 1

Graph = Any  # scipy.sparse.csr_array
Embed = Callable[[Graph, Graph, int], tuple[np.ndarray, np.ndarray]]

_LARGE = 1 << 20  # edges of a graph whose products are worth a thread


@dataclass(frozen=True)
class GraphDistance:
    """The distance of two graphs beside what it is by chance; `relative` is distance / floor: 0 the same, 1 chance.

    `edges` counts the pairs of rows that are joined at all, graph by graph.
    """

    distance: Score
    relative: float | None
    eigenpairs: int
    edges: tuple[int, int]


class Embeddings:
    """Eigenpairs that are remembered: a command's two forms embed the same graphs where no row is left out."""

    def __init__(self) -> None:
        # The neighbours are kept beside the answer: while they live no others can have their ids.
        self._answers: dict[tuple[int, int], tuple[tuple[np.ndarray, np.ndarray], np.ndarray, np.ndarray]] = {}

    def leading(
        self, indices: tuple[np.ndarray, np.ndarray], first: Graph, second: Graph, eigenpairs: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The leading eigenpairs of the omnibus matrix of two graphs, whose neighbours [V, K] are `indices`."""
        key = (id(indices[0]), id(indices[1]))
        if key not in self._answers or len(self._answers[key][1]) < eigenpairs:
            self._answers[key] = indices, *_leading(first, second, eigenpairs)
        _, value_P, vector_NP = self._answers[key]
        return value_P[:eigenpairs], vector_NP[:, :eigenpairs]


def measure(
    x_VD: np.ndarray,
    y_VE: np.ndarray,
    *,
    k: int = K,
    eigenpairs: int = EIGENPAIRS,
    kept_V: np.ndarray | None = None,
    zero_rows: bool = False,
    draws: int = DRAWS,
    searches: Searches | None = None,
    embeddings: Embeddings | None = None,
    report: Report | None = None,
) -> GraphDistance:
    """The spectral distance of two tables of the same rows and any widths.

    `kept_V` is a boolean [V] mask of the rows that count. Rows of zeros are left out too and counted, unless
    `zero_rows`: then their cosine to everything is 0. `searches` remembers neighbours from one call to the next,
    `embeddings` the eigenpairs of the graphs of the same neighbours: of two calls the one with more goes first.
    UserError: shapes that do not fit, k or fewer rows, or fewer rows than eigenpairs.

    >>> table = np.random.default_rng(0).normal(size=(80, 4))
    >>> round(measure(table, table[:, ::-1], k=8, eigenpairs=8).distance.score, 6)
    0.0
    """
    neighbour_pair = paired_neighbours(
        x_VD, y_VE, k, kept_V=kept_V, zero_rows=zero_rows, searches=searches, report=report
    )
    first, second = (graph(indices) for indices in neighbour_pair.indices)
    embed = partial((embeddings or Embeddings()).leading, neighbour_pair.indices)
    graph_distance = compare(first, second, eigenpairs, draws, report, embed=embed)
    return replace(
        graph_distance, distance=replace(graph_distance.distance, rows_left_out=neighbour_pair.rows_left_out)
    )


def graph(indices_VK: np.ndarray) -> Graph:
    """The hollow adjacency matrix of nearest neighbours [V, k], symmetric as (A + A') / 2, csr float64 [V, V]."""
    from scipy.sparse import csr_array

    V, k = indices_VK.shape
    # int32 where it suffices: a product reads an index for each weight.
    ends = np.arange(0, V * k + 1, k, dtype=np.int32 if 2 * V * k < 2**31 else np.int64)
    one_way_VV = csr_array((np.ones(V * k), indices_VK.ravel().astype(ends.dtype), ends), shape=(V, V))
    return ((one_way_VV + one_way_VV.T) / 2).tocsr()


def compare(
    first: Graph,
    second: Graph,
    eigenpairs: int,
    draws: int = 0,
    report: Report | None = None,
    *,
    embed: Embed | None = None,
) -> GraphDistance:
    """The distance of two graphs of the same V nodes, with its floor over `draws` permutations of the second's.

    `embed` finds the eigenpairs of the two. UserError: eigenpairs below 1 or above V, or no convergence.
    """
    V = first.shape[0]
    if not 1 <= eigenpairs <= V:
        raise UserError(f"spectral: {eigenpairs} eigenpairs need at least as many rows, got {V}")
    distance = _distance(*(embed or _leading)(first, second, eigenpairs))
    rng = np.random.default_rng(0)
    chance_distances = []
    for i in range(draws):
        if report:
            report(f"spectral distance: {i + 1} of {draws + 1} embeddings done")
        order = rng.permutation(V)
        chance_distances.append(_distance(*_leading(first, second[order][:, order], eigenpairs)))
    score = beside(distance, drawn_floor(chance_distances), similarity=False, rows=V)
    return GraphDistance(
        distance=score,
        relative=distance / score.floor if score.floor else None,
        eigenpairs=eigenpairs,
        edges=(first.nnz // 2, second.nnz // 2),
    )


def _distance(value_P: np.ndarray, vector_NP: np.ndarray) -> float:
    za_VP, zb_VP = np.split(vector_NP * np.sqrt(np.abs(value_P)), 2)
    return _spectral_norm(za_VP - zb_VP) / min(_spectral_norm(za_VP), _spectral_norm(zb_VP))


def _leading(first: Graph, second: Graph, eigenpairs: int) -> tuple[np.ndarray, np.ndarray]:
    """The omnibus matrix's eigenvalues of largest magnitude and their vectors [2V, eigenpairs]."""
    V = first.shape[0]
    together = at_once if first.nnz > _LARGE else in_turn

    def product(block_NB: np.ndarray) -> np.ndarray:
        # Not one block of both halves: the rows of one stay in a core's cache, those of both do not.
        top_VB, bottom_VB = (np.ascontiguousarray(half_VB) for half_VB in np.split(block_NB, 2))
        (a_top, a_bottom), (b_top, b_bottom) = together(
            lambda: (first @ top_VB, first @ bottom_VB), lambda: (second @ top_VB, second @ bottom_VB)
        )
        return np.concatenate([a_top + (a_bottom + b_bottom) / 2, (a_top + b_top) / 2 + b_bottom])

    if V < 100 or 2 * eigenpairs >= V:  # a Krylov space would be nearly the whole space
        a_VV, b_VV = first.toarray(), second.toarray()
        value_P, vector_NP = np.linalg.eigh(np.block([[a_VV, (a_VV + b_VV) / 2], [(a_VV + b_VV) / 2, b_VV]]))
        largest_P = np.argsort(-np.abs(value_P), kind="stable")[:eigenpairs]
        return value_P[largest_P], vector_NP[:, largest_P]
    try:
        with few_threads(2 * V * SPACE_PER_PAIR * eigenpairs):
            return leading(product, 2 * V, eigenpairs)
    except NotConverged as error:
        raise UserError(
            f"spectral: {error.converged} of {eigenpairs} eigenpairs converged; ask for fewer by --eigenpairs"
        ) from None


def _spectral_norm(matrix_VP: np.ndarray) -> float:
    return math.sqrt(max(0.0, float(np.linalg.eigvalsh(matrix_VP.T @ matrix_VP)[-1])))
