"""Gradient flow: how much of the table's gradient comes from each role.

The norms are L2 norms of the exact [V, D] role gradients before any role scaling, so that arms compare like with like.
Figure 4 of arXiv 2603.26663 divides by another input norm: that of the gradient with respect to the looked-up vectors,
[B, T, D], in which the positions of one token do not add up. Its share is the paper's form.

Axes: S logged steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tiedjax.analysis.basis.statistics import over_steps
from tiedjax.errors import UserError

# The windows of Figure 4 of arXiv 2603.26663, first and last step included; the gap 2001-5000 is filled.
WINDOWS = (
    (1, 10),
    (11, 50),
    (51, 100),
    (101, 200),
    (201, 500),
    (501, 1000),
    (1001, 2000),
    (2001, 5000),
    (5001, 10_000),
)
EARLY = (1, 50)
HALF_LIFE = 10
NEEDED = ("step", "input_grad_norm", "output_grad_norm", "role_grad_cosine")
PAPER_NEEDS = "activation_grad_norm"


@dataclass(frozen=True)
class Window:
    """Means over the steps from `first` to `last`, both included, by `over_steps`.

    `paper_output_share` has the activations' norm for the input norm; `activation_ratio` is that norm over the input
    norm. Both are None where the run did not log it.
    """

    first: int
    last: int
    logged_steps: int
    output_share: float | None
    cosine: float | None
    paper_output_share: float | None
    activation_ratio: float | None


@dataclass(frozen=True)
class Deciles:
    """Role-gradient norms per token-frequency decile at one step, and output / (input + output) of them."""

    step: int
    input_norm: list[float]
    output_norm: list[float]
    output_share: list[float]


@dataclass(frozen=True)
class Makeup:
    """What the output role's gradient is made of at the steps where that was measured.

    `push` is push / (pull + push) of L2 norms; `common`, `rest` and `cross` are shares of the squared norm, of the mean
    probability's error times the mean state, of the rest, and of twice their inner product; they sum to 1.
    """

    steps: list[int]
    push: list[float]
    common: list[float]
    rest: list[float]
    cross: list[float]


@dataclass(frozen=True)
class Noise:
    """Over `logged_steps` steps: which share of each role's squared gradient norm is noise of the batch.

    Sums over the steps, divided once: estimated from how the microbatches of a step differ, a step's signal may be
    negative. None where all that was summed is not above 0.
    """

    logged_steps: int
    input: float | None
    output: float | None


@dataclass(frozen=True)
class GradientFlow:
    """Per logged step: norms, output / (input + output), cosine between the roles; means over windows; deciles.

    `activation_norm` is the norm of the gradient with respect to the looked-up vectors; None where it was not logged.
    `makeup` and `noise` are None likewise; noise needs two microbatches.
    """

    steps: list[int]
    input_norm: list[float]
    output_norm: list[float]
    output_share: list[float]
    cosine: list[float]
    activation_norm: list[float] | None
    windows: list[Window]
    early: Window
    overall: Window
    deciles: list[Deciles]
    makeup: Makeup | None
    noise: Noise | None


def output_share(input_norm: np.ndarray, output_norm: np.ndarray) -> np.ndarray:
    """output / (input + output) of L2 norms; NaN where both are 0."""
    return _ratio(output_norm, input_norm + output_norm)


def smooth(steps: np.ndarray, values: np.ndarray, half_life: float = HALF_LIFE) -> np.ndarray:
    """Exponential mean up to each step: a value `half_life` steps ago weighs half; weights add to 1 from the start.

    Values that are NaN do not count; NaN before the first one that does.
    """
    means_S, total, weight, before = np.full(len(values), np.nan), 0.0, 0.0, 0.0
    for i, (step, value) in enumerate(zip(steps, values, strict=True)):
        decay = 0.5 ** ((step - before) / half_life)
        total, weight, before = decay * total, decay * weight, step
        if np.isfinite(value):
            total, weight = total + value, weight + 1
        means_S[i] = total / weight if weight else np.nan
    return means_S


def measure(metrics: Mapping[str, np.ndarray]) -> GradientFlow:
    """The gradient flow in a run's metrics. UserError when a column is missing or nothing was logged.

    >>> columns = {"step": [1, 2], "input_grad_norm": [1, 1], "output_grad_norm": [3, 1], "role_grad_cosine": [0, 0]}
    >>> measure({name: np.array(values) for name, values in columns.items()}).output_share
    [0.75, 0.5]
    """
    missing = [name for name in NEEDED if name not in metrics]
    if missing:
        raise UserError(f"metrics: no column {missing[0]!r}; gradient flow needs {', '.join(NEEDED)}")
    step_S, input_norm_S, output_norm_S, cosine_S = (np.asarray(metrics[name], np.float64) for name in NEEDED)
    if not len(step_S):
        raise UserError("metrics: no step was logged")
    has_activations = PAPER_NEEDS in metrics
    activation_norm_S = (
        np.asarray(metrics[PAPER_NEEDS], np.float64) if has_activations else np.full(len(step_S), np.nan)
    )
    share_S = output_share(input_norm_S, output_norm_S)
    columns = (
        share_S,
        cosine_S,
        output_share(activation_norm_S, output_norm_S),
        _ratio(activation_norm_S, input_norm_S),
    )
    last = int(step_S[-1])
    spans = [(a, min(b, last)) for a, b in WINDOWS if a <= last]
    windows = [_window(a, b, step_S, columns) for a, b in spans]
    return GradientFlow(
        steps=[int(s) for s in step_S],
        input_norm=input_norm_S.tolist(),
        output_norm=output_norm_S.tolist(),
        output_share=share_S.tolist(),
        cosine=cosine_S.tolist(),
        activation_norm=activation_norm_S.tolist() if has_activations else None,
        windows=[w for w in windows if w.logged_steps],
        early=_window(EARLY[0], min(EARLY[1], last), step_S, columns),
        overall=_window(int(step_S[0]), last, step_S, columns),
        deciles=_deciles(metrics),
        makeup=_makeup(metrics),
        noise=_noise(metrics),
    )


def _makeup(metrics: Mapping[str, np.ndarray]) -> Makeup | None:
    names = [f"output_{part}_share" for part in ("push", "common", "rest", "cross")]
    if not set(names) <= set(metrics):
        return None
    columns = np.array([np.asarray(metrics[name], np.float64) for name in names])
    measured_S = np.isfinite(columns).all(axis=0)
    return Makeup([int(s) for s in np.asarray(metrics["step"])[measured_S]], *columns[:, measured_S].tolist())


def _noise(metrics: Mapping[str, np.ndarray]) -> Noise | None:
    step_S = metrics["step"]
    means = {
        f"{role}_{part}": over_steps(step_S, np.asarray(metrics[f"{role}_grad_{part}"], np.float64), 1, int(step_S[-1]))
        or 0.0
        for role in ("input", "output")
        for part in ("signal", "noise")
        if f"{role}_grad_{part}" in metrics
    }
    if not means:
        return None
    wholes = {role: means[f"{role}_signal"] + means[f"{role}_noise"] for role in ("input", "output")}
    shares = {role: means[f"{role}_noise"] / whole if whole > 0 else None for role, whole in wholes.items()}
    return Noise(int(np.isfinite(np.asarray(metrics["output_grad_noise"], np.float64)).sum()), **shares)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def _window(first: int, last: int, step_S: np.ndarray, columns: tuple[np.ndarray, ...]) -> Window:
    inside_S = (step_S >= first) & (step_S <= last)
    return Window(first, last, int(inside_S.sum()), *(over_steps(step_S, column, first, last) for column in columns))


def _deciles(metrics: Mapping[str, np.ndarray]) -> list[Deciles]:
    if not {"input_grad_norm_deciles", "output_grad_norm_deciles"} <= set(metrics):
        return []
    norms = (np.asarray(metrics[f"{role}_grad_norm_deciles"], np.float64) for role in ("input", "output"))
    return [
        Deciles(int(step), i.tolist(), o.tolist(), output_share(i, o).tolist())
        for step, i, o in zip(metrics["step"], *norms, strict=True)
        if np.isfinite(i).any() or np.isfinite(o).any()
    ]
