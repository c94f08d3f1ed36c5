"""What a run saves and when, and how many bytes of it will lie on the disk when all its steps are done."""

from __future__ import annotations

from dataclasses import dataclass

from tiedjax.config import TrainConfig
from tiedjax.errors import UserError
from tiedjax.text import binary


def snapshot_steps(every: int, last: int) -> dict[int, bool]:
    """After how many updates tables are saved, ascending: 0, 1, 2, 4, ... below `every`, its multiples, and the last.

    True for the early ones, 1, 2, 4, ...; False for 0, from which movement is measured, and for those from `every` on.
    """
    early = {1 << power for power in range(every.bit_length()) if 1 << power < min(every, last)}
    return {step: step in early for step in sorted({*early, *range(0, last, every), last})}


@dataclass(frozen=True)
class Saves:
    """The snapshots of a run, by step (True: an early one), its states, those of them that are kept, and all in bytes.

    str() is what is said before step 1.
    """

    snapshots: dict[int, bool]
    snapshot_bytes: int
    states: int
    kept: int
    state_bytes: int

    @classmethod
    def of(cls, train: TrainConfig, table_bytes: int, account_bytes: int, state_bytes: int) -> Saves:
        """Of a run whose tables, their account and its whole state take so many bytes.

        Snapshots from `snapshot_every` on lie as many times farther apart as `snapshot_gib` asks for. UserError where
        it cannot hold the early ones and the last.
        """
        limit = None if train.snapshot_gib is None else train.snapshot_gib * 2**30
        most = train.steps // train.snapshot_every + 1  # times as far apart: then none but the early ones and the last
        fewest = (
            1 if limit is None else max(1, int(most / max(1, limit // (table_bytes + account_bytes))))
        )  # below it is too much
        for times in range(min(fewest, most), most + 1):
            planned = snapshot_steps(times * train.snapshot_every, train.steps)
            rounded = sum(planned.values()) if train.early_snapshots_dtype == "bfloat16" else 0
            size = (table_bytes + account_bytes) * len(planned) - table_bytes // 2 * rounded
            if limit is None or size <= limit:
                states = -(-train.steps // (train.checkpoint_every or train.steps))
                return cls(planned, size, states, min(train.keep_checkpoints, states), state_bytes)
        raise UserError(
            f"train.snapshot_gib: {train.snapshot_gib:g} cannot hold the {len(planned)} snapshots that are left "
            f"without regular ones, {binary(size)}; raise it, or set train.early_snapshots_dtype to bfloat16"
        )

    @property
    def bytes(self) -> int:
        """All that is left on the disk."""
        return self.snapshot_bytes + self.kept * self.state_bytes

    def __str__(self) -> str:
        return (
            f"will write {len(self.snapshots)} snapshots ({binary(self.snapshot_bytes)}) and keep {self.kept} of "
            f"{self.states} states ({binary(self.kept * self.state_bytes)})"
        )
