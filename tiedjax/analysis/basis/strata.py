"""Strata: tokens by how often training showed them."""

from __future__ import annotations

import numpy as np

NEVER = "never seen"
THIRDS = ("rare", "middle", "frequent")
STRATA = (NEVER, *THIRDS)
BIN_WIDTH = 0.5  # in log10(count + 1)


def frequency_parts(counts: np.ndarray, parts: int) -> np.ndarray:
    """int [V]: 0 for tokens that never occurred, 1 (rarest) to `parts` for equal parts of the others by count.

    `counts` is [V] or [2, V] (both roles are added); equal counts are in order of their ids.
    """
    total_V = np.asarray(counts).sum(axis=0) if np.ndim(counts) == 2 else np.asarray(counts)
    seen_N = np.flatnonzero(total_V)
    order_N = seen_N[np.argsort(total_V[seen_N], kind="stable")]
    part_V = np.zeros(len(total_V), np.int64)
    part_V[order_N] = 1 + np.arange(len(order_N)) * parts // max(len(order_N), 1)
    return part_V


def log_bins(count_V: np.ndarray) -> np.ndarray:
    """int [V]: bin i holds log10(count + 1) from i to i + 1 times BIN_WIDTH; -1 for tokens that never occurred.

    The least that a seen token can have is log10(2): bin 0 would mix them with the others.
    """
    log_V = np.log10(np.asarray(count_V, np.float64) + 1)
    return np.where(log_V > 0, np.floor(log_V / BIN_WIDTH).astype(int), -1)


def strata(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Boolean [V] per stratum of counts as `frequency_parts` takes them, strata without a token left out.

    `never seen` never occurred; `rare`, `middle` and `frequent` are thirds of the other tokens by count: of tokens, not
    of text, so that scores of strata are equally certain.
    """
    part_V = frequency_parts(counts, len(THIRDS))
    masks = {name: part_V == i for i, name in enumerate(STRATA)}
    return {name: mask for name, mask in masks.items() if mask.any()}
