"""What a score is worth beside the value that it takes by chance."""

from __future__ import annotations


def correct(score: float | None, floor: float | None) -> float | None:
    """(score - floor) / (1 - floor): 0 is chance, 1 is identical; None where chance already reaches 1."""
    if score is None or floor is None or 1 - floor < 1e-6:
        return None
    return (score - floor) / (1 - floor)
