"""Studies as processes: sweeps, a time limit, training here and analysing there, a choice of instruments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from programs import tiedjax

from tiedjax import estimate, load_run
from tiedjax.config import BodyOptimizerConfig, DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from tiedjax.estimate import Progress, foreseen
from tiedjax.work import diverged, steps_left


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


@pytest.mark.slow
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


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_a_time_limit_ends_between_steps_and_the_same_command_goes_on(
    place: Path, study_folder: Path, workers: str
) -> None:
    command = ("study", "STUDY.yaml", "--out", "out", "--workers", workers, "--instruments", "norms")
    out, err = tiedjax(*command, "--time-limit", "0.01s", cwd=place, status=75)
    assert err == ""
    assert "\n4 of 4 runs are left, " in f"\n{out}"
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


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_stop_at_ends_each_run_and_the_study_goes_on_to_the_next(place: Path, study_folder: Path, workers: str) -> None:
    command = ("study", "STUDY.yaml", "--out", "out", "--workers", workers, "--instruments", "norms")
    out, err = tiedjax(*command, "--train.stop_at", "5", cwd=place, status=75)
    assert err == ""
    assert out.endswith(
        "\ntrain.stop_at: 0 of 4 runs are trained; a later one, or none, continues\n"
        "nothing to report yet: no run of two is trained\n"
    )
    names = ["two-3", "one-3", "two-5", "one-5"]
    for name in names:
        run = load_run(place / "out" / "runs" / name)
        assert run.checkpoint_steps == [run.metrics["step"][-1]] == [5]
    out, _ = tiedjax(*command, cwd=place)
    assert "\n4 of 4 runs are left, " in f"\n{out}"
    own, whole = results(place / "out"), results(study_folder / "study")
    for name in ("runs", "comparisons", "gradients", "evolution", "headline", "changes", "norms", "missing"):
        assert own[name] == whole[name], name


@pytest.mark.slow
def test_an_arm_that_stop_at_ends_is_named_as_missing(place: Path) -> None:
    """The other arm is trained and reported; what a crew analyses beside training has none of the runs that ended."""
    study = (place / "STUDY.yaml").read_text()
    (place / "STUDY.yaml").write_text(study.replace("one: {", "one: {train: {stop_at: 3}, "))
    command = ("study", "STUDY.yaml", "--out", "out", "--workers", "2", "--instruments", "norms")
    out, _ = tiedjax(*command, cwd=place, status=75)
    assert "\ntrain.stop_at: 2 of 4 runs are trained; a later one, or none, continues\n" in out
    partial = results(place / "out")
    assert partial["missing"] == ["one-3", "one-5"]
    assert [run["name"] for run in partial["runs"]] == ["two-3", "two-5"]
    assert "Not among the results: one-3, one-5." in partial["notes"]
    assert {table["arm"] for table in partial["norms"]} == {"two"}
    again, _ = tiedjax(*command, cwd=place, status=75)
    assert "are left" not in again
    assert "of training left" not in again


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


@pytest.mark.slow
def test_each_arm_is_trained_at_its_best_of_the_sweep(place: Path) -> None:
    """Also in two goes, with a point that diverges; the best is that of the even windows, reports are of the odd."""
    (place / "STUDY.yaml").write_text(SWEEP)
    command = ("study", "STUDY.yaml", "--out", "out", "--instruments", "norms", "--workers", "2")
    tiedjax(*command, "--time-limit", "0.01s", cwd=place, status=75)
    out, _ = tiedjax(*command, "--train.stop_at", "3", cwd=place, status=75)
    assert "\n14 of 14 runs are left, " in f"\n{out}"
    assert "\ntrain.stop_at: 2 of 10 runs of the sweep are trained; a later one, or none, continues\n" in out
    assert not (place / "out" / "sweep.json").exists()
    out, _ = tiedjax(*command, cwd=place)
    assert "\n12 of 14 runs are left, " in f"\n{out}", "two diverged"
    assert "run of the sweep 1 of 10: two-0-8\n" in out
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
    assert "are left" not in again
    assert "of training left" not in again
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
    config = {"a": 1, "train": {"stop_at": None}}
    assert not diverged(tmp_path, config)
    (tmp_path / "diverged.json").write_text(json.dumps({"error": "step 3: the loss is nan", "config": config}))
    assert diverged(tmp_path, config)
    assert diverged(tmp_path, {"a": 1, "train": {"stop_at": 7}}), "which does not change what a run is"
    assert not diverged(tmp_path, {"a": 2, "train": {"stop_at": None}})


def test_a_study_says_first_what_it_will_write(study_folder: Path) -> None:
    """The bytes are those that the runs themselves say, of which norm scales are no part here."""
    runs = [load_run(path).config for path in sorted((study_folder / "study" / "runs").iterdir())]
    line = foreseen([(run, 8) for run in runs], 2)
    # Two tied runs, two untied: 6 snapshots of 320 x 16 float32 and a state of parameters with two moments. Of a tied
    # table each snapshot has the account too, the state that and the input role's moment.
    table, body = 4 * 320 * 16, 4 * (4 * 16 * 16 + 3 * 16 * 32)
    written = 2 * sum(6 * 2 * table + 3 * (n * table + body) for n in (1, 2)) + 2 * 2 * table
    assert line
    assert line.startswith(
        f"4 of 4 runs are left, {written / 2**20:.2f} MiB to write; training them takes very roughly "
    )
    assert line.endswith(" on this machine")


def test_of_a_study_that_has_begun_only_what_is_left_is_foreseen(study_folder: Path) -> None:
    """One run that is done, one after 3 of its 8 steps, whose snapshots of 4, 6 and 8 and whose state are to come."""
    runs = [load_run(study_folder / "study" / "runs" / name).config for name in ("one-3", "one-5")]
    table, body = 4 * 320 * 16, 4 * (4 * 16 * 16 + 3 * 16 * 32)
    line = foreseen([(runs[0], 0), (runs[1], 5)], 2)
    assert line
    assert line.startswith(
        f"1 of 2 runs are left, {(3 * 2 * table + 3 * (table + body) + 2 * table) / 2**10:.2f} KiB to write; "
    )
    assert foreseen([(run, 0) for run in runs], 2) is None


def test_the_time_foreseen_is_that_of_the_products_of_model_and_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU at half the rate of a large product, and 10 ms a step; Muon's products once a step and matrix."""
    monkeypatch.setattr(estimate, "product_rate", lambda: 1e3)
    model = ModelConfig(layers=3, d_model=8, heads=2, d_ff=12, seq_len=4, vocab_size=16)
    parameters = 3 * (4 * 8 * 8 + 3 * 8 * 12) + 16 * 8
    of_model = 5 * 4 * (6 * parameters + 6 * 3 * 4 * 8)
    of_square = 5 * 3 * 2 * 8**3  # iterations, products, FLOPs of one
    of_wide = 5 * (2 * 2 * 8**2 * 12 + 2 * 8**3)
    of_muon = 3 * (4 * of_square + 3 * of_wide)
    for kind, flops in [("adamw", of_model), ("muon", of_model + of_muon)]:
        optimizer = OptimizerConfig(body=BodyOptimizerConfig(kind=kind))  # type: ignore[arg-type]
        cfg = RunConfig(
            model=model, optimizer=optimizer, data=DataConfig(batch_size=5), train=TrainConfig(steps=100, stop_at=70)
        )
        seconds = 30 * 0.01 / 2 + 30 * flops / 500
        hours, minutes = divmod(round(seconds) // 60, 60)
        line = foreseen([(cfg, 30)], 2)
        assert line
        assert line.endswith(f" very roughly {hours} h {minutes:02d} min on this machine")


def test_the_time_that_is_left_is_told_by_the_runs_of_this_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once: a and b were done before, c is half done; 10 s for the 5 steps of c, 30 s for the 10 of d."""
    clock = iter([0.0, 0.1, 1.0, 1.5, 11.0, 31.5])
    monkeypatch.setattr(estimate.time, "monotonic", lambda: next(clock))
    progress = Progress("run", {"a": 0, "b": 0, "c": 5, "d": 10, "e": 10, "f": 10}, 2)
    assert progress.begins("a") == "run 1 of 6: a"  # at 0.0
    assert progress.begins("b") == "run 2 of 6: b"
    progress.ended("a")
    assert progress.begins("c") == "run 3 of 6: c", "what ended at once says nothing"
    progress.ended("b")
    assert progress.begins("d") == "run 4 of 6: d"
    progress.ended("c")  # at 11.0, after 10 s
    monkeypatch.setattr(estimate.time, "monotonic", lambda: 11.0)
    assert progress.begins("e") == "run 5 of 6: e; about 30 s of training left"  # 2 s a step, 30 steps, two at once
    monkeypatch.setattr(estimate.time, "monotonic", lambda: 31.5)
    progress.ended("d")
    assert progress.begins("f") == "run 6 of 6: f; about 27 s of training left"  # (10 + 30) s for 15 steps, 20 left


def test_the_steps_that_are_left_are_those_after_the_newest_state(tmp_path: Path) -> None:
    def left(stop_at: int | None = None) -> int:
        return steps_left(tmp_path, RunConfig(train=TrainConfig(steps=10, stop_at=stop_at)))

    assert (left(), left(4), left(20)) == (10, 4, 10)
    for name in ("2", "6", "8.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert (left(), left(7), left(4)) == (4, 1, 0)
    (tmp_path / "checkpoints" / "10").mkdir()
    assert left() == 0
