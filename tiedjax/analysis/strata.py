"""Strata: tokens by how often training showed them."""

from __future__ import annotations

import numpy as np

NEVER = "never seen"
THIRDS = ("rare", "middle", "frequent")
STRATA = (NEVER, *THIRDS)


def frequency_tenths(counts: np.ndarray) -> np.ndarray:
    """int [V]: 0 for tokens that never occurred, 1 to 10 for tenths of the others by count, as `strata` counts."""
    total = np.asarray(counts).sum(axis=0) if np.ndim(counts) == 2 else np.asarray(counts)
    seen = np.flatnonzero(total)
    order = seen[np.argsort(total[seen], kind="stable")]
    tenth = np.zeros(len(total), np.int64)
    tenth[order] = 1 + np.arange(len(order)) * 10 // max(len(order), 1)
    return tenth


def strata(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Boolean [V] per stratum of counts [V] or [2, V] (both roles added), those without a token left out.

    `never seen` never occurred; `rare`, `middle` and `frequent` are thirds of the other tokens by count, equal counts
    in order of their ids. Thirds of tokens, not of text, so that scores of strata are equally certain.
    """
    total = np.asarray(counts).sum(axis=0) if np.ndim(counts) == 2 else np.asarray(counts)
    seen = np.flatnonzero(total)
    order = seen[np.argsort(total[seen], kind="stable")]
    third = np.full(len(total), -1)
    third[order] = np.arange(len(order)) * len(THIRDS) // max(len(order), 1)
    masks = {name: third == i - 1 for i, name in enumerate(STRATA)}
    return {name: mask for name, mask in masks.items() if mask.any()}
