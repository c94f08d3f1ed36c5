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

Axes: V rows, N those that count, B rows of a block, D width of X, E width of Y.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tiedjax.analysis.basis.blocked import row_blocks
from tiedjax.analysis.basis.chance import Score, beside, drawn_floor, exact_floor
from tiedjax.analysis.basis.directions import unit_rows
from tiedjax.analysis.basis.statistics import Interval, bootstrap_mean
from tiedjax.analysis.basis.strata import frequency_parts, strata
from tiedjax.analysis.instruments.alignment.fitting import FITS, SQUARE, CentredRows, Fitter, RowCosines, check_fits
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
    y_VE: np.ndarray,
    *,
    fits: Sequence[str] | None = None,
    kept_V: np.ndarray | None = None,
    counts: np.ndarray | None = None,
    draws: int = DRAWS,
    held_out_floors: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """X mapped onto Y under each of `fits` (default: all that the widths allow).

    `kept_V` is a boolean [V] mask of the rows that count, `counts` int [2, V] how often training showed their tokens.
    Without `held_out_floors` the scores held out stand without a floor, whose fits take half of the time. UserError as
    of `align`.

    >>> table = np.random.default_rng(0).normal(size=(200, 4))
    >>> comparison = measure(table, table[:, ::-1])
    >>> round(comparison.alignment.scores["orthogonal"].corrected, 6)
    1.0
    """
    fits = list(fits or [fit for fit in FITS if x_VD.shape[1] == y_VE.shape[1] or fit not in SQUARE])
    check_fits(x_VD, y_VE, fits)
    fitter = Fitter(CentredRows(x_VD, kept_V), CentredRows(y_VE, kept_V), fits, halves=True)
    in_sample, held_out = fitter.measure(halves=True)
    orders = _reported(_permutations(fitter.rows, draws), draws, report)
    by_chance = [fitter.measure(order, halves=held_out_floors) for order in orders]
    alignment = _alignment(fitter, [(in_sample, held_out), *by_chance])
    all_rows = alignment if kept_V is None or kept_V.all() else align(x_VD, y_VE, fits=fits, draws=0)
    beyond_frequency, by_strata = {}, {}
    if counts is not None:
        strata_rows = slice(None) if kept_V is None else kept_V
        label_N = frequency_parts(counts, FREQUENCY_PARTS)[strata_rows]
        orders = _reported(_permutations(fitter.rows, draws, label_N), draws, report)
        within_parts = _alignment(fitter, [(in_sample, None), *map(fitter.measure, orders)])
        masks = {name: mask[strata_rows] for name, mask in strata(counts).items() if mask[strata_rows].any()}
        beyond_frequency = within_parts.scores
        by_strata = {fit: by_stratum(alignment.cosines[fit], within_parts.chance[fit], masks) for fit in fits}
    return Comparison(alignment, {fit: uncorrected(all_rows.cosines[fit]) for fit in fits}, beyond_frequency, by_strata)


def align(
    x_VD: np.ndarray,
    y_VE: np.ndarray,
    *,
    fits: Sequence[str] = FITS,
    kept_V: np.ndarray | None = None,
    draws: int = DRAWS,
    held_out: bool = False,
    within: np.ndarray | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Alignment:
    """Scores of X mapped onto Y under each of `fits`, with floors.

    `kept_V` is a boolean [V] mask of the rows that count, for centring too; `report` is told of the progress. With
    labels `within`, int [V], floors permute rows among those of their own label only: what tables share by label alone
    (frequency, say) then counts as chance. Rows
    without a direction (all zero once centred or mapped) are left out and counted. UserError: shapes that do not fit,
    or unequal widths with a fit that needs equal ones.
    """
    check_fits(x_VD, y_VE, fits)
    label_N = None if within is None else within if kept_V is None else within[kept_V]
    x, y = CentredRows(x_VD, kept_V), CentredRows(y_VE, kept_V)
    return align_rows(x, y, fits=fits, draws=draws, held_out=held_out, label_N=label_N, report=report)


def align_rows(
    x: CentredRows,
    y: CentredRows,
    *,
    fits: Sequence[str] = FITS,
    draws: int = DRAWS,
    held_out: bool = False,
    label_N: np.ndarray | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Alignment:
    """`align` of tables of the same shape whose rows are centred, for those that stand in several pairs.

    The rows that count are the same in both; `label_N` are their labels.
    """
    fitter = Fitter(x, y, fits, halves=held_out)
    row_cosines = [fitter.measure(halves=held_out)]
    for order in _reported(_permutations(fitter.rows, draws, label_N), draws, report):
        row_cosines.append(fitter.measure(order, halves=held_out))
    return _alignment(fitter, row_cosines)


def _alignment(fitter: Fitter, row_cosines: Sequence[tuple[RowCosines, RowCosines | None]]) -> Alignment:
    """What the cosines in sample and held out say, the first of them with Y's rows in their own order."""
    in_sample, out_of_sample = [inside for inside, _ in row_cosines], [outside for _, outside in row_cosines if outside]
    fits, draws, shape = fitter.fits, len(row_cosines) - 1, (fitter.rows, fitter.width)
    return Alignment(
        rows=fitter.rows,
        width=fitter.width,
        target_width=fitter.target_width,
        scores={fit: _score(fit, in_sample, closed_form_floor(fit, *shape)) for fit in fits},
        held_out={fit: _score(fit, out_of_sample, 0.0) for fit in fits if out_of_sample},
        penalty=in_sample[0].penalty,
        cosines=in_sample[0].cosines,
        chance={
            fit: np.mean([draw_cosines.cosines[fit] for draw_cosines in in_sample[1:]], axis=0) for fit in fits if draws
        },
    )


def raw_cosine(
    x_VD: np.ndarray, y_VD: np.ndarray, *, kept_V: np.ndarray | None = None, zero_rows: bool = False
) -> Score:
    """The mean over rows of cosine(row of X, row of Y), nothing centred, with its floor; None where no row counts.

    The floor is its mean over all permutations of Y's rows, exactly: the product of the two mean directions. So tables
    with a common mean row have a high one. `kept_V` is a boolean [V] mask of the rows that count. Rows that are all
    zero in either table are left out and counted, unless `zero_rows`: then their cosine is 0. UserError: tables of
    different shapes.

    >>> raw_cosine(np.array([[3.0, 0.0], [1.0, 1.0]]), np.array([[5.0, 0.0], [0.0, 2.0]])).score
    0.8535533905932737
    """
    if x_VD.shape != y_VD.shape:
        raise UserError(f"align: the raw cosine needs equal shapes, got {list(x_VD.shape)} and {list(y_VD.shape)}")
    row_N = np.arange(len(x_VD)) if kept_V is None else np.flatnonzero(kept_V)
    total, directed, x_sum_D, y_sum_D = 0.0, 0, np.zeros(x_VD.shape[1]), np.zeros(x_VD.shape[1])
    for block in row_blocks(len(row_N), x_VD.shape[1], itemsize=8):
        x_BD, y_BD = unit_rows(x_VD[row_N[block]]), unit_rows(y_VD[row_N[block]])
        directed_B = x_BD.any(axis=1) & y_BD.any(axis=1)
        if not zero_rows:
            x_BD, y_BD = x_BD[directed_B], y_BD[directed_B]
        total += float(np.vecdot(x_BD, y_BD).sum())
        directed += int(directed_B.sum())
        x_sum_D += x_BD.sum(axis=0)
        y_sum_D += y_BD.sum(axis=0)
    rows_scored = len(row_N) if zero_rows else directed
    if not rows_scored:
        return beside(None, exact_floor(None), rows_left_out=len(row_N))
    floor = exact_floor(float(x_sum_D @ y_sum_D) / rows_scored**2)
    return beside(total / rows_scored, floor, rows=rows_scored, rows_left_out=len(row_N) - rows_scored)


def _permutations(rows: int, draws: int, label_N: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Row permutations, among rows of one label only where there are labels."""
    rng = np.random.default_rng(0)
    labels = [] if label_N is None else [np.flatnonzero(label_N == label) for label in np.unique(label_N)]
    for _ in range(draws):
        if label_N is None:
            yield rng.permutation(rows)
            continue
        order_N = np.arange(rows)
        for members in labels:
            order_N[members] = rng.permutation(members)
        yield order_N


def _reported(orders: Iterator[np.ndarray], draws: int, report: Callable[[str], None]) -> Iterator[np.ndarray]:
    for draw, order in enumerate(orders, 1):
        report(f"floor {draw} of {draws}")
        yield order


def closed_form_floor(fit: str, rows: int, width: int) -> float:
    """What two unrelated isotropic [rows, width] tables score, for rows well above width; at most 1.

    linear: each row keeps a share D/V of its squared length, which is a cosine of sqrt(D/V); ridge at most that.
    orthogonal: the mean singular value of a D x D Gaussian matrix is (8 / 3 pi) sqrt(D) (quarter-circle law), divided
    by sqrt(V).
    """
    root = math.sqrt(width / rows) if rows else 1.0
    return {"identity": 0.0, "orthogonal": min(1.0, 8 / (3 * math.pi) * root)}.get(fit, min(1.0, root))


def mean_cosine(cosine_N: np.ndarray) -> float | None:
    """The mean over rows with a direction; None where there is none."""
    directed_N = cosine_N[~np.isnan(cosine_N)]
    return float(directed_N.mean()) if len(directed_N) else None


def uncorrected(cosine_N: np.ndarray) -> float:
    """The mean over all rows, 0 for those without a direction: the form of arXiv 2603.26663."""
    return float(np.nan_to_num(cosine_N).mean())


def distribution(cosine_N: np.ndarray) -> Distribution:
    """How the cosines of single rows are distributed, rows without a direction left out."""
    directed_N = cosine_N[~np.isnan(cosine_N)]
    levels = {str(q): float(np.quantile(directed_N, q / 100)) for q in QUANTILES} if len(directed_N) else {}
    return Distribution(levels, histogram(cosine_N), bootstrap_mean(cosine_N))


def histogram(cosine_N: np.ndarray) -> list[int]:
    """How many rows have a cosine in each of BINS equal bins over [-1, 1], rows without a direction left out.

    >>> sum(histogram(np.array([0.5, -1.0, np.nan])))
    2
    """
    counts, _ = np.histogram(cosine_N[~np.isnan(cosine_N)], BINS, (-1.0, 1.0))
    return [int(n) for n in counts]


def by_stratum(cosine_N: np.ndarray, chance_N: np.ndarray, masks: Mapping[str, np.ndarray]) -> dict[str, Score]:
    """The score within each stratum, a boolean mask over the same rows: one map for all, floors from the same rows.

    `chance_N` is the mean over the draws, so that how well a floor is known is not.
    """
    return {
        name: beside(
            mean_cosine(cosine_N[stratum_N]),
            drawn_floor([mean_cosine(chance_N[stratum_N])]),
            rows=int(stratum_N.sum()),
        )
        for name, stratum_N in masks.items()
    }


def _score(fit: str, row_cosines: Sequence[RowCosines], closed_form: float) -> Score:
    cosine_N = row_cosines[0].cosines[fit]
    left_out = int(np.isnan(cosine_N).sum())
    chance_scores = [mean_cosine(draw_cosines.cosines[fit]) for draw_cosines in row_cosines[1:]]
    return beside(
        mean_cosine(cosine_N),
        drawn_floor(chance_scores, closed_form),
        rows=len(cosine_N) - left_out,
        rows_left_out=left_out,
    )
