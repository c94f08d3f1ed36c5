"""An XLA trace of a few steps of a run, for xprof, TensorBoard or ui.perfetto.dev."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from tiedjax.errors import UserError
from tiedjax.host import process
from tiedjax.host.storage import Growing


@dataclass(frozen=True)
class StepRange:
    """The steps `first` to `last` of a run, both included; the first step of a run is 1."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> StepRange:
        """Reads 'A:B'. UserError unless 1 <= A <= B."""
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--profile-steps: must be A:B with 1 <= A <= B, the first and the last step, got {text!r}")
        return cls(int(match[1]), int(match[2]))


class Trace:
    """Traces the steps of `wanted` (None: none) into a new subfolder of `folder`/plugins/profile, and says so.

    It waits for the devices before and after, so that the trace holds these steps and no other, with what the loop does
    between them and after the last (evaluation, checkpoints). Of a cluster the main process alone traces: itself and
    its devices.
    """

    def __init__(self, wanted: StepRange | None, folder: Path, say: Callable[[str], None]):
        self._wanted, self._folder, self._say = wanted, folder, say
        self._running = False

    def check(self, done: int, last: int) -> None:
        """UserError unless every wanted step is among those still to come, done + 1 to last."""
        if self._wanted and not done < self._wanted.first <= self._wanted.last <= last:
            asked = f"--profile-steps: {self._wanted.first}:{self._wanted.last} cannot be traced"
            to_come = f"the steps to come are {done + 1}:{last}" if done < last else f"all {last} steps are done"
            raise UserError(f"{asked}; {to_come}")

    @contextmanager
    def step(self, number: int, before: Any) -> Iterator[None]:
        """Around the dispatch of step `number`; `before` is what the step before it returned."""
        if self._wanted and number == self._wanted.first and process.is_main():
            jax.block_until_ready(before)
            self._growing = Growing(self._folder)  # the profiler writes to a disk
            jax.profiler.start_trace(self._growing.folder)
            self._running = True
        elif self._wanted and number > self._wanted.last and self._running:
            jax.block_until_ready(before)
            self._stop()
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()
        local = self._growing.folder
        newest = max(local.glob("plugins/profile/*"))  # named by time
        self._say(f"trace: {self._folder / newest.relative_to(local)}")
        self._growing.close()

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._stop()
