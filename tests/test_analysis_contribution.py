"""What blocks contribute: a float64 forward pass by hand, laws, and what the command and section say."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import matplotlib.figure
import numpy as np
import pytest
import scipy.special
from conftest import small_config
from runs import SHRUNK, STEPS
from test_analysis_command import analyze
from test_model import OPTIONS, alike, recompute, stack_layers
from test_study_results import fake_study

from tiedjax import tying
from tiedjax.analysis.basis import held_out
from tiedjax.analysis.basis.held_out import FrozenModel, held_out_windows
from tiedjax.analysis.basis.run_data import data_of
from tiedjax.analysis.basis.statistics import bootstrap_mean
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.instruments.contribution import contribution as module
from tiedjax.analysis.instruments.contribution import section
from tiedjax.analysis.instruments.contribution.contribution import (
    PARTS,
    Contribution,
    contribution,
    early_blocks,
    measure,
)
from tiedjax.analysis.instruments.lens import lens
from tiedjax.errors import UserError
from tiedjax.model import init_body
from tiedjax.run import Run, load_run

LAYERS, WINDOWS = 3, 5
SKIPPED = {"whole": ("attention", "mlp"), "attention": ("attention",), "mlp": ("mlp",)}


def untrained(
    name: str, *, scan_layers: bool = False, uniform: bool = False, silent: tuple[str, ...] = (), **changes: Any
) -> FrozenModel:
    """A model with random tables and norm scales, whose blocks move the prediction; `silent` output kernels are 0.

    Where layers are scanned, or `uniform`, all have the window if some have.
    """
    options = alike(OPTIONS[name]) if scan_layers or uniform else OPTIONS[name]
    cfg = small_config("untied", **{**options, "layers": LAYERS, "scan_layers": scan_layers, **changes})
    rng = np.random.default_rng(0)
    unrolled = dataclasses.replace(cfg.model, scan_layers=False)
    body = nn.unbox(init_body(unrolled, jax.random.key(0)))

    def changed(path: Any, leaf: Any) -> np.ndarray:
        names = [entry.key for entry in path]
        if names[-1] == "scale":
            return np.asarray(leaf * rng.uniform(0.5, 2, leaf.shape), np.float32)
        return np.asarray(leaf * (0 if "/".join(names[1:4]) in silent else 3), np.float32)

    body = jax.tree_util.tree_map_with_path(changed, body)
    tables = {role: rng.normal(size=(32, 16)).astype(np.float32) for role in ("input", "output")}
    params = {"tables": tables, "body": stack_layers(body) if scan_layers else body}
    scheme = tying.scheme_of(cfg.tying)
    run = SimpleNamespace(config=cfg, checkpoint_steps=[7], params=lambda step: params, scheme=lambda step: scheme)
    return FrozenModel(run)


def windows(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 32, (WINDOWS, 9)).astype(np.int32)


def oracle(model: FrozenModel, tokens_WS: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss in bits, and [L, P] of what is added and of what skipping costs: the forward pass by hand, in float64."""
    body = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.body)
    E_VD, U_VD = (np.asarray(table, np.float64) for table in (model.tables.input, model.tables.output))
    x_BTD = E_VD[tokens_WS[:, :-1]]

    def bits(states: list[np.ndarray]) -> float:
        log_p = scipy.special.log_softmax(states[-1] @ U_VD.T, axis=-1)
        return float(-np.take_along_axis(log_p, tokens_WS[:, 1:, None], axis=-1).mean() / np.log(2))

    ratio = lambda added, read: (np.linalg.norm(added, axis=-1) / np.linalg.norm(read, axis=-1)).mean()
    full = recompute(model.config, body, x_BTD)
    added, cost = np.zeros((LAYERS, 3)), np.zeros((LAYERS, 3))
    for i in range(LAYERS):
        before, after = full[i], full[i + 1]
        between = recompute(model.config, body, x_BTD, {(i, "mlp")})[i + 1]
        added[i] = ratio(after - before, before), ratio(between - before, before), ratio(after - between, between)
        for p, parts in enumerate(SKIPPED.values()):
            cost[i, p] = bits(recompute(model.config, body, x_BTD, {(i, part) for part in parts})) - bits(full)
    return bits(full), added, cost


def means(found: Contribution, quantity: str) -> np.ndarray:
    """[L, P]."""
    return np.array([[getattr(getattr(block, part), quantity).mean for part in PARTS] for block in found.blocks])


# ---- against a forward pass by hand


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_contributions_are_those_of_a_forward_pass_in_float64(name, scan_layers):
    found = contribution(untrained(name, scan_layers=scan_layers), windows())
    loss, added, cost = oracle(untrained(name, uniform=scan_layers), windows())
    assert found.loss.mean == pytest.approx(loss, abs=1e-5)
    np.testing.assert_allclose(means(found, "added"), added, rtol=1e-5)
    np.testing.assert_allclose(means(found, "skip_cost"), cost, rtol=0, atol=2e-5)
    assert np.abs(cost).min() > 1e-3
    assert len(np.unique(np.round(np.concatenate([added, cost]), 4))) == 6 * LAYERS  # what is swapped shows
    assert [block.block for block in found.blocks] == [1, 2, 3]
    assert (found.held_out_tokens, found.held_out_windows) == (WINDOWS * 8, WINDOWS)


def test_intervals_are_over_windows_and_paired():
    """Those of windows that are measured one by one, each beside its own loss."""
    model = untrained("llama")
    found = contribution(model, windows())
    alone = [contribution(model, window[None]) for window in windows()]
    for block, part, quantity in itertools.product(range(LAYERS), range(3), ("added", "skip_cost")):
        span = getattr(getattr(found.blocks[block], PARTS[part]), quantity)
        wanted = bootstrap_mean(np.array([means(one, quantity)[block, part] for one in alone]))
        assert (span.mean, span.low, span.high) == pytest.approx((wanted.mean, wanted.low, wanted.high), abs=1e-5)
        assert (span.n, span.confidence) == (WINDOWS, 0.95)
    assert alone[0].blocks[0].whole.added.low is None


def test_batches_change_nothing(monkeypatch):
    """The last one is not full."""
    model = untrained("olmo")
    whole = contribution(model, windows())
    monkeypatch.setattr(held_out, "_FORWARD", 3 * 8)
    assert WINDOWS % 3
    parts = contribution(model, windows())
    assert (parts.held_out_tokens, parts.held_out_windows) == (whole.held_out_tokens, whole.held_out_windows)
    for quantity in ("added", "skip_cost"):
        np.testing.assert_allclose(means(parts, quantity), means(whole, quantity), atol=1e-5)


# ---- laws


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_block_whose_output_kernels_are_zero_adds_nothing_and_costs_nothing(scan_layers):
    """Exactly: nothing but the skipped part differs between what is compared."""
    attention, mlp = "layer_1/attention/out", "layer_1/mlp/down"
    assert np.all(means(contribution(untrained("olmo", scan_layers=scan_layers), windows()), "added")[1] > 0)
    for silent, zero in [((attention, mlp), (0, 1, 2)), ((attention,), (1,)), ((mlp,), (2,))]:
        found = contribution(untrained("olmo", scan_layers=scan_layers, silent=silent), windows())
        for quantity in ("added", "skip_cost"):
            values = means(found, quantity)
            assert [p for p in range(3) if values[1, p] == 0] == list(zero)
            assert np.all(values[[0, 2]] != 0)


def test_the_blocks_one_by_one_are_the_model():
    """The last state that the blocks give is that of the whole program, whose layers are scanned or not."""
    for scan_layers in (False, True):
        model = untrained("qk-norm", scan_layers=scan_layers)
        y_ND = model.normed(model.last_states(windows()))
        log_p = np.asarray(model.log_probabilities(y_ND), np.float64)
        loss = -log_p[np.arange(len(log_p)), windows()[:, 1:].ravel()].mean() / np.log(2)
        assert contribution(model, windows()).loss.mean == pytest.approx(loss, abs=1e-5)


def test_a_model_of_one_shape_is_compiled_once(monkeypatch):
    """Whichever part is skipped, in a last batch that is not full too, and for another run of that shape."""
    monkeypatch.setattr(held_out, "_FORWARD", 3 * 8)
    shape = {"d_ff": 20}  # of no other test here
    before = module._block._cache_size()
    contribution(untrained("olmo", **shape), windows())
    contribution(untrained("olmo", **shape, silent=("layer_0/mlp/down",)), windows(seed=2))
    assert module._block._cache_size() == before + 1


def test_a_model_that_is_not_finite_has_no_numbers():
    model = untrained("olmo")
    model.body = jax.tree.map(lambda leaf: leaf * np.nan, model.body)
    found = contribution(model, windows())
    assert found.loss.mean is None
    assert [block.mlp.added.mean for block in found.blocks] == [None] * LAYERS
    assert [block.whole.skip_cost.mean for block in found.blocks] == [None] * LAYERS


def test_a_window_that_reads_zeros_does_not_count_in_what_is_added():
    model = untrained("olmo")
    tokens = windows()
    tokens[:, :-1] %= 31
    tokens[2, 3] = 31
    model.E_VD = model.E_VD.at[31].set(0)
    first = contribution(model, tokens).blocks[0]
    assert (first.whole.added.n, first.whole.skip_cost.n) == (WINDOWS - 1, WINDOWS)
    others = contribution(model, np.delete(tokens, 2, axis=0)).blocks[0]
    assert first.whole.added.mean == pytest.approx(others.whole.added.mean, abs=1e-6)


def test_early_blocks_are_those_between_the_early_states_of_the_lens():
    assert [list(early_blocks(layers)) for layers in (1, 2, 3, 4, 16)] == [[], [], [1], [1], [1, 2, 3, 4, 5]]
    for layers in (1, 2, 3, 4, 16):
        assert list(lens.early_states(layers)) == [0, *early_blocks(layers)]
    assert module.HELD_OUT_TOKENS == lens.HELD_OUT_TOKENS


# ---- command and section

V, D, T = SHRUNK["model.vocab_size"], SHRUNK["model.d_model"], SHRUNK["model.seq_len"]


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return load_run(finished)


def test_the_command_prints_and_writes_what_is_measured(run, tmp_path, capsys):
    analyze("blocks", str(run.path), "--held-out-tokens", "400", "--json", str(tmp_path / "o.json"))
    printed, out = capsys.readouterr().out, json.loads((tmp_path / "o.json").read_text())
    wanted = contribution(FrozenModel(run), held_out_windows(data_of(run), T, 400))
    assert (out["instrument"], out["form"], out["rows"], out["width"]) == ("blocks", "corrected", V, D)
    assert (out["step"], out["held_out_tokens"], out["held_out_windows"]) == (STEPS, 400, 25)
    assert [i["role"] for i in out["inputs"]] == ["shared"]
    assert out["loss"]["mean"] == wanted.loss.mean
    for part in PARTS:
        for quantity in ("added", "skip_cost"):
            assert out["blocks"][0][part][quantity] == vars(getattr(getattr(wanted.blocks[0], part), quantity))

    def cells(quantity: str) -> str:
        spans = [out["blocks"][0][part][quantity] for part in PARTS]
        return "  ".join(f"{s['mean']:.4f} {(s['high'] - s['low']) / 2:.4f}" for s in spans)

    loss = out["loss"]
    assert " ".join(printed.split()) == " ".join(
        f"""{run.path} at step {STEPS}: 400 held-out tokens, {loss["mean"]:.4f} +-
        {(loss["high"] - loss["low"]) / 2:.4f} bits each
        added / read block +- attention +- MLP +-
        block 1 {cells("added")}
        cost of skipping block +- attention +- MLP +-
        block 1 {cells("skip_cost")}
        added / read: norm of what is added over that of what is read, mean over positions; cost of skipping: bits a
        token; +- half a 95 % interval over held-out windows; attention reads what its block reads, the MLP that and
        what attention adds; blocks after a skipped one read a stream that training never showed them""".split()
    )


def test_bad_input_is_one_clear_line(run, tmp_path):
    without = tmp_path / "without"
    shutil.copytree(run.path, without)
    shutil.rmtree(without / "checkpoints")
    for words, line in [
        ([str(run.path), "--held-out-tokens", "0"], "--held-out-tokens: must be at least 1, got 0"),
        ([str(without)], f"{without}: holds no checkpoint"),
        (
            [str(run.path), "--data", "text:/nowhere/*.jsonl"],
            "data.source: missing corpus: no file matches '/nowhere/*.jsonl'; give a path or a glob of files",
        ),
    ]:
        with pytest.raises(UserError) as error:
            analyze("blocks", *words)
        assert str(error.value) == line


class Disturbed(Run):
    """A run whose table is not quite what it was trained to be."""

    def params(self, step: int | None = None) -> dict:
        params = super().params(step)
        noise = np.random.default_rng(int(self.path.name)).normal(size=(V, D)).astype(np.float32)
        return params | {"tables": {name: table + 0.5 * noise for name, table in params["tables"].items()}}


@pytest.fixture(scope="module")
def results(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A study of two runs and two that are disturbed."""
    study, _ = fake_study(seeds=(0, 1))
    folder = tmp_path_factory.mktemp("disturbed")
    for name in ("0", "1", "2"):
        (folder / name).symlink_to(run.path)
    runs = {("untied", 0): run, ("untied", 1): Disturbed(folder / "0")}
    runs |= {("tied", 0): Disturbed(folder / "1"), ("tied", 1): Disturbed(folder / "2")}
    found = {"blocks": section.collect(StudyRuns(study, runs))}
    return found | {"headline": {"arm": "tied", "reference": "untied"}, "arms": {"untied": {}, "tied": {}}}


def test_the_section_holds_what_the_command_measures_and_pairs_it_by_seed(run, results):
    json.dumps(results["blocks"], allow_nan=False)
    runs = {(r["arm"], r["seed"]): r for r in results["blocks"]["runs"]}
    wanted = measure(FrozenModel(run), run, data_of(run))
    assert runs["untied", 0]["loss"]["mean"] == wanted.loss.mean
    (twin,) = results["blocks"]["twins"]
    assert (twin["arm"], twin["block"], twin["early"]) == ("tied", 1, False)
    for part in PARTS:
        for quantity in ("added", "skip_cost"):
            assert runs["untied", 0]["blocks"][0][part][quantity] == vars(
                getattr(getattr(wanted.blocks[0], part), quantity)
            )
            by_seed = [
                np.subtract(*(runs[arm, seed]["blocks"][0][part][quantity]["mean"] for arm in ("tied", "untied")))
                for seed in (0, 1)
            ]
            assert by_seed[0] != by_seed[1]
            assert twin[part][quantity]["mean"] == pytest.approx(np.mean(by_seed), abs=1e-9)
            assert twin[part][quantity]["n"] == 2


def test_the_sections_figure_can_be_drawn(results):
    (plot,) = section.plots(results)
    for panel in plot.panels:
        ax = matplotlib.figure.Figure().add_subplot()
        panel(ax, results)
        assert ax.get_legend_handles_labels()[1] == ["untied", "tied"]


def test_runs_of_different_depth_are_compared_block_by_block_where_both_have_one(results):
    deep = json.loads(json.dumps(results["blocks"]["runs"]))
    for record in deep:
        if record["arm"] == "tied":
            record["blocks"] = [record["blocks"][0] | {"block": i} for i in (1, 2, 3)]
    assert [twin["block"] for twin in section._twins("untied", deep)] == [1]
    assert [twin["block"] for twin in section._twins("tied", deep)] == [1]


def test_runs_whose_text_is_gone_are_not_measured():
    study, runs = fake_study(seeds=(0,))
    found: dict[str, Any] = {"blocks": section.collect(StudyRuns(study, runs))}
    found |= {"headline": {"arm": "tied", "reference": "untied"}}
    assert all("nowhere" in r["not_measured"] for r in found["blocks"]["runs"])
    for empty in (section.plots, section.answers, section.rows, section.differences, section.losses):
        assert list(empty(found)) == []
    assert len(section.not_measured(found)) == 1
