"""AdamW as the papers write it, recomputed in NumPy; rules of parts; and what the role gradients can be used for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_tokens, small_config

from tiedjax import lm, optimizer, step
from tiedjax.config import (
    BodyOptimizerConfig,
    OptimizerConfig,
    RoleOptimizerConfig,
    RunConfig,
    TableOptimizerConfig,
    TyingConfig,
)
from tiedjax.errors import UserError
from tiedjax.rng import key_for
from tiedjax.sharding import Layout, make_mesh
from tiedjax.tying import Tables, role_scale

STEPS = 12
UNTOLD = Tables({}, {})  # role gradients that nobody asks for
CFG = OptimizerConfig(
    learning_rate=0.02, warmup_steps=4, final_fraction=0.1, b1=0.9, b2=0.95, eps=1e-5, weight_decay=0.3, clip_norm=1.0
)


def named_leaves(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def rate(cfg: OptimizerConfig, number: int, steps: int) -> float:
    """Of update `number` = 1, 2, ...: linear over the warmup, then half a cosine down to final_fraction at the last."""
    if number < cfg.warmup_steps:
        return cfg.learning_rate * number / cfg.warmup_steps
    done = min((number - cfg.warmup_steps) / max(steps - cfg.warmup_steps, 1), 1.0)
    falling = 0.5 * (1 + math.cos(math.pi * done))
    return cfg.learning_rate * (cfg.final_fraction + (1 - cfg.final_fraction) * falling)


def decay(cfg: OptimizerConfig, name: str) -> float:
    if name.startswith("tables/") and cfg.tables.weight_decay is not None:
        return cfg.tables.weight_decay
    return cfg.weight_decay if name.startswith("tables/") or name.endswith("kernel") else 0.0


def adamw(cfg: OptimizerConfig, params: dict[str, np.ndarray], grads: list[dict[str, np.ndarray]]) -> Any:
    """Loshchilov and Hutter's AdamW (arXiv 1711.05101) after global-norm clipping, in float64."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in params.items()}
    v = {name: np.zeros_like(value) for name, value in params.items()}
    for t, gradient in enumerate(grads, 1):
        norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradient.values()))
        shrink = min(1.0, cfg.clip_norm / norm) if cfg.clip_norm else 1.0
        for name, g in gradient.items():
            g = g.astype(np.float64) * shrink
            m[name] = cfg.b1 * m[name] + (1 - cfg.b1) * g
            v[name] = cfg.b2 * v[name] + (1 - cfg.b2) * g**2
            update = (m[name] / (1 - cfg.b1**t)) / (np.sqrt(v[name] / (1 - cfg.b2**t)) + cfg.eps)
            update += params[name] * decay(cfg, name)
            params[name] = params[name] - rate(cfg, t, STEPS) * update
    return params


@pytest.mark.parametrize(
    "cfg",
    [
        CFG,
        OptimizerConfig(**{**vars(CFG), "clip_norm": None, "warmup_steps": 0}),
        OptimizerConfig(**{**vars(CFG), "tables": TableOptimizerConfig(weight_decay=0.0), "clip_norm": 0.01}),
        OptimizerConfig(**{**vars(CFG), "warmup_steps": STEPS, "weight_decay": 0.0}),
    ],
    ids=["all", "no clip, no warmup", "no decay of tables", "warmup only"],
)
def test_updates_are_adamw_in_float64(cfg: OptimizerConfig) -> None:
    rng = np.random.default_rng(0)
    shapes = {"tables": {"shared": (7, 4)}, "body": {"params": {"layer": {"kernel": (4, 5), "scale": (4,)}}}}
    draw = lambda size: jax.tree.map(
        lambda shape: jnp.asarray(size * rng.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    params, grads = draw(1.0), [draw(size) for size in np.geomspace(0.01, 3, STEPS)]  # clipped and not clipped
    transformation = optimizer.make_optimizer(cfg, STEPS)
    state, start = transformation.init(params), named_leaves(params)
    for gradient in grads:
        norm = optax.tree.norm(gradient)
        updates, state, _ = transformation.update(gradient, UNTOLD, state, params, grad_norm=norm)
        params = optax.apply_updates(params, updates)
    expected = adamw(cfg, start, [named_leaves(gradient) for gradient in grads])
    for name, leaf in named_leaves(params).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=2e-6, atol=2e-6, err_msg=name)
        assert np.abs(expected[name] - start[name]).max() > 1e-2


def test_the_learning_rate_moves_at_once_peaks_and_ends_at_its_fraction() -> None:
    schedule = optimizer.learning_rate(CFG, STEPS)
    for done in range(STEPS + 3):
        assert float(schedule(done)) == pytest.approx(rate(CFG, done + 1, STEPS), rel=1e-6, abs=1e-9)
    assert float(schedule(0)) == pytest.approx(CFG.learning_rate / CFG.warmup_steps)
    assert float(schedule(CFG.warmup_steps - 1)) == pytest.approx(CFG.learning_rate)
    assert float(schedule(STEPS - 1)) == pytest.approx(0.1 * CFG.learning_rate)


def test_a_run_may_end_within_its_warmup() -> None:
    schedule = optimizer.learning_rate(CFG, 2)
    assert [float(schedule(done)) for done in range(2)] == pytest.approx([0.005, 0.01])


# ---- Moments in bfloat16 ----


def moments(cfg: OptimizerConfig, params: Any) -> dict[str, Any]:
    state = jax.eval_shape(optimizer.make_optimizer(cfg, STEPS).init, params)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in found.items() if {"mu", "nu"} & set(name.split("/"))}


def bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def in_bfloat16(cfg: OptimizerConfig) -> OptimizerConfig:
    return dataclasses.replace(cfg, moments_dtype="bfloat16")


SHAPES = {
    "tables": {"shared": jax.ShapeDtypeStruct((300, 16), jnp.float32)},
    "body": {"params": {"layer": {"kernel": jax.ShapeDtypeStruct((16, 200), jnp.float32)}}},
}


def test_bfloat16_moments_take_half_the_bytes() -> None:
    full, half = moments(CFG, SHAPES), moments(in_bfloat16(CFG), SHAPES)
    assert full.keys() == half.keys()
    assert {leaf.dtype for leaf in half.values()} == {jnp.dtype("bfloat16")}
    assert bytes_of(full) == 2 * bytes_of(SHAPES)
    assert 2 * bytes_of(half) == bytes_of(full)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_compiled_update_needs_no_copy_of_gradients_or_moments(clip_norm: float | None, dtype: str) -> None:
    """Neither for clipping nor for casting: what it needs besides its arguments does not grow with the parameters."""
    cfg = dataclasses.replace(CFG, clip_norm=clip_norm, moments_dtype=dtype)
    transformation = optimizer.make_optimizer(cfg, STEPS)

    def update(params: Any, state: Any, grads: Any, norm: jax.Array) -> Any:
        updates, state, _ = transformation.update(grads, UNTOLD, state, params, grad_norm=norm)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(transformation.init, SHAPES)
    norm = jax.ShapeDtypeStruct((), jnp.float32)
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(SHAPES, state, SHAPES, norm).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < min(map(bytes_of, jax.tree.leaves(SHAPES))) / 8


def updated(b1: float, b2: float, dtype: str | None, grads: Sequence[float | np.ndarray]) -> tuple[Any, Any]:
    """The last update, and the state after it, of one parameter vector."""
    transformation = optimizer.scale_by_adam(b1, b2, 1e-8, dtype)
    state = transformation.init(jnp.zeros(np.shape(grads[0])))
    for gradient in grads:
        update, state = transformation.update(jnp.asarray(gradient, jnp.float32), state)
    return update, state


def test_float32_moments_are_optax_bit_for_bit() -> None:
    grads = list(np.random.default_rng(0).standard_normal((20, 500)).astype(np.float32))
    theirs = optax.scale_by_adam(0.9, 0.95, 1e-8)
    state = theirs.init(jnp.zeros(500))
    for gradient in grads:
        update, state = theirs.update(jnp.asarray(gradient), state)
    ours, our_state = updated(0.9, 0.95, None, grads)
    assert jax.tree.structure(our_state) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, (ours, our_state), (update, state))


def test_bfloat16_moments_follow_float32_within_their_rounding() -> None:
    """Each rounding is at most 2^-9 of the moment; b / (1 - b) of them add up at most, and usually cancel."""
    grads = list(np.random.default_rng(0).standard_normal((200, 500)).astype(np.float32))
    exact, state = updated(0.9, 0.95, None, grads)
    rounded, rounded_state = updated(0.9, 0.95, "bfloat16", grads)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded_state.nu.astype(jnp.float32), state.nu, rtol=20 * 2**-9)
    assert float(jnp.abs(rounded - exact).max()) < 0.05
    assert float(jnp.abs(rounded - exact).mean()) < 0.003


def test_a_decay_too_slow_for_bfloat16_is_refused_because_it_would_freeze() -> None:
    grads = [1.0] * 50 + [0.0] * 300
    for b2, frozen in [(0.999, True), (1 - 2**-7, False), (0.95, False)]:
        peak = updated(0.9, b2, "bfloat16", grads[:50])[1].nu
        after = updated(0.9, b2, "bfloat16", grads)[1].nu
        assert bool(after > 0.9 * peak) == frozen, (b2, float(peak), float(after))
    for name in ("b1", "b2"):
        assert OptimizerConfig(**{name: 0.999}).moments_dtype == "float32"
        assert OptimizerConfig(**{name: 1 - 2**-7}, moments_dtype="bfloat16")
        with pytest.raises(UserError, match=rf"{name}: must be <= 0.9921875 with moments_dtype bfloat16, got 0.999"):
            OptimizerConfig(**{name: 0.999}, moments_dtype="bfloat16")


# ---- Roles ----


@pytest.mark.parametrize("scheme", ["tied", "untied"])
def test_role_scales_do_not_reach_the_body_through_clipping(scheme: str) -> None:
    cfg = small_config(scheme, optimizer=OptimizerConfig(clip_norm=1e-3, warmup_steps=1))  # always clips
    steps = step.make_steps(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    decile_V = np.zeros(cfg.model.table_rows, np.int32)

    def one_step(scale: Tables) -> tuple[dict[str, np.ndarray], float]:
        state = steps.init(jax.random.key(0))
        state, metrics = steps.train(state, random_tokens(cfg), scale, decile_V)
        return named_leaves(state), float(metrics["grad_norm"])

    plain, norm = one_step(Tables(jnp.float32(1), jnp.float32(1)))
    scaled, same_norm = one_step(Tables(jnp.float32(64), jnp.float32(1)))
    assert norm == same_norm > 1e-3
    changed = {name for name in plain if not np.array_equal(plain[name], scaled[name])}
    assert changed
    assert all("/tables/" in f"/{name}" or name.startswith("account/") for name in changed), changed


@pytest.mark.parametrize("scheme", ["tied", "untied"])
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("tables", [0.0, None, 0.7])
def test_decay_takes_every_matrix_and_the_tables_and_never_a_scale(
    scheme: str, scan_layers: bool, tables: float | None
) -> None:
    cfg = small_config(scheme, norm="layernorm", qk_norm="head", scan_layers=scan_layers)
    params = nn.unbox(jax.eval_shape(lambda: lm.init_params(cfg, jax.random.key(0))))
    by_part = optimizer.rules(OptimizerConfig(weight_decay=0.3, tables=TableOptimizerConfig(weight_decay=tables)))
    kinds = set()
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        kind = name.split("/")[0] if name.startswith("tables/") else name.split("/")[-1]
        kinds.add(kind)
        expected = {"tables": 0.3 if tables is None else tables, "kernel": 0.3, "scale": 0.0}[kind]
        assert by_part[optimizer.part_of(path)].weight_decay == expected, name
    assert kinds == {"tables", "kernel", "scale"}


# ---- Rules of parts ----


def after_steps(cfg: RunConfig, count: int = 3) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The parameters of a run at its start and after a few real steps."""
    steps = step.make_steps(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    state = steps.init(key_for(jax.random.key(0), "params"))
    start, decile_V = named_leaves(state.params), np.zeros(cfg.model.table_rows, np.int32)
    for i in range(count):
        state, _ = steps.train(state, random_tokens(cfg, i), role_scale(cfg.tying), decile_V)
    return start, named_leaves(state.params)


def with_optimizer(scheme: str, **changes: Any) -> RunConfig:
    alone = TyingConfig(scheme=scheme, account="off")  # type: ignore[arg-type]
    return small_config(scheme, norm="layernorm", tying=alone, optimizer=OptimizerConfig(learning_rate=1e-2, **changes))


def changed(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not np.array_equal(one[name], other[name])}


class OneChain(NamedTuple):
    """An optimizer that knows neither tables nor roles; it clips the norm at 1."""

    chain: optax.GradientTransformation
    tables: dict[str, Any] = {}

    def init(self, params: Any, rows: Any = None) -> Any:
        return self.chain.init(params)

    def update(self, grads: Any, _: Tables, state: Any, params: Any, *, grad_norm: jax.Array, **others: Any) -> Any:
        factor = jnp.minimum(1.0, 1.0 / grad_norm)
        return *self.chain.update(jax.tree.map(lambda g: g * factor, grads), state, params), {}

    def last_parts(self, *_: Any) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("scheme", ["tied", "untied"])
def test_without_options_of_parts_training_is_that_of_one_adamw(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_adamw(cfg: OptimizerConfig, steps: int, layout: Layout, **_: Any) -> Any:
        matrices = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: "scale" not in str(path[-1]), params)
        chain = [
            optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
            optax.add_decayed_weights(cfg.weight_decay, matrices),
            optax.scale_by_learning_rate(optimizer.learning_rate(cfg, steps)),
        ]
        return OneChain(optax.chain(*chain))

    ours = after_steps(with_optimizer(scheme, eps=1e-7))[1]
    monkeypatch.setattr(step, "make_optimizer", one_adamw)
    step._make_steps.cache_clear()
    try:
        theirs = after_steps(with_optimizer(scheme, eps=1e-7))[1]
    finally:
        step._make_steps.cache_clear()
    start = after_steps(with_optimizer(scheme), 0)[0]
    for name, leaf in ours.items():  # two programs, which XLA rounds in its own ways
        np.testing.assert_allclose(leaf, theirs[name], rtol=0, atol=1e-6, err_msg=name)
        assert np.abs(leaf - start[name]).max() > 1e-4


def after_updates(cfg: RunConfig) -> list[dict[str, np.ndarray]]:
    """The parameters after each of three updates by gradients that are the same for all options."""
    params = nn.unbox(lm.init_params(cfg, jax.random.key(0)))
    transformation = optimizer.make_optimizer(cfg.optimizer, cfg.train.steps, tables=list(params["tables"]))
    state, found = transformation.init(params), []
    for seed in range(3):
        leaves, structure = jax.tree.flatten(params)
        rng = np.random.default_rng(seed)
        grads = structure.unflatten(jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in leaves)
        norm = optax.tree.norm(grads)
        updates, state, _ = transformation.update(grads, UNTOLD, state, params, grad_norm=norm)
        params = optax.apply_updates(params, updates)
        found.append(named_leaves(params))
    return found


@pytest.mark.parametrize("role", ["input", "output"])
@pytest.mark.parametrize(
    "option", [{"learning_rate": 0.2}, {"b2": 0.5}, {"weight_decay": 0.0}, {"kind": "sgd"}], ids=lambda o: next(iter(o))
)
def test_an_option_of_one_role_changes_the_updates_of_its_table_alone(role: str, option: dict[str, Any]) -> None:
    tables = TableOptimizerConfig(**{role: RoleOptimizerConfig(**option)})  # type: ignore[arg-type]
    plain, own = (after_updates(with_optimizer("untied", **each)) for each in ({}, {"tables": tables}))
    # The first update of Adam does not depend on its decays.
    assert [changed(one, other) <= {f"tables/{role}"} for one, other in zip(plain, own, strict=True)] == [True] * 3
    assert changed(plain[2], own[2]) == {f"tables/{role}"}


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({"input": RoleOptimizerConfig(init_std=0.5)}, {"tables/input": 2.0}),
        ({"output": RoleOptimizerConfig(init_std=0.5)}, {"tables/output": 2.0}),
        ({"init_std": 0.5}, {"tables/input": 2.0, "tables/output": 2.0}),
        ({"init_std": 0.5, "input": RoleOptimizerConfig(init_std=0.25)}, {"tables/output": 2.0}),
    ],
    ids=["input", "output", "both", "one as before"],
)
def test_the_initial_deviation_of_a_table_scales_its_draw_and_nothing_else(
    tables: dict[str, Any], expected: dict[str, float]
) -> None:
    plain, own = (
        after_steps(with_optimizer("untied", **each), 0)[0] for each in ({}, {"tables": TableOptimizerConfig(**tables)})
    )
    assert changed(plain, own) == set(expected)
    for name, factor in expected.items():
        np.testing.assert_array_equal(own[name], factor * plain[name])
        assert np.std(plain[name]) == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize("scheme", ["tied", "untied"])
def test_muon_changes_the_first_update_of_matrices_alone(scheme: str) -> None:
    body = BodyOptimizerConfig(kind="muon", learning_rate=0.02, weight_decay=0.0)
    plain, own = (after_steps(with_optimizer(scheme, **each), 1) for each in ({}, {"body": body}))
    assert not changed(plain[0], own[0])
    # Two programs, which XLA rounds in its own ways: what stays does so to the last bits.
    moved_by = {name: np.abs(plain[1][name] - own[1][name]).max() for name in plain[1]}
    assert {name for name, by in moved_by.items() if by > 1e-6} == {n for n in plain[1] if n.endswith("kernel")}
    moved = own[1]["body/params/layer_0/mlp/up/kernel"] - own[0]["body/params/layer_0/mlp/up/kernel"]
    singular_values = np.linalg.svd(moved, compute_uv=False) / (24 / 16) ** 0.5 / (0.02 / 100)  # first of 100 of warmup
    # What a LayerNorm gives has mean 0: there is no gradient along it.
    assert singular_values[-1] < 1e-3 < 0.5 < singular_values[-2] < singular_values[0] < 1.3


def test_sgd_averages_gradients_in_float64() -> None:
    """Of the tables alone; kept in bfloat16 if moments are."""
    rng = np.random.default_rng(0)
    cfg = dataclasses.replace(CFG, clip_norm=None, tables=TableOptimizerConfig(kind="sgd", learning_rate=3.0))
    grads = [rng.standard_normal((7, 4)) for _ in range(STEPS)]
    transformation = optimizer.make_optimizer(cfg, STEPS)
    params = {"tables": {"shared": jnp.ones((7, 4))}, "body": {"params": {"layer": {"kernel": jnp.ones((3, 3))}}}}
    state, table, mean = transformation.init(params), np.ones((7, 4)), np.zeros((7, 4))
    for t, gradient in enumerate(grads, 1):
        tree = {
            "tables": {"shared": jnp.asarray(gradient, jnp.float32)},
            "body": jax.tree.map(jnp.zeros_like, params["body"]),
        }
        updates, state, _ = transformation.update(tree, UNTOLD, state, params, grad_norm=jnp.float32(1))
        params = optax.apply_updates(params, updates)
        mean = 0.9 * mean + 0.1 * gradient
        table = table - 3.0 / 0.02 * rate(cfg, t, STEPS) * (mean / (1 - 0.9**t) + 0.3 * table)
    np.testing.assert_allclose(params["tables"]["shared"], table, rtol=1e-5, atol=1e-5)
    half = jax.eval_shape(optimizer.make_optimizer(in_bfloat16(cfg), STEPS).init, params)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(half) if leaf.ndim == 2)


@pytest.mark.parametrize("role", ["input", "output"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("kind", "sgd"), ("b2", 0.0), ("weight_decay", 0.0), ("init_std", 1.0)],
)
def test_options_of_one_role_are_refused_where_both_have_one_table(role: str, name: str, value: Any) -> None:
    tables = TableOptimizerConfig(**{role: RoleOptimizerConfig(**{name: value})})  # type: ignore[arg-type]
    assert with_optimizer("untied", tables=tables)
    with pytest.raises(UserError) as error:
        after_steps(with_optimizer("tied", tables=tables), 0)
    assert str(error.value) == (
        f"optimizer.tables.{role}.{name}: the tied scheme has no table for the {role} role alone; "
        f"give optimizer.tables.{name} instead"
    )
