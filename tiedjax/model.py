"""The transformer body in Flax Linen: hidden states in, hidden states out; it never sees a table.

Axes: B batch, T position, S position attended to or kept in a cache, D width, H query heads, G key/value heads,
M = H / G queries for each, K head width, F MLP width, L layers, N several axes laid flat.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tiedjax.attention import Scores, attention_to_cache, causal_attention, save_attention
from tiedjax.config import ModelConfig
from tiedjax.rope import rotation
from tiedjax.sharding import ONE_DEVICE, Layout

CACHE = "cache"  # the collection of the variables that hold what earlier positions left to attend to


def compute_dtype(cfg: ModelConfig, layout: Layout = ONE_DEVICE) -> jnp.dtype:
    """The dtype of activations: as configured; `auto` is bfloat16 on accelerators, float32 on CPU."""
    if cfg.dtype == "auto":
        return jnp.dtype("float32" if layout.platform == "cpu" else "bfloat16")
    return jnp.dtype(cfg.dtype)


def wide(dtype: Any) -> jnp.dtype:
    """The dtype of sums and softmaxes over values of `dtype`: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def truncated_normal(std: float) -> Callable[..., jax.Array]:
    """Normal of this standard deviation, cut at three of them, not rescaled (OLMo's `mitchell` initialisation)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return std * jax.random.truncated_normal(key, -3.0, 3.0, shape, dtype)

    return init


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def wide_gradient_product(x: jax.Array, kernel: jax.Array, formula: str) -> jax.Array:
    """einsum(formula, x, kernel) in the dtype of x; the kernel's gradient is summed, and sent, in its own dtype."""
    return jnp.einsum(formula, x, kernel.astype(x.dtype))


def _wide_forward(x: jax.Array, kernel: jax.Array, formula: str) -> tuple[jax.Array, Any]:
    narrow = kernel.astype(x.dtype)
    return jnp.einsum(formula, x, narrow), (x, narrow, jnp.zeros((), kernel.dtype))


def _wide_backward(formula: str, residuals: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, narrow, wide = residuals
    (left, right), out = formula.split("->")[0].split(","), formula.split("->")[1]
    dkernel = jnp.einsum(f"{left},{out}->{right}", x, dy, preferred_element_type=wide.dtype)
    return jnp.einsum(f"{out},{right}->{left}", dy, narrow), dkernel


wide_gradient_product.defvjp(_wide_forward, _wide_backward)


def product(cfg: ModelConfig, x: jax.Array, kernel: jax.Array, formula: str) -> jax.Array:
    """einsum(formula, x, kernel) in the dtype of x; how the kernel's gradient is summed is `cfg.body_gradient`."""
    if cfg.body_gradient == "float32":
        return wide_gradient_product(x, kernel, formula)
    return jnp.einsum(formula, x, kernel.astype(x.dtype))


class Dense(nn.Module):
    """A linear map without bias."""

    cfg: ModelConfig
    features: int
    axes: tuple[str, str]
    std: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(truncated_normal(self.std), self.axes)
        kernel: Any = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        # One matrix product over all positions: XLA:CPU is several times slower on the batched form's backward pass.
        y_N = product(self.cfg, x.reshape(-1, x.shape[-1]).astype(self.dtype), kernel, "nd,df->nf")
        return y_N.reshape(*x.shape[:-1], self.features)


class Bias(nn.Module):
    """Adds the bias of a linear map, which is 0 at the start, to what that gives."""

    axis: str

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.zeros_init(), (self.axis,))
        bias: Any = self.param("bias", init, (y.shape[-1],), jnp.float32)
        return jnp.add(y, bias.reshape((1,) * (y.ndim - 1) + (-1,)).astype(y.dtype))


class Norm(nn.Module):
    """LayerNorm, with a bias if `biased`, or RMSNorm over the last axis, computed in float32."""

    kind: str
    eps: float
    dtype: Any
    axis: str | None = "embed"
    biased: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(wide(x.dtype))
        if self.kind != "rmsnorm":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        if self.kind != "nonparametric_layernorm":
            init = nn.with_logical_partitioning(nn.initializers.ones_init(), (self.axis,))
            scale: Any = self.param("scale", init, (x.shape[-1],), jnp.float32)
            y = y * scale.reshape((1,) * (y.ndim - 1) + (-1,))
        if self.biased:
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), (self.axis,))
            bias: Any = self.param("bias", init, (x.shape[-1],), jnp.float32)
            y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return y.astype(self.dtype)


def norm(cfg: ModelConfig, dtype: Any, name: str) -> Norm:
    """The norm that the config asks for of states of the residual stream."""
    return Norm(cfg.norm, cfg.norm_eps, dtype, biased=cfg.norm_bias, name=name)


def rotate(x_BTHK: jax.Array, angles: Sequence[np.ndarray | jax.Array]) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864) on halves of the first columns of a head; computed in float32.

    `angles` are those of `rope.rotation` at x's positions, and say how many columns that is.
    """
    K = angles[1].shape[-2] * angles[1].shape[-1]
    if x_BTHK.shape[3] > K:
        return jnp.concatenate([rotate(x_BTHK[..., :K], angles), x_BTHK[..., K:]], axis=-1)
    cos, sin = (jnp.asarray(part, wide(x_BTHK.dtype)) for part in angles)
    x_BTH2K = x_BTHK.astype(wide(x_BTHK.dtype)).reshape(*x_BTHK.shape[:-1], 2, K // 2)
    # The other half by reversing the axis of two: a concatenation is a kernel of its own on a GPU, and a slow one.
    return (x_BTH2K * cos + x_BTH2K[..., ::-1, :] * sin).astype(x_BTHK.dtype).reshape(x_BTHK.shape)


class Attention(nn.Module):
    """Causal self-attention with grouped queries; over a cache of keys and values where it is given one."""

    cfg: ModelConfig
    layer: int
    dtype: Any
    layout: Layout

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        cfg, K = self.cfg, self.cfg.key_width
        B, T, D = x_BTD.shape
        q_BTHK, k_BTGK, v_BTGK = self._heads(x_BTD)
        if cfg.qk_norm == "head":
            q_BTHK = Norm("rmsnorm", cfg.norm_eps, self.dtype, None, name="query_norm")(q_BTHK)
            k_BTGK = Norm("rmsnorm", cfg.norm_eps, self.dtype, None, name="key_norm")(k_BTGK)
        if self.has_variable(CACHE, "key"):
            y_BTHK = self._continued(q_BTHK, k_BTGK, v_BTGK)
        else:
            if cfg.position == "rope":
                angles = rotation(cfg, T, self.scores.window is not None)
                q_BTHK, k_BTGK = rotate(q_BTHK, angles), rotate(k_BTGK, angles)
            options: dict[str, Any] = {"scores": self.scores, "backend": cfg.attention, "layout": self.layout}
            y_BTHK = causal_attention(q_BTHK, k_BTGK, v_BTGK, **options)
        y_BTD = y_BTHK.reshape(B, T, cfg.heads * K)
        std = (2 * cfg.heads * K * (self.layer + 1)) ** -0.5
        y_BTD = Dense(cfg, D, ("heads", "embed"), std, self.dtype, name="out")(y_BTD)
        return Bias("embed", name="out_bias")(y_BTD) if "out" in cfg.bias_names else y_BTD

    @property
    def scores(self) -> Scores:
        """How this layer's scores are made."""
        return Scores(self.cfg.attention_scale, self.cfg.attention_cap, self.cfg.windows[self.layer])

    def _heads(self, x_BTD: jax.Array) -> list[jax.Array]:
        """Queries [B, T, H, K], and keys and values [B, T, G, K]."""
        cfg, K, D = self.cfg, self.cfg.key_width, x_BTD.shape[-1]
        named = {"query": ("heads", cfg.heads), "key": ("kv_heads", cfg.groups), "value": ("kv_heads", cfg.groups)}
        if self.layout.platform == "cpu" and not self.layout.names("tensor"):
            # One product of all: small ones do not keep a CPU's cores busy.
            kernels = [
                Kernel(cfg, (D, n * K), ("embed", axis), D**-0.5, self.dtype, name=name)()
                for name, (axis, n) in named.items()
            ]
            x_ND = x_BTD.reshape(-1, D).astype(self.dtype)
            y_NF = product(cfg, x_ND, jnp.concatenate(kernels, axis=1), "nd,df->nf")
            parts = jnp.split(y_NF, np.cumsum([kernel.shape[1] for kernel in kernels])[:-1], axis=1)
        else:
            parts = [
                Dense(cfg, n * K, ("embed", axis), D**-0.5, self.dtype, name=name)(x_BTD)
                for name, (axis, n) in named.items()
            ]
        if "qkv" in cfg.bias_names:
            biases = [Bias(axis, name=f"{name}_bias") for name, (axis, _) in named.items()]
            parts = [bias(part) for bias, part in zip(biases, parts, strict=True)]
        if cfg.clip_qkv is not None:
            parts = [jnp.clip(part, -cfg.clip_qkv, cfg.clip_qkv) for part in parts]
        if cfg.qk_norm == "whole":
            norms = [Norm("rmsnorm", cfg.norm_eps, self.dtype, None, name=f"{name}_norm") for name in ("query", "key")]
            parts = [each(part) for each, part in zip(norms, parts, strict=False)] + parts[2:]
        return [
            self.layout.constrain(part.reshape(*x_BTD.shape[:2], n, K), ("batch", None, axis, None))
            for part, (axis, n) in zip(parts, named.values(), strict=True)
        ]

    def _continued(self, q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array) -> jax.Array:
        """Attention of the positions that follow those in the cache, to these and to one another; adds them to it."""
        kept: dict[str, Any] = {name: self.get_variable(CACHE, name) for name in ("length", "key", "value")}
        cfg, start, T, S = self.cfg, kept["length"], q_BTHK.shape[1], kept["key"].shape[1]
        if cfg.position == "rope":
            both = rotation(cfg, S, self.scores.window is not None)
            whole = (jnp.asarray(part, wide(self.dtype)) for part in both)
            angles = [jax.lax.dynamic_slice_in_dim(part, start, T, axis=1) for part in whole]
            q_BTHK, k_BTGK = rotate(q_BTHK, angles), rotate(k_BTGK, angles)
        k_BSGK, v_BSGK = (
            jax.lax.dynamic_update_slice_in_dim(kept[name], new_BTGK, start, axis=1)
            for name, new_BTGK in (("key", k_BTGK), ("value", v_BTGK))
        )
        for name, changed in {"length": start + T, "key": k_BSGK, "value": v_BSGK}.items():
            self.put_variable(CACHE, name, changed)
        return attention_to_cache(q_BTHK, k_BSGK, v_BSGK, start, self.scores)


@jax.custom_vjp
def swiglu(x_N2F: jax.Array) -> jax.Array:
    """up * silu(gate) (arXiv 2002.05202) of (up, gate) along the second axis; computed in float32."""
    x_2 = x_N2F.astype(wide(x_N2F.dtype))
    return (x_2[:, 0] * jax.nn.silu(x_2[:, 1])).astype(x_N2F.dtype)


def _swiglu_forward(x_N2F: jax.Array) -> tuple[jax.Array, jax.Array]:
    return swiglu(x_N2F), x_N2F


def _swiglu_backward(x_N2F: jax.Array, dy_NF: jax.Array) -> tuple[jax.Array]:
    """By hand: one pass that writes both derivatives, of which XLA would make two."""
    up, gate, dy = (x[:, None].astype(wide(x.dtype)) for x in (x_N2F[:, 0], x_N2F[:, 1], dy_NF))
    share = jax.nn.sigmoid(gate)
    is_up = (np.arange(2) == 0)[None, :, None]
    return ((dy * share * jnp.where(is_up, gate, up * (1 + gate * (1 - share)))).astype(x_N2F.dtype),)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


class Kernel(nn.Module):
    """The matrix of a linear map, in the dtype that its gradient has."""

    cfg: ModelConfig
    shape: tuple[int, int]
    axes: tuple[str, str]
    std: float
    dtype: Any

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.with_logical_partitioning(truncated_normal(self.std), self.axes)
        kernel: Any = self.param("kernel", init, self.shape, jnp.float32)
        return jnp.asarray(kernel, None if self.cfg.body_gradient == "float32" else self.dtype)


class MLP(nn.Module):
    """GELU as an approximation or exactly, or what goes up times a gate in that or in SiLU (arXiv 2002.05202)."""

    cfg: ModelConfig
    layer: int
    dtype: Any
    layout: Layout

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        cfg, D, F = self.cfg, x_BTD.shape[-1], self.cfg.d_ff
        wide_part = ("embed", "mlp"), D**-0.5, self.dtype
        names = ("up", "gate") if cfg.gated else ("up",)
        biased = "mlp" in cfg.bias_names
        biases: Any = [Bias("mlp", name=f"{name}_bias") if biased else lambda y: y for name in names]
        gelu = functools.partial(jax.nn.gelu, approximate=cfg.mlp in ("gelu", "geglu"))
        if not cfg.gated:
            up_BTF = biases[0](Dense(cfg, F, *wide_part, name="up")(x_BTD))
            y_BTF = gelu(up_BTF)
        elif self.layout.platform == "gpu" and cfg.mlp == "swiglu":
            # One product of twice the width; on a CPU it takes twice the time of two.
            both_D2F = jnp.stack([Kernel(cfg, (D, F), *wide_part, name=name)() for name in names], axis=1)
            x_N2F = product(cfg, x_BTD.reshape(-1, D), both_D2F, "nd,dgf->ngf")
            if biased:
                x_N2F = jnp.stack([bias(x_N2F[:, i]) for i, bias in enumerate(biases)], axis=1)
            y_BTF = swiglu(x_N2F).reshape(*x_BTD.shape[:-1], F)
        else:
            up_BTF, gate_BTF = (
                bias(Dense(cfg, F, *wide_part, name=name)(x_BTD)) for name, bias in zip(names, biases, strict=True)
            )
            y_BTF = up_BTF * (jax.nn.silu if cfg.mlp == "swiglu" else gelu)(gate_BTF)
        y_BTF = self.layout.constrain(y_BTF, ("batch", None, "mlp"))
        y_BTD = Dense(cfg, D, ("mlp", "embed"), (2 * F * (self.layer + 1)) ** -0.5, self.dtype, name="down")(y_BTF)
        return Bias("embed", name="down_bias")(y_BTD) if biased else y_BTD


class Block(nn.Module):
    """One decoder layer; returns its output twice, as carry and as value of a scan."""

    cfg: ModelConfig
    layer: int
    dtype: Any
    layout: Layout

    @nn.compact
    def __call__(self, x_BTD: jax.Array, _: None = None) -> tuple[jax.Array, jax.Array]:
        cfg, parts = self.cfg, (self.cfg, self.layer, self.dtype, self.layout)
        attention, mlp = Attention(*parts, name="attention"), MLP(*parts, name="mlp")
        attention_norm, mlp_norm = (norm(cfg, self.dtype, f"{name}_norm") for name in ("attention", "mlp"))
        if cfg.norm_place == "post":
            added = [lambda x: attention_norm(attention(x)), lambda x: mlp_norm(mlp(x))]
        elif cfg.norm_place == "both":
            after, mlp_after = (norm(cfg, self.dtype, f"{name}_post_norm") for name in ("attention", "mlp"))
            added = [lambda x: after(attention(attention_norm(x))), lambda x: mlp_after(mlp(mlp_norm(x)))]
        else:
            added = [lambda x: attention(attention_norm(x)), lambda x: mlp(mlp_norm(x))]
        after_BTD = x_BTD + added[0](x_BTD)
        x_BTD = after_BTD + added[1](x_BTD if cfg.parallel else after_BTD)
        x_BTD = self.layout.constrain(x_BTD, ("batch", None, None))
        return x_BTD, x_BTD


class Entry(nn.Module):
    """What looked-up vectors become before the first block: themselves, unless the config says otherwise.

    It may multiply them, add a learned vector for each position, and norm them, in this order.
    """

    cfg: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = multiplied(self.cfg, "input", x_BTD)
        if self.cfg.position == "learned":
            x_BTD = x_BTD + self._positions(x_BTD.shape[1])[None]
        return norm(self.cfg, self.dtype, "Norm_0")(x_BTD) if self.cfg.norm_after_lookup else x_BTD

    def _positions(self, T: int) -> jax.Array:
        """The vectors [T, D] of the positions that follow those in the cache, if there is one."""
        shape = (self.cfg.seq_len, self.cfg.d_model)
        init = nn.with_logical_partitioning(truncated_normal(self.cfg.d_model**-0.5), (None, "embed"))
        positions_SD: Any = self.param("positions", init, shape, jnp.float32)
        if shape[0] < T:
            raise ValueError(f"{T} positions, and model.seq_len has {shape[0]}")
        if not self.has_variable(CACHE, "length"):
            return jnp.asarray(positions_SD[:T], self.dtype)
        start: Any = self.get_variable(CACHE, "length")
        self.put_variable(CACHE, "length", start + T)
        return jnp.asarray(jax.lax.dynamic_slice_in_dim(positions_SD, start, T), self.dtype)


def multiplied(cfg: ModelConfig, role: str, x: jax.Array) -> jax.Array:
    """x times the multiplier of what is looked up (input) or multiplied by the output table (output)."""
    factor = cfg.multipliers[role]
    return x if factor == 1 else x * factor


def capped(cfg: ModelConfig, logits: jax.Array) -> jax.Array:
    """Products of last states with the output table as the logits that they are: under `model.logit_cap`."""
    return logits if cfg.logit_cap is None else cfg.logit_cap * jnp.tanh(logits / cfg.logit_cap)


def _remat_policy(name: str) -> Any:
    """What is kept for the backward pass."""
    keep = jax.checkpoint_policies
    return {
        "full": keep.nothing_saveable,
        "attention": save_attention,
        "dots": keep.save_from_both_policies(keep.dots_with_no_batch_dims_saveable, save_attention),
    }[name]


class Transformer(nn.Module):
    """The body: `Transformer(cfg).apply(body, x_BTD) -> h_BTD`, to be multiplied by the output table.

    With `hidden_states=True` also returns x_LBTD, the L + 1 states of the residual stream: what enters the first layer,
    then the output of every layer, the last one before the final norm.

    With a cache, which starts as `empty_cache`, x_BTD are the positions that follow those in it: `apply({**body, CACHE:
    cache}, x_BTD, mutable=CACHE) -> (h_BTD, {CACHE: cache})`. It must have room for them.
    """

    cfg: ModelConfig
    layout: Layout = ONE_DEVICE

    @nn.compact
    def __call__(self, x_BTD: jax.Array, hidden_states: bool = False) -> Any:
        cfg, dtype = self.cfg, compute_dtype(self.cfg, self.layout)
        block: Any = Block
        if cfg.remat != "none":
            block = nn.remat(Block, policy=_remat_policy(cfg.remat), prevent_cse=not cfg.scan_layers)
        x_BTD = self.layout.constrain(x_BTD.astype(dtype), ("batch", None, None))
        x_BTD = first_BTD = Entry(cfg, dtype, name="entry")(x_BTD)
        if cfg.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0, CACHE: 0},
                split_rngs={"params": True},
                length=cfg.layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x_BTD, outputs_LBTD = scanned(cfg, 0, dtype, self.layout, name="layers")(x_BTD, None)
        else:
            outputs = []
            for i in range(cfg.layers):
                x_BTD, _ = block(cfg, i, dtype, self.layout, name=f"layer_{i}")(x_BTD, None)
                outputs.append(x_BTD)
        h_BTD = multiplied(cfg, "output", norm(cfg, dtype, "final_norm")(x_BTD))
        if not hidden_states:
            return h_BTD
        outputs_LBTD = outputs_LBTD if cfg.scan_layers else jnp.stack(outputs)
        return h_BTD, jnp.concatenate([first_BTD[None], outputs_LBTD])


def init_body(cfg: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """The body's Flax variables, float32, boxed with logical axes; a layer starts the same scanned or not."""
    unrolled = Transformer(dataclasses.replace(cfg, scan_layers=False, remat="none", attention="xla"))
    params = dict(unrolled.init(key, jnp.zeros((1, 2, cfg.d_model)))["params"])
    if cfg.scan_layers:
        layers = [params.pop(f"layer_{i}") for i in range(cfg.layers)]
        params["layers"] = jax.tree.map(_stack, *layers, is_leaf=_boxed)
    return {"params": params}


def empty_cache(cfg: ModelConfig, batch: int, positions: int) -> dict[str, Any]:
    """A cache of no positions yet, for B = `batch` sequences of at most S = `positions`, as `Transformer` takes it.

    For each layer `key` and `value`, [B, S, G, K] in the compute dtype, and `length`, how many positions they hold,
    int32 []; with a leading axis L where the layers are scanned.
    """
    stacked = (cfg.layers,) if cfg.scan_layers else ()

    def layer() -> dict[str, Any]:
        shape = (*stacked, batch, positions, cfg.groups, cfg.key_width)
        rows = {name: jnp.zeros(shape, compute_dtype(cfg)) for name in ("key", "value")}
        return {"attention": {**rows, "length": jnp.zeros(stacked, jnp.int32)}}

    layers = {"layers": layer()} if cfg.scan_layers else {f"layer_{i}": layer() for i in range(cfg.layers)}
    return layers | ({"entry": {"length": jnp.zeros((), jnp.int32)}} if cfg.position == "learned" else {})


def _boxed(x: Any) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def _stack(*boxes: nn.LogicallyPartitioned) -> nn.LogicallyPartitioned:
    stacked = jnp.stack([box.value for box in boxes])
    return boxes[0].replace(value=stacked, names=("layers", *boxes[0].names))
