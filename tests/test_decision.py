"""What the answer page says: verdicts word for word, what limits them, the lines to copy, and the numbers behind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from small_study import complete
from test_sentences import N, span, statement

from tiedjax.analysis.decision import page, rows, verdicts
from tiedjax.analysis.decision.verdicts import Comparison, verdict_of
from tiedjax.analysis.instruments.gradients.gradients import GradientFlow
from tiedjax.errors import UserError

ARMS = {"tied": "tied", "untied": "untied", "until": "until-200", "wide": "tied-wide", "in_time": "untied-in-time"}
WIDTH = Comparison("at equal width and FLOPs", "tied", "untied", "until-200", says_when=True)
PARAMETERS = Comparison("at equal parameters", "tied-wide", "untied", "until-200")
TIME = Comparison("in equal time", "tied", "untied-in-time", None)

BETTER, WORSE, OPEN = "the opposite", "holds", "undecided"


def said(compared: Comparison, untied: Any, until: Any = None, between: Any = None) -> tuple[str, str]:
    """Choice and sentence, where these are the statements on what is compared."""
    stated = {f"{compared.untied} less {compared.tied}": untied}
    if compared.until:
        stated |= {f"{compared.until} less {compared.tied}": until, f"{compared.until} less untied": between}
    found = verdict_of(compared, stated, 200)
    return found.choice, found.sentence


@pytest.mark.parametrize(
    ("compared", "margins", "expected"),
    [
        (
            WIDTH,
            [statement(0.083, 0.021, WORSE), statement(0.052, 0.013, WORSE), statement(-0.031, 0.04, OPEN)],
            (
                "tie",
                f"At equal width and FLOPs: tie. The held-out loss of tied lies 0.083{N}±{N}0.021 below that of untied "
                f"and 0.052{N}±{N}0.013 below that of until-200, in nats a token.",
            ),
        ),
        (
            PARAMETERS,
            [statement(-0.083, 0.021, BETTER), statement(-0.052, 0.013, BETTER), statement(0.031, 0.04, OPEN)],
            (
                "untie",
                f"At equal parameters: untie. The held-out loss of untied lies 0.083{N}±{N}0.021 nats a token below "
                "that of tied-wide.",
            ),
        ),
        (
            WIDTH,
            [statement(-0.083, 0.021, BETTER), statement(-0.052, 0.013, BETTER), statement(0.031, 0.04, OPEN)],
            (
                "untie",
                f"At equal width and FLOPs: untie. The held-out loss of untied lies 0.083{N}±{N}0.021 nats a token "
                "below that of tied. Whether to tie until step 200 first is undecided: it changes that loss by "
                f"+0.031{N}±{N}0.040.",
            ),
        ),
        (
            WIDTH,
            [  # what is near the edge does not decide it
                statement(-0.083, 0.021, BETTER),
                statement(-0.052, 0.013, BETTER, near_edge=True),
                statement(0.031, 0.01, WORSE),
            ],
            (
                "untie",
                f"At equal width and FLOPs: untie. The held-out loss of untied lies 0.083{N}±{N}0.021 nats a token "
                f"below that of tied. Tying until step 200 first gives up 0.031{N}±{N}0.010 of this gain.",
            ),
        ),
        (
            WIDTH,
            [statement(-0.052, 0.013, BETTER), statement(-0.083, 0.021, BETTER), statement(-0.031, 0.01, BETTER)],
            (
                "until",
                "At equal width and FLOPs: tie until step 200, then untie. The held-out loss of until-200 lies "
                f"0.083{N}±{N}0.021 nats a token below that of tied and 0.031{N}±{N}0.010 below that of untied.",
            ),
        ),
        (
            WIDTH,
            [statement(-0.022, 0.033, OPEN), statement(-0.053, 0.021, BETTER), statement(-0.031, 0.04, OPEN)],
            (
                "until",
                "At equal width and FLOPs: tie until step 200, then untie. The held-out loss of until-200 lies "
                f"0.053{N}±{N}0.021 nats a token below that of tied. Whether untied is better than tied is undecided: "
                f"its loss less that of tied is −0.022{N}±{N}0.033.",
            ),
        ),
        (
            WIDTH,
            [statement(-0.022, 0.043, OPEN), statement(0.011, 0.031, OPEN), statement(0.033, 0.04, OPEN)],
            (
                "undecided",
                "At equal width and FLOPs: undecided. Less the held-out loss of tied, that of untied is "
                f"−0.022{N}±{N}0.043 and that of until-200 is +0.011{N}±{N}0.031 nats a token. These 5 seeds show a "
                "difference of 0.055 in four studies of five.",
            ),
        ),
        (
            WIDTH,  # untied is worse, but for the other nothing is known: that does not say tie
            [statement(0.062, 0.043, WORSE), statement(0.011, 0.031, OPEN), statement(-0.05, 0.04, BETTER)],
            (
                "undecided",
                "At equal width and FLOPs: undecided. Less the held-out loss of tied, that of untied is "
                f"+0.062{N}±{N}0.043 and that of until-200 is +0.011{N}±{N}0.031 nats a token. These 5 seeds show a "
                "difference of 0.055 in four studies of five.",
            ),
        ),
        (
            TIME,
            [statement(-0.062, 0.02, BETTER, near_edge=True)],
            (
                "untie",
                f"In equal time: untie. The held-out loss of untied-in-time lies 0.062{N}±{N}0.020 nats a token below "
                "that of tied. This verdict is near the edge.",
            ),
        ),
        (
            TIME,
            [statement(0.062, 0.02, WORSE, near_edge=True)],
            (
                "tie",
                f"In equal time: tie. The held-out loss of tied lies 0.062{N}±{N}0.020 below that of untied-in-time, "
                "in nats a token. This verdict is near the edge.",
            ),
        ),
    ],
)
def test_the_verdict_of_each_comparison(compared: Comparison, margins: list[Any], expected: tuple[str, str]) -> None:
    assert said(compared, *margins) == expected


SPREAD = np.array([-0.002, -0.001, 0.0, 0.001, 0.002])
LOSSES = {  # per arm: mean, and the order of the spread over seeds
    "untied": (4.1, 1),
    "tied": (4.4, -1),
    "until-200": (4.2, 1),
    "tied-wide": (4.3, -1),
    "untied-in-time": (4.15, 1),
}


def rung(width: int, losses: dict[str, tuple[float, int]], at_edge: tuple[str, ...] = (), less: float = -0.5) -> Any:
    """results.json of a rung, as far as the page reads it; `less` bits a token than a bigram's loss."""
    schemes = {"untied": {"scheme": "untied"}, "untied-in-time": {"scheme": "untied"}, "until-200": {"untie_at": 200}}
    arms = {}
    for arm, (mean, _) in losses.items():
        hurdles = {"bits_per_byte": span(2.5), "less_bigram": span(less, 0.01), "less_trigram": span(0.2, 0.01)}
        arms[arm] = {"eval_loss": span(mean, 0.02), "hurdles": hurdles, "margin": {"shared": {"orthogonal": span(0.1)}}}
    return {
        "headline": {"arm": "tied", "reference": "untied", "fit": "orthogonal", "measure": "beyond_frequency"},
        "arms": arms,
        "runs": [
            {"arm": arm, "seed": seed, "eval_loss": mean + sign * SPREAD[seed], "parameters": 100 * width, "steps": 300}
            for arm, (mean, sign) in losses.items()
            for seed in range(5)
        ],
        "sweep": {arm: swept(i, ["optimizer.tables.learning_rate"] * (arm in at_edge)) for i, arm in enumerate(losses)},
        "gradients": [],
        "study": {"arms": {arm: {"tying": schemes.get(arm, {})} for arm in losses}, "config": config(width)},
        "statements": {},
    }


def swept(i: int, at_edge: list[str]) -> dict[str, Any]:
    """A sweep of one rate whose best is 0.02, 0.04 or 0.08 by turns."""
    tried = [{"values": {"optimizer.tables.learning_rate": rate}, "losses": {"7": 4.5}} for rate in (0.02, 0.04, 0.08)]
    return {"tried": tried, "best": i % 3, "at_edge": at_edge}


def config(width: int) -> dict[str, Any]:
    """The config of a rung, as far as the page reads it."""
    return {
        "model": {"layers": 4, "d_model": width, "vocab_size": 50, "seq_len": 64},
        "train": {"steps": 300},
        "data": {"batch_size": 16},
    }


def decision(**changes: Any) -> dict[str, Any]:
    """A decision of two widths, of which 64 is the own one."""
    few = {arm: LOSSES[arm] for arm in ("untied", "tied", "until-200")}
    return {
        "name": "quick",
        "arms": ARMS,
        "own": 64,
        "widths": [64, 48],
        "rungs": [64, 48],
        "seeds": 5,
        "until": 200,
        "config": config(64),
        "time": {"ratio": 1.0312, "steps": 291},
        "memory": {
            "tied": {"parameters": 2000, "weights": 8000, "optimizer": 16000, "account": 1000, "inference": 4000},
            "untied": {"parameters": 3000, "weights": 12000, "optimizer": 24000, "account": 0, "inference": 6000},
        },
        "results": {"64": rung(64, LOSSES), "48": rung(48, few | {"untied": (4.3, 1)})},
    } | changes


def test_every_difference_is_paired_and_all_are_tested_together() -> None:
    """Against scipy's paired t test; the widths share seeds, so that a trend is paired too."""
    stated = verdicts.statements(decision())
    assert set(stated) == {
        "untied less tied",
        "until-200 less tied",
        "untied less tied-wide",
        "until-200 less tied-wide",
        "untied-in-time less tied",
        "until-200 less untied",
        "untied less tied at 48",
        "untied less tied: trend",
        "until-200 less tied at 48",
        "until-200 less tied: trend",
    }
    a, b = (LOSSES[arm][0] + LOSSES[arm][1] * SPREAD for arm in ("untied", "tied"))
    test = stats.ttest_rel(a, b)
    found = stated["untied less tied"]
    assert found["margin"] == pytest.approx(-0.3)
    assert found["p"] == pytest.approx(test.pvalue)
    assert 0.05 / len(stated) <= found["level"] <= 0.05
    interval = test.confidence_interval(1 - found["level"])
    np.testing.assert_allclose(found["interval"], [interval.low, interval.high])
    trend = stats.ttest_rel(a - b, 4.3 + SPREAD - b)
    assert stated["untied less tied: trend"]["margin"] == pytest.approx(-0.2)
    assert stated["untied less tied: trend"]["p"] == pytest.approx(trend.pvalue, abs=1e-12)


def test_the_verdict_in_one_sentence() -> None:
    assert verdicts.headline(decision()) == (
        "Untie: it is better at equal width and FLOPs, at equal parameters and in equal time."
    )
    worse = LOSSES | {"untied": (4.6, 1), "until-200": (4.5, 1), "untied-in-time": (4.7, 1)}
    tie = decision(results={"64": rung(64, worse)})
    assert (
        verdicts.headline(tie) == "Tie: it is better at equal width and FLOPs, at equal parameters and in equal time."
    )
    mixed = decision(results={"64": rung(64, LOSSES | {"tied-wide": (4.0, -1), "untied-in-time": (4.3999, 1)})})
    assert verdicts.headline(mixed) == (
        "At equal width and FLOPs untie; at equal parameters tie; in equal time it is undecided."
    )
    best = decision(results={"64": rung(64, LOSSES | {"until-200": (4.0, 1)})})
    assert verdicts.headline(best) == (
        "At equal width and FLOPs tie until step 200, then untie; at equal parameters tie until step 200, then untie; "
        "in equal time untie."
    )
    alike = dict.fromkeys(LOSSES, (4.4, 1)) | {"tied": (4.4, -1), "tied-wide": (4.4, -1)}
    unknown = decision(results={"64": rung(64, alike)})
    assert verdicts.headline(unknown) == (
        "Whether to tie is undecided at equal width and FLOPs, at equal parameters and in equal time."
    )


def test_arms_that_are_not_trained_are_not_compared() -> None:
    without = {arm: loss for arm, loss in LOSSES.items() if arm != "untied-in-time"}
    found = verdicts.verdicts(decision(results={"64": rung(64, without)}))
    assert [verdict.where for verdict in found] == ["at equal width and FLOPs", "at equal parameters"]


def test_where_a_step_of_both_takes_as_long_equal_time_is_equal_steps() -> None:
    """Then no arm of other steps is trained, and the question is answered all the same."""
    without = {arm: loss for arm, loss in LOSSES.items() if arm != "untied-in-time"}
    time = {"ratio": 1.0003, "steps": 300}
    made = decision(time=time, results={"64": rung(64, without)})
    assert verdicts.headline(made) == (
        "Untie: it is better at equal width and FLOPs, at equal parameters and in equal time."
    )
    width, _, in_time = (verdict.sentence for verdict in verdicts.verdicts(made))
    assert in_time == width.replace("At equal width and FLOPs", "In equal time").partition(" Tying until")[0]
    assert set(verdicts.statements(made)) == set(verdicts.statements(decision(results={"64": rung(64, without)})))


def test_what_limits_the_verdict() -> None:
    assert verdicts.warnings(decision()) == []
    limited = decision(results={"64": rung(64, LOSSES, at_edge=("tied", "until-200"), less=0.25)}, widths=[64, 48, 96])
    assert verdicts.warnings(limited) == [
        "Early training: untied, tied, until-200, tied-wide and untied-in-time are up to 0.25 bits a token worse than "
        "a bigram of the text that they were shown. What the report says of layers and calibration is about learning "
        "a bigram.",
        "The best learning rate of tied and until-200 lies at the edge of what was tried: a better one may lie beyond, "
        "and change the verdict.",
        "Widths 48 and 96 are not trained yet; run the same command again to train them.",
    ]
    assert verdicts.missing(decision(results={"64": rung(64, LOSSES)})) == [
        "Width 48 is not trained yet; run the same command again to train it."
    ]


def test_how_far_the_verdict_carries() -> None:
    assert verdicts.carries(decision()) == [
        "The held-out loss of untied beside that of tied is lower at width 48 and 64.",
        verdicts.carries(decision())[1],
        "Nothing here speaks of widths beyond 64, of other text, or of longer training.",
    ]
    assert re.fullmatch(
        rf"From width 48 to 64 that difference changes by −0\.200{N}±{N}\d\.\d{{3}} nats a token\.",
        verdicts.carries(decision())[1],
    )
    other = decision()
    other["results"]["48"] = rung(48, {"untied": (4.4001, 1), "tied": (4.4, -1), "until-200": (4.2, 1)})
    assert verdicts.carries(other)[0] == (
        "The held-out loss of untied beside that of tied is lower at width 64, undecided at width 48."
    )
    other["results"]["48"] = rung(48, {"untied": (4.1, 1), "tied": (4.4, -1), "until-200": (4.2, 1)})
    assert verdicts.carries(other)[1].endswith("nats a token, undecided.")
    few = {arm: LOSSES[arm] for arm in ("untied", "tied", "until-200")}
    other["results"]["48"] = rung(48, few, at_edge=("untied", "tied"))
    assert verdicts.carries(other)[2] == (
        "At width 48 the best rate of untied and tied lies at the edge of what was tried."
    )
    assert verdicts.carries(decision(results={"64": rung(64, LOSSES)})) == [
        "One width, 64, was trained: how the verdict changes with size is not known."
    ]


def test_the_lines_to_copy_are_those_of_the_verdict() -> None:
    assert rows.config_lines(decision()) == [
        "tying:",
        "  scheme: untied",
        "optimizer:",
        "  tables:",
        "    learning_rate: 0.02",
    ]
    assert rows.reason(decision()) == "The verdict at equal width and FLOPs; the lines for quick.yaml:"
    assert rows.command(decision()) == (
        "tiedjax train quick.yaml --out runs/quick --tying.scheme untied --optimizer.tables.learning_rate 0.02"
    )
    best = decision(results={"64": rung(64, LOSSES | {"until-200": (4.0, 1)})})
    assert rows.config_lines(best) == [
        "tying:",
        "  scheme: tied",
        "  untie_at: 200",
        "optimizer:",
        "  tables:",
        "    learning_rate: 0.08",
    ]
    alike = dict.fromkeys(LOSSES, (4.4, 1)) | {"tied": (4.4, -1), "tied-wide": (4.4, -1)}
    unknown = decision(results={"64": rung(64, alike)})
    assert rows.config_lines(unknown)[1] == "  scheme: tied"
    assert rows.config_lines(unknown)[-1] == "    learning_rate: 0.04"
    assert rows.reason(unknown) == (
        "Undecided at equal width, so tie: it takes less memory, and no loss was shown; the lines for quick.yaml:"
    )


def test_rows_and_lines_beside_the_verdict() -> None:
    first, second, *_ = rows.arms(decision())
    assert first == {
        "arm": "untied",
        "rate": "0.02",
        "steps": "300",
        "parameters": "6,400",
        "loss": f"4.100{N}±{N}0.020",
        "less_tied": f"−0.300{N}±{N}0.004",
    }
    assert (second["arm"], second["less_tied"]) == ("tied", "–")
    assert rows.memory(decision())[1] == {
        "arm": "untied",
        "parameters": "3,000",
        "weights": "11.72 KiB",
        "optimizer": "23.44 KiB",
        "account": "0 B",
        "inference": "5.86 KiB",
    }
    assert rows.time(decision()) == (
        "A step of untied takes 1.031 times as long as one of tied on this machine, both without an account of "
        "updates: 291 of its steps take the time of 300 tied ones."
    )
    assert rows.widths(decision())[0] == {
        "width": "48",
        "parameters": "4,800",
        "share": f"50{N}%",
        "loss": f"4.400{N}±{N}0.020",
        "untied": f"−0.100{N}±{N}0.004",
        "until": f"−0.200{N}±{N}0.004",
    }
    legend = (
        "until-200 is tied until step 200 and has a table for each role from there on; tied-wide is tied, with a wider "
        "MLP, so that it has as many parameters as untied; untied-in-time trains for as long as tied does. Differences "
        "are paired by seed. All verdicts are tested together by Holm’s method, so that chance decides any of them in "
        "at most 5 % of decisions, and ± in them is wider for that; in tables it is half of a plain 95 % interval."
    )
    assert rows.legend(decision()) == legend
    # Five pairs whose mean is -0.4 and whose deviation is 0.27: p is 0.03, near its level.
    uncertain = decision(results={"64": rung(64, LOSSES | {"tied-wide": (4.5, -170)})})
    assert any(verdict.sentence.endswith("This verdict is near the edge.") for verdict in verdicts.verdicts(uncertain))
    assert rows.legend(uncertain) == (
        f"{legend} Near the edge: p is within a factor of 2 of its level, and the same decision made again could say "
        "otherwise."
    )
    assert rows.not_varied(decision()) == (
        "Not varied: the text, the number of layers, the tokens shown (307,200, 153.60 for each parameter of tied), "
        "the rates of the body, the standard deviation of the initial tables."
    )


def test_the_command_prints_the_headline_then_each_verdict() -> None:
    first, *others = verdicts.said(decision())
    assert first == verdicts.headline(decision())
    assert others == [verdict.sentence for verdict in verdicts.verdicts(decision())]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{path}: cannot be read: No such file or directory; `tiedjax decide` writes it"),
        ("{", "{path}: line 1 is not JSON: Expecting property name enclosed in double quotes"),
        ("[]", "{path}: must hold an object, got list; `tiedjax decide` writes it"),
        (
            json.dumps({"kind": "decision", "schema": 0}),
            "{path}: holds no decision as this version writes it; `tiedjax decide` writes it",
        ),
        (
            json.dumps({"kind": "decision", "schema": 1, "own": 64, "rungs": []}),
            "{folder}: width 64 is not trained yet; `tiedjax decide` continues it",
        ),
    ],
)
def test_a_record_that_cannot_be_drawn_is_refused_in_one_line(
    content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / page.RECORD
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        page.read(tmp_path)
    assert str(error.value) == message.format(path=path, folder=tmp_path)


def test_what_the_output_roles_gradient_is_made_of_at_the_end() -> None:
    known = decision()
    known["results"]["64"]["gradients"] = [
        complete(
            GradientFlow,
            {
                "makeup": {
                    "steps": [1, 300],
                    "push": [0.5, 0.6],
                    "common": [0.9, c],
                    "rest": [0.1, 0.7],
                    "cross": [0, 0.1],
                }
            },
        )
        | {"arm": arm, "seed": seed}
        for arm, seed, c in [("tied", 0, 0.2), ("tied", 1, 0.2), ("untied", 0, 0.4)]
    ]
    assert rows.common_mode(known) == [
        f"Of the squared norm of the output role’s gradient of tied at step 300, the common mode, which moves all rows "
        f"alike, is 0.200{N}±{N}0.000 and the rest 0.700{N}±{N}0.000; twice their inner product makes it "
        "whole."
    ]
    assert rows.common_mode(decision()) == []


def test_the_rates_that_were_tried_and_were_best() -> None:
    assert rows.rates(decision()) == (
        "At width 64, of optimizer.tables.learning_rate, 0.02, 0.04, 0.08 were tried on 1 other seeds and on the "
        "held-out windows with even numbers: best are 0.02 for untied, 0.04 for tied, 0.08 for until-200, 0.02 for "
        "tied-wide, 0.04 for untied-in-time. Losses are of the odd windows."
    )
    alike = decision()
    for choice in alike["results"]["64"]["sweep"].values():
        choice["best"] = 1
    assert "with even numbers: every arm is best with 0.04. Losses" in rows.rates(alike)


@pytest.mark.parametrize(("between", "choice"), [("the opposite", "until"), ("undecided", "untie")])
def test_a_choice_between_two_better_arms_is_as_near_the_edge_as_what_decides_between_them(
    between: str, choice: str
) -> None:
    stated = {
        "untied less tied": statement(-0.062, 0.02, BETTER),
        "until less tied": statement(-0.082, 0.02, BETTER),
        "until less untied": statement(-0.02, 0.02, between, near_edge=True),
    }
    compared = Comparison("at equal width and FLOPs", "tied", "untied", "until", says_when=True)
    verdict = verdicts.verdict_of(compared, stated, 200)
    assert (verdict.choice, verdict.near_edge) == (choice, True)
    assert verdict.sentence.endswith(" This verdict is near the edge.")
    stated["until less untied"]["near_edge"] = False
    assert not verdicts.verdict_of(compared, stated, 200).near_edge
