"""Two similarities of the same tokens, each a symmetric matrix: their rank correlation over pairs of tokens.

Pairs share tokens, so it is tokens that are permuted for the chance level (Mantel 1967, Cancer Research 27) and drawn
for the interval, not pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tiedjax.analysis.basis.chance import correct
from tiedjax.analysis.basis.statistics import CONFIDENCE, ranks

DRAWS = 20
BOOTSTRAP_DRAWS = 500
LEAST = 4  # tokens: fewer have too few pairs for a correlation to be worth a number


@dataclass(frozen=True)
class Agreement:
    """Spearman's correlation over all pairs of `rows` tokens.

    The floor is its mean over permutations of the tokens, beside that mean's standard error and the deviation of single
    permutations. `low` and `high` bound a percentile interval over tokens; None where none was asked for.
    """

    score: float | None
    floor: float | None
    floor_standard_error: float | None
    floor_deviation: float | None
    corrected: float | None
    low: float | None
    high: float | None
    confidence: float
    rows: int


@dataclass(frozen=True)
class Difference:
    """The first score minus the second, with its interval over tokens, the same draws for both."""

    score: float | None
    low: float | None
    high: float | None
    confidence: float


def agreements(
    own_NN: np.ndarray, ranked: Sequence[np.ndarray], *, draws: int = DRAWS, bootstrap: int = BOOTSTRAP_DRAWS
) -> tuple[list[Agreement], Difference]:
    """The agreement of one symmetric similarity [N, N] with each of others, and that of the first minus the last.

    The others are `ranked`, by `rank_matrix`. Diagonals do not count. `draws` permutations, and `bootstrap` samples of
    tokens (0: no interval), both from `numpy.random.default_rng(0)`.
    """
    n = len(own_NN)
    rng = np.random.default_rng(0)
    own = rank_matrix(own_NN)
    scales = [math.sqrt(np.square(own).sum() * np.square(other).sum()) for other in ranked]
    known = n >= LEAST and all(scale > 0 for scale in scales)
    by_chance = drawn = np.zeros((len(ranked), 0))
    if known:
        permuted = (own[order][:, order] for order in (rng.permutation(n) for _ in range(draws)))
        by_chance = np.array([[np.vdot(p, o) / s for o, s in zip(ranked, scales, strict=True)] for p in permuted]).T
        drawn = _bootstrap(own, ranked, bootstrap, rng)
    found = []
    for i, scale in enumerate(scales):
        score = float(np.vdot(own, ranked[i])) / scale if known else None
        floor = float(by_chance[i].mean()) if known else None
        deviation = float(by_chance[i].std(ddof=1)) if by_chance[i].size > 1 else None
        low, high = _interval(drawn[i])
        found.append(
            Agreement(
                score=score,
                floor=floor,
                floor_standard_error=None if deviation is None else deviation / math.sqrt(draws),
                floor_deviation=deviation,
                corrected=correct(score, floor),
                low=low,
                high=high,
                confidence=CONFIDENCE,
                rows=n,
            )
        )
    first, last = found[0].score, found[-1].score
    difference = None if first is None or last is None else first - last
    return found, Difference(difference, *_interval(drawn[0] - drawn[-1]), CONFIDENCE)


def rank_matrix(similarity_NN: np.ndarray) -> np.ndarray:
    """Centred ranks of all pairs, symmetric with a zero diagonal; zeros where there is no pair."""
    n = len(similarity_NN)
    found, upper = np.zeros((n, n)), np.triu_indices(n, 1)
    if n > 1:
        rank = ranks(np.asarray(similarity_NN)[upper])
        found[upper] = rank - rank.mean()
    return found + found.T


def _bootstrap(own: np.ndarray, others: Sequence[np.ndarray], draws: int, rng: np.random.Generator) -> np.ndarray:
    """Correlations [others, draws] over samples of tokens: a pair counts as often as both its tokens were drawn.

    A token and its own copy are no pair. Ranks stay those of all tokens.
    """
    n = len(own)
    times_BN = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    pairs_B = n**2 - np.square(times_BN).sum(axis=1)
    mean = lambda m_NN: ((times_BN @ m_NN) * times_BN).sum(axis=1) / np.maximum(pairs_B, 1)
    variance = lambda m_NN, mean_B: np.maximum(mean(m_NN**2) - mean_B**2, 0)
    own_B = mean(own)
    own_variance_B = variance(own, own_B)
    found = np.full((len(others), draws), np.nan)
    for i, other in enumerate(others):
        other_B = mean(other)
        spread_B = np.sqrt(own_variance_B * variance(other, other_B))
        np.divide(mean(own * other) - own_B * other_B, spread_B, out=found[i], where=spread_B > 0)
    return found


def _interval(drawn: np.ndarray) -> tuple[float | None, float | None]:
    known = drawn[np.isfinite(drawn)]
    if not len(known):
        return None, None
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
