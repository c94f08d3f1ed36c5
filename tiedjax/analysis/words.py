"""A study's results in words and rows: what the report and the command line say, from results.json alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tiedjax import text
from tiedjax.analysis import published
from tiedjax.analysis.align import closed_form_floor

Results = Mapping[str, Any]
Span = Mapping[str, Any]  # statistics.Interval as JSON

NONE = "–"


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: fixed digits, a real minus sign, a dash for none."""
    if value is None:
        return NONE
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def spread(span: Span | None, digits: int = 3) -> str:
    """mean ± half the interval's width; the mean alone where there is no interval."""
    if span is None or span["mean"] is None:
        return NONE
    if span["low"] is None:
        return number(span["mean"], digits)
    # No-break spaces, so that a number and its uncertainty stay on one line.
    return f"{number(span['mean'], digits)}\u00a0±\u00a0{number((span['high'] - span['low']) / 2, digits)}"


def percent(span: Span) -> str:
    """A share as a percentage, with its interval where there is one."""
    scaled = {k: None if span[k] is None else 100 * span[k] for k in ("mean", "low", "high")}
    return f"{spread(scaled, 0 if scaled['low'] is None else 1)}\u00a0%"


def answer(results: Results) -> list[str]:
    """The finding, what nearness was possible, the gradients' share, each intervention; worded by what holds."""
    return [
        _main_sentence(results),
        *_beyond_frequency_sentence(results),
        *_between_seeds_sentence(results),
        *_reproducible_share_sentences(results),
        *_share_sentence(results),
        *_intervention_sentences(results),
    ]


def basis(results: Results) -> str:
    """What the uncertainties are."""
    n = max(results["headline"][name]["n"] for name in ("margin", "reference_input_vs_output"))
    if n == 1:
        return "One seed: no uncertainty can be given, and nothing is claimed to hold."
    level = round(100 * results["headline"]["margin"]["confidence"])
    return (
        f"± is half of a {level} % Student-t interval over {n} seeds, paired by seed where two runs are compared; "
        "each is of one statement, not of all together."
    )


def _main_sentence(results: Results) -> str:
    head = results["headline"]
    arm, reference = head["arm"], head["reference"]
    holds = results["statements"][f"{arm}_nearer_output"]["holds"]
    margin = head["margin"]
    if margin["mean"] is None:
        return f"Not measured: there is no pair of a {arm} and an {reference} run with the same seed."
    numbers = (
        f"{spread(head['vs_output'])} to the output table against {spread(head['vs_input'])} to the input table "
        f"(0 is chance, 1 is identical; difference {spread(margin)})"
    )
    if holds:
        nearer = f"nearer to its {reference} twin’s output table than to its input table"
        return f"Yes. The {arm} table lies {nearer}: {numbers}."
    if margin["low"] is None:
        side = "output" if margin["mean"] > 0 else "input"
        return (
            f"One seed, so only a hint: the {arm} table lies nearer to its {reference} twin’s {side} table: {numbers}."
        )
    if margin["high"] < 0:
        return f"No, the opposite. The {arm} table lies nearer to its {reference} twin’s input table: {numbers}."
    return f"Not shown. The {arm} table is not measurably nearer to either of its {reference} twin’s tables: {numbers}."


def _beyond_frequency_sentence(results: Results) -> Iterator[str]:
    """The same nearness with what frequency alone gives counted as chance."""
    found = results["headline"]["beyond_frequency"]
    if found["margin"]["mean"] is not None:
        yield (
            "Counting as chance also what tokens of like frequency share (rows shuffled within tenths of frequency), "
            f"it is {spread(found['vs_output'])} to the output table and {spread(found['vs_input'])} to the input "
            f"table (difference {spread(found['margin'])})."
        )


def _between_seeds_sentence(results: Results) -> Iterator[str]:
    """The same nearness between runs that share no seed, beside that of the reference's own tables: like with like."""
    head, between = results["headline"], results["between_seeds"]
    if not {head["arm"], head["reference"]} <= between.keys():
        return
    own, other = between[head["reference"]], between[head["arm"]]
    mean = lambda compared, subject, target: number(compared[subject][f"vs_{target}"][head["fit"]]["corrected"]["mean"])
    reference = head["reference"]
    repeated = results["reproducible_share"].get(head["arm"], {}).get("shared", {}).get("repetition")
    repetition = f" and {head['arm']} tables at {number(repeated['mean'])}" if repeated else ""
    yield (
        f"Between runs of different seeds, {reference} output tables lie at {mean(own, 'output', 'output')}, "
        f"input tables at {mean(own, 'input', 'input')}{repetition} from one another, the {head['arm']} table at "
        f"{mean(other, 'shared', 'output')} from the output and {mean(other, 'shared', 'input')} from the input "
        "tables: what training does not repeat in two tables limits how near they come (by the root of the two "
        "repetitions)."
    )


def _reproducible_share_sentences(results: Results) -> Iterator[str]:
    """The share of what repeats, of the baseline and of every intervention; none where it would divide by chance."""
    for arm in (results["headline"]["arm"], *results["changes"]):
        share = results["reproducible_share"].get(arm, {}).get("shared")
        if share is None or share["margin"]["low"] is None:
            continue
        yield (
            "Of the geometry that training repeats over seeds (Gram matrices, token frequency controlled, Spearman’s "
            f"correction for attenuation), the {arm} table shares {spread(share['vs_output'])} with the output table "
            f"and {spread(share['vs_input'])} with the input table; {_side(share['margin'])} "
            f"{spread(share['margin'])}."
        )


def _side(margin: Span) -> str:
    if margin["low"] is None:
        return "difference"
    if margin["low"] > 0:
        return "nearer to the output table: difference"
    if margin["high"] < 0:
        return "nearer to the input table: difference"
    return "not measurably nearer to either: difference"


def _share_sentence(results: Results) -> Iterator[str]:
    head = results["headline"]
    if head["early_output_share"]["mean"] is not None:
        arm = results["arms"][head["arm"]]
        early = [
            f"{percent(window['output_share'])} over steps {window['first']} to {window['last']}"
            for window in arm["output_share_windows"][:2]
        ]
        yield (
            f"Of the sum of the norms of the {head['arm']} table’s two role gradients, the output role’s makes "
            f"{', '.join(early)}, and {percent(arm['overall_output_share'])} over the whole run."
        )


def _intervention_sentences(results: Results) -> Iterator[str]:
    for arm, change in results["changes"].items():
        output, input_ = change["vs_output"]["orthogonal"], change["vs_input"]["orthogonal"]
        baseline = results["headline"]["arm"]
        yield (
            f"With {arm} instead of {baseline}, nearness to the output table {_moved(output)} and nearness to "
            f"the input table {_moved(input_)}."
        )


def _moved(change: Span) -> str:
    if change["mean"] is None:
        return "was not measured"
    size = spread({"mean": abs(change["mean"])} | _ends(change))
    if change["low"] is None:
        return f"{'rises' if change['mean'] > 0 else 'falls'} by {size} (one seed)"
    if change["low"] > 0:
        return f"rises by {size}"
    if change["high"] < 0:
        return f"falls by {size}"
    return f"does not measurably change ({spread(change)})"


def _ends(change: Span) -> dict[str, float | None]:
    """The ends of the interval of |x|, for an x whose interval does not contain 0."""
    if change["low"] is None:
        return {"low": None, "high": None}
    low, high = sorted((abs(change["low"]), abs(change["high"])))
    return {"low": low, "high": high}


def verdicts(results: Results) -> list[dict[str, str]]:
    """Each statement with its verdict in words and its margin."""
    rows = []
    for statement in results["statements"].values():
        if statement["holds"]:
            verdict = "holds"
        elif statement["interval"] is None:
            verdict = "open"
        elif statement["interval"][1] < 0:
            verdict = "the opposite"
        else:
            verdict = "does not hold"
        low, high = statement["interval"] or (None, None)
        span = {"mean": statement["margin"], "low": low, "high": high}
        rows.append({"claim": statement["claim"], "verdict": verdict, "margin": spread(span)})
    return rows


def alignment_groups(results: Results) -> list[dict[str, Any]]:
    """Per arm and table that it is compared with: the score, floor and corrected score of every fit."""
    groups = []
    reference = results["headline"]["reference"]
    for arm, summary in results["arms"].items():
        for role, compared in summary["alignment"].items():
            for target, fits in sorted(compared.items(), reverse=True):
                name = arm if role == "shared" else f"{arm} {role} table"
                other = f"its {target[3:]} table" if arm == reference else f"the {reference} {target[3:]} table"
                groups.append(_group(results, arm, f"{name} and {other}", fits))
    for arm, subjects in results["between_seeds"].items():
        for role, compared in subjects.items():
            for target, fits in sorted(compared.items(), reverse=True):
                name = arm if role == "shared" else f"{arm} {role} table"
                groups.append(
                    _group(results, arm, f"{name} and the {reference} {target[3:]} table of another seed", fits)
                )
    return groups


def _group(results: Results, arm: str, title: str, fits: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        {
            "fit": fit,
            "score": number(cell["score"]["mean"]),
            "floor": number(cell["floor"]["mean"]),
            "corrected": spread(cell["corrected"]),
            "held_out": number(cell["held_out"]["mean"]),
            "main": fit == results["headline"]["fit"],
        }
        for fit, cell in fits.items()
    ]
    return {"arm": arm, "title": title, "rows": rows}


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
                    "paper": number(value),
                    "paper_floor": number(closed_form_floor(fit, *published.ALIGNMENT_SHAPE)),
                    "ours": number(mine[fit]["score"]["mean"]),
                    "ours_floor": number(mine[fit]["floor"]["mean"]),
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
                        "paper": f"{number(published.SCALING[1][role])} → {number(theirs)}",
                        "ours": f"{number(ours[0])} → {number(ours[1])}",
                    }
                )
    for role, theirs in published.EVOLUTION.items():
        ends = [e for e in results["evolution"] if e["arm"] == head["reference"] and e["role"] == role]
        if ends:
            mean = sum(e["to_start"][-1] for e in ends) / len(ends)
            rows.append(
                {
                    "what": f"cosine of {head['reference']} {role} rows to step 0 (here: rows of seen tokens)",
                    "paper": f"{number(theirs)} at step {published.EVOLUTION_STEP:,}",
                    "ours": f"{number(mean)} at step {ends[0]['steps'][-1]:,}",
                }
            )
    return rows


def duration(seconds: float | None) -> str:
    """Seconds as a person reads them; a dash for none."""
    return NONE if seconds is None else text.duration(seconds)


def visible(text: str) -> str:
    """A token's text with its white space made visible."""
    return "".join({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}.get(c, c if c.isprintable() else "�") for c in text)
