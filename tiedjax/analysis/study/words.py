"""A study's results in words and rows: what the report and the command line say, from results.json alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tiedjax.analysis.basis import numbers, published
from tiedjax.analysis.basis.statistics import CONFIDENCE
from tiedjax.analysis.instruments.alignment.align import closed_form_floor

Results = Mapping[str, Any]


def answer(results: Results) -> list[str]:
    """The finding, what each intervention does and costs, the gradients' share; worded by the verdicts."""
    return [
        _main_sentence(results),
        *_intervention_sentences(results),
        *_reproducible_share_sentences(results),
        *_share_sentence(results),
    ]


def basis(results: Results) -> str:
    """What the uncertainties are."""
    n = max((statement["n"] for statement in results["statements"].values()), default=0)
    if n < 2:
        return "One seed: no interval can be given, and nothing is decided."
    return (
        f"± is half of a Student-t interval over {n} seeds, paired by seed where two runs are compared. Intervals of "
        "statements have the level at which Holm’s method tests each; all others have 95 %."
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


def _main_sentence(results: Results) -> str:
    head = results["headline"]
    arm, reference = head["arm"], head["reference"]
    statement = results["statements"].get(f"{arm}_nearer_output")
    if statement is None:
        return f"Not measured: there is no pair of a {arm} and an {reference} run with the same seed."
    near = {role: f"{role} table ({numbers.number(head[f'vs_{role}']['mean'])})" for role in ("output", "input")}
    subject = f"With token frequency controlled, the {arm} table"
    if statement["verdict"] == "undecided" and statement["interval"]:
        return (
            f"Undecided. {subject} is not measurably nearer to its {reference} twin’s {near['output']} or "
            f"{near['input']}: difference {margin_of(statement)}.{_edge(statement)}"
        )
    nearer, other = ("output", "input") if statement["margin"] > 0 else ("input", "output")
    start = {"holds": "Yes. ", "the opposite": "No, the opposite. ", "undecided": "One seed, so only a hint. "}
    return (
        f"{start[statement['verdict']]}{subject} lies nearer to its {reference} twin’s {near[nearer]} than to its "
        f"{near[other]}: difference {margin_of(statement, absolute=True)}.{_edge(statement)}"
    )


def _edge(statement: Mapping[str, Any]) -> str:
    return " This verdict is near the edge." if statement["near_edge"] else ""


def margin_of(statement: Mapping[str, Any], *, absolute: bool = False) -> str:
    """A statement's margin ± half of its interval."""
    low, high = statement["interval"] or (None, None)
    mean = abs(statement["margin"]) if absolute else statement["margin"]
    return numbers.spread({"mean": mean, "low": low, "high": high})


def _share_sentence(results: Results) -> Iterator[str]:
    head = results["headline"]
    if head["early_output_share"]["mean"] is not None:
        arm = results["arms"][head["arm"]]
        first, last = head["early_steps"]
        early, overall = numbers.percent(head["early_output_share"]), numbers.percent(arm["overall_output_share"])
        yield (
            f"The output role supplies {early} of the {head['arm']} table’s gradient (sum of both norms) in steps "
            f"{first} to {last} and {overall} over the whole run."
        )


def _intervention_sentences(results: Results) -> Iterator[str]:
    baseline, statements = results["headline"]["arm"], results["statements"]
    for arm in results["changes"]:
        output, input_ = (statements.get(f"{arm}_{change}") for change in ("lowers_vs_output", "raises_vs_input"))
        if output and input_:
            yield (
                f"With {arm} instead of {baseline}, nearness to the output table {_moved(output, -1)} and nearness to "
                f"the input table {_moved(input_, 1)}."
            )
        if cost := statements.get(f"{arm}_costs_loss"):
            yield f"With {arm} instead of {baseline}, the held-out loss {_moved(cost, 1)} nats a token."


def _reproducible_share_sentences(results: Results) -> Iterator[str]:
    """The share of what repeats, of the baseline and of every intervention; none where it would divide by chance."""
    for arm in (results["headline"]["arm"], *results["changes"]):
        statement = results["statements"].get(f"{arm}_shares_more_with_output")
        if statement is None or statement["interval"] is None:
            continue
        share = results["reproducible_share"][arm]["shared"]
        shares = [
            f"{numbers.number(share[f'vs_{role}']['mean'])} with the {role} table" for role in ("output", "input")
        ]
        undecided = ", undecided" if statement["verdict"] == "undecided" else ""
        edge = ", near the edge" if statement["near_edge"] else ""
        yield (
            f"Of what training repeats over seeds, the {arm} table shares {shares[0]} and {shares[1]}: difference "
            f"{margin_of(statement)}{undecided}{edge}."
        )


def _moved(statement: Mapping[str, Any], sign: int) -> str:
    """How a quantity changes whose increase is `sign` times the statement's margin."""
    rises = sign * statement["margin"] > 0
    if statement["interval"] is None:
        return f"{'rises' if rises else 'falls'} by {margin_of(statement, absolute=True)} (one seed)"
    edge = ", near the edge," if statement["near_edge"] else ""
    if statement["verdict"] == "undecided":
        low, high = sorted(sign * end for end in statement["interval"])
        change = numbers.spread({"mean": sign * statement["margin"], "low": low, "high": high})
        return f"does not measurably change{edge} ({change})"
    return f"{'rises' if rises else 'falls'}{edge} by {margin_of(statement, absolute=True)}"


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


def arm_rows(results: Results) -> list[dict[str, str]]:
    """Per arm: held-out loss, its difference to the baseline arm, nearness to the reference's two tables."""
    baseline = results["headline"]["arm"]
    rows = []
    for arm, summary in results["arms"].items():
        near = summary["alignment"].get("shared", {})
        cells = {role: near.get(f"vs_{role}", {}).get(results["headline"]["fit"], {}) for role in ("output", "input")}
        against = numbers.NONE if arm == baseline else numbers.signed(summary["eval_loss_against_baseline"])
        rows.append(
            {
                "arm": arm,
                "loss": numbers.spread(summary["eval_loss"]),
                "against": against,
                **{role: numbers.spread(cell.get(results["headline"]["measure"])) for role, cell in cells.items()},
            }
        )
    return rows


def paper_alignment(results: Results) -> list[dict[str, Any]]:
    """Per pair of tables: uncorrected scores, the paper's beside the closed-form floor and ours beside its own."""
    head = results["headline"]
    arms = results["arms"]
    ours = {
        ("input", "output"): arms[head["reference"]]["alignment"].get("output", {}).get("vs_input"),
        ("output", "tied"): arms.get(head["arm"], {}).get("alignment", {}).get("shared", {}).get("vs_output"),
        ("input", "tied"): arms.get(head["arm"], {}).get("alignment", {}).get("shared", {}).get("vs_input"),
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
                    arms[a]["alignment"]["shared"][f"vs_{role}"]["orthogonal"]["score"]["mean"]
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
