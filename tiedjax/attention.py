"""Causal attention on each platform's fastest path.

Axes: B batch, T position, S position attended to, H query heads, G key/value heads, M = H / G queries for each, K head
width, N = M T.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from tiedjax.errors import UserError
from tiedjax.sharding import ONE_DEVICE, Layout

_SAVED_NAME = "attention"  # of what `save_attention` keeps
_CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # JAX's name of the primitive, whose results have no name
_Q_AXES, _KV_AXES = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
_LANES = 128  # splash attention works on tiles of so many positions and head columns
_LARGEST_BLOCK = 1024


class Scores(NamedTuple):
    """How scores come from products of queries and keys, and which count.

    Attributes:
      scale: what products are multiplied by; None: 1 / sqrt(K).
      cap: scores s become cap tanh(s / cap); None: they stay (Gemma 2, arXiv 2408.00118).
      window: how many positions a query sees, its own and those before it; None: all.
    """

    scale: float | None = None
    cap: float | None = None
    window: int | None = None

    def scaled(self, q_BTHK: jax.Array) -> jax.Array:
        """Queries whose products with keys are the scores before the cap."""
        scale = q_BTHK.shape[-1] ** -0.5 if self.scale is None else self.scale
        return q_BTHK * jnp.asarray(scale, q_BTHK.dtype)


PLAIN = Scores()


def causal_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    *,
    scores: Scores = PLAIN,
    backend: str = "auto",
    layout: Layout = ONE_DEVICE,
) -> jax.Array:
    """softmax(scores) v over the positions up to one's own, [B, T, H, K]; softmax in float32.

    `backend` is one of BACKENDS, or `auto`: see `chosen`. UserError for shapes, dtypes or scores that it does not take.
    """
    if scores.window is not None and scores.window >= q_BTHK.shape[1]:
        scores = scores._replace(window=None)
    attend = BACKENDS[chosen(backend, layout.platform, layout.cuda, q_BTHK, scores)]
    return attend(q_BTHK, k_BTGK, v_BTGK, scores, layout)


def attention_to_cache(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, start: jax.Array, scores: Scores = PLAIN
) -> jax.Array:
    """As `causal_attention`, [B, T, H, K], for queries at positions `start` to start + T - 1 of the S in a cache.

    Keys and values of later positions, which are not written yet, must be finite. Plain XLA on every platform.
    """
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    q_BTGMK = scores.scaled(q_BTHK).reshape(B, T, G, H // G, K)
    wide = jnp.promote_types(q_BTHK.dtype, jnp.float32)
    score_BGMTS = jnp.einsum("btgmk,bsgk->bgmts", q_BTGMK, k_BSGK, preferred_element_type=wide)
    if scores.cap is not None:
        score_BGMTS = scores.cap * jnp.tanh(score_BGMTS / scores.cap)
    own_T1, other_1S = start + jnp.arange(T)[:, None], jnp.arange(S)[None, :]
    visible_TS = other_1S <= own_T1
    if scores.window is not None:
        visible_TS &= other_1S > own_T1 - scores.window
    weight_BGMTS = jax.nn.softmax(jnp.where(visible_TS[None, None, None], score_BGMTS, -jnp.inf), axis=-1)
    return jnp.einsum("bgmts,bsgk->btgmk", weight_BGMTS.astype(v_BSGK.dtype), v_BSGK).reshape(q_BTHK.shape)


_by_name = jax.checkpoint_policies.save_only_these_names(_SAVED_NAME)


def save_attention(primitive: Any, *inputs: Any, **params: Any) -> bool:
    """The `jax.checkpoint` policy that keeps attention's result and what its derivative needs beside q, k and v.

    Of the XLA backend the result alone is kept: scores are computed again, the product with the values is not.
    """
    return bool(primitive.name == _CUDNN_FORWARD or _by_name(primitive, *inputs, **params))


def chosen(backend: str, platform: str, cuda: float | None, q_BTHK: Any, scores: Scores = PLAIN) -> str:
    """The backend that will run: under `auto` cuDNN on a GPU and splash attention on a TPU where they take q, else XLA.

    `cuda` is the compute capability of an NVIDIA GPU; `q_BTHK` needs a shape and a dtype. UserError where the backend
    asked for does not take it.
    """
    _, T, _, K = q_BTHK.shape
    widest = 256 if cuda is not None and cuda >= 9 else 128
    obstacles = {
        "xla": None,
        "cudnn": _first(
            (
                cuda is None or cuda < 8,
                f"needs an NVIDIA GPU of compute capability 8.0 or above, not {cuda or platform}",
            ),
            (q_BTHK.dtype not in (jnp.bfloat16, jnp.float16), f"needs model.dtype bfloat16, not {q_BTHK.dtype}"),
            (K % 8 or widest < K, f"needs a head width that is a multiple of 8 up to {widest}, not {K}"),
            (scores.cap is not None, "takes no model.attention_cap"),
        ),
        "splash": _first(
            (platform == "gpu", "needs a TPU (or, for tests, a CPU)"),
            (T % _LANES, f"needs model.seq_len to be a multiple of {_LANES}, not {T}"),
        ),
    }
    if backend == "auto":
        wanted = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "xla")
        return "xla" if obstacles[wanted] else wanted
    if obstacles[backend]:
        raise UserError(f"model.attention: {backend} {obstacles[backend]}; use auto or xla")
    return backend


def _first(*cases: tuple[Any, str]) -> str | None:
    return next((reason for holds, reason in cases if holds), None)


def _cudnn(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, scores: Scores, layout: Layout) -> jax.Array:
    """cuDNN's on every device's own sequences and heads."""
    attend = functools.partial(
        jax.nn.dot_product_attention,
        scale=scores.scale,
        is_causal=True,
        local_window_size=None if scores.window is None else (scores.window - 1, 0),
        implementation="cudnn",
    )
    return layout.per_device(attend, [_Q_AXES, _KV_AXES, _KV_AXES], _Q_AXES)(q_BTHK, k_BTGK, v_BTGK)


def _splash(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, scores: Scores, layout: Layout) -> jax.Array:
    """Splash attention on every device's own sequences and heads; interpreted where there is no TPU."""
    K = q_BTHK.shape[-1]
    scale = K**-0.5 if scores.scale is None else scores.scale

    def local(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array) -> jax.Array:
        T, H = q_BTHK.shape[1:3]
        kernel = _splash_kernel(T, H, scores, layout.platform != "tpu")
        wide = [(0, 0), (0, 0), (0, 0), (0, -K % _LANES)]  # columns of zeros change no score
        heads_first = (jnp.pad(x, wide).swapaxes(1, 2) for x in (q_BTHK * scale, k_BTGK, v_BTGK))
        y_BTHK: jax.Array = jax.vmap(kernel)(*heads_first).swapaxes(1, 2)
        return y_BTHK[..., :K].astype(q_BTHK.dtype)

    return layout.per_device(local, [_Q_AXES, _KV_AXES, _KV_AXES], _Q_AXES)(q_BTHK, k_BTGK, v_BTGK)


def _splash_kernel(T: int, H: int, scores: Scores, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = max(size for size in range(_LANES, min(T, _LARGEST_BLOCK) + 1, _LANES) if T % size == 0)
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    window = scores.window
    one = splash.CausalMask((T, T)) if window is None else splash.LocalMask((T, T), (window - 1, 0), offset=0)
    mask = splash.MultiHeadMask([one for _ in range(H)])
    return splash.make_splash_mha(
        mask,
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=scores.cap,
        residual_checkpoint_name=_SAVED_NAME,
        interpret=interpret,
    )


def _plain(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, scores: Scores, layout: Layout) -> jax.Array:
    """Matrix products over whole rows of scores."""
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    # Plain matrix products, batched over B and G: XLA:CPU is much slower on the einsum over [B, T, H, K].
    q_BGNK = scores.scaled(q_BTHK).swapaxes(1, 2).reshape(B, G, H // G * T, K)
    y_BGNK = _softmax_attention(q_BGNK, k_BTGK.swapaxes(1, 2), v_BTGK.swapaxes(1, 2), scores)
    return y_BGNK.reshape(B, H, T, K).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _softmax_attention(q_BGNK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, scores: Scores) -> jax.Array:
    """Of queries that are scaled already."""
    return _softmax_forward(q_BGNK, k_BGSK, v_BGSK, scores)[0]


def _softmax_forward(q_BGNK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, scores: Scores) -> tuple[jax.Array, Any]:
    B, G, N, _ = q_BGNK.shape
    T, cap = k_BGSK.shape[2], scores.cap
    wide = jnp.promote_types(q_BGNK.dtype, jnp.float32)
    score_BGNS = jnp.matmul(q_BGNK, k_BGSK.swapaxes(2, 3), preferred_element_type=wide)
    slope_BGNS = None
    if cap is not None:
        share_BGNS = jnp.tanh(score_BGNS / cap)
        score_BGNS, slope_BGNS = cap * share_BGNS, 1 - jnp.square(share_BGNS)
    ones_TS = np.ones((1, 1, 1, T, T), bool)
    visible_TS = np.tril(ones_TS)
    if scores.window is not None:
        visible_TS &= ~np.tril(ones_TS, -scores.window)
    score_BGMTS = jnp.where(visible_TS, score_BGNS.reshape(B, G, N // T, T, T), -jnp.inf)
    weight_BGNS = jax.nn.softmax(score_BGMTS, axis=-1).astype(v_BGSK.dtype).reshape(score_BGNS.shape)
    y_BGNK = checkpoint_name(weight_BGNS @ v_BGSK, _SAVED_NAME)
    return y_BGNK, (q_BGNK, k_BGSK, v_BGSK, weight_BGNS, slope_BGNS, y_BGNK)


def _softmax_backward(scores: Scores, residuals: Any, dy_BGNK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """By hand: fewer passes over the scores than the derivative of softmax takes, a fifth of the time on a CPU."""
    q_BGNK, k_BGSK, v_BGSK, weight_BGNS, slope_BGNS, y_BGNK = residuals
    wide = jnp.promote_types(q_BGNK.dtype, jnp.float32)
    dweight_BGNS = jnp.matmul(dy_BGNK, v_BGSK.swapaxes(2, 3), preferred_element_type=wide)
    mean_BGN1 = jnp.sum(dy_BGNK.astype(wide) * y_BGNK, axis=-1, keepdims=True)  # of dweight under the weights
    dcapped_BGNS = weight_BGNS * (dweight_BGNS - mean_BGN1)
    if slope_BGNS is not None:
        dcapped_BGNS *= slope_BGNS
    dscore_BGNS = dcapped_BGNS.astype(q_BGNK.dtype)
    dq_BGNK = dscore_BGNS @ k_BGSK
    return dq_BGNK, dscore_BGNS.swapaxes(2, 3) @ q_BGNK, weight_BGNS.swapaxes(2, 3) @ dy_BGNK


_softmax_attention.defvjp(_softmax_forward, _softmax_backward)

BACKENDS = {"xla": _plain, "cudnn": _cudnn, "splash": _splash}
