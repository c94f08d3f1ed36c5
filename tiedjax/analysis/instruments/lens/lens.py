"""Lenses: what each hidden state already predicts, next to what the model says in the end.

    logit lens   softmax(norm(x_l) U^T)                      (nostalgebraist 2020)
    tuned lens   softmax(norm(x_l + x_l W_l + b_l) U^T)      (Belrose et al. 2023, arXiv 2303.08112)

x_0 is the embedding, x_L the last state before the final norm. Translator l belongs to the state that it was fitted on;
x_L needs none and is read as it is, so its divergence is exactly 0. `published` is the reading of arXiv 2603.26663: the
same translators, each used one state late.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
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
from tiedjax.errors import UserError

MOST_TRAINING_TOKENS = 2**15
HELD_OUT_TOKENS = 4096
NATS = 1 / math.log(2)  # bits in a nat
REPORT_EVERY = 30  # seconds


@dataclass(frozen=True)
class Fit:
    """How a translator's training ended; its KL in bits on the training text, to see overfitting beside `kl`."""

    iterations: int
    evaluations: int
    converged: bool
    training_kl: float


@dataclass(frozen=True)
class State:
    """One hidden state through every lens; `fit` is None at the last, which has no translator.

    Where only some translators were fitted, a lens whose translator is not among them is None too.
    """

    state: int
    name: str
    logit: Reading
    tuned: Reading | None
    published: Reading | None
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
    fitted: Collection[int] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> RunLens:
    """Every state of a run's model through the lenses, and the predictors that its text makes.

    Translators of the states `fitted` (default: all but the last) are fitted on the text that the run was shown, its
    first `fitted_on` tokens (default: `training_tokens`), and read on about `held_out_tokens` that it was not.
    UserError for a state that has no translator.
    """
    rows, width = model.U_VD.shape
    held_out_WS = held_out_windows(prepared, run.seq_len, held_out_tokens)
    training_WS = np.concatenate(list(training_windows(run, prepared, fitted_on or training_tokens(width))))
    read_by_lenses = lens(model, training_WS, held_out_WS, report, fitted)
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
    fitted: Collection[int] | None = None,
) -> Lens:
    """Fits a translator for every state but the last, or for those `fitted`, on training windows, and reads held-out
    windows with all lenses.

    Windows are int [W, T + 1]. `report` is told of each state. UserError for a state that has no translator.
    """
    layers = model.config.layers
    if fitted is not None and not set(fitted) <= set(range(layers)):
        raise UserError(
            f"lens: the states with a translator are 0 to {layers - 1}, got {', '.join(map(str, sorted(fitted)))}"
        )
    minima = train(model, training_WS, report, fitted)
    scores = read(model, held_out_WS, [None if minimum is None else minimum.point for minimum in minima])
    states = [
        State(state, name_of(state), *by_lens, _fit_of(minimum))
        for state, (by_lens, minimum) in enumerate(zip(scores, [*minima, None], strict=True))
    ]
    training_tokens, held_out_tokens = (
        windows_WS.shape[0] * (windows_WS.shape[1] - 1) for windows_WS in (training_WS, held_out_WS)
    )
    fits_any = any(state.fit for state in states)
    return Lens(states, training_tokens if fits_any else 0, held_out_tokens, len(held_out_WS))


def _fit_of(minimum: Minimum | None) -> Fit | None:
    if minimum is None:
        return None
    return Fit(minimum.iterations, minimum.evaluations, minimum.converged, minimum.value * NATS)


def training_tokens(width: int) -> int:
    """How many tokens fit translators of [width + 1, width]: 64 times the width, if memory for the states allows."""
    return min(64 * width, MOST_TRAINING_TOKENS)


def early_states(layers: int) -> range:
    """The states of the first third of the layers, the input among them."""
    return range(first_third(layers) + 1)


def name_of(state: int) -> str:
    """What a hidden state is called."""
    return "input" if state == 0 else f"layer {state}"


def train(
    model: FrozenModel,
    training_WS: np.ndarray,
    report: Callable[[str], None],
    fitted: Collection[int] | None = None,
) -> list[Minimum | None]:
    """The translators of the states 0 .. L - 1; None where a state is not among those `fitted`."""
    if fitted is not None and not fitted:
        return [None] * model.config.layers
    x_LND = model.states(training_WS)
    lesson = teacher(model, x_LND[-1])
    minima: list[Minimum | None] = []
    for state, x_ND in enumerate(x_LND[:-1]):
        if fitted is not None and state not in fitted:
            minima.append(None)
            continue
        minimum = fit(model, x_ND, lesson, _progress(name_of(state), report))
        minima.append(minimum)
        ended = "converged" if minimum.converged else "not converged"
        report(
            f"{name_of(state)} (of {len(x_LND) - 1} layers): {minimum.value * NATS:.3f} bits on training text "
            f"after {minimum.iterations} iterations, {ended}"
        )
    return minima


def _progress(name: str, report: Callable[[str], None]) -> Callable[[int, float], None]:
    """Reports where a fit is that takes longer than REPORT_EVERY, as often."""
    last = time.monotonic()

    def progress(evaluations: int, value: float) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_EVERY:
            last = time.monotonic()
            report(f"{name}: {value * NATS:.3f} bits on training text after {evaluations} evaluations, not yet done")

    return progress


def read(
    model: FrozenModel, tokens_WS: np.ndarray, translators: Sequence[np.ndarray | None]
) -> list[tuple[Reading, Reading | None, Reading | None]]:
    """Readings of every state through the logit lens, the tuned lens and the published reading.

    `translators` are [D + 1, D], W above b, of the states 0 .. L - 1; None is of a state without one, and so is a
    reading by it.
    """
    x_LND = model.states(tokens_WS)
    thetas = {state: jnp.asarray(theta, jnp.float32) for state, theta in enumerate(translators) if theta is not None}
    last = len(translators)
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

    can_read = {pair for pairs in lenses for pair in pairs if pair[1] is None or pair[1] in thetas}
    found = readings(model, x_LND[-1], tokens_WS, {pair: predictor(*pair) for pair in sorted(can_read, key=str)})
    return [(found[logit], found.get(tuned), found.get(published)) for logit, tuned, published in lenses]
