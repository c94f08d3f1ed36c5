"""The output role of a table: hidden states against its rows, their cross-entropy, and both gradients at once.

Axes: B batch, T position, N = B T, C a chunk of N, V rows of the table, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tiedjax.errors import UserError
from tiedjax.exp_product import ExpProduct, kernel_for
from tiedjax.lookup import RowSums, own_rows, row_sums, wide_ids
from tiedjax.sharding import ONE_DEVICE, Axes, Layout

# Of a chunk's logits. On a CPU they should stay in its cache; an accelerator wants products large enough to
# keep it busy, and each chunk costs it a pass over the table's gradient.
CHUNK_BYTES = {"cpu": 2**21, "gpu": 2**30, "tpu": 2**29}
# Of a chunk that is larger for the sake of those passes: with the numbers that are as many as its logits, below 2 GiB.
_MOST_CHUNK_BYTES = 4 * 2**30 // 5
_TILE = 256  # tokens: a chunk that is a multiple of it fills the tiles of the matrix units
_SHIFT = 40.0  # nats


@jax.named_scope("loss")
def cross_entropy(
    h_BTD: jax.Array,
    U_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    bias_V: jax.Array | None = None,
    rare_R: jax.Array | None = None,
    push_RD: jax.Array | None = None,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    chunk: int | None = None,
    gradient: str = "auto",
    layout: Layout = ONE_DEVICE,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of -log softmax(h U^T + bias)[target] + z_loss * logsumexp^2 in nats, and the sum of the weights.

    Negative targets are ignored; a target outside the table gives NaN. With `soft_cap` logits l become
    soft_cap * tanh(l / soft_cap) (Gemma 2, arXiv 2408.00118), to which the bias is added; the z-loss is that of PaLM
    (arXiv 2204.02311). The bias, in nats, lies like the table's rows; its gradient is the sum over tokens of
    weight * ((1 + 2 z_loss * logsumexp) softmax - onehot), unrounded, and None is no bias and costs nothing. Products
    take the dtype of h and sum in float32 (float64 if h is), as do the softmax and the table's gradient. Logits exist
    for `chunk` tokens of a device at a time (None: as many as CHUNK_BYTES allows, or D if more and below 0.8 GiB). When
    differentiated, both gradients are computed with the loss, in three matrix products; weights have none. `gradient`
    is as in `lookup`: with narrow operands, what rounding takes from each target's own row of the table's gradient is
    added back by it. `push_RD` are zeros that no forward pass reads; their gradient is the part of the gradient of the
    rows `rare_R`, int32 and all different, that comes from tokens whose target is none of these rows.
    """
    wide, targets_BT = jnp.promote_types(h_BTD.dtype, jnp.float32), wide_ids(targets_BT)
    if not targets_BT.size:
        raise UserError(f"cross_entropy: needs at least one target, got {list(targets_BT.shape)}")
    weights_BT = jnp.where(targets_BT < 0, 0, jnp.where(targets_BT < len(U_VD), weights_BT, jnp.nan)).astype(wide)
    spec = _Spec(z_loss, soft_cap, chunk, layout, row_sums(gradient, layout.platform))
    total = _summed(h_BTD, U_VD, jnp.maximum(targets_BT, 0), weights_BT, bias_V, rare_R, push_RD, spec)
    return total, jnp.sum(weights_BT)


@dataclass(frozen=True)
class _Spec:
    """What does not change from call to call."""

    z_loss: float
    soft_cap: float | None
    chunk: int | None
    layout: Layout
    add_rows: RowSums

    def chunks(self, tokens: int, table: tuple[int, ...], itemsize: int = 4) -> int:
        """Into how many chunks of equal size `tokens` are cut, for a table of this shape on this device.

        `itemsize` is the bytes of each number that is kept of a chunk's logits.
        """
        rows, width = table
        # Each chunk costs a pass over the table's gradient, D numbers a row against the chunk's C logits.
        usual, largest = (size // (itemsize * rows) for size in (CHUNK_BYTES[self.layout.platform], _MOST_CHUNK_BYTES))
        most = self.chunk or max(usual, min(width, largest), 1)
        fewest = -(-tokens // most)
        whole = (n for n in range(fewest, 2 * fewest) if tokens % (n * _TILE) == 0)
        return fewest if self.chunk else next(whole, fewest)


_TABLE, _BIAS, _TOKENS, _STATES = ("vocab", None), ("vocab",), ("batch", None), ("batch", None, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _summed(
    h_BTD: jax.Array,
    U_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    bias_V: jax.Array | None,
    rare_R: jax.Array | None,
    push_RD: jax.Array | None,
    spec: _Spec,
) -> jax.Array:
    """The summed loss alone; nothing is computed for gradients."""

    def local(h_BTD: jax.Array, U_VD: jax.Array, bias_V: jax.Array | None, *about_BT: jax.Array) -> jax.Array:
        def add(total: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
            return total + _chunk_loss(chunk, U_VD, bias_V, spec).loss, None

        chunks = _cut(h_BTD, about_BT, spec.chunks(about_BT[0].size, U_VD.shape))
        total, _ = jax.lax.scan(add, jnp.zeros((), chunks[2].dtype), chunks)
        return _across(jax.lax.psum, total, spec.layout.names("data", "fsdp"))

    run = spec.layout.per_device(local, [_STATES, _TABLE, _BIAS, _TOKENS, _TOKENS], ())
    return run(h_BTD, U_VD.astype(h_BTD.dtype), bias_V, targets_BT, weights_BT)


def _forward(
    h_BTD: jax.Array,
    U_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    bias_V: jax.Array | None,
    rare_R: jax.Array | None,
    push_RD: jax.Array | None,
    spec: _Spec,
) -> Any:
    layout = spec.layout
    fsdp, tensor, data = (layout.names(name) for name in ("fsdp", "tensor", "data"))

    # Where a device has columns of the table, those are rows of the turned table, [D, V], which a gather only puts side
    # by side and a reduce-scatter takes apart: of [V, D] both make a second array of the table's size. TPUs lay arrays
    # out in tiles, and do not.
    by_columns = bool(fsdp) and layout.platform != "tpu"

    def local(
        h_BTD: jax.Array, U: jax.Array, bias_V: jax.Array | None, rare_R: jax.Array | None, *about_BT: jax.Array
    ) -> Any:
        wide, tokens = about_BT[1].dtype, about_BT[0].size
        if by_columns:
            U = jax.lax.all_gather(U.T, fsdp, axis=0, tiled=True)

        def table() -> jax.Array:
            return U.T if by_columns else U  # turned back where it is used: XLA makes that part of the products

        chunks, gradients = _way(tokens, h_BTD.dtype, table, bias_V, spec)
        if rare_R is not None:
            is_rare_V = jnp.zeros(len(U_VD), bool).at[rare_R].set(True)
            own_R = own_rows(rare_R, len(U_VD) // layout.size("tensor"), tensor)

        def push(part: _Gradients, target_C: jax.Array) -> jax.Array:
            d_CR = part.d_CV.at[:, own_R].get(mode="fill", fill_value=0)
            h_CD = jnp.where(is_rare_V[target_C][:, None], 0, part.h_CD)
            return _outer_sum(d_CR, h_CD, wide, layout.platform, turned=False)

        def add(carry: Any, chunk: Any) -> tuple[Any, Any]:
            total, dU, d_bias_V, push_RD = carry
            part = gradients(chunk)
            dU += _outer_sum(part.d_CV, part.h_CD, wide, layout.platform, by_columns)
            dh_CD = part.dh_CD if tensor else part.dh_CD.astype(h_BTD.dtype)
            if push_RD is not None:
                push_RD += push(part, chunk[1])
            d_bias_V = jax.tree.map(jnp.add, d_bias_V, part.d_bias_V)
            return (total + part.loss, dU, d_bias_V, push_RD), (dh_CD, part.d_target_C)

        rows, width = table().shape
        no_bias_V = None if bias_V is None else jnp.zeros(rows, wide)
        no_push_RD = None if rare_R is None else jnp.zeros((len(rare_R), width), wide)
        no_dU = jnp.zeros((width, rows) if by_columns else (rows, width), wide)
        start = (jnp.zeros((), wide), no_dU, no_bias_V, no_push_RD)
        (total, dU, d_bias_V, push_RD), per_token = jax.lax.scan(add, start, _cut(h_BTD, about_BT, chunks))
        dU_VD = dU.T if by_columns else dU
        dh_ND, d_target_N = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:tokens], per_token)
        dh_BTD = dh_ND.reshape(h_BTD.shape)
        if d_target_N is not None:
            target_ND = d_target_N[:, None] * h_BTD.reshape(-1, h_BTD.shape[-1])
            dU_VD += spec.add_rows(target_ND, own_rows(about_BT[0].reshape(-1), len(dU_VD), tensor), len(dU_VD))
        if tensor:  # every device has the part of its own rows: added before it is rounded
            dh_BTD = jax.lax.psum(dh_BTD, tensor).astype(h_BTD.dtype)
        # The only time that anything of the table's size crosses between devices: once, not for every chunk. Along
        # fsdp first, which leaves each device its own columns: along data only 1/fsdp of the table is then added. On a
        # TPU XLA may otherwise put that off, and keep the whole table's gradient while the body is differentiated.
        if fsdp:
            dU_VD = jax.lax.psum_scatter(dU_VD, fsdp, scatter_dimension=1, tiled=True)
            if layout.platform == "tpu":
                dh_BTD, dU_VD = jax.lax.optimization_barrier((dh_BTD, dU_VD))
        if data:
            dU_VD = jax.lax.psum(dU_VD, data)
        batch = layout.names("data", "fsdp")
        if d_bias_V is not None:
            d_bias_V = _across(jax.lax.psum, d_bias_V, batch)
        if push_RD is not None:  # of rows that are elsewhere along tensor it is 0
            push_RD = _across(jax.lax.psum, push_RD, batch + tensor)
        return _across(jax.lax.psum, total, batch), dh_BTD, dU_VD, d_bias_V, push_RD

    results: list[Axes] = [(), _STATES, ("vocab", "embed"), _BIAS, (None, None)]
    given = ("vocab", "embed") if by_columns else _TABLE
    run = layout.per_device(local, [_STATES, given, _BIAS, (None,), _TOKENS, _TOKENS], results)
    total, dh_BTD, dU_VD, d_bias_V, d_push_RD = run(
        h_BTD, U_VD.astype(h_BTD.dtype), bias_V, rare_R, targets_BT, weights_BT
    )
    if bias_V is not None:
        d_bias_V = d_bias_V.astype(bias_V.dtype)
    if push_RD is not None:
        d_push_RD = d_push_RD.astype(push_RD.dtype)
    return total, (dh_BTD, dU_VD.astype(U_VD.dtype), d_bias_V, d_push_RD)


def _outer_sum(d_CV: jax.Array, h_CD: jax.Array, dtype: Any, platform: str, turned: bool) -> jax.Array:
    """d^T h, [V, D], or that turned: what a chunk adds to the table's gradient."""
    if platform != "cpu":
        left, right = (h_CD, d_CV) if turned else (d_CV, h_CD)
        return jnp.matmul(left.T, right, preferred_element_type=dtype)
    # A CPU's product with a transposed operand takes longer than a copy and a product: the small one of the two is
    # copied, which the barriers keep XLA from undoing. Turned back here it is added in the layout that its readers
    # want; after the last chunk each of them would read it by columns.
    h_DC = jax.lax.optimization_barrier(h_CD.T)
    dU_DV: jax.Array = jax.lax.optimization_barrier(jnp.matmul(h_DC, d_CV, preferred_element_type=dtype))
    return dU_DV if turned else dU_DV.T


def _backward(spec: _Spec, residuals: Any, cotangent: jax.Array) -> Any:
    dh_BTD, dU_VD, *others = residuals
    d_bias_V, d_push_RD = jax.tree.map(lambda d: d * cotangent.astype(d.dtype), others)
    dh_BTD, dU_VD = (cotangent * dh_BTD).astype(dh_BTD.dtype), cotangent.astype(dU_VD.dtype) * dU_VD
    return dh_BTD, dU_VD, None, None, d_bias_V, None, d_push_RD


_summed.defvjp(_forward, _backward)


def _cut(h_BTD: jax.Array, about_BT: tuple[jax.Array, ...], chunks: int) -> tuple[jax.Array, ...]:
    """(states, targets, weights) of this device in chunks of equal size; what is added to fill the last weighs 0."""
    flat = (h_BTD.reshape(-1, h_BTD.shape[-1]), *(x.reshape(-1) for x in about_BT))
    missing = -len(flat[0]) % chunks
    padded = (jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x for x in flat)
    return tuple(x.reshape(chunks, -1, *x.shape[1:]) for x in padded)


def _across(reduce: Callable[..., jax.Array], x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """x, reduced over these axes of the mesh if there are any."""
    return reduce(x, axes) if axes else x


class _Chunk(NamedTuple):
    """The summed loss of a chunk and its gradient with respect to the logits.

    Attributes:
      d_CV: with respect to h U^T, in the dtype of h.
      missed_C: what that dtype misses of it at each target.
      d_bias_V: with respect to the bias; None without one.
    """

    loss: jax.Array
    d_CV: jax.Array
    missed_C: jax.Array
    d_bias_V: jax.Array | None


def _chunk_loss(chunk: Any, U_VD: jax.Array, bias_V: jax.Array | None, spec: _Spec) -> _Chunk:
    """By way of float32 logits in memory.

    With rows of the table spread over `tensor` the maximum, the sum and the target's logit are put together from all.
    """
    h_CD, target_C, weight_C = chunk
    tensor, cap = spec.layout.names("tensor"), spec.soft_cap
    product_CV = jnp.matmul(h_CD, U_VD.T, preferred_element_type=weight_C.dtype)
    if cap is not None:
        product_CV = cap * jnp.tanh(product_CV / cap)
    logit_CV = product_CV if bias_V is None else product_CV + bias_V.astype(weight_C.dtype)[None]
    row_C1 = own_rows(target_C, len(U_VD), tensor)[:, None]

    def at_target(x_CV: jax.Array) -> jax.Array:
        """0 where the target's row is on another device."""
        return jnp.take_along_axis(x_CV, row_C1, axis=-1, mode="fill", fill_value=0)[:, 0]

    local_most_C, local_sum_C = (_in_one_pass if spec.layout.platform == "gpu" else _in_two_passes)(logit_CV)
    most_C = _across(jax.lax.pmax, local_most_C, tensor)
    sum_C = _across(jax.lax.psum, local_sum_C * jnp.exp(local_most_C - most_C) if tensor else local_sum_C, tensor)
    power_CV = jnp.exp(logit_CV - most_C[:, None])
    target_logit_C = _across(jax.lax.psum, at_target(logit_CV), tensor)
    log_sum_C = most_C + jnp.log(sum_C)
    loss_C = log_sum_C - target_logit_C + spec.z_loss * jnp.square(log_sum_C)
    # The target's own entry, about -1 where all others are small, is apart: most of what rounding loses is lost there.
    rate_C = weight_C * (1 + 2 * spec.z_loss * log_sum_C) / sum_C
    d_target_C = rate_C * jnp.exp(target_logit_C - most_C) - weight_C
    d_CV = power_CV * rate_C[:, None]
    is_target_CV = row_C1 == jnp.arange(len(U_VD))[None]
    d_bias_V = None if bias_V is None else jnp.where(is_target_CV, d_target_C[:, None], d_CV).sum(axis=0)
    if cap is not None:
        d_CV *= 1 - jnp.square(product_CV / cap)
        d_target_C *= 1 - jnp.square(at_target(product_CV) / cap)
    narrow_C = d_target_C.astype(h_CD.dtype)
    d_CV = jnp.where(is_target_CV, narrow_C[:, None], d_CV.astype(h_CD.dtype))
    return _Chunk(jnp.sum(weight_C * loss_C), d_CV, d_target_C - narrow_C, d_bias_V)


class _Gradients(NamedTuple):
    """The summed loss of a chunk and its gradients, the table's as factors.

    Attributes:
      d_CV, h_CD: the table's gradient is d^T h and, unless `d_target_C` is None, that many times each token's state in
        its target's row.
      dh_CD: with respect to the states, in float32.
      d_bias_V: with respect to the bias; None without one.
    """

    loss: jax.Array
    d_CV: jax.Array
    h_CD: jax.Array
    dh_CD: jax.Array
    d_target_C: jax.Array | None
    d_bias_V: jax.Array | None


def _way(
    tokens: int, dtype: Any, table: Callable[[], jax.Array], bias_V: jax.Array | None, spec: _Spec
) -> tuple[int, Callable[[Any], _Gradients]]:
    """Into how many chunks the tokens are cut and what computes a chunk: without logits where a kernel does that.

    `table` gives U_VD. The kernel takes neither a soft-cap nor a bias.
    """
    U_VD = table()
    chunks = spec.chunks(tokens, U_VD.shape, dtype.itemsize)
    product = None
    if spec.soft_cap is None and bias_V is None:
        product = kernel_for(spec.layout, dtype, -(-tokens // chunks), U_VD.shape)
    if product is not None:
        return chunks, functools.partial(_from_powers, U_VD=U_VD, spec=spec, product=product)
    return spec.chunks(tokens, U_VD.shape), lambda chunk: _from_logits(chunk, table(), bias_V, spec)


def _from_logits(chunk: Any, U_VD: jax.Array, bias_V: jax.Array | None, spec: _Spec) -> _Gradients:
    """By way of float32 logits in memory, on any device."""
    loss, d_CV, missed_C, d_bias_V = _chunk_loss(chunk, U_VD, bias_V, spec)
    dh_CD = jnp.matmul(d_CV, U_VD, preferred_element_type=loss.dtype)
    return _Gradients(loss, d_CV, chunk[0], dh_CD, None if d_CV.dtype == loss.dtype else missed_C, d_bias_V)


def _from_powers(chunk: Any, *, U_VD: jax.Array, spec: _Spec, product: ExpProduct) -> _Gradients:
    """Without logits: `product` leaves exp(logit - c) in the dtype of h, 0 for the target, and its sums.

    c is the target's logit + _SHIFT: a maximum would have to be found first. What float32 cannot hold then is below
    exp(-47) of the target's own. The target's part of both gradients is added apart, unrounded.
    """
    h_CD, target_C, weight_C = chunk
    wide, tensor = weight_C.dtype, spec.layout.names("tensor")
    row_C = own_rows(target_C, len(U_VD), tensor)
    row_CD = U_VD.at[row_C].get(mode="fill", fill_value=0).astype(wide)
    target_logit_C = _across(jax.lax.psum, jnp.sum(h_CD.astype(wide) * row_CD, axis=-1), tensor)
    power_CV, others_C, shift_C = product(h_CD, U_VD, target_logit_C + _SHIFT, row_C, tensor)
    target_power_C = jnp.exp(target_logit_C - shift_C)
    sum_C = _across(jax.lax.psum, others_C, tensor) + target_power_C
    log_sum_C = jnp.log(sum_C) + shift_C
    loss_C = log_sum_C - target_logit_C + spec.z_loss * jnp.square(log_sum_C)
    rate_C = weight_C * (1 + 2 * spec.z_loss * log_sum_C) / sum_C
    d_target_C = rate_C * target_power_C - weight_C
    dh_CD = rate_C[:, None] * jnp.matmul(power_CV, U_VD, preferred_element_type=wide) + d_target_C[:, None] * row_CD
    h_CD = (rate_C[:, None] * h_CD).astype(h_CD.dtype)
    return _Gradients(jnp.sum(weight_C * loss_C), power_CV, h_CD, dh_CD, d_target_C, None)


def _in_two_passes(logit_CV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest logit of each token [C], and the sum of exp(logit - largest)."""
    most_C = logit_CV.max(axis=-1)
    return most_C, jnp.exp(logit_CV - most_C[:, None]).sum(axis=-1)


def _in_one_pass(logit_CV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same, the sum corrected whenever the maximum grows (arXiv 1805.02867): logits are read from memory once."""

    def add(left: Any, right: Any) -> Any:
        (most, total), (other_most, other_total) = left, right
        larger = jnp.maximum(most, other_most)
        return larger, total * jnp.exp(most - larger) + other_total * jnp.exp(other_most - larger)

    dtype = logit_CV.dtype
    nothing = (jnp.finfo(dtype).min.astype(dtype), jnp.zeros((), dtype))
    most_C, sum_C = jax.lax.reduce((logit_CV, jnp.ones_like(logit_CV)), nothing, add, (1,))
    return most_C, sum_C
