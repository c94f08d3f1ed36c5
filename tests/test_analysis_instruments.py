"""Statistics, gradient flow, evolution, norms: agreement with SciPy and with what can be said in advance."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from tiedjax.analysis.evolution import evolution, row_movement
from tiedjax.analysis.gradients import gradient_flow, output_share
from tiedjax.analysis.norms import norms_by_count
from tiedjax.analysis.records import to_plain, write_json
from tiedjax.analysis.statistics import interval, paired, spearman
from tiedjax.analysis.tokens import most_frequent, token_rows, token_texts
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


# ---- gradients


def metrics(steps: int = 120) -> dict[str, np.ndarray]:
    step = np.arange(1, steps + 1)
    deciles = np.full((steps, 10), np.nan)
    deciles[[0, 7]] = np.arange(10)
    return {
        "step": step,
        "input_grad_norm": np.full(steps, 1.0),
        "output_grad_norm": np.where(step <= 10, 9.0, 3.0),
        "role_grad_cosine": np.where(step <= 10, 0.5, -0.1),
        "input_grad_norm_deciles": deciles,
        "output_grad_norm_deciles": 2 * deciles,
    }


def test_shares_are_averaged_over_the_windows_of_the_paper():
    flow = gradient_flow(metrics())
    assert [(w.first, w.last, w.logged_steps) for w in flow.windows] == [
        (1, 10, 10),
        (11, 50, 40),
        (51, 100, 50),
        (101, 120, 20),
    ]
    assert [w.output_share for w in flow.windows] == pytest.approx([0.9, 0.75, 0.75, 0.75])
    assert [w.cosine for w in flow.windows] == pytest.approx([0.5, -0.1, -0.1, -0.1])
    assert flow.early.output_share == pytest.approx((10 * 0.9 + 40 * 0.75) / 50)
    assert flow.overall.output_share == pytest.approx((10 * 0.9 + 110 * 0.75) / 120)


def test_windows_hold_what_was_logged():
    every = {name: column[9::10] for name, column in metrics().items()}
    flow = gradient_flow(every)
    assert [(w.first, w.logged_steps) for w in flow.windows] == [(1, 1), (11, 4), (51, 5), (101, 2)]
    assert flow.steps == list(range(10, 121, 10))


def test_deciles_come_from_the_steps_that_have_them():
    flow = gradient_flow(metrics())
    assert [d.step for d in flow.deciles] == [1, 8]
    assert flow.deciles[1].output_norm == [2.0 * i for i in range(10)]
    without = {k: v for k, v in metrics().items() if not k.endswith("deciles")}
    assert gradient_flow(without).deciles == []


def test_a_share_of_nothing_is_unknown_and_does_not_spoil_means():
    np.testing.assert_array_equal(output_share(np.array([0.0, 1.0]), np.array([0.0, 1.0])), [np.nan, 0.5])
    columns = metrics()
    columns["input_grad_norm"][0] = columns["output_grad_norm"][0] = 0
    flow = gradient_flow(columns)
    assert flow.windows[0].output_share == pytest.approx(0.9)
    json.dumps(to_plain(flow), allow_nan=False)


def test_a_missing_column_is_named():
    columns = metrics()
    del columns["role_grad_cosine"]
    with pytest.raises(UserError, match="no column 'role_grad_cosine'"):
        gradient_flow(columns)
    with pytest.raises(UserError, match="no step was logged"):
        gradient_flow({name: column[:0] for name, column in metrics().items()})


# ---- evolution


def test_evolution_of_a_known_turn():
    angle = {0: 0.0, 5: 0.3, 9: 1.0}
    rng = np.random.default_rng(0)
    length = rng.uniform(0.5, 2, (3, 40, 1))
    turn = [(step, length[i] * np.tile([np.cos(a), np.sin(a)], (40, 1))) for i, (step, a) in enumerate(angle.items())]
    found = evolution(turn)
    assert found.steps == [0, 5, 9]
    assert found.to_start == pytest.approx(np.cos([0, 0.3, 1.0]))
    assert found.to_previous == pytest.approx(np.cos([0, 0.3, 0.7]))


def test_the_floor_of_evolution_is_chance():
    rng = np.random.default_rng(0)
    start = rng.normal(size=(3000, 30))
    found = evolution([(0, start), (1, start + 0.1 * rng.normal(size=start.shape))])
    assert found.to_start[1] > 0.99
    assert found.floor[1] == pytest.approx(0, abs=4 / np.sqrt(3000 * 30))
    offset = evolution([(0, start + 3), (1, start + 3)])  # rows with a common part are alike by chance already
    assert offset.floor[1] > 0.8


def test_masked_rows_and_rows_of_zeros_do_not_count():
    rng = np.random.default_rng(0)
    start, end = rng.normal(size=(2, 20, 4))
    mask = np.arange(20) < 15
    wanted = evolution([(0, start[mask]), (3, end[mask])])
    assert evolution([(0, start), (3, end)], mask) == wanted
    padded = [(step, np.vstack([t[mask], np.zeros((2, 4))])) for step, t in [(0, start), (3, end)]]
    assert evolution(padded).to_start == pytest.approx(wanted.to_start)
    assert np.isnan(row_movement(padded[0][1], padded[1][1])[-2:]).all()


# ---- norms


def test_spearman_is_that_of_scipy_with_ties():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=500), rng.integers(0, 20, 500)
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
    assert spearman(second**3.0, second) == pytest.approx(1)
    assert spearman(-second, second) == pytest.approx(-1)
    assert spearman(np.ones(5), np.arange(5)) is None
    assert spearman(np.ones(1), np.ones(1)) is None


def test_norms_fall_into_bins_of_log_count():
    count = np.array([0, 0, 1, 2, 9, 99, 100, 999])
    table = np.zeros((8, 3))
    table[:, 1] = [5, 7, 1, 3, 2, 4, 6, 8]
    found = norms_by_count(table, count)
    # log10(count + 1) = 0, 0, 0.30, 0.48, 1.0, 2.0, 2.004, 3.0
    assert [(b.low, b.high, b.rows) for b in found.bins] == [
        (0, 0, 2),
        (0, 0.5, 2),
        (1, 1.5, 1),
        (2, 2.5, 2),
        (3, 3.5, 1),
    ]
    assert [b.mean for b in found.bins] == [6, 2, 2, 5, 8]
    assert found.seen_rows == 6
    assert found.spearman == pytest.approx(stats.spearmanr([1, 3, 2, 4, 6, 8], count[2:]).statistic)
    with pytest.raises(UserError, match="the table has 8 rows but there are counts for 7 tokens"):
        norms_by_count(table, count[1:])


def test_independent_norms_correlate_as_chance_does():
    rng = np.random.default_rng(2)
    found = norms_by_count(rng.normal(size=(4000, 8)), rng.integers(1, 1000, 4000))
    assert abs(found.spearman - found.floor) < 3 * found.floor_standard_error


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
