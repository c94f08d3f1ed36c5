"""Lenses: what each hidden state already predicts, next to what the model says in the end.

    logit lens   softmax(norm(x_l) U^T)                      (nostalgebraist 2020)
    tuned lens   softmax(norm(x_l + x_l W_l + b_l) U^T)      (Belrose et al. 2023, arXiv 2303.08112)

x_0 is the embedding, x_L the last state before the final norm. Translator l belongs to the state that it was fitted on;
x_L needs none and is read as it is, so its divergence is exactly 0. `published` is the reading of arXiv 2603.26663: the
same translators, each used one state late.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tiedjax.analysis.basis.held_out import (
    FrozenModel,
    Reading,
    first_third,
    held_out_windows,
    readings,
    training_windows,
)
from tiedjax.analysis.basis.minimisation import Minimum
from tiedjax.analysis.basis.ngrams import ngrams_shown
from tiedjax.analysis.instruments.lens.baselines import Baselines, beside
from tiedjax.analysis.instruments.lens.training import CRITERION, fit, teacher, translated
from tiedjax.data.prepared import Prepared

MOST_TRAINING_TOKENS = 2**15
HELD_OUT_TOKENS = 4096
NATS = 1 / math.log(2)  # bits in a nat


@dataclass(frozen=True)
class Fit:
    """How a translator's training ended; its KL in bits on the training text, to see overfitting beside `kl`."""

    iterations: int
    evaluations: int
    converged: bool
    training_kl: float


@dataclass(frozen=True)
class State:
    """One hidden state through every lens; `fit` is None at the last, which has no translator."""

    state: int
    name: str
    logit: Reading
    tuned: Reading
    published: Reading
    fit: Fit | None


@dataclass(frozen=True)
class Lens:
    """Every state of one model, and the tokens that they were fitted on and scored on."""

    states: list[State]
    training_tokens: int
    held_out_tokens: int
    held_out_windows: int


def tuned_translator(state: int, last: int) -> int | None:
    """The translator that a state is read with: its own; the last state has none."""
    return None if state == last else state


def published_translator(state: int) -> int:
    """The translator that arXiv 2603.26663's code reads a state with: that of the state before, the input's own."""
    return max(state - 1, 0)


@dataclass(frozen=True)
class RunLens(Lens):
    """A run's model at its last full checkpoint through every lens, beside what predicting without a model costs."""

    step: int | None
    rows: int
    width: int
    criterion: str
    baselines: Baselines


def measure(
    model: FrozenModel,
    run: Any,
    prepared: Prepared,
    *,
    held_out_tokens: int = HELD_OUT_TOKENS,
    fitted_on: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> RunLens:
    """Every state of a run's model through the lenses, and the predictors that its text makes.

    Translators are fitted on the text that the run was shown, its first `fitted_on` tokens (default:
    `training_tokens`), and read on about `held_out_tokens` that it was not.
    """
    rows, width = model.U_VD.shape
    held_out_WS = held_out_windows(prepared, run.seq_len, held_out_tokens)
    training_WS = np.concatenate(list(training_windows(run, prepared, fitted_on or training_tokens(width))))
    read_by_lenses = lens(model, training_WS, held_out_WS, report)
    ngrams = ngrams_shown(run, prepared, model.step, held_out_WS, rows)
    return RunLens(
        **vars(read_by_lenses),
        step=model.step,
        rows=rows,
        width=width,
        criterion=CRITERION,
        baselines=beside(model, ngrams, held_out_WS),
    )


def lens(
    model: FrozenModel,
    training_WS: np.ndarray,
    held_out_WS: np.ndarray,
    report: Callable[[str], None] = lambda line: None,
) -> Lens:
    """Fits a translator for every state but the last on training windows, and reads held-out windows with all lenses.

    Windows are int [W, T + 1]. `report` is told of each state.
    """
    translators = train(model, training_WS, report)
    scores = read(model, held_out_WS, [translator.point for translator in translators])
    names = [name_of(state) for state in range(len(translators) + 1)]
    fits = [
        Fit(minimum.iterations, minimum.evaluations, minimum.converged, minimum.value * NATS) for minimum in translators
    ]
    states = [
        State(state, name, *by_lens, fit)
        for state, (name, by_lens, fit) in enumerate(zip(names, scores, [*fits, None], strict=True))
    ]
    training_tokens, held_out_tokens = (
        windows_WS.shape[0] * (windows_WS.shape[1] - 1) for windows_WS in (training_WS, held_out_WS)
    )
    return Lens(states, training_tokens, held_out_tokens, len(held_out_WS))


def training_tokens(width: int) -> int:
    """How many tokens fit translators of [width + 1, width]: 64 times the width, if memory for the states allows."""
    return min(64 * width, MOST_TRAINING_TOKENS)


def early_states(layers: int) -> range:
    """The states of the first third of the layers, the input among them."""
    return range(first_third(layers) + 1)


def name_of(state: int) -> str:
    """What a hidden state is called."""
    return "input" if state == 0 else f"layer {state}"


def train(model: FrozenModel, training_WS: np.ndarray, report: Callable[[str], None]) -> list[Minimum]:
    """The translators of the states 0 .. L - 1."""
    x_LND = model.states(training_WS)
    lesson = teacher(model, x_LND[-1])
    minima = []
    for state, x_ND in enumerate(x_LND[:-1]):
        minima.append(fit(model, x_ND, lesson))
        ended = "converged" if minima[-1].converged else "not converged"
        report(
            f"{name_of(state)} (of {len(x_LND) - 1} layers): {minima[-1].value * NATS:.3f} bits on training text "
            f"after {minima[-1].iterations} iterations, {ended}"
        )
    return minima


def read(
    model: FrozenModel, tokens_WS: np.ndarray, translators: Sequence[np.ndarray]
) -> list[tuple[Reading, Reading, Reading]]:
    """Readings of every state through the logit lens, the tuned lens and the published reading.

    `translators` are [D + 1, D], W above b, of the states 0 .. L - 1.
    """
    x_LND = model.states(tokens_WS)
    thetas = [jnp.asarray(theta, jnp.float32) for theta in translators]
    last = len(thetas)
    lenses = [
        ((state, None), (state, tuned_translator(state, last)), (state, published_translator(state)))
        for state in range(last + 1)
    ]

    def predictor(state: int, translator: int | None) -> Callable[[slice], jax.Array]:
        def predict(chunk: slice) -> jax.Array:
            x_CD = jnp.asarray(x_LND[state, chunk])
            if translator is None:
                return model.log_probabilities(model.normed(x_CD))
            return model.log_probabilities(translated(model.config, model.norm, thetas[translator], x_CD))

        return predict

    predictors = {pair: predictor(*pair) for pairs in lenses for pair in pairs}
    by_predictor = readings(model, x_LND[-1], tokens_WS, predictors)
    return [(by_predictor[logit], by_predictor[tuned], by_predictor[published]) for logit, tuned, published in lenses]
