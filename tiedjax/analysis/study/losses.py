"""Tied against untied in held-out loss, in words and rows: who predicts better, by how much, and at what cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from tiedjax.analysis.basis import numbers
from tiedjax.analysis.basis.statistics import Interval, detectable
from tiedjax.analysis.study.sentences import edge, margin_of

Results = Mapping[str, Any]
POWER = 0.8  # of a difference that is said to be within reach


def verdicts(results: Results) -> list[str]:
    """Whether tied or untied has the lower held-out loss, alike in width; then arms of equal parameters or FLOPs."""
    head, unit = results["headline"], _unit(results)
    flops = [_means(results, arm)["flops"] for arm in (head["arm"], head["reference"])]
    alike = " and FLOPs" if flops[0] is not None and flops[0] == flops[1] else ""
    pairs = [(f"At equal width{alike}", head["reference"], head["arm"], f"{head['reference']}_costs_loss")]
    made = {name: results["study"].get(f"equal_{name.lower()}", ()) for name in ("parameters", "FLOPs")}
    for arm in dict.fromkeys(itertools.chain(*made.values())):
        where = f"At equal {' and '.join(name for name, arms in made.items() if arm in arms)}"
        pairs.append((where, arm, head["reference"], f"{arm}_against_{head['reference']}"))
    return [
        _verdict(where, first, second, results["statements"][name], unit) + _cost(results, first, second)
        for where, first, second, name in pairs
        if name in results["statements"]
    ]


def _unit(results: Results) -> Callable[[float], str]:
    """From a difference to its unit, with what it is in bits a byte where that is known."""
    summary = results["arms"].get(results["headline"]["arm"], {})
    per_byte = summary.get("hurdles", {}).get("bits_per_byte", {}).get("mean")
    if per_byte is None or not summary["eval_loss"]["mean"]:
        return lambda difference: "nats a token"
    bits_per_byte = per_byte / summary["eval_loss"]["mean"]  # of a nat a token
    return lambda difference: f"nats a token ({numbers.number(difference * bits_per_byte)} bits a byte)"


def _verdict(where: str, first: str, second: str, statement: Mapping[str, Any], unit_of: Callable[[float], str]) -> str:
    """About a statement whose margin is the first arm's loss less the second's."""
    margin, gap = statement["margin"], margin_of(statement, absolute=True)
    better, worse = (first, second) if margin < 0 else (second, first)
    if statement["interval"] is None:
        unit = unit_of(abs(margin))
        return f"{where} the held-out loss of {better} is {gap} {unit} below that of {worse} (one seed)."
    if statement["verdict"] == "undecided":
        return (
            f"{where} it is undecided which predicts better: the held-out loss of {first} less that of {second} is "
            f"{margin_of(statement, signed=True)} {unit_of(margin)}. {_reach(statement)}{edge(statement)}"
        )
    return (
        f"{where} {better} predicts better than {worse}: its held-out loss is {gap} {unit_of(abs(margin))} lower. "
        f"{_reach(statement)}{edge(statement)}"
    )


def _cost(results: Results, first: str, second: str) -> str:
    """The first arm's FLOPs beside the second's; empty where either is not known. Times differ from study to study."""
    ratio = _ratio(*(_means(results, arm)["flops"] for arm in (first, second)))
    return "" if ratio == numbers.NONE else f" It takes {ratio} times the FLOPs of {second} to train {first}."


def _reach(statement: Mapping[str, Any]) -> str:
    """The smallest difference that so many seeds would have shown in most studies."""
    low, high = statement["interval"]
    span = Interval(statement["margin"], low, high, statement["n"], 1 - statement["level"])
    smallest = numbers.number(detectable(span, POWER))
    return f"These {statement['n']} seeds show a difference of {smallest} in four studies of five."


def sweeps(results: Results) -> list[str]:
    """What each arm's sweep chose, and where the best lies at an edge; that all arms share their rates without one."""
    if not results.get("sweep"):
        return ["No rate was swept; with each arm at its own best rates the comparison may come out otherwise."]
    seeds = {len(point["losses"]) for choice in results["sweep"].values() for point in choice["tried"]}
    others = [arm for arm in results["arms"] if arm not in results["sweep"]]
    sentences = [
        f"{', '.join(results['sweep'])}: each has the options that were best for it on {max(seeds)} other "
        f"{'seed' if max(seeds) == 1 else 'seeds'} and on the held-out windows with even numbers; all losses here are "
        "of the odd ones."
    ]
    if others:
        sentences.append(f"{', '.join(others)}: not swept.")
    for arm, choice in results["sweep"].items():
        best = choice["tried"][choice["best"]]["values"]
        chosen = " and ".join(f"{option} {_value(value)}" for option, value in best.items())
        edges = [f"{option} lies at the edge of what was tried" for option in choice["at_edge"]]
        tail = f": {' and '.join(edges)}, so that a better one may lie beyond" if edges else ""
        sentences.append(f"Of {len(choice['tried'])} points {arm} is best with {chosen}{tail}.")
    return sentences


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def missing(results: Results) -> str:
    """That runs are missing, and which; empty where none is."""
    names = results.get("missing", [])
    if not names:
        return ""
    whole = len(results["runs"]) + len(names)
    return (
        f"Not finished: {len(results['runs'])} of {whole} runs are trained. Missing are {', '.join(names)}; the same "
        "command trains them without --time-limit and --analyse-only."
    )


def cost_columns(results: Results) -> list[str]:
    """What the columns of `cost_rows` are called."""
    baseline = results["headline"]["arm"]
    columns = ["Arm", "Parameters", f"FLOPs, times {baseline}’s", f"Training time, times {baseline}’s"]
    if _second(results):
        texts = {arm["second_source"] for arm in results["arms"].values() if arm["second_source"]}
        columns.append(f"Loss on {texts.pop() if len(texts) == 1 else 'the second text'}, nats a token")
    return columns


def cost_rows(results: Results) -> list[list[str]]:
    """Per arm what it costs: parameters, FLOPs and time beside the baseline's; its loss on a second text, if any."""
    baseline = _means(results, results["headline"]["arm"])
    rows = []
    for arm, summary in results["arms"].items():
        own = _means(results, arm)
        ratios = [_ratio(own[name], baseline[name]) for name in ("flops", "training_seconds")]
        parameters = numbers.NONE if own["parameters"] is None else f"{own['parameters']:,.0f}"
        row = [arm, parameters, *ratios]
        rows.append([*row, numbers.spread(summary["second_eval_loss"])] if _second(results) else row)
    return rows


def _ratio(value: float | None, one: float | None) -> str:
    return numbers.NONE if value is None or not one else f"{value / one:.2f}"


def _second(results: Results) -> bool:
    return any(summary.get("second_eval_loss", {}).get("mean") is not None for summary in results["arms"].values())


def _means(results: Results, arm: str) -> dict[str, float | None]:
    """Of the arm's runs; None for what is not known of one of them."""
    runs = [run | _flops(run) for run in results["runs"] if run["arm"] == arm]
    means: dict[str, float | None] = {}
    for name in ("parameters", "flops", "training_seconds"):
        values = [run.get(name) for run in runs]
        means[name] = None if not values or None in values else sum(values) / len(values)
    return means


def _flops(run: Mapping[str, Any]) -> dict[str, float]:
    """The model's over a run's whole training, where they are known."""
    return {"flops": run["flops_per_token"] * run["tokens"]} if run.get("flops_per_token") else {}
