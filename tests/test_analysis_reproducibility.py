"""The correction for what training does not reproduce."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tiedjax.analysis.reproducibility import disattenuated, jackknife

SEEDS = range(4)


def repeated(signal: np.ndarray, noise: float, of: int) -> list[np.ndarray]:
    rng = np.random.default_rng(of)
    return [signal + noise * rng.normal(size=signal.shape) for _ in SEEDS]


def nearness(first: list[np.ndarray], second: list[np.ndarray]) -> dict[tuple[int, int], float | None]:
    return {(i, j): float(np.corrcoef(first[i], second[j])[0, 1]) for i, j in itertools.permutations(SEEDS, 2)}


def test_the_correlation_of_the_signals_is_recovered_from_noisy_repetitions():
    rng = np.random.default_rng(0)
    a = rng.normal(size=100_000)
    b = 0.6 * a + 0.8 * rng.normal(size=100_000)
    A, B = repeated(a, 1.0, 1), repeated(b, 2.0, 2)
    cross = nearness(A, B)
    assert np.mean(list(cross.values())) < 0.2
    assert disattenuated(cross, nearness(A, A), nearness(B, B), SEEDS) == pytest.approx(0.6, abs=0.01)


def test_a_table_without_repetition_has_no_corrected_nearness():
    pairs = {(0, 1): 0.3, (1, 0): 0.3}
    assert disattenuated(pairs, {(0, 1): -0.1, (1, 0): -0.1}, pairs, [0, 1]) is None
    assert disattenuated(pairs, {}, pairs, [0, 1]) is None
    assert disattenuated(pairs, pairs, pairs, [0, 1]) == pytest.approx(1)


def test_the_jackknife_of_a_mean_is_the_t_interval_of_a_mean():
    from scipy import stats

    values = {0: 0.2, 1: 0.5, 2: 0.9, 3: 0.4}
    found = jackknife(lambda seeds: sum(values[s] for s in seeds) / len(seeds), list(values))
    low, high = stats.t.interval(0.95, 3, loc=0.5, scale=stats.sem(list(values.values())))
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, low, high))


def test_two_seeds_or_a_missing_value_give_no_interval():
    assert jackknife(lambda seeds: 1.0, [0, 1]).low is None
    assert jackknife(lambda seeds: None if 0 not in seeds else 1.0, [0, 1, 2]).low is None
    assert jackknife(lambda seeds: None, [0, 1, 2]).mean is None
