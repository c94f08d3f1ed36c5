"""exp(h U^T - c) with its sums on Hopper GPUs: one kernel from the operands to what the loss needs of the logits.

Axes: C tokens, V rows of the table, D width, R tiles of rows of the table.

A block keeps one multiprocessor busy for the whole product. Its last warpgroup copies tiles of both operands to shared
memory, a few steps ahead; each of the others multiplies its own tokens by the rows of the tile, takes exp where the
sums lie, in registers, and writes the result once, in the operands' dtype. The logits never reach the GPU's memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tiedjax.sharding import Layout

# (h [C, D], U [V, D], shift [C], ids [C], tensor) -> exp(h U^T - shift) [C, V], its sums [C], the shifts [C]
ExpProduct = Callable[
    [jax.Array, jax.Array, jax.Array, jax.Array, tuple[str, ...]], tuple[jax.Array, jax.Array, jax.Array]
]

# Of seven kinds of tile on one H100 the fastest at widths 384, 1024 and 2048, with 4,096 tokens and 50,304 rows: 461,
# 600 and 677 TFLOP/s, where cuBLAS, which writes logits in bfloat16, reached 609, 747 and 781.
_TOKENS, _ROWS, _WIDTH = 64, 192, 64  # of a warpgroup's tile; columns that a step multiplies
_WARPGROUPS, _STEPS = 2, 4  # that multiply; steps whose operands are in shared memory
_COLUMNS = 64  # of the result that are written at a time
_FAR = 75.0  # nats: so many rows of exp(_FAR) as there are tokens in any vocabulary have a sum within float32
_LOG2_E = math.log2(math.e)


def kernel_for(layout: Layout, dtype: Any, tokens: int, table: tuple[int, ...]) -> ExpProduct | None:
    """The kernel for this many tokens and a table of this shape on one of the layout's devices; None if it has none.

    It needs compute capability 9.0, jax 0.11 (whose interface to such GPUs it uses), bfloat16 operands, and shapes
    that its tiles divide.
    """
    rows, width = table
    divided = tokens % (_WARPGROUPS * _TOKENS) == rows % _ROWS == width % _WIDTH == 0
    if layout.cuda != 9.0 or jax.__version_info__ < (0, 11) or dtype != jnp.bfloat16 or not divided:
        return None
    cores = layout.device.core_count
    return lambda *operands: exp_product(*operands, cores=cores)


def exp_product(
    h_CD: jax.Array,
    U_VD: jax.Array,
    shift_C: jax.Array,
    ids_C: jax.Array,
    tensor: tuple[str, ...] = (),
    *,
    cores: int,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """exp(h U^T - shift) [C, V] in the dtype of h, 0 at each token's id, its float32 sums before rounding [C], and the
    shifts [C].

    These are the given ones, but the token's largest logit where that lies more than _FAR above: then the kernel runs
    once more. With rows spread over the mesh axes `tensor` the largest is that of all. An id outside the table masks
    nothing. `cores` is the number of the GPU's multiprocessors; `interpret` the parameters of Pallas's interpreter, for
    tests without a GPU.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu

    gpu: Any = mosaic_gpu  # its interface is that of jax 0.11, whatever is installed where types are checked

    (C, D), V = h_CD.shape, len(U_VD)
    block_tokens = _WARPGROUPS * _TOKENS
    token_tiles, row_tiles, steps = C // block_tokens, V // _ROWS, D // _WIDTH
    per_token = gpu.Layout.WGMMA.reduce(1)

    def kernel(
        h_ref: Any,
        U_ref: Any,
        shift_ref: Any,
        ids_ref: Any,
        needed_ref: Any,
        power_ref: Any,
        sum_ref: Any,
        most_ref: Any,
        h_smem: Any,
        U_smem: Any,
        power_smem: Any,
        sum_smem: Any,
        most_smem: Any,
        copied: Any,
        multiplied: Any,
    ) -> None:
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        tiles = lax.div(token_tiles * row_tiles - block + cores - 1, cores)

        def place(tile: Any) -> tuple[Any, Any]:
            """Blocks that run at one time share rows of the table."""
            index = block + tile * cores
            return lax.rem(index, token_tiles), lax.div(index, token_tiles)

        slot: Callable[[Any], Any] = lambda step: lax.rem(step, _STEPS)
        needed = needed_ref[0] > 0

        @pl.when(needed & (warpgroup == _WARPGROUPS))
        def _copy() -> None:
            gpu.set_max_registers(40, action="decrease")

            @pl.loop(0, tiles * steps)
            def _(step: Any) -> None:
                token_tile, row_tile = place(lax.div(step, steps))
                columns = pl.ds(lax.rem(step, steps) * _WIDTH, _WIDTH)
                pl.when(step >= _STEPS)(lambda: gpu.barrier_wait(multiplied.at[slot(step)]))
                h = h_ref.at[pl.ds(token_tile * block_tokens, block_tokens), columns]
                U = U_ref.at[pl.ds(row_tile * _ROWS, _ROWS), columns]
                gpu.copy_gmem_to_smem(h, h_smem.at[slot(step)], copied.at[slot(step)])
                gpu.copy_gmem_to_smem(U, U_smem.at[slot(step)], copied.at[slot(step)])

            # A barrier may be left only when everyone has seen its last use.
            @pl.loop(lax.max(tiles * steps - _STEPS, 0), tiles * steps)
            def _(step: Any) -> None:
                gpu.barrier_wait(multiplied.at[slot(step)])

        @pl.when(needed & (warpgroup < _WARPGROUPS))
        def _compute() -> None:
            gpu.set_max_registers(232, action="increase")

            @pl.loop(0, tiles)
            def _(tile: Any) -> None:
                token_tile, row_tile = place(tile)
                tokens = pl.ds(token_tile * block_tokens + warpgroup * _TOKENS, _TOKENS)
                shift = gpu.load(shift_ref.at[tokens], layout=per_token, optimized=False)
                ids = gpu.load(ids_ref.at[tokens], layout=per_token, optimized=False)

                def product(logit: Any) -> Any:
                    for i in range(steps):
                        now = slot(tile * steps + i)
                        gpu.barrier_wait(copied.at[now])
                        h = h_smem.at[now, pl.ds(warpgroup * _TOKENS, _TOKENS)]
                        gpu.wgmma(logit, h, U_smem.at[now].transpose((1, 0)))
                        if i:  # the product before this one is done: its operands may be overwritten
                            gpu.wgmma_wait(1)
                            gpu.barrier_arrive(multiplied.at[slot(tile * steps + i - 1)])
                    return logit[...]

                logit = pl.run_scoped(product, gpu.ACC((_TOKENS, _ROWS), jnp.float32))
                gpu.barrier_arrive(multiplied.at[slot(tile * steps + steps - 1)])
                # Before anything else: logits that are needed once more after exp leave the registers for memory.
                gpu.wait_smem_to_gmem(0, wait_read_only=True)
                most_smem[warpgroup] = logit.max(axis=1)
                across: Callable[[Any], Any] = lambda x: lax.broadcast_in_dim(x, logit.shape, (0,))
                power = jnp.exp2(logit * _LOG2_E - across(shift))
                row = gpu.broadcasted_iota(jnp.int32, logit.shape, 1, layout=gpu.Layout.WGMMA)
                power = jnp.where(row == across(ids - row_tile * _ROWS), 0.0, power)
                narrow = power.astype(power_ref.dtype)
                sum_smem[warpgroup] = power.sum(axis=1)
                for i in range(_ROWS // _COLUMNS):
                    gpu.wait_smem_to_gmem(1, wait_read_only=True)
                    power_smem[warpgroup, i % 2] = narrow[:, i * _COLUMNS : (i + 1) * _COLUMNS]
                    gpu.commit_smem()
                    columns = pl.ds(row_tile * _ROWS + i * _COLUMNS, _COLUMNS)
                    gpu.copy_smem_to_gmem(power_smem.at[warpgroup, i % 2], power_ref.at[tokens, columns])
                gpu.copy_smem_to_gmem(sum_smem.at[warpgroup], sum_ref.at[row_tile, tokens])
                gpu.copy_smem_to_gmem(most_smem.at[warpgroup], most_ref.at[row_tile, tokens])

            gpu.wait_smem_to_gmem(0)

    tiled = (gpu.TilingTransform((8, 64)), gpu.SwizzleTransform(128))
    launch = functools.partial(
        gpu.kernel,
        kernel,
        scratch_types=(
            gpu.SMEM((_STEPS, block_tokens, _WIDTH), h_CD.dtype, transforms=tiled),
            gpu.SMEM((_STEPS, _ROWS, _WIDTH), h_CD.dtype, transforms=tiled),
            gpu.SMEM((_WARPGROUPS, 2, _TOKENS, _COLUMNS), h_CD.dtype, transforms=tiled),
            gpu.SMEM((_WARPGROUPS, _TOKENS), jnp.float32),
            gpu.SMEM((_WARPGROUPS, _TOKENS), jnp.float32),
            gpu.Barrier(num_arrivals=2, num_barriers=_STEPS),
            gpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_STEPS),
        ),
        grid=(cores,),
        grid_names=("block",),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=gpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    per_tile = jax.ShapeDtypeStruct((row_tiles, C), jnp.float32)
    first = launch(out_type=(jax.ShapeDtypeStruct((C, V), h_CD.dtype), per_tile, per_tile))
    results = first(h_CD, U_VD, shift_C * _LOG2_E, ids_C, jnp.ones(1, jnp.int32))
    most_C = results[-1].max(axis=0)
    most_C = lax.pmax(most_C, tensor) if tensor else most_C
    far_C = most_C - shift_C > _FAR
    shift_C = jnp.where(far_C, most_C, shift_C)
    # A kernel that has nothing to do ends at once; a branch of the program would make the host wait for the GPU.
    refs = [jax.new_ref(result) for result in results]
    launch()(h_CD, U_VD, shift_C * _LOG2_E, ids_C, far_C.any()[None].astype(jnp.int32), *refs)
    power_CV, sum_RC, _ = (jax.freeze(ref) for ref in refs)
    return power_CV, sum_RC.sum(axis=0), shift_C
