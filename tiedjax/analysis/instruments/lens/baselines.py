"""What predicting without a model costs, beside one model's final prediction."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from tiedjax.analysis.basis.held_out import FrozenModel, Reading, over_windows, readings
from tiedjax.analysis.basis.ngrams import NGrams
from tiedjax.analysis.basis.statistics import Interval


@dataclass(frozen=True)
class Baselines:
    """Bits a token; of bigram and trigram only the cross-entropy is measured."""

    uniform: Reading
    unigram: Reading
    bigram_cross_entropy: Interval
    trigram_cross_entropy: Interval
    bigram_beta: float
    trigram_gamma: float
    training_tokens: int


def beside(model: FrozenModel, ngrams: NGrams, held_out_WS: np.ndarray) -> Baselines:
    """The predictors beside what a model predicts of held-out windows [W, T + 1], for which `ngrams` was made."""
    V = len(ngrams.unigram_V)
    rows = {"uniform": np.full(V, 1 / V), "unigram": ngrams.unigram_V}
    constant = {name: jnp.asarray(np.log(p_V)[None], jnp.float32) for name, p_V in rows.items()}
    predictors = {name: (lambda chunk, row_1V=row_1V: row_1V) for name, row_1V in constant.items()}
    constant_readings = readings(model, model.last_states(held_out_WS), held_out_WS, predictors)
    bits_WT = ngrams.bits(held_out_WS)
    return Baselines(
        constant_readings["uniform"],
        constant_readings["unigram"],
        over_windows(bits_WT["bigram"], len(held_out_WS)),
        over_windows(bits_WT["trigram"], len(held_out_WS)),
        ngrams.beta,
        ngrams.gamma,
        ngrams.training_tokens,
    )
