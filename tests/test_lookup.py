"""The lookup and the gradient that reaches the table from it."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layout_program import MESHES, METHODS
from programs import TESTS, finish, start

from tiedjax.errors import UserError
from tiedjax.lookup import lookup, row_sums
from tiedjax.loss import cross_entropy
from tiedjax.sharding import Layout


def test_rows_are_gathered_and_their_gradient_is_summed_in_float32() -> None:
    rng = np.random.default_rng(0)
    E_VD = jnp.asarray(rng.standard_normal((5, 4)), jnp.float32)
    tokens_BT = jnp.array([[1, 3, 1], [0, 1, 3]])
    dx_BTD = jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.bfloat16)
    x_BTD, pull = jax.vjp(lambda E, tap: lookup(E, tokens_BT, jnp.bfloat16, tap), E_VD, jnp.zeros(()))
    np.testing.assert_array_equal(x_BTD, np.asarray(E_VD.astype(jnp.bfloat16))[tokens_BT])
    dE_VD, square = pull(dx_BTD)
    assert dE_VD.dtype == jnp.float32
    expected = np.zeros((5, 4))
    np.add.at(expected, np.asarray(tokens_BT), np.asarray(dx_BTD, np.float64))
    np.testing.assert_allclose(dE_VD, expected, rtol=1e-6)
    np.testing.assert_allclose(square, np.square(np.asarray(dx_BTD, np.float64)).sum(), rtol=1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 500])
def test_every_method_sums_what_numpy_sums_and_drops_what_is_outside(method: str, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    ids_N = np.where(rng.random(tokens) < 0.5, 3, rng.integers(0, 11, tokens))  # 10 lies outside
    dx_ND = rng.standard_normal((tokens, 4))
    expected = np.zeros((12, 4))
    np.add.at(expected, ids_N, dx_ND)
    found = row_sums(method, "cpu")(jnp.asarray(dx_ND), jnp.asarray(ids_N), 10)
    np.testing.assert_allclose(found, expected[:10], rtol=1e-12, atol=1e-12)


def test_each_platform_has_its_method() -> None:
    assert row_sums("auto", "tpu") is row_sums("sorted", "gpu")
    assert row_sums("auto", "gpu") is row_sums("auto", "cpu") is row_sums("scatter", "tpu")


def test_the_deterministic_method_writes_each_row_once() -> None:
    """An order of additions can only vary where several are added to one place: in a scatter of ids that repeat."""
    dx_ND, ids_N = jnp.ones((64, 4)), jnp.zeros(64, jnp.int32)

    def scatters(method: str) -> list[str]:
        text = jax.jit(row_sums(method, "gpu"), static_argnums=2).lower(dx_ND, ids_N, 10).as_text()
        return [line for line in text.splitlines() if "stablehlo.scatter" in line]

    assert len(scatters("scatter")) == 1
    assert "unique_indices = false" in scatters("scatter")[0]
    assert len(scatters("deterministic")) == 1
    assert "unique_indices = true" in scatters("deterministic")[0]


def test_an_id_outside_the_table_cannot_pass_unseen() -> None:
    E_VD, outside = jnp.ones((5, 4)), jnp.array([[5, -1, 2]])
    x_BTD = lookup(E_VD, outside, jnp.float32)
    np.testing.assert_array_equal(np.isnan(x_BTD).all(-1), [[True, True, False]])
    for method in METHODS:
        rows = lambda E, method=method: lookup(E, outside, jnp.float32, gradient=method)
        (dE_VD,) = jax.vjp(rows, E_VD)[1](jnp.ones_like(x_BTD))
        np.testing.assert_array_equal(dE_VD.sum(-1), [0, 0, 4, 0, 0])


def test_on_every_mesh_it_is_the_lookup_of_one_device() -> None:
    out, _ = finish(start([TESTS / "layout_program.py"], devices=8), seconds=280)
    found = json.loads(out)
    assert len(found["lookup"]) == len(METHODS) * len(MESHES)
    assert max(found["lookup"].values()) < 1e-5
    assert len(found["attention"]) == 4
    assert max(found["attention"].values()) < 1e-5


@pytest.mark.parametrize(("dtype", "V"), [("uint8", 256), ("int8", 128), ("uint16", 65_536)])
def test_ids_may_be_of_a_type_that_does_not_hold_the_number_of_rows(dtype: str, V: int) -> None:
    E_VD = jnp.arange(2.0 * V).reshape(V, 2)
    tokens_BT = np.array([[1, 2, V - 1]], dtype)
    np.testing.assert_array_equal(lookup(E_VD, tokens_BT, jnp.float32)[0], np.asarray(E_VD)[[1, 2, V - 1]])
    h_BTD, weights_BT = jnp.ones((1, 3, 2)), jnp.ones((1, 3))
    narrow, wide = (cross_entropy(h_BTD, E_VD / V, ids, weights_BT) for ids in (tokens_BT, tokens_BT.astype(np.int32)))
    assert np.isfinite(wide[0])
    np.testing.assert_array_equal(narrow, wide)


def test_a_method_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"^gradient: must be auto, scatter, sorted or deterministic, got 'sort'$"):
        row_sums("sort", "cpu")


def test_a_mesh_of_other_axes_is_refused() -> None:
    with pytest.raises(UserError, match=r"^mesh: must have the axes data, fsdp, tensor, got x$"):
        Layout(jax.make_mesh((1,), ("x",)))
