"""Every sentence of the answer, from results whose numbers are all different: what is swapped changes the string."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tiedjax.analysis.study import sentences
from tiedjax.analysis.study.verdicts import EDGE

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
    """Results with distinct numbers; `statements` replace those of their names (nearer, lowers, ...)."""
    made = {
        "nearer": statement(0.154, 0.031, "holds"),
        "lowers": statement(0.095, 0.023, "holds"),
        "raises": statement(0.022, 0.013, "holds"),
        "costs": statement(0.161, 0.017, "holds"),
        "untied_costs": None,
        "x5_nearer": None,
        "shares": None,
        "x5_shares": None,
    } | statements
    names = {"nearer": "tied_nearer_output", "lowers": "x5_lowers_vs_output", "raises": "x5_raises_vs_input"}
    names |= {"costs": "x5_costs_loss", "untied_costs": "untied_costs_loss", "x5_nearer": "x5_nearer_output"}
    names |= {"shares": "tied_shares_more_with_output", "x5_shares": "x5_shares_more_with_output"}
    cell = lambda mean, half: {"orthogonal": {"beyond_frequency": span(mean, half)}}
    near = {
        "tied": {"shared": {"vs_output": cell(0.283, 0.006), "vs_input": cell(0.129, 0.025)}},
        "x5": {"shared": {"vs_output": cell(0.188, 0.011), "vs_input": cell(0.151, 0.019)}},
        "untied": {"output": {"vs_input": cell(0.05, 0.01)}},
    }
    losses = {"untied": (4.521, 0.03), "tied": (4.533, 0.04), "x5": (4.694, 0.05)}
    shares = {
        "untied": ((0.744, 0.031), (0.642, 0.008)),
        "tied": ((0.766, 0.041), (0.616, 0.006)),
        "x5": ((0.713, 0.022), (0.666, 0.004)),
    }
    differs = {"untied": {}, "tied": {"tying.scheme": ["untied", "tied"]}}
    differs["x5"] = differs["tied"] | {"tying.input_grad_scale": [1.0, 5.0], "data.order": ["met", "seen"]}
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
        "runs": [{"arm": arm, "steps": 300} for arm in losses],
        "between_seeds": {},
        "reproducible_share": {
            "tied": {"shared": {"vs_output": span(0.923, 0.01), "vs_input": span(0.583, 0.06)}},
            "x5": {"shared": {"vs_output": span(0.801, 0.03), "vs_input": span(0.719, 0.05)}},
        },
        "arms": {
            arm: {
                "alignment": near[arm],
                "eval_loss": span(*loss),
                "early_output_share": span(*shares[arm][0]),
                "overall_output_share": span(*shares[arm][1]),
                "differs_from_reference": differs[arm],
            }
            for arm, loss in losses.items()
        },
        "statements": {names[key]: value for key, value in made.items() if value},
    }


TWIN = "with token frequency controlled, the tied table lies nearer to its untied twin’s"
MAIN = {
    "holds": (
        statement(0.154, 0.031, "holds"),
        f"Yes: {TWIN} output table than to the input table, by 0.154{N}±{N}0.031.",
    ),
    "near the edge": (
        statement(0.154, 0.031, "holds", near_edge=True),
        f"Yes: {TWIN} output table than to the input table, by 0.154{N}±{N}0.031. This verdict is near the edge.",
    ),
    "the opposite": (
        statement(-0.154, 0.031, "the opposite"),
        f"No, the opposite: {TWIN} input table than to the output table, by 0.154{N}±{N}0.031.",
    ),
    "undecided": (
        statement(-0.154, 0.231, "undecided", near_edge=True),
        "Undecided: with token frequency controlled, the tied table’s nearness to its untied twin’s output table less "
        f"that to the input table is −0.154{N}±{N}0.231, and the interval holds 0. This verdict is near the edge.",
    ),
    "one seed": (
        statement(0.154, None, "undecided"),
        f"One seed, so only a hint: {TWIN} output table than to the input table, by 0.154.",
    ),
    "not measured": (None, "Not measured: there is no pair of a tied and an untied run with the same seed."),
}


@pytest.mark.parametrize("case", MAIN)
def test_the_verdict_is_one_sentence(case: str) -> None:
    nearer, sentence = MAIN[case]
    assert sentences.verdict(small_results(nearer=nearer)) == sentence
    assert sentences.answer(small_results(nearer=nearer))[0] == sentence


WITH = "With x5 (tying.input_grad_scale 5, data.order seen) instead of tied,"


def test_what_an_intervention_does_and_costs() -> None:
    assert sentences.answer(small_results())[1:] == [
        f"{WITH} nearness to the output table falls by 0.095{N}±{N}0.023. Nearness to the input table rises by "
        f"0.022{N}±{N}0.013. The held-out loss rises by 0.161{N}±{N}0.017 nats a token.",
        f"The output role supplies 76.6{N}±{N}4.1{N}% of the tied table’s gradient (sum of both norms) up to step 50. "
        f"Over the whole run it supplies 61.6{N}±{N}0.6{N}%.",
    ]
    other = small_results(
        lowers=statement(-0.04, 0.01, "the opposite", near_edge=True),
        raises=statement(0.02, 0.03, "undecided"),
        costs=statement(-0.07, 0.02, "the opposite"),
    )
    assert sentences.against_baseline(other) == [
        f"{WITH} nearness to the output table rises, near the edge, by 0.040{N}±{N}0.010. Nearness to the input table "
        f"changes by +0.020{N}±{N}0.030, undecided. The held-out loss falls by 0.070{N}±{N}0.020 nats a token."
    ]
    lone = small_results(
        lowers=statement(0.1, None, "undecided"),
        raises=statement(-0.2, None, "undecided"),
        costs=statement(0.3, None, "undecided"),
    )
    assert sentences.against_baseline(lone) == [
        f"{WITH} nearness to the output table falls by 0.100 (one seed). Nearness to the input table falls by 0.200 "
        "(one seed). The held-out loss rises by 0.300 nats a token (one seed)."
    ]
    edge = small_results(lowers=statement(0.01, 0.02, "undecided", near_edge=True), raises=None, costs=None)
    assert sentences.against_baseline(edge) == [
        f"{WITH} nearness to the output table changes by −0.010{N}±{N}0.020, near the edge, undecided."
    ]
    assert sentences.against_baseline(small_results(lowers=None, raises=None, costs=None)) == []


@pytest.mark.parametrize(
    ("nearer", "sentence"),
    [
        (
            statement(0.034, 0.021, "holds", near_edge=True),
            f"the x5 table lies nearer to the output table than to the input table, by 0.034{N}±{N}0.021. "
            "This verdict is near the edge.",
        ),
        (
            statement(-0.034, 0.021, "the opposite"),
            f"the x5 table lies nearer to the input table than to the output table, by 0.034{N}±{N}0.021.",
        ),
        (
            statement(-0.034, 0.051, "undecided"),
            f"the x5 table’s nearness to the output table less that to the input table is −0.034{N}±{N}0.051, "
            "undecided.",
        ),
        (
            statement(0.034, None, "undecided"),
            "the x5 table lies nearer to the output table than to the input table, by 0.034 (one seed).",
        ),
    ],
)
def test_where_the_table_of_an_intervention_lies_is_said(nearer: dict[str, Any], sentence: str) -> None:
    paragraph = sentences.against_baseline(small_results(lowers=None, raises=None, x5_nearer=nearer))
    assert paragraph == [f"{WITH} {sentence} The held-out loss rises by 0.161{N}±{N}0.017 nats a token."]


def test_the_loss_of_the_reference_is_no_intervention() -> None:
    untied = statement(-0.083, 0.076, "the opposite")
    assert sentences.against_baseline(small_results(untied_costs=untied)) == sentences.against_baseline(small_results())


REPEATS = "Between two untied runs of different seeds, the {} tables score {} and the {} tables {}{}."


@pytest.mark.parametrize(
    ("output", "input_", "said"),
    [
        ((0.263, 0.265, 0.261), (0.144, 0.148, 0.143), ": training repeats more of the output table"),
        ((0.101, 0.103, 0.102), (0.202, 0.207, 0.203), ": training repeats more of the input table"),
        ((0.2, 0.3, 0.1), (0.19, 0.21, 0.17), ": which of them training repeats more of is undecided"),
        ((0.2, None, None), (0.1, None, None), ""),
    ],
)
def test_how_much_of_each_table_training_repeats(
    output: tuple[float | None, ...], input_: tuple[float | None, ...], said: str
) -> None:
    """By pairs of three seeds, whose margin has the interval of a jackknife over seeds."""

    def mean(scores: tuple[float | None, ...]) -> float:
        known = [score for score in scores if score is not None]
        return sum(known) / len(known)

    def cell(scores: tuple[float | None, ...]) -> dict[str, Any]:
        pairs = dict(zip(("1 to 0", "2 to 0", "2 to 1"), scores, strict=True))
        return {"orthogonal": {"beyond_frequency": span(mean(scores)), "by_seed": pairs}}

    repeated = {"output": {"vs_output": cell(output)}, "input": {"vs_input": cell(input_)}}
    scores = sorted([(mean(output), "output"), (mean(input_), "input")], reverse=True)
    (more, first), (less, second) = scores
    sentence = REPEATS.format(first, f"{more:.3f}", second, f"{less:.3f}", said)
    results = small_results() | {"between_seeds": {"untied": repeated}}
    assert sentences.what_repeats(results) == [sentence]
    assert sentences.answer(results)[2] == sentence
    assert sentences.what_repeats(small_results()) == []
    assert sentences.what_repeats(small_results() | {"between_seeds": {"untied": {"output": {}}}}) == []


def test_a_run_that_is_no_longer_than_its_start_has_one_share() -> None:
    results = small_results()
    results["runs"] = [run | {"steps": 40} for run in results["runs"]]
    assert sentences.gradient_share(results) == [
        f"The output role supplies 61.6{N}±{N}0.6{N}% of the tied table’s gradient (sum of both norms) over the whole "
        "run."
    ]


def test_what_is_shared_of_what_repeats_is_said_where_it_is_measured() -> None:
    both = small_results(shares=statement(0.34, 0.07, "holds"), x5_shares=statement(0.082, 0.09, "undecided"))
    said = [
        f"Of what training repeats over seeds, the tied table shares 0.92 with the output table, 0.34{N}±{N}0.07 more "
        "than with the input table.",
        f"Of what training repeats over seeds, the x5 table shares 0.80 with the output table, 0.08{N}±{N}0.09 more "
        "than with the input table, undecided.",
    ]
    assert sentences.what_repeats(both) == said
    assert sentences.answer(both)[2:4] == said
    edge = small_results(shares=statement(-0.34, 0.3, "the opposite", near_edge=True))
    assert sentences.what_repeats(edge) == [
        f"Of what training repeats over seeds, the tied table shares 0.92 with the output table, 0.34{N}±{N}0.30 less "
        "than with the input table. This verdict is near the edge."
    ]
    assert sentences.what_repeats(small_results()) == []
    assert sentences.what_repeats(small_results(shares=statement(0.3, None, "undecided"))) == []


def test_the_first_table_has_losses_their_cost_nearness_and_who_supplies_the_gradient() -> None:
    assert sentences.arm_columns(small_results()) == {
        "arm": "Arm",
        "loss": "Held-out loss, nats a token",
        "cost": "Loss against tied",
        "output": "Nearness to untied’s output table",
        "input": "Nearness to untied’s input table",
        "early": "Output share of gradient, to step 50",
    }
    untied, tied, x5 = sentences.arm_rows(small_results())
    assert untied == {
        "arm": "untied",
        "loss": f"4.521{N}±{N}0.030",
        "cost": "–",
        "output": "–",
        "input": "–",
        "early": f"74.4{N}±{N}3.1{N}%",
    }
    assert tied == {
        "arm": "tied",
        "loss": f"4.533{N}±{N}0.040",
        "cost": "–",
        "output": f"0.283{N}±{N}0.006",
        "input": f"0.129{N}±{N}0.025",
        "early": f"76.6{N}±{N}4.1{N}%",
    }
    assert x5 == {
        "arm": "x5",
        "loss": f"4.694{N}±{N}0.050",
        "cost": f"+0.161{N}±{N}0.017",
        "output": f"0.188{N}±{N}0.011",
        "input": f"0.151{N}±{N}0.019",
        "early": f"71.3{N}±{N}2.2{N}%",
    }


def with_hurdles(bigram: dict[str, Any], trigram: dict[str, Any] | None = None) -> dict[str, Any]:
    """Results whose arms are so many bits (mean, half) above the bigram and the trigram: by default 0.5 more."""
    results = small_results()
    beyond = trigram or {arm: (mean + 0.5, half) for arm, (mean, half) in bigram.items()}
    for i, (arm, summary) in enumerate(results["arms"].items()):
        nothing = {"mean": None, "low": None, "high": None, "n": 0, "confidence": 0.95}
        summary["hurdles"] = {
            "bits_per_byte": span(1.71 + i, 0.02 + i / 100) if arm in bigram else nothing,
            "less_bigram": span(*bigram[arm]) if arm in bigram else nothing,
            "less_trigram": span(*beyond[arm]) if arm in bigram else nothing,
        }
    return results


MEAN, ONE = "On the mean over seeds,", "In one seed,"
BESIDE_NGRAMS = {
    "all below, the trigram lower": (
        with_hurdles({"untied": (-0.4, 0.04), "tied": (-0.31, 0.02), "x5": (-0.1, 0.05)}, {
            "untied": (0.04, 0.04), "tied": (0.12, 0.03), "x5": (0.3, 0.05)}),
        f"{MEAN} every arm’s loss is below that of a bigram of the text that it was shown, tied’s by "
        f"0.31{N}±{N}0.02 bits a token. The trigram’s is 0.12{N}±{N}0.03 bits lower than tied’s.",
    ),
    "all below, the trigram higher": (
        with_hurdles({"untied": (-0.4, 0.04), "tied": (-0.31, 0.02), "x5": (-0.3, 0.05)}, {
            "untied": (-0.04, 0.04), "tied": (-0.12, 0.03), "x5": (0.3, 0.05)}),
        f"{MEAN} every arm’s loss is below that of a bigram of the text that it was shown, tied’s by "
        f"0.31{N}±{N}0.02 bits a token. The trigram’s is 0.12{N}±{N}0.03 bits higher than tied’s.",
    ),
    "all above": (
        with_hurdles({"untied": (0.4, 0.04), "tied": (0.32, 0.02), "x5": (0.1, 0.05)}),
        f"{MEAN} every arm’s loss is above that of a bigram of the text that it was shown, tied’s by "
        f"0.32{N}±{N}0.02 bits a token. The trigram’s is 0.82{N}±{N}0.02 bits lower than tied’s.",
    ),
    "one above": (
        with_hurdles({"untied": (-0.4, 0.04), "tied": (-0.31, 0.02), "x5": (0.1, 0.05)}),
        f"{MEAN} the loss of x5 is above that of a bigram of the text that it was shown, and the loss of untied and "
        f"tied is below it, tied’s by 0.31{N}±{N}0.02 bits a token. "
        f"The trigram’s is 0.19{N}±{N}0.02 bits lower than tied’s.",
    ),
    "the baseline above": (
        with_hurdles({"untied": (-0.4, 0.04), "tied": (0.31, 0.02), "x5": (-0.1, 0.05)}),
        f"{MEAN} the loss of untied and x5 is below that of a bigram of the text that they were shown, and the loss "
        f"of tied is above it, by 0.31{N}±{N}0.02 bits a token. "
        f"The trigram’s is 0.81{N}±{N}0.02 bits lower than tied’s.",
    ),
    "the baseline below": (
        with_hurdles({"untied": (0.4, 0.04), "tied": (-0.31, 0.02), "x5": (0.1, 0.05)}),
        f"{MEAN} the loss of untied and x5 is above that of a bigram of the text that they were shown, and the loss "
        f"of tied is below it, by 0.31{N}±{N}0.02 bits a token. "
        f"The trigram’s is 0.19{N}±{N}0.02 bits lower than tied’s.",
    ),
    "an interval that holds 0": (
        with_hurdles({"untied": (-0.4, 0.04), "tied": (-0.01, 0.02), "x5": (-0.1, 0.05)}, {
            "untied": (0.04, 0.04), "tied": (0.02, 0.03), "x5": (0.3, 0.05)}),
        f"{MEAN} every arm’s loss is below that of a bigram of the text that it was shown, tied’s by "
        f"0.01{N}±{N}0.02 bits a token (the interval holds 0). "
        f"The trigram’s is 0.02{N}±{N}0.03 bits (the interval holds 0) lower than tied’s.",
    ),
    "one seed": (
        with_hurdles({"untied": (-0.4, None), "tied": (-0.31, None), "x5": (-0.1, None)}),
        f"{ONE} every arm’s loss is below that of a bigram of the text that it was shown, tied’s by 0.31 bits a token. "
        "The trigram’s is 0.19 bits lower than tied’s.",
    ),
    "the baseline not measured": (
        with_hurdles({"untied": (-0.4, 0.04), "x5": (0.1, 0.05)}),
        f"{MEAN} the loss of x5 is above that of a bigram of the text that it was shown, and the loss of untied is "
        "below it.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BESIDE_NGRAMS)
def test_on_which_side_of_a_bigram_the_arms_lie(case: str) -> None:
    results, sentence = BESIDE_NGRAMS[case]
    assert sentences.against_ngrams(results) == [sentence]
    said = sentences.answer(results)
    assert said.index(sentence) == len(sentences.against_baseline(results)) + 1
    numbers_of = [re.findall(r"\d+\.\d+", part) for part in sentence.split(". ")]
    assert max(map(len, numbers_of)) <= 3


def test_nothing_is_said_of_n_grams_that_nobody_measured() -> None:
    for results in (small_results(), with_hurdles({})):
        assert sentences.against_ngrams(results) == sentences.early_training(results) == []
        assert sentences.early_mark(results) == sentences.what_ngrams_are(results) == ""
        assert list(sentences.arm_columns(results)) == list(sentences.arm_rows(results)[0])
        assert "less_bigram" not in sentences.arm_columns(results)


ABOUT = "What the report says of layers and calibration is about learning a bigram."


@pytest.mark.parametrize(
    ("bigram", "warning"),
    [
        (
            {"untied": (-0.4, 0.04), "tied": (0.12, 0.2), "x5": (-0.1, 0.05)},
            "Early training: tied is 0.12 bits a token worse than a bigram of the text that it was shown.",
        ),
        (
            {"untied": (-0.4, 0.04), "tied": (0.12, 0.2), "x5": (0.35, 0.05)},
            "Early training: tied and x5 are up to 0.35 bits a token worse than a bigram of the text that they were "
            "shown.",
        ),
        (
            {"untied": (0.06, None), "tied": (0.47, None), "x5": (0.35, None)},
            "Early training: untied, tied and x5 are up to 0.47 bits a token worse than a bigram of the text that they "
            "were shown.",
        ),
        ({"untied": (-0.4, 0.04), "tied": (-0.01, 0.2), "x5": (0.0, 0.0)}, None),
    ],
)
def test_early_training_is_said_while_an_arm_is_worse_than_a_bigram(
    bigram: dict[str, Any], warning: str | None
) -> None:
    results = with_hurdles(bigram)
    assert sentences.early_training(results) == ([f"{warning} {ABOUT}"] if warning else [])
    assert sentences.early_mark(results) == (" (early training)" if warning else "")


def test_statements_on_layers_and_calibration_are_marked_while_training_is_early() -> None:
    names = ("lens_farther_at_0", "lens_worse_at_12", "overconfident_on_frequent", "underpredicts_rare")
    others = ("tied_nearer_output", "tied_lens_costs_loss", "x5_underpredicts_rare", "tied_frequent_central")
    others += ("tied_lens_worse_at_1_costs_loss",)  # of an arm that is called so
    for mean, mark in [(0.1, "early training"), (-0.1, "")]:
        results = with_hurdles({"untied": (-0.4, 0.04), "tied": (-0.3, 0.02), "x5": (mean, 0.05)})
        made = [*(f"tied_{name}" for name in names), *others]
        results["statements"] = {name: statement(0.1, 0.01, "holds") | {"claim": name} for name in made}
        marks = {row["claim"]: row["early"] for row in sentences.verdicts(results)}
        assert marks == {name: "" if name in others else mark for name in made}


def test_the_first_table_has_bits_a_byte_and_what_n_grams_would_cost_less() -> None:
    results = with_hurdles({"untied": (-0.412, 0.04), "x5": (0.1, 0.05)})
    assert list(sentences.arm_columns(results).items())[1:6] == [
        ("loss", "Held-out loss, nats a token"),
        ("bits_per_byte", "Bits a byte"),
        ("less_bigram", "Less the bigram’s, bits a token"),
        ("less_trigram", "Less the trigram’s, bits a token"),
        ("cost", "Loss against tied"),
    ]
    cells = [list(row.values())[1:5] for row in sentences.arm_rows(results)]
    assert cells == [
        [f"4.521{N}±{N}0.030", f"1.710{N}±{N}0.020", f"−0.412{N}±{N}0.040", f"+0.088{N}±{N}0.040"],
        [f"4.533{N}±{N}0.040", "–", "–", "–"],
        [f"4.694{N}±{N}0.050", f"3.710{N}±{N}0.040", f"+0.100{N}±{N}0.050", f"+0.600{N}±{N}0.050"],
    ]
    assert list(sentences.arm_columns(results)) == list(sentences.arm_rows(results)[1])
    assert sentences.what_ngrams_are(results) == (
        "Bigram and trigram count the text that each run was shown, and predict the held-out tokens that the run does."
    )
    for summary in results["arms"].values():
        summary["hurdles"]["bits_per_byte"] = span(1.7) | {"mean": None}
    assert "bits_per_byte" not in sentences.arm_columns(results), "no tokenizer, no bytes"
    assert "less_bigram" in sentences.arm_columns(results)


@pytest.mark.parametrize(
    ("costs", "cell"),
    [
        (statement(-0.07, 0.02, "the opposite"), f"−0.070{N}±{N}0.020"),
        (statement(0.02, 0.03, "undecided"), f"+0.020{N}±{N}0.030, undecided"),
        (statement(0.02, 0.03, "undecided", near_edge=True), f"+0.020{N}±{N}0.030, undecided, near the edge"),
        (statement(0.07, 0.03, "holds", near_edge=True), f"+0.070{N}±{N}0.030, near the edge"),
        (statement(0.3, None, "undecided"), "+0.300"),
    ],
)
def test_a_cost_says_when_it_is_undecided_or_near_the_edge(costs: dict[str, Any], cell: str) -> None:
    assert sentences.arm_rows(small_results(costs=costs))[2]["cost"] == cell


def test_what_the_uncertainties_beside_the_answer_are() -> None:
    assert sentences.certainty(small_results()) == (
        f"± is half of a 95{N}% interval over 5 seeds; those of the verdict and of differences between arms are wider, "
        "because 4 statements are tested together."
    )
    alone = {name: statement(0.1, None, "undecided") for name in ("nearer", "lowers", "raises", "costs")}
    assert sentences.certainty(small_results(**alone)) == "One seed: there is no interval, and nothing is decided."


def test_how_many_statements_and_what_chance_alone_gives() -> None:
    assert sentences.testing(small_results()) == (
        "4 statements are tested together by Holm’s method: if every margin were 0, chance alone would decide any of "
        f"them in at most 5{N}% of studies. Each tested alone at 5{N}%, chance would decide 0.2 of 4."
    )
    assert sentences.basis(small_results()) == (
        "Intervals are Student-t intervals over 5 seeds, paired by seed where two runs are compared. Those of "
        f"statements have the level at which Holm’s method tests each; all others have 95{N}%."
    )
    alone = {name: statement(0.1, None, "undecided") for name in ("nearer", "lowers", "raises", "costs")}
    assert sentences.testing(small_results(**alone)) == "One seed: no statement can be tested."
    assert sentences.basis(small_results(**alone)) == "One seed: no interval can be given, and nothing is decided."


def test_what_near_the_edge_means_is_said_where_it_occurs() -> None:
    assert sentences.near_edge(small_results()) == ""
    assert EDGE == 2
    assert sentences.near_edge(small_results(costs=statement(0.3, 0.4, "undecided", near_edge=True))) == (
        "Near the edge, p is within a factor of 2 of the level: the same study run again could say otherwise."
    )


def test_every_verdict_stands_beside_its_claim() -> None:
    shown = sentences.verdicts(
        small_results(
            lowers=statement(-0.04, 0.01, "the opposite", near_edge=True), costs=statement(0.3, 0.4, "undecided")
        )
    )
    assert shown == [
        {"claim": "claim of 0.154", "verdict": "holds", "edge": "", "early": "", "margin": f"0.154{N}±{N}0.031"},
        {
            "claim": "claim of -0.04",
            "verdict": "the opposite",
            "edge": "near the edge",
            "early": "",
            "margin": f"−0.040{N}±{N}0.010",
        },
        {"claim": "claim of 0.022", "verdict": "holds", "edge": "", "early": "", "margin": f"0.022{N}±{N}0.013"},
        {"claim": "claim of 0.3", "verdict": "undecided", "edge": "", "early": "", "margin": f"0.300{N}±{N}0.400"},
    ]
