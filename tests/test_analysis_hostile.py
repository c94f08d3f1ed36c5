"""Tables that are wrong or strange, given to every instrument that takes tables: one clear line, or a result that says
what it left out; never a warning, a traceback or a number that is none."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from test_analysis_command import analyze

from tiedjax.analysis.instruments import INSTRUMENTS
from tiedjax.errors import UserError

TABLES = sorted(name for name, module in INSTRUMENTS.items() if module.SUBJECT not in ("run", "model"))
V = 150


def strange(name: str) -> np.ndarray:
    X = np.random.default_rng(3).normal(size=(V, 6)).astype(np.float32)
    return {
        "fine": X,
        "nan": np.where(np.arange(V)[:, None] == 2, np.nan, X),
        "infinity": np.where(np.arange(V)[:, None] == 2, np.inf, X),
        "a zero row": np.where(np.arange(V)[:, None] == 2, 0, X),
        "all zero": 0 * X,
        "constant rows": np.ones((V, 6), np.float32),
        "all rows equal": np.repeat(X[:1], V, axis=0),
        "width 1": X[:, :1],
        "fewer rows": X[: V - 1],
        "two rows": X[:2],
        "one row": X[:1],
        "no rows": X[:0],
        "3 dimensions": X[None],
        "1 dimension": X[:, 0],
        "integers": (10 * X).astype(np.int32),
        "text": X.astype(str),
        "huge": X * np.float32(1e30),
        "tiny": X * np.float32(1e-30),
    }[name]


REFUSED = {
    "nan": "1 rows hold NaN or infinity, the first is row 2",
    "infinity": "1 rows hold NaN or infinity, the first is row 2",
    "no rows": "the table is empty",
    "3 dimensions": "must have 2 dimensions [V, D], got shape [1, 150, 6]",
    "1 dimension": "must have 2 dimensions [V, D], got shape [150]",
    "text": "must hold real numbers",
}
NAMES = ["fine", *REFUSED, "a zero row", "all zero", "constant rows", "all rows equal", "width 1", "fewer rows"]
NAMES += ["two rows", "one row", "integers", "huge", "tiny"]


def words(instrument: str, first: str, second: str) -> list[str]:
    module = INSTRUMENTS[instrument]
    options = {"spectral": ["--k", "8", "--eigenpairs", "8"], "norms": ["--counts", "counts.npy"]}
    tables = {"pair": [first, second], "tables": [first, second], "table": [first]}[module.SUBJECT]
    return [instrument, *tables, *options.get(instrument, []), "--json", "out.json"]


def has_paper(instrument: str) -> bool:
    parser = argparse.ArgumentParser()
    INSTRUMENTS[instrument].add_arguments(parser)
    return "--paper" in parser.format_help()


FORMS = [(name, form) for name in TABLES for form in ([], ["--paper"]) if not form or has_paper(name)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("instrument", "form"), FORMS, ids=["".join((name, *form)) for name, form in FORMS])
def test_strange_tables(instrument, name, form, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table = strange(name)
    np.save("strange.npy", table)
    mates = ("two rows", "one row", "fewer rows")
    np.save("fine.npy", strange("fine")[: len(table) if name in mates[:2] else V])
    np.save("counts.npy", np.arange(len(table) if table.ndim else 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            analyze(*words(instrument, "strange.npy", "fine.npy"), *form)
        except UserError as error:
            line = str(error)
        else:
            line = None
    if line is not None:
        assert "\n" not in line
        assert len(line) > 20
        assert not Path("out.json").exists()
    if name in REFUSED:
        assert REFUSED[name] in (line or "")
    elif name == "fewer rows" and INSTRUMENTS[instrument].SUBJECT == "pair":
        assert line is not None
        assert "149" in line
        assert "150" in line
    elif line is None:
        text = Path("out.json").read_text()
        json.loads(text, parse_constant=lambda constant: pytest.fail(f"a bare {constant}"))
        shown = capsys.readouterr().out
        assert "nan" not in shown.lower().replace("strange", "")
    if name in ("fine", "integers", "a zero row"):
        assert line is None, line


@pytest.mark.parametrize("instrument", ["align", "knn", "spectral"])
def test_a_row_without_direction_is_counted_as_left_out(instrument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = strange("a zero row").astype(np.float64)
    if instrument == "align":  # which centres: there the mean row is the one without a direction
        table = np.where(np.arange(V)[:, None] == 2, np.delete(table, 2, axis=0).mean(axis=0), table)
    np.save("strange.npy", table)
    np.save("fine.npy", strange("fine"))
    analyze(*words(instrument, "strange.npy", "fine.npy"))
    out = json.loads(Path("out.json").read_text())
    left_out = out["fits"]["orthogonal"]["rows_left_out"] if instrument == "align" else out["rows_left_out"]
    assert left_out == 1
