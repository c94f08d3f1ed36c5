"""The metrics of every step, from the devices to metrics.jsonl and the terminal."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from tiedjax.config import RunConfig
from tiedjax.host import process
from tiedjax.left_out import LeftOut
from tiedjax.metrics import MetricsLog, Progress
from tiedjax.sinks import say
from tiedjax.step_metrics import StepMetrics


@dataclass(frozen=True)
class _Pending:
    """The metrics of a step that was dispatched."""

    step: int
    metrics: StepMetrics
    observed: dict[str, jax.Array]
    deciles: bool

    def values(self) -> dict[str, Any]:
        """The metrics by name, scalars and lists; waits for the step."""
        observed = {name: array.tolist() for name, array in jax.device_get(self.observed).items()}
        return self.metrics.fetched() | observed


class Recorder:
    """Reads a step's metrics once the next step is under way, so that reading never makes the devices wait.

    `logged_every` is `train.log_every` of the command that this one continues; `may_write` raises where this process
    may not write any more; `skipped` is how many updates were left out so far. `ended_by` is the one that was too many,
    once it is read: nothing is recorded from that step on.
    """

    def __init__(
        self,
        cfg: RunConfig,
        out: Path,
        label: str,
        start: int,
        logged_every: int | None = None,
        may_write: Callable[[], None] = lambda: None,
        skipped: int = 0,
    ):
        self._cfg = cfg
        self._label, self._skipped = label, skipped
        self.ended_by: LeftOut | None = None
        self._log: MetricsLog | None = None
        if process.is_main():
            self._log = MetricsLog(
                out,
                start,
                logged_every=logged_every,
                trackers=cfg.train.trackers,
                label=label,
                config=dataclasses.asdict(cfg),
                may_write=may_write,
            )
        self._progress = Progress(label, cfg.train.steps) if process.is_main() else None
        self._pending: _Pending | None = None
        self._read = (start, time.monotonic())

    def record(self, step: int, metrics: StepMetrics, observed: dict[str, jax.Array], *, deciles: bool) -> None:
        """Takes the metrics of a step that was dispatched, and what was observed before it; reads the step before."""
        self.flush()
        metrics.numbers.copy_to_host_async()
        self._pending = _Pending(step, metrics, observed, deciles)

    def flush(self, evaluate: Callable[[], dict[str, float] | None] | None = None) -> bool:
        """Reads what is pending, and evaluates if asked, unless it is what ends the run.

        False if the evaluation was given up; the step's line is written without it, until `complete` adds it.
        """
        if self._pending is None or self.ended_by:
            return True
        pending, self._pending = self._pending, None
        step, deciles, values = pending.step, pending.deciles, pending.values()
        self._take(int(values.pop("skipped")), LeftOut(step, values["loss"], values["grad_norm"]))
        if self.ended_by:
            return True
        (before, then), now = self._read, time.monotonic()
        per_step = self._cfg.data.batch_size * self._cfg.model.seq_len
        row: dict[str, Any] = {"step": step, "loss": values.pop("loss"), "tokens": step * per_step, **values}
        if not deciles:
            row = {name: value for name, value in row.items() if not name.endswith("_deciles")}
        if self._skipped:
            row["skipped"] = self._skipped
        row["tokens_per_second"] = (step - before) * per_step / (now - then)
        shown = f"loss {row['loss']:.3f}  output share {row['output_grad_share']:.2f}"
        losses = evaluate() if evaluate else {}
        if losses:
            row |= losses
            shown += f"  held-out {row['eval_loss']:.3f}"
        if self._log and self._progress:
            self._progress.update(step, shown)
        if step % self._cfg.train.log_every == 0 or deciles or evaluate:
            self._read = (step, time.monotonic() if evaluate else now)
            if self._log:
                self._log.write(row)
        return losses is not None

    def _take(self, skipped: int, last: LeftOut) -> None:
        """Takes `TrainState.skipped` after a step; says it if the step was left out."""
        if skipped < 0:
            self.ended_by = last
        elif skipped > self._skipped:
            self._skipped = skipped
            if process.is_main():
                say(f"{self._label}: {last.within(skipped, self._cfg.train.skip_nonfinite)}")

    def complete(self, step: int, losses: dict[str, float]) -> None:
        """Adds what an earlier call had not evaluated to the line of this step, its last."""
        if self._log:
            self._log.complete(step, losses)

    def sync(self) -> bool:
        """Returns when what was read so far lies where the run does, and whether it does."""
        return self._log is None or self._log.sync()

    def close(self) -> None:
        """Closes the log; what is pending was flushed by the checkpoint that ends every call."""
        if self._log and self._progress:
            self._log.close()
            self._progress.end()
