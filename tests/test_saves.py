"""When a run saves, what it will have written, and a limit on that."""

from __future__ import annotations

from typing import Any

import pytest

from tiedjax.config import TrainConfig
from tiedjax.errors import UserError
from tiedjax.saves import Saves, Sizes, snapshot_steps

MIB = 2**20


def saves(table_mib: float = 256, account_mib: float = 0, **options: Any) -> Saves:
    """Of a run whose tables take so much and whose state takes four times that; 400 steps unless said otherwise."""
    train = TrainConfig(**{"steps": 400, "checkpoint_every": 100, "snapshot_every": 80, **options})
    return Saves.of(train, Sizes(int(table_mib * MIB), int(account_mib * MIB), int(4 * table_mib * MIB)))


def test_the_snapshot_schedule_is_dense_early() -> None:
    early = {1: True, 2: True, 4: True, 8: True}
    assert snapshot_steps(10, 35) == {0: False, **early, 10: False, 20: False, 30: False, 35: False}
    assert snapshot_steps(16, 32) == {0: False, **early, 16: False, 32: False}
    assert snapshot_steps(100, 8) == {0: False, **early, 8: False}, "the last one is not early"
    assert snapshot_steps(1, 3) == dict.fromkeys(range(4), False)
    assert snapshot_steps(9, 1) == {0: False, 1: False}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "will write 13 snapshots (3.25 GiB) and keep 2 of 4 states (2.00 GiB)"),
        (
            {"early_snapshots_dtype": "bfloat16", "keep_checkpoints": 1},
            "will write 13 snapshots (2.38 GiB) and keep 1 of 4 states (1.00 GiB)",
        ),
        ({"account_mib": 128}, "will write 13 snapshots (4.88 GiB) and keep 2 of 4 states (2.00 GiB)"),
        (
            {"account_mib": 128, "early_snapshots_dtype": "bfloat16"},
            "will write 13 snapshots (4.00 GiB) and keep 2 of 4 states (2.00 GiB)",
        ),
        ({"checkpoint_every": None}, "will write 13 snapshots (3.25 GiB) and keep 1 of 1 states (1.00 GiB)"),
        ({"checkpoint_every": 399}, "will write 13 snapshots (3.25 GiB) and keep 2 of 2 states (2.00 GiB)"),
        ({"snapshot_every": 1, "steps": 1}, "will write 2 snapshots (512.00 MiB) and keep 1 of 1 states (1.00 GiB)"),
        ({"table_mib": 2**-20}, "will write 13 snapshots (13 B) and keep 2 of 4 states (8 B)"),
        ({"table_mib": 2**20}, "will write 13 snapshots (13.00 TiB) and keep 2 of 4 states (8.00 TiB)"),
    ],
)
def test_what_a_run_will_write_is_counted(options: dict[str, Any], says: str) -> None:
    """Snapshots at 0, at seven early steps and at five later ones."""
    assert str(saves(**options)) == says


def test_states_that_are_kept_for_good_are_counted() -> None:
    assert str(saves(keep_every=100)).endswith("keep 4 of 4 states (4.00 GiB)")
    assert str(saves(keep_every=200, keep_checkpoints=1)).endswith("keep 2 of 4 states (2.00 GiB)")
    assert str(saves(keep_every=150)).endswith("keep 2 of 4 states (2.00 GiB)"), (
        "300 is a multiple, and one of the newest"
    )


def test_at_most_one_state_more_lies_on_the_disk_while_a_run_goes_on() -> None:
    assert saves().most_bytes(0, 400) == saves().bytes(0, 400) + 1024 * MIB


def test_all_bytes_are_those_of_snapshots_and_of_kept_states() -> None:
    assert saves().bytes(0, 400) == (13 * 256 + 2 * 1024) * MIB


@pytest.mark.parametrize(
    ("done", "last", "snapshots", "states"),
    [
        (0, 50, [0, 1, 2, 4, 8, 16, 32], 1),  # that of the last step
        (50, 400, [64, 80, 160, 240, 320, 400], 2),
        (80, 200, [160], 2),
        (300, 400, [320, 400], 1),
        (310, 319, [], 1),
    ],
)
def test_of_a_run_that_has_begun_only_what_is_left_counts(
    done: int, last: int, snapshots: list[int], states: int
) -> None:
    """Two states are kept of those after each hundred steps."""
    assert saves().bytes(done, last) == (256 * len(snapshots) + 1024 * states) * MIB
    early = [step for step in snapshots if step in (1, 2, 4, 8, 16, 32, 64)]
    rounded = saves(early_snapshots_dtype="bfloat16")
    assert rounded.bytes(done, last) == saves().bytes(done, last) - 128 * len(early) * MIB


@pytest.mark.parametrize(
    ("gib", "steps"),
    [
        (3.25, [0, 1, 2, 4, 8, 16, 32, 64, 80, 160, 240, 320, 400]),
        (3.24, [0, 1, 2, 4, 8, 16, 32, 64, 128, 160, 320, 400]),  # of 160 steps apart
        (2.99, [0, 1, 2, 4, 8, 16, 32, 64, 128, 240, 400]),
    ],
)
def test_a_limit_puts_regular_snapshots_farther_apart(gib: float, steps: list[int]) -> None:
    planned = saves(snapshot_gib=gib)
    assert list(planned.snapshots) == steps
    assert planned.snapshot_bytes(0, 400) == 256 * MIB * len(steps) <= gib * 2**30


def test_what_is_saved_after_a_change_of_scheme_has_other_sizes() -> None:
    train = TrainConfig(steps=400, checkpoint_every=100, snapshot_every=80, early_snapshots_dtype="bfloat16")
    planned = Saves.of(train, Sizes(100, 50, 1000), 200, Sizes(200, 0, 3000))
    early, regular = [1, 2, 4, 8, 16, 32, 64], [0, 80, 160]
    assert planned.snapshot_bytes(0, 200) == len(early) * 100 + len(regular) * 150
    assert planned.snapshot_bytes(200, 400) == 3 * 200
    assert planned.bytes(0, 400) == planned.snapshot_bytes(0, 400) + 2 * 3000  # of 300 and 400
    assert planned.bytes(0, 250) == planned.snapshot_bytes(0, 250) + 3000 + 1000  # of 250 and 200
    assert planned.bytes(0, 200) == planned.snapshot_bytes(0, 200) + 2 * 1000


def test_a_limit_that_the_early_snapshots_exceed_is_refused() -> None:
    assert 256 in saves(snapshot_gib=2.75, snapshot_every=399).snapshots
    with pytest.raises(UserError) as caught:
        saves(snapshot_gib=2.5, snapshot_every=399)
    assert str(caught.value) == (
        "train.snapshot_gib: 2.5 cannot hold the 11 snapshots that are left without regular ones, 2.75 GiB; raise it, "
        "or set train.early_snapshots_dtype to bfloat16"
    )
    rounded = saves(snapshot_gib=2.5, snapshot_every=399, early_snapshots_dtype="bfloat16")
    assert rounded.snapshot_bytes(0, 400) < 2**31
