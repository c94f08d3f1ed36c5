"""Tie, untie, or tie until a step: verdicts at equal width, equal parameters and in equal time, and how far they carry.

A decision is what decision.json holds, with `results`: results.json of each rung that is done, by its width as text.
Every difference of held-out losses is paired by seed; all that a decision states are tested together by Holm's method.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tiedjax.analysis.basis import numbers
from tiedjax.analysis.basis.statistics import Interval, detectable, paired
from tiedjax.analysis.study.losses import POWER
from tiedjax.analysis.study.sentences import early_training, edge, margin_of
from tiedjax.analysis.study.verdicts import Statement, decided

Decision = Mapping[str, Any]
TIE, UNTIE, UNTIL, UNDECIDED = "tie", "untie", "until", "undecided"


@dataclass(frozen=True)
class Arms:
    """What a ladder's arms are called: tied, untied, tied until a step, tied with untied's size, untied in its time."""

    tied: str
    untied: str
    until: str
    wide: str
    in_time: str


@dataclass(frozen=True)
class Comparison:
    """Where tied, or a tied arm of another size, is held against arms that are not tied to the end.

    `says_when` is whether its sentence says what it costs to untie late: in one of them, as that is the same in all.
    """

    where: str
    tied: str
    untied: str
    until: str | None
    says_when: bool = False


@dataclass(frozen=True)
class Verdict:
    """What a comparison says is to be done, the sentences that say so, and whether other luck could change it."""

    where: str
    choice: str
    sentence: str
    near_edge: bool


def own(decision: Decision) -> Mapping[str, Any]:
    """results.json of the rung that the verdict is about."""
    rung: Mapping[str, Any] = decision["results"][str(decision["own"])]
    return rung


def arms_of(decision: Decision) -> Arms:
    """The names of its arms."""
    return Arms(**decision["arms"])


def comparisons(decision: Decision) -> list[Comparison]:
    """Those whose arms are trained. Untied has no other arm in the time of tied where a step of both takes as long."""
    name, trained = arms_of(decision), own(decision)["arms"]
    as_long = decision["time"]["steps"] == decision["config"]["train"]["steps"]
    made = [
        Comparison("at equal width and FLOPs", name.tied, name.untied, name.until, says_when=True),
        Comparison("at equal parameters", name.wide, name.untied, name.until),
        Comparison("in equal time", name.tied, name.untied if as_long else name.in_time, None),
    ]
    return [each for each in made if each.tied in trained and each.untied in trained]


def statements(decision: Decision) -> dict[str, dict[str, Any]]:
    """Every difference of held-out losses, in nats a token, with its verdict: `holds` where it is above 0.

    `A less B` of the own width, `A less B at WIDTH` of the others, and `A less B: trend`, by how much it is more at the
    largest width than at the smallest.
    """
    name, made = arms_of(decision), {}
    pairs = [(each.untied, each.tied) for each in comparisons(decision)]
    pairs += [(each.until, each.tied) for each in comparisons(decision) if each.until]
    pairs.append((name.until, name.untied))
    for first, second in dict.fromkeys(pairs):
        made[f"{first} less {second}"] = difference(own(decision), first, second)
    for first, second in _repeated(decision):
        by_width = {width: _differences(decision["results"][str(width)], first, second) for width in _widths(decision)}
        for width, differences in by_width.items():
            if width != decision["own"]:
                made[f"{first} less {second} at {width}"] = paired(differences, dict.fromkeys(differences, 0.0))
        if len(by_width) > 1:
            smallest, largest = by_width[min(by_width)], by_width[max(by_width)]
            made[f"{first} less {second}: trend"] = paired(largest, smallest)
    return decided({claim: Statement(claim, margin) for claim, margin in made.items()})


def difference(results: Mapping[str, Any], first: str, second: str) -> Interval:
    """The first arm's held-out loss less the second's, nats a token, paired by seed."""
    return paired(_losses(results, first), _losses(results, second))


def _repeated(decision: Decision) -> list[tuple[str, str]]:
    name = arms_of(decision)
    return [(name.untied, name.tied), (name.until, name.tied)]


def _losses(results: Mapping[str, Any], arm: str) -> dict[int, float | None]:
    return {run["seed"]: run["eval_loss"] for run in results["runs"] if run["arm"] == arm}


def _differences(results: Mapping[str, Any], first: str, second: str) -> dict[int, float | None]:
    a, b = _losses(results, first), _losses(results, second)
    return {seed: x - y for seed, x in a.items() if x is not None and (y := b.get(seed)) is not None}


def _widths(decision: Decision) -> list[int]:
    return sorted(int(width) for width in decision["results"])


def verdicts(decision: Decision) -> list[Verdict]:
    """One for each comparison."""
    stated = statements(decision)
    return [verdict_of(each, stated, decision["until"]) for each in comparisons(decision)]


def verdict_of(compared: Comparison, stated: Mapping[str, Any], until: int) -> Verdict:
    """What a comparison says, by the statements on its arms; `until` is the step of the arm that unties."""
    to_tied = {arm: stated[f"{arm} less {compared.tied}"] for arm in (compared.untied, compared.until) if arm}
    better = [arm for arm, said in to_tied.items() if said["verdict"] == "the opposite"]
    worse = [arm for arm, said in to_tied.items() if said["verdict"] == "holds"]
    between = stated[f"{compared.until} less {compared.untied}"] if compared.until else None
    if len(worse) == len(to_tied):
        choice, sentence = TIE, _tie(compared, to_tied)
    elif compared.until in better and (
        compared.untied not in better or (between and between["verdict"] == "the opposite")
    ):
        choice, sentence = UNTIL, _until(compared, to_tied, between, until)
    elif compared.untied in better:
        choice, sentence = UNTIE, _untie(compared, to_tied, between, until)
    else:
        choice, sentence = UNDECIDED, _undecided(compared, to_tied)
    decided_by = {UNTIE: compared.untied, UNTIL: compared.until}.get(choice)
    deciding = [to_tied[decided_by]] if decided_by else list(to_tied.values())
    if between and {compared.until, compared.untied} <= set(better):
        deciding.append(between)  # which says which of the two it is
    near = any(said["near_edge"] for said in deciding)
    said = f"{_capital(compared.where)}: {sentence}{edge({'near_edge': near})}"
    return Verdict(compared.where, choice, said, near)


def _tie(compared: Comparison, to_tied: Mapping[str, Any]) -> str:
    below = [f"{margin_of(said, absolute=True)} below that of {arm}" for arm, said in to_tied.items()]
    return f"tie. The held-out loss of {compared.tied} lies {' and '.join(below)}, in nats a token."


def _untie(compared: Comparison, to_tied: Mapping[str, Any], between: Mapping[str, Any] | None, until: int) -> str:
    gain = margin_of(to_tied[compared.untied], absolute=True)
    said = f"untie. The held-out loss of {compared.untied} lies {gain} nats a token below that of {compared.tied}."
    if between is None or not compared.says_when:
        return said
    if between["verdict"] == "undecided":
        return (
            f"{said} Whether to tie until step {until:,} first is undecided: it changes that loss by "
            f"{margin_of(between, signed=True)}."
        )
    return f"{said} Tying until step {until:,} first gives up {margin_of(between, absolute=True)} of this gain."


def _until(compared: Comparison, to_tied: Mapping[str, Any], between: Mapping[str, Any] | None, until: int) -> str:
    assert compared.until
    assert between
    gain = margin_of(to_tied[compared.until], absolute=True)
    said = (
        f"tie until step {until:,}, then untie. The held-out loss of {compared.until} lies {gain} nats a token below "
        f"that of {compared.tied}"
    )
    if between["verdict"] == "the opposite":
        return f"{said} and {margin_of(between, absolute=True)} below that of {compared.untied}."
    return (
        f"{said}. Whether {compared.untied} is better than {compared.tied} is undecided: its loss less that of "
        f"{compared.tied} is {margin_of(to_tied[compared.untied], signed=True)}."
    )


def _undecided(compared: Comparison, to_tied: Mapping[str, Any]) -> str:
    less = [f"that of {arm} is {margin_of(said, signed=True)}" for arm, said in to_tied.items()]
    first = to_tied[compared.untied]
    return (
        f"undecided. Less the held-out loss of {compared.tied}, {' and '.join(less)} nats a token. "
        f"{_reach(first) or 'One seed decides nothing.'}"
    )


def _reach(said: Mapping[str, Any]) -> str:
    """The smallest difference that so many seeds would have shown in most studies; empty without an interval."""
    if said["interval"] is None:
        return ""
    low, high = said["interval"]
    smallest = detectable(Interval(said["margin"], low, high, said["n"], 1 - said["level"]), POWER)
    return f"These {said['n']} seeds show a difference of {numbers.number(smallest)} in four studies of five."


def headline(decision: Decision) -> str:
    """The verdict of all comparisons in one sentence."""
    found = verdicts(decision)
    words = {TIE: "tie", UNTIE: "untie", UNTIL: f"tie until step {decision['until']:,}, then untie"}
    choices = {verdict.choice for verdict in found}
    *first, last = [verdict.where for verdict in found]
    everywhere = f"{', '.join(first)} and {last}" if first else last
    if choices == {UNDECIDED}:
        return f"Whether to tie is undecided {everywhere}."
    if len(choices) == 1:
        (choice,) = choices
        return f"{_capital(words[choice])}: it is better {everywhere}."
    parts = [f"{verdict.where} {words.get(verdict.choice, 'it is undecided')}" for verdict in found]
    return f"{_capital('; '.join(parts))}."


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def recommended(decision: Decision) -> str:
    """What the config lines do: the verdict at equal width; where that is undecided tie, which takes less memory."""
    choice = verdicts(decision)[0].choice
    return TIE if choice == UNDECIDED else choice


def warnings(decision: Decision) -> list[str]:
    """What limits the verdict: early training, best rates at an edge, widths that are not trained."""
    return [*early_training(own(decision)), *edges(decision), *missing(decision)]


def edges(decision: Decision) -> list[str]:
    """A sentence where the best rate of arms lies at the edge of what was tried."""
    found = _at_edge(own(decision))
    if not found:
        return []
    return [
        f"The best learning rate of {_listed(found)} lies at the edge of what was tried: a better one may lie beyond, "
        "and change the verdict."
    ]


def _at_edge(results: Mapping[str, Any]) -> list[str]:
    return [arm for arm, choice in results["sweep"].items() if choice["at_edge"]]


def missing(decision: Decision) -> list[str]:
    """A sentence where widths are not trained yet."""
    left = [width for width in decision["widths"] if str(width) not in decision["results"]]
    if not left:
        return []
    names, what = " and ".join(map(str, left)), "Widths" if len(left) > 1 else "Width"
    verb = "are" if len(left) > 1 else "is"
    them = "them" if len(left) > 1 else "it"
    return [f"{what} {names} {verb} not trained yet; run the same command again to train {them}."]


def carries(decision: Decision) -> list[str]:
    """How far the verdict carries: untied less tied at every width, its trend, and what nothing here speaks of."""
    stated, widths, name = statements(decision), _widths(decision), arms_of(decision)
    claim = f"{name.untied} less {name.tied}"
    if len(widths) < 2:
        return [f"One width, {widths[0]}, was trained: how the verdict changes with size is not known."]
    by_width = {width: stated[claim if width == decision["own"] else f"{claim} at {width}"] for width in widths}
    lower = [width for width, said in by_width.items() if said["verdict"] == "the opposite"]
    higher = [width for width, said in by_width.items() if said["verdict"] == "holds"]
    open_ = [width for width in widths if width not in (*lower, *higher)]
    clauses = [
        f"{what} at width {_listed(found)}"
        for what, found in [("lower", lower), ("higher", higher), ("undecided", open_)]
        if found
    ]
    trend = stated[f"{claim}: trend"]
    change = f"From width {widths[0]} to {widths[-1]} that difference changes by {margin_of(trend, signed=True)} nats"
    ended = " a token, undecided" if trend["verdict"] == "undecided" else " a token"
    return [
        f"The held-out loss of {name.untied} beside that of {name.tied} is {', '.join(clauses)}.",
        f"{change}{ended}.",
        *(
            f"At width {width} the best rate of {_listed(arms)} lies at the edge of what was tried."
            for width in widths
            if width != decision["own"] and (arms := _at_edge(decision["results"][str(width)]))
        ),
        f"Nothing here speaks of widths beyond {widths[-1]}, of other text, or of longer training.",
    ]


def _listed(values: Iterable[Any]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def said(decision: Decision) -> Iterator[str]:
    """The decision as the command line prints it."""
    yield headline(decision)
    yield from (verdict.sentence for verdict in verdicts(decision))
    yield from warnings(decision)
