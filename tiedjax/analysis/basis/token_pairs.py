"""Two similarities of the same tokens, each a symmetric matrix: their rank correlation over pairs of tokens.

Pairs share tokens, so it is tokens that are permuted for the chance level (Mantel 1967, Cancer Research 27) and drawn
for the interval, not pairs.

Axes: N tokens, B samples of them, P pairs of them, M similarities that one is correlated with.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tiedjax.analysis.basis.chance import Score, beside, drawn_floor
from tiedjax.analysis.basis.statistics import CONFIDENCE, Interval, ranks

DRAWS = 20
BOOTSTRAP_DRAWS = 500
LEAST = 4  # tokens: fewer have too few pairs for a correlation to be worth a number


class Ranking:
    """The ranks of one similarity [N, N] over all pairs of tokens: centred, symmetric, with a zero diagonal; zeros
    where there is no pair."""

    def __init__(self, similarity_NN: np.ndarray) -> None:
        n = len(similarity_NN)
        self.ranks_NN, upper_P = np.zeros((n, n)), np.triu_indices(n, 1)
        if n > 1:
            rank_P = ranks(np.asarray(similarity_NN)[upper_P])
            self.ranks_NN[upper_P] = rank_P - rank_P.mean()
        self.ranks_NN += self.ranks_NN.T
        self.square_sum = float(np.square(self.ranks_NN).sum())
        self._moments: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def moments(self, draws: int, bootstrap: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of the ranks over each of the samples that `_drawn` makes after so many draws, [B] each.

        They are kept, for one text's similarity is compared with many tables.
        """
        if (draws, bootstrap) not in self._moments:
            times_BN = _drawn(len(self.ranks_NN), draws, bootstrap)[1]
            mean_B = _over_samples(self.ranks_NN, times_BN)
            variance_B = np.maximum(_over_samples(np.square(self.ranks_NN), times_BN) - mean_B**2, 0)
            self._moments[draws, bootstrap] = mean_B, variance_B
        return self._moments[draws, bootstrap]


def agreements(
    similarity_NN: np.ndarray,
    rankings: Sequence[Ranking],
    *,
    draws: int = DRAWS,
    bootstrap: int = BOOTSTRAP_DRAWS,
    rows_left_out: int = 0,
) -> tuple[list[Score], Interval]:
    """Spearman's correlation of one symmetric similarity [N, N] with each of others over all pairs of tokens, and the
    first of these minus the last.

    Diagonals do not count. `draws` permutations of the tokens make the floors, `bootstrap` samples of tokens the
    intervals (0: none), the same samples for all; both come from `numpy.random.default_rng(0)`.
    """
    n = len(similarity_NN)
    found = _correlations(Ranking(similarity_NN), rankings, draws, bootstrap)
    return _beside_chance(found, n, rows_left_out)


def partial_agreements(
    similarity_NN: np.ndarray,
    rankings: tuple[Ranking, Ranking],
    *,
    draws: int = DRAWS,
    bootstrap: int = BOOTSTRAP_DRAWS,
    rows_left_out: int = 0,
) -> tuple[list[Score], Interval]:
    """As `agreements` with two others, each correlation with the other of them held fixed.

    (r_a - r_b r_ab) / sqrt((1 - r_b^2) (1 - r_ab^2)) (Smouse, Long and Sokal 1986, Systematic Zoology 35).
    """
    found = _correlations(Ranking(similarity_NN), rankings, draws, bootstrap)
    if not np.isnan(found.value_M).any():
        first, second = rankings
        scale = math.sqrt(first.square_sum * second.square_sum)
        between = float(np.vdot(first.ranks_NN, second.ranks_NN)) / scale
        found = _Correlations(
            _partial(found.value_M, between),
            _partial(found.chance_MB, between),  # the table's tokens are permuted, those of the others are not
            _partial(found.resampled_MB, _resampled(first, second, draws, bootstrap)),
        )
    return _beside_chance(found, len(similarity_NN), rows_left_out)


class _Correlations(NamedTuple):
    """Of one similarity with M others: their values [M], by chance and over samples [M, B]; NaN where there is none."""

    value_M: np.ndarray
    chance_MB: np.ndarray
    resampled_MB: np.ndarray


def _correlations(ranking: Ranking, rankings: Sequence[Ranking], draws: int, bootstrap: int) -> _Correlations:
    n, M = len(ranking.ranks_NN), len(rankings)
    scales = [math.sqrt(ranking.square_sum * other.square_sum) for other in rankings]
    if n < LEAST or not all(scale > 0 for scale in scales):
        return _Correlations(np.full(M, np.nan), np.zeros((M, 0)), np.zeros((M, 0)))
    # take, not brackets: those give a transposed array, which every product would copy
    permuted_ranks = (ranking.ranks_NN.take(order, 0).take(order, 1) for order in _drawn(n, draws, bootstrap)[0])
    pairs = list(zip(rankings, scales, strict=True))
    chance_BM = [[np.vdot(p_NN, o.ranks_NN) / s for o, s in pairs] for p_NN in permuted_ranks]
    return _Correlations(
        np.array([np.vdot(ranking.ranks_NN, other.ranks_NN) / scale for other, scale in pairs]),
        np.array(chance_BM).reshape(-1, M).T,
        np.stack([_resampled(ranking, other, draws, bootstrap) for other in rankings]),
    )


def _partial(r_M: np.ndarray, between: np.ndarray | float) -> np.ndarray:
    """Each of two correlations, along the first axis, with the other held fixed; NaN where that leaves nothing."""
    other_M = r_M[::-1]
    left_M = (1 - other_M**2) * (1 - between**2)
    partial_M = np.full(r_M.shape, np.nan)
    np.divide(r_M - other_M * between, np.sqrt(np.maximum(left_M, 0)), out=partial_M, where=left_M > 1e-12)
    return partial_M


def _beside_chance(found: _Correlations, n: int, rows_left_out: int) -> tuple[list[Score], Interval]:
    values = [None if math.isnan(value) else float(value) for value in found.value_M]
    scores = [
        beside(
            value,
            drawn_floor(found.chance_MB[i]),
            rows=n,
            rows_left_out=rows_left_out,
            interval=_interval(found.resampled_MB[i]),
        )
        for i, value in enumerate(values)
    ]
    difference = None if values[0] is None or values[-1] is None else values[0] - values[-1]
    gap_B = found.resampled_MB[0] - found.resampled_MB[-1]
    return scores, Interval(difference, *_interval(gap_B), n, CONFIDENCE)


@functools.lru_cache(maxsize=4)  # all tokens, and those of each stratum
def _drawn(n: int, draws: int, bootstrap: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Permutations of n tokens, and how often each of `bootstrap` samples holds each token, float64 [B, N]."""
    rng = np.random.default_rng(0)
    orders = [rng.permutation(n) for _ in range(draws)]
    return orders, rng.multinomial(n, np.full(n, 1 / n), size=bootstrap).astype(np.float64)


def _resampled(first: Ranking, second: Ranking, draws: int, bootstrap: int) -> np.ndarray:
    """Correlations [B] over samples of tokens: a pair counts as often as both its tokens were drawn.

    A token and its own copy are no pair. Ranks stay those of all tokens.
    """
    (mean_B, variance_B), (other_mean_B, other_variance_B) = (r.moments(draws, bootstrap) for r in (first, second))
    times_BN = _drawn(len(first.ranks_NN), draws, bootstrap)[1]
    covariance_B = _over_samples(first.ranks_NN * second.ranks_NN, times_BN) - mean_B * other_mean_B
    spread_B = np.sqrt(variance_B * other_variance_B)
    correlation_B = np.full(len(times_BN), np.nan)
    np.divide(covariance_B, spread_B, out=correlation_B, where=spread_B > 0)
    return correlation_B


def _over_samples(symmetric_NN: np.ndarray, times_BN: np.ndarray) -> np.ndarray:
    """The mean over the pairs of each sample [B] of a symmetric matrix whose diagonal is zero."""
    from scipy.linalg.blas import dtrmm

    upper_NB = dtrmm(1.0, symmetric_NN.T, times_BN.T)  # with one triangle alone: half the work
    pairs_B = times_BN.shape[1] ** 2 - np.square(times_BN).sum(axis=1)
    mean_B: np.ndarray = 2 * np.einsum("nb,bn->b", upper_NB, times_BN) / np.maximum(pairs_B, 1)
    return mean_B


def _interval(resampled_B: np.ndarray) -> tuple[float | None, float | None]:
    finite_B = resampled_B[np.isfinite(resampled_B)]
    if not len(finite_B):
        return None, None
    low, high = np.quantile(finite_B, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
