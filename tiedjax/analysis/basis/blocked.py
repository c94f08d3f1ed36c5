"""Tall tables block by block, so that no instrument needs a second copy of one; products on the device that JAX has.

Axes: V rows, D width, B rows of a block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

T = TypeVar("T")

SCANNED = 2**23  # bytes of a block that is read once
MULTIPLIED = 2**25  # of one whose product is added to a large sum, which itself takes a pass
SMALL = 2**22  # numbers of a table for which nothing is worth sharing out or rounding


def row_blocks(rows: int, width: int, itemsize: int = 4, block_bytes: int = SCANNED) -> Iterator[slice]:
    """Slices that cover `rows` rows of `width` numbers, each of at most `block_bytes` (at least one row)."""
    step = max(1, block_bytes // max(1, width * itemsize))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b: float32 on an accelerator at full precision if JAX has one, everything else by NumPy.

    On a CPU NumPy's BLAS is a third faster than XLA's product; accelerators are slow in float64 or lack it.
    """
    if a.dtype != np.float32 or not _accelerated():
        product: np.ndarray = a @ b
        return product
    import jax.numpy as jnp

    return np.asarray(jnp.matmul(a, b, precision="highest"))


def at_once(first: Callable[[], T], second: Callable[[], T]) -> tuple[T, T]:
    """Both results, computed side by side: NumPy lets go of the interpreter while it works."""
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(second)
        return first(), waiting.result()


def in_turn(first: Callable[[], T], second: Callable[[], T]) -> tuple[T, T]:
    """The same results, one after the other: a thread takes longer to start than little work takes."""
    return first(), second()


@contextlib.contextmanager
def few_threads(numbers: int) -> Iterator[None]:
    """One thread for BLAS inside, if the largest table has few numbers: there its threads wait more than they work."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1 if numbers <= SMALL else None, user_api="blas"):
        yield


def column_means(table_VD: np.ndarray) -> np.ndarray:
    """The mean row, float64 [D]."""
    total_D = np.zeros(table_VD.shape[1])
    for block in row_blocks(*table_VD.shape):
        total_D += table_VD[block].sum(axis=0, dtype=np.float64)
    return total_D / max(1, len(table_VD))


def gram(table_VD: np.ndarray, mean_D: np.ndarray | None = None) -> np.ndarray:
    """(X - mean)' (X - mean), float64 [D, D]."""
    width = table_VD.shape[1]
    total_DD = np.zeros((width, width))
    for block in row_blocks(len(table_VD), width, itemsize=8, block_bytes=MULTIPLIED):
        x_BD = np.asarray(table_VD[block], np.float64) - (0.0 if mean_D is None else mean_D)
        total_DD += x_BD.T @ x_BD
    return total_DD


def _accelerated() -> bool:
    import jax

    return jax.default_backend() != "cpu"
