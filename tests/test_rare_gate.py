"""The rare-token gate: what it takes from the output role's gradient, against NumPy, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from conftest import GRADIENT_DESCENT, random_tokens, slow_but, small_config
from loss_program import inputs, powers
from programs import TESTS, finish, start
from runs import STEPS, arguments, assert_same_run, rows

from tiedjax import cli, gradients, loss, model, step, tying
from tiedjax.config import DataConfig, OptimizerConfig, RunConfig, TableOptimizerConfig, TrainConfig, TyingConfig
from tiedjax.cost import bench, compile
from tiedjax.errors import UserError
from tiedjax.loss import cross_entropy
from tiedjax.sharding import Layout, make_mesh
from tiedjax.tying import RareGate, Tables

RARE = np.array([0, 3, 5, 17, 20, 31])
GATE = RareGate(RARE.astype(np.int32), np.float32([0, 0.25, 0.5, 0.125, 0.75, 0]))
DECILES = tuple(0.5 + 0.25 * i for i in range(10))


def gated_config(scheme: str = "tied", **changes: Any) -> RunConfig:
    """With the gate, unless the changes have a `tying` of their own."""
    return small_config(scheme, **({"tying": TyingConfig(scheme=scheme, rare_gate=0.5)} | changes))  # type: ignore[arg-type]


def without(cfg: RunConfig) -> RunConfig:
    return dataclasses.replace(cfg, tying=dataclasses.replace(cfg.tying, rare_gate=None))


def push(
    h_ND: np.ndarray,
    U_VD: np.ndarray,
    targets_N: np.ndarray,
    weights_N: np.ndarray,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    bias_V: Any = 0.0,
) -> np.ndarray:
    """[R, D] by the definition: the gradient of the rows `RARE` from tokens whose target is none of them."""
    raw_NV = h_ND @ U_VD.T
    slope_NV = 1.0 if soft_cap is None else 1 - np.tanh(raw_NV / soft_cap) ** 2
    logits_NV = (raw_NV if soft_cap is None else soft_cap * np.tanh(raw_NV / soft_cap)) + bias_V
    log_sum_N = scipy.special.logsumexp(logits_NV, axis=-1)
    rate_NV = scipy.special.softmax(logits_NV, axis=-1) * (1 + 2 * z_loss * log_sum_N[:, None]) * slope_NV
    sum_RD = np.zeros((len(RARE), h_ND.shape[1]))
    for n in range(len(h_ND)):
        if targets_N[n] >= 0 and targets_N[n] not in RARE:
            sum_RD += weights_N[n] * np.outer(rate_NV[n, RARE], h_ND[n])
    return sum_RD


# ---- The loss ----


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize(
    ("z_loss", "soft_cap", "bias", "kernel", "platform"),
    [
        (0.0, None, False, None, "cpu"),
        (0.1, 2.0, True, None, "gpu"),
        (0.1, None, False, powers, "cpu"),
    ],
)
def test_the_push_is_that_of_other_targets_and_observing_it_changes_nothing(
    z_loss: float,
    soft_cap: float | None,
    bias: bool,
    kernel: Any,
    platform: str,
    chunk: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With weights and targets to ignore, by both ways of computing a chunk."""
    monkeypatch.setattr(loss, "kernel_for", lambda *_: kernel)
    monkeypatch.setattr(Layout, "platform", platform)
    h_BTD, U_VD, targets_BT, weights_BT = inputs()
    bias_V = np.random.default_rng(1).standard_normal(len(U_VD)) if bias else None
    options: dict[str, Any] = {"z_loss": z_loss, "soft_cap": soft_cap, "bias_V": bias_V, "chunk": chunk}

    def tripled(h_BTD: Any, U_VD: Any, push_RD: Any) -> jax.Array:
        rare = {} if push_RD is None else {"rare_R": jnp.asarray(RARE, jnp.int32), "push_RD": push_RD}
        return 3 * cross_entropy(h_BTD, U_VD, targets_BT, weights_BT, **options, **rare)[0]

    of, arrays = jax.value_and_grad(tripled, argnums=(0, 1, 2)), (jnp.asarray(h_BTD), jnp.asarray(U_VD))
    total, (dh_BTD, dU_VD, push_RD) = of(*arrays, jnp.zeros((len(RARE), h_BTD.shape[-1])))
    flat = h_BTD.reshape(-1, h_BTD.shape[-1]), U_VD, targets_BT.reshape(-1), weights_BT.reshape(-1)
    wanted_RD = 3 * push(*flat, z_loss=z_loss, soft_cap=soft_cap, bias_V=0.0 if bias_V is None else bias_V)
    np.testing.assert_allclose(push_RD, wanted_RD, rtol=1e-11, atol=1e-12)
    alone, (dh_alone_BTD, dU_alone_VD, _) = of(*arrays, None)
    for found, expected in ((total, alone), (dh_BTD, dh_alone_BTD), (dU_VD, dU_alone_VD)):
        np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-14)


def test_the_push_is_as_exact_as_the_tables_gradient_where_the_states_are_bfloat16() -> None:
    h_BTD, U_VD, targets_BT, weights_BT = inputs()
    h_BTD, U_VD = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (h_BTD, U_VD))

    def total(push_RD: Any) -> jax.Array:
        states = jnp.asarray(h_BTD, jnp.bfloat16)
        rare = {"rare_R": jnp.asarray(RARE, jnp.int32), "push_RD": push_RD}
        return cross_entropy(states, jnp.asarray(U_VD), targets_BT, weights_BT, **rare)[0]

    push_RD = jax.grad(total)(np.zeros((len(RARE), h_BTD.shape[-1]), np.float32))
    wanted_RD = push(h_BTD.reshape(-1, h_BTD.shape[-1]), U_VD, targets_BT.reshape(-1), weights_BT.reshape(-1))
    assert push_RD.dtype == np.float32
    assert np.abs(push_RD - wanted_RD).max() < 5e-3 * np.abs(wanted_RD).max()


# ---- The gradient of a batch ----


class Gradients(NamedTuple):
    """Of one batch: the loss, the params' gradient, the role gradients, and the output role's that goes on."""

    loss: Any
    grads: Any
    roles: Tables
    gated: Any


def gradients_of(cfg: RunConfig, params: Any, tokens_BS: np.ndarray, scale: Tables, gate: RareGate | None) -> Gradients:
    value, found = jax.jit(gradients.loss_and_gradients(cfg))(params, tokens_BS, scale, gate)
    grads, roles, _, *gated = jax.device_get(found)
    return Gradients(float(value), grads, roles, gated[0] if gated else None)


def params_of(cfg: RunConfig) -> dict[str, Any]:
    steps = step.make_steps(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), steps.init(jax.random.key(2)).params)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("scheme", "parts", "bias"), [("tied", 1, False), ("tied", 2, True), ("untied", 2, False), ("untied", 1, True)]
)
def test_the_gate_takes_its_share_of_the_push_from_rare_rows_alone(scheme: str, parts: int, bias: bool) -> None:
    """G_v - (1 - g_v) times the mean push, by NumPy, before the role scales; nothing else of the step changes."""
    cfg = gated_config(
        scheme,
        output_bias="unigram" if bias else "none",
        data=DataConfig(batch_size=8, microbatches=parts),
        train=TrainConfig(steps=10, z_loss=0.01),
    )
    params, tokens_BS, scale = params_of(cfg), random_tokens(cfg), Tables(jnp.float32(2), jnp.float32(0.5))
    if bias:
        params["output_bias"] = np.log(np.random.default_rng(0).dirichlet(np.ones(cfg.model.table_rows)))
    found, alone = (gradients_of(cfg, params, tokens_BS, scale, gate) for gate in (GATE, None))
    assert found.loss == pytest.approx(alone.loss, rel=1e-14)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-13), found.roles, alone.roles)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-13), found.grads["body"], alone.grads["body"]
    )
    tables = tying.scheme_of(cfg.tying).tables(params["tables"])
    states_BTD = model.Transformer(cfg.model).apply(params["body"], tables.input[tokens_BS[:, :-1]])
    h_ND, targets_N = np.asarray(states_BTD).reshape(-1, cfg.model.d_model), tokens_BS[:, 1:].reshape(-1)
    weights_N = np.full(len(h_ND), 1 / len(h_ND))
    push_RD = push(h_ND, tables.output, targets_N, weights_N, z_loss=0.01, bias_V=params.get("output_bias", 0.0))
    gated_VD = np.array(alone.roles.output)
    gated_VD[RARE] -= (1 - GATE.factor_R[:, None].astype(float)) * push_RD
    assert np.abs(push_RD).max() > 1e-4
    np.testing.assert_allclose(found.gated, gated_VD, rtol=0, atol=1e-13)
    others = np.setdiff1d(np.arange(cfg.model.table_rows), RARE)
    np.testing.assert_array_equal(found.gated[others], found.roles.output[others])
    parts_of_table = 2 * alone.roles.input, 0.5 * gated_VD
    by_name = zip(Tables._fields, parts_of_table, strict=True)
    wanted = {"shared": sum(parts_of_table)} if scheme == "tied" else dict(by_name)
    assert found.grads["tables"].keys() == wanted.keys()
    for name, G_VD in wanted.items():
        np.testing.assert_allclose(found.grads["tables"][name], G_VD, rtol=0, atol=1e-13)


@pytest.mark.usefixtures("float64")
def test_the_pull_and_the_push_of_rare_targets_are_left_alone() -> None:
    """Where every target is rare, and where every factor is 1, nothing changes; where none is, all of a row does."""
    cfg = gated_config("untied")
    params, tokens_BS, one = params_of(cfg), random_tokens(cfg), Tables(jnp.float32(1), jnp.float32(1))
    seen = np.unique(tokens_BS[:, 1:]).astype(np.int32)
    unseen = np.setdiff1d(np.arange(cfg.model.table_rows), seen).astype(np.int32)
    for gate in (RareGate(seen, np.zeros(len(seen), np.float32)), GATE._replace(factor_R=np.ones(6, np.float32))):
        found = gradients_of(cfg, params, tokens_BS, one, gate)
        np.testing.assert_allclose(found.gated, found.roles.output, rtol=0, atol=1e-17)
    found = gradients_of(cfg, params, tokens_BS, one, RareGate(unseen, np.zeros(len(unseen), np.float32)))
    assert np.abs(found.roles.output[unseen]).max() > 1e-4
    np.testing.assert_allclose(found.gated[unseen], 0, rtol=0, atol=1e-16)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scheme", sorted(set(tying.SCHEMES) - {"tied", "untied", "untied_equal"}))
def test_every_scheme_gets_the_gated_gradient_of_its_output_table(scheme: str) -> None:
    cfg = gated_config(scheme)
    steps = step.make_steps(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    unshared_S = tying.unshared_rows(cfg.tying, cfg.model, np.arange(cfg.model.table_rows))
    drawn = steps.init(jax.random.key(2), None, unshared_S).params
    widened = lambda x: np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x)
    params, one = jax.tree.map(widened, drawn), Tables(jnp.float32(1), jnp.float32(1))
    found = gradients_of(cfg, params, random_tokens(cfg), one, GATE)
    assert np.abs(found.gated - found.roles.output).max() > 1e-4
    wanted = tying.scheme_of(cfg.tying).transposed(params["tables"], Tables(found.roles.input, found.gated))
    for name, G in found.grads["tables"].items():
        np.testing.assert_allclose(G, wanted[name], rtol=0, atol=1e-13)


# ---- The step ----


class Trained(NamedTuple):
    states: list[step.TrainState]
    metrics: list[dict[str, Any]]


def trained(cfg: RunConfig, count: int, dtype: Any = jnp.float32) -> Trained:
    """The first states of a run under `GATE` if it has a gate, the start with them, and its metrics."""
    steps = step.make_steps(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    decile_V = np.arange(cfg.model.table_rows, dtype=np.int32) % 11 - 1
    sample = steps.sampled and tying.sampled_rows(np.arange(cfg.model.table_rows), steps.sampled)
    widened = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    state = jax.tree.map(widened, steps.init(jax.random.key(1), sample))
    run, gates = Trained([jax.tree.map(jnp.copy, state)], []), [] if cfg.tying.rare_gate is None else [GATE]
    for i in range(count):
        scale = tying.role_scale(cfg.tying, i + 1, cfg.train.steps, decile_V)
        state, metrics = steps.train(state, random_tokens(cfg, i), scale, decile_V, *gates)
        run.states.append(jax.tree.map(jnp.copy, state))
        run.metrics.append(jax.device_get(metrics))
    return run


def test_metrics_of_gradients_are_those_of_the_loss_and_clipping_goes_by_them() -> None:
    """Of the first step, at the same parameters; under `clip_by: scaled` it goes by what the gate leaves."""
    for clip_by in ("raw", "scaled"):
        options: dict[str, Any] = {"clip_norm": 1e-2, "clip_by": clip_by}
        cfg = gated_config(optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, **options))
        found, alone = (trained(each, 1) for each in (cfg, without(cfg)))
        assert found.metrics[0].keys() == alone.metrics[0].keys()
        named = ("loss", "grad_norm", "activation_grad_norm", "learning_rate", "role_grad_cosine", "output_grad_share")
        for name in (*named, *(name for name in alone.metrics[0] if "put_grad_norm" in name)):
            np.testing.assert_allclose(found.metrics[0][name], alone.metrics[0][name], rtol=1e-6, err_msg=name)
        E, E_alone = (np.asarray(run.states[1].params["tables"]["shared"]) for run in (found, alone))
        assert np.abs(E[RARE] - E_alone[RARE]).max() > 1e-4
        params, one = jax.device_get(found.states[0].params), Tables(jnp.float32(1), jnp.float32(1))
        gated, raw = (gradients_of(cfg, params, random_tokens(cfg), one, gate).grads for gate in (GATE, None))
        norm = float(optax.tree.norm(raw if clip_by == "raw" else gated))
        assert float(found.metrics[0]["clip_factor"]) == pytest.approx(1e-2 / norm, rel=1e-5)
    assert abs(float(optax.tree.norm(raw)) / norm - 1) > 1e-4


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("account", ["checked", "rows"])
def test_what_the_gate_leaves_is_the_output_roles_part_of_the_update(account: str) -> None:
    """Of plain gradient descent, minus the rate times the gradients: the input role's raw, the output role's gated."""
    cfg = gated_config(
        optimizer=GRADIENT_DESCENT,
        tying=TyingConfig(rare_gate=0.5, account=account, output_grad_scale_deciles=DECILES, input_grad_scale=3.0),  # type: ignore[arg-type]
    )
    run = trained(cfg, 1, jnp.float64)
    scale = tying.role_scale(cfg.tying, 1, 10, np.arange(cfg.model.table_rows) % 11 - 1)
    found = gradients_of(cfg, jax.device_get(run.states[0].params), random_tokens(cfg), scale, GATE)
    state = run.states[1]
    assert state.account is not None
    written = state.account.written["shared"]
    np.testing.assert_allclose(written.input, -0.1 * 3 * found.roles.input, rtol=0, atol=1e-12)
    output_VD = -0.1 * np.asarray(scale.output, np.float64) * found.gated
    followed = slice(None) if account == "checked" else np.asarray(state.account.rows.check)
    np.testing.assert_allclose(written.output, output_VD[followed], rtol=0, atol=1e-12)
    change = np.asarray(state.params["tables"]["shared"] - run.states[0].params["tables"]["shared"])
    np.testing.assert_allclose(change, output_VD - 0.3 * found.roles.input, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", slow_but(["adamw", "coupled", "by_role", "by_role_lazy"], "adamw", "by_role_lazy"))
@pytest.mark.parametrize("account", ["checked", "rows"])
def test_the_account_adds_up_to_the_table(kind: str, account: str) -> None:
    cfg = gated_config(
        optimizer=OptimizerConfig(
            learning_rate=0.02,
            warmup_steps=2,
            weight_decay=0.3,
            clip_norm=1e-2,
            tables=TableOptimizerConfig(kind=kind),  # type: ignore[arg-type]
        ),
        tying=TyingConfig(rare_gate=0.5, account=account, input_grad_scale=3.0, output_grad_scale_deciles=DECILES),  # type: ignore[arg-type]
    )
    run = trained(cfg, 8)
    assert max(float(row["account_error"]) for row in run.metrics) < 2e-6
    alone = trained(without(cfg), 8)
    moved = [np.asarray(each.states[-1].params["tables"]["shared"]) for each in (run, alone)]
    assert np.abs(moved[0] - moved[1])[RARE].max() > 1e-3


def test_a_step_without_the_gate_or_without_rare_tokens_is_the_step_that_there_was() -> None:
    cfg = gated_config()
    texts = {}
    for name, each, more in [("off", without(cfg), []), ("none rare", cfg, [None]), ("on", cfg, [GATE])]:
        steps = step.make_steps(each, make_mesh(each.mesh, jax.devices()[:1]))
        given = compile.arguments(without(each), steps)
        assert len(given) == 4
        texts[name] = steps.train.lower(*given, *more).as_text()
    assert texts["off"] == texts["none rare"]
    inputs_of = lambda text: text[: text.index("->")].count("%arg")
    assert inputs_of(texts["on"]) == inputs_of(texts["off"]) + 2


def test_a_scheme_that_changes_keeps_the_gate() -> None:
    for options in ({"untie_at": 4}, {"scheme": "untied", "tie_at": 4}):
        cfg = gated_config(tying=TyingConfig(rare_gate=0.25, output_grad_scale=0.5, **options))  # type: ignore[arg-type]
        later = tying.stage(cfg, changed=True).tying
        assert (later.rare_gate, later.output_grad_scale) == (0.25, 1.0)


# ---- Meshes ----


def test_every_mesh_gates_as_one_device_does() -> None:
    out, _ = finish(start([TESTS / "mesh_program.py", "gated"], devices=8))
    differences = json.loads(out.splitlines()[-1])
    assert len(differences) == 4 + 8
    for case, difference in differences.items():
        assert difference <= 1e-5, case


# ---- Which tokens are rare ----


def test_tokens_are_rare_by_their_appearances_in_an_update() -> None:
    """Of 100 tokens in all one is 0.64 of the 64 of an update: below the limit, not at it. Row 4 is no token's."""
    counts_V = np.array([1, 96, 0, 3, 0])
    for limit, rows_R, factors in [(0.63, [2], [0]), (0.64, [2], [0]), (1.0, [0, 2], [0.64, 0])]:
        cfg = gated_config(tying=TyingConfig(rare_gate=limit), vocab_size=4, vocab_multiple=5)
        assert cfg.data.batch_size * cfg.model.seq_len == 64
        gate = tying.rare_gate(cfg, counts_V)
        assert gate is not None
        assert (gate.rows_R.dtype, gate.factor_R.dtype) == (np.int32, np.float32)
        np.testing.assert_array_equal(gate.rows_R, rows_R)
        np.testing.assert_allclose(gate.factor_R, factors, rtol=1e-6)
        assert tying.gate_in_words(cfg, gate) == (
            f"{len(rows_R)} of 4 tokens are rare, below tying.rare_gate = {limit:g} appearances per update"
        )
    assert tying.rare_gate(without(cfg), counts_V) is None


def test_where_no_token_is_rare_a_line_says_so() -> None:
    cfg = gated_config(tying=TyingConfig(rare_gate=0.03), vocab_size=4, vocab_multiple=5)
    assert tying.rare_gate(cfg, np.array([1, 1, 1, 1, 0])) is None
    assert tying.gate_in_words(cfg, None) == (
        "no token is rare, below tying.rare_gate = 0.03 appearances per update: the gate changes nothing"
    )


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (0.0, "must be > 0, got 0.0"),
        (-0.5, "must be > 0, got -0.5"),
        (1.5, "must be <= 1, got 1.5"),
        (float("nan"), "must be finite, got nan"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(value: float, says: str) -> None:
    with pytest.raises(UserError) as caught:
        TyingConfig(rare_gate=value)
    assert str(caught.value) == f"rare_gate: {says}"


# ---- A run, and what only measures or compiles one ----

ON = {"tying.rare_gate": 0.5, "tying.untie_at": 4}


def test_a_run_says_what_is_rare_and_continues_bit_for_bit(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also across the step at which it unties."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main(arguments(whole, text, ON)) == 0
    counts_V = np.load(whole / "token_counts.npy").sum(0)
    rare = int(np.sum(counts_V[:320] / counts_V.sum() * 8 * 16 < 0.5))
    assert 50 < rare < 320
    says = f"whole: {rare} of 320 tokens are rare, below tying.rare_gate = 0.5 appearances per update\n"
    assert capsys.readouterr().out.count(says) == 1
    for last in (3, 6, STEPS):
        assert cli.main(arguments(parts, text, {**ON, "train.stop_at": last})) == 0
    assert_same_run(parts, whole)
    ungated = tmp_path / "ungated"
    capsys.readouterr()
    assert cli.main(arguments(ungated, text, {"tying.untie_at": 4})) == 0
    assert " are rare" not in capsys.readouterr().out
    losses = [[row["loss"] for row in rows(run)] for run in (whole, ungated)]
    assert losses[0][0] == losses[1][0]
    assert losses[0][2:] != losses[1][2:]


def test_bench_and_compile_take_the_rare_of_their_own_tokens() -> None:
    cfg = gated_config()
    shares_V = bench.zipf_shares(cfg)
    rare = int(np.sum(shares_V * 64 < 0.9))
    assert 0 < rare < 32
    cfg = gated_config(tying=TyingConfig(rare_gate=0.9))
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    steps = step.make_steps(cfg, mesh)
    gate = compile.arguments(cfg, steps)[-1]
    assert (gate.rows_R.shape, gate.factor_R.shape) == ((rare,), (rare,))
    gated, alone = (bench.Stepper(each, mesh, step.make_steps(each, mesh)) for each in (cfg, without(cfg)))
    gated.run(3), alone.run(3)
    assert gated.losses[0] == pytest.approx(alone.losses[0], rel=1e-6)
    assert gated.losses[2] != alone.losses[2]
