"""Statistics, example tokens, records: agreement with SciPy and with what can be said in advance."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from tiedjax.analysis.basis.records import to_plain, write_json
from tiedjax.analysis.basis.statistics import interval, paired, spearman
from tiedjax.analysis.basis.tokens import most_frequent, token_texts
from tiedjax.analysis.study.examples import token_rows
from tiedjax.errors import UserError

# ---- statistics


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_intervals_are_those_of_student(n, confidence):
    values = np.random.default_rng(n).normal(3, 2, n)
    found = interval(values, confidence)
    low, high = stats.t.interval(confidence, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high))
    assert found.half_width == pytest.approx((high - low) / 2)
    assert found.n == n


def test_one_seed_has_a_mean_and_no_interval():
    found = interval([0.25])
    assert (found.mean, found.low, found.high, found.half_width, found.n) == (0.25, None, None, None, 1)
    assert not found.excludes_zero


def test_no_seed_has_nothing_and_unknown_values_do_not_count():
    assert interval([]).mean is None
    assert interval([None, 1.0, float("nan"), 3.0]) == interval([1.0, 3.0])


def test_intervals_cover_as_often_as_they_say():
    draws = np.random.default_rng(0).normal(1, 1, (2000, 4))
    covered = np.mean([(found := interval(row)).low <= 1 <= found.high for row in draws])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_pairing_by_seed_removes_what_the_seeds_share():
    rng = np.random.default_rng(1)
    shared, noise = 10 * rng.normal(size=5), 0.1 * rng.normal(size=5)
    a, b = {s: shared[s] + 1 + noise[s] for s in range(5)}, {s: shared[s] for s in range(5)}
    found = paired(a, b | {9: 3.0})
    reference = stats.ttest_rel([a[s] for s in range(5)], [b[s] for s in range(5)]).confidence_interval()
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))
    assert found.n == 5
    assert found.excludes_zero
    assert not interval([*a.values()]).excludes_zero


def test_spearman_is_that_of_scipy_with_ties():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=500), rng.integers(0, 20, 500)
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
    assert spearman(second**3.0, second) == pytest.approx(1)
    assert spearman(-second, second) == pytest.approx(-1)
    assert spearman(np.ones(5), np.arange(5)) is None
    assert spearman(np.ones(1), np.ones(1)) is None


# ---- tokens and records


def test_example_tokens_are_the_most_frequent_seen_ones():
    assert most_frequent(np.array([[9, 9, 9, 9], [0, 5, 0, 7]]), 3) == [3, 1]
    assert token_texts(None, [3, 1]) == ["[3]", "[1]"]
    start = {"shared": np.eye(4)}
    end = {"shared": np.roll(np.eye(4), 1, axis=1) + np.eye(4)}
    rows = token_rows({"shared": start["shared"][[3, 1]]}, {"shared": end["shared"][[3, 1]]})
    assert rows[0]["shared"]["norm"] == pytest.approx(np.sqrt(2))
    assert rows[0]["shared"]["cosine_to_start"] == pytest.approx(np.sqrt(0.5))


def test_records_hold_no_nan_and_no_numpy(tmp_path):
    odd = {1: np.float32(0.5), "a": [np.nan, np.inf, np.int64(3)], "b": np.array([[1.0, np.nan]]), "c": (True, None)}
    assert to_plain(odd) == {"1": 0.5, "a": [None, None, 3], "b": [[1.0, None]], "c": [True, None]}
    write_json(tmp_path / "x.json", odd)
    assert json.loads((tmp_path / "x.json").read_text()) == to_plain(odd)
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    with pytest.raises(UserError, match="cannot be written"):
        write_json(tmp_path / "missing" / "y.json", odd)
