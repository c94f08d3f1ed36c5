"""Role regret: J and its minimum against float64 by hand, a control without a tie, and what the command says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import matplotlib.figure
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from conftest import small_config
from runs import SHRUNK, STEPS
from test_analysis_command import analyze
from test_model import recompute
from test_study_results import fake_study

from tiedjax import tying
from tiedjax.analysis.basis import held_out
from tiedjax.analysis.basis.held_out import FrozenModel, held_out_windows, training_windows
from tiedjax.analysis.basis.run_data import data_of
from tiedjax.analysis.basis.statistics import bootstrap_mean
from tiedjax.analysis.basis.strata import strata
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.instruments.regret import refit as module
from tiedjax.analysis.instruments.regret import section
from tiedjax.analysis.instruments.regret.refit import BALANCED, ONE_ARRAY, TWO_ARRAYS, HeldLoss, refit
from tiedjax.analysis.instruments.regret.regret import REGRETS, Regret, measure, regret
from tiedjax.errors import UserError
from tiedjax.model import init_body
from tiedjax.run import Run, load_run
from tiedjax.tying import Tables

V, D, T = 32, 16, 8
INPUT, OUTPUT = (("input",),), (("output",),)


def toy(scheme: str, seed: int = 0) -> FrozenModel:
    """A model with random tables and a body that moves the prediction."""
    cfg = small_config(scheme, layers=1)
    body = jax.tree.map(
        lambda leaf: np.asarray(3 * leaf, np.float32), nn.unbox(init_body(cfg.model, jax.random.key(0)))
    )
    names = {"tied": ["shared"], "untied": ["input", "output"]}[scheme]
    rng = np.random.default_rng(seed)
    params = {"tables": {name: rng.normal(size=(V, D)).astype(np.float32) / 4 for name in names}, "body": body}
    scheme = tying.scheme_of(cfg.tying)
    run = SimpleNamespace(config=cfg, checkpoint_steps=[7], params=lambda step: params, scheme=lambda step: scheme)
    return FrozenModel(run)


def text(seed: int, windows: int, follow: float = 0.7) -> np.ndarray:
    """Each token is mostly followed by one of its own; otherwise by any, frequencies falling as 1 / rank."""
    rng = np.random.default_rng(seed)
    successor_V, chance_V = np.random.default_rng(9).permutation(V), 1 / np.arange(1, V + 1)
    tokens_WS = rng.choice(V, (windows, T + 1), p=chance_V / chance_V.sum()).astype(np.int32)
    for t in range(T):
        tokens_WS[:, t + 1] = np.where(rng.random(windows) < follow, successor_V[tokens_WS[:, t]], tokens_WS[:, t + 1])
    return tokens_WS


FITTING, HELD_OUT = text(0, 300), text(1, 50)
GROUPS = {"first": np.arange(V) < 5, "others": np.arange(V) >= 5}


def states(model: FrozenModel, E_VD: np.ndarray, tokens_WS: np.ndarray) -> np.ndarray:
    """The normed last states [N, D] by hand, in float64."""
    body = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.body)
    return recompute(model.config, body, np.asarray(E_VD, np.float64)[tokens_WS[:, :-1]])[-1].reshape(-1, D)


def nats(model: FrozenModel, tables: Tables, tokens_WS: np.ndarray) -> np.ndarray:
    """What every target costs, [W, T], in float64."""
    logits_NV = states(model, tables.input, tokens_WS) @ np.asarray(tables.output, np.float64).T
    target_N = tokens_WS[:, 1:].ravel()
    at_target_N = logits_NV[np.arange(len(target_N)), target_N]
    return (scipy.special.logsumexp(logits_NV, axis=1) - at_target_N).reshape(len(tokens_WS), T)


def curvatures(model: FrozenModel, tokens_WS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """C_in by differences of the summed loss in every number that is looked up, and C_out."""
    E_VD, U_VD = (np.asarray(table, np.float64) for table in (model.tables.input, model.tables.output))
    body = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.body)
    gradients = []
    for window_S in tokens_WS:
        x_TD = E_VD[window_S[:-1]]

        def loss(x_TD: np.ndarray, target_T: np.ndarray = window_S[1:]) -> float:
            log_p_TV = scipy.special.log_softmax(recompute(model.config, body, x_TD[None])[-1][0] @ U_VD.T, axis=1)
            return float(-log_p_TV[np.arange(T), target_T].sum())

        for t in range(T):
            steps = 1e-5 * np.eye(T * D).reshape(T, D, T, D)[t]
            gradients.append([(loss(x_TD + step) - loss(x_TD - step)) / 2e-5 for step in steps])
    g_ND, h_ND = np.array(gradients), states(model, E_VD, tokens_WS)
    return g_ND.T @ g_ND / len(g_ND), h_ND.T @ h_ND / len(h_ND)


@pytest.fixture(scope="module")
def tied() -> Regret:
    return regret(toy("tied"), FITTING, HELD_OUT, GROUPS, hold=100)


@pytest.fixture(scope="module")
def untied() -> Regret:
    return regret(toy("untied"), FITTING, HELD_OUT, GROUPS, hold=100)


# ---- J and its minima, by hand


@pytest.mark.parametrize("scheme", ["tied", "untied"])
def test_j_and_its_gradient_are_those_of_float64(scheme, monkeypatch):
    """In batches of which the last is not full."""
    monkeypatch.setattr(held_out, "_FORWARD", 2 * T)
    model, tokens_WS, hold = toy(scheme), FITTING[:5], 40.0
    held_loss = HeldLoss(model, tokens_WS, hold)
    C_in, C_out = curvatures(model, tokens_WS[:2])  # of the first batch
    rng = np.random.default_rng(2)
    trained = [np.asarray(table, np.float64) for table in (model.tables.input, model.tables.output)]
    tables = Tables(*(table_VD + 0.1 * rng.normal(size=(V, D)) for table_VD in trained))

    def j(tables: Tables) -> float:
        moved = zip(tables, trained, (C_in, C_out), strict=True)
        held = sum(np.sum(((now - then) @ C) * (now - then)) for now, then, C in moved)
        return nats(model, tables, tokens_WS).mean() + hold / (2 * 5 * T) * held

    found = held_loss.slopes(tables)
    assert found.loss == pytest.approx(nats(model, tables, tokens_WS).mean(), abs=1e-5)
    assert found.held_loss == pytest.approx(j(tables), abs=1e-4)
    for role in ("input", "output"):
        for _ in range(3):
            step = 1e-4 * rng.normal(size=(V, D))
            ends = [j(tables._replace(**{role: getattr(tables, role) + sign * step})) for sign in (1, -1)]
            assert np.sum(found.by_role[role] * step) == pytest.approx((ends[0] - ends[1]) / 2, rel=2e-3, abs=1e-7)
        alone = held_loss.slopes(tables, (role,))
        assert list(alone.by_role) == [role]
        np.testing.assert_allclose(alone.by_role[role], found.by_role[role], atol=1e-6)
    a, b = (found.by_role[role].ravel() for role in ("input", "output"))
    assert found.balance == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("hold", [0, 30])
def test_an_output_table_ends_where_another_optimiser_ends(hold, monkeypatch):
    """The convex role, in float64, from another start."""
    monkeypatch.setattr(module, "TOLERANCE", 2e-6)
    model = toy("untied")
    E_VD, U_VD = (np.asarray(table, np.float64) for table in (model.tables.input, model.tables.output))
    h_ND, target_N = states(model, E_VD, FITTING), FITTING[:, 1:].ravel()
    C_out, N = h_ND.T @ h_ND / len(h_ND), len(target_N)

    def j(point: np.ndarray) -> tuple[float, np.ndarray]:
        logits_NV = h_ND @ point.reshape(V, D).T
        moved_VD = point.reshape(V, D) - U_VD
        p_NV = scipy.special.softmax(logits_NV, axis=1)
        loss = (scipy.special.logsumexp(logits_NV, axis=1) - logits_NV[np.arange(N), target_N]).mean()
        p_NV[np.arange(N), target_N] -= 1
        slope_VD = p_NV.T @ h_ND / N + hold / N * moved_VD @ C_out
        return loss + hold / (2 * N) * np.sum((moved_VD @ C_out) * moved_VD), slope_VD.ravel()

    options = {"maxiter": 5000, "maxfun": 10_000, "ftol": 1e-13, "gtol": 1e-7}
    least = scipy.optimize.minimize(j, np.zeros(V * D), jac=True, method="L-BFGS-B", options=options)
    held_loss = HeldLoss(model, FITTING, hold)
    found = refit(held_loss, held_loss.trained, OUTPUT)
    assert found.converged
    assert j(found.tables.output.ravel())[0] == pytest.approx(least.fun, abs=1e-4)
    assert least.fun < j(U_VD.ravel())[0] - 0.3
    np.testing.assert_array_equal(found.tables.input, model.tables.input)
    wanted = nats(model, Tables(E_VD, least.x.reshape(V, D)), HELD_OUT).mean()
    assert nats(model, found.tables, HELD_OUT).mean() == pytest.approx(wanted, abs=1e-3)


def test_what_a_re_fit_saves_is_the_difference_of_held_out_losses_by_hand(tied):
    model = toy("tied")
    held_loss = HeldLoss(model, FITTING, 100)
    own = refit(held_loss, held_loss.trained, ONE_ARRAY)
    assert own.tables.input is own.tables.output
    ends = {"own": (held_loss.trained, own.tables, tied.own)}
    for name, arrays in {"input": INPUT, "output": OUTPUT, "both": (*INPUT, *OUTPUT)}.items():
        ends[name] = (own.tables, refit(held_loss, own.tables, arrays).tables, tied.regrets[name])
    for before, after, saving in ends.values():
        saved_WT = nats(model, before, HELD_OUT) - nats(model, after, HELD_OUT)
        wanted = bootstrap_mean(saved_WT.mean(axis=1))
        assert (saving.held_out.mean, saving.held_out.low) == pytest.approx((wanted.mean, wanted.low), abs=1e-4)
        assert saving.fitting == pytest.approx(
            (nats(model, before, FITTING) - nats(model, after, FITTING)).mean(), abs=1e-4
        )
        for name, mask_V in GROUPS.items():
            assert saving.strata[name].mean == pytest.approx(saved_WT[mask_V[HELD_OUT[:, 1:]]].mean(), abs=1e-4)
    saved = [saving.held_out.mean for _, _, saving in ends.values()]
    assert len(np.unique(np.round(saved, 3))) == 4  # what is swapped shows
    assert tied.loss.mean == pytest.approx(nats(model, held_loss.trained, HELD_OUT).mean(), abs=1e-5)
    sizes = (FITTING[:, 1:].size, HELD_OUT[:, 1:].size, len(HELD_OUT))
    assert (tied.fitting_tokens, tied.held_out_tokens, tied.held_out_windows) == sizes


# ---- laws


def test_roles_that_pull_one_table_apart_have_a_tension(tied):
    assert tied.shared
    assert tied.converged
    assert tied.balance <= BALANCED
    assert tied.trained_balance > -0.5
    assert tied.regrets["both"].held_out.low > 0.05
    for role in ("input", "output"):
        assert 0 < tied.regrets[role].fitting < tied.regrets["both"].fitting


def test_without_a_tie_nothing_is_left_to_save_once_both_tables_are_re_fitted(untied):
    assert not untied.shared
    assert untied.converged
    assert (untied.balance, untied.trained_balance) == (None, None)
    assert untied.own.held_out.low > 0.5
    for saving in untied.regrets.values():
        assert abs(saving.held_out.mean) < 3e-3
        assert abs(saving.fitting) < 3e-3


def test_text_of_another_kind_is_what_is_scored():
    """Successors on the fitting text, none on the held-out one: little of what is saved there carries over."""
    found = regret(toy("tied"), FITTING, text(3, 50, follow=0.0), GROUPS, hold=100)
    assert found.regrets["both"].fitting > 0.5
    assert found.regrets["both"].held_out.high < found.regrets["both"].fitting / 2


def test_a_stronger_hold_moves_tables_less():
    model, moved = toy("untied"), []
    for hold in (0, 10, 1000):
        held_loss = HeldLoss(model, FITTING, hold)
        fit = refit(held_loss, held_loss.trained, TWO_ARRAYS)
        moved.append([np.linalg.norm(now - then) for now, then in zip(fit.tables, held_loss.trained, strict=True)])
    assert np.all(np.diff(moved, axis=0) < 0)


def test_a_re_fit_that_is_cut_short_has_no_tension():
    found = regret(toy("tied"), FITTING, HELD_OUT, GROUPS, hold=100, iterations=2)
    assert (found.own.iterations, found.own.converged, found.converged) == (2, False, False)
    assert found.regrets == {}


def test_one_array_converges_only_where_its_roles_balance(monkeypatch):
    """A tolerance that every iteration meets."""
    monkeypatch.setattr(module, "TOLERANCE", 10.0)
    held_loss = HeldLoss(toy("tied"), FITTING, 100)
    shared, apart = (refit(held_loss, held_loss.trained, arrays) for arrays in (ONE_ARRAY, TWO_ARRAYS))
    assert shared.converged
    assert shared.balance <= BALANCED
    assert shared.iterations > apart.iterations == 5


# ---- command and section


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return load_run(finished)


@pytest.fixture(scope="module")
def measured(run) -> Any:
    return measure(FrozenModel(run), run, data_of(run))


def test_a_run_is_measured_on_text_that_it_was_shown_and_scored_on_text_that_it_was_not(run, measured):
    prepared, model, T = data_of(run), FrozenModel(run), SHRUNK["model.seq_len"]
    fitting_WS = np.concatenate(list(training_windows(run, prepared, 65_536)))
    wanted = regret(
        model,
        fitting_WS,
        held_out_windows(prepared, T, 16_384),
        {name: mask_V for name, mask_V in strata(run.token_counts[1]).items() if name != "never seen"},
        hold=16 * SHRUNK["model.d_model"],
    )
    assert vars(measured) == vars(wanted) | {"step": STEPS, "rows": 320, "width": 16}
    assert measured.converged


def test_the_command_prints_and_writes_what_is_measured(run, measured, tmp_path, capsys):
    analyze("regret", str(run.path), "--json", str(tmp_path / "o.json"))
    printed, out = capsys.readouterr().out, json.loads((tmp_path / "o.json").read_text())
    assert (out["instrument"], out["form"], out["rows"], out["width"]) == ("regret", "corrected", 320, 16)
    assert (out["step"], out["shared"], out["hold"]) == (STEPS, True, 256)
    assert [i["role"] for i in out["inputs"]] == ["shared"]
    assert out["own"]["fitting"] == measured.own.fitting
    assert out["regrets"]["both"]["held_out"] == vars(measured.regrets["both"].held_out)
    spread = lambda span: f"{span['mean']:.4f} +- {(span['high'] - span['low']) / 2:.4f}"

    def cells(saving: dict[str, Any]) -> str:
        means = [*(span["mean"] for span in saving["strata"].values()), saving["fitting"]]
        return " ".join([spread(saving["held_out"]).replace("+- ", ""), *map(_cell, means), str(saving["iterations"])])

    regrets = out["regrets"]
    assert " ".join(printed.split()) == " ".join(
        f"""{run.path} at step {STEPS}: re-fitted on {out["fitting_tokens"]:,} tokens, scored on
        {out["held_out_tokens"]:,} held-out ones, {spread(out["loss"])} nats each as trained
        re-fitted saves +- {" ".join(out["own"]["strata"])} fitting iterations
        the shared table {cells(out["own"])}
        then input alone {cells(regrets["input"])}
        then output alone {cells(regrets["output"])}
        then both apart {cells(regrets["both"])}
        balance {out["balance"]:.4f} ({out["trained_balance"]:.4f} as trained): cosine of the two role gradients on the
        fitting text
        tension {spread(regrets["both"]["held_out"])}: what both apart save after the shared one's re-fit
        saves: nats a held-out token, +- half a 95 % interval over held-out windows; rare, middle, frequent: the
        target's third of the tokens; fitting: on the text that tables are re-fitted on; every row is held where
        training left it with the weight of 256 occurrences""".split()
    )


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def test_options_reach_the_re_fits_and_one_that_has_not_converged_prints_no_tension(run, tmp_path, capsys):
    options = ["--fitting-tokens", "512", "--held-out-tokens", "320", "--iterations", "1", "--hold", "0"]
    analyze("regret", str(run.path), *options, "--json", str(tmp_path / "o.json"))
    printed, out = capsys.readouterr().out, json.loads((tmp_path / "o.json").read_text())
    sizes = (out["fitting_tokens"], out["held_out_tokens"], out["own"]["iterations"], out["hold"])
    assert sizes == (512, 320, 1, 0)
    assert not re.search(r"(balance|tension) [-\d]", printed)
    assert "\nnot converged, so neither balance nor tension: give more --iterations or a larger --hold\n" in printed
    assert "then" not in printed.split("not converged")[0]


def test_bad_input_is_one_clear_line(run, tmp_path):
    without = tmp_path / "without"
    shutil.copytree(run.path, without)
    shutil.rmtree(without / "checkpoints")
    for words, line in [
        ([str(run.path), "--fitting-tokens", "0"], "--fitting-tokens: must be at least 1, got 0"),
        ([str(run.path), "--hold", "-1"], "--hold: must be at least 0, got -1"),
        ([str(run.path), "--iterations", "0"], "--iterations: must be at least 1, got 0"),
        ([str(without)], f"{without}: holds no checkpoint"),
    ]:
        with pytest.raises(UserError) as error:
            analyze("regret", *words)
        assert str(error.value) == line


class Disturbed(Run):
    """A run whose table is not quite what it was trained to be."""

    def params(self, step: int | None = None) -> dict:
        params = super().params(step)
        noise = np.random.default_rng(int(self.path.name)).normal(size=(320, 16)).astype(np.float32)
        return params | {"tables": {name: table + 0.1 * noise for name, table in params["tables"].items()}}


@pytest.fixture(scope="module")
def results(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A study of one run and three that are disturbed."""
    study, _ = fake_study(seeds=(0, 1))
    folder = tmp_path_factory.mktemp("disturbed")
    for name in ("0", "1", "2"):
        (folder / name).symlink_to(run.path)
    runs = {("untied", 0): run, ("untied", 1): Disturbed(folder / "0")}
    runs |= {("tied", 0): Disturbed(folder / "1"), ("tied", 1): Disturbed(folder / "2")}
    held = StudyRuns(study, runs)
    found = {"regret": section.together("untied", [r for seed in (0, 1) for r in section.collect(held, seed)])}
    return found | {"headline": {"arm": "tied", "reference": "untied"}, "arms": {"untied": {}, "tied": {}}}


def test_the_section_holds_what_the_command_measures_and_pairs_it_by_seed(measured, results):
    json.dumps(results["regret"], allow_nan=False)
    runs = {(r["arm"], r["seed"]): r for r in results["regret"]["runs"]}
    (twin,) = results["regret"]["twins"]
    assert twin["arm"] == "tied"
    for name in REGRETS:
        assert runs["untied", 0]["regrets"][name]["held_out"] == vars(measured.regrets[name].held_out)
        saved = {key: record["regrets"][name]["held_out"]["mean"] for key, record in runs.items()}
        by_seed = [saved["tied", seed] - saved["untied", seed] for seed in (0, 1)]
        assert by_seed[0] != by_seed[1]
        assert (twin[name]["mean"], twin[name]["n"]) == (pytest.approx(np.mean(by_seed), abs=1e-9), 2)


def test_the_sections_figure_can_be_drawn(results):
    (plot,) = section.plots(results)
    for panel in plot.panels:
        ax = matplotlib.figure.Figure().add_subplot()
        panel(ax, results)
        assert ax.get_legend_handles_labels()[1] == ["untied", "tied"]


def test_a_run_whose_re_fits_have_not_converged_counts_nowhere_but_in_a_sentence(results):
    records = json.loads(json.dumps(results["regret"]["runs"]))
    for record in records:
        if (record["arm"], record["seed"]) == ("tied", 0):
            record["own"]["converged"], record["regrets"] = False, {}
        if (record["arm"], record["seed"]) == ("tied", 1):
            record["regrets"]["both"]["converged"] = False
    cut = results | {"regret": section.together("untied", records)}
    assert cut["regret"]["twins"] == []
    assert section.answers(cut) == section.differences(cut) == []
    assert [row["arm"] for row in section.rows(cut)] == ["untied"]
    assert section.not_converged(cut) == [
        "The re-fits of 2 of 2 tied runs have not converged: these have neither balance nor tension, and do not count "
        "here."
    ]
    assert section.not_converged(results) == []


def test_runs_whose_text_is_gone_are_not_measured():
    study, runs = fake_study(seeds=(0,))
    records = section.collect(StudyRuns(study, runs), 0)
    found: dict[str, Any] = {"regret": section.together("untied", records)}
    found |= {"headline": {"arm": "tied", "reference": "untied"}}
    assert all("nowhere" in r["not_measured"] for r in found["regret"]["runs"])
    for empty in (section.plots, section.answers, section.rows, section.differences, section.not_converged):
        assert list(empty(found)) == []
    assert section.about(found) == ""
    assert len(section.not_measured(found)) == 1
