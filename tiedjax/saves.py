"""What a run saves and when, and how many bytes of it will lie on the disk when all its steps are done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tiedjax.config import TrainConfig
from tiedjax.errors import UserError
from tiedjax.text import binary


def snapshot_steps(every: int, last: int) -> dict[int, bool]:
    """After how many updates tables are saved, ascending: 0, 1, 2, 4, ... below `every`, its multiples, and the last.

    True for the early ones, 1, 2, 4, ...; False for 0, from which movement is measured, and for those from `every` on.
    """
    early = {1 << power for power in range(every.bit_length()) if 1 << power < min(every, last)}
    return {step: step in early for step in sorted({*early, *range(0, last, every), last})}


class Sizes(NamedTuple):
    """Bytes of a run's tables, of their account and of its whole state."""

    tables: int
    account: int
    state: int


class Kept(NamedTuple):
    """Which saves stay when others are made: the `newest`, multiples of `every`, and those with a file STEP.pinned."""

    newest: int
    every: int | None = None

    def of(self, steps: Sequence[int]) -> set[int]:
        """Those of these steps, ascending, that stay; of the pinned ones it knows nothing."""
        return {*steps[-self.newest :], *(step for step in steps if self.every and step % self.every == 0)}


@dataclass(frozen=True)
class Saves:
    """The snapshots of a run, by step (True: rounded to bfloat16), and its states.

    A state is saved every `state_every` steps and after the last of `steps`; `kept` says which stay. What is saved has
    the sizes `first`, and after the step `changed`, where its scheme changes, `later`. str() is what is said before
    step 1.
    """

    snapshots: dict[int, bool]
    steps: int
    state_every: int
    kept: Kept
    first: Sizes
    changed: int
    later: Sizes

    @classmethod
    def of(cls, train: TrainConfig, first: Sizes, changed: int | None = None, later: Sizes | None = None) -> Saves:
        """Of a run with these sizes.

        Snapshots from `snapshot_every` on lie as many times farther apart as `snapshot_gib` asks for. UserError where
        it cannot hold the early ones and the last.
        """
        limit = None if train.snapshot_gib is None else train.snapshot_gib * 2**30
        most = train.steps // train.snapshot_every + 1  # times as far apart: then none but the early ones and the last
        later = later or first
        snapshot = max(first.tables + first.account, later.tables + later.account)
        fewest = 1 if limit is None else max(1, int(most / max(1, limit // snapshot)))  # below it is too much
        for times in range(min(fewest, most), most + 1):
            early = snapshot_steps(times * train.snapshot_every, train.steps)
            snapshots = {step: early[step] and train.early_snapshots_dtype == "bfloat16" for step in early}
            every, kept = train.checkpoint_every or train.steps, Kept(train.keep_checkpoints, train.keep_every)
            planned = cls(snapshots, train.steps, every, kept, first, changed or train.steps, later)
            if limit is None or planned.snapshot_bytes(0, train.steps) <= limit:
                return planned
        raise UserError(
            f"train.snapshot_gib: {train.snapshot_gib:g} cannot hold the {len(snapshots)} snapshots that are left "
            f"without regular ones, {binary(planned.snapshot_bytes(0, train.steps))}; raise it, or set "
            "train.early_snapshots_dtype to bfloat16"
        )

    def snapshot_bytes(self, done: int, last: int) -> int:
        """Of the snapshots of the updates after `done` up to `last`; that of the start belongs to the first."""
        first = done + 1 if done else 0
        taken = [(self._sizes(step), rounded) for step, rounded in self.snapshots.items() if first <= step <= last]
        return sum(size.account + size.tables - rounded * (size.tables // 2) for size, rounded in taken)

    def bytes(self, done: int, last: int) -> int:
        """All that the updates after `done` up to `last` leave on the disk."""
        return self.snapshot_bytes(done, last) + self._kept_bytes(done, last)

    def _sizes(self, step: int) -> Sizes:
        return self.first if step <= self.changed else self.later

    def most_bytes(self, done: int, last: int) -> int:
        """All that lies on the disk at once while those updates are made: a state is whole before an older one goes."""
        return self.bytes(done, last) + max(self.first.state, self.later.state)

    def _states(self, done: int, last: int) -> list[int]:
        """The steps after which states are saved, of those after `done`; the last of them saves one too."""
        first = done // self.state_every + 1
        return [*range(first * self.state_every, last, self.state_every), last] if last > done else []

    def _kept_bytes(self, done: int, last: int) -> int:
        """Of the states that are left of those."""
        return sum(self._sizes(step).state for step in self.kept.of(self._states(done, last)))

    def __str__(self) -> str:
        states = self._states(0, self.steps)
        return (
            f"will write {len(self.snapshots)} snapshots ({binary(self.snapshot_bytes(0, self.steps))}) and keep "
            f"{len(self.kept.of(states))} of {len(states)} states ({binary(self._kept_bytes(0, self.steps))})"
        )
