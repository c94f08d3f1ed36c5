"""The linear maps of alignment, from [D, D] products alone."""

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

    Schoenemann 1966. Where singular values vanish T is not unique; then it is the one of SciPy's decomposition.
    """
    if len(product_DD) > _DECOMPOSED_WIDTH and (found := _polar_iteration(product_DD)) is not None:
        return found
    u, _, vt = scipy.linalg.svd(product_DD)
    orthogonal_DD: np.ndarray = u @ vt
    return orthogonal_DD


def _polar_iteration(product_DD: np.ndarray) -> np.ndarray | None:
    """QDWH by Cholesky factors (Nakatsukasa, Bai, Gygi 2010); None when it does not converge to an orthogonal matrix.

    The badly conditioned first steps are done in float64, the rest in float32: errors do not accumulate.
    """
    size = len(product_DD)
    bound = _largest_singular_value(product_DD)
    if not bound > 0:
        return None
    x, low = np.asfortranarray(product_DD / bound), _SMALLEST_SINGULAR_VALUE
    for _ in range(_ITERATIONS):
        square = low * low
        root = math.sqrt(1 + (4 * (1 - square) / square**2) ** (1 / 3))
        a = root + 0.5 * math.sqrt(8 - 4 * (root**2 - 1) + 8 * (2 - square) / (square * root))
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        x = x.astype(np.float64 if c > 100 else np.float32, order="F", copy=False)
        potrf, trsm = scipy.linalg.get_lapack_funcs("potrf", (x,)), scipy.linalg.get_blas_funcs("trsm", (x,))
        factor, failed = potrf(_gram_plus(c, x, 1), lower=True, overwrite_a=True, clean=False)
        if failed:
            return None
        following = trsm(a - b / c, factor, x, side=1, lower=1, trans_a=1)
        following = trsm(1.0, factor, following, side=1, lower=1, overwrite_b=1)
        following += x.dtype.type(b / c) * x
        x -= following
        change = np.linalg.norm(x) / math.sqrt(size)
        x, low = following, min(1.0, low * (a + b * square) / (1 + c * square))
        if change < 1e-3 and low > 0.999:  # the error is the cube of the last change
            skew = np.tril(_gram_plus(1.0, x, -1))
            return x.astype(np.float64, order="C") if np.linalg.norm(skew) < 1e-3 else None
    return None


def _gram_plus(factor: float, x: np.ndarray, diagonal: float) -> np.ndarray:
    """The lower triangle of factor x'x + diagonal I; `x` in Fortran order."""
    (syrk,) = scipy.linalg.get_blas_funcs(("syrk",), (x,))
    z: np.ndarray = syrk(factor, x, trans=1, lower=1)
    z.flat[:: len(z) + 1] += diagonal
    return z


def _largest_singular_value(product_DD: np.ndarray) -> float:
    """An upper bound a little above it: power iteration, or the Frobenius norm where that is less."""
    vector: Any = np.random.default_rng(0).standard_normal(product_DD.shape[1])
    value = 0.0
    for _ in range(12):
        vector = product_DD.T @ (product_DD @ vector)
        value = float(np.linalg.norm(vector))
        if value == 0:
            break
        vector /= value
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
    _, values, vt = scipy.linalg.svd(r_DD, full_matrices=False)
    cut = np.finfo(np.float64).eps * max(rows, len(values)) * values.max(initial=0.0)
    kept = values > cut
    inverse = np.divide(1.0, values, out=np.zeros_like(values), where=kept)
    return lambda product: vt.T @ (np.square(inverse)[:, None] * (vt @ product))


class Ridge:
    """Ridge regression from one Gram matrix G to any number of targets, the penalty chosen for each."""

    def __init__(self, gram_DD: np.ndarray, rows: int):
        values, self._vectors = np.linalg.eigh(gram_DD)
        self._values, self._rows = np.maximum(values, 0.0), rows
        self._penalties = RIDGE_GRID * (float(self._values.mean()) or 1.0)

    def solve(self, product_DD: np.ndarray, target_square: float) -> tuple[np.ndarray, float]:
        """(G + penalty I)^(-1) M, and the penalty of least ||Y - X T||^2 / (V - trace H)^2; `target_square` is ||Y||^2.

        Generalised cross-validation (Golub, Heath, Wahba 1979) over RIDGE_GRID times the mean eigenvalue of G.
        """
        rotated = self._vectors.T @ product_DD
        energy = np.square(rotated).sum(axis=1)
        weights = 1 / (self._values + self._penalties[:, None])
        residual = target_square - (2 * weights - self._values * weights**2) @ energy
        freedom = self._rows - (self._values * weights).sum(axis=1)
        best = int(np.argmin(np.maximum(residual, 0.0) / np.maximum(freedom, 1e-9) ** 2))
        return self._vectors @ (rotated * weights[best][:, None]), float(self._penalties[best])
