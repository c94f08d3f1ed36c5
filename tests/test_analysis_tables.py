"""Naming tables: every form that is accepted, and a clear line for every one that is not."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tiedjax import analysis
from tiedjax.analysis.basis import tables
from tiedjax.analysis.basis.tables import content_hash, open_run, read_counts, read_table, seen_rows
from tiedjax.errors import UserError

E = np.arange(12, dtype=np.float32).reshape(4, 3)
U = E[::-1] * 0.5


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A run directory `r` with snapshots 0 and 8, as `open_run` would open it."""
    (here / "r").mkdir()
    fake = SimpleNamespace(snapshot_steps=[0, 8], tied=False, tokenizer_path=Path("r/tokenizer.json"))
    fake.token_counts = np.array([[1, 0, 2, 0], [1, 0, 0, 0]])

    def at(step: int | None = None) -> SimpleNamespace:
        table = E if step is None else E + step
        return SimpleNamespace(input=table, output=table if fake.tied else U, tied=fake.tied)

    fake.tables = at
    monkeypatch.setattr(tables, "open_run", lambda place: fake if place == "r" else open_run(place))
    return fake


def test_npy_keeps_float64_exactly_and_has_no_role(here):
    values = np.random.default_rng(0).normal(size=(5, 2)) * (1 + 1e-12)
    np.save("a.npy", values)
    table = read_table("a.npy")
    assert table.role is None
    np.testing.assert_array_equal(table.values, values)
    np.save("counts.npy", np.arange(6).reshape(3, 2))
    assert read_table("counts.npy").values.dtype == np.float64


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_archives_with_two_tables_want_a_role(here, suffix):
    arrays = {"input": E, "output": np.ascontiguousarray(U)}
    np.savez("a.npz", **arrays) if suffix == "npz" else save_file(arrays, "a.safetensors")
    np.testing.assert_array_equal(read_table(f"a.{suffix}#input").values, E)
    assert read_table(f"a.{suffix}#output").role == "output"
    np.testing.assert_array_equal(read_table(f"a.{suffix}#output").values, U)
    with pytest.raises(UserError, match=r"holds 2 arrays \(input, output\); pick one with a"):
        read_table(f"a.{suffix}")
    with pytest.raises(UserError, match="holds no array 'head'; it holds input, output"):
        read_table(f"a.{suffix}#head")


def test_archives_with_one_table_need_none(here):
    np.savez("a.npz", weight=E, bias=np.ones(3))
    np.testing.assert_array_equal(read_table("a.npz").values, E)
    np.testing.assert_array_equal(read_table("a.npz#weight").values, E)


def test_half_precision_files_are_read_exactly(here):
    half = E.astype(ml_dtypes.bfloat16)
    save_file({"emb": half}, "a.safetensors")
    read = read_table("a.safetensors")
    assert read.values.dtype == np.float32
    np.testing.assert_array_equal(read.values, half.astype(np.float32))


def test_runs_give_a_role_a_step_and_their_counts(run):
    np.testing.assert_array_equal(read_table("r#output").values, U)
    np.testing.assert_array_equal(read_table("r@8#input").values, E + 8)
    assert read_table("r#input").role == "input"
    assert read_table("r#input").seen.tolist() == [True, False, True, False]
    assert read_table("r#input").tokenizer_path == run.tokenizer_path
    with pytest.raises(UserError, match=r"the run has two tables; pick one with r#input or r#output"):
        read_table("r")
    with pytest.raises(UserError, match="no snapshot at step 9; there are 0, 8"):
        read_table("r@9#input")
    with pytest.raises(UserError, match="'head' is not a role"):
        read_table("r#head")


def test_a_tied_run_has_one_table_whatever_the_role(run):
    run.tied = True
    assert read_table("r").role == "shared"
    np.testing.assert_array_equal(read_table("r").values, read_table("r@0#output").values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones(4), r"must have 2 dimensions \[V, D\], got shape \[4\]"),
        (np.ones((2, 2, 2)), "must have 2 dimensions"),
        (np.ones((0, 3)), "the table is empty"),
        (np.ones((3, 0)), "the table is empty"),
        (np.ones((2, 2), complex), "must hold real numbers, got complex128"),
        (np.array([["a", "b"]]), "must hold real numbers"),
        (np.array([[0.0], [np.nan], [np.inf]]), "2 rows hold NaN or infinity, the first is row 1"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(here, values, message):
    np.save("a.npy", values)
    with pytest.raises(UserError, match=message) as error:
        read_table("a.npy")
    assert str(error.value).startswith("a.npy: ")
    assert "\n" not in str(error.value)


def test_missing_and_broken_files_are_refused_in_one_line(here):
    for name in ["a.npy", "a.npz", "a.safetensors"]:
        with pytest.raises(UserError, match=f"{name}: no such file"):
            read_table(name)
        Path(name).write_bytes(b"not a table")
        with pytest.raises(UserError, match="not a readable"):
            read_table(name)
        Path(name).write_bytes(b"")
        with pytest.raises(UserError, match="not a readable"):
            read_table(name)
    np.save("o.npy", np.array([{}], dtype=object))
    with pytest.raises(UserError, match="not a readable"):
        read_table("o.npy")
    np.save("bare.npy", E)
    Path("bare.npz").write_bytes(Path("bare.npy").read_bytes())
    with pytest.raises(UserError, match="holds one bare array"):
        read_table("bare.npz")
    with pytest.raises(UserError, match="no such file or directory; tables are named by a run directory"):
        read_table("nowhere")
    with pytest.raises(UserError, match="not a run"):
        read_table(str(here))


def test_names_with_signs_in_them_still_name_files(here):
    np.save("a#1@2.npy", E)
    np.testing.assert_array_equal(read_table("a#1@2.npy").values, E)


def test_the_hash_is_of_shape_and_float32_bytes():
    wanted = hashlib.sha256(np.array([4, 3], "<i8").tobytes() + E.tobytes()).hexdigest()
    assert content_hash(E) == content_hash(E.astype(np.float64)) == content_hash(np.asfortranarray(E)) == wanted
    assert content_hash(E.reshape(3, 4)) != wanted
    assert content_hash(E + 1e-3) != wanted


def test_counts_are_integers_of_one_or_two_rows(here):
    np.save("c.npy", np.array([[1, 0], [0, 0]]))
    assert read_counts("c.npy").tolist() == [[1, 0], [0, 0]]
    assert seen_rows(read_counts("c.npy")).tolist() == [True, False]
    for bad in [np.ones(3), np.ones((3, 2), int), np.ones((1, 1, 1), int)]:
        np.save("c.npy", bad)
        with pytest.raises(UserError, match="counts must be integers"):
            read_counts("c.npy")


@pytest.mark.parametrize("where", ["spectrum", "map"])
def test_a_table_that_cannot_be_squared_is_refused_by_the_instrument_that_was_asked(where):
    with pytest.raises(UserError) as error:
        tables.check(np.full((4, 3), 1e40), where)
    assert str(error.value) == f"{where}: the largest number of a table must lie between 1e-30 and 1e30, got 1e+40"
    with pytest.raises(UserError) as error:
        {"spectrum": analysis.spectrum, "map": analysis.picture}[where](np.full((4, 3), 1e40))
    assert str(error.value).startswith(f"{where}: the largest number")
