"""Example tokens: the lengths of their vectors and how far these moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tiedjax.analysis.instruments.evolution.evolution import row_movement


def token_rows(start: Mapping[str, np.ndarray], end: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Per token, from its vectors [tokens, D] in every role: L2 norm at the end and the cosine to the start."""
    norm = {role: np.linalg.norm(np.asarray(vectors, np.float64), axis=1) for role, vectors in end.items()}
    moved = {role: row_movement(start[role], end[role]) for role in end}
    return [
        {role: {"norm": float(norm[role][n]), "cosine_to_start": float(moved[role][n])} for role in end}
        for n in range(len(next(iter(end.values()))))
    ]
