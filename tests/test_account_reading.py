"""Who wrote what each role reads: the account carried through a scheme, beside formulas in NumPy."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import arguments, write_text
from test_schemes import FORMS, numpy_tables

import tiedjax
from tiedjax import cli
from tiedjax.analysis.instruments.account.reading import WRITERS, carried, readings
from tiedjax.config import role_of
from tiedjax.errors import UserError

D = 16  # that of the formulas in test_schemes
EXACT = ["partial_dims", "partial_tokens", "low_rank", "transform", "diagonal transform"]
ROUGH = ["orthogonal transform", "gate by token"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "words.jsonl")


def trained(form: str, text: Path, out: Path, **changes: Any) -> tiedjax.run.Run:
    """A run of a form whose rates are large, so that nothing is linear."""
    options = {f"tying.{name}": value for name, value in FORMS[form].items()}
    large = {"optimizer.learning_rate": 0.1, "model.d_model": D}
    assert cli.main(arguments(out, text, options | large | changes)) == 0
    return tiedjax.load_run(out)


def derivative(form: str, at: dict[str, Any], along: dict[str, Any], size: float = 1e-4) -> list[np.ndarray]:
    """Of both tables at the arrays in a direction, by central differences of the formulas."""
    step = lambda sign: {name: at[name] + sign * size * along[name] if name in along else at[name] for name in at}
    return [
        (a - b) / (2 * size) for a, b in zip(numpy_tables(form, step(1)), numpy_tables(form, step(-1)), strict=True)
    ]


@pytest.mark.parametrize("form", [*EXACT, *ROUGH])
def test_each_writer_s_part_of_both_tables_is_that_of_the_formula(form: str, text: Path, tmp_path: Path) -> None:
    run = trained(form, text, tmp_path / "run")
    steps = run.snapshot_steps
    parts = carried(run, steps)
    arrays = {at: {name: np.asarray(array) for name, array in run.arrays(at).items()} for at in steps}
    by_hand = {writer: [0.0, 0.0] for writer in WRITERS} | {"initial": list(numpy_tables(form, arrays[0]))}
    for start, end in itertools.pairwise(steps):
        trained_names = [name for name in arrays[0] if name != "output_rows"]
        wide = {at: {name: np.float64(arrays[at][name]) for name in trained_names} for at in (start, end)}
        rest = {name: arrays[0][name] for name in arrays[0] if name not in trained_names}
        middle = {name: (wide[start][name] + wide[end][name]) / 2 for name in trained_names}
        for writer in WRITERS:
            along = {n: wide[end][n] - wide[start][n] for n in trained_names if role_of(n) == writer}
            along["shared"] = np.float64(getattr(run.account(end), writer)) - getattr(run.account(start), writer)
            for role, change in enumerate(derivative(form, middle | rest, along)):
                by_hand[writer][role] = by_hand[writer][role] + change
    for writer, both in by_hand.items():
        for ours, theirs in zip(parts[writer], both, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
    final = run.tables()
    for role, by_writer in enumerate(zip(*parts.values(), strict=True)):
        table = np.float64(final[role])
        missed = np.linalg.norm(table - sum(by_writer)) / np.linalg.norm(table)
        found = readings(run, steps[-1])[("input", "output")[role]].whole
        assert found.remainder == pytest.approx(missed, abs=1e-9)
        share = np.sum(by_writer[2] * table) / np.sum(table**2)
        assert found.output == pytest.approx(share, rel=1e-9)
        assert missed < 1e-5 or (form, role) == ("orthogonal transform", 1)


def test_between_dense_snapshots_a_rotation_leaves_a_small_remainder(text: Path, tmp_path: Path) -> None:
    run = trained("orthogonal transform", text, tmp_path / "run", **{"train.snapshot_every": 1})
    last = np.float64(run.tables().output)
    missed = [np.linalg.norm(last - sum(part.output for part in carried(run, steps).values()))
              for steps in ([0, 8], [0, 4, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8])]  # fmt: skip
    assert missed[0] > 2 * missed[1] > 4 * missed[2] > 0


def test_strata_of_shared_and_of_own_rows(text: Path, tmp_path: Path) -> None:
    """Of rows that each role has its own of, the input role wrote nothing that the output role reads."""
    run = trained("partial_tokens", text, tmp_path / "run")
    parts = carried(run, run.snapshot_steps)
    own = run.arrays()["output_rows"]
    assert np.abs(parts["input"].output[own]).max() == 0
    assert np.abs(parts["output"].input[own]).max() < 1e-6
    found = readings(run, run.snapshot_steps[-1])
    assert found["output"].strata["rare"].output > found["input"].strata["rare"].output


def test_a_run_without_an_account_says_so(text: Path, tmp_path: Path) -> None:
    run = trained("untied", text, tmp_path / "run")
    with pytest.raises(UserError, match="has no account of one table: under untied each role has its own table"):
        readings(run, 8)
