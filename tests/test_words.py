"""Every sentence of the answer, from results whose numbers are all different: what is swapped changes the string."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tiedjax.analysis.basis.statistics import Interval, holm_levels, interval
from tiedjax.analysis.study import words
from tiedjax.analysis.study.verdict import EDGE, Statement, decided

N = "\u00a0"  # a no-break space


def span(mean: float | None, half: float | None = None) -> dict[str, Any]:
    ends = (None, None) if half is None or mean is None else (mean - half, mean + half)
    return {"mean": mean, "low": ends[0], "high": ends[1], "n": 5, "confidence": 0.95}


def statement(margin: float, half: float | None, verdict: str, *, near_edge: bool = False) -> dict[str, Any]:
    ends = None if half is None else [margin - half, margin + half]
    level = None if half is None else 0.01
    return {
        "claim": f"claim of {margin}",
        "verdict": verdict,
        "margin": margin,
        "interval": ends,
        "p": None if half is None else 0.002,
        "level": level,
        "near_edge": near_edge,
        "n": 1 if half is None else 5,
    }


def small_results(**statements: Any) -> dict[str, Any]:
    """Results with distinct numbers; `statements` replace those of their names (nearer, lowers, raises, costs)."""
    made = {
        "nearer": statement(0.154, 0.031, "holds"),
        "lowers": statement(0.095, 0.023, "holds"),
        "raises": statement(0.022, 0.013, "holds"),
        "costs": statement(0.161, 0.017, "holds"),
        "shares": None,
        "x5_shares": None,
    } | statements
    names = {"nearer": "tied_nearer_output", "lowers": "x5_lowers_vs_output", "raises": "x5_raises_vs_input"}
    names["costs"] = "x5_costs_loss"
    names |= {"shares": "tied_shares_more_with_output", "x5_shares": "x5_shares_more_with_output"}
    cell = lambda mean, half: {"orthogonal": {"beyond_frequency": span(mean, half)}}
    near = {
        "tied": {"shared": {"vs_output": cell(0.283, 0.006), "vs_input": cell(0.129, 0.025)}},
        "x5": {"shared": {"vs_output": cell(0.188, 0.011), "vs_input": cell(0.151, 0.019)}},
        "untied": {"output": {"vs_input": cell(0.05, 0.01)}},
    }
    losses = {"untied": ((4.521, 0.03), (-0.012, 0.008)), "tied": ((4.533, 0.04), (0.0, 0.0))}
    losses["x5"] = (4.694, 0.05), (0.161, 0.009)
    return {
        "headline": {
            "arm": "tied",
            "reference": "untied",
            "fit": "orthogonal",
            "measure": "beyond_frequency",
            "vs_output": span(0.283, 0.006),
            "vs_input": span(0.129, 0.025),
            "early_output_share": span(0.766, 0.041),
            "early_steps": [1, 50],
        },
        "changes": {"x5": {}},
        "reproducible_share": {
            "tied": {"shared": {"vs_output": span(0.923, 0.01), "vs_input": span(0.583, 0.06)}},
            "x5": {"shared": {"vs_output": span(0.801, 0.03), "vs_input": span(0.719, 0.05)}},
        },
        "arms": {
            arm: {
                "alignment": near[arm],
                "eval_loss": span(*loss),
                "eval_loss_against_baseline": span(*cost),
                "overall_output_share": span(0.616, 0.006),
            }
            for arm, (loss, cost) in losses.items()
        },
        "statements": {names[key]: value for key, value in made.items() if value},
    }


MAIN = {
    "holds": (
        statement(0.154, 0.031, "holds"),
        "Yes. With token frequency controlled, the tied table lies nearer to its untied twin’s output table (0.283) "
        f"than to its input table (0.129): difference 0.154{N}±{N}0.031.",
    ),
    "near the edge": (
        statement(0.154, 0.031, "holds", near_edge=True),
        "Yes. With token frequency controlled, the tied table lies nearer to its untied twin’s output table (0.283) "
        f"than to its input table (0.129): difference 0.154{N}±{N}0.031. This verdict is near the edge.",
    ),
    "the opposite": (
        statement(-0.154, 0.031, "the opposite"),
        "No, the opposite. With token frequency controlled, the tied table lies nearer to its untied twin’s input "
        f"table (0.129) than to its output table (0.283): difference 0.154{N}±{N}0.031.",
    ),
    "undecided": (
        statement(-0.154, 0.231, "undecided"),
        "Undecided. With token frequency controlled, the tied table is not measurably nearer to its untied twin’s "
        f"output table (0.283) or input table (0.129): difference −0.154{N}±{N}0.231.",
    ),
    "one seed": (
        statement(0.154, None, "undecided"),
        "One seed, so only a hint. With token frequency controlled, the tied table lies nearer to its untied twin’s "
        "output table (0.283) than to its input table (0.129): difference 0.154.",
    ),
    "not measured": (None, "Not measured: there is no pair of a tied and an untied run with the same seed."),
}


@pytest.mark.parametrize("case", MAIN)
def test_the_first_sentence(case: str) -> None:
    nearer, sentence = MAIN[case]
    assert words.answer(small_results(nearer=nearer))[0] == sentence


def test_what_an_intervention_does_and_costs() -> None:
    assert words.answer(small_results())[1:] == [
        f"With x5 instead of tied, nearness to the output table falls by 0.095{N}±{N}0.023 and nearness to the input "
        f"table rises by 0.022{N}±{N}0.013.",
        f"With x5 instead of tied, the held-out loss rises by 0.161{N}±{N}0.017 nats a token.",
        f"The output role supplies 76.6{N}±{N}4.1{N}% of the tied table’s gradient (sum of both norms) in steps 1 to "
        f"50 and 61.6{N}±{N}0.6{N}% over the whole run.",
    ]
    other = small_results(
        lowers=statement(-0.04, 0.01, "the opposite", near_edge=True),
        raises=statement(0.02, 0.03, "undecided"),
        costs=statement(-0.07, 0.02, "the opposite"),
    )
    assert words.answer(other)[1:3] == [
        f"With x5 instead of tied, nearness to the output table rises, near the edge, by 0.040{N}±{N}0.010 and "
        f"nearness to the input table does not measurably change (0.020{N}±{N}0.030).",
        f"With x5 instead of tied, the held-out loss falls by 0.070{N}±{N}0.020 nats a token.",
    ]
    lone = small_results(
        lowers=statement(0.1, None, "undecided"), raises=statement(-0.2, None, "undecided"), costs=None
    )
    assert words.answer(lone)[1] == (
        "With x5 instead of tied, nearness to the output table falls by 0.100 (one seed) and nearness to the input "
        "table falls by 0.200 (one seed)."
    )
    edge = small_results(lowers=statement(-0.01, 0.02, "undecided", near_edge=True))
    assert f"output table does not measurably change, near the edge, (0.010{N}±{N}0.020)" in words.answer(edge)[1]


def test_what_is_shared_of_what_repeats_is_said_where_it_is_measured() -> None:
    both = small_results(shares=statement(0.34, 0.07, "holds"), x5_shares=statement(0.082, 0.09, "undecided"))
    assert words.answer(both)[3:5] == [
        "Of what training repeats over seeds, the tied table shares 0.923 with the output table and 0.583 with the "
        f"input table: difference 0.340{N}±{N}0.070.",
        "Of what training repeats over seeds, the x5 table shares 0.801 with the output table and 0.719 with the input "
        f"table: difference 0.082{N}±{N}0.090, undecided.",
    ]
    edge = small_results(shares=statement(-0.34, 0.3, "the opposite", near_edge=True))
    assert words.answer(edge)[3].endswith(f"difference −0.340{N}±{N}0.300, near the edge.")
    assert not any("repeats" in sentence for sentence in words.answer(small_results()))
    assert not any("repeats" in s for s in words.answer(small_results(shares=statement(0.3, None, "undecided"))))


def test_the_first_table_has_the_losses_and_their_difference_to_the_baseline() -> None:
    nothing = {"output": "–", "input": "–"}
    assert words.arm_rows(small_results()) == [
        {"arm": "untied", "loss": f"4.521{N}±{N}0.030", "against": f"−0.012{N}±{N}0.008", **nothing},
        {
            "arm": "tied",
            "loss": f"4.533{N}±{N}0.040",
            "against": "–",
            "output": f"0.283{N}±{N}0.006",
            "input": f"0.129{N}±{N}0.025",
        },
        {
            "arm": "x5",
            "loss": f"4.694{N}±{N}0.050",
            "against": f"+0.161{N}±{N}0.009",
            "output": f"0.188{N}±{N}0.011",
            "input": f"0.151{N}±{N}0.019",
        },
    ]


def test_how_many_statements_and_what_chance_alone_gives() -> None:
    assert words.testing(small_results()) == (
        "4 statements are tested together by Holm’s method: if every margin were 0, chance alone would decide any of "
        f"them in at most 5{N}% of studies. Each tested alone at 5{N}%, chance would decide 0.2 of 4."
    )
    assert words.basis(small_results()) == (
        "± is half of a Student-t interval over 5 seeds, paired by seed where two runs are compared. Intervals of "
        "statements have the level at which Holm’s method tests each; all others have 95 %."
    )
    alone = {name: statement(0.1, None, "undecided") for name in ("nearer", "lowers", "raises", "costs")}
    assert words.testing(small_results(**alone)) == "One seed: no statement can be tested."
    assert words.basis(small_results(**alone)) == "One seed: no interval can be given, and nothing is decided."


def test_what_near_the_edge_means_is_said_where_it_occurs() -> None:
    assert words.near_edge(small_results()) == ""
    assert EDGE == 2
    assert words.near_edge(small_results(costs=statement(0.3, 0.4, "undecided", near_edge=True))) == (
        "Near the edge, p is within a factor of 2 of the level: the same study run again could say otherwise."
    )


def test_every_verdict_stands_beside_its_claim() -> None:
    shown = words.verdicts(
        small_results(
            lowers=statement(-0.04, 0.01, "the opposite", near_edge=True), costs=statement(0.3, 0.4, "undecided")
        )
    )
    assert shown == [
        {"claim": "claim of 0.154", "verdict": "holds", "edge": "", "margin": f"0.154{N}±{N}0.031"},
        {
            "claim": "claim of -0.04",
            "verdict": "the opposite",
            "edge": "near the edge",
            "margin": f"−0.040{N}±{N}0.010",
        },
        {"claim": "claim of 0.022", "verdict": "holds", "edge": "", "margin": f"0.022{N}±{N}0.013"},
        {"claim": "claim of 0.3", "verdict": "undecided", "edge": "", "margin": f"0.300{N}±{N}0.400"},
    ]


# ---- How a verdict is reached ----


def test_p_and_intervals_are_those_of_scipy() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, 6)
    made = interval(values)
    assert made.p_value == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    ends = stats.t.interval(0.99, 5, loc=values.mean(), scale=stats.sem(values))
    assert (made.at(0.99).low, made.at(0.99).high) == pytest.approx(ends)
    assert made.at(0.99).at(0.95).low == pytest.approx(made.low)
    assert interval([0.2]).p_value is None
    assert interval([0.2, 0.2]).p_value == 0.0
    assert interval([0.0, 0.0]).p_value == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_holm_decides_what_the_closed_test_of_bonferroni_decides(seed: int) -> None:
    """Marcus, Peritz and Gabriel 1976: a statement is decided if every set of statements that holds it is."""
    rng = np.random.default_rng(seed)
    p = rng.choice([0.001, 0.004, 0.011, 0.013, 0.02, 0.03, 0.2, 0.9], 6).tolist()
    levels = holm_levels(p)
    for i in range(len(p)):
        others = [j for j in range(len(p)) if j != i]
        sets = itertools.chain.from_iterable(itertools.combinations(others, k) for k in range(len(p)))
        closed = all(min(p[j] for j in (i, *rest)) < 0.05 / (1 + len(rest)) for rest in sets)
        assert (p[i] < levels[i]) == closed


def test_verdicts_follow_the_sign_and_the_corrected_level() -> None:
    rng = np.random.default_rng(1)
    clear = lambda mean: Interval(mean, mean - 0.1, mean + 0.1, 5, 0.95)
    made = {
        "up": Statement("goes up", clear(1.0)),
        "down": Statement("goes down", clear(-1.0)),
        "flat": Statement("goes", clear(0.01)),
        "edge": Statement("nearly", Interval(0.14, 0.01, 0.27, 5, 0.95)),
        "lone": Statement("once", Interval(0.5, None, None, 1, 0.95)),
        "none": Statement("never", Interval(None, None, None, 0, 0.95)),
    }
    verdicts = decided(made)
    assert {name: record["verdict"] for name, record in verdicts.items()} == {
        "up": "holds",
        "down": "the opposite",
        "flat": "undecided",
        "edge": "undecided",  # alone its 95 % interval would exclude 0: four are tested
        "lone": "undecided",
    }
    assert [name for name, record in verdicts.items() if record["near_edge"]] == ["edge"]
    for record in verdicts.values():
        if record["interval"]:
            low, high = record["interval"]
            assert (low > 0 or high < 0) == (record["verdict"] != "undecided")
    nulls = {str(i): Statement("", interval(rng.normal(0, 1, 5))) for i in range(12)}
    assert verdicts["up"]["level"] == pytest.approx(0.05 / 4)
    assert len(decided(nulls)) == 12


def test_twelve_null_statements_decide_anything_in_at_most_a_twentieth_of_studies() -> None:
    rng = np.random.default_rng(2)
    studies = 2000
    any_decided = alone = 0
    for _ in range(studies):
        spans = [interval(values) for values in rng.normal(0, 1, (12, 5))]
        p = [made.p_value or 0.0 for made in spans]
        any_decided += any(value < level for value, level in zip(p, holm_levels(p), strict=True))
        alone += min(p) < 0.05
    assert any_decided / studies < 0.05 + 3 * np.sqrt(0.05 * 0.95 / studies)
    assert alone / studies > 0.4  # what Holm's correction is for
