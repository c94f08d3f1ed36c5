"""Example tokens: the most frequent ones, the lengths of their vectors and how far these moved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tiedjax.analysis.evolution import row_movement


def most_frequent(counts: np.ndarray, k: int) -> list[int]:
    """Ids of the k tokens with the highest counts as target ([2, V] counts), most frequent first, seen ones only."""
    order = np.argsort(-counts[1], kind="stable")[:k]
    return [int(i) for i in order if counts[1][i] > 0]


def token_texts(tokenizer_path: Path | None, ids: list[int]) -> list[str]:
    """What each token stands for; its id in brackets where there is no tokenizer."""
    if tokenizer_path is None:
        return [f"[{i}]" for i in ids]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    return [tokenizer.decode([i], skip_special_tokens=False) or tokenizer.id_to_token(i) or f"[{i}]" for i in ids]


def token_rows(start: Mapping[str, np.ndarray], end: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Per token, from its vectors [tokens, D] in every role: L2 norm at the end and the cosine to the start."""
    norm = {role: np.linalg.norm(np.asarray(vectors, np.float64), axis=1) for role, vectors in end.items()}
    moved = {role: row_movement(start[role], end[role]) for role in end}
    return [
        {role: {"norm": float(norm[role][n]), "cosine_to_start": float(moved[role][n])} for role in end}
        for n in range(len(next(iter(end.values()))))
    ]
