"""The laws of the split: what reaches the table, from which role, and what scaling may touch."""

from __future__ import annotations

import functools
import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_tokens, slow_but, small_config
from programs import OPTIMIZED

from tiedjax import gradients, lm, model, step, tying
from tiedjax.config import DataConfig, RunConfig, TyingConfig
from tiedjax.sharding import ONE_DEVICE, make_mesh
from tiedjax.tying import SCHEMES, Tables


def params_of(cfg: RunConfig, dtype: Any = jnp.float64) -> dict[str, Any]:
    params = nn.unbox(lm.init_params(cfg, jax.random.key(3)))
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params)


@functools.cache
def compiled_gradients(cfg: RunConfig, parts: int, optimized: bool) -> Any:
    """(params, taps of the tables, tap of squares, scale) -> (mean loss of one batch, gradients of the first three),
    compiled once for all tests that ask for it, as tests compile or as users do."""
    scheme = tying.scheme_of(cfg.tying)
    total = gradients.accumulated(lm.summed_loss(cfg, ONE_DEVICE, 0.0), parts)
    tokens_BS = random_tokens(cfg)

    def mean_loss(numbers: Any, zeros: Any, zero: Any, whole: Any, scale: Tables | None) -> jax.Array:
        params = lm.with_trained(whole, numbers)
        tables = tying.split_gradient(scheme.tables(params["tables"]), zeros, scale)
        loss, weight = total(tables, params["body"], tokens_BS, jnp.ones(cfg.data.batch_size), zero)
        return loss / weight

    gradient = jax.value_and_grad(mean_loss, argnums=(0, 1, 2))
    of = lambda params, zeros, zero, scale: gradient(lm.trained(params), zeros, zero, params, scale)
    return jax.jit(of, compiler_options=OPTIMIZED if optimized else None)


def split_gradients(
    cfg: RunConfig, params: Any, scale: Tables | None, *, taps: bool = True, parts: int = 1, optimized: bool = False
) -> Any:
    """((params gradient, role gradients, sums of squares), mean loss) of one batch, as the train step computes them;
    without taps the latter two are None."""
    tables = tying.scheme_of(cfg.tying).tables(params["tables"])
    zero = jnp.zeros(())
    squares = lm.Squares(zero, Tables(zero, zero) if parts > 1 else None)
    zeros = (tying.zero_taps(tables), squares) if taps else (None, None)
    value, grads = compiled_gradients(cfg, parts, optimized)(params, *zeros, scale)
    return grads, value


def ones() -> Tables:
    return Tables(jnp.float32(1), jnp.float32(1))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("parts", [1, 4])
def test_the_tied_gradient_is_the_sum_of_its_roles(parts: int) -> None:
    cfg = small_config("tied")
    (grads, roles, _), _ = split_gradients(cfg, params_of(cfg), ones(), parts=parts)
    np.testing.assert_allclose(grads["tables"]["shared"], roles.input + roles.output, rtol=0, atol=1e-12)
    assert np.linalg.norm(roles.input) > 1e-3
    assert np.linalg.norm(roles.output) > 1e-3


@pytest.mark.usefixtures("float64")
def test_role_gradients_are_those_of_two_separate_tables() -> None:
    cfg = small_config("tied")
    params = params_of(cfg)
    (_, roles, _), _ = split_gradients(cfg, params, ones())
    total, shared = lm.summed_loss(cfg, ONE_DEVICE, 0.0), params["tables"]["shared"]
    tokens_BS, weights_B = random_tokens(cfg), jnp.ones(cfg.data.batch_size)
    mean = lambda E, U: total(Tables(E, U), params["body"], tokens_BS, weights_B)[0] / tokens_BS[:, 1:].size
    separate = jax.jit(jax.grad(mean, argnums=(0, 1)))(shared, shared + 0.0)
    for role, expected in zip(roles, separate, strict=True):
        np.testing.assert_allclose(role, expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_the_output_role_is_the_closed_form() -> None:
    """dL/dU = (softmax(h U^T) - onehot)^T h / N, in NumPy."""
    cfg = small_config("untied")
    params = params_of(cfg)
    (_, roles, _), _ = split_gradients(cfg, params, ones())
    tokens_BS = random_tokens(cfg)
    E, U = (np.asarray(params["tables"][name]) for name in ("input", "output"))
    h = np.asarray(model.Transformer(cfg.model).apply(params["body"], E[tokens_BS[:, :-1]])).reshape(-1, E.shape[1])
    logits = h @ U.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(p)), tokens_BS[:, 1:].reshape(-1)] -= 1
    np.testing.assert_allclose(roles.output, p.T @ h / len(p), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_output_columns_sum_to_zero_and_absent_inputs_have_no_gradient() -> None:
    cfg = small_config("tied")
    (_, roles, _), _ = split_gradients(cfg, params_of(cfg), ones())
    np.testing.assert_allclose(roles.output.sum(0), 0, atol=1e-12)
    absent = np.setdiff1d(np.arange(cfg.model.table_rows), random_tokens(cfg)[:, :-1])
    assert len(absent) >= 8
    assert not np.any(roles.input[absent])
    present = np.unique(random_tokens(cfg)[:, :-1])
    assert np.all(np.linalg.norm(roles.input[present], axis=1) > 0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("parts", [1, 2])
def test_the_tap_of_the_lookup_observes_the_gradient_of_the_looked_up_vectors(parts: int) -> None:
    """Its sum of squares over the whole batch, of the mean loss, under any role scale."""
    cfg = small_config("tied")
    params = params_of(cfg)
    tokens_BS, E = random_tokens(cfg), params["tables"]["shared"]

    def mean_loss(x_BTD: jax.Array) -> jax.Array:
        h_BTD = model.Transformer(cfg.model).apply(params["body"], x_BTD)
        logits = h_BTD @ E.T
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens_BS[:, 1:, None], axis=-1))

    expected = jnp.sum(jnp.square(jax.jit(jax.grad(mean_loss))(E[tokens_BS[:, :-1]])))
    (_, roles, squares), _ = split_gradients(cfg, params, Tables(jnp.float32(4), jnp.float32(0.5)), parts=parts)
    np.testing.assert_allclose(squares.lookup, expected, rtol=1e-12)
    ratio = np.sqrt(squares.lookup) / np.linalg.norm(roles.input)
    assert abs(ratio - 1) > 0.05  # rows of one token add up in the table


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scheme", slow_but(SCHEMES, "tied", "untied", "interpolated"))
def test_microbatches_change_nothing(scheme: str) -> None:
    cfg = small_config(scheme)
    params = params_of(cfg)
    (*whole, whole_squares), loss = split_gradients(cfg, params, ones())
    for parts in (2, 4, 8) if scheme in ("tied", "untied") else (4,):
        (*cut, squares), cut_loss = split_gradients(cfg, params, ones(), parts=parts)
        np.testing.assert_allclose(cut_loss, loss, rtol=1e-14, err_msg=f"{parts} parts")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-13), cut, whole)
        np.testing.assert_allclose(squares.lookup, whole_squares.lookup, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scheme", slow_but(SCHEMES, "tied", "untied", "low_rank"))
def test_observing_the_squares_of_microbatches_changes_no_bit(scheme: str) -> None:
    """As an update sees it: the gradients of all parameters and the loss, with the taps and without."""
    cfg = small_config(scheme)
    params = params_of(cfg, jnp.float32)
    zero, zeros = jnp.zeros(()), tying.zero_taps(tying.scheme_of(cfg.tying).tables(params["tables"]))
    compute = compiled_gradients(cfg, 2, optimized=True)
    observed, plain = (compute(params, zeros, lm.Squares(zero, roles), ones()) for roles in (Tables(zero, zero), None))
    assert min(observed[1][2].roles) > 0
    assert plain[1][2].roles is None
    jax.tree.map(np.testing.assert_array_equal, (observed[0], observed[1][:2]), (plain[0], plain[1][:2]))


@pytest.mark.parametrize("scheme", slow_but(SCHEMES, "tied", "untied", "partial_dims"))
def test_observing_with_scales_of_one_is_bit_identical_to_no_split(scheme: str) -> None:
    cfg = small_config(scheme)
    params = params_of(cfg, jnp.float32)
    (observed, *_), loss = split_gradients(cfg, params, ones(), optimized=True)
    (plain, *nothing), plain_loss = split_gradients(cfg, params, None, taps=False, optimized=True)
    assert nothing == [None, None]
    assert loss == plain_loss
    jax.tree.map(np.testing.assert_array_equal, observed, plain)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scaling_touches_the_table_alone_and_needs_no_observer(scheme: str) -> None:
    cfg = small_config(scheme)
    params = params_of(cfg, jnp.float32)
    (plain, roles, square), _ = split_gradients(cfg, params, ones(), optimized=True)
    scale = Tables(jnp.float32(4), jnp.float32(0.5))  # powers of two: products are exact
    (scaled, raw, same), _ = split_gradients(cfg, params, scale, optimized=True)
    (unobserved, *_), _ = split_gradients(cfg, params, scale, taps=False, optimized=True)
    jax.tree.map(np.testing.assert_array_equal, scaled["body"], plain["body"])
    jax.tree.map(np.testing.assert_array_equal, raw, roles)
    assert same == square
    jax.tree.map(np.testing.assert_array_equal, scaled, unobserved)
    expected = tying.scheme_of(cfg.tying).transposed(params["tables"], Tables(4 * roles.input, 0.5 * roles.output))
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())
    jax.tree.map(near, scaled["tables"], expected)


def test_a_tied_table_stays_one_array_through_real_steps() -> None:
    cfg = small_config("tied", data=DataConfig(batch_size=8, microbatches=2))
    steps = step.make_steps(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    state = steps.init(jax.random.key(0))
    before = np.asarray(state.params["tables"]["shared"])
    for i in range(4):
        state, _ = steps.train(state, random_tokens(cfg, i), ones(), np.zeros(cfg.model.table_rows, np.int32))
    assert list(state.params["tables"]) == ["shared"]
    tables = tying.scheme_of(cfg.tying).tables(state.params["tables"])
    assert tables.input is tables.output
    assert np.abs(np.asarray(tables.input) - before).max() > 1e-3


@pytest.mark.parametrize("scheme", slow_but(SCHEMES, "tied", "untied", "pseudo_inverse"))
def test_a_start_that_compiles_quickly_is_bit_identical_to_any_other(scheme: str) -> None:
    cfg, key = small_config(scheme), jax.random.key(2)
    steps = step.make_steps(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    by_default = OPTIMIZED | {"xla_backend_optimization_level": 3}
    any_other = jax.jit(lambda root: nn.unbox(lm.init_params(cfg, root)), compiler_options=by_default)(key)
    quick = steps.init.lower(key).compile(OPTIMIZED)(key).params
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), quick, any_other))


def test_what_a_run_holds_is_traced_once_for_all_that_differ_in_neither_model_nor_scheme() -> None:
    tied, untied = (lm.abstract_params(small_config(scheme)) for scheme in ("tied", "untied"))
    assert lm.abstract_params(small_config("tied", data=DataConfig(batch_size=4))) is tied
    assert set(tied["tables"]) != set(untied["tables"])
    made = nn.unbox(lm.init_params(small_config("tied"), jax.random.key(0)))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), tied
    )


def test_each_switch_changes_one_thing_at_step_0() -> None:
    start = lambda scheme: nn.unbox(lm.init_params(small_config(scheme, d_model=256), jax.random.key(1)))
    tied, untied = start("tied"), start("untied")
    jax.tree.map(np.testing.assert_array_equal, tied["body"], untied["body"])
    tables = [tied["tables"]["shared"], untied["tables"]["input"], untied["tables"]["output"]]
    for i, a in enumerate(tables):
        assert a.shape == (32, 256)
        assert a.dtype == np.float32
        np.testing.assert_allclose(np.std(a), 256**-0.5, rtol=0.05)
        for b in tables[:i]:
            cosine = np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
            assert abs(cosine) < 4 / np.sqrt(a.size)


def test_a_compiled_step_depends_on_every_option_of_tying_but_the_scales() -> None:
    """An option that a scheme is given later must not be dropped on the way to what compiles."""
    options = TyingConfig(scheme="untied", input_grad_scale=5.0, output_grad_scale=0.5)
    kept = tying.without_scales(options)
    differing = {name for name, value in vars(options).items() if vars(kept)[name] != value}
    assert differing == {"input_grad_scale", "output_grad_scale"}


def test_a_scheme_declares_the_shape_axes_and_law_of_each_of_its_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table and a matrix of its width: they start as declared, are sharded as declared, and both are trained."""

    def turned(options: TyingConfig) -> tying.Scheme:
        eye = lambda start: jnp.eye(start.shape[1])
        matrix = tying.Parameter("turn", lambda V, D: (D, D), ("embed", None), eye, has_rows=False)
        return tying.Scheme(
            (tying.Parameter("input"), matrix), lambda params: Tables(params["input"], params["input"] @ params["turn"])
        )

    plain = nn.unbox(lm.init_params(small_config("untied"), jax.random.key(1)))
    monkeypatch.setitem(SCHEMES, "untied", turned)
    lm._abstract_params.cache_clear()
    step._make_steps.cache_clear()
    cfg = small_config("untied", data=DataConfig(batch_size=8, microbatches=2))
    try:
        boxed = lm.init_params(cfg, jax.random.key(1))["tables"]
        assert {name: box.names for name, box in boxed.items()} == {
            "input": ("vocab", "embed"),
            "turn": ("embed", None),
        }
        start = nn.unbox(boxed)
        np.testing.assert_array_equal(start["turn"], np.eye(cfg.model.d_model))
        np.testing.assert_array_equal(start["input"], plain["tables"]["input"])
        assert not tying.scheme_of(cfg.tying).shares_one_table
        steps = step.make_steps(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
        state = steps.init(jax.random.key(1))
        for i in range(2):
            state, metrics = steps.train(state, random_tokens(cfg, i), ones(), np.zeros(cfg.model.table_rows, np.int32))
        assert np.isfinite(metrics["loss"])
        assert all(np.abs(np.asarray(state.params["tables"][name]) - start[name]).max() > 1e-3 for name in start)
    finally:
        lm._abstract_params.cache_clear()
        step._make_steps.cache_clear()


def test_the_config_names_every_scheme() -> None:
    assert set(typing.get_args(typing.get_type_hints(TyingConfig)["scheme"])) == set(SCHEMES)


def test_role_metrics_agree_with_numpy() -> None:
    rng = np.random.default_rng(0)
    roles = Tables(*(rng.standard_normal((40, 6)).astype(np.float32) for _ in range(2)))
    decile_V = np.arange(40, dtype=np.int32) % 11 - 1
    got = jax.device_get(jax.jit(gradients.role_metrics)(roles, decile_V))
    a, b = (np.asarray(g, np.float64) for g in roles)
    norms = np.linalg.norm(a), np.linalg.norm(b)
    np.testing.assert_allclose(got["input_grad_norm"], norms[0], rtol=1e-6)
    np.testing.assert_allclose(got["output_grad_share"], norms[1] / sum(norms), rtol=1e-6)
    np.testing.assert_allclose(got["role_grad_cosine"], np.sum(a * b) / np.prod(norms), rtol=1e-5)
    for decile in range(10):
        expected = np.linalg.norm(b[decile_V == decile])
        np.testing.assert_allclose(got["output_grad_norm_deciles"][decile], expected, rtol=1e-6)


def test_scales_may_be_numbers_of_python() -> None:
    E_VD = jnp.ones((3, 2))
    of_scaled = jax.grad(lambda E: sum(jnp.sum(t) for t in tying.split_gradient(Tables(E, E), None, Tables(5.0, 1))))
    np.testing.assert_array_equal(of_scaled(E_VD), np.full((3, 2), 6.0))
    np.testing.assert_array_equal(jax.jit(of_scaled)(E_VD), np.full((3, 2), 6.0))
