"""Evolution: how far a table has moved, as the mean cosine of its rows to an earlier snapshot's.

Two forms. As they are: rows neither centred nor mapped, of all rows and of strata of tokens. The floor is the same
cosine to the earlier rows in another order, `numpy.random.default_rng(0).permutation(rows)`; of a stratum, in another
order of its own rows. Rotation-free: after the best rotation of the centred snapshot onto the centred earlier one
(`align`, fit orthogonal), so that a turn of all rows together does not count.

Axes: V rows, N those that count, B rows of a block, D width, O orders of the rows, S earlier snapshots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tiedjax.analysis.basis.blocked import row_blocks
from tiedjax.analysis.basis.chance import Score
from tiedjax.analysis.instruments.alignment.align import align_rows
from tiedjax.analysis.instruments.alignment.fitting import CentredRows
from tiedjax.errors import UserError

FIT = "orthogonal"  # of the rotation-free form
DRAWS = 1  # row permutations for its floor: one at every snapshot
# to start, its floor, the error of that; to previous, its floor, the error of that; rows left out
_MeanCosines = tuple[float | None, float | None, float | None, float | None, float | None, float | None, int]


@dataclass(frozen=True)
class Movement:
    """Per snapshot: mean cosine of `rows` rows to the first snapshot and to the previous one, each beside its floor.

    None where no row has a direction; rows of zeros in either snapshot are left out and counted.
    """

    rows: int
    to_start: list[float | None]
    floor: list[float | None]
    floor_standard_error: list[float | None]
    to_previous: list[float | None]
    previous_floor: list[float | None]
    previous_floor_standard_error: list[float | None]
    rows_left_out: list[int]


@dataclass(frozen=True)
class RotationFree:
    """Per snapshot: mean cosine of centred rows after the best rotation, beside its floor, and corrected for it."""

    to_start: list[float | None]
    floor: list[float | None]
    floor_standard_error: list[float | None]
    corrected: list[float | None]
    to_previous: list[float | None]
    previous_floor: list[float | None]
    previous_floor_standard_error: list[float | None]
    previous_corrected: list[float | None]
    rows_left_out: list[int]
    draws: int


@dataclass(frozen=True)
class Evolution(Movement):
    """Movement of all rows, of every stratum, and without common rotation (None where that was not asked for)."""

    steps: list[int]
    width: int
    strata: dict[str, Movement]
    rotation_free: RotationFree | None


class Trail:
    """Follows one role's table from snapshot to snapshot, holding only the first and the previous one.

    `kept_V` is a boolean [V] mask; `strata` are disjoint masks of which only the rows in `kept_V` count, empty ones
    left out. `draws` row permutations make the floor of the rotation-free form; with 0 that form is not measured.
    """

    def __init__(
        self, kept_V: np.ndarray | None = None, *, strata: Mapping[str, np.ndarray] | None = None, draws: int = DRAWS
    ):
        self._kept_V, self._strata, self._draws = kept_V, dict(strata or {}), draws
        self._start = self._previous = _Directions(np.empty((0, 0), np.float32))
        self._orders: list[np.ndarray] = []  # the rows that count: as they are, shuffled, shuffled within strata
        self._positions: dict[str, np.ndarray] = {}  # their positions by stratum
        self._steps: list[int] = []
        self._means: list[_MeanCosines] = []
        self._means_by_stratum: dict[str, list[_MeanCosines]] = {}
        self._centred: tuple[CentredRows, CentredRows] | None = None  # the rows that count of the first and previous
        self._rotation_free_scores: list[tuple[Score, Score]] = []

    def add(self, step: int, table_VD: np.ndarray, centred: CentredRows | None = None) -> None:
        """Takes the table at `step`; steps come in ascending order. UserError for another shape than the first.

        `centred` are its rows that count, if others have centred them.
        """
        table = _Directions(table_VD)
        if not self._steps:
            self._begin(table)
        if table_VD.shape != self._start.values_VD.shape:
            first_shape, shape = list(self._start.values_VD.shape), list(table_VD.shape)
            raise UserError(
                f"evolution: the table at step {step} has shape {shape}, the first snapshot's has {first_shape}"
            )
        in_place_2N, anywhere_2N, within_2N = _cosines((self._start, self._previous), table, self._orders)
        self._means.append(_mean_cosines(in_place_2N, anywhere_2N))
        for name, positions in self._positions.items():
            self._means_by_stratum.setdefault(name, []).append(
                _mean_cosines(in_place_2N[:, positions], within_2N[:, positions])
            )
        if self._draws:
            self._add_rotation_free(centred or CentredRows(table_VD, self._kept_V))
        self._steps.append(int(step))
        self._previous = table

    def result(self) -> Evolution:
        """What was seen so far. UserError when that is nothing."""
        if not self._steps:
            raise UserError("evolution: there is no snapshot")
        return Evolution(
            **vars(_movement(self._means, len(self._orders[0]))),
            steps=list(self._steps),
            width=self._start.values_VD.shape[1],
            strata={
                name: _movement(self._means_by_stratum[name], len(positions))
                for name, positions in self._positions.items()
            },
            rotation_free=self._rotation_free() if self._draws else None,
        )

    def _begin(self, table: _Directions) -> None:
        self._start = self._previous = table
        V = len(table.values_VD)
        counting_V = np.ones(V, bool) if self._kept_V is None else self._kept_V
        for name, mask_V in {"rows": counting_V, **self._strata}.items():
            if len(mask_V) != V:
                raise UserError(f"evolution: the mask {name!r} is of {len(mask_V)} rows, the table has {V}")
        index_N = np.flatnonzero(counting_V)
        shuffle = lambda row_N: row_N[np.random.default_rng(0).permutation(len(row_N))]
        within_N = index_N.copy()
        for name, mask_V in self._strata.items():
            position_M = np.flatnonzero(mask_V[index_N])
            if len(position_M):
                self._positions[name] = position_M
                within_N[position_M] = shuffle(index_N[position_M])
        self._orders = [index_N, shuffle(index_N), within_N]

    def _add_rotation_free(self, centred: CentredRows) -> None:
        start, previous = self._centred or (centred, centred)
        score = lambda earlier: align_rows(centred, earlier, fits=(FIT,), draws=self._draws).scores[FIT]
        to_start = score(start)
        self._rotation_free_scores.append((to_start, to_start if previous is start else score(previous)))
        self._centred = (start, centred)

    def _rotation_free(self) -> RotationFree:
        column = lambda i, field: [getattr(pair[i], field) for pair in self._rotation_free_scores]
        return RotationFree(
            to_start=column(0, "score"),
            floor=column(0, "floor"),
            floor_standard_error=column(0, "floor_standard_error"),
            corrected=column(0, "corrected"),
            to_previous=column(1, "score"),
            previous_floor=column(1, "floor"),
            previous_floor_standard_error=column(1, "floor_standard_error"),
            previous_corrected=column(1, "corrected"),
            rows_left_out=column(0, "rows_left_out"),
            draws=self._draws,
        )


def measure(
    snapshots: Iterable[tuple[int, np.ndarray]],
    kept_V: np.ndarray | None = None,
    *,
    strata: Mapping[str, np.ndarray] | None = None,
    draws: int = DRAWS,
) -> Evolution:
    """Evolution of one role's table over (step, [V, D]) in ascending order of step; the options are `Trail`'s.

    >>> start = np.eye(4)
    >>> measure([(0, start), (10, start + np.eye(4)[[1, 0, 3, 2]])]).to_start
    [1.0, 0.7071067811865475]
    """
    trail = Trail(kept_V, strata=strata, draws=draws)
    for step, table in snapshots:
        trail.add(step, table)
    return trail.result()


def row_movement(start_VD: np.ndarray, end_VD: np.ndarray) -> np.ndarray:
    """Cosine of each row of `end` to the same row of `start`, float64 [V]; NaN for rows of zeros."""
    return _cosines((_Directions(start_VD),), _Directions(end_VD), [np.arange(len(start_VD))])[0, 0]


class _Directions:
    """A table and the norms of its rows."""

    def __init__(self, table_VD: np.ndarray):
        if table_VD.ndim != 2:
            raise UserError(f"evolution: a table must have 2 dimensions [V, D], got {list(table_VD.shape)}")
        self.values_VD, self.norm_V = table_VD, np.empty(len(table_VD))
        for block in row_blocks(len(table_VD), table_VD.shape[1], itemsize=8):
            self.norm_V[block] = np.linalg.norm(np.asarray(table_VD[block], np.float64), axis=1)


def _cosines(earlier: Sequence[_Directions], later: _Directions, orders: Sequence[np.ndarray]) -> np.ndarray:
    """Cosine of each row of later[orders[0]] to that of every earlier table in every order.

    Returns float64 [orders, earlier, rows]; NaN for rows of zeros.
    """
    cosine_OSN = np.full((len(orders), len(earlier), len(orders[0])), np.nan)
    for block in row_blocks(len(orders[0]), later.values_VD.shape[1], itemsize=8):
        row_B = orders[0][block]
        x_BD, norm_B = np.asarray(later.values_VD[row_B], np.float64), later.norm_V[row_B]
        for i, order in enumerate(orders):
            for j, table in enumerate(earlier):
                product_B = norm_B * table.norm_V[order[block]]
                dot_B = np.einsum("vd,vd->v", x_BD, np.asarray(table.values_VD[order[block]], np.float64))
                np.divide(dot_B, product_B, out=cosine_OSN[i, j, block], where=product_B > 0)
    return cosine_OSN


def _mean_cosines(in_place_2N: np.ndarray, chance_2N: np.ndarray) -> _MeanCosines:
    """The means of cosines [2, rows] to the first and the previous snapshot."""
    floors = [_mean_and_error(cosine_N) for cosine_N in chance_2N]
    to_start, to_previous = (_mean_and_error(cosine_N)[0] for cosine_N in in_place_2N)
    return to_start, *floors[0], to_previous, *floors[1], int(np.isnan(in_place_2N).any(axis=0).sum())


def _movement(means: Sequence[_MeanCosines], rows: int) -> Movement:
    to_start, floor, error, to_previous, previous_floor, previous_error, left_out = (
        list(column) for column in zip(*means, strict=True)
    )
    return Movement(rows, to_start, floor, error, to_previous, previous_floor, previous_error, left_out)


def _mean_and_error(cosine_N: np.ndarray) -> tuple[float | None, float | None]:
    """The mean over rows with a direction and its standard error."""
    directed_N = cosine_N[np.isfinite(cosine_N)]
    error = float(directed_N.std(ddof=1) / math.sqrt(len(directed_N))) if len(directed_N) > 1 else None
    return float(directed_N.mean()) if len(directed_N) else None, error
