"""`tiedjax analyze`: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from test_study_results import FakeRun, fake_study

from tiedjax.analysis import command
from tiedjax.analysis.basis import tables
from tiedjax.analysis.basis.tables import content_hash
from tiedjax.errors import UserError


def analyze(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    parser.set_defaults(run=command.run)  # as the command line does it
    args = parser.parse_args([str(word) for word in words])
    return args.run(args)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("a.npy", rng.normal(size=(300, 12)))
    np.save("b.npy", np.load("a.npy")[:, ::-1] + rng.normal(size=(300, 12)))
    return tmp_path


@pytest.fixture
def runs(here: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeRun]:
    """Run directories `untied-0` and `tied-0`."""
    _, made = fake_study(seeds=(0,), steps=[0, 4, 400])
    named = {run.name: run for run in made.values()}
    for name in named:
        (here / name).mkdir()
    monkeypatch.setattr(tables, "open_run", lambda place: named[str(place)])
    return named


def test_align_agrees_with_numpy_and_scipy_floors_included(here, capsys):
    assert analyze("align", "a.npy", "b.npy", "--json", "out.json") == 0
    out = json.loads(Path("out.json").read_text())
    X, Y = np.load("a.npy"), np.load("b.npy")
    X, Y = X - X.mean(axis=0), Y - Y.mean(axis=0)

    def score(fit, Y):
        XT = {
            "identity": lambda: X,
            "orthogonal": lambda: X @ scipy.linalg.orthogonal_procrustes(X, Y)[0],
            "linear": lambda: X @ np.linalg.lstsq(X, Y, rcond=None)[0],
        }[fit]()
        return np.mean((XT * Y).sum(1) / np.linalg.norm(XT, axis=1) / np.linalg.norm(Y, axis=1))

    shown = capsys.readouterr().out
    for fit, closed in [("identity", 0), ("orthogonal", 8 / (3 * np.pi) * 0.2), ("linear", 0.2)]:
        rng = np.random.default_rng(0)
        floor = np.mean([score(fit, Y[rng.permutation(300)]) for _ in range(5)])
        found = out["fits"][fit]
        assert found["score"] == pytest.approx(score(fit, Y), abs=1e-6)
        assert found["floor"] == pytest.approx(floor, abs=1e-6)
        assert found["floor_closed_form"] == pytest.approx(closed, abs=1e-12)
        assert found["corrected"] == pytest.approx((found["score"] - floor) / (1 - floor), abs=1e-6)
        assert f"{found['score']:.4f}" in shown
    assert (out["instrument"], out["rows"], out["width"]) == ("align", 300, 12)
    names = [(i["name"], i["sha256"], i["rows"], i["width"]) for i in out["inputs"]]
    assert names == [(n, content_hash(np.load(n)), 300, 12) for n in ("a.npy", "b.npy")]


def test_paper_form_keeps_all_rows_and_corrects_nothing(runs):
    analyze("align", "untied-0#output", "tied-0", "--json", "ours.json")
    analyze("align", "untied-0#output", "tied-0", "--paper", "--json", "paper.json")
    ours, paper = (json.loads(Path(name).read_text()) for name in ("ours.json", "paper.json"))
    counts = runs["tied-0"].token_counts
    assert ours["rows"] == (counts.sum(axis=0) > 0).sum() < paper["rows"] == counts.shape[1]
    assert ours["rows_masked_out"] == paper["rows"] - ours["rows"]
    for fit in paper["fits"].values():
        assert "corrected" not in fit
        assert fit["floor"] is not None
    analyze("align", "untied-0#output", "tied-0", "--all-rows", "--json", "all.json")
    assert json.loads(Path("all.json").read_text())["fits"]["linear"]["score"] == paper["fits"]["linear"]["score"]


def test_align_says_that_it_centres_and_gives_the_raw_cosine_beside(here, capsys):
    X, Y = np.load("a.npy") + 1, np.load("b.npy") + 1
    X[4] = 0
    np.save("a.npy", X)
    np.save("b.npy", Y)
    unit = lambda table: table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)
    every, known = (unit(X), unit(Y)), (np.delete(unit(X), 4, axis=0), np.delete(unit(Y), 4, axis=0))

    analyze("align", "a.npy", "b.npy", "--paper", "--json", "paper.json")
    shown, paper = capsys.readouterr().out, json.loads(Path("paper.json").read_text())["raw_cosine"]
    score, floor = np.sum(every[0] * every[1]) / 300, every[0].mean(axis=0) @ every[1].mean(axis=0)
    assert (paper["score"], paper["floor"], paper["rows"]) == pytest.approx((score, floor, 300), abs=1e-12)
    assert "corrected" not in paper
    assert f"\nraw cosine: {score:.4f}, floor {floor:.4f}; rows as they are, not centred\n" in shown
    assert "; paper's form: both tables centred\n" in shown

    analyze("align", "a.npy", "b.npy", "--json", "ours.json")
    shown, ours = capsys.readouterr().out, json.loads(Path("ours.json").read_text())["raw_cosine"]
    score, floor = np.sum(known[0] * known[1]) / 299, known[0].mean(axis=0) @ known[1].mean(axis=0)
    corrected = (score - floor) / (1 - floor)
    assert (ours["score"], ours["floor"], ours["corrected"]) == pytest.approx((score, floor, corrected), abs=1e-12)
    assert (ours["rows"], ours["rows_left_out"]) == (299, 1)
    assert (
        f"\nraw cosine: {score:.4f}, floor {floor:.4f}, corrected {corrected:.4f}; rows as they are, not centred; "
        "1 rows of zeros left out\nscore: mean cosine in sample, both tables centred by their column means;"
    ) in shown

    np.save("wide.npy", np.ones((300, 5)))
    analyze("align", "a.npy", "wide.npy", "--json", "wide.json")
    assert "raw cosine" not in capsys.readouterr().out
    assert "raw_cosine" not in json.loads(Path("wide.json").read_text())
    with pytest.raises(SystemExit):
        analyze("align", "--help")
    assert "centred, identity too" in " ".join(capsys.readouterr().out.split())


def test_fits_and_draws_can_be_chosen(here):
    analyze("align", "a.npy", "b.npy", "--fit", "linear", "--draws", "2", "--json", "o.json")
    fits = json.loads(Path("o.json").read_text())["fits"]
    assert list(fits) == ["linear"]
    assert fits["linear"]["floor_draws"] == 2


def test_gradients_of_a_run(runs, capsys):
    analyze("gradients", "tied-0", "--json", "o.json")
    out = json.loads(Path("o.json").read_text())
    assert len(out["output_share"]) == 400
    assert out["inputs"][0]["sha256"] == content_hash(runs["tied-0"].tables().input)
    assert (out["rows"], out["width"], out["cosine_floor"]) == (256, 16, 0)
    assert f"{out['windows'][0]['output_share']:.4f}" in capsys.readouterr().out


def test_evolution_of_a_run(runs, capsys):
    analyze("evolution", "untied-0", "--json", "o.json")
    out = json.loads(Path("o.json").read_text())
    assert set(out["roles"]) == {"input", "output"}
    assert out["roles"]["output"]["steps"] == [0, 4, 400]
    assert len(out["roles"]["output"]["floor"]) == 3
    assert len({i["sha256"] for i in out["inputs"]}) == 2
    assert "to step 0" in capsys.readouterr().out


def test_norms_of_a_run_and_of_a_file_with_counts(runs, capsys):
    analyze("norms", "untied-0#output", "--json", "run.json")
    table, counts = runs["untied-0"].tables().output, runs["untied-0"].token_counts
    np.save("u.npy", table)
    np.save("counts.npy", counts[1])
    analyze("norms", "u.npy", "--counts", "counts.npy", "--json", "file.json")
    run, file = (json.loads(Path(name).read_text()) for name in ("run.json", "file.json"))
    assert run["norm"] == file["norm"]
    assert (run["rows"], run["norm"]["spearman"]["floor"]) == ((counts.sum(axis=0) > 0).sum(), 0)
    assert run["inputs"][0]["sha256"] == content_hash(table)
    assert "Spearman" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["align", "a.npy", "c.npy"], "a.npy has 300 rows but c.npy has 4; rows must be the same tokens"),
        (["align", "a.npy", "nan.npy"], "nan.npy: 1 rows hold NaN or infinity, the first is row 2"),
        (
            ["align", "a.npy", "wide.npy", "--fit", "orthogonal"],
            "needs equal widths, got 12 and 5; only linear and ridge take both",
        ),
        (["align", "a.npy", "b.npy", "--fit", "rigid"], "no fit is named 'rigid'"),
        (["align", "a.npy", "b.npy", "--draws", "0"], "--draws: must be at least 1, got 0"),
        (["align", "a.npy", "b.npy", "--json", "no/where.json"], "no/where.json: cannot be written"),
        (["norms", "a.npy"], "no token counts are known for it; give them with --counts"),
        (["norms", "a.npy", "--counts", "n.npy"], "has 300 rows but there are counts for 4 tokens"),
        (["gradients", "nowhere"], "nowhere: no such file or directory"),
        (["evolution", "."], "not a run"),
    ],
)
def test_bad_input_is_one_clear_line(here, words, message):
    np.save("c.npy", np.ones((4, 12)))
    np.save("wide.npy", np.ones((300, 5)))
    np.save("nan.npy", np.where(np.arange(300)[:, None] == 2, np.nan, 1.0) * np.ones((300, 12)))
    np.save("n.npy", np.arange(4))
    with pytest.raises(UserError, match=message) as error:
        analyze(*words)
    assert "\n" not in str(error.value)


def test_a_failed_command_writes_nothing(here):
    with pytest.raises(UserError):
        analyze("align", "a.npy", "missing.npy", "--json", "o.json")
    assert not Path("o.json").exists()


def test_all_runs_what_applies_and_says_what_could_not_be_measured(runs, capsys):
    assert analyze("all", "tied-0", "--against", "untied-0", "--json", "all.json") == 0
    found = json.loads(Path("all.json").read_text())["instruments"]
    assert list(found) == [name for name in command.INSTRUMENTS if name != "regret"]  # which takes minutes
    assert [r["inputs"][0]["name"] for r in found["align"]] == ["untied-0#input", "untied-0#output"]
    alone = json.loads(Path("all.json").read_text())["instruments"]["norms"]
    assert len(alone) == 1
    of_text = {
        "hurdles",
        "lens",
        "blocks",
        "calibration",
        "diversity",
        "rounding",
        "cooccurrence",
    }  # these runs' is nowhere
    for name in of_text:
        assert "not_measured" in found[name][0]
    measured = set(found) - of_text
    assert not [name for name in measured if any("not_measured" in result for result in found[name])]
    analyze("align", "untied-0#output", "tied-0", "--json", "one.json")
    one = json.loads(Path("one.json").read_text())
    assert one["fits"]["orthogonal"]["score"] == pytest.approx(found["align"][1]["fits"]["orthogonal"]["score"])
    capsys.readouterr()
    analyze("all", "tied-0")
    assert "align: needs two tables; this run has one: give another with --against RUN" in capsys.readouterr().out


def test_help_does_not_wait_for_numpy():
    code = (
        "import argparse, sys; from tiedjax.analysis import command; p = argparse.ArgumentParser();"
        "command.add_arguments(p); p.format_help();"
        "assert not {'numpy', 'scipy', 'jax', 'matplotlib'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
