"""Leading eigenpairs of a large symmetric matrix that is known by its products, by block Lanczos.

The Krylov space of a block of random vectors grows by a block a product, and every new one is made orthogonal to all:
to the last two as the recurrence has it, then once more to each. When the space is full it is begun again from its
leading Ritz vectors (Wu and Simon 2000, SIAM J. Matrix Anal. Appl. 22). ARPACK multiplies one vector at a time and
reads its whole space for each.

Axes: N rows, M vectors of the space, B vectors of a block, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BLOCK = 4  # vectors of one product: wider ones read the space less often, but need more products in all
# Vectors of the space: the more, the fewer products are needed where eigenvalues lie close, and the dearer is each.
SPACE, SPACE_PER_PAIR = 384, 4
SPACE_BYTES = 1 << 30  # of them, unless the pairs need more
TOLERANCE = 1e-6  # of a pair's residual, in parts of the largest eigenvalue
PRODUCTS, PRODUCTS_PER_PAIR = 6000, 48  # vectors multiplied, at most the larger of the two


class NotConverged(Exception):
    """How many of the pairs reached the tolerance."""

    def __init__(self, converged: int):
        super().__init__(converged)
        self.converged = converged


def leading(
    product: Callable[[np.ndarray], np.ndarray], rows: int, pairs: int, *, space_bytes: int = SPACE_BYTES
) -> tuple[np.ndarray, np.ndarray]:
    """The eigenvalues of largest magnitude, largest first, and their vectors [rows, pairs].

    `product` multiplies a block [rows, B] by the matrix. A pair has converged when the norm of M v - e v is at most
    `TOLERANCE` times the largest |e|. Of more than `BLOCK` equal eigenvalues some may be missed. Fewer than 200 rows,
    or more pairs than a quarter of them, are for a dense solver. NotConverged: after `PRODUCTS` vectors,
    or `PRODUCTS_PER_PAIR` for each pair if these are more.

    >>> value_P, _ = leading(lambda block: np.arange(200.0)[:, None] * block, 200, 3)
    >>> value_P.round(6).tolist()
    [199.0, 198.0, 197.0]
    """
    from scipy.linalg import qr

    most = min(max(SPACE, SPACE_PER_PAIR * pairs), max(space_bytes // (8 * rows), 2 * pairs + 8 * BLOCK))
    most = min(most, rows - BLOCK) // BLOCK * BLOCK
    basis_NM = np.empty((rows, most + BLOCK), order="F")
    projected_MM = np.zeros((most + BLOCK, most + BLOCK))
    basis_NM[:, :BLOCK], _ = qr(np.random.default_rng(0).standard_normal((rows, BLOCK)), mode="economic")
    # The vectors before `known` have their products in the space; those from `near` on are in the next recurrence.
    near, known, look = 0, 0, max(4 * BLOCK, pairs)
    last = max(PRODUCTS, PRODUCTS_PER_PAIR * pairs)
    for multiplied in range(BLOCK, last + BLOCK, BLOCK):
        end = known + BLOCK
        rest_NB = product(basis_NM[:, known:end])
        inside_MB = np.zeros((end, BLOCK))
        for first in (near, 0):
            part_MB = basis_NM[:, first:end].T @ rest_NB
            rest_NB -= basis_NM[:, first:end] @ part_MB
            inside_MB[first:] += part_MB
        projected_MM[:end, known:end], projected_MM[known:end, :end] = inside_MB, inside_MB.T
        next_NB, upper_BB = qr(rest_NB, mode="economic", check_finite=False)
        if np.abs(np.diag(upper_BB)).min() <= 1e-8 * np.abs(inside_MB).max():
            # The matrix leads out of the space in fewer directions than a block has: the others are rounding.
            for _ in range(2):
                next_NB -= basis_NM[:, :end] @ (basis_NM[:, :end].T @ next_NB)
                next_NB, _ = qr(next_NB, mode="economic", check_finite=False)
        basis_NM[:, end : end + BLOCK] = next_NB
        near, known = known, end
        if known < min(look, most) and multiplied < last:
            continue
        value_M, vector_MM = np.linalg.eigh(projected_MM[:known, :known])
        order_M = np.argsort(-np.abs(value_M), kind="stable")
        value_M, vector_MM = value_M[order_M], vector_MM[:, order_M]
        residual_P = np.linalg.norm(upper_BB @ vector_MM[-BLOCK:, :pairs], axis=0)
        converged = int((residual_P <= TOLERANCE * np.abs(value_M[0])).sum())
        if converged == pairs:
            return value_M[:pairs], basis_NM[:, :known] @ vector_MM[:, :pairs]
        look = known + max(4 * BLOCK, known // 8)
        if known == most:
            kept = (pairs + (most - pairs) // 3) // BLOCK * BLOCK
            for top in range(0, rows, 4096):
                part_RM = basis_NM[top : top + 4096]
                part_RM[:, :kept] = part_RM[:, :most] @ vector_MM[:, :kept]
            basis_NM[:, kept : kept + BLOCK] = basis_NM[:, most:]
            projected_MM[:] = 0
            np.fill_diagonal(projected_MM[:kept, :kept], value_M[:kept])
            near, known, look = 0, kept, kept + (most - kept) // 2
    raise NotConverged(converged)
