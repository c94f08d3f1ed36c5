"""The k nearest neighbours of every row by cosine, exact and in bounded memory.

A search in float32 finds the k nearest and a few more; where rounding could change who belongs to the k, or their
order where that is asked for, float64 decides. So the answer does not depend on blocks or on the device. Cosines that
agree to 12 digits are equal, and of equals the lowest index comes first. A row of zeros has cosine 0 to everything.

On a CPU each product of two blocks serves both of its sides, and only the largest similarity in each group of columns
is kept: the k nearest lie in the k groups with the largest maxima. On another device `jax.lax.top_k` reads each block.

Axes: V rows, D width, R rows of a block, N candidates of a row, G groups of columns, W = the groups that a row reads,
A = R W requests for a group, C columns of a group or of all that a row reads, U rows of a block whose order is not
sure, P a part of them, K nearest, B rows of a block.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tiedjax.errors import UserError

Report = Callable[[str], None]

_BYTES = 1 << 28  # of one temporary
_DEVICE_BYTES = 1 << 30  # of one block of cosines on an accelerator
_ROWS, _COLUMNS = 1024, 16_384  # of one product
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

    Beside the table: its normalised float32 copy and at most V * 1,024 floats. `report` gets a line every few seconds.
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

    def units(self, padded: int) -> np.ndarray:
        """All rows with length 1, float32, and rows of zeros up to `padded`."""
        unit_VD = np.zeros((padded, self.table.shape[1]), np.float32)
        for start, stop in _blocks(self.V, _BYTES // (24 * self.table.shape[1])):
            unit_VD[start:stop] = self.unit(slice(start, stop))
        return unit_VD

    def on_host(self) -> None:
        """Finds every row's nearest by NumPy."""
        # A row keeps V / group maxima and then reads `near` groups of `group` columns: the sum is least at the root of
        # V / near. At least V / 1024, so that the maxima are no more than V * 1,024 numbers; a power of two, so that
        # groups fall whole into the tiles, which are powers of two too.
        group = 1 << int(np.ceil(np.log2(max((self.V / self.near) ** 0.5, self.V / 1024, 1))))
        padded = -(-self.V // group) * group
        unit_VD = self.units(padded)
        maxima_VG = self._maxima(unit_VD, group)
        wide = min(self.near, padded // group)
        for start, stop in _blocks(self.V, _BYTES // (4 * wide * group)):
            self._settle(start, *self._within_groups(unit_VD, maxima_VG[start:stop], start, wide))
            self._report_progress(0.8 + 0.2 * stop / self.V)

    def _maxima(self, unit_VD: np.ndarray, group: int) -> np.ndarray:
        """The largest cosine of each row with each group of columns, itself not counted."""
        padded = len(unit_VD)
        maxima_VG = np.empty((padded, padded // group), np.float32)
        tile = max(group, _ROWS)
        buffer = np.empty(min(tile, padded) * min(_COLUMNS, padded), np.float32)
        for top, bottom in _blocks(padded, tile):
            for left, right in _blocks(padded, _COLUMNS, top):
                shape = bottom - top, right - left
                cosines = buffer[: shape[0] * shape[1]].reshape(shape)
                np.matmul(unit_VD[top:bottom], unit_VD[left:right].T, out=cosines)
                if left == top:
                    np.fill_diagonal(cosines, _NONE)
                cosines[:, max(self.V - left, 0) :] = _NONE
                groups = slice(left // group, right // group)
                maxima_VG[top:bottom, groups] = cosines.reshape(shape[0], -1, group).max(axis=2)
                if right > bottom:  # the other side of the product: these columns as rows
                    offset = max(bottom - left, 0)
                    below = cosines.reshape(-1, group, shape[1]).max(axis=1)[:, offset:]
                    maxima_VG[left + offset : right, top // group : bottom // group] = below.T
            # The rest of the time goes to what is in the groups.
            self._report_progress(0.8 * (1 - (1 - bottom / padded) ** 2))
        return maxima_VG

    def _within_groups(
        self, unit_VD: np.ndarray, maxima_RG: np.ndarray, start: int, wide: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest of the rows from `start` on among the groups with the largest maxima: cosines and indices."""
        rows, groups = maxima_RG.shape
        group = len(unit_VD) // groups
        best_RW = np.argpartition(maxima_RG, groups - wide, axis=1)[:, groups - wide :]
        # Rows that ask for the same group are multiplied with it together.
        order_A = np.argsort(best_RW, axis=None, kind="stable")
        end_G = np.cumsum(np.bincount(best_RW.ravel(), minlength=groups))
        cosine_AC = np.empty((rows * wide, group), np.float32)
        for g, end in enumerate(end_G):
            askers = order_A[(end_G[g - 1] if g else 0) : end]
            cosine_AC[askers] = unit_VD[start + askers // wide] @ unit_VD[g * group : (g + 1) * group].T
        group_A = best_RW.ravel()
        itself_A = np.flatnonzero(group_A == np.repeat(np.arange(start, start + rows) // group, wide))
        cosine_AC[itself_A, (start + itself_A // wide) % group] = _NONE
        cosine_AC[np.flatnonzero(group_A == groups - 1), group - (len(unit_VD) - self.V) :] = _NONE
        cosine_RC = cosine_AC.reshape(rows, wide * group)
        near_RN = np.empty((rows, self.near), np.int64)
        for top, bottom in _blocks(rows, 1024):  # the partition of all rows at once is twice as large as the cosines
            near_RN[top:bottom] = np.argpartition(cosine_RC[top:bottom], -self.near, axis=1)[:, -self.near :]
        index_RN = np.take_along_axis(best_RW, near_RN // group, axis=1) * group + near_RN % group
        return np.take_along_axis(cosine_RC, near_RN, axis=1), index_RN

    def on_device(self) -> None:
        """Finds every row's nearest by JAX."""
        import jax
        import jax.numpy as jnp

        unit_VD = jnp.asarray(self.units(self.V))
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
            self._settle(start, cosines, indices)
            self._report_progress(stop / self.V)

    def _settle(self, start: int, cosines_RN: np.ndarray, indices_RN: np.ndarray) -> None:
        """Writes the k nearest of what float32 found for the rows from `start` on."""
        cosines_RN, indices_RN = _sorted(cosines_RN, indices_RN)
        row_R = np.arange(start, start + len(cosines_RN))
        self.indices[row_R], self.cosines[row_R] = indices_RN[:, : self.k], cosines_RN[:, : self.k]
        gap_RK = -np.diff(cosines_RN[:, : self.k + 1])
        if not self.ordered:
            gap_RK = gap_RK[:, self.k - 1 :]  # between the k and the others, if there are any
        unsure_U = np.flatnonzero((gap_RK < self.unsure).any(axis=1))
        crowded_rows = []
        for first, last in _blocks(len(unsure_U), _BYTES // (32 * self.near * self.table.shape[1])):
            part_P = unsure_U[first:last]
            exact_PN = np.einsum("rd,rnd->rn", self.unit(row_R[part_P]), self.unit(indices_RN[part_P]))
            exact_PN, indices_PN = _sorted(exact_PN.round(_DIGITS), indices_RN[part_P])
            self.indices[row_R[part_P]], self.cosines[row_R[part_P]] = indices_PN[:, : self.k], exact_PN[:, : self.k]
            if self.near < self.V - 1:  # else there is none that float32 did not find
                crowded_rows.append(part_P[exact_PN[:, self.k - 1] - cosines_RN[part_P, -1] < self.unsure])
        if crowded_rows:
            self._whole_rows(row_R[np.concatenate(crowded_rows)])

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


def _blocks(n: int, size: int, start: int = 0) -> list[tuple[int, int]]:
    """(start, stop) of the pieces of at most `size` of range(start, n)."""
    size = max(1, size)
    return [(at, min(at + size, n)) for at in range(start, n, size)]
