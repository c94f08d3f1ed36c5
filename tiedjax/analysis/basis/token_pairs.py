"""Two similarities of the same tokens, each a symmetric matrix: their rank correlation over pairs of tokens.

Pairs share tokens, so it is tokens that are permuted for the chance level (Mantel 1967, Cancer Research 27) and drawn
for the interval, not pairs.

Axes: N tokens, B samples of them, P pairs of them, M similarities that one is correlated with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from tiedjax.analysis.basis.chance import Score, beside, drawn_floor
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
    scales = [math.sqrt(np.square(ranks_NN).sum() * np.square(other_NN).sum()) for other_NN in ranked]
    comparable = n >= LEAST and all(scale > 0 for scale in scales)
    chance_MB = resampled_MB = np.zeros((len(ranked), 0))
    if comparable:
        orders = (rng.permutation(n) for _ in range(draws))
        permuted_ranks = (ranks_NN.take(order, axis=0).take(order, axis=1) for order in orders)
        chance_MB = np.array(
            [[np.vdot(p_NN, o_NN) / s for o_NN, s in zip(ranked, scales, strict=True)] for p_NN in permuted_ranks]
        ).T
        resampled_MB = _bootstrap(ranks_NN, ranked, bootstrap, rng)
    scores = [
        beside(
            float(np.vdot(ranks_NN, ranked[i])) / scale if comparable else None,
            drawn_floor(chance_MB[i]),
            rows=n,
            rows_left_out=rows_left_out,
            interval=_interval(resampled_MB[i]),
        )
        for i, scale in enumerate(scales)
    ]
    first, last = scores[0].score, scores[-1].score
    difference = None if first is None or last is None else first - last
    return scores, Interval(difference, *_interval(resampled_MB[0] - resampled_MB[-1]), n, CONFIDENCE)


def rank_matrix(similarity_NN: np.ndarray) -> np.ndarray:
    """Centred ranks of all pairs, symmetric with a zero diagonal; zeros where there is no pair."""
    n = len(similarity_NN)
    ranks_NN, upper_P = np.zeros((n, n)), np.triu_indices(n, 1)
    if n > 1:
        rank_P = ranks(np.asarray(similarity_NN)[upper_P])
        ranks_NN[upper_P] = rank_P - rank_P.mean()
    return ranks_NN + ranks_NN.T


def _bootstrap(ranks_NN: np.ndarray, ranked: Sequence[np.ndarray], draws: int, rng: np.random.Generator) -> np.ndarray:
    """Correlations [M, B] over samples of tokens: a pair counts as often as both its tokens were drawn.

    A token and its own copy are no pair. Ranks stay those of all tokens.
    """
    from scipy.linalg.blas import dtrmm

    n = len(ranks_NN)
    times_BN = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    pairs_B = n**2 - np.square(times_BN).sum(axis=1)
    # The matrices are symmetric without a diagonal: one triangle says all, in half of the products.
    half: Callable[[np.ndarray], np.ndarray] = lambda m_NN: np.vecdot(dtrmm(1.0, m_NN.T, times_BN.T).T, times_BN)
    mean: Callable[[np.ndarray], np.ndarray] = lambda m_NN: 2 * half(m_NN) / np.maximum(pairs_B, 1)
    variance: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda m_NN, mean_B: np.maximum(
        mean(m_NN**2) - mean_B**2, 0
    )
    mean_B = mean(ranks_NN)
    variance_B = variance(ranks_NN, mean_B)
    correlation_MB = np.full((len(ranked), draws), np.nan)
    for i, other_NN in enumerate(ranked):
        other_mean_B = mean(other_NN)
        spread_B = np.sqrt(variance_B * variance(other_NN, other_mean_B))
        covariance_B = mean(ranks_NN * other_NN) - mean_B * other_mean_B
        np.divide(covariance_B, spread_B, out=correlation_MB[i], where=spread_B > 0)
    return correlation_MB


def _interval(resampled_B: np.ndarray) -> tuple[float | None, float | None]:
    finite_B = resampled_B[np.isfinite(resampled_B)]
    if not len(finite_B):
        return None, None
    low, high = np.quantile(finite_B, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
