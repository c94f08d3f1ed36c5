"""The input role of a table: tokens looked up, and the gradient that reaches the table from there.

Axes: B batch, T position, N = B T, V rows of the table, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tiedjax.errors import UserError
from tiedjax.sharding import ONE_DEVICE, Layout

# ([N, D] of N tokens, their ids from 0 to rows, rows) -> [rows, D]; the id `rows` is dropped.
RowSums = Callable[[jax.Array, jax.Array, int], jax.Array]


@jax.named_scope("lookup")
def lookup(
    E_VD: jax.Array,
    tokens_BT: jax.Array,
    dtype: Any,
    tap: jax.Array | None = None,
    *,
    layout: Layout = ONE_DEVICE,
    gradient: str = "auto",
) -> jax.Array:
    """The tokens' rows, [B, T, D] in `dtype`; an id outside the table gives NaN, so that it cannot pass unseen.

    The gradient with respect to E_VD is accumulated in E_VD's own float32, by the method that `gradient` names: see
    `row_sums`. `tap` is a float32 zero that the forward pass never reads; its gradient is the sum of squares of the
    gradient of what is returned. None observes nothing.
    """
    return _lookup(E_VD, wide_ids(tokens_BT), tap, dtype, layout, row_sums(gradient, layout.platform))


def sums_by_token(
    x_BTD: jax.Array, tokens_BT: jax.Array, E_VD: jax.Array, *, layout: Layout = ONE_DEVICE, gradient: str = "auto"
) -> jax.Array:
    """The sums of x over the places of each token, [V, D] with the dtype and the layout of a table E_VD.

    Ids outside the table are left out. `gradient` names the method of summing: see `row_sums`.
    """
    return _table_gradient(x_BTD, wide_ids(tokens_BT), E_VD, layout, row_sums(gradient, layout.platform))


def wide_ids(tokens_BT: jax.Array) -> jax.Array:
    """Ids that can be compared with the number of rows, which uint8 or uint16 may not hold."""
    ids_BT = jnp.asarray(tokens_BT)
    return ids_BT.astype(jnp.int32) if ids_BT.dtype.itemsize < 4 else ids_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _lookup(
    E_VD: jax.Array, tokens_BT: jax.Array, tap: jax.Array | None, dtype: Any, layout: Layout, method: Any
) -> jax.Array:
    return _rows(E_VD, tokens_BT, dtype, layout)


def _forward(
    E_VD: jax.Array, tokens_BT: jax.Array, tap: jax.Array | None, dtype: Any, layout: Layout, method: Any
) -> tuple[jax.Array, Any]:
    return _rows(E_VD, tokens_BT, dtype, layout), (E_VD, tokens_BT, tap)


def _backward(dtype: Any, layout: Layout, method: Any, residuals: Any, dx_BTD: jax.Array) -> tuple[Any, None, Any]:
    E_VD, tokens_BT, tap = residuals
    square = None if tap is None else jnp.sum(jnp.square(dx_BTD.astype(tap.dtype)))
    dE_VD = _table_gradient(dx_BTD, tokens_BT, E_VD, layout, method)
    # Unless it is kept whole, XLA may scatter into the output role's gradient when nobody looks at the parts: other
    # rounding.
    return jax.lax.optimization_barrier(dE_VD), None, square


_lookup.defvjp(_forward, _backward)

# Every device holds some rows (`tensor`) and some columns (`fsdp`) of the table. It looks up, in its part, the tokens
# of all devices that share its `data` index, and the devices then exchange columns for tokens. The table itself never
# moves, and its gradient needs no sum over `fsdp`.
_TABLE, _TOKENS, _STATES = ("vocab", "embed"), ("batch", None), ("batch", None, None)


def _rows(E_VD: jax.Array, tokens_BT: jax.Array, dtype: Any, layout: Layout) -> jax.Array:
    fsdp, tensor, V = layout.names("fsdp"), layout.names("tensor"), len(E_VD)

    def local(E_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        row_BT = own_rows(_shared(tokens_BT, fsdp), len(E_VD), tensor)
        x_BTD = jnp.take(E_VD, row_BT, axis=0, mode="fill", fill_value=0).astype(dtype)
        if tensor:  # a row is on one of these devices: the others add zeros
            x_BTD = jax.lax.psum(x_BTD, tensor)
        if fsdp:
            x_BTD = jax.lax.all_to_all(x_BTD, fsdp, 0, 2, tiled=True)
        inside_BT = (tokens_BT >= 0) & (tokens_BT < V)
        return jnp.where(inside_BT[..., None], x_BTD, jnp.asarray(jnp.nan, dtype))

    return layout.per_device(local, [_TABLE, _TOKENS], _STATES)(E_VD, tokens_BT)


def _table_gradient(dx_BTD: jax.Array, tokens_BT: jax.Array, E_VD: jax.Array, layout: Layout, method: Any) -> jax.Array:
    data, fsdp, tensor = (layout.names(name) for name in ("data", "fsdp", "tensor"))
    rows = len(E_VD) // layout.size("tensor")

    def local(dx_BTD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        if fsdp:
            dx_BTD = jax.lax.all_to_all(dx_BTD, fsdp, 2, 0, tiled=True)
        row_N = own_rows(_shared(tokens_BT, fsdp), rows, tensor).reshape(-1)
        dE_VD: jax.Array = method(dx_BTD.reshape(-1, dx_BTD.shape[-1]).astype(E_VD.dtype), row_N, rows)
        return jax.lax.psum(dE_VD, data) if data else dE_VD

    return layout.per_device(local, [_STATES, _TOKENS], _TABLE)(dx_BTD, tokens_BT)


def _shared(tokens_BT: jax.Array, fsdp: tuple[str, ...]) -> jax.Array:
    """The tokens of all devices along `fsdp`."""
    return jax.lax.all_gather(tokens_BT, fsdp, axis=0, tiled=True) if fsdp else tokens_BT


def own_rows(ids: jax.Array, rows: int, tensor: tuple[str, ...]) -> jax.Array:
    """Ids of the table as those of this device's `rows` of it (it is cut over `tensor`); `rows` if elsewhere."""
    index = ids - rows * jax.lax.axis_index(tensor) if tensor else ids
    return jnp.where((index >= 0) & (index < rows), index, rows)


def _scattered(dx_ND: jax.Array, ids_N: jax.Array, rows: int) -> jax.Array:
    return jnp.zeros((rows, dx_ND.shape[1]), dx_ND.dtype).at[ids_N].add(dx_ND, mode="drop")


def _sorted(dx_ND: jax.Array, ids_N: jax.Array, rows: int) -> jax.Array:
    order_N = jnp.argsort(ids_N)
    return jax.ops.segment_sum(dx_ND[order_N], ids_N[order_N], rows, indices_are_sorted=True)


def _deterministic(dx_ND: jax.Array, ids_N: jax.Array, rows: int) -> jax.Array:
    """Sums of equal ids by a segmented scan; each row is then written once."""
    order_N = jnp.argsort(ids_N)
    ids_N, dx_ND = ids_N[order_N], dx_ND[order_N]
    first_N = jnp.concatenate([jnp.ones((1,), bool), ids_N[1:] != ids_N[:-1]])

    def add(left: Any, right: Any) -> Any:
        (a, a_ND), (b, b_ND) = left, right
        return a | b, jnp.where(b[:, None], b_ND, a_ND + b_ND)

    _, sums_ND = jax.lax.associative_scan(add, (first_N, dx_ND))
    last_N = jnp.concatenate([first_N[1:], jnp.ones((1,), bool)])
    # What is no segment's last goes to a place of its own outside the table.
    target_N = jnp.where(last_N & (ids_N < rows), ids_N, rows + jnp.arange(len(ids_N)))
    start = jnp.zeros((rows, dx_ND.shape[1]), dx_ND.dtype)
    return start.at[target_N].set(sums_ND, mode="drop", unique_indices=True)


def row_sums(method: str, platform: str) -> RowSums:
    """How gradients of tokens are summed into rows.

    "auto" is "sorted" on TPUs, which are slow at scatters, and "scatter" elsewhere. "scatter" is atomic on a GPU, in an
    order that varies; "deterministic" gives the same bits every time.
    """
    if method == "auto":
        method = "sorted" if platform == "tpu" else "scatter"
    methods: dict[str, RowSums] = {"scatter": _scattered, "sorted": _sorted, "deterministic": _deterministic}
    if method not in methods:
        raise UserError(f"gradient: must be auto, {', '.join(list(methods)[:-1])} or deterministic, got {method!r}")
    return methods[method]
