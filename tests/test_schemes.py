"""Laws that every scheme keeps, and what each says of itself: its function at step 0, its size, what it shares."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_tokens, slow_but, small_config
from programs import OPTIMIZED
from runs import STEPS, arguments, assert_same_run, write_text

import tiedjax
from tiedjax import cli, flops, gradients, lm, sample, step, tying
from tiedjax.analysis.basis import held_out
from tiedjax.analysis.basis.run_data import data_of
from tiedjax.analysis.basis.tables import read_table
from tiedjax.analysis.instruments.contribution import contribution
from tiedjax.config import (
    ModelConfig,
    OptimizerConfig,
    RoleOptimizerConfig,
    RunConfig,
    TableOptimizerConfig,
    TyingConfig,
)
from tiedjax.errors import UserError
from tiedjax.model import Transformer
from tiedjax.sharding import MESH_AXES, ONE_DEVICE, make_mesh
from tiedjax.tying import SCHEMES, Tables

V, D = 32, 16  # of `small_config`
COUNTS = np.random.default_rng(5).permutation(V) // 2  # with ties
# Every scheme, and the forms of those that have several.
FORMS: dict[str, dict[str, Any]] = {
    **{scheme: {"scheme": scheme} for scheme in SCHEMES},
    "partial_dims of 3": {"scheme": "partial_dims", "dims": 3},
    "partial_tokens, frequent": {"scheme": "partial_tokens", "rows": 5, "rows_from": "frequent"},
    "low_rank of 5": {"scheme": "low_rank", "rank": 5},
    "diagonal transform": {"scheme": "transform", "transform": "diagonal"},
    "orthogonal transform": {"scheme": "transform", "transform": "orthogonal"},
    "gate by dimension": {"scheme": "interpolated", "gate": "dimension"},
    "gate by token": {"scheme": "interpolated", "gate": "token"},
}
# What a form trains, in numbers of the tables [V, D].
SIZES = {
    "tied": V * D,
    "untied": 2 * V * D,
    "untied_equal": 2 * V * D,
    "partial_dims": V * D * 3 // 2,
    "partial_tokens": V * D + V // 2 * D,
    "low_rank": V * D + 2 * (V + D),
    "transform": V * D + D * D,
    "interpolated": 2 * V * D + 1,
    "pseudo_inverse": V * D + D * D,
    "partial_dims of 3": V * (3 + 2 * 13),
    "partial_tokens, frequent": V * D + 5 * D,
    "low_rank of 5": V * D + 5 * (V + D),
    "diagonal transform": V * D + D,
    "orthogonal transform": V * D + D * D,
    "gate by dimension": 2 * V * D + D,
    "gate by token": 2 * V * D + V,
}


def config(form: str, **changes: Any) -> RunConfig:
    return small_config(tying=TyingConfig(**FORMS[form]), **changes)


def start_of(cfg: RunConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameters of a run, with the rows that its counts choose."""
    rows = tying.unshared_rows(cfg.tying, cfg.model, COUNTS)
    params = nn.unbox(lm.init_params(cfg, jax.random.key(3), rows))
    widened = lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    return jax.tree.map(widened, params)


def moved(cfg: RunConfig, dtype: Any = jnp.float64) -> dict[str, Any]:
    """Parameters somewhere else than at the start, where many schemes are tied."""
    params, rng = start_of(cfg, dtype), np.random.default_rng(0)
    for name in tying.scheme_of(cfg.tying).trained:
        array = params["tables"][name]
        params["tables"][name] = array + jnp.asarray(rng.normal(0, 0.1, array.shape), array.dtype)
    return params


def numpy_tables(form: str, arrays: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """E and U of a form by their formulas, in NumPy."""
    options, a = FORMS[form], {name: np.asarray(array) for name, array in arrays.items()}
    E = a.get("shared")
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    match options["scheme"]:
        case "tied":
            return E, E
        case "untied" | "untied_equal":
            return a["input"], a["output"]
        case "partial_dims":
            return np.hstack([E, a["input"]]), np.hstack([E, a["output"]])
        case "partial_tokens":
            U = E.copy()
            for place, row in enumerate(a["output_rows"]):
                U[row] = a["output"][place]
            return E, U
        case "low_rank":
            return E, E + a["output_left"] @ a["output_right"].T
        case "transform":
            R, one = a["output_transform"], np.eye(D)
            skew = (R - R.T) / 2 if R.ndim > 1 else None
            M = {
                "full": lambda: one + R,
                "diagonal": lambda: one + np.diag(R),
                "orthogonal": lambda: np.linalg.inv(one - skew) @ (one + skew),
            }[options.get("transform", "full")]()
            return E, E @ M
        case "interpolated":
            g = sigmoid(a["output_gate"])
            return E, g * E + (1 - g) * a["output"]
        case "pseudo_inverse":
            Z = E @ np.linalg.inv(np.linalg.cholesky(E.T @ E).T) * np.sqrt(V / D)
            L = np.tril(a["transform"], -1) + np.diag(np.exp(np.diag(a["transform"])))
            return Z @ np.linalg.inv(L @ L.T), Z @ L @ L.T
    raise AssertionError(form)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("form", FORMS)
def test_the_tables_are_those_of_the_formula(form: str) -> None:
    cfg = config(form)
    arrays = moved(cfg)["tables"]
    tables = tying.scheme_of(cfg.tying).tables(arrays)
    for table, expected in zip(tables, numpy_tables(form, arrays), strict=True):
        np.testing.assert_allclose(table, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_the_function_at_step_0_is_that_of_the_tied_twin_unless_the_scheme_says_otherwise(form: str) -> None:
    """And the body is the same to the bit, whatever the scheme."""
    cfg, tied = config(form), start_of(config("tied"))
    params = start_of(cfg)
    jax.tree.map(np.testing.assert_array_equal, params["body"], tied["body"])
    tables, E_VD = tying.scheme_of(cfg.tying).tables(params["tables"]), np.asarray(tied["tables"]["shared"])
    if form == "untied":
        for table in tables:
            assert abs(np.corrcoef(np.ravel(table), E_VD.ravel())[0, 1]) < 0.2
    elif form == "pseudo_inverse":
        # Not that function: the tied table with columns made orthogonal, as large as a table.
        np.testing.assert_allclose(tables.input, tables.output, rtol=0, atol=1e-6)
        np.testing.assert_allclose(tables.input.T @ tables.output, V / D * np.eye(D), rtol=0, atol=1e-5)
        R = np.linalg.qr(np.asarray(E_VD, np.float64))[1]
        triangular = E_VD @ np.linalg.inv(np.sign(np.diag(R))[:, None] * R) * np.sqrt(V / D)
        np.testing.assert_allclose(tables.input, triangular, rtol=0, atol=1e-5)
    else:
        np.testing.assert_array_equal(tables.input, E_VD)
        np.testing.assert_allclose(tables.output, E_VD, rtol=0, atol=1e-7)


@pytest.mark.usefixtures("float64")
def test_pseudo_inverse_tables_are_each_other_s_pseudo_inverse_wherever_training_goes() -> None:
    cfg = config("pseudo_inverse")
    E_VD, U_VD = tying.scheme_of(cfg.tying).tables(moved(cfg)["tables"])
    np.testing.assert_allclose(U_VD.T * (D / V), np.linalg.pinv(E_VD), rtol=0, atol=1e-12)
    assert np.abs(E_VD - U_VD).max() > 0.1


@pytest.mark.usefixtures("float64")
def test_an_orthogonal_transform_turns_and_neither_mirrors_nor_stretches() -> None:
    cfg = config("orthogonal transform")
    arrays = moved(cfg)["tables"]
    E_VD, U_VD = tying.scheme_of(cfg.tying).tables(arrays)
    M = np.linalg.lstsq(E_VD, U_VD, rcond=None)[0]
    np.testing.assert_allclose(M.T @ M, np.eye(D), rtol=0, atol=1e-12)
    assert np.linalg.det(M) == pytest.approx(1)
    assert np.abs(M - np.eye(D)).max() > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_the_size_is_what_is_trained(form: str) -> None:
    cfg = config(form)
    scheme = tying.scheme_of(cfg.tying)
    assert scheme.size(V, D) == SIZES[form]
    assert sum(array.size for array in lm.trained(start_of(cfg))["tables"].values()) == SIZES[form]
    assert set(scheme.trained) == set(lm.trained(start_of(cfg))["tables"])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("form", FORMS)
def test_role_gradients_are_those_of_explicit_tables_and_merge_by_the_chain_rule(form: str) -> None:
    """The roles' by autodiff on two arrays; the parameters' by central differences of the loss along two directions."""
    cfg = config(form)
    params, tokens_BS, total = moved(cfg), random_tokens(cfg), lm.summed_loss(cfg, ONE_DEVICE, 0.0)
    scheme = tying.scheme_of(cfg.tying)
    scale = Tables(jnp.float64(1), jnp.float64(1))
    _, (grads, roles, _) = jax.jit(gradients.loss_and_gradients(cfg))(params, tokens_BS, scale)

    @jax.jit
    def mean(E_VD: jax.Array, U_VD: jax.Array) -> jax.Array:
        loss, weight = total(Tables(E_VD, U_VD), params["body"], tokens_BS, jnp.ones(len(tokens_BS)))
        return loss / weight

    explicit = jax.grad(mean, argnums=(0, 1))(*map(jnp.array, scheme.tables(params["tables"])))
    for role, expected in zip(roles, explicit, strict=True):
        np.testing.assert_allclose(role, expected, rtol=0, atol=1e-12)
    assert set(grads["tables"]) == set(scheme.trained)
    rng = np.random.default_rng(1)
    for name in scheme.trained:
        direction = rng.normal(size=params["tables"][name].shape)
        ends = (
            mean(*scheme.tables(params["tables"] | {name: params["tables"][name] + h * direction}))
            for h in (1e-5, -1e-5)
        )
        slope = np.subtract(*map(float, ends)) / 2e-5
        assert np.sum(grads["tables"][name] * direction) == pytest.approx(slope, rel=1e-5, abs=1e-8), name


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("form", FORMS)
def test_each_role_s_part_of_the_gradient_sums_to_the_whole_and_stays_with_the_arrays_of_that_role(form: str) -> None:
    cfg = config(form)
    params = moved(cfg)
    scheme = tying.scheme_of(cfg.tying)
    _, (grads, roles, _) = jax.jit(gradients.loss_and_gradients(cfg))(
        params, random_tokens(cfg), Tables(jnp.float64(1), jnp.float64(1))
    )
    by_role = scheme.by_role(params["tables"], roles)
    for name in scheme.trained:
        np.testing.assert_allclose(by_role.input[name] + by_role.output[name], grads["tables"][name], atol=1e-13)
        for role, other in (("input", by_role.output), ("output", by_role.input)):
            if name.startswith(role):
                assert not np.any(other[name]), f"{name} is written by both"


def trained(cfg: RunConfig, count: int, dtype: Any = jnp.float32, optimized: bool = False) -> list[step.TrainState]:
    """States before and after the first steps of a run, compiled as tests compile or as users do."""
    steps = step.make_steps(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    state = steps.init(jax.random.key(3), None, tying.unshared_rows(cfg.tying, cfg.model, COUNTS))
    widened = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    states = [jax.tree.map(widened, state)]
    others = Tables(jnp.float32(1), jnp.float32(1)), np.zeros(V, np.int32)
    train = steps.train
    if optimized:
        train = train.lower(states[0], random_tokens(cfg), *others).compile(compiler_options=OPTIMIZED)
    for i in range(count):
        given = jax.tree.map(jnp.copy, states[-1])
        states.append(train(given, random_tokens(cfg, i), *others)[0])
    return states


@pytest.mark.parametrize("form", slow_but(FORMS, *SCHEMES))
def test_every_array_of_a_scheme_is_trained_and_none_of_indices_moves(form: str) -> None:
    cfg = config(form)
    first, *_, last = trained(cfg, 3)
    for name, array in first.params["tables"].items():
        change = np.abs(np.asarray(last.params["tables"][name]) - np.asarray(array)).max()
        assert (change > 1e-4) == (name in tying.scheme_of(cfg.tying).trained), name


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("form", ["partial_dims", "partial_tokens", "low_rank", "transform", "interpolated"])
def test_the_account_of_what_both_roles_write_adds_up(form: str) -> None:
    hard = OptimizerConfig(learning_rate=0.02, warmup_steps=3, weight_decay=0.3, clip_norm=1e-2)
    cfg = config(form, optimizer=hard)
    cfg = dataclasses.replace(cfg, tying=dataclasses.replace(cfg.tying, account="checked"))
    first, *_, last = trained(cfg, 12, jnp.float64, optimized=True)  # plainly, the float32 rate is rounded twice
    assert last.account is not None
    assert list(last.account.written) == ["shared"]
    written, kept = last.account.written["shared"], np.exp(float(last.account.log_kept["shared"][0]))
    table = np.asarray(last.params["tables"]["shared"])
    total = kept * np.asarray(first.params["tables"]["shared"]) + written.input + written.output
    np.testing.assert_allclose(total, table, rtol=0, atol=1e-12)
    assert min(np.linalg.norm(part) for part in written) > 0.02 * np.linalg.norm(table)


def test_the_rows_that_are_not_shared_are_the_rarest_or_the_most_frequent() -> None:
    model = ModelConfig(vocab_size=6, vocab_multiple=4, d_model=4, heads=2)
    counts_V = np.array([5, 0, 9, 5, 1, 7, 0, 0])
    chosen = lambda **options: tying.unshared_rows(TyingConfig(scheme="partial_tokens", **options), model, counts_V)
    np.testing.assert_array_equal(chosen(rows=2), [1, 4])
    np.testing.assert_array_equal(chosen(rows=3), [0, 1, 4])  # of 0 and 3, which are as frequent, the lower id
    np.testing.assert_array_equal(chosen(rows=2, rows_from="frequent"), [2, 5])
    np.testing.assert_array_equal(chosen(), [0, 1, 3, 4])  # half of the table's 8 rows; those of no token come last
    assert chosen().dtype == np.int32
    assert tying.unshared_rows(TyingConfig(), model, counts_V) is None


def test_a_role_s_own_options_are_those_of_the_arrays_that_it_alone_writes() -> None:
    """Without them nothing else changes: the arrays of both roles are the same to the bit."""
    own = TableOptimizerConfig(output=RoleOptimizerConfig(weight_decay=0.9))
    options = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
    for form in ("partial_dims", "low_rank", "interpolated"):
        plain, other = (
            trained(config(form, optimizer=changed), 3)[-1].params["tables"]
            for changed in (options, dataclasses.replace(options, tables=own))
        )
        after = {name: bool((np.asarray(plain[name]) == np.asarray(other[name])).all()) for name in plain}
        assert {name for name, same in after.items() if not same} >= {n for n in after if n.startswith("output")}
    first, second = (
        trained(config("partial_dims", optimizer=changed), 1, optimized=True)[-1].params["tables"]
        for changed in (options, dataclasses.replace(options, tables=own))
    )
    for name in ("shared", "input"):
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize(("form", "name"), [("transform", "output_transform"), ("low_rank", "output_right")])
def test_the_rates_of_tables_are_those_of_rows(form: str, name: str) -> None:
    """An array without a row for each token has the rate, decay and b2 of all else, whatever the tables have."""
    role = RoleOptimizerConfig(b2=0.3 if form == "low_rank" else None)  # transform has no rows of the output role alone
    tables = TableOptimizerConfig(learning_rate=0.5, weight_decay=0.7, b2=0.5, output=role)
    own, plain = OptimizerConfig(learning_rate=1e-2, tables=tables), OptimizerConfig(learning_rate=1e-2)
    ends = [trained(config(form, optimizer=each), 1, optimized=True)[-1].params["tables"] for each in (own, plain)]
    np.testing.assert_array_equal(ends[0][name], ends[1][name])
    assert np.abs(np.asarray(ends[0][name])).max() > 1e-5
    assert np.abs(np.asarray(ends[0]["shared"]) - np.asarray(ends[1]["shared"])).max() > 1e-3


@pytest.mark.parametrize(
    ("form", "products"),
    [("tied", 0), ("low_rank", 2 * V * D * 2), ("transform", 2 * V * D * D), ("diagonal transform", 0),
     ("pseudo_inverse", 6 * V * D * D)],
)  # fmt: skip
def test_what_a_scheme_computes_is_counted_once_a_step_forward_and_backward(form: str, products: int) -> None:
    more = flops.model_flops(config(form)) - flops.model_flops(config("tied"))
    assert more == 3 * products


# ---- Runs ----


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "words.jsonl")


@pytest.mark.parametrize(
    "scheme", slow_but([scheme for scheme in SCHEMES if scheme not in ("tied", "untied")], "low_rank", "partial_tokens")
)
def test_a_run_of_any_scheme_continues_bit_for_bit_and_is_read_by_every_instrument(
    scheme: str, text: Path, tmp_path: Path
) -> None:
    whole, parts, changes = tmp_path / "whole", tmp_path / "parts", {"tying.scheme": scheme}
    assert cli.main(arguments(whole, text, changes)) == 0
    assert cli.main(arguments(parts, text, {**changes, "train.stop_at": 4})) == 0
    assert cli.main(arguments(parts, text, changes)) == 0
    assert_same_run(parts, whole)
    run = tiedjax.load_run(whole)
    arrays = run.params()["tables"]
    tables = tying.scheme_of(run.config.tying).tables(arrays)
    for role in ("input", "output"):
        np.testing.assert_array_equal(getattr(run.tables(), role), getattr(tables, role))
        np.testing.assert_array_equal(read_table(f"{whole}#{role}").values, getattr(tables, role))
    assert not run.tables().tied
    if scheme == "partial_tokens":
        rarest = np.argsort(run.token_counts.sum(0), kind="stable")[: len(arrays["output_rows"])]
        np.testing.assert_array_equal(arrays["output_rows"], np.sort(rarest))
        differing = np.flatnonzero(np.abs(tables.input - tables.output).max(axis=1))
        np.testing.assert_array_equal(differing, arrays["output_rows"])
    if tying.scheme_of(run.config.tying).followed:
        account = run.account()
        shared = np.asarray(arrays["shared"])
        np.testing.assert_allclose(account.initial + account.input + account.output, shared, rtol=0, atol=1e-6)


# ---- What is refused ----


def refused(cfg: RunConfig) -> str:
    with pytest.raises(UserError) as error:
        step.make_steps(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"scheme": "partial_dims", "dims": 16},
            "tying.dims: must be <= model.d_model - 1 = 15, got 16",
        ),
        ({"scheme": "low_rank", "rank": 17}, "tying.rank: must be <= model.d_model = 16, got 17"),
        ({"scheme": "partial_tokens", "rows": 33}, "tying.rows: must be <= model.vocab_size = 32, got 33"),
        (
            {"scheme": "tied", "dims": 4},
            "tying.dims: is an option of the partial_dims scheme, tying.scheme is 'tied'; leave it out",
        ),
        (
            {"scheme": "interpolated", "transform": "diagonal"},
            "tying.transform: is an option of the transform scheme, tying.scheme is 'interpolated'; leave it out",
        ),
        (
            {"scheme": "pseudo_inverse", "account": "whole"},
            "tying.account: whole cannot be kept under the pseudo_inverse scheme, whose tables are no sums of what the "
            "roles wrote; set it to auto or off",
        ),
        (
            {"scheme": "untied_equal", "input_grad_scale": 5.0},
            "tying.input_grad_scale: 5 changes nothing under the untied_equal scheme, where adamw divides each role's "
            "gradient by its own size; give optimizer.tables.input.learning_rate, or a scale of 0 to freeze it",
        ),
        (
            {"scheme": "pseudo_inverse", "output_update_share": 0.5},
            "tying.output_update_share: needs the account of a table of both roles, and the pseudo_inverse scheme "
            "has none",
        ),
    ],
)
def test_options_that_a_scheme_has_no_room_for_are_refused(options: dict[str, Any], says: str) -> None:
    assert refused(small_config(tying=TyingConfig(**options))) == says


@pytest.mark.parametrize(
    ("form", "tables", "says"),
    [
        (
            "partial_dims",
            {"kind": "coupled"},
            "optimizer.tables.kind: coupled is about the rows of a whole table, which the partial_dims scheme puts "
            "together of several arrays; take another, or tied, untied or untied_equal",
        ),
        (
            "low_rank",
            {"centered": True},
            "optimizer.tables.centered: True is about the rows of a whole table, which the low_rank scheme puts "
            "together of several arrays; take another, or tied, untied or untied_equal",
        ),
        (
            "untied_equal",
            {"output": RoleOptimizerConfig(init_std=0.5)},
            "optimizer.tables.output.init_std: what the output role has for itself starts as a copy under the "
            "untied_equal scheme; give optimizer.tables.init_std instead",
        ),
        (
            "pseudo_inverse",
            {"init_std": 0.5},
            "optimizer.tables.init_std: changes nothing under the pseudo_inverse scheme, which gives its tables the "
            "size 1 / sqrt(D); leave it out",
        ),
        (
            "transform",
            {"output": RoleOptimizerConfig(weight_decay=0.9)},
            "optimizer.tables.output.weight_decay: the transform scheme has no table for the output role alone; give "
            "optimizer.tables.weight_decay instead",
        ),
        (
            "low_rank",
            {"input": RoleOptimizerConfig(b2=0.5)},
            "optimizer.tables.input.b2: the low_rank scheme has no table for the input role alone; give "
            "optimizer.tables.b2 instead",
        ),
    ],
)
def test_options_of_the_optimizer_that_a_scheme_makes_void_are_refused(
    form: str, tables: dict[str, Any], says: str
) -> None:
    assert refused(config(form, optimizer=OptimizerConfig(tables=TableOptimizerConfig(**tables)))) == says


def test_a_table_with_fewer_rows_than_columns_has_no_pseudo_inverse() -> None:
    assert refused(config("pseudo_inverse", vocab_size=8)) == (
        "tying.scheme: pseudo_inverse needs tables with at least as many rows as columns, got 8 of model.d_model = 16"
    )


def test_a_mesh_that_cannot_cut_an_array_is_refused() -> None:
    cfg = small_config(tying=TyingConfig(scheme="partial_dims", dims=3))
    with pytest.raises(UserError) as error:
        step.make_steps(cfg, jax.sharding.AbstractMesh((1, 2, 1), MESH_AXES))
    assert str(error.value) == (
        "mesh.fsdp: 2 does not divide the 3 columns of shared, an array of the partial_dims scheme"
    )


# ---- What multiplies what is looked up, and what is multiplied by the output table ----


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({"input_multiplier": "sqrt_d"}, lambda x: 4 * x, lambda h: h),
        ({"input_multiplier": "inverse_sqrt_d"}, lambda x: x / 4, lambda h: h),
        ({"output_multiplier": "inverse_sqrt_d"}, lambda x: x, lambda h: h / 4),
        (
            {"input_multiplier": "sqrt_d", "output_multiplier": "sqrt_d", "norm_after_lookup": True},
            lambda x: (4 * x - 4 * x.mean(-1, keepdims=True)) / jnp.sqrt((4 * x).var(-1, keepdims=True) + 1e-5),
            lambda h: 4 * h,
        ),
    ],
)
def test_forward_multipliers_are_those_of_a_hand_written_forward(
    options: dict[str, Any], before: Callable[[Any], Any], after: Callable[[Any], Any]
) -> None:
    """Role gradients have them in: they are those of the table that was looked up in, or multiplied with."""
    cfg, plain = config("untied", **options), config("untied")
    params, tokens_BS = start_of(cfg, jnp.float64), random_tokens(cfg)

    @functools.partial(jax.jit, static_argnums=2)
    def loss(E_VD: jax.Array, U_VD: jax.Array, by_hand: bool) -> jax.Array:
        if not by_hand:
            given = Tables(E_VD, U_VD), params["body"], tokens_BS, jnp.ones(len(tokens_BS))
            total, weight = lm.summed_loss(cfg, ONE_DEVICE, 0.0)(*given)
            return total / weight
        x_BTD = before(E_VD[tokens_BS[:, :-1]])
        h_BTD = after(Transformer(plain.model).apply(params["body"], x_BTD))
        log_p = jax.nn.log_softmax(h_BTD @ U_VD.T)
        return -jnp.mean(jnp.take_along_axis(log_p, tokens_BS[:, 1:, None], axis=-1))

    tables = params["tables"]["input"], params["tables"]["output"]
    ours, theirs = (jax.value_and_grad(loss, argnums=(0, 1))(*tables, by_hand) for by_hand in (False, True))
    assert ours[0] == pytest.approx(float(theirs[0]), rel=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), ours[1], theirs[1])


def test_what_reads_a_run_has_its_multipliers_and_its_norm_after_lookup(text: Path, tmp_path: Path) -> None:
    """Held-out losses of the frozen model, with blocks one by one too, are those that the run logged."""
    out = tmp_path / "run"
    changes = {
        "model.input_multiplier": "sqrt_d",
        "model.output_multiplier": "inverse_sqrt_d",
        "model.norm_after_lookup": "true",
        "model.norm": "rmsnorm",
    }
    assert cli.main(arguments(out, text, changes)) == 0
    run = tiedjax.load_run(out)
    scale = run.params()["body"]["params"]["entry"]["Norm_0"]["scale"]
    assert np.abs(scale - 1).max() > 1e-4, "it is trained"
    windows_WS = held_out.evaluated_windows(run, data_of(run))
    model = held_out.FrozenModel(run)
    logged = run.metrics["eval_loss"][-1]
    assert model.bits(windows_WS).mean() * np.log(2) == pytest.approx(logged, rel=1e-5)
    assert contribution.contribution(model, windows_WS).loss.mean * np.log(2) == pytest.approx(logged, rel=1e-5)
    first = int(windows_WS[0, 0])
    tables = run.scheme(STEPS).tables(run.params()["tables"])
    drawn = sample.continue_tokens(
        run.config.model, tables, run.params()["body"], [[first]], 1, temperature=0.0, key=jax.random.key(0)
    )
    last_ND = model.last_states(np.array([[first, 0]]))
    assert drawn[0, 0] == np.argmax(model.log_probabilities(model.normed(last_ND))[0, : run.config.model.vocab_size])
