"""How well a linear probe reads log-frequency from a token's row: cross-validated ridge regression, in one pass.

The rows fall into FOLDS folds, `numpy.random.default_rng(0).permutation(V) % FOLDS`. For each fold the probe is fitted
on the others: every column centred by its mean and divided by its standard deviation there (a constant column is
left out), the penalty chosen there by generalised cross-validation (`linear_maps.Ridge`). The score is
R^2 = 1 - sum (y - prediction)^2 / sum (y - mean of y in the other folds)^2, over all rows, each predicted once.
Everything follows from each fold's sums and its [D, D] Gram matrix.

Axes: V rows, D width, N targets, B rows of a block, M those of one fold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tiedjax.analysis.basis.blocked import MULTIPLIED, column_means, row_blocks
from tiedjax.analysis.basis.chance import Score, beside, drawn_floor
from tiedjax.analysis.basis.linear_maps import Ridge

FOLDS = 5
DRAWS = 20
_CONSTANT = 1e-10  # a column's standard deviation, relative to the largest, that counts as none


@dataclass
class _Sums:
    """Sums over the rows x of a fold and their targets y."""

    rows: int
    x_D: np.ndarray
    xx_DD: np.ndarray
    xy_DN: np.ndarray
    y_N: np.ndarray
    yy_N: np.ndarray

    def without(self, other: _Sums) -> _Sums:
        return _Sums(**{name: value - getattr(other, name) for name, value in vars(self).items()})

    def about(self, x_D: np.ndarray, y_N: np.ndarray) -> _Sums:
        """The sums of x - x_D and y - y_N."""
        return _Sums(
            rows=self.rows,
            x_D=self.x_D - self.rows * x_D,
            xx_DD=self.xx_DD - np.outer(self.x_D, x_D) - np.outer(x_D, self.x_D - self.rows * x_D),
            xy_DN=self.xy_DN - np.outer(self.x_D, y_N) - np.outer(x_D, self.y_N - self.rows * y_N),
            y_N=self.y_N - self.rows * y_N,
            yy_N=self.yy_N - 2 * y_N * self.y_N + self.rows * y_N**2,
        )


def frequency_probe(table_VD: np.ndarray, count_V: np.ndarray, *, draws: int = DRAWS) -> Score:
    """R^2 of log10(count + 1) from the rows; the floor from `draws` permutations of the counts.

    None with fewer than 2 * FOLDS rows, or where counts or rows do not vary.
    """
    y_V = np.log10(np.asarray(count_V, np.float64) + 1)
    score_N = np.full(1 + draws, np.nan)
    if len(y_V) >= 2 * FOLDS and np.ptp(y_V) > 0:
        rng = np.random.default_rng(0)
        fold_V = rng.permutation(len(y_V)) % FOLDS
        score_N = _cross_validated(table_VD, np.stack([y_V, *(rng.permutation(y_V) for _ in range(draws))], 1), fold_V)
    score, *chance_scores = (float(s) if np.isfinite(s) else None for s in score_N)
    return beside(score, drawn_floor(chance_scores), rows=len(y_V))


def _cross_validated(table_VD: np.ndarray, y_VN: np.ndarray, fold_V: np.ndarray) -> np.ndarray:
    """R^2 of each target, float64 [N]; NaN where a fold's other rows or targets do not vary."""
    folds = _fold_sums(table_VD, y_VN - y_VN.mean(axis=0), fold_V)
    all_sums = _Sums(**{name: sum(vars(fold)[name] for fold in folds) for name in vars(folds[0])})
    lost_N, total_N = np.zeros(y_VN.shape[1]), np.zeros(y_VN.shape[1])
    for fold in folds:
        fitted_sums = all_sums.without(fold)
        x_D, y_N = fitted_sums.x_D / fitted_sums.rows, fitted_sums.y_N / fitted_sums.rows
        w_DN = _weights(fitted_sums.about(x_D, y_N))
        left_out_sums = fold.about(x_D, y_N)
        lost_N += (
            left_out_sums.yy_N
            - 2 * (w_DN * left_out_sums.xy_DN).sum(axis=0)
            + (w_DN * (left_out_sums.xx_DD @ w_DN)).sum(axis=0)
        )
        total_N += left_out_sums.yy_N
    return 1 - np.divide(lost_N, total_N, out=np.full(len(lost_N), np.nan), where=total_N > 0)


def _fold_sums(table_VD: np.ndarray, y_VN: np.ndarray, fold_V: np.ndarray) -> list[_Sums]:
    width, targets = table_VD.shape[1], y_VN.shape[1]
    mean_D = column_means(table_VD)  # taken off for accuracy only: each fit has a mean of its own
    zeros = lambda: _Sums(
        0, np.zeros(width), np.zeros((width, width)), np.zeros((width, targets)), np.zeros(targets), np.zeros(targets)
    )
    folds = [zeros() for _ in range(FOLDS)]
    for block in row_blocks(len(table_VD), table_VD.shape[1], itemsize=8, block_bytes=MULTIPLIED):
        x_BD = np.asarray(table_VD[block], np.float64) - mean_D
        for label, fold in enumerate(folds):
            inside_B = fold_V[block] == label
            x_MD, y_MN = x_BD[inside_B], y_VN[block][inside_B]
            fold.rows += len(x_MD)
            fold.x_D += x_MD.sum(axis=0)
            fold.xx_DD += x_MD.T @ x_MD
            fold.xy_DN += x_MD.T @ y_MN
            fold.y_N += y_MN.sum(axis=0)
            fold.yy_N += np.square(y_MN).sum(axis=0)
    return folds


def _weights(centred: _Sums) -> np.ndarray:
    """The weights of each target on unstandardised columns, [D, N]; NaN where no column varies."""
    deviation_D = np.sqrt(np.maximum(np.diag(centred.xx_DD), 0) / centred.rows)
    varies_D = deviation_D > max(_CONSTANT * deviation_D.max(), np.finfo(np.float64).tiny)
    if not varies_D.any():
        return np.full(centred.xy_DN.shape, np.nan)
    scale_D = np.divide(1.0, deviation_D, out=np.zeros_like(deviation_D), where=varies_D)
    ridge = Ridge(centred.xx_DD * scale_D[:, None] * scale_D, centred.rows - 1)  # the mean takes one degree of freedom
    weights_D = [
        ridge.solve(product[:, None] * scale_D[:, None], float(square))[0][:, 0]
        for product, square in zip(centred.xy_DN.T, centred.yy_N, strict=True)
    ]
    return np.stack(weights_D, axis=1) * scale_D[:, None]
