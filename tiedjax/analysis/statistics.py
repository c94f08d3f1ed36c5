"""Intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its two-sided Student-t interval; low and high are None for fewer than two seeds."""

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
        """Whether the mean is farther from 0 than half the interval's width; False without an interval."""
        return self.mean is not None and self.half_width is not None and abs(self.mean) > self.half_width


def interval(values: Iterable[float | None], confidence: float = CONFIDENCE) -> Interval:
    """Mean and Student-t interval, mean +- t(n-1) * s / sqrt(n); values that are None or NaN do not count."""
    known = np.array([v for v in values if v is not None and not math.isnan(v)], np.float64)
    n = len(known)
    if n == 0:
        return Interval(None, None, None, 0, confidence)
    mean = float(known.mean())
    if n == 1:
        return Interval(mean, None, None, 1, confidence)
    from scipy.special import stdtrit  # the t quantile without the seconds that importing scipy.stats takes

    half = float(stdtrit(n - 1, (1 + confidence) / 2) * known.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n, confidence)


def paired(
    first: Mapping[int, float | None], second: Mapping[int, float | None], confidence: float = CONFIDENCE
) -> Interval:
    """Interval of first - second over the seeds that both have."""
    differences = [
        a - b for seed in first if seed in second and (a := first[seed]) is not None and (b := second[seed]) is not None
    ]
    return interval(differences, confidence)
