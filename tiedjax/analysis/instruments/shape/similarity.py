"""How alike two spaces of the same tokens are: tables X and Y of equally many rows and any widths, centred.

Nothing here depends on a rotation or a common scale of either table. The floors are those of Y's rows in another
order, the successive p of `numpy.random.default_rng(0).permutation(rows)`. Everything but the sample of row pairs
follows from the products X'X, Y'Y and X'Y.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tiedjax.analysis.basis import pairs
from tiedjax.analysis.basis.blocked import column_means, gram, matmul, row_blocks
from tiedjax.analysis.basis.chance import correct
from tiedjax.analysis.basis.tables import check
from tiedjax.analysis.instruments.shape.spectrum import DRAWS
from tiedjax.errors import UserError

SAMPLED_ROWS = 512
SAMPLE_DRAWS = 20
BOOTSTRAP_DRAWS = 1000
_RANK = 1e-5  # a singular value this small beside the largest has no accurate direction in a Gram matrix
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Similarity:
    """A score beside its floor: the mean over row permutations, its error, single ones' deviation, and a formula."""

    score: float
    floor: float
    floor_standard_error: float | None
    floor_deviation: float | None
    floor_closed_form: float
    corrected: float | None


@dataclass(frozen=True)
class Overlap(Similarity):
    """Mean squared cosine of the principal angles between two subspaces of `dimensions`, and the extreme angles."""

    dimensions: int
    smallest_angle_degrees: float
    largest_angle_degrees: float


@dataclass(frozen=True)
class PairSimilarity(Similarity):
    """Rank correlation over all pairs of `rows` sampled rows; the interval is a bootstrap over those rows."""

    low: float | None
    high: float | None
    confidence: float
    rows: int
    rows_left_out: int


@dataclass(frozen=True)
class Comparison:
    """Two spaces of the same `rows` tokens.

    subspaces   between the spans of the leading left singular vectors, for 1, 2, 4, ... of them up to the lesser rank
    cka         linear centred kernel alignment, |X'Y|^2 / (|X'X| |Y'Y|) (Kornblith et al. 2019)
    pairs       Spearman's correlation of the two tables' cosines of the same two rows (representational similarity,
                Kriegeskorte et al. 2008); None where fewer than 4 rows have a direction, or cosines do not vary
    """

    rows: int
    width: int
    other_width: int
    draws: int
    subspaces: list[Overlap]
    cka: Similarity
    pairs: PairSimilarity | None


def compare(
    x_VD: np.ndarray, y_VE: np.ndarray, *, draws: int = DRAWS, report: Callable[[str], None] = lambda line: None
) -> Comparison:
    """How alike the spaces of X and Y are. `report` is told what begins.

    UserError: shapes that do not fit, and tables whose rows are all equal.
    """
    if len(x_VD) != len(y_VE):
        raise UserError(f"spectrum: the tables must have the same rows, got {len(x_VD)} and {len(y_VE)}")
    report("singular vectors")
    x, y = _Centred(x_VD, "first"), _Centred(y_VE, "second")
    report("cross products")
    cross = _cross(x, y, np.arange(len(x_VD)), np.float64)
    rng = np.random.default_rng(0)
    permuted = []
    for i in range(draws):
        report(f"cross products of permuted rows, {i + 1} of {draws}")
        permuted.append(_cross(x, y, rng.permutation(len(x_VD)), np.float32))
    report("pairs of rows")
    return Comparison(
        rows=len(x_VD),
        width=x_VD.shape[1],
        other_width=y_VE.shape[1],
        draws=draws,
        subspaces=_overlaps(x, y, cross, permuted),
        cka=_cka(x, y, cross, permuted),
        pairs=_pairs(x, y),
    )


class _Centred:
    """A table, its mean row, and the singular values and right singular vectors of the centred table, descending."""

    def __init__(self, table_VD: np.ndarray, name: str):
        check(table_VD)
        self.table, self.mean_D = table_VD, column_means(table_VD)
        self.gram_DD = gram(table_VD, self.mean_D)
        if np.trace(self.gram_DD) <= _ROUNDING**2 * len(table_VD) * float(self.mean_D @ self.mean_D):
            raise UserError(f"spectrum: the rows of the {name} table are all equal, so that they span no space")

    def rows(self, index: np.ndarray | slice) -> np.ndarray:
        return np.asarray(self.table[index], np.float64) - self.mean_D

    @cached_property
    def to_left_DR(self) -> np.ndarray:
        """The map of centred rows to their left singular vectors: V / s, up to the rank."""
        values, vectors = np.linalg.eigh(self.gram_DD)
        s_D = np.sqrt(np.maximum(values[::-1], 0))
        rank = int((s_D > _RANK * s_D[0]).sum())
        return vectors[:, ::-1][:, :rank] / s_D[:rank]


def _cross(x: _Centred, y: _Centred, order: np.ndarray, dtype: type) -> np.ndarray:
    """X' Y[order], centred; the products of a block in `dtype`, their sum in float64."""
    total = np.zeros((x.table.shape[1], y.table.shape[1]))
    for block in row_blocks(len(order), sum(total.shape), itemsize=8):
        total += matmul(x.rows(block).astype(dtype).T, y.rows(order[block]).astype(dtype))
    return total


def _overlaps(x: _Centred, y: _Centred, cross: np.ndarray, permuted: Sequence[np.ndarray]) -> list[Overlap]:
    cosines = lambda product: x.to_left_DR.T @ product @ y.to_left_DR
    # The leading r x r block of the left vectors' products holds what there is between the leading r-spaces.
    by_size = lambda product: np.square(cosines(product)).cumsum(axis=0).cumsum(axis=1)
    measured, squares, by_chance = cosines(cross), by_size(cross), [by_size(p) for p in permuted]
    found = []
    for r in _sizes(min(measured.shape)):
        angles = np.degrees(np.arccos(np.clip(np.linalg.svd(measured[:r, :r], compute_uv=False), 0, 1)))
        mean = lambda total, r=r: float(total[r - 1, r - 1]) / r
        floors = _floors(mean(squares), [mean(p) for p in by_chance], r / (len(x.table) - 1))
        found.append(
            Overlap(**floors, dimensions=r, smallest_angle_degrees=angles[0], largest_angle_degrees=angles[-1])
        )
    return found


def _sizes(most: int) -> list[int]:
    """1, 2, 4, ... and the most."""
    return sorted({2**i for i in range(most.bit_length())} | {most})


def _cka(x: _Centred, y: _Centred, cross: np.ndarray, permuted: Sequence[np.ndarray]) -> Similarity:
    """The floor's formula is exact: the mean of |X'PY|^2 over all permutations is |X|^2 |Y|^2 / (V - 1)."""
    both = float(np.linalg.norm(x.gram_DD) * np.linalg.norm(y.gram_DD))
    value = lambda product: float(np.square(product).sum()) / both
    closed = float(np.trace(x.gram_DD) * np.trace(y.gram_DD)) / (len(x.table) - 1) / both
    return Similarity(**_floors(value(cross), [value(p) for p in permuted], closed))


def _pairs(x: _Centred, y: _Centred) -> PairSimilarity | None:
    index, left_out = _sampled(x, y)
    if len(index) < pairs.LEAST:
        return None
    a_SS, b_SS = (_cosines(table.rows(index)) for table in (x, y))
    (found,), _ = pairs.agreements(b_SS, [pairs.rank_matrix(a_SS)], draws=SAMPLE_DRAWS, bootstrap=BOOTSTRAP_DRAWS)
    if found.score is None:
        return None
    return PairSimilarity(**vars(found), floor_closed_form=0.0, rows_left_out=left_out)


def _sampled(x: _Centred, y: _Centred) -> tuple[np.ndarray, int]:
    """Rows with a direction in both tables, at most SAMPLED_ROWS; and how many have none."""
    known = np.ones(len(x.table), bool)
    for table in (x, y):
        least = _ROUNDING * float(np.linalg.norm(table.mean_D))
        for block in row_blocks(len(table.table), table.table.shape[1], itemsize=8):
            known[block] &= np.linalg.norm(table.rows(block), axis=1) > least
    index = np.flatnonzero(known)
    if len(index) > SAMPLED_ROWS:
        index = np.sort(np.random.default_rng(0).choice(index, SAMPLED_ROWS, replace=False))
    return index, int((~known).sum())


def _cosines(rows_SD: np.ndarray) -> np.ndarray:
    unit_SD = rows_SD / np.linalg.norm(rows_SD, axis=1)[:, None]
    return unit_SD @ unit_SD.T


def _floors(score: float, by_chance: Sequence[float], closed_form: float) -> dict[str, Any]:
    """The fields of a Similarity."""
    n = len(by_chance)
    floor = float(np.mean(by_chance))
    deviation = float(np.std(by_chance, ddof=1)) if n > 1 else None
    return {
        "score": score,
        "floor": floor,
        "floor_standard_error": None if deviation is None else deviation / math.sqrt(n),
        "floor_deviation": deviation,
        "floor_closed_form": closed_form,
        "corrected": correct(score, floor),
    }
