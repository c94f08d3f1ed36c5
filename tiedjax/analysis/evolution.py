"""Evolution: how far a table has moved, as the mean cosine of its rows to an earlier snapshot's.

Rows are compared as they are: neither centred nor mapped. The floor is the same cosine after one permutation of the
rows, `numpy.random.default_rng(0).permutation(rows)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Evolution:
    """Per snapshot step: mean row cosine to the first snapshot, to the previous one, and by chance."""

    steps: list[int]
    to_start: list[float]
    to_previous: list[float]
    floor: list[float]


class Trail:
    """Follows one role's table from snapshot to snapshot, holding only the first and the previous one.

    `rows` is a boolean [V] mask. At the first snapshot both cosines are 1. Rows of zeros do not count.
    """

    def __init__(self, rows: np.ndarray | None = None):
        self._rows = rows
        self._start = self._previous = np.empty((0, 0), np.float32)
        self._order = np.empty(0, np.int64)
        self._steps: list[int] = []
        self._cosines: list[tuple[float, float, float]] = []

    def add(self, step: int, table_VD: np.ndarray) -> None:
        """Takes the table at `step`; steps come in ascending order."""
        table = table_VD if self._rows is None else table_VD[self._rows]
        if not self._steps:
            self._start = self._previous = table
            self._order = np.random.default_rng(0).permutation(len(table))
        others = (self._start, self._previous, self._start[self._order])
        to_start, to_previous, floor = (_mean(row_movement(other, table)) for other in others)
        self._steps.append(int(step))
        self._cosines.append((to_start, to_previous, floor))
        self._previous = table

    def result(self) -> Evolution:
        """What was seen so far."""
        to_start, to_previous, floor = (list(column) for column in zip(*self._cosines, strict=True))
        return Evolution(list(self._steps), to_start, to_previous, floor)


def evolution(snapshots: Iterable[tuple[int, np.ndarray]], rows: np.ndarray | None = None) -> Evolution:
    """Evolution of one role's table over (step, [V, D]) in ascending order of step; at least one."""
    trail = Trail(rows)
    for step, table in snapshots:
        trail.add(step, table)
    return trail.result()


def row_movement(start_VD: np.ndarray, end_VD: np.ndarray) -> np.ndarray:
    """Cosine of each row of `end` to the same row of `start`, float64 [V]; NaN for rows of zeros."""
    dot = lambda a, b: np.einsum("vd,vd->v", a, b, dtype=np.float64)
    product = np.sqrt(dot(start_VD, start_VD) * dot(end_VD, end_VD))
    return np.divide(dot(start_VD, end_VD), product, out=np.full(len(product), np.nan), where=product > 0)


def _mean(cosine: np.ndarray) -> float:
    known = cosine[np.isfinite(cosine)]
    return float(known.mean()) if len(known) else float("nan")
