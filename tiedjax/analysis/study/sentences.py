"""A study's results in words and rows: what the report and the command line say, from results.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from tiedjax.analysis.basis import numbers
from tiedjax.analysis.basis.statistics import CONFIDENCE
from tiedjax.analysis.basis.tables import ROLES
from tiedjax.analysis.study.claims import of_layers_or_calibration
from tiedjax.analysis.study.reproducibility import jackknife, mean_of
from tiedjax.tying import SHARED

Results = Mapping[str, Any]

EARLY_TRAINING = "early training"
HURDLES = {  # of the first table's columns
    "bits_per_byte": "Bits a byte",
    "less_bigram": "Less the bigram’s, bits a token",
    "less_trigram": "Less the trigram’s, bits a token",
}


def answer(results: Results) -> list[str]:
    """The verdict in one sentence; then how each arm differs, how the losses compare with n-grams, what training
    repeats, and the gradient's share.
    """
    return [
        verdict(results),
        *against_baseline(results),
        *against_ngrams(results),
        *what_repeats(results),
        *gradient_share(results),
    ]


def verdict(results: Results) -> str:
    """Whether the baseline arm's table lies nearer to the output table of its twin, and how much."""
    head = results["headline"]
    arm, reference = head["arm"], head["reference"]
    statement = results["statements"].get(f"{arm}_nearer_output")
    if statement is None:
        return f"Not measured: there is no pair of a {arm} and an {reference} run with the same seed."
    twin, near = f"its {reference} twin’s", edge(statement)
    if statement["verdict"] == "undecided" and statement["interval"]:
        return (
            f"Undecided: with token frequency controlled, the {arm} table’s nearness to {twin} output table less that "
            f"to the input table is {margin_of(statement)}, and the interval holds 0.{near}"
        )
    nearer, other = ("output", "input") if statement["margin"] > 0 else ("input", "output")
    start = {"holds": "Yes", "the opposite": "No, the opposite", "undecided": "One seed, so only a hint"}
    return (
        f"{start[statement['verdict']]}: with token frequency controlled, the {arm} table lies nearer to {twin} "
        f"{nearer} table than to the {other} table, by {margin_of(statement, absolute=True)}.{near}"
    )


def against_baseline(results: Results) -> list[str]:
    """A paragraph for each other arm: how nearness changes, where its table then lies, and what that does to the loss.

    First the interventions, then the arms that have no shared table but the reference, whose loss `losses` speaks of.
    """
    head, statements = results["headline"], results["statements"]
    baseline, reference = head["arm"], head["reference"]
    clauses_of = {
        "lowers_vs_output": lambda arm, said: f"nearness to the output table {_change_of(said, -1)}.",
        "raises_vs_input": lambda arm, said: f"nearness to the input table {_change_of(said, 1)}.",
        "nearer_output": _where_it_lies,
        "costs_loss": lambda arm, said: f"the held-out loss {_change_of(said, 1, ' nats a token')}.",
    }
    paragraphs = []
    for arm in (*results["changes"], *(arm for arm in results["arms"] if arm not in results["changes"])):
        clauses = [
            clause(arm, statements[f"{arm}_{name}"])
            for name, clause in clauses_of.items()
            if arm not in (baseline, reference) and f"{arm}_{name}" in statements
        ]
        if clauses:
            first, *others = clauses
            later = [clause[0].upper() + clause[1:] for clause in others]
            paragraphs.append(" ".join([f"With {arm}{_settings(results, arm)} instead of {baseline}, {first}", *later]))
    return paragraphs


def _where_it_lies(arm: str, statement: Mapping[str, Any]) -> str:
    """To which table of the reference an arm's own lies nearer."""
    if statement["verdict"] == "undecided" and statement["interval"]:
        return (
            f"the {arm} table’s nearness to the output table less that to the input table is {margin_of(statement)}, "
            f"undecided.{edge(statement)}"
        )
    nearer, other = ("output", "input") if statement["margin"] > 0 else ("input", "output")
    seeds = "" if statement["interval"] else " (one seed)"
    return (
        f"the {arm} table lies nearer to the {nearer} table than to the {other} table, by "
        f"{margin_of(statement, absolute=True)}{seeds}.{edge(statement)}"
    )


def early_training(results: Results) -> list[str]:
    """A warning while any arm is worse than a bigram of its text; none where no arm is, or none was compared."""
    worse = {arm: gap["mean"] for arm, gap in _gaps(results, "less_bigram").items() if gap["mean"] > 0}
    if not worse:
        return []
    most = numbers.number(max(worse.values()), 2)
    size, was = (f"is {most}", "it was") if len(worse) == 1 else (f"are up to {most}", "they were")
    return [
        f"Early training: {_named(list(worse))} {size} bits a token worse than a bigram of the text that {was} "
        "shown. What the report says of layers and calibration is about learning a bigram."
    ]


def early_mark(results: Results) -> str:
    """What follows the heading of a section on layers or calibration while training is early."""
    return f" ({EARLY_TRAINING})" if early_training(results) else ""


def against_ngrams(results: Results) -> list[str]:
    """On which side of a bigram's loss each arm's lies, the baseline's by how much; and where the trigram's lies."""
    gaps, beyond, arm = _gaps(results, "less_bigram"), _gaps(results, "less_trigram"), results["headline"]["arm"]
    if not gaps:
        return []
    above = [name for name, gap in gaps.items() if gap["mean"] > 0]
    below = [name for name in gaps if name not in above]
    seeds = "In one seed" if all(gap["low"] is None for gap in gaps.values()) else "On the mean over seeds"
    if not (above and below):
        side = "above" if above else "below"
        text = f"{seeds}, every arm’s loss is {side} that of a bigram of the text that it was shown"
        by = f"{arm}’s by"
    else:
        (side, arms), (last_side, last_arms) = sorted(  # the baseline's side last, so that a number can follow
            [("above", above), ("below", below)], key=lambda side: arm in side[1]
        )
        was = "it was" if len(arms) == 1 else "they were"
        text = (
            f"{seeds}, the loss of {_named(arms)} is {side} that of a bigram of the text that {was} shown, "
            f"and the loss of {_named(last_arms)} is {last_side} it"
        )
        by = "by" if last_arms == [arm] else f"{arm}’s by"
    if arm not in gaps:
        return [f"{text}."]
    order = "higher" if beyond[arm]["mean"] < 0 else "lower"
    return [
        f"{text}, {by} {_distance(gaps[arm], ' bits a token')}. The trigram’s is {_distance(beyond[arm], ' bits')} "
        f"{order} than {arm}’s."
    ]


def what_ngrams_are(results: Results) -> str:
    """What stands in the first table's columns of bigram and trigram; empty where it has none."""
    if not _gaps(results, "less_bigram"):
        return ""
    return (
        "Bigram and trigram count the text that each run was shown, and predict the held-out tokens that the run does."
    )


def _gaps(results: Results, name: str) -> dict[str, Mapping[str, Any]]:
    """By arm, one of its HURDLES, where it was measured."""
    spans = {arm: summary.get("hurdles", {}).get(name) for arm, summary in results["arms"].items()}
    return {arm: span for arm, span in spans.items() if span and span["mean"] is not None}


def _distance(span: Mapping[str, Any], unit: str) -> str:
    """The size of a difference, with a remark where its interval holds 0."""
    holds_0 = span["low"] is not None and span["low"] <= 0 <= span["high"]
    size = numbers.spread({**span, "mean": abs(span["mean"])}, 2)
    return f"{size}{unit}{' (the interval holds 0)' if holds_0 else ''}"


def _named(arms: list[str]) -> str:
    """a; a and b; a, b and c."""
    *first, last = arms
    return f"{', '.join(first)} and {last}" if first else last


def what_repeats(results: Results) -> list[str]:
    """How much of either table of the reference training repeats, and how much of that other tables share."""
    return [*_between_seeds(results), *_repeated_shares(results)]


def _between_seeds(results: Results) -> list[str]:
    """By runs of the reference that differ in their seed; none where there is one seed."""
    head = results["headline"]
    repeated = results.get("between_seeds", {}).get(head["reference"], {})
    if not all(role in repeated for role in ROLES):
        return []
    cells = {role: repeated[role][f"vs_{role}"][head["fit"]] for role in ROLES}
    means = {role: cell[head["measure"]]["mean"] for role, cell in cells.items()}
    if None in means.values():
        return []
    more, less = sorted(ROLES, key=means.__getitem__, reverse=True)
    pairs = {role: _pairs_of_seeds(cell["by_seed"]) for role, cell in cells.items()}
    both = {pair: pairs[more][pair] - pairs[less][pair] for pair in pairs[more].keys() & pairs[less].keys()}
    margin = jackknife(partial(mean_of, both), sorted({seed for pair in both for seed in pair}))
    said = ""
    if margin.excludes_zero:
        said = f": training repeats more of the {more} table"
    elif margin.low is not None:
        said = ": which of them training repeats more of is undecided"
    return [
        f"Between two {head['reference']} runs of different seeds, the {more} tables score "
        f"{numbers.number(means[more])} and the {less} tables {numbers.number(means[less])}{said}."
    ]


def _pairs_of_seeds(scores: Mapping[str, float | None]) -> dict[tuple[int, int], float]:
    """Of scores by "SEED to SEED" those that are known, by the two seeds."""
    pairs = {}
    for name, score in scores.items():
        first, second = map(int, name.split(" to "))
        if score is not None:
            pairs[first, second] = score
    return pairs


def _settings(results: Results, arm: str) -> str:
    """In brackets, the options in which an arm is not the baseline."""
    arms, baseline = results["arms"], results["headline"]["arm"]
    of_baseline = {key: pair[1] for key, pair in arms[baseline]["differs_from_reference"].items()}
    of_arm = {key: pair[1] for key, pair in arms[arm]["differs_from_reference"].items()}
    settings = [
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in of_arm.items()
        if of_baseline.get(key) != value
    ]
    return f" ({', '.join(settings)})" if settings else ""


def gradient_share(results: Results) -> list[str]:
    """Which part of the baseline arm's gradient the output role supplies; nothing where it was not logged."""
    head = results["headline"]
    if head["early_output_share"]["mean"] is None:
        return []
    early, overall = head["early_output_share"], results["arms"][head["arm"]]["overall_output_share"]
    if max(run["steps"] for run in results["runs"] if run["arm"] == head["arm"]) <= head["early_steps"][1]:
        return [
            f"The output role supplies {numbers.percent(overall)} of the {head['arm']} table’s gradient (sum of both "
            "norms) over the whole run."
        ]
    return [
        f"The output role supplies {numbers.percent(early)} of the {head['arm']} table’s gradient (sum of both norms) "
        f"up to step {head['early_steps'][1]}. Over the whole run it supplies {numbers.percent(overall)}."
    ]


def _repeated_shares(results: Results) -> list[str]:
    """How much of what training repeats a shared table has in common with either table of the reference.

    Of the baseline and of every intervention; none where the share would divide by chance.
    """
    sentences = []
    for arm in (results["headline"]["arm"], *results["changes"]):
        statement = results["statements"].get(f"{arm}_shares_more_with_output")
        if statement is None or statement["interval"] is None:
            continue
        share = numbers.number(results["reproducible_share"][arm][SHARED]["vs_output"]["mean"], 2)
        more = "more" if statement["margin"] > 0 else "less"
        undecided = ", undecided" if statement["verdict"] == "undecided" else ""
        sentences.append(
            f"Of what training repeats over seeds, the {arm} table shares {share} with the output table, "
            f"{margin_of(statement, absolute=True, digits=2)} {more} than with the input table{undecided}."
            f"{edge(statement)}"
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
        f"± is half of a {CONFIDENCE:.0%} interval over {n} seeds; those of the verdict and of differences between "
        f"arms are wider, because {len(tested)} statements are tested together."
    ).replace("%", "\u00a0%")


def edge(statement: Mapping[str, Any]) -> str:
    """That the verdict could be another one with a little other luck; empty where it could not."""
    return " This verdict is near the edge." if statement["near_edge"] else ""


def margin_of(statement: Mapping[str, Any], *, absolute: bool = False, signed: bool = False, digits: int = 3) -> str:
    """A statement's margin ± half of its interval."""
    low, high = statement["interval"] or (None, None)
    mean = abs(statement["margin"]) if absolute else statement["margin"]
    span = {"mean": mean, "low": low, "high": high}
    return numbers.signed(span) if signed else numbers.spread(span, digits)


def _change_of(statement: Mapping[str, Any], sign: int, unit: str = "") -> str:
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
    """Each statement with its verdict in words and its margin; `early` marks those on early training."""
    early = bool(early_training(results))
    return [
        {
            "claim": statement["claim"],
            "verdict": statement["verdict"],
            "edge": "near the edge" if statement["near_edge"] else "",
            "early": EARLY_TRAINING if early and of_layers_or_calibration(name, results["headline"]["arm"]) else "",
            "margin": margin_of(statement),
        }
        for name, statement in results["statements"].items()
    ]


def arm_columns(results: Results) -> dict[str, str]:
    """What the first table's columns are called, by the keys of `arm_rows`; those of hurdles where some arm has any."""
    head = results["headline"]
    return {
        "arm": "Arm",
        "loss": "Held-out loss, nats a token",
        **{name: title for name, title in HURDLES.items() if _gaps(results, name)},
        "cost": f"Loss against {head['arm']}",
        "output": f"Nearness to {head['reference']}’s output table",
        "input": f"Nearness to {head['reference']}’s input table",
        "early": f"Output share of gradient, to step {head['early_steps'][1]}",
    }


def arm_rows(results: Results) -> list[dict[str, str]]:
    """Per arm: held-out loss, beside n-grams, the baseline's taken off, nearness to the reference's tables, gradient
    share.
    """
    rows = []
    by_hurdle = {name: gaps for name in HURDLES if (gaps := _gaps(results, name))}
    for arm, summary in results["arms"].items():
        near = summary["alignment"].get(SHARED, {})
        cells = {role: near.get(f"vs_{role}", {}).get(results["headline"]["fit"], {}) for role in ("output", "input")}
        rows.append(
            {
                "arm": arm,
                "loss": numbers.spread(summary["eval_loss"]),
                **{name: _hurdle(name, gaps.get(arm)) for name, gaps in by_hurdle.items()},
                "cost": _cost(results["statements"].get(f"{arm}_costs_loss")),
                **{role: numbers.spread(cell.get(results["headline"]["measure"])) for role, cell in cells.items()},
                "early": numbers.percent(summary["early_output_share"]),
            }
        )
    return rows


def _hurdle(name: str, span: Mapping[str, Any] | None) -> str:
    """A cell of HURDLES: differences with their sign."""
    return numbers.spread(span) if span is None or name == "bits_per_byte" else numbers.signed(span)


def _cost(statement: Mapping[str, Any] | None) -> str:
    """A loss against the baseline's, with what is to be said of it; a dash where it was not compared."""
    if statement is None:
        return numbers.NONE
    remarks = ["undecided"] if statement["verdict"] == "undecided" and statement["interval"] else []
    remarks += ["near the edge"] if statement["near_edge"] else []
    return ", ".join([margin_of(statement, signed=True), *remarks])
