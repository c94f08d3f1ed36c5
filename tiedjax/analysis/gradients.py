"""Gradient flow: how much of the table's gradient comes from each role.

The norms are L2 norms of the exact [V, D] role gradients before any role scaling, so that arms compare like with like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

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


@dataclass(frozen=True)
class Window:
    """Means over the logged steps from `first` to `last`, both included."""

    first: int
    last: int
    logged_steps: int
    output_share: float | None
    cosine: float | None


@dataclass(frozen=True)
class Deciles:
    """Role-gradient norms per token-frequency decile at one step."""

    step: int
    input_norm: list[float]
    output_norm: list[float]


@dataclass(frozen=True)
class GradientFlow:
    """Per logged step: norms, output / (input + output), cosine between the roles; means over windows; deciles."""

    steps: list[int]
    input_norm: list[float]
    output_norm: list[float]
    output_share: list[float]
    cosine: list[float]
    windows: list[Window]
    early: Window
    overall: Window
    deciles: list[Deciles]


def output_share(input_norm: np.ndarray, output_norm: np.ndarray) -> np.ndarray:
    """output / (input + output) of L2 norms; NaN where both are 0."""
    total = input_norm + output_norm
    return np.divide(output_norm, total, out=np.full(np.shape(total), np.nan), where=total > 0)


def gradient_flow(metrics: Mapping[str, np.ndarray]) -> GradientFlow:
    """The gradient flow in a run's metrics. UserError when a column is missing or nothing was logged."""
    wanted = ["step", "input_grad_norm", "output_grad_norm", "role_grad_cosine"]
    missing = [name for name in wanted if name not in metrics]
    if missing:
        raise UserError(f"metrics: no column {missing[0]!r}; gradient flow needs {', '.join(wanted)}")
    steps, before, after, cosine = (np.asarray(metrics[name], np.float64) for name in wanted)
    if not len(steps):
        raise UserError("metrics: no step was logged")
    share = output_share(before, after)
    last = int(steps[-1])
    spans = [(a, min(b, last)) for a, b in WINDOWS if a <= last]
    windows = [_window(a, b, steps, share, cosine) for a, b in spans]
    return GradientFlow(
        steps=[int(s) for s in steps],
        input_norm=before.tolist(),
        output_norm=after.tolist(),
        output_share=share.tolist(),
        cosine=cosine.tolist(),
        windows=[w for w in windows if w.logged_steps],
        early=_window(EARLY[0], min(EARLY[1], last), steps, share, cosine),
        overall=_window(int(steps[0]), last, steps, share, cosine),
        deciles=_deciles(metrics),
    )


def _window(first: int, last: int, steps: np.ndarray, share: np.ndarray, cosine: np.ndarray) -> Window:
    inside = (steps >= first) & (steps <= last)
    return Window(first, last, int(inside.sum()), _mean(share[inside]), _mean(cosine[inside]))


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def _deciles(metrics: Mapping[str, np.ndarray]) -> list[Deciles]:
    if not {"input_grad_norm_deciles", "output_grad_norm_deciles"} <= set(metrics):
        return []
    rows = zip(metrics["step"], metrics["input_grad_norm_deciles"], metrics["output_grad_norm_deciles"], strict=True)
    return [
        Deciles(int(step), np.asarray(i, np.float64).tolist(), np.asarray(o, np.float64).tolist())
        for step, i, o in rows
        if np.isfinite(i).any() or np.isfinite(o).any()
    ]
