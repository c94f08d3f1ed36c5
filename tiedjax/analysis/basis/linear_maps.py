"""The linear maps of alignment, from products of two tables alone.

Axes: D width of the table that is mapped, E width of its target, P penalties.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg

# Up to this width a singular value decomposition takes no time; at 2,048 it takes ten times as long as the iteration.
_DECOMPOSED_WIDTH = 512
_SMALLEST_SINGULAR_VALUE = 1e-5  # assumed, relative to the largest; smaller ones only take more iterations
_ITERATIONS = 15
RIDGE_GRID = np.logspace(-6, 2, 33)


def nearest_orthogonal(product_DD: np.ndarray) -> np.ndarray:
    """The orthogonal T that maximises trace(T' M): the orthogonal polar factor of M, float64.

    Schoenemann 1966. Where singular values vanish T is not unique; then it is the one of NumPy's decomposition.
    """
    if len(product_DD) > _DECOMPOSED_WIDTH and (polar_DD := _polar_iteration(product_DD)) is not None:
        return polar_DD
    u_DD, _, vt_DD = np.linalg.svd(product_DD)
    orthogonal_DD: np.ndarray = u_DD @ vt_DD
    return orthogonal_DD


def _polar_iteration(product_DD: np.ndarray) -> np.ndarray | None:
    """QDWH by Cholesky factors (Nakatsukasa, Bai, Gygi 2010); None when it does not converge to an orthogonal matrix.

    The badly conditioned first steps are done in float64, the rest in float32: errors do not accumulate.
    """
    size = len(product_DD)
    bound = _largest_singular_value(product_DD)
    if not bound > 0:
        return None
    x_DD, low = np.asfortranarray(product_DD / bound), _SMALLEST_SINGULAR_VALUE
    for _ in range(_ITERATIONS):
        square = low * low
        root = math.sqrt(1 + (4 * (1 - square) / square**2) ** (1 / 3))
        a = root + 0.5 * math.sqrt(8 - 4 * (root**2 - 1) + 8 * (2 - square) / (square * root))
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        x_DD = x_DD.astype(np.float64 if c > 100 else np.float32, order="F", copy=False)
        potrf, trsm = scipy.linalg.get_lapack_funcs("potrf", (x_DD,)), scipy.linalg.get_blas_funcs("trsm", (x_DD,))
        factor, failed = potrf(_gram_plus(c, x_DD, 1), lower=True, overwrite_a=True, clean=False)
        if failed:
            return None
        next_DD = trsm(a - b / c, factor, x_DD, side=1, lower=1, trans_a=1)
        next_DD = trsm(1.0, factor, next_DD, side=1, lower=1, overwrite_b=1)
        next_DD += x_DD.dtype.type(b / c) * x_DD
        x_DD -= next_DD
        change = np.linalg.norm(x_DD) / math.sqrt(size)
        x_DD, low = next_DD, min(1.0, low * (a + b * square) / (1 + c * square))
        if change < 1e-3 and low > 0.999:  # the error is the cube of the last change
            skew_DD = np.tril(_gram_plus(1.0, x_DD, -1))
            return x_DD.astype(np.float64, order="C") if np.linalg.norm(skew_DD) < 1e-3 else None
    return None


def _gram_plus(factor: float, x_DD: np.ndarray, diagonal: float) -> np.ndarray:
    """The lower triangle of factor x'x + diagonal I; `x_DD` in Fortran order."""
    (syrk,) = scipy.linalg.get_blas_funcs(("syrk",), (x_DD,))
    gram_DD: np.ndarray = syrk(factor, x_DD, trans=1, lower=1)
    gram_DD.flat[:: len(gram_DD) + 1] += diagonal
    return gram_DD


def _largest_singular_value(product_DD: np.ndarray) -> float:
    """An upper bound a little above it: power iteration, or the Frobenius norm where that is less."""
    vector_D: Any = np.random.default_rng(0).standard_normal(product_DD.shape[1])
    value = 0.0
    for _ in range(12):
        vector_D = product_DD.T @ (product_DD @ vector_D)
        value = float(np.linalg.norm(vector_D))
        if value == 0:
            break
        vector_D /= value
    return min(float(np.linalg.norm(product_DD)), 1.2 * math.sqrt(value))


def well_conditioned(gram_DD: np.ndarray, limit: float) -> Callable[[np.ndarray], np.ndarray] | None:
    """M -> G^(-1) M by a Cholesky factor of G, or None where G's reciprocal condition is below `limit`."""
    norm = float(np.abs(gram_DD).sum(axis=0).max(initial=0.0))
    try:
        factor = scipy.linalg.cho_factor(gram_DD, lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        return None
    (condition,) = scipy.linalg.get_lapack_funcs(("pocon",), (factor[0],))
    if condition(factor[0], norm, uplo="L")[0] < limit:
        return None
    return lambda product: scipy.linalg.cho_solve(factor, product, check_finite=False)


def from_triangle(r_DD: np.ndarray, rows: int) -> Callable[[np.ndarray], np.ndarray]:
    """M -> the least-norm solution of R'R T = M, with the cut of `numpy.linalg.lstsq`."""
    _, s_D, vt_DD = scipy.linalg.svd(r_DD, full_matrices=False)
    cut = np.finfo(np.float64).eps * max(rows, len(s_D)) * s_D.max(initial=0.0)
    kept_D = s_D > cut
    inverse_D = np.divide(1.0, s_D, out=np.zeros_like(s_D), where=kept_D)
    return lambda product: vt_DD.T @ (np.square(inverse_D)[:, None] * (vt_DD @ product))


class Ridge:
    """Ridge regression from one Gram matrix G to any number of targets, the penalty chosen for each."""

    def __init__(self, gram_DD: np.ndarray, rows: int):
        values_D, self._vectors = np.linalg.eigh(gram_DD)
        self._values, self._rows = np.maximum(values_D, 0.0), rows
        self._penalties = RIDGE_GRID * (float(self._values.mean()) or 1.0)

    def solve(self, product_DE: np.ndarray, target_square: float) -> tuple[np.ndarray, float]:
        """(G + penalty I)^(-1) M, and the penalty of least ||Y - X T||^2 / (V - trace H)^2; `target_square` is ||Y||^2.

        Generalised cross-validation (Golub, Heath, Wahba 1979) over RIDGE_GRID times the mean eigenvalue of G.
        """
        rotated_DE = self._vectors.T @ product_DE
        energy_D = np.square(rotated_DE).sum(axis=1)
        weights_PD = 1 / (self._values + self._penalties[:, None])
        residual_P = target_square - (2 * weights_PD - self._values * weights_PD**2) @ energy_D
        freedom_P = self._rows - (self._values * weights_PD).sum(axis=1)
        best = int(np.argmin(np.maximum(residual_P, 0.0) / np.maximum(freedom_P, 1e-9) ** 2))
        return self._vectors @ (rotated_DE * weights_PD[best][:, None]), float(self._penalties[best])
