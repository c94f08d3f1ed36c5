"""Alignment: how alike two tables are once one may be mapped onto the other.

The score is the mean over rows of cosine(row of X T, row of Y), X and Y centred by their column means, for T in

    identity     T = I
    orthogonal   T = argmin ||X T - Y|| over orthogonal T (Schoenemann 1966)
    linear       T = argmin ||X T - Y|| over all T, of least norm where that is not unique
    ridge        T = argmin ||X T - Y||^2 + penalty ||T||^2, the penalty chosen by generalised cross-validation

A map is fitted on the rows it is scored on, so unrelated tables score above 0. The floor is the mean score against
Y[p] for the successive p of `numpy.random.default_rng(0).permutation(rows)`, the map fitted anew for each. Held out,
the map is fitted on one half of the rows (the first of `numpy.random.default_rng(1).permutation(rows)`) and scored on
the other about the first one's means, and the other way round: its floor is 0 but for noise.

The raw cosine is the one score without centring: the mean over rows of cosine(row of X, row of Y) as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from tiedjax.analysis.basis.blocked import row_blocks
from tiedjax.analysis.basis.chance import Score, beside_draws, beside_exact
from tiedjax.analysis.basis.directions import unit_rows
from tiedjax.analysis.basis.statistics import Interval, bootstrap_mean
from tiedjax.analysis.basis.strata import frequency_parts, strata
from tiedjax.analysis.instruments.alignment.fitting import FITS, SQUARE, Fitter, RowCosines
from tiedjax.errors import UserError

DRAWS = 5
FREQUENCY_PARTS = 10  # of like frequency, within which rows are permuted
BINS = 40
QUANTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class Distribution:
    """Of the cosines of single rows: quantiles by percentage, counts of BINS equal bins over [-1, 1], and the mean with
    its bootstrap interval over rows, the map held fixed."""

    quantiles: dict[str, float]
    histogram: list[int]
    mean: Interval


@dataclass(frozen=True)
class Alignment:
    """Scores per fit of X mapped onto Y over `rows` rows, and what they are means of.

    Attributes:
      held_out: the same scores for rows that the map was not fitted on; empty unless asked for.
      cosines: per fit, the cosine of each row [rows]; NaN for rows without a direction.
      chance: per fit, the mean cosine of each row of X over the permutations [rows].
      penalty: that of ridge; None without that fit.
    """

    rows: int
    width: int
    target_width: int
    scores: dict[str, Score]
    held_out: dict[str, Score] = field(default_factory=dict)
    penalty: float | None = None
    cosines: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    chance: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Comparison:
    """Two tables' alignment over the rows that count, and the two forms that stand beside it, all by fit.

    Attributes:
      alignment: in sample and held out, with floors.
      paper: the form of arXiv 2603.26663: all rows, in sample, uncorrected.
      beyond_frequency: the scores of `alignment` above floors that permute rows among tokens of like frequency only:
        likeness that frequency does not explain. Empty where counts are not known.
      strata: the same by stratum of token frequency; empty likewise.
    """

    alignment: Alignment
    paper: dict[str, float]
    beyond_frequency: dict[str, Score]
    strata: dict[str, dict[str, Score]]


def measure(
    x_VD: np.ndarray,
    y_VD: np.ndarray,
    *,
    fits: Sequence[str] | None = None,
    rows: np.ndarray | None = None,
    counts: np.ndarray | None = None,
    draws: int = DRAWS,
    report: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """X mapped onto Y under each of `fits` (default: all that the widths allow).

    `rows` is a boolean [V] mask of the rows that count, `counts` int [2, V] how often training showed their tokens.
    UserError as of `align`.

    >>> table = np.random.default_rng(0).normal(size=(200, 4))
    >>> comparison = measure(table, table[:, ::-1])
    >>> round(comparison.alignment.scores["orthogonal"].corrected, 6)
    1.0
    """
    fits = list(fits or [fit for fit in FITS if x_VD.shape[1] == y_VD.shape[1] or fit not in SQUARE])
    same = partial(align, x_VD, y_VD, fits=fits, rows=rows, draws=draws, report=report)
    alignment = same(held_out=True)
    everywhere = alignment if rows is None else align(x_VD, y_VD, fits=fits, draws=0)
    beyond, by_strata = {}, {}
    if counts is not None:
        alike = same(within=frequency_parts(counts, FREQUENCY_PARTS))
        kept = slice(None) if rows is None else rows
        masks = {name: mask[kept] for name, mask in strata(counts).items() if mask[kept].any()}
        beyond = alike.scores
        by_strata = {fit: by_stratum(alignment.cosines[fit], alike.chance[fit], masks) for fit in fits}
    return Comparison(alignment, {fit: uncorrected(everywhere.cosines[fit]) for fit in fits}, beyond, by_strata)


def align(
    x_VD: np.ndarray,
    y_VD: np.ndarray,
    *,
    fits: Sequence[str] = FITS,
    rows: np.ndarray | None = None,
    draws: int = DRAWS,
    held_out: bool = False,
    within: np.ndarray | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Alignment:
    """Scores of X mapped onto Y under each of `fits`, with floors.

    `rows` is a boolean [V] mask of the rows that count, for centring too; `report` is told of the progress. With
    labels `within`, int [V], floors permute rows among those of their own label only: what tables share by label alone
    (frequency, say) then counts as chance. Rows
    without a direction (all zero once centred or mapped) are left out and counted. UserError: shapes that do not fit,
    or unequal widths with a fit that needs equal ones.
    """
    fitter = Fitter(x_VD, y_VD, fits, rows, held_out)
    labels = None if within is None else within if rows is None else within[rows]
    rng = np.random.default_rng(0)
    measured = [fitter.measure()]
    for draw in range(draws):
        report(f"floor {draw + 1} of {draws}")
        measured.append(fitter.measure(_permutation(rng, fitter.rows, labels)))
    whole, halves = [inside for inside, _ in measured], [outside for _, outside in measured if outside]
    shape = (fitter.rows, x_VD.shape[1])
    return Alignment(
        rows=fitter.rows,
        width=x_VD.shape[1],
        target_width=y_VD.shape[1],
        scores={fit: _score(fit, whole, closed_form_floor(fit, *shape)) for fit in fits},
        held_out={fit: _score(fit, halves, 0.0) for fit in fits if halves},
        penalty=whole[0].penalty,
        cosines=whole[0].cosines,
        chance={fit: np.mean([permuted.cosines[fit] for permuted in whole[1:]], axis=0) for fit in fits if draws},
    )


def raw_cosine(x_VD: np.ndarray, y_VD: np.ndarray, *, rows: np.ndarray | None = None, zero_rows: bool = False) -> Score:
    """The mean over rows of cosine(row of X, row of Y), nothing centred, with its floor; None where no row counts.

    The floor is its mean over all permutations of Y's rows, exactly: the product of the two mean directions. So tables
    with a common mean row have a high one. `rows` is a boolean [V] mask of the rows that count. Rows that are all zero
    in either table are left out and counted, unless `zero_rows`: then their cosine is 0. UserError: tables of different
    shapes.

    >>> raw_cosine(np.array([[3.0, 0.0], [1.0, 1.0]]), np.array([[5.0, 0.0], [0.0, 2.0]])).score
    0.8535533905932737
    """
    if x_VD.shape != y_VD.shape:
        raise UserError(f"align: the raw cosine needs equal shapes, got {list(x_VD.shape)} and {list(y_VD.shape)}")
    kept = np.arange(len(x_VD)) if rows is None else np.flatnonzero(rows)
    total, known, x_D, y_D = 0.0, 0, np.zeros(x_VD.shape[1]), np.zeros(x_VD.shape[1])
    for block in row_blocks(len(kept), x_VD.shape[1], itemsize=8):
        x, y = unit_rows(x_VD[kept[block]]), unit_rows(y_VD[kept[block]])
        both = x.any(axis=1) & y.any(axis=1)
        if not zero_rows:
            x, y = x[both], y[both]
        total += float(np.vecdot(x, y).sum())
        known += int(both.sum())
        x_D += x.sum(axis=0)
        y_D += y.sum(axis=0)
    counted = len(kept) if zero_rows else known
    if not counted:
        return beside_exact(None, None, rows_left_out=len(kept))
    floor = float(x_D @ y_D) / counted**2
    return beside_exact(total / counted, floor, rows=counted, rows_left_out=len(kept) - counted)


def _permutation(rng: np.random.Generator, rows: int, labels: np.ndarray | None) -> np.ndarray:
    if labels is None:
        return rng.permutation(rows)
    order = np.arange(rows)
    for label in np.unique(labels):
        inside = np.flatnonzero(labels == label)
        order[inside] = rng.permutation(inside)
    return order


def closed_form_floor(fit: str, rows: int, width: int) -> float:
    """What two unrelated isotropic [rows, width] tables score, for rows well above width; at most 1.

    linear: each row keeps a share D/V of its squared length, which is a cosine of sqrt(D/V); ridge at most that.
    orthogonal: the mean singular value of a D x D Gaussian matrix is (8 / 3 pi) sqrt(D) (quarter-circle law), divided
    by sqrt(V).
    """
    root = math.sqrt(width / rows) if rows else 1.0
    return {"identity": 0.0, "orthogonal": min(1.0, 8 / (3 * math.pi) * root)}.get(fit, min(1.0, root))


def mean_cosine(cosines: np.ndarray) -> float | None:
    """The mean over rows with a direction; None where there is none."""
    known = cosines[~np.isnan(cosines)]
    return float(known.mean()) if len(known) else None


def uncorrected(cosines: np.ndarray) -> float:
    """The mean over all rows, 0 for those without a direction: the form of arXiv 2603.26663."""
    return float(np.nan_to_num(cosines).mean())


def distribution(cosines: np.ndarray) -> Distribution:
    """How the cosines of single rows are distributed, rows without a direction left out."""
    known = cosines[~np.isnan(cosines)]
    levels = {str(q): float(np.quantile(known, q / 100)) for q in QUANTILES} if len(known) else {}
    return Distribution(levels, histogram(cosines), bootstrap_mean(cosines))


def histogram(cosines: np.ndarray) -> list[int]:
    """How many rows have a cosine in each of BINS equal bins over [-1, 1], rows without a direction left out.

    >>> sum(histogram(np.array([0.5, -1.0, np.nan])))
    2
    """
    counts, _ = np.histogram(cosines[~np.isnan(cosines)], BINS, (-1.0, 1.0))
    return [int(n) for n in counts]


def by_stratum(cosines: np.ndarray, chance: np.ndarray, masks: Mapping[str, np.ndarray]) -> dict[str, Score]:
    """The score within each stratum, a boolean mask over the same rows: one map for all, floors from the same rows.

    `chance` is the mean over the draws, so that how well a floor is known is not.
    """
    return {
        name: beside_draws(mean_cosine(cosines[rows]), [mean_cosine(chance[rows])], rows=int(rows.sum()))
        for name, rows in masks.items()
    }


def _score(fit: str, measured: Sequence[RowCosines], closed_form: float) -> Score:
    cosines = measured[0].cosines[fit]
    left_out = int(np.isnan(cosines).sum())
    return beside_draws(
        mean_cosine(cosines),
        [mean_cosine(permuted.cosines[fit]) for permuted in measured[1:]],
        closed_form=closed_form,
        rows=len(cosines) - left_out,
        rows_left_out=left_out,
    )
