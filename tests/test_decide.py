"""`tiedjax decide` as a process: the ladder that is trained, a time limit, its record and its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest
from programs import finish, start, tiedjax
from runs import SHRUNK, write_config, write_text

from tiedjax import decide, load_run
from tiedjax.analysis.decision import page, verdicts
from tiedjax.config_files import packaged_configs
from tiedjax.errors import UserError
from tiedjax.lm import abstract_params
from tiedjax.plan import parameters

QUICK = packaged_configs("run")["quick"]
LADDER = ("--widths", "24", "--rates", "1,2", "--workers", "2")
COMMAND = ("decide", "CONFIG.yaml", "--out", "out", "--seeds", "2", *LADDER)
pytestmark = pytest.mark.timeout(900)  # dozens of runs
ARMS = ["untied", "tied", "until-5", "tied-wide"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a decision was stopped by its time limit, and then came to its end."""
    folder = tmp_path_factory.mktemp("decide")
    write_config(folder / "CONFIG.yaml", write_text(folder / "TEXT.jsonl"), {"model.d_model": 16})
    out, err = tiedjax(*COMMAND, "--time-limit", "5s", cwd=folder, status=75)
    assert err == ""
    assert "no verdict yet: width 16 is not trained; the same command continues\n" in out
    assert "analysing" not in out
    assert not (folder / "out" / page.PAGE).exists()
    out, err = finish(start(["-m", "tiedjax", *COMMAND], cwd=folder), seconds=600)
    assert err == ""
    (folder / "STDOUT").write_text(out)
    return folder


def test_the_ladder_is_trained_and_its_page_says_what_its_runs_say(place: Path) -> None:
    decision = page.read(place / "out")
    assert decision["rungs"] == [16, 24]
    own = decision["results"]["16"]
    assert [arm for arm in own["arms"] if arm != "untied-in-time"] == ARMS
    assert list(decision["results"]["24"]["arms"]) == ARMS[:3]
    for arm in own["arms"]:
        tried = [point["values"]["optimizer.tables.learning_rate"] for point in own["sweep"][arm]["tried"]]
        assert tried == [3e-4, 6e-4]
    losses = {name: load_run(place / "out" / "width-16" / "runs" / name).metrics for name in ("untied-1", "tied-1")}
    last = {name: float(metrics["eval_loss_odd"][-1]) for name, metrics in losses.items()}
    by_hand = {run["name"]: run["eval_loss"] for run in own["runs"]}
    assert {name: by_hand[name] for name in last} == last
    html = (place / "out" / page.PAGE).read_text(encoding="utf-8")
    printed = (place / "STDOUT").read_text()
    for line in verdicts.said(decision):
        assert line in printed
        assert line.replace("'", "&#39;") in html
    assert f"decision: {Path('out') / page.PAGE}\n" in printed
    for heading in ("What each costs", "How far trained", "What the tie costs each role", "Why", "Do it"):
        assert f">{heading}</h2>" in html
    assert 'src="http' not in html
    assert (place / "out" / "width-24" / "report.html").exists()


def test_a_rung_is_trained_at_another_width_alone(place: Path) -> None:
    own, other = (load_run(place / "out" / f"width-{width}" / "runs" / "tied-0").config for width in (16, 24))
    assert (own.model.d_model, own.model.d_ff) == (16, 32)
    assert (other.model.d_model, other.model.d_ff) == (24, 48)
    assert other.train == own.train
    until = load_run(place / "out" / "width-16" / "runs" / "until-5-0")
    assert until.tables(4).tied
    assert not until.tables().tied


def test_the_same_command_again_trains_nothing_and_draws_the_same(place: Path) -> None:
    files = [place / "out" / page.PAGE, place / "out" / page.RECORD]
    before = [file.read_bytes() for file in files]
    out, _ = tiedjax("report", "out", cwd=place)
    assert out.endswith(f"decision: {Path('out') / page.PAGE}\n")
    assert [file.read_bytes() for file in files] == before
    again, _ = tiedjax(*COMMAND, cwd=place)
    assert "are left" not in again
    assert "compiling" not in again
    assert "analysing" not in again
    assert [file.read_bytes() for file in files] == before


def test_another_ladder_in_the_same_folder_is_refused(place: Path) -> None:
    other = [*COMMAND[:5], "3", *COMMAND[6:]]
    _, err = tiedjax(*other, cwd=place, status=2)
    assert err == "tiedjax: out: holds the decision of another config, widths, rates or seeds; give another --out\n"


def test_memory_is_what_the_states_take() -> None:
    """Weights in float32, two moments for each, the account's moment and sum of the table, bfloat16 at inference."""
    ladder = decide.load_ladder(QUICK, {"optimizer.body.kind": "adamw"})
    runs = ladder.plan(64).runs
    found = decide.memory(runs["tied", 0])
    numbers = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(runs["tied", 0])))
    table = 2048 * 64
    assert found["parameters"] == numbers
    assert found["weights"] == 4 * numbers
    assert found["inference"] == 2 * numbers
    assert found["account"] == pytest.approx(4 * 2 * table, rel=0.1)
    assert found["optimizer"] == pytest.approx(4 * 2 * numbers, rel=0.02)
    assert decide.memory(runs["untied", 0])["weights"] == 4 * (numbers + table)
    assert decide.memory(runs["until-200", 0])["weights"] == 4 * (numbers + table)


def test_the_default_ladder() -> None:
    ladder = decide.load_ladder(QUICK, {})
    assert ladder.widths == (64, 48, 96)
    assert (ladder.own, ladder.until, ladder.seeds) == (64, 200, 5)
    plan = ladder.plan(64, steps_in_time=291)
    assert list(plan.study.arms) == ["untied", "tied", "until-200", "tied-wide", "untied-in-time"]
    assert (len(plan.runs), len(plan.trials)) == (25, 30)
    assert plan.runs["untied-in-time", 0].train.steps == 291
    assert plan.runs["until-200", 0].tying.untie_at == 200
    assert [point["optimizer.tables.learning_rate"] for point in plan.arms["tied"].points] == [0.04, 0.08, 0.16]
    assert parameters(plan.runs["tied-wide", 0]) == pytest.approx(parameters(plan.runs["untied", 0]), rel=0.01)
    assert "untied-in-time" not in ladder.plan(64, steps_in_time=300).study.arms
    assert list(ladder.plan(96, steps_in_time=291).study.arms) == ["untied", "tied", "until-200"]
    assert {cfg.train.threads for cfg in plan.runs.values()} == {1}


def test_widths_are_those_that_heads_divide() -> None:
    three_heads = {"model.d_model": "60", "model.heads": "3"}
    assert decide.load_ladder(QUICK, three_heads).widths == (60, 48, 90)
    assert decide.load_ladder(QUICK, {}, widths=[64]).widths == (64,)
    assert decide.load_ladder(QUICK, {}, widths=[96, 128]).widths == (64, 96, 128)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--widths", "48,x"], "--widths: must be whole numbers between commas, such as 48,64,96; got '48,x'"),
        (["--widths", "50"], "--widths: must be multiples of 4 for 2 heads of model.position rope, got 50"),
        (["--rates", "1"], "--rates: must be two or more distinct factors above 0, such as 0.5,1,2; got 1"),
        (["--rates", "1,-2"], "--rates: must be two or more distinct factors above 0, such as 0.5,1,2; got 1,-2"),
        (["--rates", "1;2"], "--rates: must be numbers between commas, such as 0.5,1,2; got '1;2'"),
        (["--seeds", "1"], "--seeds: must be at least 2, or there is no interval; got 1"),
        (["--workers", "0"], "--workers: must be at least 1, got 0"),
        (["--tying.untie_at", "10"], "tying.untie_at: decide sets it for each arm; leave it out"),
        (
            ["--tying.scheme", "low_rank"],
            "tying.scheme: decide compares tied with untied and sets it for each arm; got low_rank",
        ),
        (
            ["--optimizer.tables.output.learning_rate", "0.1", "--tying.scheme", "untied"],
            "optimizer.tables.output.learning_rate: decide tries one rate for both roles; leave it out",
        ),
        (["--train.steps", "2"], "train.steps: must be at least 3 to tie for two thirds of them, got 2"),
        (["--time-limit", "soon"], "--time-limit: must be a time such as 90s, 8m or 1.5h, got 'soon'"),
    ],
)
def test_what_cannot_be_decided_is_refused_in_one_line(
    options: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiedjax.cli import main

    assert main(["decide", "quick", "--out", str(tmp_path / "out"), *options]) == 2
    assert capsys.readouterr().err == f"tiedjax: {line}\n"
    assert not (tmp_path / "out").exists()


def test_a_record_holds_its_config(place: Path) -> None:
    record: dict[str, Any] = json.loads((place / "out" / page.RECORD).read_text())
    assert record["config"]["model"]["vocab_size"] == SHRUNK["model.vocab_size"]
    assert record["time"]["steps"] == max(1, round(SHRUNK["train.steps"] / record["time"]["ratio"]))
    assert record["memory"]["tied"]["weights"] < record["memory"]["untied"]["weights"]


def test_a_page_without_its_own_width_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        page.read(tmp_path)
