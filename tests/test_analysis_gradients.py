"""Gradient flow: both forms of the output share, its windows, deciles and smoothing, from a run's metrics."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jinja2
import numpy as np
import pytest
from test_analysis_command import analyze
from test_study_results import fake_study

from tiedjax.analysis.basis import tables
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.instruments.gradients import section
from tiedjax.analysis.instruments.gradients.gradients import measure as gradient_flow
from tiedjax.analysis.instruments.gradients.gradients import output_share, smooth
from tiedjax.errors import UserError


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


def test_the_paper_divides_by_the_norm_of_the_activations():
    columns = metrics() | {"activation_grad_norm": np.where(np.arange(120) < 10, 3.0, 0.5)}
    flow = gradient_flow(columns)
    assert [w.paper_output_share for w in flow.windows] == pytest.approx([9 / 12, 3 / 3.5, 3 / 3.5, 3 / 3.5])
    assert [w.activation_ratio for w in flow.windows] == pytest.approx([3, 0.5, 0.5, 0.5])
    assert [w.output_share for w in flow.windows] == [w.output_share for w in gradient_flow(metrics()).windows]
    assert flow.activation_norm == columns["activation_grad_norm"].tolist()


def test_runs_that_did_not_log_it_have_no_paper_form():
    flow = gradient_flow(metrics())
    assert flow.activation_norm is None
    assert {(w.paper_output_share, w.activation_ratio) for w in flow.windows} == {(None, None)}


def test_shares_of_deciles():
    (first, _) = gradient_flow(metrics()).deciles
    assert np.isnan(first.output_share[0])  # nothing of nothing
    assert first.output_share[1:] == pytest.approx([2 / 3] * 9)


def test_smoothing_is_the_exponential_mean_of_its_definition():
    rng = np.random.default_rng(0)
    steps = np.cumsum(rng.integers(1, 5, 60))
    values = rng.normal(size=60)
    values[[0, 7]] = np.nan
    found = smooth(steps, values, 6)
    assert np.isnan(found[0])
    for i in range(1, 60):
        known = np.flatnonzero(np.isfinite(values[: i + 1]))
        weights = 0.5 ** ((steps[i] - steps[known]) / 6)
        assert found[i] == pytest.approx(weights @ values[known] / weights.sum(), rel=1e-12)
    np.testing.assert_allclose(smooth(steps, np.full(60, 2.5), 6), 2.5)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs by name; those of the arm tied logged the activations' norm, half the input norm."""
    monkeypatch.chdir(tmp_path)
    _, made = fake_study(seeds=(0,), steps=[0, 4, 400])
    named = {run.name: run for run in made.values()}
    named["tied-0"].metrics["activation_grad_norm"] = 0.5 * named["tied-0"].metrics["input_grad_norm"]
    monkeypatch.setattr(tables, "open_run", lambda place: named[str(place)])
    return named


def test_the_command_shows_both_forms_side_by_side(runs, capsys):
    analyze("gradients", "tied-0", "--json", "o.json")
    out, shown = json.loads(Path("o.json").read_text()), capsys.readouterr().out
    assert out["form"] == "corrected"
    assert [w["activation_ratio"] for w in out["windows"]] == pytest.approx([0.5] * 5)
    for window, paper in zip(out["windows"], out["paper"]["windows"], strict=True):
        assert paper["output_share"] == window["paper_output_share"] > window["output_share"]
        assert f"{window['output_share']:.4f}" in shown
        assert f"{window['paper_output_share']:.4f}" in shown
    assert [w["published"] for w in out["paper"]["windows"]] == [0.874, 0.928, 0.888, 0.825, None]  # 201-400 is cut
    flow = gradient_flow(runs["tied-0"].metrics)
    smoothed = out["smoothed"]
    assert smoothed["half_life_steps"] == 10
    assert smoothed["output_share"] == pytest.approx(smooth(np.array(flow.steps), np.array(flow.output_share)).tolist())
    analyze("gradients", "tied-0", "--paper", "--json", "paper.json")
    assert json.loads(Path("paper.json").read_text())["form"] == "paper"
    assert f"{out['windows'][0]['output_share']:.4f}" not in capsys.readouterr().out.split("by token")[0]


def test_the_command_says_when_the_paper_form_was_not_logged(runs, capsys):
    analyze("gradients", "untied-0", "--json", "o.json")
    assert "not_measured" in json.loads(Path("o.json").read_text())["paper"]
    assert "the paper's form is not measured: this run did not log activation_grad_norm" in capsys.readouterr().out
    with pytest.raises(UserError, match="untied-0: its metrics have no 'activation_grad_norm', which --paper needs"):
        analyze("gradients", "untied-0", "--paper")


def page_of(flows):
    """The section as the report draws it, for runs of the baseline arm with these flows."""
    records = [{"arm": "tied", "seed": seed, **to_plain(flow)} for seed, flow in enumerate(flows)]
    results = {"headline": {"arm": "tied"}, "gradients": records}
    templates = jinja2.Environment(loader=jinja2.PackageLoader("tiedjax.analysis", ""), autoescape=True)
    template = templates.get_template("instruments/gradients/section.html.j2")
    words = SimpleNamespace(gradient_share=lambda results: "The share.")
    page = template.render(r=results, s=section, w=words, head=results["headline"], plot=lambda name, caption: name)
    return section.beside_the_paper(results), page


def test_the_report_has_both_forms_where_they_were_logged():
    rows, page = page_of([gradient_flow(metrics())] * 2)
    assert rows == []
    assert "<table" not in page
    flows = [gradient_flow(metrics() | {"activation_grad_norm": np.full(120, ratio)}) for ratio in (0.4, 0.6)]
    rows, page = page_of(flows)
    assert [row["steps"] for row in rows] == ["1–10", "11–50", "51–100", "101–120"]
    assert {row["ratio"] for row in rows} == {"0.500\u00a0±\u00a01.271"}  # two seeds: 12.7 standard errors
    assert [row["published"] for row in rows] == ["0.874", "0.928", "0.888", "–"]  # the last window is cut short
    for value in rows[0].values():
        assert f"<td>{value}</td>" in page


def test_the_makeup_is_of_the_steps_that_measured_it() -> None:
    columns = {name: column[:4] for name, column in metrics().items()}
    assert gradient_flow(columns).makeup is None
    for i, part in enumerate(("push", "common", "rest", "cross"), 1):
        columns[f"output_{part}_share"] = np.array([np.nan, i, np.nan, 10.0 * i])
    found = gradient_flow(columns).makeup
    assert to_plain(found) == {"steps": [2, 4], "push": [1, 10], "common": [2, 20], "rest": [3, 30], "cross": [4, 40]}


def test_noise_divides_sums_over_steps_once() -> None:
    columns = {name: column[:3] for name, column in metrics().items()}
    assert gradient_flow(columns).noise is None
    columns["input_grad_signal"], columns["input_grad_noise"] = np.array([5.0, -1.0, 0.0]), np.array([1.0, 3.0, 0.0])
    columns["output_grad_signal"], columns["output_grad_noise"] = np.array([3.0, 2.0, 1.0]), np.array([1.0, 1.0, 0.0])
    found = gradient_flow(columns).noise
    assert to_plain(found) == {"logged_steps": 3, "input": 0.5, "output": 0.25}
    columns["input_grad_signal"] = np.array([-4.0, 0.0, 0.0])
    assert gradient_flow(columns).noise.input is None
