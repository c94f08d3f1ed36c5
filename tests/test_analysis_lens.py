"""Lenses: laws, oracles in float64, convergence, baselines by brute force, and what the command and section say."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from runs import SHRUNK, STEPS, arguments
from test_analysis_command import analyze
from test_study_results import fake_study

from tiedjax import cli
from tiedjax.analysis.basis import held_out
from tiedjax.analysis.basis.held_out import FrozenModel, held_out_windows, training_windows
from tiedjax.analysis.basis.minimisation import Minimum, minimise
from tiedjax.analysis.basis.ngrams import PREDICTORS, NGrams, ngrams_shown
from tiedjax.analysis.basis.run_data import data_of
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.instruments.lens import lens as lens_module
from tiedjax.analysis.instruments.lens import rotation, section, training
from tiedjax.analysis.instruments.lens.baselines import beside
from tiedjax.analysis.instruments.lens.lens import early_states, lens, published_translator, read, tuned_translator
from tiedjax.analysis.instruments.lens.training import fit, teacher
from tiedjax.data.batches import Batches
from tiedjax.errors import UserError
from tiedjax.lookup import lookup
from tiedjax.model import Transformer
from tiedjax.run import Run, load_run

LAYERS, V, D, T = 3, SHRUNK["model.vocab_size"], SHRUNK["model.d_model"], SHRUNK["model.seq_len"]


def lens_results(study: StudyRuns) -> dict:
    """As in results.json."""
    runs = [run for seed in study.study.seeds for run in section.collect(study, seed)]
    return section.together(study.study.reference, runs)


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three layers, long enough trained that they do something."""
    out = tmp_path_factory.mktemp("lens") / "tied-0"
    changes = {
        "model.layers": LAYERS,
        "model.scan_layers": True,
        "train.steps": 60,
        "optimizer.learning_rate": 0.02,
        "tying.scheme": "tied",
    }
    assert cli.main(arguments(out, text, changes)) == 0
    return load_run(out)


@pytest.fixture(scope="module")
def model(run: Run) -> FrozenModel:
    return FrozenModel(run)


@pytest.fixture(scope="module")
def windows(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out windows."""
    prepared = data_of(run)
    return np.concatenate(list(training_windows(run, prepared, 1024))), held_out_windows(prepared, T, 400)


@pytest.fixture(scope="module")
def translators(model: FrozenModel, windows: tuple[np.ndarray, np.ndarray]) -> list[Minimum]:
    x_LND = model.states(windows[0])
    taught = teacher(model, x_LND[-1])
    return [fit(model, x_ND, taught) for x_ND in x_LND[:-1]]


def layer_norm(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)


def oracle(model: FrozenModel, x_LND: np.ndarray, state: int, theta: np.ndarray, target_N: np.ndarray) -> tuple:
    """KL and cross-entropy per position in bits, all in float64."""
    U = np.asarray(model.tables.output, np.float64)
    x = np.asarray(x_LND[state], np.float64)
    log_p = scipy.special.log_softmax(layer_norm(x_LND[-1]) @ U.T, axis=1)
    log_q = scipy.special.log_softmax(layer_norm(x + x @ theta[:-1] + theta[-1]) @ U.T, axis=1)
    kl = scipy.special.rel_entr(np.exp(log_p), np.exp(log_q)).sum(axis=1)
    return kl / np.log(2), -log_q[np.arange(len(target_N)), target_N] / np.log(2)


# ---- states and reading


def test_states_are_those_of_the_model_whatever_the_batches(model, windows, monkeypatch):
    tokens = windows[1]
    embedded = lookup(jnp.asarray(model.tables.input), jnp.asarray(tokens[:, :-1]), jnp.float32)
    h_BTD, x_LBTD = Transformer(model.config).apply(model.body, embedded, hidden_states=True)
    wanted = np.asarray(x_LBTD).reshape(LAYERS + 1, -1, D)
    np.testing.assert_allclose(model.states(tokens), wanted, atol=1e-5)
    monkeypatch.setattr(held_out, "_FORWARD", 3 * T)  # the last batch is not full
    assert len(tokens) % 3
    np.testing.assert_allclose(model.states(tokens), wanted, atol=1e-5)
    np.testing.assert_allclose(model.normed(wanted[-1]), np.asarray(h_BTD).reshape(-1, D), atol=1e-5)


def test_zero_translators_are_the_logit_lens_bit_for_bit(model, windows):
    for logit, tuned, published in read(model, windows[1], [np.zeros((D + 1, D))] * LAYERS):
        assert logit == tuned == published


def test_the_last_state_does_not_diverge_at_all(model, windows, translators):
    logit, tuned, published = read(model, windows[1], [t.point for t in translators])[-1]
    for reading in (logit, tuned):
        assert (reading.kl.mean, reading.kl.low, reading.kl.high) == (0.0, 0.0, 0.0)
    assert published.kl.low > 0.01  # a translator of another state is no identity


def test_readings_are_those_of_float64(model, windows, translators):
    x_LND, target = model.states(windows[1]), windows[1][:, 1:].ravel()
    found = read(model, windows[1], [t.point for t in translators])
    zero = np.zeros((D + 1, D))
    for state, readings in enumerate(found):
        own = translators[state].point if state < LAYERS else zero
        for reading, theta in zip(readings, (zero, own, translators[max(state - 1, 0)].point), strict=True):
            kl, ce = oracle(model, x_LND, state, theta, target)
            assert reading.kl.mean == pytest.approx(kl.mean(), abs=1e-5)
            assert reading.cross_entropy.mean == pytest.approx(ce.mean(), abs=1e-5)
            assert reading.kl.n == len(windows[1])


def test_which_translator_reads_which_state():
    assert [tuned_translator(state, 4) for state in range(5)] == [0, 1, 2, 3, None]
    assert [published_translator(state) for state in range(5)] == [0, 0, 1, 2, 3]
    assert (list(early_states(4)), list(early_states(16))) == ([0, 1], [0, 1, 2, 3, 4, 5])


def test_a_translator_reads_its_own_state_better_than_its_neighbour_does(model, windows, translators):
    for tokens in windows:
        for state, (logit, tuned, published) in enumerate(read(model, tokens, [t.point for t in translators])):
            if state == 0:
                assert tuned == published
            else:
                assert tuned.kl.mean < 0.9 * published.kl.mean
            if state < LAYERS:
                assert tuned.kl.mean < 0.9 * logit.kl.mean


# ---- training


def test_loss_and_slope_are_those_of_float64(model, windows):
    x_LND = model.states(windows[0])[:, :700]  # a chunk of positions and a part of one
    taught = teacher(model, x_LND[-1])
    theta = 0.1 * np.random.default_rng(0).normal(size=(D + 1, D))
    value, slope = training._loss_and_slope(
        model.config, model.norm, jnp.asarray(theta, jnp.float32), x_LND[1], *taught[:2], model.U_VD, model.bias_V
    )
    kl = lambda theta: oracle(model, x_LND, 1, theta, np.zeros(700, int))[0].mean() * np.log(2)
    assert float(value) == pytest.approx(kl(theta), abs=1e-5)
    rng = np.random.default_rng(1)
    for _ in range(5):
        step = 1e-4 * rng.normal(size=theta.shape)
        assert np.sum(slope * step) == pytest.approx((kl(theta + step) - kl(theta - step)) / 2, rel=1e-3, abs=1e-7)


def test_the_teachers_covariance_is_the_mean_over_positions(model, windows):
    x_ND = model.states(windows[0])[-1, :600]
    U = np.asarray(model.tables.output, np.float64)
    p = scipy.special.softmax(layer_norm(x_ND) @ U.T, axis=1)
    wanted = np.mean([np.cov(U.T, aweights=row, ddof=0) for row in p], axis=0)
    np.testing.assert_allclose(teacher(model, x_ND).covariance_DD, wanted, atol=1e-6)


def test_training_ends_where_another_optimiser_ends(model, windows, translators):
    x_LND = model.states(windows[0])
    taught = teacher(model, x_LND[-1])

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        theta = jnp.asarray(point.reshape(D + 1, D), jnp.float32)
        given = model.norm, theta, x_LND[1], *taught[:2], model.U_VD, model.bias_V
        value, slope = training._loss_and_slope(model.config, *given)
        return float(value), np.asarray(slope, np.float64).ravel()

    options = {"maxiter": 400, "ftol": 1e-9, "gtol": 1e-9}
    reference = scipy.optimize.minimize(objective, np.zeros((D + 1) * D), jac=True, method="L-BFGS-B", options=options)
    assert all(t.converged for t in translators)
    assert translators[1].value < 1.01 * reference.fun < 0.9 * objective(np.zeros((D + 1) * D))[0]


def test_training_that_is_cut_short_says_so(model, windows, monkeypatch):
    x_LND = model.states(windows[0])
    monkeypatch.setattr(training.minimise, "__kwdefaults__", {**minimise.__kwdefaults__, "most": 2})
    found = fit(model, x_LND[0], teacher(model, x_LND[-1]))
    assert (found.iterations, found.converged) == (2, False)


# ---- text and baselines


def test_the_training_text_is_what_the_run_was_shown_each_window_once(run):
    prepared = data_of(run)
    batches = Batches(prepared, T, 8, seed=0)
    first = np.concatenate([batches.at(step) for step in range(5)])
    np.testing.assert_array_equal(np.concatenate(list(training_windows(run, prepared, 35 * T))), first[:35])
    every = np.concatenate(list(training_windows(run, prepared, 10**9)))
    assert len(every) == min(60 * 8, len(prepared.windows("train", T)))
    assert len(np.concatenate(list(training_windows(run, prepared, 1)))) == 1
    short = SimpleNamespace(config=load_run(run.path).config)
    short.config = type(short.config)(
        **{**vars(short.config), "train": type(short.config.train)(**{**vars(short.config.train), "steps": STEPS})}
    )
    assert len(np.concatenate(list(training_windows(short, prepared, 10**9)))) == STEPS * 8


def test_baselines_are_the_predictors_of_the_text_shown_beside_the_model(run, model, windows):
    prepared, held_out_WS = data_of(run), windows[1]
    ngrams = NGrams(training_windows(run, prepared, 10**9), held_out_WS, V)
    found = beside(model, ngrams_shown(run, prepared, model.step, held_out_WS, V), held_out_WS)
    x_ND = model.states(held_out_WS)[-1]
    p = scipy.special.softmax(layer_norm(x_ND) @ np.asarray(model.tables.output, np.float64).T, axis=1)
    bits_WT = ngrams.bits(held_out_WS)
    for name, q in [("uniform", np.full(V, 1 / V)), ("unigram", ngrams.unigram_V)]:
        reading = getattr(found, name)
        wanted = scipy.special.rel_entr(p, q[None]).sum(axis=1).mean() / np.log(2)
        assert reading.kl.mean == pytest.approx(wanted, abs=1e-5)
        assert reading.cross_entropy.mean == pytest.approx(bits_WT[name].mean(), abs=1e-5)
    for name in ("bigram", "trigram"):
        assert getattr(found, f"{name}_cross_entropy").mean == pytest.approx(bits_WT[name].mean(), abs=1e-12)
    assert (found.bigram_beta, found.trigram_gamma) == (ngrams.beta, ngrams.gamma)
    assert found.training_tokens == ngrams.training_tokens == min(60 * 8, len(prepared.windows("train", T))) * T


# ---- results, command, section


def test_results_say_how_training_ended_on_both_texts(model, windows, translators):
    lines: list[str] = []
    found = lens(model, *windows, report=lines.append)
    assert [s.name for s in found.states] == ["input", "layer 1", "layer 2", "layer 3"]
    for state, translator in zip(found.states, translators, strict=False):
        assert state.fit.converged is True
        assert state.fit.training_kl == pytest.approx(translator.value / np.log(2))
        own = read(model, windows[0], [t.point for t in translators])[state.state][1]
        assert own.kl.mean == pytest.approx(state.fit.training_kl, abs=1e-5)
    assert found.states[-1].fit is None
    assert (found.training_tokens, found.held_out_windows) == (windows[0].shape[0] * T, len(windows[1]))
    assert len(lines) == LAYERS
    assert "converged" in lines[0]


def test_a_long_fit_says_where_it_is(model, windows, monkeypatch):
    monkeypatch.setattr(lens_module, "REPORT_EVERY", 0)
    lines: list[str] = []
    found = lens(model, *windows, lines.append, [2])
    *during, end = lines
    assert len(during) == found.states[2].fit.evaluations > 1
    for number, line in enumerate(during, start=1):
        assert re.fullmatch(
            rf"layer 2: \d+\.\d{{3}} bits on training text after {number} evaluations, not yet done", line
        )
    assert end.startswith("layer 2 (of 3 layers): ")


def test_the_command_prints_and_writes_both_forms(run, tmp_path, capsys):
    words = ["lens", str(run.path), "--training-tokens", "1024", "--held-out-tokens", "400"]
    analyze(*words, "--json", str(tmp_path / "o.json"))
    shown_text = capsys.readouterr().out
    out = json.loads((tmp_path / "o.json").read_text())
    assert (out["form"], out["rows"], out["width"], out["step"]) == ("corrected", V, D, 60)
    assert [i["role"] for i in out["inputs"]] == ["shared"]
    assert (out["training_tokens"], out["held_out_tokens"]) == (1024, 400)
    assert f"{out['states'][1]['tuned']['kl']['mean']:.4f}" in shown_text
    for name in ("bigram", "trigram"):
        bits = out["baselines"][f"{name}_cross_entropy"]["mean"]
        assert re.search(rf"^{name} +- +{bits:.4f}$", shown_text, flags=re.M)
    assert "converged" in shown_text
    analyze(*words, "--paper", "--json", str(tmp_path / "p.json"))
    paper = json.loads((tmp_path / "p.json").read_text())
    assert paper["form"] == "paper"
    assert [s["score"]["kl"] for s in paper["states"]] == [s["published"]["kl"] for s in out["states"]]
    assert all("tuned" not in s for s in paper["states"])


def test_some_translators_alone_are_fitted_and_change_nothing_else(run, tmp_path, capsys):
    words = ["lens", str(run.path), "--training-tokens", "1024", "--held-out-tokens", "400"]
    analyze(*words, "--json", str(tmp_path / "all.json"))
    capsys.readouterr()
    analyze(*words, "--translators", "0,2", "--json", str(tmp_path / "some.json"))
    shown = capsys.readouterr().out
    every, some = (json.loads((tmp_path / name).read_text()) for name in ("all.json", "some.json"))
    head = f"{run.path} at step 60: 400 held-out tokens, translators of input, layer 2 fitted on 1024 training tokens\n"
    assert shown.startswith(head)
    assert re.search(r"^layer 1 +- +- +[\d.]+ +- +- +[\d.]+ +[\d.]+$", shown, flags=re.M)
    for state, whole in zip(some["states"], every["states"], strict=True):
        assert state["logit"] == whole["logit"]
        for name, fitted in (("tuned", (0, 2, 3)), ("published", (0, 1, 3)), ("fit", (0, 2, 3))):
            assert state[name] == (whole[name] if state["state"] in fitted else None), (state["name"], name)
    assert some["input"] == every["input"]


def test_the_logit_lens_alone_fits_nothing(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lens_module, "fit", None)
    monkeypatch.setattr(lens_module, "teacher", None)
    analyze(
        *("lens", str(run.path), "--held-out-tokens", "400", "--translators", "none"),
        "--json",
        str(tmp_path / "o.json"),
    )
    shown, out = capsys.readouterr().out, json.loads((tmp_path / "o.json").read_text())
    assert shown.startswith(f"{run.path} at step 60: 400 held-out tokens, no translators\n")
    assert "converged" not in shown
    assert out["training_tokens"] == 0
    assert [state["tuned"] is None for state in out["states"]] == [True, True, True, False]


def test_the_inputs_lens_holds_two_states_and_passes_the_body_once(model, windows, monkeypatch):
    shapes, parts = [], FrozenModel.parts_of_states

    def counted(*args):
        for x_LND in parts(*args):
            shapes.append(x_LND.shape)
            yield x_LND

    monkeypatch.setattr(FrozenModel, "parts_of_states", counted)
    rotation.input_lens(model, windows[1], draws=1)
    assert shapes == [(2, windows[1][:, 1:].size, D)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--translators", "0,x"], "--translators: must be none, or numbers of states between commas, got '0,x'"),
        (["--translators", ""], "--translators: must be none, or numbers of states between commas, got ''"),
        (["--translators", "0,3"], "lens: the states with a translator are 0 to 2, got 0, 3"),
        (
            ["--translators", "0", "--paper"],
            "--translators: the paper's form reads a state by that of the state before; leave it out",
        ),
        (["--held-out-tokens", "0"], "--held-out-tokens: must be at least 1, got 0"),
        (["--training-tokens", "-3"], "--training-tokens: must be at least 1, got -3"),
        (["--data", "text:/nowhere/*.jsonl"], "nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(run, words, message):
    with pytest.raises(UserError, match=message) as error:
        analyze("lens", str(run.path), *words)
    assert "\n" not in str(error.value)


class Disturbed(Run):
    """A run whose table is not quite what it was trained to be."""

    def params(self, step: int | None = None) -> dict:
        params = super().params(step)
        noise = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)
        return params | {"tables": {name: table + 0.2 * noise for name, table in params["tables"].items()}}


@pytest.fixture(scope="module")
def results(run: Run) -> dict:
    """A study of two runs, whose differences are what the lens of each says."""
    study, _ = fake_study(seeds=(0, 1))
    other = Disturbed(run.path)
    runs = {("untied", 0): other, ("untied", 1): other, ("tied", 0): run, ("tied", 1): run}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lens_module, "measure", partial(lens_module.measure, held_out_tokens=400))
        found = {"lens": lens_results(StudyRuns(study, runs))}
    return found | {"headline": {"arm": "tied", "reference": "untied"}, "arms": {"untied": {}, "tied": {}}}


def test_the_section_pairs_twins_state_by_state(results):
    json.dumps(results["lens"], allow_nan=False)
    states = {(r["arm"], r["seed"]): r["states"] for r in results["lens"]["runs"]}
    assert [t["state"] for t in results["lens"]["twins"]] == [0, 1, 2, 3]
    assert [t["early"] for t in results["lens"]["twins"]] == [True, True, False, False]
    for twin in results["lens"]["twins"]:
        for name, (which, score) in section.QUANTITIES.items():
            tied, untied = (states[arm, 0][twin["state"]][which][score]["mean"] for arm in ("tied", "untied"))
            assert twin[name]["mean"] == pytest.approx(tied - untied, abs=1e-9)
            assert twin[name]["n"] == 2


def test_the_sections_words_say_which_side_is_higher(results):
    sentences = section.sentences(results)
    assert len(sentences) == LAYERS  # the last state has no divergence
    for sentence, twin in zip(sentences, results["lens"]["twins"], strict=False):
        assert ("divergence is higher" if twin["tuned_kl"]["low"] > 0 else "divergence is lower") in sentence
    assert f"{4 * LAYERS} of {4 * LAYERS} translators converged" in section.training(results)
    assert [row["name"] for row in section.baselines(results)] == list(PREDICTORS)
    assert len(section.rows(results)) == 2 * (LAYERS + 1)
    gaps = [twin["tuned_cross_entropy"]["mean"] for twin in results["lens"]["twins"]]
    beyond = [twin["beyond_last"]["mean"] for twin in results["lens"]["twins"]]
    np.testing.assert_allclose(beyond, np.array(gaps) - gaps[-1], atol=1e-12)


@pytest.mark.parametrize(
    ("decided", "verdict"),
    [
        (("holds", "holds"), "farther from the final prediction at input and layer 1 than"),
        (("the opposite", "holds"), "farther from the final prediction at layer 1 but nearer to it at input than"),
        (("undecided", "the opposite"), "nearer to it at layer 1 than"),
        (("undecided", "undecided"), "nowhere measurably farther from the final prediction than"),
    ],
)
def test_the_verdict_is_that_of_the_studys_statements(decided, verdict):
    """Which are tested together: intervals by themselves find a difference in one study of two that have none."""
    ends = {"mean": 0.2, "low": 0.1, "high": 0.3}
    twins = [
        {"arm": "tied", "name": name, "state": state, "early": state < 2, "tuned_kl": ends, "beyond_last": ends}
        for state, name in enumerate(["input", "layer 1", "layer 2"])
    ]
    statements = {f"tied_lens_farther_at_{state}": {"verdict": said} for state, said in enumerate(decided)}
    statements |= {f"tied_lens_worse_at_{state}": {"verdict": "undecided"} for state in (0, 1)}
    results = {"headline": {"arm": "tied", "reference": "untied"}, "lens": {"runs": [], "twins": twins}}
    (found,) = section.verdict(results | {"statements": statements})
    assert verdict in found
    assert found.endswith("and nowhere measurably behind at the next token by more than in the end.")
    twins[0]["tuned_kl"] = {"mean": 0.1, "low": None, "high": None}
    assert section.verdict(results) == []  # one seed


def test_the_sections_figures_can_be_drawn(results):
    plots = list(section.plots(results))
    assert [p.name for p in plots] == ["lens", "lens_paper", "lens_twins"]
    for plot in plots:
        for panel in plot.panels:
            ax = matplotlib.figure.Figure().add_subplot()
            panel(ax, results)
            assert ax.lines


def test_runs_whose_text_is_gone_are_not_measured():
    study, runs = fake_study(seeds=(0,))
    found = {"lens": lens_results(StudyRuns(study, runs))}
    assert all("nowhere" in r["not_measured"] for r in found["lens"]["runs"])
    assert found["lens"]["twins"] == []
    found["headline"] = {"arm": "tied", "reference": "untied"}
    assert list(section.plots(found)) == section.sentences(found) == section.rows(found) == section.verdict(found) == []
    assert len(section.not_measured(found)) == 1


def test_the_inputs_lens_and_its_null_are_those_of_rotated_tables_by_hand(run):
    model = FrozenModel(run)
    tokens_WS = held_out_windows(data_of(run), T, 400)
    found = rotation.input_lens(model, tokens_WS, draws=3)
    x_ND = np.asarray(model.states(tokens_WS)[0], np.float64)
    y_ND = np.asarray(model.normed(x_ND), np.float64)
    target_N = tokens_WS[:, 1:].ravel()
    rng = np.random.default_rng(0)
    turns = [np.eye(D), *(rotation.rotation(rng, D) for _ in range(3))]
    by_hand = []
    for turn_DD in turns:
        log_p_NV = scipy.special.log_softmax(y_ND @ (np.asarray(model.U_VD, np.float64) @ turn_DD.T).T, axis=1)
        by_hand.append(-log_p_NV[np.arange(len(target_N)), target_N] / np.log(2))
    means = [bits_N.mean() for bits_N in by_hand]
    assert found.cross_entropy.score == pytest.approx(means[0], abs=1e-4)
    assert found.cross_entropy.floor == pytest.approx(np.mean(means[1:]), abs=1e-4)
    assert found.cross_entropy.floor_deviation == pytest.approx(np.std(means[1:], ddof=1), abs=1e-4)
    assert found.less_rotated.mean == pytest.approx(means[0] - np.mean(means[1:]), abs=1e-4)
    assert found.final.mean == pytest.approx(model.bits(tokens_WS).mean())
    logit = read(model, tokens_WS, [np.zeros((D + 1, D))] * LAYERS)[0][0]
    assert (found.kl.score, found.kl.low, found.kl.high) == pytest.approx(
        (logit.kl.mean, logit.kl.low, logit.kl.high), abs=1e-6
    ), "the number of the command"
    assert (found.held_out_tokens, found.held_out_windows) == (400, len(tokens_WS))


def test_a_rotation_leaves_norms_and_angles(run):
    turn_DD = rotation.rotation(np.random.default_rng(1), 7)
    np.testing.assert_allclose(turn_DD @ turn_DD.T, np.eye(7), atol=1e-12)
    assert abs(turn_DD - np.eye(7)).max() > 0.1


def test_the_command_prints_the_rotated_null(run, tmp_path, capsys):
    words = ["lens", str(run.path), "--training-tokens", "1024", "--held-out-tokens", "400"]
    analyze(*words, "--json", str(tmp_path / "o.json"))
    of_input = json.loads((tmp_path / "o.json").read_text())["input"]
    shown = capsys.readouterr().out
    kl, ce, less = of_input["kl"], of_input["cross_entropy"], of_input["less_rotated"]
    assert re.search(rf"^as it is +{kl['score']:.4f} +{ce['score']:.4f}$", shown, flags=re.M)
    assert re.search(rf"^rotated +{kl['floor']:.4f} +{ce['floor']:.4f}$", shown, flags=re.M)
    half = (less["high"] - less["low"]) / 2
    assert (
        "5 random rotations of the table's columns; CE as it is less rotated: "
        f"{less['mean']:.4f} +- {half:.4f}, paired by window"
    ) in shown
