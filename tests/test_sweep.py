"""Which point of a sweep is chosen, and what is recorded of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_plan import loaded

from tiedjax import sweep
from tiedjax.errors import TrainingError, UserError
from tiedjax.sweep import Choice, Tried, choose

POINTS = [{"a": a, "b": b} for a in (1, 2, 3) for b in ("x", "y")]


def test_the_lowest_mean_over_seeds_is_chosen() -> None:
    """Not the lowest of a single seed, and not a point that one seed diverged at."""
    means = {0: 4.0, 1: 3.0, 2: 2.5, 3: 2.0, 4: 2.2, 5: 1.0}
    losses: dict[tuple[int, int], float | None] = {(p, 7): m - 0.5 for p, m in means.items()}
    losses |= {(p, 8): m + 0.5 for p, m in means.items()}
    losses[2, 7] = 1.4  # mean 2.2 with 3.0: the lowest of one seed but one
    losses[5, 8] = None
    choice = choose("tied", POINTS, losses)
    assert choice.best == 3
    assert choice.tried[3] == Tried({"a": 2, "b": "y"}, {"7": 1.5, "8": 2.5}, 2.0)
    assert choice.tried[5] == Tried({"a": 3, "b": "y"}, {"7": 0.5, "8": None}, None)
    assert choice.at_edge == []


@pytest.mark.parametrize(("best", "edge"), [(0, ["a"]), (1, ["a"]), (2, []), (3, []), (4, ["a"]), (5, ["a"])])
def test_a_best_value_with_none_beyond_it_lies_at_the_edge(best: int, edge: list[str]) -> None:
    """Values that are no numbers have no order, hence no edge."""
    losses = {(p, s): float(p != best) for p in range(6) for s in (7, 8)}
    assert choose("tied", POINTS, losses).at_edge == edge


def test_a_switch_has_no_edge() -> None:
    points = [{"a": value} for value in (True, False)]
    assert choose("tied", points, {(p, 7): float(p) for p in range(2)}).at_edge == []


def test_the_order_of_the_values_does_not_make_an_edge() -> None:
    points = [{"a": value} for value in (2.0, 1.0, 3.0)]
    assert choose("tied", points, {(p, 7): float(p) for p in range(3)}).at_edge == []


def test_a_sweep_that_diverged_everywhere_fails() -> None:
    with pytest.raises(TrainingError) as caught:
        choose("tied", POINTS[:2], {(0, 7): None, (1, 7): None})
    assert str(caught.value) == "sweep: arm 'tied': training diverged at every point; sweep lower learning rates"


def test_choices_are_read_back_and_another_sweep_is_refused(tmp_path: Path) -> None:
    rest = "arm_sweeps: {tied: {train.z_loss: [0.0, 1.0e-4, 1.0e-3]}}"
    plan = loaded(tmp_path, rest)
    choice = choose("tied", plan.arms["tied"].points, {(p, s): float(p != 1) for p in range(3) for s in (1000, 1001)})
    assert isinstance(choice, Choice)
    with pytest.raises(UserError) as caught:
        sweep.read(plan, tmp_path)
    path = tmp_path / "sweep.json"
    assert str(caught.value) == f"{path}: no such file; train the sweep first, without --analyse-only"
    sweep.write(tmp_path, {"tied": choice})
    assert sweep.read(plan, tmp_path) == {"tied": choice}
    assert json.loads(path.read_text())["tied"]["tried"][1]["losses"] == {"1000": 0.0, "1001": 0.0}
    other = loaded(tmp_path, rest.replace("1.0e-3", "1.0e-2"))
    with pytest.raises(UserError) as caught:
        sweep.read(other, tmp_path)
    assert str(caught.value) == (
        f"{path}: holds another sweep than {tmp_path / 'study.yaml'}; `tiedjax study` writes it anew"
    )
    path.write_text("[1]")
    with pytest.raises(UserError, match="does not hold the choices of a sweep"):
        sweep.read(plan, tmp_path)
