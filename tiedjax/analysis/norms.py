"""Norm and frequency: the length of a token's vector against how often the token was a target."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tiedjax.analysis.statistics import spearman
from tiedjax.errors import UserError

BIN_WIDTH = 0.5  # in log10(count + 1)


@dataclass(frozen=True)
class Bin:
    """Norms of the rows whose log10(count + 1) lies in [low, high)."""

    low: float
    high: float
    rows: int
    mean: float
    quantile_25: float
    median: float
    quantile_75: float


@dataclass(frozen=True)
class Norms:
    """Norms by frequency bin; Spearman's correlation over seen rows, its value by chance (0) and the error of that."""

    rows: int
    seen_rows: int
    mean: float
    spearman: float | None
    floor: float
    floor_standard_error: float | None
    bins: list[Bin]


def norms_by_count(table_VD: np.ndarray, count_V: np.ndarray) -> Norms:
    """L2 norm of each row against its token's count.

    `count_V` is how often each row's token occurred. Bins are BIN_WIDTH wide in log10(count + 1); never-seen tokens
    have a bin of their own at 0. Spearman's standard error under independence is 1 / sqrt(n - 1). UserError when the
    lengths differ.
    """
    if len(count_V) != len(table_VD):
        raise UserError(f"norms: the table has {len(table_VD)} rows but there are counts for {len(count_V)} tokens")
    norm = np.linalg.norm(np.asarray(table_VD, np.float64), axis=1)
    seen = count_V > 0
    n = int(seen.sum())
    return Norms(
        rows=len(norm),
        seen_rows=n,
        mean=float(norm.mean()),
        spearman=spearman(norm[seen], count_V[seen]),
        floor=0.0,
        floor_standard_error=1 / math.sqrt(n - 1) if n > 1 else None,
        bins=_bins(norm, np.log10(np.asarray(count_V, np.float64) + 1)),
    )


def _bins(norm: np.ndarray, log_count: np.ndarray) -> list[Bin]:
    # log10(1 + 1) = 0.30 is the least a seen token can have, so bin 0 would mix them with the never seen: these get -1.
    index = np.where(log_count > 0, np.floor(log_count / BIN_WIDTH).astype(int), -1)
    bins = []
    for i in np.unique(index):
        inside = norm[index == i]
        low, high = (0.0, 0.0) if i < 0 else (float(i * BIN_WIDTH), float((i + 1) * BIN_WIDTH))
        q25, q50, q75 = (float(q) for q in np.quantile(inside, [0.25, 0.5, 0.75]))
        bins.append(Bin(low, high, len(inside), float(inside.mean()), q25, q50, q75))
    return bins
