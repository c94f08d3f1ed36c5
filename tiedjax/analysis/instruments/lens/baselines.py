"""What predicting without a model costs: bits per held-out token of uniform, unigram and bigram predictors.

    uniform   1 / V
    unigram   u(w) = (n(w) + 1) / (n + V), n(w) how often w is a target in training: add-one (Laplace) smoothing
    bigram    (n(c, w) + beta u(w)) / (n(c) + beta): a Dirichlet prior around the unigram (MacKay and Peto 1995)

Both count the text that the run was shown. beta is the power of two under which a sample of its pairs, each left out of
its own counts, is most likely; held-out text chooses nothing.

Axes: W windows, S = T + 1 tokens of one, N pairs of neighbouring tokens, K distinct pairs that are counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from tiedjax.analysis.basis.held_out import FrozenModel, Reading, over_windows, readings
from tiedjax.analysis.basis.statistics import Interval

BETAS = 2.0 ** np.arange(-4, 17)
MOST_TOKENS = 2**27  # training tokens that are counted at most
_SAMPLE = 2**14  # training pairs that choose beta


@dataclass(frozen=True)
class Counts:
    """What a run was shown: each target [V], each context [V], and the pairs that were asked for [K]."""

    target_V: np.ndarray
    context_V: np.ndarray
    pair_count_K: np.ndarray
    pair_K: np.ndarray  # context * V + target, ascending

    def bigram(self, pairs_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """n(c, w), n(c) and u(w) of pairs that were asked for, float64 [N] each."""
        n_cw_N = self.pair_count_K[np.searchsorted(self.pair_K, pairs_N)].astype(np.float64)
        context_N, target_N = np.divmod(pairs_N, len(self.target_V))
        return n_cw_N, self.context_V[context_N].astype(np.float64), unigram(self.target_V)[target_N]


@dataclass(frozen=True)
class Baselines:
    """The predictors beside one model's final prediction; of the bigram only the cross-entropy is measured."""

    uniform: Reading
    unigram: Reading
    bigram_cross_entropy: Interval
    bigram_beta: float
    training_tokens: int


class CountPredictors:
    """Unigram and bigram of the text that a run was shown, on held-out windows int [W, T + 1]; V rows of the table."""

    def __init__(self, batches: Iterable[np.ndarray], held_out_WS: np.ndarray, V: int) -> None:
        batches = iter(batches)
        sample_batches, sample_size = [], 0
        while sample_size < _SAMPLE and (batch := next(batches, None)) is not None:
            sample_batches.append(batch)
            sample_size += batch.shape[0] * (batch.shape[1] - 1)
        sample_N, held_out_N = _pairs(np.concatenate(sample_batches), V), _pairs(held_out_WS, V)
        counts = count(itertools.chain(sample_batches, batches), np.unique(np.concatenate([sample_N, held_out_N])), V)
        n_cw_N, n_c_N, u_N = counts.bigram(sample_N)
        left_out = [np.log((n_cw_N - 1 + beta * u_N) / (n_c_N - 1 + beta)).mean() for beta in BETAS]
        self.beta = float(BETAS[int(np.argmax(left_out))])
        n_cw_N, n_c_N, u_N = counts.bigram(held_out_N)
        bits_N = -np.log2((n_cw_N + self.beta * u_N) / (n_c_N + self.beta))
        self.bigram_bits_WT = bits_N.reshape(len(held_out_WS), -1)
        self.unigram_V, self.training_tokens = unigram(counts.target_V), int(counts.target_V.sum())
        self._held_out_WS = held_out_WS

    def beside(self, model: FrozenModel) -> Baselines:
        """These and the uniform predictor beside what a model predicts."""
        V = len(self.unigram_V)
        rows = {"uniform": np.full(V, 1 / V), "unigram": self.unigram_V}
        constant = {name: jnp.asarray(np.log(p_V)[None], jnp.float32) for name, p_V in rows.items()}
        predictors = {name: (lambda chunk, row_1V=row_1V: row_1V) for name, row_1V in constant.items()}
        constant_readings = readings(model, model.last_states(self._held_out_WS), self._held_out_WS, predictors)
        bigram = over_windows(self.bigram_bits_WT, len(self._held_out_WS))
        return Baselines(
            constant_readings["uniform"], constant_readings["unigram"], bigram, self.beta, self.training_tokens
        )


def unigram(count_V: np.ndarray) -> np.ndarray:
    """u(w), float64 [V], from counts as target; no token has probability 0."""
    smoothed_V = np.asarray(count_V, np.float64) + 1
    return smoothed_V / smoothed_V.sum()


def count(batches: Iterable[np.ndarray], pair_K: np.ndarray, V: int) -> Counts:
    """Counts over windows [W, T + 1]; `pair_K` are the pairs that are counted, ascending."""
    target_V, context_V, pair_count_K = np.zeros(V, np.int64), np.zeros(V, np.int64), np.zeros(len(pair_K), np.int64)
    for batch_WS in batches:
        pair_N = _pairs(batch_WS, V)
        context_N, target_N = np.divmod(pair_N, V)
        context_V += np.bincount(context_N, minlength=V)
        target_V += np.bincount(target_N, minlength=V)
        place_N = np.minimum(np.searchsorted(pair_K, pair_N), len(pair_K) - 1)
        pair_count_K += np.bincount(place_N[pair_K[place_N] == pair_N], minlength=len(pair_K))
    return Counts(target_V, context_V, pair_count_K, pair_K)


def _pairs(tokens_WS: np.ndarray, V: int) -> np.ndarray:
    """(context, target) of every position as context * V + target, int64 [N]."""
    tokens_WS = np.asarray(tokens_WS, np.int64)
    return (tokens_WS[:, :-1] * V + tokens_WS[:, 1:]).ravel()
