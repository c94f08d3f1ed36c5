"""Batches as a pure function of (seed, step), the same for any number of processes. The only file that knows Grain."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from tiedjax.data.prepared import Prepared
from tiedjax.errors import UserError

Half = Literal["even", "odd"]  # of the held-out windows: what chooses between options, and what reports on the choice
HALVES: tuple[Half, ...] = get_args(Half)


class Batches:
    """This process's rows of every global training batch.

    The windows of epoch after epoch, each epoch in an order of its own drawn from `seed`, form one endless sequence;
    batch `step` is its items step * batch_size ... (step + 1) * batch_size - 1. `rows` selects what this process needs
    of each batch; together the processes have all of it. UserError where an epoch holds less than one batch, or where
    nothing was held out for evaluation.
    """

    def __init__(
        self,
        prepared: Prepared,
        seq_len: int,
        batch_size: int,
        seed: int,
        rows: slice | None = None,
        workers: int | None = None,
    ) -> None:
        if not 0 <= seed < 2**32:
            raise UserError(f"train.seed: must be 0 .. {2**32 - 1} to order the data, got {seed}")
        self._windows = prepared.windows("train", seq_len)
        prepared.windows("eval", seq_len)  # fails now rather than at the first evaluation
        count = len(self._windows)
        if count < batch_size:
            raise UserError(
                f"data.batch_size: {batch_size} is more than the {count} training windows of {seq_len + 1} tokens in "
                f"{prepared.source}; lower it or give more text"
            )
        self._batch_size = batch_size
        self._rows = range(*(rows or slice(None)).indices(batch_size))
        self._workers = workers or os.cpu_count() or 1
        self._order = _Order(count, seed)
        self.fingerprint: dict[str, str | int | list[int]] = {
            "data": prepared.fingerprint,
            "seq_len": seq_len,
            "batch_size": batch_size,
            "seed": seed,
            "windows": count,
            "first_windows": self._order.windows(range(min(count, 8))),  # notices another shuffle in Grain
        }

    def at(self, step: int) -> npt.NDArray[np.int32]:
        """This process's rows of batch `step` (0 is the first): int32 [rows, T + 1]."""
        first = step * self._batch_size
        return self._windows.read(self._order.windows(first + row for row in self._rows))

    def windows(self, step: int) -> list[int]:
        """The numbers of the training windows of batch `step` (0 is the first), row by row of the global batch."""
        first = step * self._batch_size
        return self._order.windows(range(first, first + self._batch_size))

    def iterate(self, start_step: int = 0) -> Iterator[npt.NDArray[np.int32]]:
        """at(start_step), at(start_step + 1), ... without end, read ahead by background threads."""
        import grain

        steps = grain.MapDataset.range(start_step, sys.maxsize)
        ahead = grain.ReadOptions(num_threads=self._workers, prefetch_buffer_size=max(8, 2 * self._workers))
        return iter(steps.map(self.at).to_iter_dataset(ahead))


class _Order:
    """Epoch after epoch of the windows 0 .. count - 1, each in an order of its own, computed place by place.

    It is the order of `grain.MapDataset.range(count).seed(seed).shuffle().repeat()`, without the cost of asking such a
    dataset for one number at a time, which is above that of reading a short window.
    """

    def __init__(self, count: int, seed: int):
        from grain.experimental import index_shuffle

        self._count, self._permuted = count, partial(index_shuffle, max_index=count - 1, rounds=4)
        self._seed = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])  # 1: shuffle() comes next after seed()

    def windows(self, places: Iterable[int]) -> list[int]:
        """The windows at these places of the endless sequence."""
        windows = []
        for place in places:
            epoch, index = divmod(place, self._count)
            windows.append(self._permuted(index, seed=(self._seed + epoch) % 2**32))
        return windows


def eval_batches(
    prepared: Prepared, seq_len: int, batch_size: int, rows: slice | None = None, limit: int | None = None
) -> Iterator[tuple[Half, npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
    """Every held-out window once: (half, tokens int32 [rows, T + 1], weights float32 [rows]) per batch.

    First the windows with even numbers, then those with odd ones, each half in order. `rows` selects this process's
    share of each batch of batch_size; all processes get equally many batches. The last batch of a half is filled up
    with rows of weight 0. Only the first `limit` * batch_size windows, if given.
    """
    windows = prepared.windows("eval", seq_len)
    count = len(windows) if limit is None else min(len(windows), limit * batch_size)
    selected = np.arange(batch_size)[rows or slice(None)]
    for half, places in zip(HALVES, (range(0, count, 2), range(1, count, 2)), strict=True):
        for first in range(0, len(places), batch_size):
            wanted = first + selected
            tokens = windows.read(np.asarray(places)[np.minimum(wanted, len(places) - 1)])
            yield half, tokens, (wanted < len(places)).astype(np.float32)
