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

import numpy as np

from tiedjax.analysis.basis.blocked import row_blocks
from tiedjax.analysis.basis.chance import correct
from tiedjax.analysis.basis.statistics import Interval, bootstrap_mean
from tiedjax.analysis.instruments.alignment.fitting import FITS, Measured, Pair
from tiedjax.errors import UserError

DRAWS = 5
BINS = 40
QUANTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class Score:
    """One fit's mean cosine beside its floor; None where no row has a direction. `penalty` is that of ridge."""

    score: float | None
    floor: float | None
    floor_standard_error: float | None
    floor_draws: int
    floor_closed_form: float
    corrected: float | None
    rows_left_out: int
    penalty: float | None = None


@dataclass(frozen=True)
class RawCosine:
    """The mean cosine of rows that are not centred; None where no row counts.

    `floor` is its mean over all permutations of Y's rows, exactly: the product of the two mean directions. So tables
    with a common mean row have a high one.
    """

    score: float | None
    floor: float | None
    corrected: float | None
    rows_left_out: int


@dataclass(frozen=True)
class Distribution:
    """Of the cosines of single rows: quantiles by percentage, counts of BINS equal bins over [-1, 1], and the mean with
    its bootstrap interval over rows, the map held fixed."""

    quantiles: dict[str, float]
    histogram: list[int]
    mean: Interval


@dataclass(frozen=True)
class Stratum:
    """The score of some of the rows."""

    rows: int
    score: float | None
    floor: float | None
    corrected: float | None


@dataclass(frozen=True)
class Alignment:
    """Scores per fit of X mapped onto Y over `rows` rows, and what they are means of.

    Attributes:
      held_out: the same scores for rows that the map was not fitted on; empty unless asked for.
      cosines: per fit, the cosine of each row [rows]; NaN for rows without a direction.
      chance: per fit, the mean cosine of each row of X over the permutations [rows].
    """

    rows: int
    width: int
    target_width: int
    scores: dict[str, Score]
    held_out: dict[str, Score] = field(default_factory=dict)
    cosines: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    chance: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)


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
    pair = Pair(x_VD, y_VD, fits, rows, held_out)
    labels = None if within is None else within if rows is None else within[rows]
    rng = np.random.default_rng(0)
    found = [pair.measure()]
    for draw in range(draws):
        report(f"floor {draw + 1} of {draws}")
        found.append(pair.measure(_permutation(rng, pair.rows, labels)))
    whole, halves = [inside for inside, _ in found], [outside for _, outside in found if outside]
    shape = (pair.rows, x_VD.shape[1])
    return Alignment(
        rows=pair.rows,
        width=x_VD.shape[1],
        target_width=y_VD.shape[1],
        scores={fit: _score(fit, whole, closed_form_floor(fit, *shape)) for fit in fits},
        held_out={fit: _score(fit, halves, 0.0) for fit in fits if halves},
        cosines=whole[0].cosines,
        chance={fit: np.mean([each.cosines[fit] for each in whole[1:]], axis=0) for fit in fits if draws},
    )


def raw_cosine(
    x_VD: np.ndarray, y_VD: np.ndarray, *, rows: np.ndarray | None = None, zero_rows: bool = False
) -> RawCosine:
    """The mean over rows of cosine(row of X, row of Y), nothing centred, with its floor.

    `rows` is a boolean [V] mask of the rows that count. Rows that are all zero in either table are left out and
    counted, unless `zero_rows`: then their cosine is 0. UserError: tables of different shapes.

    >>> raw_cosine(np.array([[3.0, 0.0], [1.0, 1.0]]), np.array([[5.0, 0.0], [0.0, 2.0]])).score
    0.8535533905932737
    """
    if x_VD.shape != y_VD.shape:
        raise UserError(f"align: the raw cosine needs equal shapes, got {list(x_VD.shape)} and {list(y_VD.shape)}")
    kept = np.arange(len(x_VD)) if rows is None else np.flatnonzero(rows)
    total, known, x_D, y_D = 0.0, 0, np.zeros(x_VD.shape[1]), np.zeros(x_VD.shape[1])
    for block in row_blocks(len(kept), x_VD.shape[1], itemsize=8):
        x, y = _directions(x_VD[kept[block]]), _directions(y_VD[kept[block]])
        both = x.any(axis=1) & y.any(axis=1)
        if not zero_rows:
            x, y = x[both], y[both]
        total += float(np.vecdot(x, y).sum())
        known += int(both.sum())
        x_D += x.sum(axis=0)
        y_D += y.sum(axis=0)
    counted = len(kept) if zero_rows else known
    if not counted:
        return RawCosine(None, None, None, len(kept))
    score, floor = total / counted, float(x_D @ y_D) / counted**2
    return RawCosine(score, floor, correct(score, floor), len(kept) - counted)


def _directions(rows_ND: np.ndarray) -> np.ndarray:
    """Rows of length 1, float64; rows of zeros stay so."""
    rows = np.asarray(rows_ND, np.float64)
    peak = np.abs(rows).max(axis=1, keepdims=True)
    rows = rows / np.where(peak == 0, 1, peak)  # by the largest entry first: its square always is a float
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length == 0, 1, length)


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


def by_stratum(cosines: np.ndarray, chance: np.ndarray, strata: Mapping[str, np.ndarray]) -> dict[str, Stratum]:
    """The score within each stratum, a boolean mask over the same rows: one map for all, floors from the same rows."""
    found = {}
    for name, rows in strata.items():
        score, floor = mean_cosine(cosines[rows]), mean_cosine(chance[rows])
        found[name] = Stratum(int(rows.sum()), score, floor, correct(score, floor))
    return found


def _score(fit: str, measured: Sequence[Measured], closed_form: float) -> Score:
    cosines = measured[0].cosines[fit]
    score = mean_cosine(cosines)
    floors = [value for each in measured[1:] if (value := mean_cosine(each.cosines[fit])) is not None]
    n = len(floors)
    floor = float(np.mean(floors)) if n else None
    return Score(
        score=score,
        floor=floor,
        floor_standard_error=float(np.std(floors, ddof=1) / math.sqrt(n)) if n > 1 else None,
        floor_draws=n,
        floor_closed_form=closed_form,
        corrected=correct(score, floor),
        rows_left_out=int(np.isnan(cosines).sum()),
        penalty=measured[0].penalty if fit == "ridge" else None,
    )
