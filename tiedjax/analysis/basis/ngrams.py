"""What predicting without a model costs: uniform, unigram, bigram and trigram of the text that a run was shown.

    uniform   1 / V
    unigram   u(w) = (n(w) + 1) / (n + V), n(w) how often w is a target: add-one (Laplace) smoothing
    bigram    b(w | c) = (n(c, w) + beta u(w)) / (n(c) + beta): a Dirichlet prior around the unigram
    trigram   t(w | a, c) = (n(a, c, w) + gamma b(w | c)) / (n(a, c) + gamma): the same around the bigram

(MacKay and Peto 1995). Contexts lie within a window, as the model's do: its first target has one token before it, where
the trigram is the bigram. Strengths are powers of two under which a sample of that text is most likely, each of its
targets left out of every count that it is part of; first beta by the bigram, then gamma by the trigram. Held-out text
chooses nothing.

Axes: W windows, S = T + 1 tokens of one, N positions laid flat, K distinct keys that are counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiedjax.analysis.basis.held_out import training_windows
from tiedjax.data.prepared import Prepared

PREDICTORS = ("uniform", "unigram", "bigram", "trigram")
STRENGTHS = 2.0 ** np.arange(-4, 17)
MOST_TOKENS = 2**27  # training tokens that are counted at most
_SAMPLE = 2**14  # training tokens that choose the strengths


class NGrams:
    """The predictors of training windows int [W, T + 1] a batch, to be asked about `held_out_WS`; V rows of the table.

    Only pairs and triples that occur in the held-out windows or in the sample are counted, which bounds the memory.
    """

    def __init__(self, batches: Iterable[np.ndarray], held_out_WS: np.ndarray, V: int) -> None:
        batches = iter(batches)
        sample, sample_size = [], 0
        while sample_size < _SAMPLE and (batch_WS := next(batches, None)) is not None:
            sample.append(batch_WS)
            sample_size += batch_WS[:, 1:].size
        sample_WS = np.concatenate(sample)
        self._counts = _Counts([sample_WS, held_out_WS], V)
        for batch_WS in itertools.chain(sample, batches):
            self._counts.add(batch_WS)
        left_out = self._counts.of(sample_WS).without_one()
        likelihood = [np.log(left_out.bigram(beta)).sum() for beta in STRENGTHS]
        self.beta = float(STRENGTHS[int(np.argmax(likelihood))])
        likelihood = [np.log(left_out.trigram(self.beta, gamma)).sum() for gamma in STRENGTHS]
        self.gamma = float(STRENGTHS[int(np.argmax(likelihood))])

    @property
    def training_tokens(self) -> int:
        """Targets that were counted."""
        return int(self._counts.target_V.sum())

    @property
    def unigram_V(self) -> np.ndarray:
        """u(w), float64 [V]; no token has probability 0."""
        smoothed_V = self._counts.target_V + 1.0
        return np.asarray(smoothed_V / smoothed_V.sum())

    def bits(self, tokens_WS: np.ndarray) -> dict[str, np.ndarray]:
        """What every target costs each of PREDICTORS: bits, float64 [W, T]; of held-out windows, all or some."""
        occurrences = self._counts.of(tokens_WS)
        p_WT = {
            "uniform": np.full(occurrences.target_WT.shape, 1 / occurrences.V),
            "unigram": occurrences.unigram(),
            "bigram": occurrences.bigram(self.beta),
            "trigram": occurrences.trigram(self.beta, self.gamma),
        }
        return {name: -np.log2(p) for name, p in p_WT.items()}


def ngrams_shown(run: Any, prepared: Prepared, step: int | None, held_out_WS: np.ndarray, V: int) -> NGrams:
    """The predictors of the text that a run was shown up to a step: each window once, MOST_TOKENS at most.

    None, of a model without steps, is all of the text.
    """
    shown = (run.config.train.steps if step is None else step) * run.config.data.batch_size * run.config.model.seq_len
    return NGrams(training_windows(run, prepared, min(shown, MOST_TOKENS)), held_out_WS, V)


@dataclass(frozen=True)
class _Occurrences:
    """The counts around every target, float64 [W, T] each; n in all. A triple's are 0 at a window's first target."""

    target_WT: np.ndarray  # n(w)
    context_WT: np.ndarray  # n(c)
    pair_WT: np.ndarray  # n(c, w)
    two_before_WT: np.ndarray  # n(a, c)
    triple_WT: np.ndarray  # n(a, c, w)
    n: int
    V: int

    def without_one(self) -> _Occurrences:
        """The counts if this target had not been shown, for each target of training windows."""
        first_T = np.arange(self.target_WT.shape[1]) == 0
        of_triples_WT = np.broadcast_to(~first_T, self.target_WT.shape)
        return _Occurrences(
            self.target_WT - 1,
            self.context_WT - 1,
            self.pair_WT - 1,
            self.two_before_WT - of_triples_WT,
            self.triple_WT - of_triples_WT,
            self.n - 1,
            self.V,
        )

    def unigram(self) -> np.ndarray:
        return np.asarray((self.target_WT + 1) / (self.n + self.V))

    def bigram(self, beta: float) -> np.ndarray:
        return np.asarray((self.pair_WT + beta * self.unigram()) / (self.context_WT + beta))

    def trigram(self, beta: float, gamma: float) -> np.ndarray:
        return np.asarray((self.triple_WT + gamma * self.bigram(beta)) / (self.two_before_WT + gamma))


class _Counts:
    """Counts of every token, and of the pairs and triples that windows [W, T + 1] ask for."""

    def __init__(self, asked: Iterable[np.ndarray], V: int) -> None:
        self._V, asked = V, [np.asarray(tokens_WS, np.int64) for tokens_WS in asked]
        self.target_V, self.context_V = np.zeros(V, np.int64), np.zeros(V, np.int64)
        self._pairs = _Keys(_pairs(tokens_WS, V) for tokens_WS in asked)
        self._two_before = _Keys(_pairs(tokens_WS, V)[:, :-1] for tokens_WS in asked)
        self._triples = _Keys(self._triple_keys(tokens_WS)[0] for tokens_WS in asked)

    def add(self, tokens_WS: np.ndarray) -> None:
        """Counts training windows."""
        tokens_WS = np.asarray(tokens_WS, np.int64)
        np.add.at(self.context_V, tokens_WS[:, :-1], 1)
        np.add.at(self.target_V, tokens_WS[:, 1:], 1)
        pair_WT = _pairs(tokens_WS, self._V)
        self._pairs.add(pair_WT)
        self._two_before.add(pair_WT[:, :-1])
        triple_WT, asked_WT = self._triple_keys(tokens_WS)
        self._triples.add(triple_WT[asked_WT])

    def of(self, tokens_WS: np.ndarray) -> _Occurrences:
        """The counts around every target of windows that were asked for."""
        tokens_WS = np.asarray(tokens_WS, np.int64)
        pair_WT = _pairs(tokens_WS, self._V)
        no_triple = ((0, 0), (1, 0))  # at a window's first target
        triple_WT, _ = self._triple_keys(tokens_WS)
        return _Occurrences(
            self.target_V[tokens_WS[:, 1:]].astype(np.float64),
            self.context_V[tokens_WS[:, :-1]].astype(np.float64),
            self._pairs.of(pair_WT),
            np.pad(self._two_before.of(pair_WT[:, :-1]), no_triple),
            np.pad(self._triples.of(triple_WT), no_triple),
            int(self.target_V.sum()),
            self._V,
        )

    def _triple_keys(self, tokens_WS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(a, c, w) of every target but a window's first, [W, T - 1], and whether (a, c) was asked for.

        The two tokens before go by their place among those that were asked for: a V² + c V + w overflows int64 where V
        is above 2²¹.
        """
        place_WT, asked_WT = self._two_before.places(_pairs(tokens_WS, self._V)[:, :-1])
        return place_WT * self._V + tokens_WS[:, 2:], asked_WT


class _Keys:
    """How often each of some keys, int64, was counted."""

    def __init__(self, asked: Iterable[np.ndarray]) -> None:
        self._key_K = np.unique(np.concatenate([np.unique(keys) for keys in asked]))
        self._count_K = np.zeros(len(self._key_K), np.int64)

    def places(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where keys stand among those that were asked for, and whether they do; both of their shape."""
        if not len(self._key_K):  # windows of one target hold no triple
            return np.zeros(keys.shape, np.int64), np.zeros(keys.shape, bool)
        place = np.minimum(np.searchsorted(self._key_K, keys), len(self._key_K) - 1)
        return place, self._key_K[place] == keys

    def add(self, keys: np.ndarray) -> None:
        """Counts those that were asked for."""
        place, asked = self.places(keys)
        np.add.at(self._count_K, place[asked], 1)

    def of(self, keys: np.ndarray) -> np.ndarray:
        """Their counts, float64. ValueError where one was not asked for."""
        place, asked = self.places(keys)
        if not asked.all():
            raise ValueError("these windows hold n-grams that were not asked for when the text was counted")
        return np.asarray(self._count_K[place] if len(self._key_K) else np.zeros(keys.shape), np.float64)


def _pairs(tokens_WS: np.ndarray, V: int) -> np.ndarray:
    """(context, target) of every target as context * V + target, int64 [W, T]."""
    return np.asarray(tokens_WS[:, :-1] * V + tokens_WS[:, 1:])
