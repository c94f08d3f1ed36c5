"""Calibration: oracles, what a calibrated forecaster scores, and what the command and section say."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import scipy.special
import scipy.stats
from runs import SHRUNK
from sklearn.calibration import calibration_curve
from test_analysis_command import analyze
from test_analysis_lens import layer_norm
from test_study_results import fake_study

from tiedjax.analysis.basis.chance import Score
from tiedjax.analysis.basis.held_out import FrozenModel, held_out_windows
from tiedjax.analysis.basis.run_data import data_of
from tiedjax.analysis.basis.strata import strata
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.instruments.calibration import section
from tiedjax.analysis.instruments.calibration.calibration import (
    BINS,
    Forecasts,
    calibrate,
    calibration_error,
    forecasts,
    frequency_bins,
)
from tiedjax.errors import UserError
from tiedjax.run import Run, load_run

V, D, T = SHRUNK["model.vocab_size"], SHRUNK["model.d_model"], SHRUNK["model.seq_len"]
COUNT = (5000 / np.arange(1, 61) ** 1.2).astype(int)
GROUPS = {
    "frequent": np.arange(60) < 6,
    "middle": (np.arange(60) >= 6) & (np.arange(60) < 25),
    "rare": np.arange(60) >= 25,
}


def synthetic(rng: np.random.Generator, positions: int = 4000, sharpen: float = 1.0) -> tuple[Forecasts, np.ndarray]:
    """A forecaster that states p, a power of what its targets are drawn from; and p."""
    logits = np.log(COUNT) + rng.normal(0, 1.5, (positions, 60))
    true = scipy.special.softmax(logits, axis=1)
    target = (true.cumsum(axis=1) < rng.random((positions, 1))).sum(axis=1).clip(max=59)
    p = scipy.special.softmax(sharpen * logits, axis=1)
    found = Forecasts(
        mass_NG=np.stack([p[:, mask].sum(axis=1) for mask in GROUPS.values()], axis=1),
        confidence_N=p.max(axis=1),
        top_N=p.argmax(axis=1),
        target_N=target,
        target_probability_N=p[np.arange(positions), target],
        entropy_N=scipy.stats.entropy(p, axis=1, base=2),
        windows=positions // 40,
    )
    return found, p


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return load_run(finished)


@pytest.fixture(scope="module")
def windows(run: Run) -> np.ndarray:
    return held_out_windows(data_of(run), T, 600)


# ---- the error itself


def test_the_error_is_that_of_scikit_learns_reliability_curve():
    rng = np.random.default_rng(0)
    forecast = rng.beta(1, 3, 150 * BINS)
    event = rng.random(len(forecast)) < forecast**1.5
    rate, mean = calibration_curve(event, forecast, n_bins=BINS, strategy="quantile")
    assert len(rate) == BINS
    assert calibration_error(forecast, event) == pytest.approx(np.abs(rate - mean).mean(), abs=1e-12)
    assert calibration_error(forecast, event) > 0.02


@pytest.mark.parametrize("n", [1, 7, 15, 16, 1000])
def test_the_error_is_that_of_sorting_and_splitting(n):
    rng = np.random.default_rng(n)
    forecast, event = rng.random(n), rng.random(n) < 0.3
    order = np.argsort(forecast)
    size = min(BINS, n)
    ends = [i * n // size for i in range(size + 1)]
    wanted = sum(
        (b - a) / n * abs(forecast[order[a:b]].mean() - event[order[a:b]].mean()) for a, b in itertools.pairwise(ends)
    )
    assert calibration_error(forecast, event) == pytest.approx(wanted, abs=1e-12)


def test_there_is_no_error_of_nothing_and_none_of_certainty():
    assert calibration_error(np.zeros(0), np.zeros(0)) is None
    assert calibration_error(np.array([1.0, 0.0, 1.0]), np.array([1, 0, 1])) == 0
    assert calibration_error(np.ones(5), np.zeros(5)) == 1


# ---- forecasts of a model


def test_forecasts_are_those_of_float64(run, windows):
    model, count = FrozenModel(run), run.token_counts[1]
    partitions = [strata(count), frequency_bins(count)]
    found = forecasts(model, windows, partitions)
    logits = layer_norm(model.states(windows)[-1]) @ np.asarray(model.tables.output, np.float64).T
    p, target = scipy.special.softmax(logits, axis=1), windows[:, 1:].ravel()
    for of, groups in zip(found, partitions, strict=True):
        mass = np.stack([p[:, mask].sum(axis=1) for mask in groups.values()], axis=1)
        np.testing.assert_allclose(of.mass_NG, mass, atol=1e-5)
        np.testing.assert_allclose(of.mass_NG.sum(axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(of.confidence_N, p.max(axis=1), atol=1e-5)
        np.testing.assert_array_equal(of.target_N, target)
        np.testing.assert_allclose(of.target_probability_N, p[np.arange(len(p)), target], atol=1e-5)
        np.testing.assert_allclose(of.entropy_N, scipy.stats.entropy(p, axis=1, base=2), atol=1e-5)
        assert (p[np.arange(len(p)), of.top_N] > p.max(axis=1) - 1e-6).all()
        loss = calibrate(of, groups, count, draws=2).loss.mean
        assert loss == pytest.approx(-np.log2(p[np.arange(len(p)), target]).mean(), abs=1e-5)


def test_frequency_bins_cover_every_token_once():
    bins = frequency_bins(np.array([0, 0, 1, 2, 9, 99, 100, 999]))
    assert list(bins) == ["never seen", "0.0-0.5", "1.0-1.5", "2.0-2.5", "3.0-3.5"]
    assert np.sum(list(bins.values()), axis=0).tolist() == [1] * 8
    assert np.flatnonzero(bins["2.0-2.5"]).tolist() == [5, 6]


# ---- scores


def test_scores_are_those_of_brute_force():
    found, p = synthetic(np.random.default_rng(0), 1000, sharpen=1.5)
    result = calibrate(found, GROUPS, COUNT)
    top, right = p.argmax(axis=1), p.argmax(axis=1) == found.target_N
    assert result.top_error.score == pytest.approx(calibration_error(p.max(axis=1), right), abs=1e-12)
    assert result.overconfidence.score == pytest.approx((p.max(axis=1) - right).mean(), abs=1e-12)
    assert result.accuracy.mean == pytest.approx(right.mean())
    for group, mask in zip(result.groups, GROUPS.values(), strict=True):
        inside, mass = mask[found.target_N], p[:, mask].sum(axis=1)
        assert (group.tokens, group.target_positions) == (mask.sum(), inside.sum())
        assert group.log2_ratio.score == pytest.approx(np.log2(mass.mean() / inside.mean()))
        assert group.group_error.score == pytest.approx(calibration_error(mass, inside), abs=1e-12)
        own = p[np.arange(1000), found.target_N][inside]
        assert (group.target_probability, group.entropy) == pytest.approx((own.mean(), found.entropy_N[inside].mean()))
        assert group.top_error.score == pytest.approx(
            calibration_error(p.max(axis=1)[inside], right[inside]), abs=1e-12
        )
        bet = mask[top]
        assert group.predicted_positions == bet.sum()
        if bet.any():
            assert group.overconfidence.score == pytest.approx((p.max(axis=1) - right)[bet].mean())


def scores(result) -> dict[str, object]:
    every = {"top_error": result.top_error, "overconfidence": result.overconfidence}
    for group in result.groups:
        for name in ("log2_ratio", "group_error", "top_error", "overconfidence"):
            every[f"{group.name} {name}"] = getattr(group, name)
    return every


def test_a_calibrated_forecaster_scores_its_floor():
    z = []
    for seed in range(12):
        found, _ = synthetic(np.random.default_rng(seed))
        for name, score in scores(calibrate(found, GROUPS, COUNT, draws=50)).items():
            assert abs(score.score - score.floor) < 4.5 * score.floor_deviation, name
            z.append((score.score - score.floor) / score.floor_deviation)
    assert abs(np.mean(z)) < 3 / np.sqrt(12)  # scores of one seed hang together, seeds do not
    assert np.std(z) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize(("sharpen", "sign"), [(1.6, 1), (0.6, -1)])
def test_a_sharpened_forecaster_is_overconfident_and_a_flattened_one_the_opposite(sharpen, sign):
    found, _ = synthetic(np.random.default_rng(0), sharpen=sharpen)
    result = calibrate(found, GROUPS, COUNT)
    assert sign * result.overconfidence.score > 5 * result.overconfidence.floor_deviation
    assert result.top_error.excess > 5 * result.top_error.floor_deviation
    rare = result.groups[-1]
    assert -sign * rare.log2_ratio.score > 5 * rare.log2_ratio.floor_deviation


def test_errors_by_target_have_high_floors_because_outcomes_pick_them():
    found, _ = synthetic(np.random.default_rng(0))
    rare = calibrate(found, GROUPS, COUNT).groups[-1]
    assert rare.top_error.floor > 0.1
    assert abs(rare.top_error.excess) < 3 * rare.top_error.floor_deviation


def test_groups_without_positions_have_no_scores():
    found, _ = synthetic(np.random.default_rng(0), 400)
    # One more token, which never comes and is never expected, in a group of its own.
    groups = {name: np.append(mask, False) for name, mask in GROUPS.items()} | {"absent": np.arange(61) == 60}
    wider = Forecasts(**{**vars(found), "mass_NG": np.column_stack([found.mass_NG, np.zeros(400)])})
    absent = calibrate(wider, groups, np.append(COUNT, 0)).groups[-1]
    assert (absent.target_positions, absent.predicted_positions, absent.mass, absent.share) == (0, 0, 0, 0)
    assert absent.target_probability is absent.entropy is absent.log2_ratio.score is absent.top_error.score is None
    assert absent.overconfidence.floor is None
    assert absent.group_error.score == 0


def test_groups_must_part_the_tokens():
    found, _ = synthetic(np.random.default_rng(0), 400)
    for wrong in (GROUPS | {"rare": GROUPS["middle"]}, GROUPS | {"rare": np.ones(60, bool)}):
        with pytest.raises(UserError, match="every token must be in exactly one group"):
            calibrate(found, wrong, COUNT)


# ---- command and section


def test_the_command_prints_and_writes(run, tmp_path, capsys):
    words = ["calibration", str(run.path), "--held-out-tokens", "600", "--draws", "5"]
    analyze(*words, "--json", str(tmp_path / "o.json"))
    out = json.loads((tmp_path / "o.json").read_text())
    printed = capsys.readouterr().out
    assert (out["rows"], out["width"], out["floor_draws"], out["counts"]) == (V, D, 5, "as target")
    assert {s["name"] for s in out["strata"]} <= {"never seen", "rare", "middle", "frequent"}
    for part in ("strata", "bins"):
        assert sum(g["share"] for g in out[part]) == pytest.approx(1)
        assert sum(g["mass"] for g in out[part]) == pytest.approx(1, abs=1e-5)
    assert f"{out['top_error']['score']:.4f}" in printed
    assert f"{out['strata'][-1]['log2_ratio']['score']:.4f}" in printed
    with pytest.raises(UserError, match="--draws: must be at least 1, got 0"):
        analyze("calibration", str(run.path), "--draws", "0")


class Disturbed(Run):
    """A run whose table is not quite what it was trained to be."""

    def params(self, step: int | None = None) -> dict:
        params = super().params(step)
        noise = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)
        return params | {"tables": {name: table + 0.5 * noise for name, table in params["tables"].items()}}


@pytest.fixture(scope="module")
def results(run: Run) -> dict:
    study, _ = fake_study(seeds=(0, 1))
    other = Disturbed(run.path)
    runs = {("untied", 0): other, ("untied", 1): other, ("tied", 0): run, ("tied", 1): run}
    found = {"calibration": section.collect(StudyRuns(study, runs))}
    return found | {"headline": {"arm": "tied", "reference": "untied"}, "arms": {"untied": {}, "tied": {}}}


def test_the_section_pairs_twins_by_stratum(results):
    json.dumps(results["calibration"], allow_nan=False)
    runs = {
        (r["arm"], r["seed"]): {g["name"]: g for g in r["by_stratum"]["groups"]} for r in results["calibration"]["runs"]
    }
    twins = {t["stratum"]: t for t in results["calibration"]["twins"]}
    assert list(twins) == ["rare", "middle", "frequent"]
    tied, untied = (runs[arm, 0]["frequent"] for arm in ("tied", "untied"))
    wanted = tied["log2_ratio"]["score"] - untied["log2_ratio"]["score"]
    assert twins["frequent"]["log2_ratio"]["mean"] == pytest.approx(wanted, abs=1e-9)
    wanted = Score(**tied["group_error"]).excess - Score(**untied["group_error"]).excess
    assert twins["frequent"]["group_error"]["mean"] == pytest.approx(wanted, abs=1e-9)
    assert twins["frequent"]["target_probability"]["mean"] == pytest.approx(
        tied["target_probability"] - untied["target_probability"], abs=1e-9
    )


def test_the_sections_words_and_figures(results):
    confident, rare = section.answers(results)
    twins = {t["stratum"]: t for t in results["calibration"]["twins"]}
    side = {True: "is more confident", False: "is less confident"}
    assert side[twins["frequent"]["overconfidence"]["mean"] > 0] in confident
    side = {True: "gives them more probability", False: "gives them less probability"}
    assert side[twins["rare"]["log2_ratio"]["mean"] > 0] in rare
    assert [r["stratum"] for r in section.rows(results)] == [s for s in ("rare", "middle", "frequent") for _ in "ab"]
    assert len(section.overall(results)) == 2
    assert len(section.differences(results)) == 3
    (plot,) = section.plots(results)
    for panel in plot.panels:
        ax = matplotlib.figure.Figure().add_subplot()
        panel(ax, results)
        assert ax.get_legend_handles_labels()[1]


def test_runs_whose_text_is_gone_are_not_measured():
    study, runs = fake_study(seeds=(0,))
    found = {"calibration": section.collect(StudyRuns(study, runs))}
    found["headline"] = {"arm": "tied", "reference": "untied"}
    assert all("nowhere" in r["not_measured"] for r in found["calibration"]["runs"])
    for empty in (section.plots, section.answers, section.rows, section.overall, section.differences):
        assert list(empty(found)) == []
    assert len(section.not_measured(found)) == 1
