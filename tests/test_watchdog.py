"""When a step has taken too long, by a clock that the tests move."""

from __future__ import annotations

import time

import pytest

from tiedjax.host import signals
from tiedjax.host.watchdog import Watchdog


class Clock:
    """What time it is, in seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def watchdog(limit: float | None, clock: Clock) -> Watchdog:
    return Watchdog(limit, lambda line, status: None, clock)


def test_nothing_is_late_before_the_first_step() -> None:
    clock = Clock()
    dog = watchdog(5, clock)
    clock.now += 1000
    assert dog.late() is None


@pytest.mark.parametrize(("pause", "limit"), [(0.1, 5.0), (3.0, 30.0)])
def test_late_is_the_limit_or_ten_times_the_median_step(pause: float, limit: float) -> None:
    clock = Clock()
    dog = watchdog(5, clock)
    for _ in range(20):
        dog.alive(step=True)
        clock.now += pause
    clock.now += limit - pause
    assert dog.late() is None
    clock.now += 0.01
    assert dog.late() == pytest.approx(limit + 0.01)
    dog.alive()
    assert dog.late() is None


def test_compilation_does_not_count() -> None:
    clock = Clock()
    dog = watchdog(5, clock)
    dog.alive(step=True)
    with signals.held(), signals.brief():
        clock.now += 1000
        assert dog.late() is None
    clock.now += 4
    assert dog.late() is None
    clock.now += 2
    assert dog.late() == 6


def test_without_a_limit_nothing_is_late() -> None:
    clock = Clock()
    dog = watchdog(None, clock)
    dog.alive(step=True)
    clock.now += 1e9
    assert dog.late() is None


def test_the_end_is_called_with_a_line_and_a_status() -> None:
    said: list[tuple[str, int]] = []
    with Watchdog(0.1, lambda line, status: said.append((line, status))) as dog:
        dog.alive(step=True)
        for _ in range(100):
            if said:
                break
            time.sleep(0.1)
    assert said[0] == ("no step has ended for 1 s; the same command continues from there", 76)
