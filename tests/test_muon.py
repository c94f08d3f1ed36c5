"""Muon as optax has it, and against NumPy in float64; and how near to orthogonal its updates are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import STEPS, arguments, assert_same_run, saved_state

from tiedjax import cli, muon, sharding
from tiedjax.config import BodyOptimizerConfig, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from tiedjax.cost import bench
from tiedjax.flops import flops_per_token
from tiedjax.muon import orthogonalized, scale_by_muon
from tiedjax.optimizer import part_of
from tiedjax.sharding import ONE_DEVICE, Layout
from tiedjax.step import make_steps

SHAPES = {"wide": (12, 40), "tall": (40, 12), "square": (16, 16)}


def gradients(count: int, scanned: bool) -> list[dict[str, Any]]:
    """Of three matrices in each of 3 layers, stacked if `scanned`; from update to update of a tenth of the size."""
    rng, trees = np.random.default_rng(0), []
    for i in range(count):
        stacks = {
            name: {"kernel": (10.0**-i * rng.standard_normal((3, *shape))).astype("f")}
            for name, shape in SHAPES.items()
        }
        unrolled = {f"layer_{i}": jax.tree.map(lambda x_LIO, i=i: x_LIO[i], stacks) for i in range(3)}
        trees.append({"layers": stacks} if scanned else unrolled)
    return trees


def last_update(transformation: Any, trees: list[dict[str, Any]]) -> Any:
    state, updates = transformation.init(trees[0]), None
    for tree in trees:
        updates, state = transformation.update(jax.tree.map(jnp.asarray, tree), state, trees[0])
    return updates


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("updates", [1, 2, 5])
def test_updates_are_those_of_optax(updates: int, scanned: bool) -> None:
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    theirs = optax.contrib.muon(1.0, muon_weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: axes, tree))
    trees = gradients(updates, scanned)
    descents = last_update(theirs, trees)
    jax.tree.map(
        lambda update, descent: np.testing.assert_allclose(update, -descent, rtol=0, atol=1e-5),
        last_update(scale_by_muon(ONE_DEVICE, None), trees),
        descents,
    )


def test_an_update_is_that_of_the_formulas_in_float64() -> None:
    trees = gradients(4, scanned=True)
    for name, update in last_update(scale_by_muon(ONE_DEVICE, None), trees)["layers"].items():
        update = update["kernel"]
        mean = np.zeros(update.shape)
        for t, tree in enumerate(trees, 1):
            g = tree["layers"][name]["kernel"].astype(np.float64)
            mean = 0.95 * mean + 0.05 * g
            ahead = 0.95 * mean / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
        for layer, x in enumerate(ahead):
            x = x / np.sqrt((x**2).sum())
            for _ in range(5):
                x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
            x *= max(1.0, x.shape[1] / x.shape[0]) ** 0.5
            np.testing.assert_allclose(update[layer], x, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_singular_vectors_stay_and_singular_values_become_about_one(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.standard_normal((side, min(shape))))[0] for side in shape)
    x_IO = left * np.geomspace(1, 0.02, min(shape)) @ right.T
    inside = left.T @ np.asarray(orthogonalized(jnp.asarray(x_IO, jnp.float32))) @ right
    values = np.diag(inside)
    assert 0.3 < values.min() < values.max() < 1.3
    np.testing.assert_allclose(inside - np.diag(values), 0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_accelerators_multiply_in_bfloat16_near_enough(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    x_LIO = jnp.asarray(np.random.default_rng(2).standard_normal((3, *shape)), jnp.float32)
    exact = orthogonalized(x_LIO)
    monkeypatch.setattr(Layout, "platform", "gpu")
    rounded = orthogonalized(x_LIO)
    assert (exact.dtype, rounded.dtype) == (jnp.float32, jnp.bfloat16)
    assert float(jnp.linalg.norm(rounded.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)) < 0.06


def test_momentum_is_kept_in_the_dtype_that_is_asked_for() -> None:
    trees = gradients(3, scanned=True)
    state = jax.eval_shape(scale_by_muon(ONE_DEVICE, "bfloat16").init, trees[0])
    assert {leaf.dtype for leaf in jax.tree.leaves(state.mu)} == {jnp.dtype("bfloat16")}
    full, half = (last_update(scale_by_muon(ONE_DEVICE, dtype), trees)["layers"] for dtype in (None, "bfloat16"))
    for name in SHAPES:
        x, y = full[name]["kernel"], half[name]["kernel"]
        assert y.dtype == jnp.float32
        cosine = np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y)
        assert 0.99 < cosine < 1 - 1e-7


def test_a_run_that_is_continued_is_the_same_run(text: Path, tmp_path: Path) -> None:
    changes = {"optimizer.body.kind": "muon", "model.norm": "layernorm", "tying.scheme": "untied", "model.layers": 2}
    changes |= {"optimizer.body.learning_rate": "0.02", "optimizer.tables.input.b2": "0.99"}
    assert cli.main(arguments(tmp_path / "whole", text, changes)) == 0
    for stop in ({"train.stop_at": 4}, {}):
        assert cli.main(arguments(tmp_path / "parts", text, changes | stop)) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    momenta = [name for name in saved_state(tmp_path / "whole", STEPS) if "/mu/" in name and "kernel" in name]
    assert len(momenta) == 2 * 7


# ---- What it costs ----


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
def test_flops_are_those_of_the_products_that_it_makes(shape: tuple[int, int]) -> None:
    jaxpr = jax.make_jaxpr(lambda x: orthogonalized(x))(jnp.ones((1, *shape)))
    products = [equation for equation in jaxpr.jaxpr.eqns if equation.primitive.name == "dot_general"]
    counted = 0
    for product in products:
        ((contracted,), _), _ = product.params["dimension_numbers"]
        left, result = product.invars[0].aval.shape, product.outvars[0].aval.shape
        counted += 2 * left[contracted] * int(np.prod(result))
    assert muon.flops(*shape) == counted > 0


@pytest.mark.parametrize("changes", [{}, {"mlp": "gelu", "kv_heads": 2}, {"scan_layers": True}])
def test_the_flops_of_a_step_are_over_all_matrices_of_the_body(changes: dict[str, Any]) -> None:
    """Those that the model declares; with keys and values of half the width in one case."""
    model = ModelConfig(layers=2, d_model=8, heads=4, d_ff=12, seq_len=4, vocab_size=16, **changes)
    cfg = RunConfig(model=model, optimizer=OptimizerConfig(body=BodyOptimizerConfig(kind="muon")))
    steps = make_steps(cfg, sharding.make_mesh(cfg.mesh, jax.devices()[:1]))
    leaves = jax.tree_util.tree_leaves_with_path(steps.abstract.params)
    shapes = [leaf.shape for path, leaf in leaves if part_of(path) == "matrices"]
    matrices = [shape[-2:] for shape in shapes for _ in range(shape[0] if model.scan_layers else 1)]
    assert len(matrices) == 2 * (6 if changes.get("mlp") else 7)
    assert muon.step_flops(model) == sum(muon.flops(*shape) for shape in matrices)


def test_the_share_of_muon_is_over_the_model() -> None:
    model = ModelConfig(layers=2, d_model=8, heads=2, d_ff=12, seq_len=4, vocab_size=16)
    optimizer = OptimizerConfig(body=BodyOptimizerConfig(kind="muon"))
    of_muon = 2 * (4 * muon.flops(8, 8) + 3 * muon.flops(8, 12))
    of_model = 3 * 4 * flops_per_token(model, causal=True)
    cfg = RunConfig(model=model, optimizer=optimizer, data=DataConfig(batch_size=3))
    assert bench.muon_over_model(cfg) == pytest.approx(of_muon / of_model)
    assert bench.muon_over_model(RunConfig(model=model)) == 0
