"""Who wrote what each role reads: the account carried through a scheme, beside formulas in NumPy."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import arguments, write_text
from small_study import complete
from test_schemes import FORMS, numpy_tables

import tiedjax
from tiedjax import cli
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.instruments.account import section
from tiedjax.analysis.instruments.account.account import RunAccount
from tiedjax.analysis.instruments.account.reading import PARTS, carried, readings
from tiedjax.config import StudyConfig, role_of
from tiedjax.errors import UserError

N = "\u00a0"  # a no-break space
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
    by_hand = {writer: [0.0, 0.0] for writer in PARTS} | {"initial": list(numpy_tables(form, arrays[0]))}
    for start, end in itertools.pairwise(steps):
        trained_names = [name for name in arrays[0] if name != "output_rows"]
        wide = {at: {name: np.float64(arrays[at][name]) for name in trained_names} for at in (start, end)}
        rest = {name: arrays[0][name] for name in arrays[0] if name not in trained_names}
        middle = {name: (wide[start][name] + wide[end][name]) / 2 for name in trained_names}
        for writer in PARTS:
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
    small_steps = {"train.snapshot_every": 1, "optimizer.learning_rate": 0.02}
    run = trained("orthogonal transform", text, tmp_path / "run", **small_steps)
    last = np.float64(run.tables().output)
    missed = [np.linalg.norm(last - sum(part.output for part in carried(run, steps).values()))
              for steps in ([0, 8], [0, 4, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8])]  # fmt: skip
    assert 0 < 4 * missed[2] < missed[1] < missed[0]


def test_strata_of_shared_and_of_own_rows(text: Path, tmp_path: Path) -> None:
    """Of rows that each role has its own of, the input role wrote nothing that the output role reads."""
    run = trained("partial_tokens", text, tmp_path / "run", **{"tying.rows": 280})
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


def small(arm: str, seed: int, tables: dict[str, dict[str, float]]) -> dict[str, Any]:
    """A record of a run whose tables are read so."""
    parts = {role: {"whole": whole, "strata": {}} for role, whole in tables.items()}
    return complete(RunAccount, {"arm": arm, "seed": seed, "tables": parts}) | {"arm": arm, "seed": seed}


def test_what_is_said_of_what_each_role_reads() -> None:
    lookup = {"initial": 0.11, "input": 0.62, "output": 0.27, "remainder": 0.001}
    output = {"initial": 0.12, "input": 0.33, "output": 0.55, "remainder": 0.042}
    records = [small("half", seed, {"input": lookup, "output": output}) for seed in (0, 1)]
    results = {"account": [*records, small("tied", 0, {})], "headline": {"arm": "tied"}}
    assert section.carried(results) == [
        f"The output role wrote 27.0{N}±{N}0.0{N}% of half’s lookup table and 55.0{N}±{N}0.0{N}% of its output table."
    ]
    exact = lambda value: f"{value:.3f}{N}±{N}0.000"
    assert [list(row.values()) for row in section.readers(results)] == [
        ["half", "lookup", True, *map(exact, (0.11, 0.62, 0.27)), *["–"] * 4, exact(0.001)],
        ["half", "output", False, *map(exact, (0.12, 0.33, 0.55)), *["–"] * 4, exact(0.042)],
    ]
    assert [row["arm"] for row in section.shares(results)] == ["tied"]


def test_a_study_has_the_account_of_runs_between_tied_and_untied(text: Path, tmp_path: Path) -> None:
    runs = {(form, 0): trained(form, text, tmp_path / form) for form in ("untied", "partial_dims")}
    study = StudyConfig(arms={"untied": {}, "tied": {}, "partial_dims": {}}, seeds=(0,))
    (record,) = section.collect(StudyRuns(study, runs))
    assert record["arm"] == "partial_dims"
    run = runs["partial_dims", 0]
    found = to_plain(readings(run, run.snapshot_steps[-1]))
    assert record["tables"] == found
    assert sum(found["output"]["whole"][part] for part in PARTS) == pytest.approx(1, abs=1e-5)


def test_the_command_prints_both_tables(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained("low_rank", text, tmp_path / "run")
    capsys.readouterr()
    assert cli.main(["analyze", "account", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    found = readings(run, run.snapshot_steps[-1])
    for table, role in (("lookup", "input"), ("output", "output")):
        whole = found[role].whole
        cells = "  ".join(f"{value:.4f}" for value in (whole.initial, whole.input, whole.output))
        assert re.search(rf"^{table} +{re.escape(cells)} +0\.0000$", out, flags=re.MULTILINE), out
    assert "who wrote what each role reads: the account carried through the scheme from snapshot to snapshot\n" in out
