"""Two similarities of the same tokens, each a symmetric matrix: their rank correlation over pairs of tokens.

Pairs share tokens, so it is tokens that are permuted for the chance level (Mantel 1967, Cancer Research 27) and drawn
for the interval, not pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from tiedjax.analysis.basis.chance import Score, beside_draws
from tiedjax.analysis.basis.statistics import CONFIDENCE, Interval, ranks

DRAWS = 20
BOOTSTRAP_DRAWS = 500
LEAST = 4  # tokens: fewer have too few pairs for a correlation to be worth a number


def agreements(
    similarity_NN: np.ndarray,
    ranked: Sequence[np.ndarray],
    *,
    draws: int = DRAWS,
    bootstrap: int = BOOTSTRAP_DRAWS,
    rows_left_out: int = 0,
) -> tuple[list[Score], Interval]:
    """Spearman's correlation of one symmetric similarity [N, N] with each of others over all pairs of tokens, and the
    first of these minus the last.

    The others are `ranked`, by `rank_matrix`. Diagonals do not count. `draws` permutations of the tokens make the
    floors, `bootstrap` samples of tokens the intervals (0: none), the same samples for all; both come from
    `numpy.random.default_rng(0)`.
    """
    n = len(similarity_NN)
    rng = np.random.default_rng(0)
    ranks_NN = rank_matrix(similarity_NN)
    scales = [math.sqrt(np.square(ranks_NN).sum() * np.square(other).sum()) for other in ranked]
    known = n >= LEAST and all(scale > 0 for scale in scales)
    by_chance = resampled = np.zeros((len(ranked), 0))
    if known:
        permuted = (ranks_NN[order][:, order] for order in (rng.permutation(n) for _ in range(draws)))
        by_chance = np.array([[np.vdot(p, o) / s for o, s in zip(ranked, scales, strict=True)] for p in permuted]).T
        resampled = _bootstrap(ranks_NN, ranked, bootstrap, rng)
    scores = [
        beside_draws(
            float(np.vdot(ranks_NN, ranked[i])) / scale if known else None,
            by_chance[i],
            rows=n,
            rows_left_out=rows_left_out,
            interval=_interval(resampled[i]),
        )
        for i, scale in enumerate(scales)
    ]
    first, last = scores[0].score, scores[-1].score
    difference = None if first is None or last is None else first - last
    return scores, Interval(difference, *_interval(resampled[0] - resampled[-1]), n, CONFIDENCE)


def rank_matrix(similarity_NN: np.ndarray) -> np.ndarray:
    """Centred ranks of all pairs, symmetric with a zero diagonal; zeros where there is no pair."""
    n = len(similarity_NN)
    ranks_NN, upper = np.zeros((n, n)), np.triu_indices(n, 1)
    if n > 1:
        rank = ranks(np.asarray(similarity_NN)[upper])
        ranks_NN[upper] = rank - rank.mean()
    return ranks_NN + ranks_NN.T


def _bootstrap(ranks_NN: np.ndarray, others: Sequence[np.ndarray], draws: int, rng: np.random.Generator) -> np.ndarray:
    """Correlations [others, draws] over samples of tokens: a pair counts as often as both its tokens were drawn.

    A token and its own copy are no pair. Ranks stay those of all tokens.
    """
    n = len(ranks_NN)
    times_BN = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    pairs_B = n**2 - np.square(times_BN).sum(axis=1)
    mean: Callable[[np.ndarray], np.ndarray] = lambda m_NN: (
        ((times_BN @ m_NN) * times_BN).sum(axis=1) / np.maximum(pairs_B, 1)
    )
    variance: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda m_NN, mean_B: np.maximum(
        mean(m_NN**2) - mean_B**2, 0
    )
    mean_B = mean(ranks_NN)
    variance_B = variance(ranks_NN, mean_B)
    correlations = np.full((len(others), draws), np.nan)
    for i, other_NN in enumerate(others):
        other_mean_B = mean(other_NN)
        spread_B = np.sqrt(variance_B * variance(other_NN, other_mean_B))
        covariance_B = mean(ranks_NN * other_NN) - mean_B * other_mean_B
        np.divide(covariance_B, spread_B, out=correlations[i], where=spread_B > 0)
    return correlations


def _interval(resampled: np.ndarray) -> tuple[float | None, float | None]:
    known = resampled[np.isfinite(resampled)]
    if not len(known):
        return None, None
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
