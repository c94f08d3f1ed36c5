"""The shape of one table: its singular values, how many directions it fills, and how evenly it fills them.

Every measure stands beside what an isotropic Gaussian table of as many rows and columns and the same sum of squares
gives (the floor): the mean of `draws` simulations from `numpy.random.default_rng(0)`, or a closed form for the mean
cosine. The singular values of a Gaussian table are those of the Bartlett factor of its Gram matrix, so that no table
is drawn for them. All measures are of the table as it is (raw) and centred by its mean row (centred).

Axes: V rows, D width, B rows of a block (of the simulation: directions), S the lesser of rows and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.special

from tiedjax.analysis.basis.blocked import MULTIPLIED, gram, matmul, row_blocks
from tiedjax.analysis.basis.chance import Score, beside, drawn_floor, exact_floor
from tiedjax.analysis.basis.directions import centre
from tiedjax.analysis.basis.tables import check

DRAWS = 5


@dataclass(frozen=True)
class Shape:
    """Singular values, descending, with what isotropic tables have on average, and what follows from them.

    effective_rank   exp of the entropy of p_i = s_i / sum s (Roy and Vetterli 2007): singular values, not squares
    stable_rank      sum s^2 / s_1^2
    first_energy     s_1^2 / sum s^2
    isotropy         min Z(c) / max Z(c) over c = +-v_i, v_i the right singular vectors, Z(c) = sum over rows w of
                     exp(c.w) (Mu and Viswanath 2018); depends on the table's scale
    mean_cosine      mean cosine of two distinct rows with a direction; None for fewer than two
    """

    singular_values: list[float]
    isotropic_singular_values: list[float]
    effective_rank: Score
    stable_rank: Score
    first_energy: Score
    isotropy: Score
    mean_cosine: Score | None
    rows_left_out: int


@dataclass(frozen=True)
class TableShape:
    """The shape of a table as it is and centred; None where all its rows are zero, or equal."""

    rows: int
    width: int
    draws: int
    raw: Shape | None
    centred: Shape | None


def measure(
    table_VD: np.ndarray, *, draws: int = DRAWS, report: Callable[[str], None] = lambda line: None
) -> TableShape:
    """The shape of a table of at least one row. `report` is told what begins. UserError for what is no such table.

    >>> round(measure(np.concatenate([np.eye(4), -np.eye(4)])).centred.effective_rank.score, 6)
    4.0
    """
    check(table_VD, "spectrum")
    rows, width = table_VD.shape
    report("singular values")
    mean_D, least = centre(table_VD)
    centred_DD = gram(table_VD, mean_D)
    raw_DD = centred_DD + rows * np.outer(mean_D, mean_D)
    varies = np.trace(centred_DD) > rows * least**2
    shapes: dict[str, Shape | None] = {"raw": None, "centred": None}
    for name, gram_DD, form_mean_D, has_shape in (
        ("raw", raw_DD, None, np.trace(raw_DD) > 0),
        ("centred", centred_DD, mean_D, varies),
    ):
        if has_shape:
            report(f"shape of the {name} table")
            shapes[name] = _shape(table_VD, gram_DD, form_mean_D, draws)
    return TableShape(rows=rows, width=width, draws=draws, **shapes)


def _shape(table_VD: np.ndarray, gram_DD: np.ndarray, mean_D: np.ndarray | None, draws: int) -> Shape:
    rows, width = table_VD.shape
    centred = mean_D is not None
    value_D, vector_DD = np.linalg.eigh(gram_DD)
    s_D, v_DD = np.sqrt(np.maximum(value_D[::-1], 0)), vector_DD[:, ::-1]
    log_Z_2D = _log_partitions(table_VD, mean_D, v_DD)
    rng = np.random.default_rng(0)
    degrees = rows - centred
    simulated_spectra, isotropies = [], []
    for _ in range(draws):
        draw_D = isotropic_singular_values(degrees, width, rng)
        draw_D *= math.sqrt(np.square(s_D).sum() / np.square(draw_D).sum())
        simulated_spectra.append(draw_D)
        isotropies.append(_isotropy(_isotropic_log_partitions(draw_D, rows, centred, rng)))
    compared = lambda score, chance_scores: beside(score, drawn_floor(chance_scores), similarity=False, rows=rows)
    by_draw = lambda statistic: compared(statistic(s_D), [statistic(draw_D) for draw_D in simulated_spectra])
    cosine, left_out = _mean_cosine(table_VD, mean_D)
    return Shape(
        singular_values=s_D[: min(rows, width)].tolist(),
        isotropic_singular_values=np.mean(simulated_spectra, axis=0)[: min(rows, width)].tolist(),
        effective_rank=by_draw(effective_rank),
        stable_rank=by_draw(stable_rank),
        first_energy=by_draw(lambda s: 1 / stable_rank(s)),
        isotropy=compared(_isotropy(log_Z_2D), isotropies),
        mean_cosine=cosine,
        rows_left_out=left_out,
    )


def effective_rank(s_D: np.ndarray) -> float:
    """exp of the entropy of singular values divided by their sum."""
    p_D = s_D[s_D > 0] / s_D.sum()
    return float(np.exp(-(p_D * np.log(p_D)).sum()))


def stable_rank(s_D: np.ndarray) -> float:
    """The sum of squared singular values over the largest square."""
    return float(np.square(s_D).sum() / np.square(s_D).max())


def isotropic_singular_values(rows: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Singular values, descending [width], of a table of independent standard normal numbers.

    Bartlett 1933: X'X = A A' in law, A lower triangular with independent entries, standard normal below the diagonal
    and on it chi with rows, rows - 1, ... degrees of freedom. A table of fewer rows than columns is drawn transposed.
    """
    size, freedom = min(rows, width), max(rows, width)
    factor_SS = np.tril(rng.standard_normal((size, size)), -1)
    factor_SS[np.diag_indices(size)] = np.sqrt(rng.chisquare(freedom - np.arange(size)))
    value_S = np.linalg.eigvalsh(factor_SS @ factor_SS.T)[::-1]
    return np.concatenate([np.sqrt(np.maximum(value_S, 0)), np.zeros(width - size)])


def mean_cosine_floor(rows: int, width: int, centred: bool) -> tuple[float, float]:
    """Mean and standard deviation of the mean cosine of distinct rows of an isotropic Gaussian table.

    Raw rows are independent: 0, and sqrt(2 / (n (n - 1) D)). Centred rows correlate by r = -1 / (n - 1), which makes
    the mean cosine c r 2F1(1/2, 1/2; D/2 + 1; r^2) with c = (2 / D) (Gamma((D + 1) / 2) / Gamma(D / 2))^2, the
    expected cosine of correlated normal vectors; the deviation, (1 - c) sqrt(2 / D) / (n - 1), is for many rows.
    """
    if not centred:
        return 0.0, math.sqrt(2 / (rows * (rows - 1) * width))
    r = -1 / (rows - 1)
    half = scipy.special.gammaln((width + 1) / 2) - scipy.special.gammaln(width / 2)
    c = 2 / width * math.exp(2 * half)
    return c * r * float(scipy.special.hyp2f1(0.5, 0.5, width / 2 + 1, r * r)), (1 - c) * math.sqrt(2 / width) * -r


def _mean_cosine(table_VD: np.ndarray, mean_D: np.ndarray | None) -> tuple[Score | None, int]:
    """(|sum of unit rows|^2 - n) / (n (n - 1)), and how many rows have no direction."""
    total_D, n = np.zeros(table_VD.shape[1]), 0
    least = 0.0 if mean_D is None else centre(table_VD)[1]
    for block in row_blocks(len(table_VD), table_VD.shape[1], itemsize=8):
        x_BD = _centred(table_VD[block], mean_D)
        norm_B = np.linalg.norm(x_BD, axis=1)
        directed_B = norm_B > least
        total_D += (x_BD[directed_B] / norm_B[directed_B, None]).sum(axis=0)
        n += int(directed_B.sum())
    left_out = len(table_VD) - n
    if n < 2:
        return None, left_out
    floor = exact_floor(*mean_cosine_floor(n, table_VD.shape[1], mean_D is not None))
    score = (float(total_D @ total_D) - n) / (n * (n - 1))
    return beside(score, floor, similarity=False, rows=n, rows_left_out=left_out), left_out


def _log_partitions(table_VD: np.ndarray, mean_D: np.ndarray | None, v_DD: np.ndarray) -> np.ndarray:
    """log Z(v_i) and log Z(-v_i), [2, D]."""
    sums = _LogSums(v_DD.shape[1])
    v_DD = np.ascontiguousarray(v_DD, np.float32)
    for block in row_blocks(len(table_VD), table_VD.shape[1], itemsize=8):
        sums.add(matmul(_centred(table_VD[block], mean_D).astype(np.float32), v_DD))
    return sums.result()


def _isotropic_log_partitions(s_D: np.ndarray, rows: int, centred: bool, rng: np.random.Generator) -> np.ndarray:
    """The same of a Gaussian table with singular values s: its rows' coordinates along v_i are s_i u_i.

    u_i is uniform among the unit vectors (centred: among those that sum to 0). That two of them are orthogonal is not
    imposed; it moves no Z by more than a share of 1 / rows.
    """
    log_Z_2D = np.empty((2, len(s_D)))
    for block in row_blocks(len(s_D), rows, itemsize=8, block_bytes=MULTIPLIED):
        u_BV = rng.standard_normal((block.stop - block.start, rows), np.float32)
        if centred:
            u_BV -= u_BV.mean(axis=1, keepdims=True)
        u_BV *= (s_D[block] / np.linalg.norm(u_BV, axis=1))[:, None].astype(np.float32)
        sums = _LogSums(len(u_BV))
        sums.add(u_BV.T)
        log_Z_2D[:, block] = sums.result()
    return log_Z_2D


class _LogSums:
    """log of the sum over rows of exp(x) and exp(-x), column by column, whatever the size of x."""

    def __init__(self, columns: int):
        self._peak, self._sum = np.full((2, columns), -np.inf), np.zeros((2, columns))

    def add(self, x_BD: np.ndarray) -> None:
        for i, (sign, most_D) in enumerate([(1, x_BD.max(axis=0)), (-1, -x_BD.min(axis=0))]):
            peak_D = np.maximum(self._peak[i], most_D)
            part_D = np.exp(sign * x_BD - peak_D.astype(x_BD.dtype)).sum(axis=0, dtype=np.float64)
            self._sum[i] = self._sum[i] * np.exp(self._peak[i] - peak_D) + part_D
            self._peak[i] = peak_D

    def result(self) -> np.ndarray:
        return self._peak + np.log(self._sum)


def _isotropy(log_Z_2D: np.ndarray) -> float:
    return float(np.exp(log_Z_2D.min() - log_Z_2D.max()))


def _centred(block_BD: np.ndarray, mean_D: np.ndarray | None) -> np.ndarray:
    x_BD = np.asarray(block_BD, np.float64)
    return x_BD if mean_D is None else x_BD - mean_D
