"""Who wrote a run's table: shares by hand, and what the command and the section say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import arguments

import tiedjax
from tiedjax import cli
from tiedjax.analysis import account
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.strata import strata
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.instruments.account import section
from tiedjax.analysis.instruments.account.account import RunAccount, early_end
from tiedjax.config import StudyConfig
from tiedjax.errors import UserError

N = "\u00a0"


def test_shares_are_inner_products_with_the_table_and_sum_to_one(finished: Path) -> None:
    run = tiedjax.load_run(finished)
    found, parts = account(run), run.account()
    table = np.asarray(run.tables().input, np.float64)
    np.testing.assert_allclose(parts.initial + parts.input + parts.output, table, rtol=0, atol=1e-6)
    masks = {"all": np.ones(len(table), bool), **strata(run.token_counts)}
    for name, mask in masks.items():
        shares = found.shares if name == "all" else found.strata[name]
        assert shares.rows == mask.sum()
        assert shares.initial + shares.input + shares.output == pytest.approx(1, abs=1e-5)
        for part in ("initial", "input", "output"):
            along = np.sum(getattr(parts, part)[mask] * table[mask]) / np.sum(table[mask] ** 2)
            assert getattr(shares, part) == pytest.approx(along, abs=1e-6)
    assert (found.rows, found.table_rows, found.width) == (320, 320, table.shape[1])
    assert abs(found.shares.input) > 1e-5 < abs(found.shares.output)
    assert found.error is not None
    assert found.error < 1e-6


def test_the_initial_part_is_what_decay_has_left_of_the_first_table(finished: Path) -> None:
    run = tiedjax.load_run(finished)
    rates = 0.1 * run.metrics["learning_rate"]  # times the weight decay
    kept = np.prod(1 - rates)
    np.testing.assert_allclose(run.account().initial, kept * run.tables(0).input, rtol=1e-6, atol=1e-9)
    assert kept < 0.999


def test_spans_sum_to_the_shares_and_rates_to_one(finished: Path) -> None:
    run = tiedjax.load_run(finished)
    found = account(run)
    assert [(span.first, span.last) for span in found.spans] == [(0, 1), (1, 2), (2, 4), (4, 6), (6, 8)]
    for role in ("input", "output"):
        assert sum(getattr(span, role) for span in found.spans) == pytest.approx(getattr(found.shares, role), abs=1e-6)
    assert sum(span.rate for span in found.spans) == pytest.approx(1)
    rates = run.metrics["learning_rate"]
    assert found.spans[2].rate == pytest.approx(rates[2:4].sum() / rates.sum())
    assert (found.early.first, found.early.last) == (0, 1)
    assert found.early == found.spans[0]
    assert early_end([0, 1, 2, 4, 8, 16, 30, 50, 300]) == 30


def test_what_was_written_early_is_what_decay_has_left_of_it(finished: Path) -> None:
    run = tiedjax.load_run(finished)
    early, last = run.account(2), run.account()
    kept = np.prod(1 - 0.1 * run.metrics["learning_rate"][2:])
    table = np.asarray(run.tables().input, np.float64)
    found = account(run)
    for role in ("input", "output"):
        share = np.sum(kept * getattr(early, role) * table) / np.sum(table**2)
        assert sum(getattr(span, role) for span in found.spans[:2]) == pytest.approx(share, abs=1e-6)
        assert not np.allclose(getattr(early, role), getattr(last, role))


def test_changes_are_means_of_what_was_logged(finished: Path) -> None:
    run = tiedjax.load_run(finished)
    found, metrics = account(run), run.metrics
    assert [(change.first, change.last) for change in found.changes] == [(0, 1), (1, 8), (0, 8)]
    assert found.changes[0].in_in is None  # no update lies before the first
    for i, inside in [(1, metrics["step"] > 1), (2, metrics["step"] > 0)]:
        for name in ("in_in", "in_out", "out_in", "out_out"):
            assert getattr(found.changes[i], name) == pytest.approx(np.nanmean(metrics[f"m_{name}"][inside]))
        logged = np.isfinite(metrics["body_loss_change"])  # at snapshots alone: straight lines between them
        steps = metrics["step"][inside & (metrics["step"] >= metrics["step"][logged][0])]
        between = np.interp(steps, metrics["step"][logged], metrics["body_loss_change"][logged])
        assert found.changes[i].body == pytest.approx(between.mean())
        assert found.changes[i].cosine == pytest.approx(np.mean(metrics["role_update_cosine"][inside]))
        assert found.changes[i].input_step_share == pytest.approx(np.mean(metrics["input_step_share"][inside]))
    assert found.changes[2].clipped == np.mean(metrics["grad_norm"] > 1)
    assert found.curve.out_in[1:] == metrics["m_out_in"][1:].tolist()
    assert found.curve.out_in[0] is None
    assert np.isfinite(metrics["body_loss_change"]).sum() == 4  # of the snapshots' steps but the first


def test_what_each_role_wrote_is_compared_with_each_table_of_the_twin(finished: Path) -> None:
    run = tiedjax.load_run(finished)
    parts = run.account()
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((parts.input.shape[1],) * 2))[0]
    twin = dataclasses.make_dataclass("Twin", ["input", "output"])(parts.output @ turn, parts.input @ turn)
    nearness = account(run, twin=twin).nearness
    assert list(nearness) == ["input_to_input", "input_to_output", "output_to_input", "output_to_output"]
    assert nearness["input_to_output"].score == pytest.approx(1, abs=1e-4)
    assert nearness["output_to_input"].score == pytest.approx(1, abs=1e-4)
    assert nearness["input_to_input"].score < 0.9
    assert nearness["output_to_output"].floor > 0


def test_the_command_prints_what_it_writes(
    finished: Path, study_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["analyze", "account", str(finished), "--json", str(tmp_path / "o.json")]) == 0
    shown = capsys.readouterr().out
    found, written = account(tiedjax.load_run(finished)), json.loads((tmp_path / "o.json").read_text())
    assert {name: written[name] for name in to_plain(found)} == to_plain(found)
    assert shown.startswith(f"{finished} at step 8: who wrote its table, shares of the squared norm of 320 rows\n")
    table = [line.split() for line in shown.splitlines()[1:3]]
    shares = [f"{getattr(found.shares, part):.4f}" for part in ("initial", "input", "output")]
    assert table == [["tokens", "rows", "initial", "input", "output"], ["all", "320", *shares]]
    assert (
        "initial: what is left of the first table; input, output: of what that role's updates wrote; they sum to 1"
        in (shown)
    )
    assert "of all rates: the span's share of the summed learning rate" in shown
    assert (
        "in<-out: through the lookup, of what the output role wrote; body: at the steps where it was measured" in shown
    )
    change = found.changes[1]
    assert change.out_out is not None
    assert f"{1000 * change.out_out:.4f}" in next(line for line in shown.splitlines() if line.startswith("2-8 "))


def test_the_command_compares_with_a_twin(study_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tied, untied = (str(study_folder / "study" / "runs" / name) for name in ("one-3", "two-3"))
    assert cli.main(["analyze", "account", tied, "--twin", untied]) == 0
    shown = capsys.readouterr().out
    assert (
        f"what each role wrote beside the tables of {untied}: orthogonal map, chance: equally frequent rows\n" in shown
    )
    assert len([line for line in shown.splitlines() if line.startswith(("input ", "output "))]) == 4


def test_runs_without_an_account_are_refused(
    study_folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untied = str(study_folder / "study" / "runs" / "two-3")
    assert cli.main(["analyze", "account", untied]) == 2
    assert capsys.readouterr().err == (
        f"tiedjax: {untied}: has no account of one table: under untied each role has its own table\n"
    )
    off = tmp_path / "off"
    assert cli.main([*arguments(off, text), "--tying.account", "off", "--train.steps", "2"]) == 0
    capsys.readouterr()
    with pytest.raises(UserError, match=r"has no account of one table: tying.account was off$"):
        account(tiedjax.load_run(off))
    assert "input_update_norm" not in tiedjax.load_run(off).metrics


def test_a_sample_of_rows_is_read_as_such(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiedjax.run.tying, "SAMPLE_ROWS", 280)
    out = tmp_path / "rows"
    assert cli.main([*arguments(out, text), "--tying.account", "rows", "--train.steps", "3"]) == 0
    run = tiedjax.load_run(out)
    parts, found = run.account(), account(run)
    assert len(parts.rows) == found.rows == 280
    assert found.table_rows == 320
    table = run.tables().input[parts.rows]
    np.testing.assert_allclose(parts.initial + parts.input + parts.output, table, rtol=0, atol=1e-6)
    assert found.shares.initial + found.shares.input + found.shares.output == pytest.approx(1, abs=1e-5)


def test_the_section_has_every_shared_table_beside_its_twin(study_folder: Path) -> None:
    folder = study_folder / "study" / "runs"
    study = StudyConfig(arms={"two": {}, "one": {}}, reference="two", baseline="one", seeds=(3, 5))
    runs = {(arm, seed): tiedjax.load_run(folder / f"{arm}-{seed}") for arm in ("two", "one") for seed in (3, 5)}
    records = section.collect(StudyRuns(study, runs))
    assert [(record["arm"], record["seed"]) for record in records] == [("one", 3), ("one", 5)]
    twin = runs["two", 5].tables()
    assert records[1] == {"arm": "one", "seed": 5} | to_plain(account(runs["one", 5], twin=twin))


def results(in_out: list[float | None]) -> dict[str, Any]:
    """Of seeds with these changes by the output role through the lookup, in thousandths of a nat."""
    changes = [None if value is None else {"in_out": value / 1000, "in_in": -0.001} for value in in_out]
    blank = dict.fromkeys((f.name for f in dataclasses.fields(RunAccount)), None)
    spans: dict[str, Any] = {"first": 0, "last": 9}
    names = ("in_in", "in_out", "out_in", "out_out", "decay", "body", "output_update_share", "cosine")
    full = dict.fromkeys((*names, "input_step_share", "clipped"), None) | spans
    shares = {"rows": 4, "initial": 0.25, "input": 0.125, "output": 0.625}
    one = blank | {"step": 9, "rows": 4, "table_rows": 4, "width": 2, "shares": shares, "strata": {}, "spans": []}
    one |= {"early": spans | {"rate": 0.1, "input": 0.0, "output": 0.1}, "nearness": {}}
    one |= {"curve": {"steps": [], "in_in": [], "in_out": [], "out_in": [], "out_out": []}}
    records = [one | {"arm": "a", "seed": i, "changes": [full | (change or {})]} for i, change in enumerate(changes)]
    return {"headline": {"arm": "a"}, "account": records}


@pytest.mark.parametrize(
    ("in_out", "says"),
    [
        (
            [0.2, 0.3],
            "The output role’s updates of a harm the lookup: through it they raise the next batch’s loss by "
            f"0.25{N}±{N}0.64 thousandths of a nat each. The input role’s change it by −1.00{N}±{N}0.00.",
        ),
        (
            [0.20, 0.21],
            "The output role’s updates of a harm the lookup: through it they raise the next batch’s loss by "
            f"0.21{N}±{N}0.06 thousandths of a nat each. The input role’s change it by −1.00{N}±{N}0.00.",
        ),
        (
            [-0.20, -0.21],
            "The output role’s updates of a help the lookup: through it they lower the next batch’s loss by "
            f"0.21{N}±{N}0.06 thousandths of a nat each. The input role’s change it by −1.00{N}±{N}0.00.",
        ),
        ([None], "What the updates of a did to the next batch’s loss was not logged."),
    ],
)
def test_the_lookup_is_harmed_helped_or_neither(in_out: list[float | None], says: str) -> None:
    wrote, changes = section.why(results(in_out))
    undecided = len(in_out) > 1 and abs(in_out[0] or 0) == 0.2 and in_out[1] == 0.3
    if undecided:
        says = (
            "Whether the output role’s updates of a help or harm the lookup is undecided: through it they change the "
            f"next batch’s loss by 0.25{N}±{N}0.64 thousandths of a nat each. The input role’s change it by "
            f"−1.00{N}±{N}0.00."
        )
    assert changes == says
    if len(in_out) > 1:
        assert wrote == (
            f"The output role wrote 62.5{N}±{N}0.0{N}% of the final a table and the input role 12.5{N}±{N}0.0{N}%; "
            f"25.0{N}±{N}0.0{N}% is left of the initial one."
        )


def test_regularisers_have_a_place_in_words_and_tables_where_there_are_any() -> None:
    without, found = (results([0.2, 0.3]) for _ in range(2))
    for i, record in enumerate(found["account"]):
        by_regulariser = {"anchor": 0.0625, "cosine": -0.1875}
        shares = {"initial": 0.25, "input": 0.125, "output": 0.75, "regularisers": by_regulariser}
        record["shares"] = record["shares"] | shares
        record["early"] = record["early"] | {"regularisers": {"anchor": 0.02, "cosine": 0.03}}
        changes = {"anchor": 0.004, "cosine": 0.002 + 0.001 * i}
        record["changes"] = [record["changes"][0] | {"regularisers": changes}]
    assert section.why(found)[0] == (
        f"The output role wrote 75.0{N}±{N}0.0{N}% of the final a table and the input role 12.5{N}±{N}0.0{N}%; "
        f"25.0{N}±{N}0.0{N}% is left of the initial one. The cosine regulariser wrote −18.8{N}±{N}0.0{N}%. The anchor "
        f"regulariser wrote 6.2{N}±{N}0.0{N}%."
    )
    assert section.when(found) == [
        f"The first 9 steps wrote 15.0{N}±{N}0.0{N}% of the final a table; they have 10{N}±{N}0{N}% of the summed "
        "learning rate."
    ]
    assert [section.regularisers(each) for each in (found, without)] == [["cosine", "anchor"], []]
    row, blank, change = section.shares(found)[0], section.shares(without)[0], section.changes(found)[0]
    assert (row["cosine"], row["anchor"], row["mean"]) == (f"−0.188{N}±{N}0.000", f"0.062{N}±{N}0.000", "–")
    assert (blank["cosine"], blank["anchor"]) == ("–", "–")
    assert (change["cosine"], change["anchor"]) == (f"2.50{N}±{N}6.35", f"4.00{N}±{N}0.00")
