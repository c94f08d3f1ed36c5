"""Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982) on a mesh.

The momentum M of a matrix [I, O] becomes U V^T of its singular value decomposition, nearly: five Newton-Schulz
iterations leave singular values between about 0.7 and 1.2. They need whole matrices, and a third to a half of a step's
products if every device does all of them. So the like matrices of all layers are put in one stack [L, I, O], which is
cut along L where parameters are cut along I or O: every device orthogonalises some layers whole. Where fsdp alone cuts
them no more is sent than what lies on a device, in the dtype of the products, there and back; where fsdp and tensor
both do, XLA gathers each stack.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tiedjax.config import ModelConfig
from tiedjax.flops import layer_matrices
from tiedjax.sharding import ONE_DEVICE, Layout
from tiedjax.table_rules import selected

MOMENTUM = 0.95
ITERATIONS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that rises fastest at 0 (Jordan 2024)
_EPS = 1e-8


class MuonState(NamedTuple):
    """Updates done, and the momentum of every matrix."""

    updates: jax.Array
    mu: Any


def scale_by_muon(layout: Layout, dtype: str | None) -> optax.GradientTransformationExtraArgs:
    """Orthogonalised Nesterov momentum of matrices [I, O] or stacks of layers [L, I, O], times sqrt(max(1, O / I)).

    Momentum is kept in `dtype` between updates (None: that of the parameters). The same as
    `optax.contrib.scale_by_muon` followed by its scaling by shape: averages are corrected for their start. Where an
    update is not `made`, the state stays.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(lambda p: jnp.zeros_like(p, dtype), params))

    def update(grads: Any, state: MuonState, params: Any = None, *, made: Any = True, **_: Any) -> Any:
        mu = jax.tree.map(
            lambda m, g: optax.tree.update_moment(g, m.astype(g.dtype), MOMENTUM, 1).astype(m.dtype), state.mu, grads
        )
        count, mu = selected(made, MuonState(optax.safe_increment(state.updates), mu), state)
        ahead = optax.tree.bias_correction(mu, MOMENTUM, count + 1)
        now = optax.tree.bias_correction(grads, MOMENTUM, count)
        mixed = jax.tree.map(lambda m, g: MOMENTUM * m.astype(g.dtype) + (1 - MOMENTUM) * g, ahead, now)
        return _by_stacks(mixed, layout), MuonState(count, mu)

    return optax.GradientTransformationExtraArgs(init, update)


def orthogonalized(x_LIO: jax.Array, layout: Layout = ONE_DEVICE) -> jax.Array:
    """Newton-Schulz on the last two axes: the nearest matrix with singular values of about 1.

    Accelerators are given bfloat16, as Jordan does: the iterations settle at about 1, and need not be exact.
    """
    a, b, c = _COEFFICIENTS
    if layout.platform != "cpu":
        x_LIO = x_LIO.astype(jnp.bfloat16)
    # Sent once here, and once back below. Left to choose, XLA sends several of the arrays that this is made of, or that
    # are made of it, and in float32.
    whole = ("whole_layers", None, None)
    x_LIO = layout.constrain(layout.uncut(x_LIO, 0), whole)
    wide_LIO = x_LIO.astype(jnp.promote_types(x_LIO.dtype, jnp.float32))
    norm_L11 = jnp.linalg.norm(wide_LIO, axis=(-2, -1), keepdims=True)
    x_LIO = (wide_LIO / (norm_L11 + _EPS)).astype(x_LIO.dtype)
    turned = x_LIO.shape[-2] > x_LIO.shape[-1]  # the Gram matrix of the shorter side is the smaller one
    x: jax.Array = x_LIO.swapaxes(-1, -2) if turned else x_LIO
    for _ in range(ITERATIONS):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return layout.uncut(layout.constrain(x.swapaxes(-1, -2) if turned else x, whole), 0)


def flops(inputs: int, outputs: int) -> int:
    """Floating-point operations of the iterations on one matrix: three products of each, two with the Gram matrix."""
    short, long = sorted((inputs, outputs))
    return ITERATIONS * (2 * short**2 * long + 2 * short**3 + 2 * short**2 * long)


def step_flops(cfg: ModelConfig) -> int:
    """Those of the iterations on every matrix of the body, once a step."""
    return cfg.layers * sum(flops(inputs, outputs) for inputs, outputs in layer_matrices(cfg))


def _by_stacks(tree: Any, layout: Layout) -> Any:
    """`orthogonalized` of every leaf, scaled by shape; those whose paths differ in the layer's number are one stack."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    places = dict[str, list[int]]()
    for place, (path, _) in enumerate(leaves):
        places.setdefault(re.sub(r"layer_\d+", "layer", jax.tree_util.keystr(path)), []).append(place)
    directions = dict[int, jax.Array]()
    for alike in places.values():
        matrices = [leaves[place][1] for place in alike]
        scanned = matrices[0].ndim == 3
        x_LIO = matrices[0] if scanned else jnp.stack(matrices)
        inputs, outputs = x_LIO.shape[-2:]
        x_LIO = orthogonalized(x_LIO, layout).astype(x_LIO.dtype) * max(1, outputs / inputs) ** 0.5
        directions |= {alike[0]: x_LIO} if scanned else dict(zip(alike, x_LIO, strict=True))
    return jax.tree.unflatten(structure, [directions[place] for place in range(len(leaves))])
