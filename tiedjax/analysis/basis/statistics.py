"""Intervals over seeds and over rows, means over steps, and rank correlation.

Axes: N values, G groups of them, R resamples.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
FEWEST = 30  # values or groups of them of which a bootstrap's interval holds the mean as often as it says


@dataclass(frozen=True)
class Interval:
    """A value with its two-sided interval; low and high are None where there is none, as for fewer than two seeds.

    `p_value` and `at` are those of Student's t, of the intervals that `interval` and `paired` give.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    confidence: float

    @property
    def half_width(self) -> float | None:
        """Half of high - low; None without an interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside of the interval; False without one."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def p_value(self) -> float | None:
        """Two-sided p of Student's t test that the mean is 0 (n - 1 degrees of freedom); None without an interval."""
        if self.mean is None or self.half_width is None:
            return None
        if self.half_width == 0:
            return 1.0 if self.mean == 0 else 0.0
        from scipy.special import stdtr

        t = abs(self.mean) / self.half_width * _t_quantile(self.n - 1, self.confidence)
        return float(2 * stdtr(self.n - 1, -t))

    def at(self, confidence: float) -> Interval:
        """The same Student-t interval at another confidence."""
        if self.mean is None or self.half_width is None:
            return dataclasses.replace(self, confidence=confidence)
        half = self.half_width * _t_quantile(self.n - 1, confidence) / _t_quantile(self.n - 1, self.confidence)
        return Interval(self.mean, self.mean - half, self.mean + half, self.n, confidence)


def detectable(measured: Interval, power: float) -> float:
    """The smallest true mean that Student's t test at the interval's confidence finds with this probability.

    With the interval's own n and standard error; the test statistic has a noncentral t distribution (Cohen 1988,
    Statistical Power Analysis, chapter 2).
    """
    from scipy.special import nctdtrinc

    assert measured.half_width is not None
    degrees, critical = measured.n - 1, _t_quantile(measured.n - 1, measured.confidence)
    noncentrality = nctdtrinc(degrees, 1 - power, critical)  # the test's other side adds nothing that counts
    return float(noncentrality) * measured.half_width / critical


def _t_quantile(degrees: int, confidence: float) -> float:
    from scipy.special import stdtrit  # the t quantile without the seconds that importing scipy.stats takes

    return float(stdtrit(degrees, (1 + confidence) / 2))


def holm_levels(p_values: Sequence[float], level: float = 1 - CONFIDENCE) -> list[float]:
    """The level at which each of n statements is tested so that all together err with probability `level` at most.

    Holm 1979, Scand. J. Statist. 6: the k-th smallest p is held against level / (n - k + 1), until one fails; that one
    and all after it are held against the level of the first that failed. A statement is decided where p < its level.
    """
    n = len(p_values)
    levels, failed = [level] * n, None
    for rank, place in enumerate(sorted(range(n), key=p_values.__getitem__)):
        levels[place] = failed or level / (n - rank)
        if failed is None and p_values[place] >= levels[place]:
            failed = levels[place]
    return levels


def interval(values: Iterable[float | None], confidence: float = CONFIDENCE) -> Interval:
    """Mean and Student-t interval, mean +- t(n-1) * s / sqrt(n); values that are None or NaN do not count."""
    finite_N = np.array([v for v in values if v is not None and not math.isnan(v)], np.float64)
    n = len(finite_N)
    if n == 0:
        return Interval(None, None, None, 0, confidence)
    mean = float(finite_N.mean())
    if n == 1:
        return Interval(mean, None, None, 1, confidence)
    half = float(_t_quantile(n - 1, confidence) * finite_N.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n, confidence)


def paired(
    first: Mapping[int, float | None], second: Mapping[int, float | None], confidence: float = CONFIDENCE
) -> Interval:
    """Interval of first - second over the seeds that both have."""
    differences = [
        a - b for seed in first if seed in second and (a := first[seed]) is not None and (b := second[seed]) is not None
    ]
    return interval(differences, confidence)


def bootstrap_mean(
    values: np.ndarray, *, draws: int = 1000, confidence: float = CONFIDENCE, groups: np.ndarray | None = None
) -> Interval:
    """Mean with its percentile bootstrap interval over `values` [N]; NaN do not count.

    Resamples the values (with `groups` [N], whole groups of equal labels) `draws` times from
    `numpy.random.default_rng(0)` (Efron 1979). Says how the mean would vary over other rows, not over seeds.
    Of fewer than `FEWEST` values or groups, whose bootstrap is too narrow (of 2 values it holds the mean in half of
    all cases), Student's t interval of a ratio of sums (Cochran 1977, Sampling Techniques, section 6.3).
    """
    kept_N = np.isfinite(values)
    values = np.asarray(values, np.float64)[kept_N]
    if not len(values):
        return Interval(None, None, None, 0, confidence)
    sum_G, size_G = values, np.ones(len(values))
    if groups is not None:
        _, label_N = np.unique(np.asarray(groups)[kept_N], return_inverse=True)
        sum_G, size_G = np.bincount(label_N, values), np.bincount(label_N).astype(np.float64)
    n, mean = len(sum_G), float(values.mean())
    if n == 1:
        return Interval(mean, None, None, 1, confidence)
    if n < FEWEST:
        error = math.sqrt(n / (n - 1) * np.sum(np.square(sum_G - mean * size_G))) / size_G.sum()
        half = _t_quantile(n - 1, confidence) * error
        return Interval(mean, mean - half, mean + half, n, confidence)
    mean_R = np.concatenate([(times @ sum_G) / (times @ size_G) for times in _resamples(n, draws)])
    low, high = np.quantile(mean_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(low), float(high), n, confidence)


def _resamples(n: int, draws: int) -> Iterable[np.ndarray]:
    """How often each of n values is drawn, [draws, n] in blocks: the same in every call, and kept while it is small."""
    return [_resample_counts(n, draws)] if n * draws <= 2**22 else _resample_blocks(n, draws)


@functools.lru_cache(maxsize=4)
def _resample_counts(n: int, draws: int) -> np.ndarray:
    return np.concatenate(list(_resample_blocks(n, draws)))


def _resample_blocks(n: int, draws: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for _ in range(draws):
        yield np.bincount(rng.integers(0, n, n), minlength=n)[None].astype(np.float64)


def over_steps(step_S: np.ndarray, value_S: np.ndarray, first: int, last: int) -> float | None:
    """The mean over the updates from `first` to `last` of what was logged after updates [S]; None where none was.

    Between those that were logged it goes along a straight line: early updates are logged more often than later ones
    where not all are. What is not a number was not logged.

    >>> over_steps(np.array([1, 2, 4]), np.array([1.0, 2.0, 4.0]), 1, 4)
    2.5
    """
    logged_S = np.isfinite(value_S)
    at_S = np.asarray(step_S)[logged_S]
    if not len(at_S):
        return None
    steps = np.arange(max(first, at_S[0]), min(last, at_S[-1]) + 1)
    return float(np.interp(steps, at_S, np.asarray(value_S)[logged_S]).mean()) if len(steps) else None


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's rank correlation, ties sharing their mean rank; None when either side does not vary."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def spearman_interval(correlation: float | None, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Interval of a rank correlation over n independent pairs, by Fisher's z with variance (1 + r^2 / 2) / (n - 3).

    Bonett and Wright 2000, Psychometrika 65. No interval for n below 4.
    """
    if correlation is None or n < 4:
        return Interval(correlation, None, None, n, confidence)
    from scipy.special import ndtri

    z = math.atanh(max(-1 + 1e-15, min(1 - 1e-15, correlation)))
    half = float(ndtri((1 + confidence) / 2)) * math.sqrt((1 + correlation**2 / 2) / (n - 3))
    return Interval(correlation, math.tanh(z - half), math.tanh(z + half), n, confidence)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, float64; equal values share their mean rank."""
    order_N = np.argsort(values)
    sorted_N = values[order_N]
    first_G = np.flatnonzero(np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]])[: len(values)])
    size_G = np.diff(first_G, append=len(values))
    rank_N = np.empty(len(values))
    rank_N[order_N] = np.repeat(first_G + (size_G + 1) / 2, size_G)
    return rank_N
