"""The same training in plain JAX, by hand, for a CPU: a floor under the time of our step.

One table, whose gradient autodiff adds up: no roles, no account, no metrics but the loss; AdamW without a library.
Norms and the MLP have derivatives by hand, queries and keys are rotated and turned together, gate and up are one
product. Of ours are the loss and the attention, whose derivatives are by hand as they are.

Axes: B batch, T position, N = B T, D width, H heads, K head width, F of the MLP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tiedjax.attention import PLAIN, _softmax_attention
from tiedjax.config import ModelConfig, RunConfig
from tiedjax.cost import bench
from tiedjax.loss import cross_entropy
from tiedjax.model import rotate
from tiedjax.optimizer import learning_rate
from tiedjax.rope import rotation
from tiedjax.step import Steps

EPS = 1e-5  # of OLMo's norm (arXiv 2402.00838)
PER_LAYER = 4  # matrices: of queries, keys and values; of what attention gives; of up and gate; of what goes down


@jax.custom_vjp
def norm(x: jax.Array) -> jax.Array:
    """LayerNorm without parameters over the last axis."""
    return _norm_forward(x)[0]


def _norm_forward(x: jax.Array) -> tuple[jax.Array, Any]:
    y = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPS)
    return y * scale, (y * scale, scale)


def _norm_backward(residuals: Any, dy: jax.Array) -> tuple[jax.Array]:
    y, scale = residuals
    return (scale * (dy - dy.mean(-1, keepdims=True) - y * (dy * y).mean(-1, keepdims=True)),)


norm.defvjp(_norm_forward, _norm_backward)


@jax.custom_vjp
def swiglu(x_N2F: jax.Array) -> jax.Array:
    """Up times SiLU of gate, [N, F], of [N, 2 F]."""
    up, gate = jnp.split(x_N2F, 2, axis=1)
    return up * jax.nn.silu(gate)


def _swiglu_backward(x_N2F: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    up, gate = jnp.split(x_N2F, 2, axis=1)
    share = jax.nn.sigmoid(gate)
    return (jnp.concatenate([dy * share * gate, dy * share * up * (1 + gate * (1 - share))], axis=1),)


swiglu.defvjp(lambda x_N2F: (swiglu(x_N2F), x_N2F), _swiglu_backward)


def hidden(m: ModelConfig, table_VD: jax.Array, matrices: Sequence[jax.Array], tokens_BT: jax.Array) -> jax.Array:
    """What the table's output role reads, [B, T, D]."""
    (B, T), D, H, K = tokens_BT.shape, m.d_model, m.heads, m.key_width
    angles = rotation(m, T, windowed=False)
    x_ND = table_VD[tokens_BT].reshape(-1, D)
    for first in range(0, len(matrices), PER_LAYER):
        qkv, out, wide, down = matrices[first : first + PER_LAYER]
        parts_ND = norm(x_ND) @ qkv
        both_BHTK = rotate(parts_ND[:, : 2 * D].reshape(B, T, 2 * H, K), angles).swapaxes(1, 2)
        v_BHTK = parts_ND[:, 2 * D :].reshape(B, T, H, K).swapaxes(1, 2)
        y_BHTK = _softmax_attention(both_BHTK[:, :H] * K**-0.5, both_BHTK[:, H:], v_BHTK, PLAIN)
        x_ND += y_BHTK.swapaxes(1, 2).reshape(-1, D) @ out
        x_ND += swiglu(norm(x_ND) @ wide) @ down
    return norm(x_ND).reshape(B, T, D)


def make_train(cfg: RunConfig) -> Callable[[Any, jax.Array], tuple[Any, jax.Array]]:
    """((parameters, both moments, steps done), tokens [B, T + 1]) -> (the same after a step, the loss before it)."""
    opt, rate = cfg.optimizer, learning_rate(cfg.optimizer, cfg.train.steps)

    def loss(params: Any, tokens_BS: jax.Array) -> jax.Array:
        h_BTD = hidden(cfg.model, *params, tokens_BS[:, :-1])
        ones_BT = jnp.ones(h_BTD.shape[:2])
        total, weight = cross_entropy(h_BTD, params[0], tokens_BS[:, 1:], ones_BT, z_loss=cfg.train.z_loss)
        return total / weight

    def train(state: Any, tokens_BS: jax.Array) -> tuple[Any, jax.Array]:
        params, mu, nu, done = state
        value, grads = jax.value_and_grad(loss)(params, tokens_BS)
        clip = jnp.minimum(1.0, opt.clip_norm / jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads))))
        mu = jax.tree.map(lambda m, g: opt.b1 * m + (1 - opt.b1) * clip * g, mu, grads)
        nu = jax.tree.map(lambda n, g: opt.b2 * n + (1 - opt.b2) * jnp.square(clip * g), nu, grads)
        step_size, first, second = rate(done), 1 - opt.b1 ** (done + 1), 1 - opt.b2 ** (done + 1)
        moved = lambda p, m, n: p - step_size * (m / first / (jnp.sqrt(n / second) + opt.eps) + opt.weight_decay * p)
        return (jax.tree.map(moved, params, mu, nu), mu, nu, done + 1), value

    return train


class Stepper:
    """That train step with its state and batches, run as `tiedjax.cost.bench.Stepper` is.

    ValueError on other than CPUs, and for a config of another model than OLMo's, of a scheme other than tied, with
    microbatches or without clipping.
    """

    def __init__(self, cfg: RunConfig, steps: Steps):
        if jax.default_backend() != "cpu":
            raise ValueError("by hand there is only a step for CPUs")
        m, body = cfg.model, bench.start(cfg, steps).params
        wanted = {"norm": "nonparametric_layernorm", "norm_eps": EPS, "mlp": "swiglu", "position": "rope"}
        wanted |= {"qk_norm": "none", "groups": m.heads, "key_width": m.d_model // m.heads}
        same = all(getattr(m, name) == value for name, value in wanted.items())
        if not same or (cfg.tying.scheme, cfg.data.microbatches) != ("tied", 1) or cfg.optimizer.clip_norm is None:
            raise ValueError("by hand there is only OLMo, tied, with clipped gradients and whole batches")
        params = jax.device_get((next(iter(body["tables"].values())), matrices(body["body"]["params"])))
        state = jax.tree.map(jnp.asarray, (params, *2 * [jax.tree.map(np.zeros_like, params)], np.int32(0)))
        self._state, self._losses = state, list[jax.Array]()
        self._batches = [jnp.asarray(tokens) for tokens in bench.zipf_tokens(cfg, bench.BATCHES)]
        with jax.default_matmul_precision("highest"):
            self.compiled = jax.jit(make_train(cfg), donate_argnums=0).lower(state, self._batches[0]).compile()

    def run(self, steps: int) -> float:
        """Dispatches this many steps, waits for the last, and returns the seconds of all."""
        jax.block_until_ready(self._state)
        began = time.perf_counter()
        for _ in range(steps):
            tokens_BS = self._batches[len(self._losses) % len(self._batches)]
            self._state, loss = self.compiled(self._state, tokens_BS)
            self._losses.append(loss)
        jax.block_until_ready(self._state)
        return time.perf_counter() - began

    @property
    def losses(self) -> list[float]:
        """The loss of every step so far, each before its update, in nats."""
        return [float(loss) for loss in self._losses]


def matrices(body: Any) -> list[jax.Array]:
    """`PER_LAYER` matrices of each of a model's unrolled layers."""

    def joined(layer: Any, part: str, *names: str) -> jax.Array:
        return jnp.concatenate([layer[part][name]["kernel"] for name in names], axis=1)

    layers = [body[f"layer_{i}"] for i in range(len(body))]
    parts = [("attention", "query", "key", "value"), ("attention", "out"), ("mlp", "up", "gate"), ("mlp", "down")]
    return [joined(layer, *part) for layer in layers for part in parts]
