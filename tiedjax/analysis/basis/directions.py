"""When a row has a direction: one rule for every instrument.

A row as it is has one unless all of its numbers are 0. A row about the mean row has none where it is no longer than
what rounding leaves of rows that are equal.

Axes: V rows of a table, N any rows, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tiedjax.analysis.basis.blocked import column_means, row_blocks


def rounding(peak_D: np.ndarray, rows: int, dtype: Any = np.float64) -> float:
    """The length up to which a row about the mean of `rows` rows is rounding, if the mean was taken off in `dtype`.

    `peak_D` is the largest absolute number of each column.
    """
    # Means are summed in float64, where their error grows with the root of the rows; a mean that is taken off in
    # float32 is rounded once, which is far more.
    growth = float(np.sqrt(rows)) if np.dtype(dtype) == np.float64 else 1.0
    return 4 * float(np.finfo(dtype).eps) * growth * float(np.linalg.norm(peak_D))


def centre(table_VD: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean row, float64 [D], and the length up to which a row about it is rounding and has no direction."""
    peak_D = np.zeros(table_VD.shape[1])
    for block in row_blocks(*table_VD.shape):
        peak_D = np.maximum(peak_D, np.abs(table_VD[block]).max(axis=0))
    return column_means(table_VD), rounding(peak_D, len(table_VD))


def unit_rows(rows_ND: np.ndarray) -> np.ndarray:
    """Rows of length 1, float64; rows without a direction stay 0.

    >>> unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6, 0.8], [0.0, 0.0]]
    """
    scaled_ND = np.asarray(rows_ND, np.float64)
    peak_N1 = np.abs(scaled_ND).max(axis=1, keepdims=True)
    # By the largest number first: its square always is a float.
    scaled_ND = scaled_ND / np.where(peak_N1 == 0, 1, peak_N1)
    length_N1 = np.linalg.norm(scaled_ND, axis=1, keepdims=True)
    return scaled_ND / np.where(length_N1 == 0, 1, length_N1)


def with_direction(table_VD: np.ndarray, mean_D: np.ndarray | None = None, least: float = 0.0) -> np.ndarray:
    """Boolean [V]: rows that have a direction; about the mean row with `mean_D` and `least`, as `centre` gives them."""
    directed_V = np.empty(len(table_VD), bool)
    for block in row_blocks(len(table_VD), table_VD.shape[1], itemsize=8):
        block_BD = table_VD[block]
        if mean_D is None:
            directed_V[block] = block_BD.any(axis=1)
        else:
            directed_V[block] = np.linalg.norm(np.asarray(block_BD, np.float64) - mean_D, axis=1) > least
    return directed_V
