"""How a verdict is reached: Student's t, Holm's method, and what chance alone decides."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from tiedjax.analysis.basis.statistics import Interval, holm_levels, interval
from tiedjax.analysis.study.verdicts import Statement, decided


def test_p_and_intervals_are_those_of_scipy() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, 6)
    made = interval(values)
    assert made.p_value == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    ends = stats.t.interval(0.99, 5, loc=values.mean(), scale=stats.sem(values))
    assert (made.at(0.99).low, made.at(0.99).high) == pytest.approx(ends)
    assert made.at(0.99).at(0.95).low == pytest.approx(made.low)
    assert interval([0.2]).p_value is None
    assert interval([0.2, 0.2]).p_value == 0.0
    assert interval([0.0, 0.0]).p_value == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_holm_decides_what_the_closed_test_of_bonferroni_decides(seed: int) -> None:
    """Marcus, Peritz and Gabriel 1976: a statement is decided if every set of statements that holds it is."""
    rng = np.random.default_rng(seed)
    p = rng.choice([0.001, 0.004, 0.011, 0.013, 0.02, 0.03, 0.2, 0.9], 6).tolist()
    levels = holm_levels(p)
    for i in range(len(p)):
        others = [j for j in range(len(p)) if j != i]
        sets = itertools.chain.from_iterable(itertools.combinations(others, k) for k in range(len(p)))
        closed = all(min(p[j] for j in (i, *rest)) < 0.05 / (1 + len(rest)) for rest in sets)
        assert (p[i] < levels[i]) == closed


def test_verdicts_follow_the_sign_and_the_corrected_level() -> None:
    rng = np.random.default_rng(1)
    clear = lambda mean: Interval(mean, mean - 0.1, mean + 0.1, 5, 0.95)
    made = {
        "up": Statement("goes up", clear(1.0)),
        "down": Statement("goes down", clear(-1.0)),
        "flat": Statement("goes", clear(0.01)),
        "edge": Statement("nearly", Interval(0.14, 0.01, 0.27, 5, 0.95)),
        "lone": Statement("once", Interval(0.5, None, None, 1, 0.95)),
        "none": Statement("never", Interval(None, None, None, 0, 0.95)),
    }
    verdicts = decided(made)
    assert {name: record["verdict"] for name, record in verdicts.items()} == {
        "up": "holds",
        "down": "the opposite",
        "flat": "undecided",
        "edge": "undecided",  # alone its 95 % interval would exclude 0: four are tested
        "lone": "undecided",
    }
    assert [name for name, record in verdicts.items() if record["near_edge"]] == ["edge"]
    for record in verdicts.values():
        if record["interval"]:
            low, high = record["interval"]
            assert (low > 0 or high < 0) == (record["verdict"] != "undecided")
    nulls = {str(i): Statement("", interval(rng.normal(0, 1, 5))) for i in range(12)}
    assert verdicts["up"]["level"] == pytest.approx(0.05 / 4)
    assert len(decided(nulls)) == 12


def test_twelve_null_statements_decide_anything_in_at_most_a_twentieth_of_studies() -> None:
    rng = np.random.default_rng(2)
    studies = 2000
    any_decided = alone = 0
    for _ in range(studies):
        spans = [interval(values) for values in rng.normal(0, 1, (12, 5))]
        p = [made.p_value or 0.0 for made in spans]
        any_decided += any(value < level for value, level in zip(p, holm_levels(p), strict=True))
        alone += min(p) < 0.05
    assert any_decided / studies < 0.05 + 3 * np.sqrt(0.05 * 0.95 / studies)
    assert alone / studies > 0.4  # what Holm's correction is for
