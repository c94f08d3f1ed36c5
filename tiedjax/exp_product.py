"""exp(h U^T - c) with its sums on Hopper GPUs: one kernel from the operands to what the loss needs of the logits.

Axes: C tokens, V rows of the table, D width, R tiles of rows of the table.

A block keeps one multiprocessor busy for the whole product. Its last warpgroup copies tiles of both operands to shared
memory, a few steps ahead; each of the others multiplies its own tokens by the rows of the tile, takes exp where the
sums lie, in registers, and writes the result once, in the operands' dtype. The logits never reach the GPU's memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
_BLOCK_TOKENS = _WARPGROUPS * _TOKENS
_COLUMNS = 64  # of the result that are written at a time
_FAR = 75.0  # nats: so many rows of exp(_FAR) as there are tokens in any vocabulary have a sum within float32
_LOG2_E = math.log2(math.e)


def kernel_for(layout: Layout, dtype: Any, tokens: int, table: tuple[int, ...]) -> ExpProduct | None:
    """The kernel for this many tokens and a table of this shape on one of the layout's devices; None if it has none.

    It needs compute capability 9.0, jax 0.11 (whose interface to such GPUs it uses), bfloat16 operands, and shapes
    that its tiles divide.
    """
    rows, width = table
    divided = tokens % _BLOCK_TOKENS == rows % _ROWS == width % _WIDTH == 0
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
    program = _Program(h_CD.shape, len(U_VD), cores)
    results = program.launch(h_CD.dtype, interpret, new_results=True)(
        h_CD, U_VD, shift_C * _LOG2_E, ids_C, jnp.ones(1, jnp.int32)
    )
    most_C = results[-1].max(axis=0)
    most_C = lax.pmax(most_C, tensor) if tensor else most_C
    far_C = most_C - shift_C > _FAR
    shift_C = jnp.where(far_C, most_C, shift_C)
    # A kernel that has nothing to do ends at once; a branch of the program would make the host wait for the GPU.
    refs = [jax.new_ref(result) for result in results]
    program.launch(h_CD.dtype, interpret, new_results=False)(
        h_CD, U_VD, shift_C * _LOG2_E, ids_C, far_C.any()[None].astype(jnp.int32), *refs
    )
    power_CV, sum_RC, _ = (jax.freeze(ref) for ref in refs)
    return power_CV, sum_RC.sum(axis=0), shift_C


class _Operands(NamedTuple):
    """In the GPU's memory: h [C, D], U [V, D], shift [C] as exponents of 2, ids [C], and [1]: is there work?"""

    h: Any
    U: Any
    shift: Any
    ids: Any
    needed: Any


class _Results(NamedTuple):
    """In the GPU's memory: powers [C, V], and for each tile of rows the tokens' sums and largest logits [R, C]."""

    power: Any
    sum: Any
    most: Any


class _Shared(NamedTuple):
    """A block's shared memory: operands of _STEPS steps; results of each warpgroup on their way out, powers twice.

    A step's barrier `copied` opens when both operands are there, `multiplied` when all warpgroups are done with them.
    """

    h: Any
    U: Any
    power: Any
    sum: Any
    most: Any
    copied: Any
    multiplied: Any


class _Program:
    """What every block runs: its share of the tiles of h [C, D] by `rows` rows of the table."""

    def __init__(self, h_shape: tuple[int, ...], rows: int, cores: int):
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu

        self._pl: Any = pl
        self._gpu: Any = mosaic_gpu  # its interface is that of jax 0.11, whatever is installed where types are checked
        self._tokens, width = h_shape
        self._rows, self._cores = rows, cores
        self._token_tiles, self._row_tiles = self._tokens // _BLOCK_TOKENS, rows // _ROWS
        self._steps = width // _WIDTH

    def launch(self, dtype: Any, interpret: Any, *, new_results: bool) -> Any:
        """The kernel as a function of `_Operands`; without new results it is given refs of `_Results` to write to."""
        gpu = self._gpu
        out_type: dict[str, Any] = {}
        if new_results:
            per_tile = jax.ShapeDtypeStruct((self._row_tiles, self._tokens), jnp.float32)
            power = jax.ShapeDtypeStruct((self._tokens, self._rows), dtype)
            out_type["out_type"] = _Results(power, per_tile, per_tile)
        tiled = (gpu.TilingTransform((8, 64)), gpu.SwizzleTransform(128))
        return gpu.kernel(
            self.kernel,
            **out_type,
            scratch_types=_Shared(
                h=gpu.SMEM((_STEPS, _BLOCK_TOKENS, _WIDTH), dtype, transforms=tiled),
                U=gpu.SMEM((_STEPS, _ROWS, _WIDTH), dtype, transforms=tiled),
                power=gpu.SMEM((_WARPGROUPS, 2, _TOKENS, _COLUMNS), dtype, transforms=tiled),
                sum=gpu.SMEM((_WARPGROUPS, _TOKENS), jnp.float32),
                most=gpu.SMEM((_WARPGROUPS, _TOKENS), jnp.float32),
                copied=gpu.Barrier(num_arrivals=2, num_barriers=_STEPS),
                multiplied=gpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_STEPS),
            ),
            grid=(self._cores,),
            grid_names=("block",),
            num_threads=_WARPGROUPS + 1,
            thread_name="warpgroup",
            compiler_params=gpu.CompilerParams(approx_math=True),
            interpret=interpret,
        )

    def kernel(self, *refs: Any) -> None:
        """One block: the last warpgroup copies, the others multiply."""
        operands, results, shared = _Operands(*refs[:5]), _Results(*refs[5:8]), _Shared(*refs[8:])
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        tiles = lax.div(self._token_tiles * self._row_tiles - block + self._cores - 1, self._cores)
        needed = operands.needed[0] > 0

        def compute() -> None:
            self._gpu.set_max_registers(232, action="increase")
            self._pl.loop(0, tiles)(lambda tile: self._multiply(block, warpgroup, tile, operands, results, shared))
            self._gpu.wait_smem_to_gmem(0)

        copy = lambda: self._copy(block, tiles, operands, shared)
        self._pl.when(needed & (warpgroup == _WARPGROUPS))(copy)
        self._pl.when(needed & (warpgroup < _WARPGROUPS))(compute)

    def _place(self, block: Any, tile: Any) -> tuple[Any, Any]:
        """The tile of tokens and the tile of rows of a block's tile: blocks that run at one time share rows."""
        index = block + tile * self._cores
        return lax.rem(index, self._token_tiles), lax.div(index, self._token_tiles)

    def _copy(self, block: Any, tiles: Any, operands: _Operands, shared: _Shared) -> None:
        """Brings the operands of every step of every tile to shared memory, up to _STEPS steps ahead."""
        pl, gpu, steps = self._pl, self._gpu, self._steps

        def bring(step: Any) -> None:
            token_tile, row_tile = self._place(block, lax.div(step, steps))
            columns = pl.ds(lax.rem(step, steps) * _WIDTH, _WIDTH)
            pl.when(step >= _STEPS)(lambda: gpu.barrier_wait(shared.multiplied.at[_slot(step)]))
            h = operands.h.at[pl.ds(token_tile * _BLOCK_TOKENS, _BLOCK_TOKENS), columns]
            U = operands.U.at[pl.ds(row_tile * _ROWS, _ROWS), columns]
            gpu.copy_gmem_to_smem(h, shared.h.at[_slot(step)], shared.copied.at[_slot(step)])
            gpu.copy_gmem_to_smem(U, shared.U.at[_slot(step)], shared.copied.at[_slot(step)])

        gpu.set_max_registers(40, action="decrease")
        pl.loop(0, tiles * steps)(bring)
        # A barrier may be left only when everyone has seen its last use.
        last = pl.loop(lax.max(tiles * steps - _STEPS, 0), tiles * steps)
        last(lambda step: gpu.barrier_wait(shared.multiplied.at[_slot(step)]))

    def _multiply(
        self, block: Any, warpgroup: Any, tile: Any, operands: _Operands, results: _Results, shared: _Shared
    ) -> None:
        """A warpgroup's part of a tile, from its logits to the results."""
        gpu = self._gpu
        per_token = gpu.Layout.WGMMA.reduce(1)
        token_tile, row_tile = self._place(block, tile)
        tokens = self._pl.ds(token_tile * _BLOCK_TOKENS + warpgroup * _TOKENS, _TOKENS)
        shift = gpu.load(operands.shift.at[tokens], layout=per_token, optimized=False)
        ids = gpu.load(operands.ids.at[tokens], layout=per_token, optimized=False)
        logit = self._logits(warpgroup, tile, shared)
        # Before anything else: logits that are needed once more after exp leave the registers for memory.
        gpu.wait_smem_to_gmem(0, wait_read_only=True)
        shared.most[warpgroup] = logit.max(axis=1)
        power = jnp.exp2(logit * _LOG2_E - _across(shift))
        row = gpu.broadcasted_iota(jnp.int32, logit.shape, 1, layout=gpu.Layout.WGMMA)
        power = jnp.where(row == _across(ids - row_tile * _ROWS), 0.0, power)
        self._write(warpgroup, tokens, row_tile, power, results, shared)

    def _logits(self, warpgroup: Any, tile: Any, shared: _Shared) -> Any:
        """h U^T of a warpgroup's tokens and a tile's rows, in registers; frees each step's operands as it goes."""
        gpu, first = self._gpu, tile * self._steps

        def product(logit: Any) -> Any:
            for i in range(self._steps):
                now = _slot(first + i)
                gpu.barrier_wait(shared.copied.at[now])
                h = shared.h.at[now, self._pl.ds(warpgroup * _TOKENS, _TOKENS)]
                gpu.wgmma(logit, h, shared.U.at[now].transpose((1, 0)))
                if i:  # the product before this one is done: its operands may be overwritten
                    gpu.wgmma_wait(1)
                    gpu.barrier_arrive(shared.multiplied.at[_slot(first + i - 1)])
            return logit[...]

        logit = self._pl.run_scoped(product, gpu.ACC((_TOKENS, _ROWS), jnp.float32))
        gpu.barrier_arrive(shared.multiplied.at[_slot(first + self._steps - 1)])
        return logit

    def _write(
        self, warpgroup: Any, tokens: Any, row_tile: Any, power: Any, results: _Results, shared: _Shared
    ) -> None:
        """Sends the powers, their sums and the largest logits, which are in shared memory already, on their way out."""
        pl, gpu = self._pl, self._gpu
        narrow = power.astype(results.power.dtype)
        shared.sum[warpgroup] = power.sum(axis=1)
        for i in range(_ROWS // _COLUMNS):
            gpu.wait_smem_to_gmem(1, wait_read_only=True)
            shared.power[warpgroup, i % 2] = narrow[:, i * _COLUMNS : (i + 1) * _COLUMNS]
            gpu.commit_smem()
            columns = pl.ds(row_tile * _ROWS + i * _COLUMNS, _COLUMNS)
            gpu.copy_smem_to_gmem(shared.power.at[warpgroup, i % 2], results.power.at[tokens, columns])
        gpu.copy_smem_to_gmem(shared.sum.at[warpgroup], results.sum.at[row_tile, tokens])
        gpu.copy_smem_to_gmem(shared.most.at[warpgroup], results.most.at[row_tile, tokens])


def _slot(step: Any) -> Any:
    """The place in shared memory of a step's operands."""
    return lax.rem(step, _STEPS)


def _across(per_token: Any) -> Any:
    """A tile whose columns are all this one."""
    return lax.broadcast_in_dim(per_token, (_TOKENS, _ROWS), (0,))
