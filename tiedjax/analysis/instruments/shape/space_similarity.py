"""How alike two spaces of the same tokens are: tables X and Y of equally many rows and any widths, centred.

Nothing here depends on a rotation or a common scale of either table. The floors are those of Y's rows in another
order, the successive p of `numpy.random.default_rng(0).permutation(rows)`. Everything but the sample of row pairs
follows from the products X'X, Y'Y and X'Y.

Axes: V rows, D width of X, E width of Y, R leading singular vectors of X, S of Y; of the sample of rows, S rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tiedjax.analysis.basis import token_pairs
from tiedjax.analysis.basis.blocked import MULTIPLIED, gram, matmul, row_blocks
from tiedjax.analysis.basis.chance import Score, beside, drawn_floor
from tiedjax.analysis.basis.directions import centre, with_direction
from tiedjax.analysis.basis.tables import check
from tiedjax.analysis.instruments.shape.table_shape import DRAWS
from tiedjax.errors import UserError

SAMPLED_ROWS = 512
SAMPLE_DRAWS = 20
BOOTSTRAP_DRAWS = 1000
_RANK = 1e-5  # a singular value this small beside the largest has no accurate direction in a Gram matrix


@dataclass(frozen=True)
class Overlap:
    """Mean squared cosine of the principal angles between two subspaces of `dimensions`, and the extreme angles."""

    dimensions: int
    cosine: Score
    smallest_angle_degrees: float
    largest_angle_degrees: float


@dataclass(frozen=True)
class SpaceSimilarity:
    """Two spaces of the same `rows` tokens.

    subspaces   between the spans of the leading left singular vectors, for 1, 2, 4, ... of them up to the lesser rank
    cka         linear centred kernel alignment, |X'Y|^2 / (|X'X| |Y'Y|) (Kornblith et al. 2019)
    pairs       Spearman's correlation of the two tables' cosines of the same two rows (representational similarity,
                Kriegeskorte et al. 2008), with a bootstrap interval over rows; None where fewer than 4 rows have a
                direction, or cosines do not vary
    """

    rows: int
    width: int
    other_width: int
    draws: int
    subspaces: list[Overlap]
    cka: Score
    pairs: Score | None


def measure(
    x_VD: np.ndarray, y_VE: np.ndarray, *, draws: int = DRAWS, report: Callable[[str], None] = lambda line: None
) -> SpaceSimilarity:
    """How alike the spaces of X and Y are. `report` is told what begins.

    UserError: shapes that do not fit, and tables whose rows are all equal.

    >>> table = np.random.default_rng(0).normal(size=(50, 4))
    >>> round(measure(table, 3 * table[:, ::-1]).cka.score, 6)
    1.0
    """
    if len(x_VD) != len(y_VE):
        raise UserError(f"spectrum: the tables must have the same rows, got {len(x_VD)} and {len(y_VE)}")
    report("singular vectors")
    x, y = _Centred(x_VD, "first"), _Centred(y_VE, "second")
    report("cross products")
    product_DE = _cross(x, y, np.arange(len(x_VD)), np.float64)
    rng = np.random.default_rng(0)
    permuted_products = []
    for i in range(draws):
        report(f"cross products of permuted rows, {i + 1} of {draws}")
        permuted_products.append(_cross(x, y, rng.permutation(len(x_VD)), np.float32))
    report("pairs of rows")
    return SpaceSimilarity(
        rows=len(x_VD),
        width=x_VD.shape[1],
        other_width=y_VE.shape[1],
        draws=draws,
        subspaces=_overlaps(x, y, product_DE, permuted_products),
        cka=_cka(x, y, product_DE, permuted_products),
        pairs=_pairs(x, y),
    )


class _Centred:
    """A table, its mean row, and the singular values and right singular vectors of the centred table, descending."""

    def __init__(self, table_VD: np.ndarray, name: str):
        check(table_VD, "spectrum")
        self.table = table_VD
        self.mean_D, self.least = centre(table_VD)
        self.gram_DD = gram(table_VD, self.mean_D)
        if np.trace(self.gram_DD) <= len(table_VD) * self.least**2:
            raise UserError(f"spectrum: the rows of the {name} table are all equal, so that they span no space")

    def rows(self, index: np.ndarray | slice) -> np.ndarray:
        return np.asarray(self.table[index], np.float64) - self.mean_D

    @cached_property
    def to_left_DR(self) -> np.ndarray:
        """The map of centred rows to their left singular vectors: V / s, up to the rank."""
        value_D, vector_DD = np.linalg.eigh(self.gram_DD)
        s_D = np.sqrt(np.maximum(value_D[::-1], 0))
        rank = int((s_D > _RANK * s_D[0]).sum())
        return vector_DD[:, ::-1][:, :rank] / s_D[:rank]


def _cross(x: _Centred, y: _Centred, order: np.ndarray, dtype: type) -> np.ndarray:
    """X' Y[order], centred; the products of a block in `dtype`, their sum in float64."""
    product_DE = np.zeros((x.table.shape[1], y.table.shape[1]))
    for block in row_blocks(len(order), sum(product_DE.shape), itemsize=8, block_bytes=MULTIPLIED):
        product_DE += matmul(x.rows(block).astype(dtype).T, y.rows(order[block]).astype(dtype))
    return product_DE


def _overlaps(
    x: _Centred, y: _Centred, product_DE: np.ndarray, permuted_products: Sequence[np.ndarray]
) -> list[Overlap]:
    cosines = lambda product: x.to_left_DR.T @ product @ y.to_left_DR
    # The leading r x r block of the left vectors' products holds what there is between the leading r-spaces.
    by_size = lambda product: np.square(cosines(product)).cumsum(axis=0).cumsum(axis=1)
    cosine_RS, square_RS = cosines(product_DE), by_size(product_DE)
    chance_squares = [by_size(permuted_DE) for permuted_DE in permuted_products]
    overlaps = []
    for r in _sizes(min(cosine_RS.shape)):
        angle_R = np.degrees(np.arccos(np.clip(np.linalg.svd(cosine_RS[:r, :r], compute_uv=False), 0, 1)))
        mean = lambda total, r=r: float(total[r - 1, r - 1]) / r
        floor = drawn_floor([mean(p) for p in chance_squares], closed_form=r / (len(x.table) - 1))
        cosine = beside(mean(square_RS), floor, rows=len(x.table))
        overlaps.append(Overlap(r, cosine, smallest_angle_degrees=angle_R[0], largest_angle_degrees=angle_R[-1]))
    return overlaps


def _sizes(most: int) -> list[int]:
    """1, 2, 4, ... and the most."""
    return sorted({2**i for i in range(most.bit_length())} | {most})


def _cka(x: _Centred, y: _Centred, product_DE: np.ndarray, permuted_products: Sequence[np.ndarray]) -> Score:
    """The floor's formula is exact: the mean of |X'PY|^2 over all permutations is |X|^2 |Y|^2 / (V - 1)."""
    scale = float(np.linalg.norm(x.gram_DD) * np.linalg.norm(y.gram_DD))
    value = lambda product: float(np.square(product).sum()) / scale
    closed_form = float(np.trace(x.gram_DD) * np.trace(y.gram_DD)) / (len(x.table) - 1) / scale
    floor = drawn_floor([value(p) for p in permuted_products], closed_form)
    return beside(value(product_DE), floor, rows=len(x.table))


def _pairs(x: _Centred, y: _Centred) -> Score | None:
    index_S, left_out = _sample(x, y)
    if len(index_S) < token_pairs.LEAST:
        return None
    a_SS, b_SS = (_cosines(table.rows(index_S)) for table in (x, y))
    (agreement,), _ = token_pairs.agreements(
        b_SS,
        [token_pairs.Ranking(a_SS)],
        draws=SAMPLE_DRAWS,
        bootstrap=BOOTSTRAP_DRAWS,
        rows_left_out=left_out,
    )
    return None if agreement.score is None else replace(agreement, floor_closed_form=0.0)


def _sample(x: _Centred, y: _Centred) -> tuple[np.ndarray, int]:
    """Rows with a direction in both tables, at most SAMPLED_ROWS; and how many have none."""
    directed_V = with_direction(x.table, x.mean_D, x.least) & with_direction(y.table, y.mean_D, y.least)
    index_S = np.flatnonzero(directed_V)
    if len(index_S) > SAMPLED_ROWS:
        index_S = np.sort(np.random.default_rng(0).choice(index_S, SAMPLED_ROWS, replace=False))
    return index_S, int((~directed_V).sum())


def _cosines(rows_SD: np.ndarray) -> np.ndarray:
    unit_SD = rows_SD / np.linalg.norm(rows_SD, axis=1)[:, None]
    return unit_SD @ unit_SD.T
