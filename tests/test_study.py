"""Studies as processes: sweeps, a time limit, training here and analysing there, a choice of instruments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from programs import tiedjax

from tiedjax import load_run
from tiedjax.study import diverged, foreseen


def results(study: Path) -> dict[str, Any]:
    """A study's results without what depends on the clock and the machine."""
    whole: dict[str, Any] = json.loads((study / "results.json").read_text())
    whole.pop("environment")
    for run in whole["runs"]:
        run.pop("training_seconds")
    return whole


@pytest.fixture
def place(study_folder: Path, tmp_path: Path) -> Path:
    """A folder with the configs of the study that the tests share, which is not trained here."""
    for name in ("CONFIG.yaml", "STUDY.yaml"):
        shutil.copy(study_folder / name, tmp_path / name)
    return tmp_path


def test_trained_here_and_analysed_there_is_the_whole_study(place: Path, study_folder: Path) -> None:
    out, _ = tiedjax("study", "STUDY.yaml", "--out", "trained", "--train-only", cwd=place)
    assert "analysing" not in out
    assert not (place / "trained" / "results.json").exists()
    there = place / "elsewhere"
    there.mkdir()
    for name in ("CONFIG.yaml", "STUDY.yaml"):
        shutil.move(place / name, there / name)
    shutil.move(place / "trained", there / "moved")
    out, _ = tiedjax("study", "STUDY.yaml", "--out", "moved", "--analyse-only", cwd=there)
    assert "run 1 of 4" not in out
    assert results(there / "moved") == results(study_folder / "study")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_time_limit_ends_between_steps_and_the_same_command_goes_on(
    place: Path, study_folder: Path, workers: str
) -> None:
    command = ("study", "STUDY.yaml", "--out", "out", "--workers", workers, "--instruments", "norms")
    out, err = tiedjax(*command, "--time-limit", "0.01s", cwd=place, status=75)
    assert err == ""
    last = "time is up: 0 of 4 runs are trained; the same command continues\nnothing to report yet: no run of two is "
    assert out.endswith(f"{last}trained\n")
    tiedjax(*command, cwd=place)
    own, whole = results(place / "out"), results(study_folder / "study")
    for name in ("runs", "comparisons", "gradients", "evolution", "headline", "changes", "norms", "missing"):
        assert own[name] == whole[name], name


def test_a_time_limit_stops_a_run_after_a_step_with_its_state(place: Path) -> None:
    """Not before its first step: the limit is over when compilation is."""
    endless = ("--train.steps", "100000", "--workers", "1")
    command = ("study", "STUDY.yaml", "--out", "out", "--time-limit", "3s", *endless)
    out, _ = tiedjax(*command, cwd=place, status=75)
    assert "\ntime is up: 0 of 4 runs are trained; the same command continues\n" in out
    run = load_run(place / "out" / "runs" / "two-3")
    assert 1 <= run.checkpoint_steps[-1] == run.metrics["step"][-1] < 100_000


def test_what_is_not_trained_is_said_and_left_out(place: Path, study_folder: Path) -> None:
    shutil.copytree(study_folder / "study", place / "study")
    shutil.rmtree(place / "study" / "runs" / "one-5" / "checkpoints")
    tiedjax("study", "STUDY.yaml", "--out", "study", "--analyse-only", "--instruments", "norms", cwd=place)
    partial = results(place / "study")
    assert "Not among the results: one-5." in partial["notes"]
    assert [run["name"] for run in partial["runs"]] == ["two-3", "one-3", "two-5"]
    assert partial["missing"] == ["one-5"]


def test_only_the_instruments_that_are_named_are_used(place: Path, study_folder: Path) -> None:
    shutil.copytree(study_folder / "study", place / "study")
    tiedjax("study", "STUDY.yaml", "--out", "study", "--analyse-only", "--instruments", "norms,knn", cwd=place)
    chosen, whole = results(place / "study"), results(study_folder / "study")
    assert {"lens", "calibration", "cooccurrence", "spectral", "spectrum"} & set(chosen) == set()
    for name in ("norms", "knn", "comparisons", "gradients", "evolution", "runs"):
        assert chosen[name] == whole[name], name
    assert chosen["statements"].keys() < whole["statements"].keys()
    page = (place / "study" / "report.html").read_text()
    assert "Left out: lens." in page
    assert "Left out: norms." not in page


def test_an_instrument_that_is_not_slow_is_refused_as_one_before_anything_is_trained(place: Path) -> None:
    with (place / "STUDY.yaml").open("a") as file:
        file.write("slow_instruments: [norms]\n")
    _, err = tiedjax("study", "STUDY.yaml", "--out", "out", cwd=place, status=2)
    assert err == "tiedjax: slow_instruments: 'norms' is none of regret\n"
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--instruments", "norm"], "--instruments: 'norm' is none of knn, spectral, "),
        (["--train-only", "--analyse-only"], "--train-only and --analyse-only leave nothing to do; give one of them"),
        (["--time-limit", "8"], "--time-limit: must be a time such as 90s, 8m or 1.5h, got '8'"),
        (["--time-limit", "0s"], "--time-limit: must be a time such as 90s, 8m or 1.5h, got '0s'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_trained(place: Path, options: list[str], says: str) -> None:
    _, err = tiedjax("study", "STUDY.yaml", "--out", "out", *options, cwd=place, status=2)
    assert err.startswith(f"tiedjax: {says}")
    assert not (place / "out").exists()


SWEEP = """
base: CONFIG.yaml
arms:
  two: {tying: {scheme: untied}}
  one: {tying: {scheme: tied}}
reference: two
baseline: one
seeds: [3, 5]
sweep_seeds: [8, 9]
arm_sweeps:
  one: {optimizer.learning_rate: [1.0e-9, 1.0e-2, 1.0e+30]}
  two: {optimizer.tables.output.learning_rate: [1.0e-2, 2.0e-2]}
"""


def test_each_arm_is_trained_at_its_best_of_the_sweep(place: Path) -> None:
    """Also in two goes, with a point that diverges; the best is that of the even windows, reports are of the odd."""
    (place / "STUDY.yaml").write_text(SWEEP)
    command = ("study", "STUDY.yaml", "--out", "out", "--instruments", "norms", "--workers", "2")
    tiedjax(*command, "--time-limit", "0.01s", cwd=place, status=75)
    out, _ = tiedjax(*command, cwd=place)
    assert "run of the sweep 1 of 10: two-0-8\n" in out
    assert "try a lower optimizer.learning_rate; this point is out\n" in out
    choices = json.loads((place / "out" / "sweep.json").read_text())
    for arm, choice in choices.items():
        losses = []
        for number, point in enumerate(choice["tried"]):
            (value,) = point["values"].values()
            for seed in (8, 9):
                folder = place / "out" / "sweep" / f"{arm}-{number}-{seed}"
                if value < 1:
                    loss = load_run(folder).metrics["eval_loss_even"][-1]
                    assert point["losses"][str(seed)] == loss
            losses.append(float("inf") if point["mean"] is None else sum(point["losses"].values()) / 2)
        assert choice["best"] == losses.index(min(losses))
        best = choice["tried"][choice["best"]]["values"]
        for seed in (3, 5):
            options = load_run(place / "out" / "runs" / f"{arm}-{seed}").config.optimizer
            chosen = options.learning_rate if arm == "one" else options.tables.output.learning_rate
            assert [chosen] == list(best.values())
    again, _ = tiedjax(*command, cwd=place)
    assert "this point is out" not in again, "it diverged before"
    assert json.loads((place / "out" / "sweep.json").read_text()) == choices
    assert choices["one"]["best"] == 1
    assert choices["one"]["tried"][2]["mean"] is None
    assert choices["one"]["at_edge"] == []
    assert choices["two"]["at_edge"] == ["optimizer.tables.output.learning_rate"]
    saved = results(place / "out")
    assert saved["sweep"] == choices
    for run in saved["runs"]:
        metrics = load_run(place / "out" / "runs" / run["name"]).metrics
        assert run["eval_loss"] == metrics["eval_loss_odd"][-1] != metrics["eval_loss_even"][-1]


def test_a_run_is_on_record_as_diverged_for_its_own_config_alone(tmp_path: Path) -> None:
    assert not diverged(tmp_path, {"a": 1})
    (tmp_path / "diverged.json").write_text(json.dumps({"error": "step 3: the loss is nan", "config": {"a": 1}}))
    assert diverged(tmp_path, {"a": 1})
    assert not diverged(tmp_path, {"a": 2})


def test_a_study_says_first_what_it_will_write(study_folder: Path) -> None:
    """The bytes are those that the runs themselves say, of which norm scales are no part here."""
    runs = [load_run(path).config for path in sorted((study_folder / "study" / "runs").iterdir())]
    line = foreseen(runs, 2)
    # Two tied runs, two untied: 6 snapshots of 320 x 16 float32 and a state of parameters with two moments.
    table, body = 4 * 320 * 16, 4 * (4 * 16 * 16 + 3 * 16 * 32)
    written = 2 * sum(6 * n * table + 3 * (n * table + body) for n in (1, 2))
    assert line.startswith(f"4 runs, {written / 2**20:.2f} MiB to write; training all of them takes very roughly ")
    assert line.endswith(" on this machine")
