"""What is said of held-out losses, sweeps, missing runs and costs: exact strings from distinct numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats
from test_sentences import N, small_results, span, statement

from tiedjax.analysis.basis.statistics import Interval, detectable, interval
from tiedjax.analysis.study import losses


def results(**statements: Any) -> dict[str, Any]:
    """Small results with these statements, and an arm of equal parameters."""
    study = {"equal_parameters": {"wide": "mlp"}, "config": {"data": {}}}
    made: dict[str, Any] = small_results() | {"study": study, "runs": []}
    made["statements"] = made["statements"] | statements
    return made


# Five seeds at level 0.01: a half width of h has a standard error of h / 4.604, and 80 % power is at 5.88 of them.


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            statement(-0.083, 0.076, "the opposite"),
            f"At equal width untied predicts better than tied: its held-out loss is 0.083{N}±{N}0.076 nats a token "
            "lower. These 5 seeds show a difference of 0.097 in four studies of five.",
        ),
        (
            statement(0.091, 0.019, "holds", near_edge=True),
            f"At equal width tied predicts better than untied: its held-out loss is 0.091{N}±{N}0.019 nats a token "
            "lower. These 5 seeds show a difference of 0.024 in four studies of five. This verdict is near the edge.",
        ),
        (
            statement(-0.021, 0.043, "undecided"),
            "At equal width it is undecided which predicts better: the held-out loss of untied less that of tied is "
            f"−0.021{N}±{N}0.043 nats a token. These 5 seeds show a difference of 0.055 in four studies of five.",
        ),
        (
            statement(-0.021, None, "undecided"),
            "At equal width the held-out loss of untied is 0.021 nats a token below that of tied (one seed).",
        ),
        (
            statement(0.022, None, "undecided"),
            "At equal width the held-out loss of tied is 0.022 nats a token below that of untied (one seed).",
        ),
    ],
)
def test_who_predicts_better_is_the_first_thing_said(said: dict[str, Any], sentence: str) -> None:
    assert losses.verdicts(results(untied_costs_loss=said)) == [sentence]


def test_a_difference_is_given_in_bits_a_byte_with_its_sign() -> None:
    """2.5 bits a byte are 5 nats a token here: half as many."""
    known = results(untied_costs_loss=statement(-0.022, 0.043, "undecided"))
    known["arms"] = {"tied": {"eval_loss": span(5.0), "hurdles": {"bits_per_byte": span(2.5)}}}
    assert f"is −0.022{N}±{N}0.043 nats a token (−0.011 bits a byte). " in losses.verdicts(known)[0]
    known["statements"]["untied_costs_loss"] = statement(-0.082, 0.043, "the opposite")
    assert f"is 0.082{N}±{N}0.043 nats a token (0.041 bits a byte) lower. " in losses.verdicts(known)[0]


def test_at_equal_parameters_the_arm_is_held_against_the_reference() -> None:
    first, second = losses.verdicts(
        results(
            untied_costs_loss=statement(-0.083, 0.076, "the opposite"),
            wide_against_untied=statement(-0.052, 0.013, "the opposite"),
        )
    )
    assert first.startswith("At equal width untied predicts better than tied")
    assert second == (
        f"At equal parameters wide predicts better than untied: its held-out loss is 0.052{N}±{N}0.013 nats a token "
        "lower. These 5 seeds show a difference of 0.017 in four studies of five."
    )


@pytest.mark.parametrize(
    ("parameters", "flops", "where"),
    [({}, ["wide"], "FLOPs"), ({"wide": "mlp"}, ["wide"], "parameters and FLOPs"), ({"wide": "mlp"}, [], "parameters")],
)
def test_what_an_arm_has_as_much_of_is_said(parameters: dict[str, str], flops: list[str], where: str) -> None:
    known = results(wide_against_untied=statement(-0.052, 0.013, "the opposite"))
    known["study"] |= {"equal_parameters": parameters, "equal_flops": flops}
    (said,) = losses.verdicts(known)
    assert said.startswith(f"At equal {where} wide predicts better than untied: ")


@pytest.mark.parametrize(("tokens", "where"), [(300, "width and FLOPs"), (200, "width")])
def test_equal_width_is_equal_flops_where_both_read_as_many_tokens(tokens: int, where: str) -> None:
    known = results(untied_costs_loss=statement(-0.083, 0.076, "the opposite"))
    known["runs"] = [{"arm": arm, "flops_per_token": 16, "tokens": n} for arm, n in [("tied", 300), ("untied", tokens)]]
    (said,) = losses.verdicts(known)
    assert said.startswith(f"At equal {where} untied predicts better than tied: ")
    flops = {300: "1.00", 200: "0.67"}[tokens]
    assert said.endswith(f" It takes {flops} times the FLOPs of tied to train untied.")
    del known["runs"][0]["flops_per_token"]
    assert losses.verdicts(known)[0].endswith(" in four studies of five.")


def test_without_a_pair_nothing_is_said() -> None:
    assert losses.verdicts(results()) == []


@pytest.mark.parametrize(("n", "confidence"), [(3, 0.95), (5, 0.95), (5, 0.99), (12, 0.995)])
def test_a_detectable_difference_is_found_in_four_studies_of_five(n: int, confidence: float) -> None:
    """By simulation: studies whose true difference is the detectable one for their true spread."""
    sigma, rng = 0.3, np.random.default_rng(n)
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * sigma / np.sqrt(n)
    difference = detectable(Interval(0.0, -half, half, n, confidence), 0.8)
    p = stats.ttest_1samp(rng.normal(difference, sigma, (40_000, n)), 0, axis=1).pvalue
    assert (p < 1 - confidence).mean() == pytest.approx(0.8, abs=0.01)
    assert detectable(interval([1.0, 2.0, 4.0]), 0.9) > detectable(interval([1.0, 2.0, 4.0]), 0.8)


def choice(best: int, at_edge: list[str]) -> dict[str, Any]:
    """A sweep of four points over two options."""
    values = [{"a.rate": rate, "b.kind": kind} for rate in (0.02, 0.04) for kind in ("x", "y")]
    tried = [{"values": each, "losses": {"7": 4.5}, "mean": 4.5} for each in values]
    return {"tried": tried, "best": best, "at_edge": at_edge}


def test_what_was_swept_is_said_of_every_arm() -> None:
    assert losses.sweeps({}) == [
        "No rate was swept; with each arm at its own best rates the comparison may come out otherwise."
    ]
    swept = {"tied": choice(1, []), "untied": choice(2, ["a.rate"])}
    assert losses.sweeps({"sweep": swept, "arms": {"untied": {}, "tied": {}, "x5": {}}}) == [
        "tied, untied: each has the options that were best for it on 1 other seed and on the held-out windows with "
        "even numbers; all losses here are of the odd ones.",
        "x5: not swept.",
        "Of 4 points tied is best with a.rate 0.02 and b.kind y.",
        "Of 4 points untied is best with a.rate 0.04 and b.kind x: a.rate lies at the edge of what was tried, so that "
        "a better one may lie beyond.",
    ]


def test_missing_runs_are_named() -> None:
    assert losses.missing({"runs": [{}, {}], "missing": []}) == ""
    assert losses.missing({"runs": [{}, {}], "missing": ["tied-1", "x5-1"]}) == (
        "Not finished: 2 of 4 runs are trained. Missing are tied-1, x5-1; the same command trains "
        "them without --time-limit and --analyse-only."
    )


def costs(second: float | None) -> dict[str, Any]:
    """Results of two arms with two runs each, and a loss on a second text."""

    def run(arm: str, *numbers: float | None) -> dict[str, Any]:
        names = ("parameters", "flops_per_token", "training_seconds", "tokens")
        return {"arm": arm, **dict(zip(names, numbers, strict=True))}

    return {
        "headline": {"arm": "tied"},
        "arms": {
            "untied": {"second_eval_loss": span(second, 0.041), "second_source": "text:b"},
            "tied": {"second_eval_loss": span(None), "second_source": None},
            "other": {"second_eval_loss": span(None), "second_source": None},
        },
        "runs": [
            run("untied", 3_000_000, 20, 8.0, 300),
            run("untied", 3_000_000, 20, 10.0, 300),
            run("tied", 2_000_000, 16, 9.0, 300),
            run("tied", 2_000_000, 16, 11.0, 300),
            run("other", 2_500_000, 24, None, 250),
        ],
    }


def test_what_an_arm_costs_stands_beside_the_baseline() -> None:
    assert losses.cost_columns(costs(None)) == [
        "Arm",
        "Parameters",
        "FLOPs, times tied’s",
        "Training time, times tied’s",
    ]
    assert losses.cost_rows(costs(None)) == [
        ["untied", "3,000,000", "1.25", "0.90"],
        ["tied", "2,000,000", "1.00", "1.00"],
        ["other", "2,500,000", "1.25", "–"],
    ]
    assert losses.cost_columns(costs(7.1))[-1] == "Loss on text:b, nats a token"
    two = costs(7.1)
    two["arms"]["tied"]["second_source"] = "text:c"
    assert losses.cost_columns(two)[-1] == "Loss on the second text, nats a token"
    assert [row[-1] for row in losses.cost_rows(costs(7.1))] == [f"7.100{N}±{N}0.041", "–", "–"]
