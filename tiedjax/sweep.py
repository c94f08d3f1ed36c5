"""Sweeps: which point of an arm's sweep is best, by runs from seeds that the study itself does not use.

The best has the lowest mean loss over those seeds on the held-out windows with even numbers; a study that sweeps
reports losses on the odd ones, so that what chose an option does not judge it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tiedjax.errors import TrainingError, UserError
from tiedjax.host.storage import exists, read_text, write_atomically
from tiedjax.plan import Plan, Point

LOSS = "eval_loss_even"  # of metrics.jsonl, by which a point is chosen
RECORD = "sweep.json"


@dataclass(frozen=True)
class Tried:
    """A point with its losses by seed, nats a token; None where training diverged. `mean` is then None too."""

    values: dict[str, Any]
    losses: dict[str, float | None]
    mean: float | None


@dataclass(frozen=True)
class Choice:
    """What an arm's sweep tried, the place of its best point, and the options whose best value has none beyond it."""

    tried: list[Tried]
    best: int
    at_edge: list[str]


def choose(arm: str, points: Sequence[Point], losses: Mapping[tuple[int, int], float | None]) -> Choice:
    """The best of an arm's points, whose losses are given by (place, seed); the first of equals.

    TrainingError if every point diverged from some seed.
    """
    tried = []
    for place, values in enumerate(points):
        by_seed = {str(seed): loss for (point, seed), loss in losses.items() if point == place}
        known = [loss for loss in by_seed.values() if loss is not None]
        tried.append(Tried(dict(values), by_seed, sum(known) / len(known) if len(known) == len(by_seed) else None))
    means = [math.inf if point.mean is None else point.mean for point in tried]
    best = means.index(min(means))
    if math.isinf(means[best]):
        raise TrainingError(f"sweep: arm {arm!r}: training diverged at every point; sweep lower learning rates")
    return Choice(tried, best, [option for option in points[best] if _at_edge(option, points, points[best])])


def _at_edge(option: str, points: Sequence[Point], best: Point) -> bool:
    """Whether no value beyond the best one was tried; a value that is no number has no edge."""
    values = [point[option] for point in points if type(point[option]) in (int, float)]  # True is an int
    return best[option] in values and best[option] in (min(values), max(values))


def write(out: Path, choices: Mapping[str, Choice]) -> None:
    """Records what was tried and chosen, by arm."""
    write_atomically(out / RECORD, json.dumps(plain(choices), indent=1, allow_nan=False) + "\n")


def plain(choices: Mapping[str, Choice]) -> dict[str, Any]:
    """The choices as results.json holds them."""
    return {arm: asdict(choice) for arm, choice in choices.items()}


def read(plan: Plan, out: Path) -> dict[str, Choice]:
    """The choices recorded in a study's folder; UserError unless they are those of this plan."""
    path = out / RECORD
    if not exists(path):
        raise UserError(f"{path}: no such file; train the sweep first, without --analyse-only")
    try:
        record = json.loads(read_text(path))
        choices = {
            arm: Choice([Tried(**point) for point in choice["tried"]], choice["best"], choice["at_edge"])
            for arm, choice in record.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: does not hold the choices of a sweep; `tiedjax study` writes it anew") from None
    swept = {arm: [dict(point) for point in each.points] for arm, each in plan.arms.items() if each.points}
    if {arm: [point.values for point in choice.tried] for arm, choice in choices.items()} != swept:
        raise UserError(f"{path}: holds another sweep than {plan.path}; `tiedjax study` writes it anew")
    return choices
