"""The examples in the docstrings of analysis: each runs, and every instrument's `measure` of arrays has one."""

from __future__ import annotations

import doctest
import importlib
from types import ModuleType

import numpy as np
import pytest
from programs import REPOSITORY

from tiedjax import analysis

ROOMS = ("basis", "instruments")
NAMES = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    for room in ROOMS
    for path in (REPOSITORY / "tiedjax/analysis" / room).rglob("*.py")
    if ">>> " in path.read_text()
)
OF_RUNS = {
    "account",
    "hurdles",
    "lens",
    "blocks",
    "calibration",
    "diversity",
    "regret",
    "rounding",
}  # they take a trained model and its text; no docstring has one
MEASURES = [name for name, place in analysis._HOMES.items() if place.endswith(":measure") and name not in OF_RUNS]


def ran(module: ModuleType, name: str = "") -> doctest.TestResults:
    """The examples of a module, or of one of its functions alone."""
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in doctest.DocTestFinder().find(module, extraglobs={"np": np}):
        if not name or test.name == f"{module.__name__}.{name}":
            runner.run(test)
    return runner.summarize(verbose=False)


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_a_module_run(name: str) -> None:
    results = ran(importlib.import_module(name))
    assert results.attempted
    assert not results.failed


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_of_arrays_has_an_example(name: str) -> None:
    place, _, function = analysis._HOMES[name].partition(":")
    assert ran(importlib.import_module(place), function).attempted
