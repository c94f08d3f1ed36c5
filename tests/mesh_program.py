"""Run by test_sharding.py on 8 fake devices: losses, gradients and steps on meshes against those of one device."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from conftest import random_tokens, small_config
from loss_program import inputs

from tiedjax import gradients, sharding, step, tying
from tiedjax.config import BodyOptimizerConfig, DataConfig, MeshConfig, OptimizerConfig, RegularisersConfig, RunConfig
from tiedjax.cost import hlo
from tiedjax.loss import cross_entropy
from tiedjax.muon import MuonState, scale_by_muon


@functools.cache
def gradients_on(cfg: RunConfig, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Loss, every gradient, what the taps observe and every parameter after two steps, by path."""
    mesh = sharding.make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    steps = step.make_steps(cfg, mesh)

    rows = tying.unshared_rows(cfg.tying, cfg.model, np.arange(cfg.model.table_rows))
    state = steps.init(jax.random.key(0), None, rows)
    check_sharded(cfg, state, mesh)
    scale = tying.role_scale(cfg.tying)
    gates = [tying.rare_gate(cfg, np.arange(cfg.model.table_rows))] if cfg.tying.rare_gate else []
    tokens = [jax.device_put(random_tokens(cfg, i), steps.batch) for i in range(2)]
    compute = jax.jit(gradients.loss_and_gradients(cfg, sharding.Layout(mesh)))
    found: dict[str, Any] = {"gradients": compute(state.params, tokens[0], scale, *gates)}
    for each in tokens:
        state, metrics = steps.train(state, each, scale, jnp.zeros(cfg.model.table_rows, jnp.int32), *gates)
    named = ("loss", "activation_grad_norm", "regulariser", "regulariser_grad_norm")
    logged = [name for name in metrics if name in named or name.startswith("m_")]
    found |= {"params": state.params, **{name: metrics[name] for name in logged}}
    found |= {"account": (state.account.written, state.account.regulariser)} if state.account else {}
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(found)}


def check_sharded(cfg: RunConfig, state: step.TrainState, mesh: jax.sharding.Mesh) -> None:
    """Every matrix, its moments and the account must really be cut over fsdp and tensor, check rows over fsdp, and what
    a scheme has beside tables as it declares."""
    check_rows = ("role_mu.output", ".account.initial['shared']", ".account.written['shared'].output")
    beside = {p.name: p.axes for p in tying.scheme_of(cfg.tying).parameters if p.axes != ("vocab", "embed")}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if leaf.ndim == 2:
            rows_alone = jax.tree_util.keystr(path).endswith(check_rows)
            cut = mesh.shape["fsdp"] * (1 if rows_alone else mesh.shape["tensor"])
            for name, axes in beside.items():
                if f"['{name}']" in jax.tree_util.keystr(path):
                    mesh_axes = [axis for each in axes if each for axis in sharding.RULES[each]]
                    cut = math.prod(mesh.shape[axis] for axis in mesh_axes)
            held = leaf.addressable_shards[0].data.size
            assert held * cut == leaf.size, f"{jax.tree_util.keystr(path)} is not cut into {cut}"


def largest_difference(cfg: RunConfig, shape: tuple[int, int, int]) -> float:
    one, many = gradients_on(cfg, (1, 1, 1)), gradients_on(cfg, shape)
    assert one.keys() == many.keys()
    return max(difference(name, one[name], many[name]) for name in one)


def difference(name: str, one: np.ndarray, many: np.ndarray) -> float:
    """The largest; of what the roles wrote that of all numbers but the largest hundredth, and of M a 2000th of it
    over M's size: where two gradients cancel, Adam divides both by a root of nearly 0, and rounding grows with them."""
    if "account" in name:
        return float(np.quantile(np.abs(one - many), 0.99))
    if "['m_" in name:
        return float(np.abs(one - many) / np.abs(one)) / 10_000
    return float(np.abs(one - many).max())


def of_scheme(scheme: str) -> dict[str, float]:
    cfg, results = small_config(scheme, layers=1), {}
    for shape in [(8, 1, 1), (1, 8, 1), (2, 2, 2)] if scheme in ("tied", "untied") else [(1, 4, 2)]:
        results[str(shape)] = largest_difference(cfg, shape)
    if scheme not in ("tied", "untied"):  # what a mesh does to the body, theirs have shown
        return results
    cut = dataclasses.replace(cfg, data=DataConfig(batch_size=8, microbatches=2))
    results["2 microbatches (2, 2, 1)"] = largest_difference(cut, (2, 2, 1))
    scanned = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, scan_layers=True, remat="full"))
    results["scanned (1, 4, 2)"] = largest_difference(scanned, (1, 4, 2))
    return results


def of_muon() -> dict[str, float]:
    """With fewer layers than devices, which must be cut all the same."""
    orthogonal = BodyOptimizerConfig(kind="muon", learning_rate=0.02)
    cfg = small_config(layers=3, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, body=orthogonal))
    results = {str(shape): largest_difference(cfg, shape) for shape in [(8, 1, 1), (1, 8, 1), (2, 2, 2)]}
    scanned = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, scan_layers=True))
    return results | {"scanned (1, 8, 1)": largest_difference(scanned, (1, 8, 1))}


def of_regularisers() -> dict[str, float]:
    """Of tables with rows that no token has: sums over rows that lie on several devices."""
    weights = RegularisersConfig(cosine=0.7, orthogonality=30.0, mean=4.0, anchor=0.3)
    results = {}
    for scheme in ("tied", "untied"):
        cfg = small_config(scheme, layers=1, vocab_size=30, vocab_multiple=8)
        cfg = dataclasses.replace(cfg, regularisers=weights)
        for shape in [(1, 4, 2), (2, 2, 2)]:
            results[f"{scheme} {shape}"] = largest_difference(cfg, shape)
    return results


def of_gate() -> dict[str, float]:
    """With a quarter of the tokens rare: some devices have rare rows, others have none."""
    results = {}
    for scheme, parts in (("tied", 1), ("untied", 2)):
        cfg = small_config(scheme, layers=1, data=DataConfig(batch_size=8, microbatches=parts))
        cfg = dataclasses.replace(cfg, tying=dataclasses.replace(cfg.tying, rare_gate=1.0))
        for shape in [(1, 2, 2), (2, 2, 2) if parts == 1 else (4, 1, 2)]:
            results[f"{scheme} {shape}"] = largest_difference(cfg, shape)
    one, many = (pushed(shape) for shape in [(1, 1, 1), (2, 2, 2)])
    assert len(many) == 8, "devices that have it"
    return results | {f"push {i}": float(np.abs(part - one[0]).max()) for i, part in enumerate(many)}


def pushed(shape: tuple[int, int, int]) -> list[np.ndarray]:
    """What each device has of the push on four rows, which are on both halves of the table."""
    layout = sharding.Layout(sharding.make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2])))
    h_BTD, U_VD, targets_BT, weights_BT = inputs()
    rare_R = jnp.array([0, 7, 30, 55], jnp.int32)

    def total(push_RD: jax.Array) -> jax.Array:
        rare: dict[str, jax.Array] = {"rare_R": rare_R, "push_RD": push_RD}
        return cross_entropy(jnp.asarray(h_BTD), jnp.asarray(U_VD), targets_BT, weights_BT, layout=layout, **rare)[0]

    push_RD = jax.jit(jax.grad(total), out_shardings=sharding.replicated(layout.mesh))(jnp.zeros((4, h_BTD.shape[-1])))
    return [np.asarray(shard.data) for shard in push_RD.addressable_shards]


def of_anatomy() -> dict[str, float]:
    """What `observe` says of a start, and its loss, relative to one device; with an output bias."""
    cfg = small_config(layers=1, output_bias="unigram", data=DataConfig(batch_size=16, microbatches=2))

    def observed(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
        steps = step.make_steps(cfg, sharding.make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2])))
        bias_V = np.linspace(-3, 0, cfg.model.table_rows, dtype=np.float32)
        params = steps.init(jax.random.key(0)).params
        params["output_bias"] = jax.device_put(bias_V, params["output_bias"].sharding)
        assert params["output_bias"].addressable_shards[0].data.size * shape[2] == bias_V.size
        loss, _ = steps.evaluate(params, random_tokens(cfg), np.ones(cfg.data.batch_size, np.float32))
        return dict(jax.device_get({"loss": loss, **steps.observe(params, random_tokens(cfg), params["body"])}))

    one, results = observed((1, 1, 1)), {}
    for shape in [(8, 1, 1), (1, 8, 1), (2, 2, 2)]:
        many = observed(shape)
        assert len(one) == len(many) == 8
        results[str(shape)] = max(float(abs(many[name] / one[name] - 1)) for name in one)
    return results


def sent_by_muon() -> dict[str, tuple[int, int]]:
    """Of the update of 8 layers' matrices [16, 24], cut along their inputs: collectives by kind, and bytes a device."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))
    cut, everywhere = jax.NamedSharding(mesh, jax.P(None, "fsdp")), sharding.replicated(mesh)
    x_LIO = jax.ShapeDtypeStruct((8, 16, 24), jnp.float32, sharding=cut)
    state = MuonState(jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere), x_LIO)
    update = jax.jit(scale_by_muon(sharding.Layout(mesh), None).update, out_shardings=(cut, MuonState(everywhere, cut)))
    kinds = hlo.collectives(update.lower(x_LIO, state).compile().as_text(), None).kinds
    return {kind: (traffic.count, traffic.bytes) for kind, traffic in kinds.items()}


if __name__ == "__main__":
    subjects = {
        "muon": of_muon,
        "regularised": of_regularisers,
        "gated": of_gate,
        "anatomy": of_anatomy,
        "sent by muon": sent_by_muon,
    }
    print(json.dumps(subjects[sys.argv[1]]() if sys.argv[1] in subjects else of_scheme(sys.argv[1])))
