"""Laws of the account: it adds up to the table, it says what a closed form says, and keeping it changes nothing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import penalties
import pytest
from conftest import random_tokens, slow_but, small_config
from programs import OPTIMIZED

from tiedjax import gradients, lm, optimizer, step, tying
from tiedjax.config import (
    BodyOptimizerConfig,
    DataConfig,
    OptimizerConfig,
    RegularisersConfig,
    RoleOptimizerConfig,
    RunConfig,
    TableOptimizerConfig,
    TrainConfig,
    TyingConfig,
)
from tiedjax.errors import UserError
from tiedjax.sharding import ONE_DEVICE, make_mesh
from tiedjax.tying import Tables

ROLES = ("input", "output")
DECILES = tuple(0.5 + 0.25 * i for i in range(10))
OFF, ON = RegularisersConfig(), RegularisersConfig(cosine=0.7, orthogonality=30.0, mean=4.0, anchor=0.3)


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    """Programs that a test compiled under its own patches are not the next one's."""
    step._make_steps.cache_clear()
    yield
    step._make_steps.cache_clear()


def hard_config(steps: int, **changes: Any) -> RunConfig:
    """Clipping in every step, decay, warmup, row scales and z-loss."""
    sections: dict[str, Any] = {
        "optimizer": OptimizerConfig(learning_rate=0.02, warmup_steps=5, weight_decay=0.3, clip_norm=1e-2),
        "tying": TyingConfig(
            input_grad_scale=3.0, input_grad_scale_deciles=DECILES, output_grad_scale_deciles=DECILES[::-1]
        ),
        "train": TrainConfig(steps=steps, z_loss=1e-3),
    }
    return small_config(**(sections | changes))


def with_account(cfg: RunConfig, form: str) -> RunConfig:
    return dataclasses.replace(cfg, tying=dataclasses.replace(cfg.tying, account=form))


class Trained(NamedTuple):
    """Steps of a run: states before and after each, what each was given, its metrics."""

    steps: step.Steps
    states: list[step.TrainState]
    batches: list[np.ndarray]
    scales: list[Tables]
    metrics: list[dict[str, jax.Array]]


def trained(
    cfg: RunConfig, count: int, dtype: Any = jnp.float32, keep: bool = True, optimized: bool = False
) -> Trained:
    """The first steps of a run, compiled as tests compile or as users do; of its states all, or the first and last."""
    steps = step.make_steps(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    decile_V = np.arange(cfg.model.table_rows, dtype=np.int32) % 11 - 1
    sample = steps.sampled and tying.sampled_rows(np.arange(cfg.model.table_rows), steps.sampled)
    init = steps.init
    if optimized:  # what is the same in two programs that are not is so only as users compile them
        init = init.lower(jax.random.key(1), sample).compile(compiler_options=OPTIMIZED)
    state = init(jax.random.key(1), sample)
    widened = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    state = jax.tree.map(widened, state)
    run, train = Trained(steps, [jax.tree.map(jnp.copy, state)], [], [], []), steps.train
    if optimized:
        given = state, random_tokens(cfg), tying.role_scale(cfg.tying, 1, 1, decile_V), decile_V
        train = steps.train.lower(*given).compile(compiler_options=OPTIMIZED)
    for i in range(count):
        tokens = random_tokens(cfg, i)
        scale = tying.role_scale(cfg.tying, i + 1, cfg.train.steps, decile_V)
        state, metrics = train(state, tokens, scale, decile_V)
        if keep or i == count - 1:
            run.states.append(jax.tree.map(jnp.copy, state))
        run.batches.append(tokens), run.scales.append(scale), run.metrics.append(metrics)
    return run


def sums(state: step.TrainState, start: step.TrainState, log_kept: float | None = None) -> dict[str, np.ndarray]:
    """Initial, input and output part of a shared table by the account, the last where it is kept, else the rest; and
    that of each regulariser."""
    assert state.account is not None
    written, E_0 = state.account.written["shared"], np.asarray(start.params["tables"]["shared"], np.float64)
    initial = np.exp(np.float64(state.account.log_kept["shared"][0]) if log_kept is None else log_kept) * E_0
    kept = (state.account.regulariser or {"shared": {}})["shared"]
    others = {kind: np.asarray(C, np.float64) for kind, C in kept.items()}
    output = np.asarray(written.output, np.float64)
    if output.shape != E_0.shape:
        output = np.asarray(state.params["tables"]["shared"], np.float64) - initial - np.asarray(written.input)
        output -= sum(others.values())
    return {"initial": initial, "input": np.asarray(written.input, np.float64), "output": output, **others}


def closed_form(cfg: RunConfig, run: Trained) -> dict[str, np.ndarray]:
    """C of each role and each regulariser, by the sum over all gradients and the updates each had a part in, in float64
    (AdamW)."""
    options, count, weights = cfg.optimizer, len(run.batches), cfg.regularisers.weights
    E_0 = run.states[0].params["tables"]["shared"]
    writers = (*ROLES, *weights)
    by_role = jax.jit(gradients.loss_and_gradients(cfg))
    g: dict[str, list[np.ndarray]] = {role: [] for role in writers}
    for state, tokens, scale in zip(run.states, run.batches, run.scales, strict=False):
        _, (grads, role_grads, _) = by_role(state.params, tokens, scale)
        body = sum(float(jnp.sum(jnp.square(leaf.astype(jnp.float64)))) for leaf in jax.tree.leaves(grads["body"]))
        raw = [np.asarray(each, np.float64) for each in role_grads]
        E = state.params["tables"]["shared"]
        raw += [w * penalties.gradient(kind, E, len(E), E_0) for kind, w in weights.items()]
        norm = np.sqrt(body + np.square(sum(raw)).sum())
        assert norm > options.clip_norm
        scales = [*scale, *[np.ones(())] * len(weights)]
        for role, G, s in zip(writers, raw, scales, strict=True):
            g[role].append(options.clip_norm / norm * np.asarray(s, np.float64) * G)
    schedule = optimizer.learning_rate(options, cfg.train.steps)
    rate = np.array([float(schedule(t)) for t in range(count)])
    v, P = np.zeros_like(g["input"][0]), []
    for t, parts in enumerate(zip(*g.values(), strict=True), 1):
        v = options.b2 * v + (1 - options.b2) * sum(parts) ** 2
        P.append(1 / (np.sqrt(v / (1 - options.b2**t)) + options.eps))
    kept = np.array([np.prod(1 - rate[tau + 1 :] * options.weight_decay) for tau in range(count)])
    written = {}
    for role in writers:
        C = np.zeros_like(v)
        for k in range(count):
            for tau in range(k, count):
                momentum = options.b1 ** (tau - k) * (1 - options.b1) / (1 - options.b1 ** (tau + 1))
                C -= kept[tau] * rate[tau] * momentum * P[tau] * g[role][k]
        written[role] = C
    return written


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("form", ["whole", "checked"])
@pytest.mark.parametrize("regularisers", [OFF, ON], ids=["", "regularised"])
def test_the_account_is_the_closed_form_in_float64(form: str, regularisers: RegularisersConfig) -> None:
    cfg = with_account(dataclasses.replace(hard_config(40), regularisers=regularisers), form)
    run = trained(cfg, 40, jnp.float64)
    expected, account = closed_form(cfg, run), sums(run.states[-1], run.states[0])
    size = np.linalg.norm(run.states[-1].params["tables"]["shared"])
    assert account.keys() == {"initial", *expected}
    for role in expected:
        assert np.linalg.norm(expected[role]) > 0.05 * size
        # The rate is computed in float32, as a run computes it.
        np.testing.assert_allclose(account[role], expected[role], rtol=0, atol=1e-6 * size, err_msg=role)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("regularisers", [OFF, ON], ids=["", "regularised"])
def test_the_account_adds_up_in_float64(regularisers: RegularisersConfig) -> None:
    cfg = with_account(dataclasses.replace(hard_config(500), regularisers=regularisers), "checked")
    run = trained(cfg, 500, jnp.float64, keep=False, optimized=True)  # plainly, the float32 rate is rounded twice
    table, account = np.asarray(run.states[-1].params["tables"]["shared"]), sums(run.states[-1], run.states[0])
    np.testing.assert_allclose(sum(account.values()), table, rtol=0, atol=1e-12)
    assert float(run.metrics[-1]["account_error"]) < 1e-12
    assert len(account) == 3 + len(regularisers.weights)
    assert all(np.linalg.norm(part) > 0.02 * np.linalg.norm(table) for part in account.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data": DataConfig(batch_size=8, microbatches=4)},
        {"optimizer": OptimizerConfig(clip_norm=1e-2, body=BodyOptimizerConfig(kind="muon", learning_rate=0.02))},
        {"optimizer": OptimizerConfig(tables=TableOptimizerConfig(kind="by_role", learning_rate=0.01))},
        {"regularisers": ON},
    ],
    ids=["adamw", "accumulation", "muon", "by_role", "regularised"],
)
def test_the_account_adds_up_in_float32(changes: dict[str, Any]) -> None:
    cfg = hard_config(500, **{key: value for key, value in changes.items() if key != "regularisers"})
    cfg = dataclasses.replace(cfg, regularisers=changes.get("regularisers", OFF))
    run = trained(with_account(cfg, "checked"), 500, keep=False)
    table, account = np.asarray(run.states[-1].params["tables"]["shared"]), sums(run.states[-1], run.states[0])
    # What is rounded are the parts; regularisers and the loss pull against each other, and theirs grow above the table.
    largest = max(1.0, *(np.linalg.norm(part) / np.linalg.norm(table) for part in account.values()))
    assert (largest > 10) == bool(cfg.regularisers.weights)
    limit = max(1e-5, 1e-6 * largest)
    assert np.linalg.norm(sum(account.values()) - table) < limit * np.linalg.norm(table)
    assert 0 < float(run.metrics[-1]["account_error"]) < limit


@pytest.mark.parametrize(
    "case",
    slow_but(
        ["adamw", "coupled", "sgd", "by_role", "by_role_matched", "by_role_lazy", "regularised"],
        *("adamw", "regularised"),
    ),
)
def test_a_sample_of_rows_has_the_bits_of_the_whole(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, regularisers = ("adamw", ON) if case == "regularised" else (case, OFF)
    monkeypatch.setattr(tying.account, "MOST_FREQUENT", 3)
    monkeypatch.setattr(tying, "SAMPLE_ROWS", 8)
    tables = TableOptimizerConfig(kind=kind)  # type: ignore[arg-type]
    cfg = hard_config(20, optimizer=OptimizerConfig(learning_rate=0.02, clip_norm=1e-2, tables=tables))
    cfg = dataclasses.replace(cfg, regularisers=regularisers)
    whole, rows = (trained(with_account(cfg, form), 20, optimized=True).states[-1] for form in ("whole", "rows"))
    assert whole.account is not None
    assert rows.account is not None
    sample = np.asarray(rows.account.rows.sample)
    assert len(sample) == 8
    assert rows.account.written["shared"].input.shape == (8, 16)
    np.testing.assert_array_equal(rows.account.written["shared"].input, whole.account.written["shared"].input[sample])
    np.testing.assert_array_equal(rows.params["tables"]["shared"], whole.params["tables"]["shared"])
    assert np.abs(whole.account.written["shared"].input[sample]).max() > 0
    if regularisers.weights:
        assert whole.account.regulariser is not None
        assert rows.account.regulariser is not None
        for kind, C_SD in rows.account.regulariser["shared"].items():
            # XLA may round what it computes of a few rows otherwise than of all.
            whole_SD, size = whole.account.regulariser["shared"][kind][sample], np.abs(C_SD).max()
            np.testing.assert_allclose(C_SD, whole_SD, rtol=0, atol=1e-6 * size)
            assert size > 0


def test_the_sample_has_the_frequent_rows_and_as_many_of_every_tenth_of_the_others() -> None:
    counts_V = np.random.default_rng(0).permutation(10_000)
    rows = tying.sampled_rows(counts_V)
    assert rows.dtype == np.int32
    assert len(set(rows.tolist())) == len(rows) == 2048
    ranks = np.argsort(np.argsort(-counts_V))[rows]
    assert np.sum(ranks < 256) == 256
    tenths = np.bincount((ranks[ranks >= 256] - 256) * 10 // (10_000 - 256))
    assert tenths.min() >= 178
    assert tenths.max() <= 181
    assert len(tying.sampled_rows(np.ones(100))) == 100


@pytest.mark.parametrize("scheme", ["tied", "untied"])
@pytest.mark.parametrize("muon", slow_but([False, True], False))
def test_keeping_an_account_changes_no_parameter(scheme: str, muon: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tying.account, "MOST_FREQUENT", 3)
    monkeypatch.setattr(tying, "SAMPLE_ROWS", 8)
    body = BodyOptimizerConfig(kind="muon" if muon else "adamw")
    cfg = small_config(scheme, optimizer=OptimizerConfig(learning_rate=0.02, clip_norm=1e-1, body=body))
    forms = ("off", "whole", "rows", "checked")
    ends = {form: trained(with_account(cfg, form), 12, optimized=True).states[-1] for form in forms}
    assert ends["off"].account is None
    for form in ("whole", "rows"):
        jax.tree.map(np.testing.assert_array_equal, ends[form].params, ends["off"].params)
        jax.tree.map(np.testing.assert_array_equal, ends[form].opt_state.body, ends["off"].opt_state.body)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), ends["checked"].params, ends["off"].params
    )


# ---- Parts of every rule ----

KINDS = ("adamw", "sgd", "coupled", "by_role", "by_role_matched", "by_role_lazy")


def drawn(seed: int, scale: tuple[float, float] = (1.0, 1.0), rows: int = 40, width: int = 4) -> Tables:
    """Role gradients, of which the input's has rows of 0."""
    rng = np.random.default_rng(seed)
    present = rng.random((rows, 1)) < 0.5
    return Tables(
        scale[0] * rng.standard_normal((rows, width)) * present, scale[1] * rng.standard_normal((rows, width))
    )


def updated(cfg: OptimizerConfig, grads: list[Tables], form: str = "whole") -> Iterator[tuple[Any, Any, Any, Any]]:
    """(table before, table after, parts, state) of every update of a shared table."""
    transformation = optimizer.make_optimizer(cfg, 20, follow=form)  # type: ignore[arg-type]
    start = np.random.default_rng(7).standard_normal(grads[0].input.shape)
    params = {"tables": {"shared": jnp.asarray(start)}, "body": {"params": {"kernel": jnp.ones((2, 2))}}}
    rows = tying.rows_of(form, len(start))  # type: ignore[arg-type]
    state = transformation.init(params, rows)
    for g in grads:
        by_role = Tables(*({"shared": jnp.asarray(each)} for each in g))
        total = {
            "tables": {"shared": jnp.asarray(g.input + g.output)},
            "body": jax.tree.map(jnp.zeros_like, params["body"]),
        }
        before = params["tables"]["shared"]
        updates, state, parts = transformation.update(
            total, by_role, state, params, grad_norm=jnp.asarray(3.0), rows=rows
        )
        params = optax.apply_updates(params, updates)
        yield before, params["tables"]["shared"], parts["shared"], state


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["whole", "checked"])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("rates", [None, (0.3, 0.05)])
def test_parts_and_decay_sum_to_the_update(
    kind: str, form: str, centered: bool, rates: tuple[float, float] | None
) -> None:
    own = [RoleOptimizerConfig(learning_rate=rate) for rate in rates or (None, None)]
    tables = TableOptimizerConfig(kind=kind, centered=centered, input=own[0], output=own[1])  # type: ignore[arg-type]
    cfg = OptimizerConfig(learning_rate=0.1, warmup_steps=3, weight_decay=0.2, tables=tables)
    for number, (before, after, parts, _) in enumerate(updated(cfg, [drawn(seed) for seed in range(12)], form), 1):
        written = parts.roles.input + parts.roles.output
        kept = (1 - parts.decay) * before
        if centered:
            kept -= kept.mean(axis=0, keepdims=True)
            assert np.abs(after.mean(axis=0)).max() < 1e-12
        np.testing.assert_allclose(kept + written, after, rtol=0, atol=1e-12, err_msg=str(number))
        check = slice(None) if form == "checked" else np.unique(np.linspace(0, 39, 16).round().astype(int))
        np.testing.assert_allclose(parts.check, parts.roles.output[check], rtol=0, atol=1e-12)
        assert float(jnp.abs(parts.roles.input).max()) > 1e-3


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["by_role", "by_role_lazy", "adamw"])
def test_only_moments_of_each_role_do_not_see_the_scale_of_the_other(kind: str) -> None:
    cfg = OptimizerConfig(eps=1e-30, clip_norm=None, tables=TableOptimizerConfig(kind=kind))  # type: ignore[arg-type]
    ends = [
        [np.asarray(part) for part in list(updated(cfg, [drawn(seed, scale) for seed in range(8)]))[-1][2].roles]
        for scale in [(1.0, 1.0), (64.0, 1 / 8)]
    ]
    same = [np.allclose(one, other, rtol=1e-12, atol=0) for one, other in zip(*ends, strict=True)]
    assert same == [kind != "adamw"] * 2


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["coupled", "adamw"])
def test_coupled_adam_alone_keeps_the_mean_row_under_gradients_of_the_output_role(kind: str) -> None:
    """Whose columns sum to 0: the mean of the table then decays and does nothing else."""
    cfg = OptimizerConfig(weight_decay=0.5, warmup_steps=2, tables=TableOptimizerConfig(kind=kind, learning_rate=0.1))  # type: ignore[arg-type]
    grads = []
    for seed in range(15):
        output = drawn(seed).output
        grads.append(Tables(np.zeros_like(output), output - output.mean(axis=0)))
    found = list(updated(cfg, grads))
    kept = np.prod([1 - float(parts.decay) for _, _, parts, _ in found])
    start, end = (np.asarray(table).mean(axis=0) for table in (found[0][0], found[-1][1]))
    assert np.allclose(end, kept * start, rtol=0, atol=1e-12) == (kind == "coupled")
    assert kept < 0.9


@pytest.mark.usefixtures("float64")
def test_coupled_adam_is_its_reference() -> None:
    """One second moment for all rows: the average over updates of the mean over rows (arXiv 2502.08441)."""
    cfg = OptimizerConfig(
        learning_rate=0.1,
        warmup_steps=0,
        weight_decay=0.0,
        clip_norm=None,
        final_fraction=1.0,
        tables=TableOptimizerConfig(kind="coupled"),
    )
    grads = [drawn(seed) for seed in range(6)]
    m, v = np.zeros((40, 4)), np.zeros(4)
    for t, ((before, after, _, _), g) in enumerate(zip(updated(cfg, grads), grads, strict=True), 1):
        total = g.input + g.output
        m, v = 0.9 * m + 0.1 * total, 0.95 * v + 0.05 * (total**2).mean(axis=0)
        expected = np.asarray(before) - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        np.testing.assert_allclose(after, expected, rtol=0, atol=1e-7)  # the rate is float32


@pytest.mark.usefixtures("float64")
def test_lazy_moments_rest_where_a_row_is_absent_and_count_their_own_updates() -> None:
    cfg = OptimizerConfig(
        learning_rate=0.1,
        warmup_steps=0,
        weight_decay=0.0,
        clip_norm=None,
        final_fraction=1.0,
        tables=TableOptimizerConfig(kind="by_role_lazy"),
    )
    grads = [drawn(seed) for seed in range(6)]
    m, v, n = np.zeros((40, 4)), np.zeros((40, 4)), np.zeros(40)
    for (_, _, parts, _), g in zip(updated(cfg, grads), grads, strict=True):
        expected = np.zeros((40, 4))
        for row in np.flatnonzero(np.abs(g.input).sum(axis=1)):
            n[row] += 1
            m[row] = 0.9 * m[row] + 0.1 * g.input[row]
            v[row] = 0.95 * v[row] + 0.05 * g.input[row] ** 2
            mean, square = m[row] / (1 - 0.9 ** n[row]), v[row] / (1 - 0.95 ** n[row])
            expected[row] = -0.1 * mean / (np.sqrt(square) + 1e-8)
        np.testing.assert_allclose(parts.roles.input, expected, rtol=0, atol=1e-7)
    assert 0 < n.min() < 6


@pytest.mark.usefixtures("float64")
def test_matched_moments_of_each_role_move_the_table_as_far_as_shared_ones() -> None:
    grads = [drawn(seed, (0.2, 3.0)) for seed in range(6)]
    sizes = {}
    for kind in ("adamw", "by_role_matched", "by_role"):
        cfg = OptimizerConfig(weight_decay=0.0, tables=TableOptimizerConfig(kind=kind))  # type: ignore[arg-type]
        sizes[kind] = [float(jnp.linalg.norm(after - before)) for before, after, _, _ in updated(cfg, grads)]
    np.testing.assert_allclose(sizes["by_role_matched"], sizes["adamw"], rtol=1e-9)
    assert min(np.array(sizes["by_role"]) / sizes["adamw"]) > 1.1


@pytest.mark.usefixtures("float64")
def test_rates_of_roles_scale_their_parts_under_one_second_moment() -> None:
    grads = [drawn(seed) for seed in range(5)]
    tables = TableOptimizerConfig(input=RoleOptimizerConfig(learning_rate=0.3))
    cfg = OptimizerConfig(learning_rate=0.1, weight_decay=0.2)
    plain = list(updated(cfg, grads))
    own = list(updated(dataclasses.replace(cfg, tables=tables), grads))
    for (_, _, one, _), (before, after, other, _) in zip(plain, own, strict=True):
        np.testing.assert_allclose(other.roles.input, 3 * one.roles.input, rtol=1e-5)
        np.testing.assert_allclose(other.roles.output, one.roles.output, rtol=1e-9, atol=1e-12)
        assert float(other.decay) == float(one.decay)
        np.testing.assert_allclose(after, (1 - other.decay) * before + sum(other.roles), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_lion_is_its_reference_and_has_no_parts() -> None:
    cfg = OptimizerConfig(
        learning_rate=0.1,
        warmup_steps=0,
        weight_decay=0.2,
        clip_norm=None,
        b2=0.99,
        final_fraction=1.0,
        tables=TableOptimizerConfig(kind="lion"),
    )
    theirs = optax.lion(0.1, b1=0.9, b2=0.99, weight_decay=0.2)
    transformation = optimizer.make_optimizer(cfg, 20)
    params = {"tables": {"shared": jnp.ones((40, 4))}, "body": {}}
    table, state, their_state = params["tables"]["shared"], transformation.init(params), theirs.init(jnp.ones((40, 4)))
    for seed in range(5):
        g = jnp.asarray(drawn(seed).output)
        grads = {"tables": {"shared": g}, "body": {}}
        updates, state, parts = transformation.update(grads, Tables({}, {}), state, params, grad_norm=jnp.ones(()))
        params = optax.apply_updates(params, updates)
        theirs_update, their_state = theirs.update(g, their_state, table)
        table = table + theirs_update
        np.testing.assert_allclose(params["tables"]["shared"], table, rtol=0, atol=1e-6)
        assert parts == {}


# ---- The compromise ----


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scheme", ["tied", "untied"])
def test_first_order_changes_are_those_of_the_loss(scheme: str) -> None:
    """Of the batch after the update, by a finite difference; the body's part is what is left."""
    cfg = small_config(
        scheme,
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=1, weight_decay=50.0),
        train=TrainConfig(steps=10, z_loss=1e-3),
    )
    run = trained(cfg, 4, jnp.float64)
    total = lm.summed_loss(cfg, ONE_DEVICE, cfg.train.z_loss)
    scheme_of = tying.scheme_of(cfg.tying)

    def loss(params: Any, tokens: np.ndarray) -> float:
        value, weight = total(scheme_of.tables(params["tables"]), params["body"], tokens, jnp.ones(len(tokens)))
        return float(value / weight)

    for i in (1, 2, 3):
        before, after, metrics = run.states[i - 1].params, run.states[i].params, run.metrics[i]
        by_tables = loss(after, run.batches[i]) - loss(
            {"tables": before["tables"], "body": after["body"]}, run.batches[i]
        )
        parts = [float(metrics[f"{name}_loss_change"]) for name in ("input", "output", "decay")]
        assert sum(parts) == pytest.approx(by_tables, rel=2e-3)
        assert abs(parts[2]) > 0.01 * abs(by_tables)
        same_batch = loss(after, run.batches[i - 1]) - loss(
            {"tables": before["tables"], "body": after["body"]}, run.batches[i - 1]
        )
        assert abs(same_batch - by_tables) > 0.02 * abs(by_tables)
        for writer in ("in", "out"):
            column = float(metrics[f"m_in_{writer}"]) + float(metrics[f"m_out_{writer}"])
            assert column == float(metrics[f"{writer}put_loss_change"])
    assert np.isnan(float(run.metrics[0]["m_in_in"]))


@pytest.mark.usefixtures("float64")
def test_the_compromise_is_reader_by_writer() -> None:
    """M against inner products of the next batch's role gradients with the parts of an update that are known apart."""
    cfg = hard_config(6, tying=TyingConfig(account="checked"))
    run = trained(cfg, 4, jnp.float64)
    transformation = optimizer.make_optimizer(cfg.optimizer, cfg.train.steps, follow="checked")
    by_role = jax.jit(gradients.loss_and_gradients(cfg))
    for i in (1, 2, 3):
        state = run.states[i]
        assert state.account is not None
        parts = transformation.last_parts(state.opt_state, state.account.rows)["shared"].roles
        _, (_, role_grads, _) = by_role(state.params, run.batches[i], run.scales[i])
        for reader, G in zip(("in", "out"), role_grads, strict=True):
            for writer, D in zip(("in", "out"), parts, strict=True):
                expected = float(np.sum(np.asarray(G) * np.asarray(D)))
                assert float(run.metrics[i][f"m_{reader}_{writer}"]) == pytest.approx(expected, rel=1e-9)
        values = [float(run.metrics[i][f"m_{a}_{b}"]) for a in ("in", "out") for b in ("in", "out")]
        assert len({round(value, 12) for value in values}) == 4


def test_no_table_is_copied_to_tell_what_its_last_update_did() -> None:
    """M is told from moments that the update overwrites: it is known before, or XLA copies them, and the table."""
    cfg = small_config()
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    steps, decile_V = step.make_steps(cfg, mesh), jnp.zeros(cfg.model.table_rows, jnp.int32)
    given = steps.abstract, random_tokens(cfg), tying.role_scale(cfg.tying), decile_V
    program = steps.train.lower(*given).compile().as_text()
    table = rf"f32\[{cfg.model.table_rows},{cfg.model.d_model}\]"
    assert len(re.findall(rf"%state\S+ = {table}\S+ parameter", program)) == 5  # the table, 3 moments, C_input
    assert not re.findall(rf"= {table}\S+ copy\(%state", program)
    assert "m_out_in" in steps.train.eval_shape(*given)[1]


@pytest.mark.usefixtures("float64")
def test_update_metrics_are_those_of_the_parts() -> None:
    run = trained(hard_config(6, tying=TyingConfig(account="checked")), 3, jnp.float64)
    transformation = optimizer.make_optimizer(hard_config(6).optimizer, 6, follow="checked")
    state, metrics = run.states[-1], run.metrics[-1]
    assert state.account is not None
    a, b = (np.asarray(part) for part in transformation.last_parts(state.opt_state, state.account.rows)["shared"].roles)
    assert float(metrics["input_update_norm"]) == pytest.approx(np.linalg.norm(a), rel=1e-9)
    assert float(metrics["output_update_norm"]) == pytest.approx(np.linalg.norm(b), rel=1e-9)
    share = np.linalg.norm(b) / (np.linalg.norm(a) + np.linalg.norm(b))
    assert float(metrics["output_update_share"]) == pytest.approx(share, rel=1e-9)
    cosine = np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
    assert float(metrics["role_update_cosine"]) == pytest.approx(cosine, rel=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["adamw", "coupled"])
def test_the_step_share_is_the_input_roles_part_of_the_second_moment(kind: str) -> None:
    tables = TableOptimizerConfig(kind=kind)  # type: ignore[arg-type]
    cfg = OptimizerConfig(clip_norm=None, tables=tables)
    grads = [drawn(seed, (1.0, 0.5)) for seed in range(6)]
    *_, state = list(updated(cfg, grads))[-1]
    rule = optimizer.make_optimizer(cfg, 20, follow="whole").tables["shared"]
    share = rule.input_step_share(state.tables["shared"], tying.rows_of("whole", 40))
    from_input, total = 0.0, 0.0
    for g in grads:
        from_input = 0.95 * from_input + 0.05 * np.sum(g.input * (g.input + g.output))
        total = 0.95 * total + 0.05 * np.sum((g.input + g.output) ** 2)
    assert float(share) == pytest.approx(from_input / total, rel=1e-9)


# ---- Scales of roles ----


def test_schedules_of_role_scales_are_their_formulas() -> None:
    def scales(**options: Any) -> list[float]:
        cfg = TyingConfig(input_grad_scale=5.0, grad_scale_from=3, **options)
        return [float(tying.role_scale(cfg, update, 10).input) for update in range(1, 11)]

    assert scales() == [5.0] * 10
    assert scales(grad_scale_schedule="window", grad_scale_until=5) == [1, 1, 5, 5, 5, 1, 1, 1, 1, 1]
    assert scales(grad_scale_schedule="linear", grad_scale_until=7) == [5, 5, 5, 4, 3, 2, 1, 1, 1, 1]
    halves = [1 + 4 * (0.5 + 0.5 * np.cos(np.pi * i / 7)) for i in range(8)]
    assert scales(grad_scale_schedule="cosine") == pytest.approx([5, 5, *halves], rel=1e-6)


def test_factors_by_decile_multiply_the_rows_of_their_tokens() -> None:
    decile_V = np.array([-1, 0, 9, 4])
    cfg = TyingConfig(input_grad_scale=2.0, input_grad_scale_deciles=DECILES)
    scale = tying.role_scale(cfg, 1, 1, decile_V)
    np.testing.assert_array_equal(scale.input, np.float32([[2.0], [1.0], [5.5], [3.0]]))
    assert scale.output == np.float32(1)
    run = trained(small_config(tying=cfg), 1)
    by_role = jax.jit(gradients.loss_and_gradients(small_config()))
    grads = by_role(run.states[0].params, run.batches[0], run.scales[0])[1]
    expected = np.asarray(run.scales[0].input) * np.asarray(grads[1].input) + np.asarray(grads[1].output)
    np.testing.assert_allclose(grads[0]["tables"]["shared"], expected, rtol=1e-5, atol=1e-8)


def test_the_controller_holds_the_output_roles_share_of_updates() -> None:
    shares = {}
    for wanted in (None, 0.75, 0.8):
        cfg = small_config(
            tying=TyingConfig(output_update_share=wanted),
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
            train=TrainConfig(steps=400),
        )
        metrics = trained(cfg, 400, keep=False).metrics
        shares[wanted] = np.mean([float(row["output_update_share"]) for row in metrics[-100:]])
        assert ("held_input_scale" in metrics[0]) == (wanted is not None)
    assert shares[0.75] == pytest.approx(0.75, abs=0.02)
    assert shares[0.8] == pytest.approx(0.8, abs=0.02)
    assert shares[None] > 0.84


def test_the_controller_moves_by_its_gain_times_the_distance_in_log_odds() -> None:
    cfg = small_config(tying=TyingConfig(output_update_share=0.5))
    run, expected = trained(cfg, 6), 0.0
    for state, metrics in zip(run.states, run.metrics, strict=False):
        assert float(state.held) == pytest.approx(expected, abs=1e-6)
        assert float(metrics["held_input_scale"]) == pytest.approx(np.exp(expected), rel=1e-6)
        share = float(metrics["output_update_share"])
        expected += 0.05 * np.log(share / (1 - share))
    assert abs(expected) > 0.01


@pytest.mark.parametrize("clip_by", ["raw", "scaled"])
def test_what_the_norm_of_clipping_is_of_decides_whether_scales_reach_the_body(clip_by: str) -> None:
    ends = []
    for scale in (1.0, 64.0):
        options = OptimizerConfig(clip_norm=1e-3, clip_by=clip_by, warmup_steps=1)  # type: ignore[arg-type]
        cfg = small_config(optimizer=options, tying=TyingConfig(input_grad_scale=scale))
        ends.append(trained(cfg, 1).states[-1])
    moments = [jax.tree.leaves(end.opt_state.body) for end in ends]
    same = all(np.array_equal(one, other) for one, other in zip(*moments, strict=True))
    assert same == (clip_by == "raw")


# ---- What is refused ----


def refused(cfg: RunConfig) -> str:
    with pytest.raises(UserError) as error:
        step.make_steps(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    return str(error.value)


def test_a_scale_that_adam_undoes_is_refused() -> None:
    cfg = small_config("untied", tying=TyingConfig(scheme="untied", input_grad_scale=5.0))
    assert refused(cfg) == (
        "tying.input_grad_scale: 5 changes nothing under the untied scheme, where adamw divides each role's gradient "
        "by its own size; give optimizer.tables.input.learning_rate, or a scale of 0 to freeze it"
    )
    by_decile = small_config("untied", tying=TyingConfig(scheme="untied", output_grad_scale_deciles=DECILES))
    assert refused(by_decile) == (
        "tying.output_grad_scale_deciles: it changes nothing under the untied scheme, where adamw divides each role's "
        "gradient by its own size; give optimizer.tables.output.learning_rate, or a scale of 0 to freeze it"
    )
    averaged = dataclasses.replace(cfg, optimizer=OptimizerConfig(tables=TableOptimizerConfig(kind="sgd")))
    frozen = small_config("untied", tying=TyingConfig(scheme="untied", input_grad_scale=0.0))
    for allowed in (averaged, frozen):
        step.make_steps(allowed, make_mesh(allowed.mesh, jax.devices()[:1]))


def test_lion_is_refused_with_an_account() -> None:
    cfg = small_config(optimizer=OptimizerConfig(tables=TableOptimizerConfig(kind="lion")))
    message = (
        "optimizer.tables.kind: lion's update is the sign of a sum, of which no role has a bounded part; set "
        "tying.account off and give the roles no learning rates, or take another kind"
    )
    assert refused(cfg) == message
    rates = TableOptimizerConfig(kind="lion", input=RoleOptimizerConfig(learning_rate=0.1))
    assert refused(with_account(dataclasses.replace(cfg, optimizer=OptimizerConfig(tables=rates)), "off")) == message
    trained(with_account(cfg, "off"), 2)


def test_a_controller_without_what_it_reads_is_refused() -> None:
    wanted = TyingConfig(output_update_share=0.5)
    start = "tying.output_update_share: needs the account of a table of both roles, and "
    assert refused(small_config(tying=dataclasses.replace(wanted, account="off"))) == f"{start}tying.account is off"
    untied = small_config("untied", tying=dataclasses.replace(wanted, scheme="untied"))
    assert refused(untied) == f"{start}the untied scheme has none"


def test_rows_cannot_be_centred_without_the_others() -> None:
    cfg = small_config(optimizer=OptimizerConfig(tables=TableOptimizerConfig(centered=True)))
    assert refused(with_account(cfg, "rows")) == (
        "tying.account: rows cannot be followed with optimizer.tables.centered, whose mean is that of all rows; set it "
        "to whole or off"
    )
    assert tying.follow(cfg) == "whole"


def test_an_account_is_whole_below_two_to_the_26_numbers() -> None:
    for rows, form in [(2**16, "rows"), (2**16 - 1, "whole")]:
        cfg = small_config(vocab_size=rows, d_model=2**10)
        assert tying.follow(cfg) == form


def test_options_of_scales_are_checked() -> None:
    with pytest.raises(UserError, match=r"^input_grad_scale_deciles: must be ten factors of at least 0, got \[1.0\]$"):
        TyingConfig(input_grad_scale_deciles=(1.0,))
    with pytest.raises(UserError, match=r"^grad_scale_until: must be >= grad_scale_from = 5, got 4$"):
        TyingConfig(grad_scale_from=5, grad_scale_until=4)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("form", ["checked", "rows"])
def test_m_is_of_raw_gradients_and_of_the_followed_rows(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under row scales; in the form "rows" everything is of the sample: by a run that follows all rows."""
    monkeypatch.setattr(tying.account, "MOST_FREQUENT", 3)
    monkeypatch.setattr(tying, "SAMPLE_ROWS", 8)
    cfg = hard_config(6)
    run, whole = trained(with_account(cfg, form), 4, jnp.float64), trained(with_account(cfg, "whole"), 4, jnp.float64)
    account = run.states[0].account
    assert account is not None
    rows = slice(None) if form == "checked" else np.asarray(account.rows.sample)
    transformation = optimizer.make_optimizer(cfg.optimizer, cfg.train.steps, follow="whole")
    by_role = jax.jit(gradients.loss_and_gradients(cfg))
    for i in (1, 2, 3):
        state, before = whole.states[i], np.asarray(whole.states[i - 1].params["tables"]["shared"])
        part = transformation.last_parts(state.opt_state, state.account.rows)["shared"]
        raw = [np.asarray(G)[rows] for G in by_role(state.params, run.batches[i], run.scales[i])[1][1]]
        found = run.metrics[i]
        for reader, G in zip(("in", "out"), raw, strict=True):
            for writer, D in zip(("in", "out"), part.roles, strict=True):
                expected = np.sum(G * np.asarray(D)[rows])
                assert float(found[f"m_{reader}_{writer}"]) == pytest.approx(expected, rel=1e-6)
        expected = -float(part.decay) * np.sum(sum(raw) * before[rows])
        assert float(found["decay_loss_change"]) == pytest.approx(expected, rel=1e-6)
        table = whole.states[i + 1].opt_state.tables["shared"]
        share = np.sum(np.asarray(table.input_square)[rows]) / np.sum(np.asarray(table.nu)[rows])
        assert float(found["input_step_share"]) == pytest.approx(share, rel=1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["whole", "checked"])
@pytest.mark.parametrize("alone", ROLES)
def test_a_role_without_a_gradient_has_no_part(kind: str, form: str, alone: str) -> None:
    cfg = OptimizerConfig(learning_rate=0.1, weight_decay=0.2, tables=TableOptimizerConfig(kind=kind))  # type: ignore[arg-type]
    grads = [
        Tables(*(g if role == alone else 0 * g for role, g in zip(ROLES, drawn(seed), strict=True)))
        for seed in range(4)
    ]
    *_, (_, _, parts, _) = updated(cfg, grads, form)
    size: dict[str, Any] = {role: float(jnp.abs(part).max()) for role, part in zip(ROLES, parts.roles, strict=True)}
    other = ROLES[1 - ROLES.index(alone)]
    assert size[alone] > 1e-3
    assert size[other] < 1e-12
    assert (float(jnp.abs(parts.check).max()) > 1e-3) == (alone == "output")


def test_the_logarithm_of_what_is_kept_loses_nothing_in_many_small_additions() -> None:
    zero = jnp.zeros((2, 1), jnp.float32)
    account = tying.opened({"shared": zero}, ["shared"], "checked", tying.rows_of("checked", 2))
    decay = jnp.float32(1e-4)
    parts = {"shared": tying.Parts(Tables(zero, zero), zero, decay)}
    many = jax.jit(lambda a: jax.lax.fori_loop(0, 100_000, lambda _, a: tying.advanced(a, parts), a))
    log_kept = float(many(account).log_kept["shared"][0])
    assert log_kept == pytest.approx(100_000 * np.log1p(-np.float64(decay)), rel=3e-7)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("form", ["whole", "checked"])
def test_the_account_of_a_centred_table_adds_up_to_it(form: str) -> None:
    """Whose initial mean row the first update takes away: no role wrote that."""
    tables = TableOptimizerConfig(centered=True)
    cfg = small_config(optimizer=OptimizerConfig(learning_rate=0.1, weight_decay=0.2, tables=tables))
    run = trained(with_account(cfg, form), 5, jnp.float64)
    for metrics in run.metrics:
        assert float(metrics["account_error"]) < 1e-6  # the table was drawn in float32, less its mean too
    start, end = (np.asarray(run.states[i].params["tables"]["shared"]) for i in (0, -1))
    assert np.abs(start.mean(axis=0)).max() > 1e-3
    account = run.states[-1].account
    rows = np.asarray(account.rows.check)
    centred = (start - start.mean(axis=0))[rows]
    kept = np.exp(float(account.log_kept["shared"][0]))
    written = account.written["shared"]
    output = np.asarray(written.output)[rows] if form == "checked" else np.asarray(written.output)
    np.testing.assert_allclose(kept * centred + np.asarray(written.input)[rows] + output, end[rows], atol=1e-6)


@pytest.mark.usefixtures("float64")
def test_a_sample_of_rows_has_no_share_of_a_mean_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coupled Adam's second moment is one row for all, of which 8 rows, the most frequent among them, have no share."""
    monkeypatch.setattr(tying.account, "MOST_FREQUENT", 3)
    monkeypatch.setattr(tying, "SAMPLE_ROWS", 8)
    cfg = small_config(optimizer=OptimizerConfig(tables=TableOptimizerConfig(kind="coupled")))
    assert "input_step_share" not in trained(with_account(cfg, "rows"), 2, jnp.float64).metrics[1]
    assert "input_step_share" in trained(with_account(cfg, "whole"), 2, jnp.float64).metrics[1]


@pytest.mark.parametrize(("tables", "where"), [
    (TableOptimizerConfig(kind="lion"), "optimizer.tables.kind"),
    (TableOptimizerConfig(output=RoleOptimizerConfig(kind="lion")), "optimizer.tables.output.kind"),
])  # fmt: skip
def test_lion_on_one_roles_table_is_refused_with_an_account(tables: TableOptimizerConfig, where: str) -> None:
    cfg = small_config("untied", optimizer=OptimizerConfig(tables=tables))
    assert refused(cfg) == (
        f"{where}: lion's update is a sign that no state keeps, so that what is told of an update would be of another; "
        "set tying.account off, or take another kind"
    )
    assert "output_update_norm" not in trained(with_account(cfg, "off"), 2).metrics[1]
