"""Updates that are left out because the loss or the gradient is not finite: what is said and written of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tiedjax.host import storage

NOT_FINITE = "not_finite.json"  # of the step that ended the run


@dataclass(frozen=True)
class LeftOut:
    """A step whose update was left out, with its loss and the norm of its gradient before role scales."""

    step: int
    loss: float
    grad_norm: float

    def __str__(self) -> str:
        for name, value in [("loss", self.loss), ("norm of the gradient", self.grad_norm)]:
            if not math.isfinite(value):
                return f"step {self.step}: the {name} is {value}"
        return f"step {self.step}: the norm of the gradient with its role scales is not finite"

    def within(self, count: int, most: int) -> str:
        """What is said where the run goes on: this is number `count` of `most`."""
        return f"{self}; the update is left out, {count} of the {most} that train.skip_nonfinite allows"

    def ends(self, out: Path, state: int | None, count: int) -> str:
        """What is said where the run in `out` ends, after `count` others that were left out.

        `state` is the step of the last finite state, 0 for the initial one; None where an update before made it
        infinite.
        """
        advice = "try a lower optimizer.learning_rate"
        windows = f"the windows of its batch are in {out / NOT_FINITE}"
        if state is None:
            return f"{self}, after an update that was not finite; {windows}; {advice}"
        kept = f"the state before it is in {out / 'checkpoints' / str(state)}; " if state else ""
        return f"{self}; {kept}{windows}; {advice}, or leave it out with train.skip_nonfinite={count + 1}"

    def write(self, out: Path, state: int | None, windows: Sequence[int]) -> None:
        """Writes `NOT_FINITE`: this step, its batch's training windows, row by row, and the last finite state."""
        record = {
            "step": self.step,
            "loss": _finite(self.loss),
            "grad_norm": _finite(self.grad_norm),
            "state": state,
            "windows": list(windows),
        }
        storage.write_atomically(out / NOT_FINITE, json.dumps(record, allow_nan=False) + "\n")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
