"""Norm and frequency: agreement with SciPy and brute force, planted structure, and chance."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_analysis_command import analyze

from tiedjax.analysis.basis import linear_maps
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.instruments.norms import section
from tiedjax.analysis.instruments.norms.norms import measure as norms_by_count
from tiedjax.analysis.instruments.norms.probe import FOLDS, frequency_probe
from tiedjax.errors import UserError

rng = np.random.default_rng(0)
TABLE = (rng.normal(size=(900, 10)) * rng.uniform(0.1, 3, 10) + rng.normal(size=10)).astype(np.float32)
COUNT = np.round(10 ** rng.uniform(0, 4, 900)).astype(np.int64)


def test_norms_fall_into_bins_of_log_count():
    count = np.array([0, 0, 1, 2, 9, 99, 100, 999])
    table = np.zeros((8, 3))
    table[:, 1] = [5, 7, 1, 3, 2, 4, 6, 8]
    found = norms_by_count(table, count)
    # log10(count + 1) = 0, 0, 0.30, 0.48, 1.0, 2.0, 2.004, 3.0
    assert [(b.low, b.high, b.rows) for b in found.norm.bins] == [
        (0, 0, 2),
        (0, 0.5, 2),
        (1, 1.5, 1),
        (2, 2.5, 2),
        (3, 3.5, 1),
    ]
    assert [b.mean for b in found.norm.bins] == [6, 2, 2, 5, 8]
    assert found.seen_rows == 6
    assert found.norm.spearman.score == pytest.approx(stats.spearmanr([1, 3, 2, 4, 6, 8], count[2:]).statistic)
    with pytest.raises(UserError, match="the table has 8 rows but there are counts for 7 tokens"):
        norms_by_count(table, count[1:])


def test_quantities_are_those_of_numpy():
    found = norms_by_count(TABLE, COUNT)
    mean = TABLE.astype(float).mean(0)
    quantities = {
        "norm": np.linalg.norm(TABLE, axis=1),
        "distance_to_mean": np.linalg.norm(TABLE - mean, axis=1),
        "cosine_to_mean": TABLE @ mean / np.linalg.norm(TABLE, axis=1) / np.linalg.norm(mean),
    }
    for name, values in quantities.items():
        curve = getattr(found, name)
        assert curve.mean == pytest.approx(values.mean(), rel=1e-6)
        assert curve.spearman.score == pytest.approx(stats.spearmanr(values, COUNT).statistic, abs=1e-6)
        first = np.log10(COUNT + 1) < 0.5
        assert curve.bins[0].median == pytest.approx(np.median(values[first]), rel=1e-6)


def test_independent_rows_correlate_as_chance_does():
    found = norms_by_count(rng.normal(size=(4000, 8)) + 1, rng.integers(1, 1000, 4000))
    for name in section.QUANTITIES:
        curve = getattr(found, name)
        assert abs(curve.spearman.score - curve.spearman.floor) < 3 * curve.spearman.floor_deviation
        assert curve.spearman.low < 0 < curve.spearman.high
    probe = found.log_frequency
    assert abs(probe.score - probe.floor) < 3 * probe.floor_deviation < 0.02


def test_frequent_tokens_in_the_middle_are_seen_there():
    radius = 5 - np.log10(COUNT)
    table = radius[:, None] * (lambda x: x / np.linalg.norm(x, axis=1, keepdims=True))(rng.normal(size=(900, 10)))
    found = norms_by_count(table, COUNT)
    assert found.distance_to_mean.spearman.score < -0.9
    assert abs(norms_by_count(table - table.mean(0) + 7, COUNT).norm.spearman.score) < 0.9, "the norm is no distance"
    shifted = norms_by_count(table + 7, COUNT)
    assert shifted.distance_to_mean.spearman.score == pytest.approx(found.distance_to_mean.spearman.score, abs=1e-6)


def test_a_planted_direction_is_read_and_moves_nothing_else():
    direction = rng.normal(size=10)
    table = TABLE + np.log10(COUNT + 1)[:, None] * direction * 50
    assert frequency_probe(table, COUNT).score > 0.99
    assert frequency_probe(table, rng.permutation(COUNT)).score < 0.05


@pytest.mark.parametrize("shape", [(900, 10), (60, 40), (25, 60), (15, 4), (15, 8), (15, 12), (20, 15)])
def test_the_probe_is_ridge_regression_fold_by_fold(shape):
    """Brute force: in every fold the penalty of least criterion by hat matrices, then predictions row by row."""
    table, count = rng.normal(size=shape) * rng.uniform(0.1, 9, shape[1]) + 3, rng.integers(1, 9999, shape[0])
    y = np.log10(count + 1)
    y = y - y.mean() + (table[:, 0] - 3) / 3
    count = np.round(10**y * 100).astype(int)
    y = np.log10(count + 1)
    fold = np.random.default_rng(0).permutation(len(y)) % FOLDS
    lost = total = 0.0
    for label in range(FOLDS):
        fit, held = fold != label, fold == label
        mean, deviation = table[fit].mean(0), table[fit].std(0)
        x, n = (table[fit] - mean) / deviation, fit.sum()
        scale = np.trace(x.T @ x) / shape[1]
        best, chosen = np.inf, None
        for penalty in linear_maps.RIDGE_GRID * scale:
            hat = x @ np.linalg.solve(x.T @ x + penalty * np.eye(shape[1]), x.T)
            error = np.sum((y[fit] - y[fit].mean() - hat @ (y[fit] - y[fit].mean())) ** 2)
            criterion = error / (n - 1 - np.trace(hat)) ** 2
            if criterion < best:
                weights = np.linalg.solve(x.T @ x + penalty * np.eye(shape[1]), x.T @ (y[fit] - y[fit].mean()))
                best, chosen = criterion, weights
        predicted = y[fit].mean() + (table[held] - mean) / deviation @ chosen
        lost += np.sum((y[held] - predicted) ** 2)
        total += np.sum((y[held] - y[fit].mean()) ** 2)
    assert frequency_probe(table, count, draws=1).score == pytest.approx(1 - lost / total, abs=1e-5)


def test_the_probe_sees_neither_scale_nor_shift_nor_constant_columns():
    count = np.round(10 ** (2 + np.tanh(TABLE[:, 0]))).astype(int)
    wanted = frequency_probe(TABLE, count)
    assert wanted.score > 0.3
    changed = np.hstack([TABLE * rng.uniform(0.1, 10, 10) - 40, np.full((900, 2), 3.3)]).astype(float)
    kept = frequency_probe(changed[:, :10], count)
    assert kept.score == pytest.approx(wanted.score, abs=1e-6)
    assert frequency_probe(changed, count).score == pytest.approx(wanted.score, abs=1e-3)  # the grid moves a little


@pytest.mark.parametrize(
    ("table", "count", "known"),
    [
        (np.ones((1, 3)), [5], False),
        (np.zeros((40, 3)), np.arange(40), False),
        (np.ones((40, 1)), np.arange(40), False),
        (rng.normal(size=(40, 3)), np.full(40, 7), False),
        (np.vstack([np.eye(3), -np.eye(3)]), np.arange(6), False),  # the mean row is 0 and has no direction
        (rng.normal(size=(40, 3)), np.zeros(40, int), False),
        (rng.normal(size=(40, 1)), np.arange(40), True),
    ],
)
def test_what_cannot_be_measured_is_none(table, count, known, recwarn):
    found = norms_by_count(table, np.asarray(count))
    json.dumps(to_plain(found), allow_nan=False)
    assert to_plain(found) == json.loads(json.dumps(to_plain(found)))
    assert (found.log_frequency.score is not None) == known
    assert not recwarn.list
    with pytest.raises(UserError, match="no row is left"):
        norms_by_count(table[:0], np.asarray(count)[:0])


def test_the_command_gives_both_forms(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    counts = np.where(np.arange(900) < 100, 0, COUNT)
    np.save("t.npy", TABLE)
    np.save("c.npy", counts)
    analyze("norms", "t.npy", "--counts", "c.npy", "--json", "o.json")
    ours, text = json.loads(Path("o.json").read_text()), capsys.readouterr().out
    assert (ours["form"], ours["rows"], ours["rows_masked_out"], ours["width"]) == ("corrected", 800, 100, 10)
    assert f"{ours['log_frequency']['score']:.4f}" in text
    analyze("norms", "t.npy", "--counts", "c.npy", "--paper", "--json", "p.json")
    paper = json.loads(Path("p.json").read_text())
    assert (paper["form"], paper["rows"], paper["norm"]) == ("paper", 900, ours["paper"]["norm"])
    assert paper["norm"]["bins"][0] | {"mean": 0} == paper["norm"]["bins"][0] | {"mean": 0, "low": 0, "rows": 100}
    assert paper["norm"]["mean"] == pytest.approx(np.linalg.norm(TABLE, axis=1).mean(), rel=1e-6)
    analyze("norms", "t.npy", "--counts", "c.npy", "--all-rows", "--json", "a.json")
    every = json.loads(Path("a.json").read_text())
    assert (every["rows"], every["seen_rows"], every["norm"]) == (900, 800, paper["norm"])
    assert every["log_frequency"] == ours["log_frequency"], "only seen tokens have a frequency to read"


@pytest.mark.parametrize(
    ("means", "said"),
    [
        ([-0.5, -0.52, -0.49], "nearer to the mean row in tied (−0.503 ± 0.038)"),
        ([0.5, 0.52, 0.49], "farther from the mean row in tied (0.503 ± 0.038)"),
        ([0.5, -0.5, 0.1], "neither measurably nearer to the mean row nor farther from it in tied"),
        ([-0.5], "nearer to the mean row, by one seed, in tied (−0.500)"),
    ],
)
def test_the_section_says_where_frequent_tokens_lie(means, said):
    norms = norms_by_count(TABLE, COUNT)
    curve = lambda m: replace(norms.distance_to_mean, spearman=replace(norms.distance_to_mean.spearman, score=m))
    of = lambda seed, m: (
        {"arm": "tied", "seed": seed, "role": "shared"} | to_plain(replace(norms, distance_to_mean=curve(m)))
    )
    results = {"norms": [of(seed, m) for seed, m in enumerate(means)]}
    assert said in section.centrality(results).replace("\u00a0", " ")
