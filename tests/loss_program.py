"""Run by test_loss.py on 8 fake devices: the fused loss on meshes against the definition, and its collectives."""

from __future__ import annotations

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tiedjax import loss
from tiedjax.config import MeshConfig
from tiedjax.loss import cross_entropy
from tiedjax.sharding import Layout, make_mesh, partition_spec

MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)]
B, T, V, D = 16, 6, 56, 16


def inputs() -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    targets_BT = rng.integers(0, V, (B, T))
    targets_BT[3, 2] = targets_BT[9] = -1  # a position and a whole sequence to ignore
    return rng.standard_normal((B, T, D)), rng.standard_normal((V, D)), targets_BT, rng.random((B, T))


def plain(
    h_BTD: Any,
    U_VD: Any,
    targets_BT: Any,
    weights_BT: Any,
    z_loss: float,
    soft_cap: float | None,
    bias_V: Any = 0.0,
) -> Any:
    """The definition, left to automatic differentiation."""
    logits_BTV = jnp.einsum("btd,vd->btv", h_BTD, U_VD)
    if soft_cap is not None:
        logits_BTV = soft_cap * jnp.tanh(logits_BTV / soft_cap)
    logits_BTV += jnp.broadcast_to(bias_V, logits_BTV.shape)
    log_sum_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    one_hot_BTV = jax.nn.one_hot(targets_BT, V, dtype=logits_BTV.dtype)
    loss_BT = log_sum_BT - (logits_BTV * one_hot_BTV).sum(-1) + z_loss * log_sum_BT**2
    return jnp.sum(jnp.where(targets_BT >= 0, weights_BT * loss_BT, 0))


def powers(h_CD: Any, U_VD: Any, shift_C: Any, ids_C: Any, tensor: Any) -> Any:
    """What the kernel for Hopper GPUs computes, by its definition."""
    logit_CV = jnp.matmul(h_CD, U_VD.T, preferred_element_type=shift_C.dtype)
    most_C = logit_CV.max(axis=-1)
    most_C = jax.lax.pmax(most_C, tensor) if tensor else most_C
    shift_C = jnp.where(most_C - shift_C > 75, most_C, shift_C)
    power_CV = jnp.exp(logit_CV - shift_C[:, None])
    power_CV = jnp.where(ids_C[:, None] == jnp.arange(len(U_VD))[None], 0, power_CV)
    return power_CV.astype(h_CD.dtype), power_CV.sum(axis=-1), shift_C


def fused(layout: Layout, chunk: int | None, **options: Any) -> Any:
    """(h, U, targets, weights) -> (loss, its two gradients), compiled on the layout's mesh."""

    def total(h_BTD: Any, U_VD: Any, targets_BT: Any, weights_BT: Any) -> Any:
        return cross_entropy(h_BTD, U_VD, targets_BT, weights_BT, chunk=chunk, layout=layout, **options)[0]

    place = lambda *axes: jax.NamedSharding(layout.mesh, partition_spec(axes))
    states, table, tokens = place("batch", None, None), place("vocab", "embed"), place("batch", None)
    return jax.jit(
        jax.value_and_grad(total, argnums=(0, 1)),
        in_shardings=(states, table, tokens, tokens),
        out_shardings=(place(), (states, table)),
    )


def worst(found: Any, wanted: Any) -> float:
    """The largest difference of any of the three, relative to the largest value of each."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(np.abs(np.asarray(a) - b).max() / np.abs(b).max()) for a, b in pairs)


def agreement(dtype: Any) -> dict[str, float]:
    h_BTD, U_VD, targets_BT, weights_BT = inputs()
    found = {}
    for z_loss, soft_cap in [(0.0, None), (0.1, 2.0)]:
        oracle = jax.value_and_grad(plain, argnums=(0, 1))
        wanted = jax.tree.map(np.asarray, oracle(h_BTD, U_VD, targets_BT, weights_BT, z_loss, soft_cap))
        for shape in MESHES:
            layout = Layout(make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2])))
            for chunk in (5, None):
                run = fused(layout, chunk, z_loss=z_loss, soft_cap=soft_cap)
                got = run(h_BTD.astype(dtype), U_VD.astype(dtype), targets_BT, weights_BT)
                found[f"{shape} chunk {chunk} z {z_loss} cap {soft_cap}"] = worst(got, wanted)
    return found


def agreement_of_powers(dtype: Any) -> dict[str, float]:
    """The same in the form that Hopper GPUs are given, with states so long that some sums need another shift."""
    h_BTD, U_VD, targets_BT, weights_BT = inputs()
    h_BTD *= np.where(np.arange(T) % 2, 1, 30)[:, None]
    wanted = jax.value_and_grad(plain, argnums=(0, 1))(h_BTD, U_VD, targets_BT, weights_BT, 0.1, None)
    found, loss.kernel_for = {}, lambda *_: powers
    for shape in MESHES:
        layout = Layout(make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2])))
        got = fused(layout, 5, z_loss=0.1)(h_BTD.astype(dtype), U_VD.astype(dtype), targets_BT, weights_BT)
        found[str(shape)] = worst(got, wanted)
    return found


def agreement_of_bias(dtype: Any) -> dict[str, float]:
    """With a bias, and its gradient too: rows, bias and its gradient are cut over `tensor` alike."""
    arrays, bias_V = inputs(), np.random.default_rng(1).standard_normal(V)
    found, place = {}, lambda layout, *axes: jax.NamedSharding(layout.mesh, partition_spec(axes))
    for z_loss, soft_cap in [(0.0, None), (0.1, 2.0)]:
        options = {"z_loss": z_loss, "soft_cap": soft_cap}
        definition = lambda h, U, bias, options=options: plain(h, U, *arrays[2:], **options, bias_V=bias)
        wanted = jax.value_and_grad(definition, argnums=(0, 1, 2))(*arrays[:2], bias_V)
        for shape in MESHES:
            layout = Layout(make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2])))

            def total(h_BTD: Any, U_VD: Any, bias_V: Any, layout: Layout = layout, options: Any = options) -> Any:
                return cross_entropy(h_BTD, U_VD, *arrays[2:], bias_V=bias_V, chunk=5, layout=layout, **options)[0]

            states, table = place(layout, "batch", None, None), place(layout, "vocab", "embed")
            run = jax.jit(
                jax.value_and_grad(total, argnums=(0, 1, 2)), in_shardings=(states, table, place(layout, "vocab"))
            )
            got = run(*(array.astype(dtype) for array in (*arrays[:2], bias_V)))
            found[f"{shape} z {z_loss} cap {soft_cap}"] = worst(got, wanted)
    return found


COLLECTIVE = re.compile(r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(")


def collectives(shape: tuple[int, int, int]) -> dict[str, Any]:
    """By computation of the compiled program, its collectives: (kind, numbers in the result); and the loops' bodies."""
    layout = Layout(make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2])))
    h_BTD, U_VD, targets_BT, weights_BT = inputs()
    arrays = (h_BTD.astype(np.float32), U_VD.astype(np.float32), targets_BT, weights_BT.astype(np.float32))
    text = fused(layout, 5).lower(*arrays).compile().as_text()
    found: dict[str, list[tuple[str, int]]] = {}
    name = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = line.split()[1 if line.startswith("ENTRY") else 0].lstrip("%")
        elif match := COLLECTIVE.search(line):
            for sizes in re.findall(r"\w+\[([\d,]*)\]", match[1]):
                size = int(np.prod([int(n) for n in sizes.split(",") if n], initial=1))
                found.setdefault(name, []).append((match[2], size))
    return {"found": found, "loops": re.findall(r"body=%?([\w.\-]+)", text)}


if __name__ == "__main__":
    results: dict[str, Any] = {"float32": agreement(np.float32)}
    results["collectives"] = {str(shape): collectives(shape) for shape in MESHES}
    with jax.enable_x64(True):
        results["float64"] = agreement(np.float64)
        results["bias"] = agreement_of_bias(np.float64)
        results["powers"] = agreement_of_powers(np.float64)
    print(json.dumps(results))
