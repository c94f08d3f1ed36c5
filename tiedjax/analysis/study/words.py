"""A study's results in words and rows: what the report and the command line say, from results.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiedjax.analysis.basis import numbers, published
from tiedjax.analysis.basis.statistics import CONFIDENCE
from tiedjax.analysis.instruments.alignment.align import closed_form_floor
from tiedjax.tying import SHARED

Results = Mapping[str, Any]


def answer(results: Results) -> list[str]:
    """The verdict in one sentence; then what each intervention changes, what repeats, and the gradient's share."""
    gradient = gradient_share(results)
    return [verdict(results), *interventions(results), *repeated_shares(results), *([gradient] if gradient else [])]


def verdict(results: Results) -> str:
    """Whether the baseline arm's table lies nearer to the output table of its twin, and how much."""
    head = results["headline"]
    arm, reference = head["arm"], head["reference"]
    statement = results["statements"].get(f"{arm}_nearer_output")
    if statement is None:
        return f"Not measured: there is no pair of a {arm} and an {reference} run with the same seed."
    twin, edge = f"its {reference} twin’s", _edge(statement)
    if statement["verdict"] == "undecided" and statement["interval"]:
        return (
            f"Undecided: with token frequency controlled, the {arm} table’s nearness to {twin} output table less that "
            f"to the input table is {margin_of(statement)}, and the interval holds 0.{edge}"
        )
    nearer, other = ("output", "input") if statement["margin"] > 0 else ("input", "output")
    start = {"holds": "Yes", "the opposite": "No, the opposite", "undecided": "One seed, so only a hint"}
    return (
        f"{start[statement['verdict']]}: with token frequency controlled, the {arm} table lies nearer to {twin} "
        f"{nearer} table than to the {other} table; the difference in nearness is "
        f"{margin_of(statement, absolute=True)}.{edge}"
    )


def interventions(results: Results) -> list[str]:
    """A paragraph for each intervention: how nearness and the held-out loss change against the baseline arm."""
    baseline, statements = results["headline"]["arm"], results["statements"]
    subjects = {
        "lowers_vs_output": ("nearness to the output table", "", -1),
        "raises_vs_input": ("nearness to the input table", "", 1),
        "costs_loss": ("the held-out loss", " nats a token", 1),
    }
    paragraphs = []
    for arm in results["changes"]:
        sentences = [
            f"{subject} {_change_of(statement, sign, unit)}."
            for name, (subject, unit, sign) in subjects.items()
            if (statement := statements.get(f"{arm}_{name}"))
        ]
        if sentences:
            first, *others = sentences
            later = [sentence[0].upper() + sentence[1:] for sentence in others]
            paragraphs.append(" ".join([f"With {arm}{_settings(results, arm)} instead of {baseline}, {first}", *later]))
    return paragraphs


def _settings(results: Results, arm: str) -> str:
    """In brackets, the options in which an arm is not the baseline."""
    arms, baseline = results["arms"], results["headline"]["arm"]
    theirs = {key: pair[1] for key, pair in arms[baseline]["differs_from_reference"].items()}
    ours = {key: pair[1] for key, pair in arms[arm]["differs_from_reference"].items()}
    settings = [
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in ours.items()
        if theirs.get(key) != value
    ]
    return f" ({', '.join(settings)})" if settings else ""


def gradient_share(results: Results) -> str:
    """Which part of the baseline arm's gradient the output role supplies; empty where it was not logged."""
    head = results["headline"]
    if head["early_output_share"]["mean"] is None:
        return ""
    early, overall = head["early_output_share"], results["arms"][head["arm"]]["overall_output_share"]
    return (
        f"The output role supplies {numbers.percent(early)} of the {head['arm']} table’s gradient (sum of both norms) "
        f"up to step {head['early_steps'][1]}. Over the whole run it supplies {numbers.percent(overall)}."
    )


def repeated_shares(results: Results) -> list[str]:
    """How much of what training repeats a shared table has in common with either table of the reference.

    Of the baseline and of every intervention; none where the share would divide by chance.
    """
    sentences = []
    for arm in (results["headline"]["arm"], *results["changes"]):
        statement = results["statements"].get(f"{arm}_shares_more_with_output")
        if statement is None or statement["interval"] is None:
            continue
        share = results["reproducible_share"][arm][SHARED]
        output, input_ = (numbers.number(share[f"vs_{role}"]["mean"], 2) for role in ("output", "input"))
        end = "; the difference is undecided" if statement["verdict"] == "undecided" else ""
        sentences.append(
            f"Of what training repeats over seeds, the {arm} table shares {output} with the output table and {input_} "
            f"with the input table{end}.{_edge(statement)}"
        )
    return sentences


def basis(results: Results) -> str:
    """How the intervals are made."""
    n = max((statement["n"] for statement in results["statements"].values()), default=0)
    if n < 2:
        return "One seed: no interval can be given, and nothing is decided."
    return (
        f"Intervals are Student-t intervals over {n} seeds, paired by seed where two runs are compared. Those of "
        "statements have the level at which Holm’s method tests each; all others have 95\u00a0%."
    )


def testing(results: Results) -> str:
    """How many statements are tested, and what chance alone would give."""
    tested = [statement for statement in results["statements"].values() if statement["level"] is not None]
    if not tested:
        return "One seed: no statement can be tested."
    number_tested, level = len(tested), 1 - CONFIDENCE
    return (
        f"{number_tested} statements are tested together by Holm’s method: if every margin were 0, chance alone would "
        f"decide any of them in at most {level:.0%} of studies. Each tested alone at {level:.0%}, chance would decide "
        f"{number_tested * level:.1f} of {number_tested}."
    ).replace("%", "\u00a0%")


def near_edge(results: Results) -> str:
    """What a verdict near the edge is; empty where there is none."""
    if not any(statement["near_edge"] for statement in results["statements"].values()):
        return ""
    return "Near the edge, p is within a factor of 2 of the level: the same study run again could say otherwise."


def certainty(results: Results) -> str:
    """What the uncertainties beside the answer are, in one line."""
    tested = [statement for statement in results["statements"].values() if statement["level"] is not None]
    if not tested:
        return "One seed: there is no interval, and nothing is decided."
    n = max(statement["n"] for statement in tested)
    return (
        f"± is half of a {CONFIDENCE:.0%} interval over {n} seeds; those of the verdict, costs and changes are wider, "
        f"because {len(tested)} statements are tested together."
    ).replace("%", "\u00a0%")


def _edge(statement: Mapping[str, Any]) -> str:
    return " This verdict is near the edge." if statement["near_edge"] else ""


def margin_of(statement: Mapping[str, Any], *, absolute: bool = False, signed: bool = False) -> str:
    """A statement's margin ± half of its interval."""
    low, high = statement["interval"] or (None, None)
    mean = abs(statement["margin"]) if absolute else statement["margin"]
    span = {"mean": mean, "low": low, "high": high}
    return numbers.signed(span) if signed else numbers.spread(span)


def _change_of(statement: Mapping[str, Any], sign: int, unit: str) -> str:
    """How a quantity changes whose increase is `sign` times the statement's margin."""
    direction = "rises" if sign * statement["margin"] > 0 else "falls"
    if statement["interval"] is None:
        return f"{direction} by {margin_of(statement, absolute=True)}{unit} (one seed)"
    edge = ", near the edge," if statement["near_edge"] else ""
    if statement["verdict"] == "undecided":
        low, high = sorted(sign * end for end in statement["interval"])
        change = numbers.signed({"mean": sign * statement["margin"], "low": low, "high": high})
        return f"changes by {change}{unit}{edge or ','} undecided"
    return f"{direction}{edge} by {margin_of(statement, absolute=True)}{unit}"


def verdicts(results: Results) -> list[dict[str, str]]:
    """Each statement with its verdict in words and its margin."""
    return [
        {
            "claim": statement["claim"],
            "verdict": statement["verdict"],
            "edge": "near the edge" if statement["near_edge"] else "",
            "margin": margin_of(statement),
        }
        for statement in results["statements"].values()
    ]


def arm_columns(results: Results) -> dict[str, str]:
    """What the first table's columns are called, by the keys of `arm_rows`."""
    head = results["headline"]
    return {
        "arm": "Arm",
        "loss": "Held-out loss, nats a token",
        "cost": f"Cost against {head['arm']}",
        "output": f"Nearness to {head['reference']}’s output table",
        "input": f"Nearness to {head['reference']}’s input table",
        "early": f"Output share of gradient, to step {head['early_steps'][1]}",
        "overall": "Output share of gradient, whole run",
    }


def arm_rows(results: Results) -> list[dict[str, str]]:
    """Per arm: held-out loss, its cost against the baseline arm, nearness to the reference's tables, gradient share."""
    rows = []
    for arm, summary in results["arms"].items():
        near = summary["alignment"].get(SHARED, {})
        cells = {role: near.get(f"vs_{role}", {}).get(results["headline"]["fit"], {}) for role in ("output", "input")}
        rows.append(
            {
                "arm": arm,
                "loss": numbers.spread(summary["eval_loss"]),
                "cost": _cost(results["statements"].get(f"{arm}_costs_loss")),
                **{role: numbers.spread(cell.get(results["headline"]["measure"])) for role, cell in cells.items()},
                "early": numbers.percent(summary["early_output_share"]),
                "overall": numbers.percent(summary["overall_output_share"]),
            }
        )
    return rows


def _cost(statement: Mapping[str, Any] | None) -> str:
    """A loss against the baseline's, with what is to be said of it; a dash where it was not compared."""
    if statement is None:
        return numbers.NONE
    remarks = ["undecided"] if statement["verdict"] == "undecided" and statement["interval"] else []
    remarks += ["near the edge"] if statement["near_edge"] else []
    return ", ".join([margin_of(statement, signed=True), *remarks])


def paper_alignment(results: Results) -> list[dict[str, Any]]:
    """Per pair of tables: uncorrected scores, the paper's beside the closed-form floor and ours beside its own."""
    head = results["headline"]
    arms = results["arms"]
    ours = {
        ("input", "output"): arms[head["reference"]]["alignment"].get("output", {}).get("vs_input"),
        ("output", "tied"): arms.get(head["arm"], {}).get("alignment", {}).get(SHARED, {}).get("vs_output"),
        ("input", "tied"): arms.get(head["arm"], {}).get("alignment", {}).get(SHARED, {}).get("vs_input"),
    }
    names = {
        ("input", "output"): f"{head['reference']} input → {head['reference']} output",
        ("output", "tied"): f"{head['reference']} output → {head['arm']}",
        ("input", "tied"): f"{head['reference']} input → {head['arm']}",
    }
    groups = []
    for pair, values in published.ALIGNMENT.items():
        mine = ours[pair]
        if mine is not None:
            rows = [
                {
                    "fit": fit,
                    "paper": numbers.number(value),
                    "paper_floor": numbers.number(closed_form_floor(fit, *published.ALIGNMENT_SHAPE)),
                    "ours": numbers.number(mine[fit]["score"]["mean"]),
                    "ours_floor": numbers.number(mine[fit]["floor"]["mean"]),
                }
                for fit, value in values.items()
            ]
            groups.append({"pair": names[pair], "rows": rows})
    return groups


def paper_others(results: Results) -> list[dict[str, str]]:
    """Input-gradient scaling and evolution: what was measured, the paper's value, ours."""
    head, arms = results["headline"], results["arms"]
    rows = []
    for arm, summary in arms.items():
        scale = summary["differs_from_reference"].get("tying.input_grad_scale", (None, None))[1]
        if scale in published.SCALING and scale != 1 and arm in results["changes"]:
            for role, theirs in published.SCALING[scale].items():
                ours = [
                    arms[a]["alignment"][SHARED][f"vs_{role}"]["orthogonal"]["score"]["mean"]
                    for a in (head["arm"], arm)
                ]
                rows.append(
                    {
                        "what": f"orthogonal score with {head['reference']} {role}, input gradients ×1 → ×{scale:g}",
                        "paper": f"{numbers.number(published.SCALING[1][role])} → {numbers.number(theirs)}",
                        "ours": f"{numbers.number(ours[0])} → {numbers.number(ours[1])}",
                    }
                )
    for role, theirs in published.EVOLUTION.items():
        ends = [e for e in results.get("evolution", ()) if e["arm"] == head["reference"] and e["role"] == role]
        if ends:
            mean = sum(e["to_start"][-1] for e in ends) / len(ends)
            rows.append(
                {
                    "what": f"cosine of {head['reference']} {role} rows to step 0 (here: rows of seen tokens)",
                    "paper": f"{numbers.number(theirs)} at step {published.EVOLUTION_STEP:,}",
                    "ours": f"{numbers.number(mean)} at step {ends[0]['steps'][-1]:,}",
                }
            )
    return rows
