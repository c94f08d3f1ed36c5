"""The k nearest neighbours of every row by cosine, exact and in bounded memory.

A search in float32 finds the k nearest and a few more; where rounding could change who belongs to the k, or their
order where that is asked for, float64 decides. So the answer does not depend on blocks or on the device. Cosines that
agree to 12 digits are equal, and of equals the lowest index comes first. A row of zeros has cosine 0 to everything.

On a CPU each product of two blocks serves both of its sides, and of it only the cosines are kept that exceed a row's
threshold, a rank in a random sample of the columns: a few times as many as are wanted. A row that would keep more than
chance explains is done in float64. Threads share the blocks. On another device `jax.lax.top_k` reads each block.

Axes: V rows, D width, R rows of a block, N candidates of a row, C columns of a block or those above a row's threshold,
or candidates in doubt, U rows of a block whose order is not sure, P a part of any, K nearest, B rows of a block.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tiedjax.errors import UserError

Report = Callable[[str], None]

_BYTES = 1 << 28  # of one temporary
_DEVICE_BYTES = 1 << 30  # of one block of cosines on an accelerator
_ROWS, _COLUMNS = 1024, 4096  # of one product
_NONE = np.float32(-2)  # below every cosine
_DIGITS = 12  # float64 cosines differ by rounding below this


class Neighbours(NamedTuple):
    """Row i's k nearest other rows, nearest first: their indices, int32, and cosines, float32."""

    indices_VK: np.ndarray
    cosines_VK: np.ndarray


def neighbours(table_VD: np.ndarray, k: int, *, ordered: bool = True, report: Report | None = None) -> Neighbours:
    """The k nearest other rows of each row of [V, D] by cosine.

    Not `ordered` they are the same ones, but where only float64 could tell which of two is nearer they stand in any
    order: of wide tables that is nearly every row, and to decide it takes as long as the search.

    Beside the table: its normalised float32 copy, and for each row a few times k cosines with their indices. `report`
    gets a line every few seconds.
    UserError: not [V, D] with D of at least 2, k below 1, or fewer than k other rows.
    """
    if table_VD.ndim != 2 or table_VD.shape[1] < 2:
        raise UserError(f"neighbours: a table must be [V, D] with D of at least 2, got {list(table_VD.shape)}")
    if not 1 <= k < len(table_VD):
        raise UserError(f"neighbours: k must be from 1 to {len(table_VD) - 1}, the number of other rows, got {k}")
    search = _Search(table_VD, k, ordered, report)
    import jax  # here: it takes a while, and only the choice of device needs it

    (search.on_host if jax.default_backend() == "cpu" else search.on_device)()
    return Neighbours(search.indices, search.cosines)


class Searches:
    """Searches that are remembered: a study's tables stand in several pairs, often over the same rows."""

    def __init__(self) -> None:
        # The table is kept beside the answer: while it lives no other can have its id.
        self._answers: dict[tuple[int, bytes, int, bool], tuple[np.ndarray, np.ndarray]] = {}

    def indices(
        self,
        table_VD: np.ndarray,
        kept_V: np.ndarray,
        k: int,
        mean_D: np.ndarray | None = None,
        report: Report | None = None,
    ) -> np.ndarray:
        """The k nearest [rows, k] of each row of the table among those that `kept_V`, boolean [V], keeps, by index.

        With `mean_D` rows are taken about it; a table has one such row for each `kept_V`.
        """
        key = (id(table_VD), kept_V.tobytes(), k, mean_D is not None)
        if key not in self._answers:
            rows_ND = _rows_of(table_VD, kept_V, mean_D)
            nearest_NK = neighbours(rows_ND, k, ordered=False, report=report).indices_VK
            self._answers[key] = table_VD, np.sort(nearest_NK, axis=1)
        return self._answers[key][1]


def _rows_of(table_VD: np.ndarray, kept_V: np.ndarray, mean_D: np.ndarray | None) -> np.ndarray:
    """The rows that count, about the mean if there is one; not copied if that changes nothing."""
    if kept_V.all() and mean_D is None:
        return table_VD
    rows_ND = table_VD[kept_V]
    if mean_D is not None:
        for start, stop in _blocks(len(rows_ND), _BYTES // (8 * rows_ND.shape[1])):
            rows_ND[start:stop] = rows_ND[start:stop] - mean_D
    return rows_ND


class _Search:
    """One search: the table, its rows' lengths, and the answer as it fills up."""

    def __init__(self, table_VD: np.ndarray, k: int, ordered: bool = True, report: Report | None = None):
        self.table, self.k, self.ordered, self.report = table_VD, k, ordered, report
        self.V, D = table_VD.shape
        self.near = min(k + max(8, k // 4), self.V - 1)  # how many float32 finds
        # Four times the probable error of a float32 product, 4 sqrt(D) 2^-24 (Higham and Mary 2019, SIAM J. Sci.
        # Comput. 41), and of the rounding of its factors.
        self.unsure = 4 * (4 * D**0.5 + 4) * 2.0**-24
        self.indices = np.empty((self.V, k), np.int32)
        self.cosines = np.empty((self.V, k), np.float32)
        self.peak, self.length = np.empty(self.V), np.empty(self.V)
        for start, stop in _blocks(self.V, _BYTES // (16 * D)):
            block_BD = np.asarray(table_VD[start:stop], np.float64)
            peak_B = np.abs(block_BD).max(axis=1)
            peak_B[peak_B == 0] = 1
            block_BD = block_BD / peak_B[:, None]
            length_B = np.sqrt(np.einsum("vd,vd->v", block_BD, block_BD))
            length_B[length_B == 0] = 1
            self.peak[start:stop], self.length[start:stop] = peak_B, length_B
        self._start_time = self._report_time = time.monotonic()

    def unit(self, index: Any) -> np.ndarray:
        """The rows of those indices with length 1, float64."""
        # By the largest entry first: its square always is a float.
        return np.asarray(self.table[index], np.float64) / self.peak[index][..., None] / self.length[index][..., None]

    def units(self, order_V: np.ndarray) -> np.ndarray:
        """All rows in that order with length 1, float32."""
        unit_VD = np.empty(self.table.shape, np.float32)
        for start, stop in _blocks(self.V, _BYTES // (24 * self.table.shape[1])):
            unit_VD[start:stop] = self.unit(order_V[start:stop])
        return unit_VD

    def on_host(self) -> None:
        """Finds every row's nearest by NumPy."""
        from threadpoolctl import threadpool_info, threadpool_limits

        # As many threads as BLAS has; each of its calls then keeps to the thread that makes it.
        workers = max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as threads:
            above = self._above_thresholds(threads)
            for stop in threads.map(partial(self._settle_above, *above), _blocks(self.V, _COLUMNS)):
                self._report_progress(0.9 + 0.1 * stop / self.V)

    def _above_thresholds(self, threads: ThreadPoolExecutor) -> tuple[Any, np.ndarray]:
        """Of each row the cosines above its threshold, itself not counted: csr float32 [V, V].

        And the rows, boolean [V], of which some were left out because there were too many. The threshold is so low a
        rank of a random sample of columns that fewer than `near` lie above it once in a million rows without equals.
        """
        from scipy.sparse import coo_array

        order_V = np.random.default_rng(0).permutation(self.V).astype(np.int32)  # its first ones are the sample
        unit_VD = self.units(order_V)
        sample = min(_COLUMNS, self.V)
        expected = self.near * sample / self.V  # of the `near` nearest in the sample, about Poisson
        rank = min(self.near, math.ceil(expected + 5 * expected**0.5 + 2), sample - 1)
        # So many lie above it by chance in fewer than one row of a million. Where the same product comes out with other
        # last bits in other blocks, all of a row's equals may: of 20,000 copies that were 4.8 GB.
        most = 4 * (rank + 1) * self.V / sample
        threshold_V, kept_V = np.empty(self.V, np.float32), np.zeros(self.V, np.int64)

        def keep(rows: slice, row: np.ndarray) -> None:
            """Counts what was kept of those rows; nothing more is kept of one that has too many."""
            # Another thread may count the same rows meanwhile: then a row is found to have too many somewhat later.
            kept_V[rows] += np.bincount(row, minlength=rows.stop - rows.start)
            threshold_V[rows][kept_V[rows] > most] = np.inf

        def above(block: tuple[int, int, int, int]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
            """(row, other, cosine) in one product of two blocks, above the rows' thresholds and above the columns'."""
            top, bottom, left, right = block
            cosines_RC = unit_VD[top:bottom] @ unit_VD[left:right].T
            on_diagonal = left <= top < right
            if on_diagonal:
                np.fill_diagonal(cosines_RC[:, top - left :], _NONE)
            if left == 0:
                threshold_V[top:bottom] = np.partition(cosines_RC, -1 - rank, axis=1)[:, -1 - rank]
            row, column = _where(cosines_RC > threshold_V[top:bottom, None])
            keep(slice(top, bottom), row)
            sides = [(order_V[top + row], order_V[left + column], cosines_RC[row, column])]
            # The other side of the product: these columns as rows. Those of the sample have blocks of their own with
            # the whole sample, elsewhere on the diagonal it is the same side.
            offset = 0 if not on_diagonal else right - left if left == 0 else bottom - left
            row, column = _where(cosines_RC[:, offset:] > threshold_V[left + offset : right])
            column += offset
            keep(slice(left, right), column)
            return [*sides, (order_V[left + column], order_V[top + row], cosines_RC[row, column])]

        of_sample, below_sample = (
            [(top, bottom, 0, sample) for top, bottom in _blocks(stop, _ROWS, start)]
            for start, stop in ((0, sample), (sample, self.V))
        )
        others = [
            (top, bottom, left, right)
            for top, bottom in _blocks(self.V, _ROWS, sample)
            for left, right in _blocks(self.V, _COLUMNS, top)
        ]
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        # One after the other: each reads the thresholds that those before it have set.
        for blocks, before, share in [(of_sample, 0.0, 0.05), (below_sample, 0.05, 0.1), (others, 0.15, 0.75)]:
            for done, sides in enumerate(threads.map(above, blocks), 1):
                parts += sides
                self._report_progress(before + share * done / len(blocks))
        row, other, cosine = (np.concatenate(part) for part in zip(*parts, strict=True))
        crowded_V = np.empty(self.V, bool)
        crowded_V[order_V] = np.isinf(threshold_V)
        return coo_array((cosine, (row, other)), shape=(self.V, self.V)).tocsr(), crowded_V

    def _settle_above(self, above_VV: Any, crowded_V: np.ndarray, block: tuple[int, int]) -> int:
        """Writes the k nearest of a block of rows, of those above the thresholds; where the block stops."""
        start, stop = block
        count_R = np.diff(above_VV.indptr[start : stop + 1])
        enough_R = (count_R >= self.near) & ~crowded_V[start:stop]
        if enough_R.any():
            rows, count_R = start + np.flatnonzero(enough_R), count_R[enough_R]
            entry_C = np.arange(count_R.max())
            taken_RC = entry_C < count_R[:, None]
            entry_RC = np.where(taken_RC, above_VV.indptr[rows][:, None] + entry_C, 0)
            cosine_RC = np.where(taken_RC, above_VV.data[entry_RC], _NONE)
            near_RN = np.argpartition(cosine_RC, -self.near, axis=1)[:, -self.near :]
            index_RN = above_VV.indices[np.take_along_axis(entry_RC, near_RN, axis=1)]
            self._settle(rows, np.take_along_axis(cosine_RC, near_RN, axis=1), index_RN)
        if not enough_R.all():
            self._whole_rows(start + np.flatnonzero(~enough_R))
        return stop

    def on_device(self) -> None:
        """Finds every row's nearest by JAX."""
        import jax
        import jax.numpy as jnp

        unit_VD = jnp.asarray(self.units(np.arange(self.V)))
        rows = min(self.V, max(1, _DEVICE_BYTES // (4 * self.V)))

        @jax.jit
        def nearest(unit_VD: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
            unit_RD = jax.lax.dynamic_slice_in_dim(unit_VD, start, rows)
            cosines_RV = jnp.matmul(unit_RD, unit_VD.T, precision="highest")
            itself = jnp.arange(self.V)[None, :] == start + jnp.arange(rows)[:, None]
            return jax.lax.top_k(jnp.where(itself, _NONE, cosines_RV), self.near)

        for start, stop in _blocks(self.V, rows):
            first = min(start, self.V - rows)  # every call has the same shape; the last one repeats some rows
            cosines, indices = (np.asarray(part)[start - first :] for part in nearest(unit_VD, first))
            self._settle(np.arange(start, stop), cosines, indices)
            self._report_progress(stop / self.V)

    def _settle(self, row_R: np.ndarray, cosines_RN: np.ndarray, indices_RN: np.ndarray) -> None:
        """Writes the k nearest of what float32 found for these rows."""
        cosines_RN, indices_RN = _sorted(cosines_RN, indices_RN)
        self.indices[row_R], self.cosines[row_R] = indices_RN[:, : self.k], cosines_RN[:, : self.k]
        gap_RK = -np.diff(cosines_RN[:, : self.k + 1])
        if not self.ordered:
            gap_RK = gap_RK[:, self.k - 1 :]  # between the k and the others, if there are any
        unsure_U = np.flatnonzero((gap_RK < self.unsure).any(axis=1))
        if not len(unsure_U):
            return
        row_U, cosines_UN = row_R[unsure_U], cosines_RN[unsure_U]
        exact_UN, indices_UN = self._exact_where_doubtful(row_U, cosines_UN, indices_RN[unsure_U])
        self.indices[row_U], self.cosines[row_U] = indices_UN[:, : self.k], exact_UN[:, : self.k]
        if self.near < self.V - 1:  # else there is none that float32 did not find
            self._whole_rows(row_U[exact_UN[:, self.k - 1] - cosines_UN[:, -1] < self.unsure])

    def _exact_where_doubtful(
        self, row_U: np.ndarray, cosines_UN: np.ndarray, indices_UN: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The candidates of these rows in order again, once float64 has decided where float32 cannot.

        Ordered, all may be in doubt. Else those are that are neither surely above the one after the k nearest nor
        surely below the last of them.
        """
        doubtful_UN = np.ones(cosines_UN.shape, bool)
        if not self.ordered:
            last_U1, next_U1 = cosines_UN[:, self.k - 1, None], cosines_UN[:, self.k, None]
            doubtful_UN = (cosines_UN > last_U1 - self.unsure) & (cosines_UN < next_U1 + self.unsure)
        exact_UN = cosines_UN.astype(np.float64)
        which_C, place_C = _where(doubtful_UN)
        for start, stop in _blocks(len(which_C), _BYTES // (32 * self.table.shape[1])):
            which_P, place_P = which_C[start:stop], place_C[start:stop]
            first = which_P[0]
            row_PD = self.unit(row_U[first : which_P[-1] + 1])[which_P - first]
            other_PD = self.unit(indices_UN[which_P, place_P])
            exact_UN[which_P, place_P] = np.einsum("pd,pd->p", row_PD, other_PD).round(_DIGITS)
        return _sorted(exact_UN, indices_UN)

    def _whole_rows(self, row_U: np.ndarray) -> None:
        """Writes the answer for rows with more near equals than float32 found: every cosine in float64."""
        for start, stop in _blocks(len(row_U), min(_BYTES // (8 * self.V), 512)):
            part_P = row_U[start:stop]
            unit_PD, cosine_PV = self.unit(part_P), np.empty((len(part_P), self.V))
            for left, right in _blocks(self.V, _BYTES // (24 * self.table.shape[1])):
                cosine_PV[:, left:right] = unit_PD @ self.unit(slice(left, right)).T
            np.round(cosine_PV, _DIGITS, out=cosine_PV)
            cosine_PV[np.arange(len(part_P)), part_P] = _NONE
            for row, cosine_V in zip(part_P, cosine_PV, strict=True):
                near_K = np.flatnonzero(cosine_V >= np.partition(cosine_V, -self.k)[-self.k])
                near_K = near_K[np.argsort(-cosine_V[near_K], kind="stable")[: self.k]]
                self.indices[row], self.cosines[row] = near_K, cosine_V[near_K]

    def _report_progress(self, share: float) -> None:
        time_now = time.monotonic()
        if self.report and time_now - self._report_time >= 5:
            self._report_time = time_now
            self.report(f"neighbours of {self.V:,} rows: {share:.0%}, {time_now - self._start_time:.0f} s")


def _sorted(cosines_RN: np.ndarray, indices_RN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row by falling cosine, equals by index."""
    order_RN = np.lexsort((indices_RN, -cosines_RN), axis=1)
    return np.take_along_axis(cosines_RN, order_RN, axis=1), np.take_along_axis(indices_RN, order_RN, axis=1)


def _where(mask_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row and the column of each true entry; on flat indices it takes a fraction of `np.nonzero`'s time."""
    return np.divmod(np.flatnonzero(mask_RC), mask_RC.shape[1] or 1)


def _blocks(n: int, size: int, start: int = 0) -> list[tuple[int, int]]:
    """(start, stop) of the pieces of at most `size` of range(start, n)."""
    size = max(1, size)
    return [(at, min(at + size, n)) for at in range(start, n, size)]
