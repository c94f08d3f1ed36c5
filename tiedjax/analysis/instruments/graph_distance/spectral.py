"""Spectral distance: how far apart two tables' neighbour graphs lie once both are embedded in one space.

A and B are the hollow adjacency matrices of every row's k nearest by cosine, made symmetric as (A + A') / 2: two rows
are joined with weight 1 where each is among the other's nearest, and with 1/2 where only one is. That is the form of
arXiv 2603.26663; the corrected form differs from it only in the rows that count. The omnibus matrix
[[A, (A + B) / 2], [(A + B) / 2, B]] has 2V eigenpairs; with U and S the `eigenpairs` largest in magnitude,
Z = U sqrt|S|, whose first V rows embed A, the last V rows B:

    distance = ||Za - Zb|| / min(||Za||, ||Zb||), spectral norms            (arXiv 2305.05126)

0 is the same graph. The floor is the distance with the rows of one table permuted by the successive permutations of
`numpy.random.default_rng(0)`: the same two graphs, but no longer of the same tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiedjax.analysis.instruments.neighbours.knn import both_neighbours
from tiedjax.analysis.instruments.neighbours.search import Report
from tiedjax.errors import UserError

K = 64
EIGENPAIRS = 128
DRAWS = 2

Graph = Any  # scipy.sparse.csr_array


@dataclass(frozen=True)
class Spectral:
    """The distance of two graphs beside what it is by chance; `relative` is distance / floor: 0 the same, 1 chance.

    `edges` counts the pairs of rows that are joined at all, graph by graph.
    """

    distance: float
    floor: float | None
    floor_standard_error: float | None
    floor_draws: int
    relative: float | None
    rows: int
    eigenpairs: int
    edges: tuple[int, int]


def spectral(
    x_VD: np.ndarray,
    y_VD: np.ndarray,
    *,
    k: int = K,
    eigenpairs: int = EIGENPAIRS,
    rows: np.ndarray | None = None,
    zero_rows: bool = False,
    draws: int = DRAWS,
    report: Report | None = None,
) -> tuple[Spectral, int]:
    """The spectral distance of two tables of the same rows and any widths, and how many rows were left out.

    `rows` is a boolean [V] mask of the rows that count. Rows of zeros are left out too, unless `zero_rows`: then their
    cosine to everything is 0. UserError: shapes that do not fit, k or fewer rows, or fewer rows than eigenpairs.
    """
    found = both_neighbours(x_VD, y_VD, k, rows=rows, zero_rows=zero_rows, report=report)
    first, second = (graph(indices) for indices in found.indices)
    return compare(first, second, eigenpairs, draws, report), found.rows_left_out


def graph(indices_VK: np.ndarray) -> Graph:
    """The hollow adjacency matrix of nearest neighbours [V, k], symmetric as (A + A') / 2, csr float64 [V, V]."""
    from scipy.sparse import csr_array

    V, k = indices_VK.shape
    one_way = csr_array((np.ones(V * k), indices_VK.ravel(), np.arange(0, V * k + 1, k)), shape=(V, V))
    return ((one_way + one_way.T) / 2).tocsr()


def compare(first: Graph, second: Graph, eigenpairs: int, draws: int = 0, report: Report | None = None) -> Spectral:
    """The distance of two graphs of the same V nodes, with its floor over `draws` permutations of the second's.

    UserError: eigenpairs below 1 or above V, or no convergence.
    """
    V = first.shape[0]
    if not 1 <= eigenpairs <= V:
        raise UserError(f"spectral: {eigenpairs} eigenpairs need at least as many rows, got {V}")
    distance = _distance(first, second, eigenpairs)
    rng = np.random.default_rng(0)
    floors = []
    for i in range(draws):
        if report:
            report(f"spectral distance: {i + 1} of {draws + 1} embeddings done")
        order = rng.permutation(V)
        floors.append(_distance(first, second[order][:, order], eigenpairs))
    floor = float(np.mean(floors)) if floors else None
    return Spectral(
        distance=distance,
        floor=floor,
        floor_standard_error=float(np.std(floors, ddof=1)) / math.sqrt(draws) if draws > 1 else None,
        floor_draws=draws,
        relative=distance / floor if floor else None,
        rows=V,
        eigenpairs=eigenpairs,
        edges=(first.nnz // 2, second.nnz // 2),
    )


def _distance(first: Graph, second: Graph, eigenpairs: int) -> float:
    values, vectors_ND = _leading(first, second, eigenpairs)
    vectors_ND *= np.sqrt(np.abs(values))
    za, zb = np.split(vectors_ND, 2)
    return _spectral_norm(za - zb) / min(_spectral_norm(za), _spectral_norm(zb))


def _leading(first: Graph, second: Graph, eigenpairs: int) -> tuple[np.ndarray, np.ndarray]:
    """The omnibus matrix's eigenvalues of largest magnitude and their vectors [2V, eigenpairs]."""
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    V = first.shape[0]

    def product(vector: np.ndarray) -> np.ndarray:
        top, bottom = vector.reshape(2, V)
        a_top, a_bottom, b_top, b_bottom = first @ top, first @ bottom, second @ top, second @ bottom
        return np.concatenate([a_top + (a_bottom + b_bottom) / 2, (a_top + b_top) / 2 + b_bottom])

    if 2 * eigenpairs >= V:  # a Krylov space would be nearly the whole space
        a, b = first.toarray(), second.toarray()
        values, vectors = np.linalg.eigh(np.block([[a, (a + b) / 2], [(a + b) / 2, b]]))
        largest = np.argsort(-np.abs(values), kind="stable")[:eigenpairs]
        return values[largest], vectors[:, largest]
    omnibus = LinearOperator((2 * V, 2 * V), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(2 * V)
    try:
        # A Krylov space of 3/2 the pairs instead of ARPACK's 2: as many products, less orthogonalisation.
        space = min(2 * V, max(3 * eigenpairs // 2, eigenpairs + 20))
        values, vectors = eigsh(omnibus, eigenpairs, which="LM", v0=start, ncv=space, tol=1e-8)
    except ArpackNoConvergence as error:
        raise UserError(
            f"spectral: {len(error.eigenvalues)} of {eigenpairs} eigenpairs converged; ask for fewer by --eigenpairs"
        ) from None
    return values, vectors


def _spectral_norm(matrix_VD: np.ndarray) -> float:
    return math.sqrt(max(0.0, float(np.linalg.eigvalsh(matrix_VD.T @ matrix_VD)[-1])))
