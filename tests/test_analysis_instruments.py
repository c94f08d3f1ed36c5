"""Statistics, example tokens, records: agreement with SciPy and with what can be said in advance."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from importlib import import_module
from inspect import signature

import numpy as np
import pytest
from scipy import stats

from tiedjax import analysis
from tiedjax.analysis.basis.chance import Score, beside, drawn_floor, exact_floor
from tiedjax.analysis.basis.directions import centre, unit_rows, with_direction
from tiedjax.analysis.basis.plain_json import Measurement, from_plain, measured, not_measured, to_plain, write_json
from tiedjax.analysis.basis.statistics import Interval, bootstrap_mean, interval, over_steps, paired, spearman
from tiedjax.analysis.basis.tokens import most_frequent, token_texts
from tiedjax.analysis.instruments import INSTRUMENTS
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


# ---- one measure for command and report


@pytest.mark.parametrize("name", [name for name in INSTRUMENTS if name not in ("spectrum", "map")])
def test_a_command_has_the_defaults_of_the_function_that_the_report_calls(name):
    """Commands must not import NumPy before they run, so that their defaults are written a second time."""
    parser = argparse.ArgumentParser()
    INSTRUMENTS[name].add_arguments(parser)
    given = vars(parser.parse_args(["a", "b"] if INSTRUMENTS[name].SUBJECT == "pair" else ["a"]))
    package = INSTRUMENTS[name].__package__
    measure = getattr(analysis, name) if name in analysis.__all__ else import_module(f"{package}.section").measure
    defaults = {parameter.name: parameter.default for parameter in signature(measure).parameters.values()}
    common = {key for key in given if key in defaults and given[key] is not None}
    assert {key: given[key] for key in common} == {key: defaults[key] for key in common}
    numbers = {key for key, value in given.items() if isinstance(value, int) and not isinstance(value, bool)}
    elsewhere = {"cooccurrence": {"sample", "least_count"}, "gradients": {"half_life"}}.get(name, set())
    assert numbers == (common & numbers) | elsewhere


def test_defaults_of_commands_whose_functions_have_other_names():
    parsed = {}
    for name in ("spectrum", "map", "cooccurrence", "gradients"):
        parser = argparse.ArgumentParser()
        INSTRUMENTS[name].add_arguments(parser)
        parsed[name] = parser.parse_args(["a"])
    default = lambda function, name: signature(function).parameters[name].default
    assert parsed["spectrum"].draws == default(analysis.spectrum, "draws") == default(analysis.similarity, "draws")
    assert parsed["map"].neighbours == default(analysis.picture, "neighbours")
    assert parsed["map"].method == default(analysis.picture, "method")
    assert parsed["cooccurrence"].sample == default(analysis.contexts_of, "sample")
    assert parsed["cooccurrence"].least_count == default(analysis.contexts_of, "least_count")
    assert parsed["gradients"].half_life == default(analysis.smooth, "half_life")


def test_a_score_stands_beside_the_mean_of_its_draws():
    score = beside(0.6, drawn_floor([0.1, None, 0.3]), rows=5)
    assert (score.floor, score.floor_draws, score.rows) == (0.2, 2, 5)
    assert score.floor_deviation == pytest.approx(np.std([0.1, 0.3], ddof=1))
    assert score.floor_standard_error == pytest.approx(stats.sem([0.1, 0.3]))
    assert (score.corrected, score.excess) == pytest.approx((0.5, 0.4))
    assert beside(0.6, drawn_floor([0.1, 0.3]), similarity=False).corrected is None
    assert beside(0.6, drawn_floor([])) == Score(0.6, None)
    assert beside(None, drawn_floor([0.2])).excess is None
    assert beside(1.0, drawn_floor([1.0])).corrected is None, "chance alone reaches 1"
    exact = beside(0.6, exact_floor(0.2, deviation=0.1))
    assert (exact.floor_standard_error, exact.floor_deviation, exact.floor_draws) == (0.0, 0.1, 0)
    assert exact.corrected == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_row_without_a_direction_is_one_of_zeros_or_one_that_rounding_leaves_of_the_mean(dtype, scale):
    rows = np.random.default_rng(0).normal(size=(300, 8))
    rows[4] = 0
    rows[7] = np.delete(rows, 7, axis=0).mean(axis=0)  # the mean of all is then this row
    table = (scale * rows).astype(dtype)
    assert np.flatnonzero(~with_direction(table)).tolist() == [4]
    equal = np.repeat(table[:1], 300, axis=0)
    assert not with_direction(equal, *centre(equal)).any()
    about = with_direction(table, *centre(table))
    assert about[np.arange(300) != 7].all()
    assert about[7] == (dtype == np.float32), "float32 rounds the row itself away from the mean"
    assert np.linalg.norm(unit_rows(table), axis=1) == pytest.approx((np.arange(300) != 4).astype(float))


# ---- tokens and records


def test_example_tokens_are_the_most_frequent_seen_ones():
    assert most_frequent(np.array([[9, 9, 9, 9], [0, 5, 0, 7]]), 3) == [3, 1]
    assert token_texts(None, [3, 1]) == ["[3]", "[1]"]
    start = {"shared": np.eye(4)}
    end = {"shared": np.roll(np.eye(4), 1, axis=1) + np.eye(4)}
    rows = token_rows({"shared": start["shared"][[3, 1]]}, {"shared": end["shared"][[3, 1]]})
    assert rows[0]["shared"]["norm"] == pytest.approx(np.sqrt(2))
    assert rows[0]["shared"]["cosine_to_start"] == pytest.approx(np.sqrt(0.5))


@dataclass(frozen=True)
class Inner:
    scores: dict[str, Score]
    pair: tuple[int, int]
    bins: list[list[float]]
    span: Interval | None = None


def test_results_come_back_from_json_as_the_dataclasses_that_they_were():
    value = Inner({"rare": beside(0.6, drawn_floor([0.1, 0.3]))}, (1, 2), [[0.5], []], interval([1.0, 2.0]))
    record = {"arm": "tied", "seed": 3, "role": "shared", "sha256": "0"} | to_plain(value)
    record = json.loads(json.dumps(record))
    other = record | {"subject_role": "output", "reference_role": "input", "seed": 4}
    failed = {"arm": "tied", "seed": 5, "role": "shared", "not_measured": "why"}
    assert measured([record, failed, other], Inner) == [
        Measurement("tied", 3, "shared", "", value),
        Measurement("tied", 4, "output", "input", value),
    ]
    assert not_measured([record, failed, failed]) == ["why"]
    assert from_plain(Inner, {k: v for k, v in record.items() if k != "span"}).span is None
    with pytest.raises(UserError) as error:
        from_plain(Inner, {k: v for k, v in record.items() if k != "pair"})
    assert str(error.value) == "results: there is no 'pair'; `tiedjax study` analyses the finished runs again"


def test_records_hold_no_nan_and_no_numpy(tmp_path):
    odd = {1: np.float32(0.5), "a": [np.nan, np.inf, np.int64(3)], "b": np.array([[1.0, np.nan]]), "c": (True, None)}
    assert to_plain(odd) == {"1": 0.5, "a": [None, None, 3], "b": [[1.0, None]], "c": [True, None]}
    write_json(tmp_path / "x.json", odd)
    assert json.loads((tmp_path / "x.json").read_text()) == to_plain(odd)
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    with pytest.raises(UserError, match="cannot be written"):
        write_json(tmp_path / "missing" / "y.json", odd)


def test_few_groups_have_an_interval_that_covers_as_often_as_it_says():
    """Of 4 groups a percentile bootstrap holds the mean in four cases of five."""
    rng = np.random.default_rng(0)
    for n in (2, 4, 8):
        draws = rng.normal(1, 1, (2000, n, 3)) + rng.normal(0, 2, (2000, n, 1))
        labels = np.repeat(np.arange(n), 3)
        found = [bootstrap_mean(values.ravel(), groups=labels) for values in draws]
        assert np.mean([one.low <= 1 <= one.high for one in found]) == pytest.approx(0.95, abs=0.015)
        means = draws[0].mean(axis=1)
        assert (found[0].low, found[0].high) == pytest.approx((interval(means).low, interval(means).high))


def test_groups_of_unequal_size_have_the_interval_of_a_ratio():
    values, labels = np.array([1.0, 2.0, 4.0, 8.0, 3.0]), np.array([0, 0, 1, 2, 2])
    residuals = np.array([3 - 2 * 3.6, 4 - 3.6, 11 - 2 * 3.6])
    error = np.sqrt(3 / 2 * np.sum(residuals**2)) / 5
    found = bootstrap_mean(values, groups=labels)
    assert (found.mean, found.n) == (pytest.approx(3.6), 3)
    assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, 2) * error)


@pytest.mark.parametrize(("low", "high", "excludes"), [(-0.003, 0.95, False), (0.001, 2.0, True), (-2.0, -0.1, True)])
def test_an_interval_that_is_not_symmetric_excludes_0_where_0_lies_outside(low, high, excludes):
    assert Interval(0.493 if low < 0.5 and high > 0 else -1.0, low, high, 8, 0.95).excludes_zero == excludes


def test_means_over_steps_do_not_hang_on_which_steps_were_logged():
    """Of a curve whose early steps are logged more often."""
    every = np.arange(1, 1001)
    curve = 1 / np.sqrt(every)
    logged = np.array(sorted({1, 2, 4, 8, 16, 32, 64, *range(10, 1001, 10)}))
    assert over_steps(every, curve, 1, 1000) == pytest.approx(curve.mean())
    assert over_steps(logged, curve[logged - 1], 1, 1000) == pytest.approx(curve.mean(), rel=0.02)
    assert curve[logged - 1].mean() > 1.1 * curve.mean()
    holed = np.where(every == 5, np.nan, curve)
    assert over_steps(every, holed, 5, 5) == pytest.approx((curve[3] + curve[5]) / 2)
    assert over_steps(every, np.full(1000, np.nan), 1, 1000) is None
    assert over_steps(np.array([5, 9]), np.ones(2), 1, 4) is None
