"""The tables and lines of the answer page: losses, memory, widths, and what to put into the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiedjax.analysis.basis import numbers
from tiedjax.analysis.decision.verdicts import (
    TIE,
    UNDECIDED,
    UNTIL,
    Decision,
    arms_of,
    difference,
    own,
    recommended,
    verdicts,
)
from tiedjax.analysis.instruments.gradients import section as gradients
from tiedjax.analysis.study.sentences import HURDLES
from tiedjax.text import binary


def arms(decision: Decision) -> list[dict[str, str]]:
    """Every arm of the own width: its rates, parameters, held-out loss, and that loss less tied's."""
    results, tied = own(decision), arms_of(decision).tied
    rows = []
    for arm, summary in results["arms"].items():
        size = next(run["parameters"] for run in results["runs"] if run["arm"] == arm)
        steps = next(run["steps"] for run in results["runs"] if run["arm"] == arm)
        less = "–" if arm == tied else numbers.signed(vars(difference(results, arm, tied)))
        rows.append(
            {
                "arm": arm,
                "rate": f"{_best(results, arm):g}",
                "steps": f"{steps:,}",
                "parameters": f"{size:,}",
                "loss": numbers.spread(summary["eval_loss"]),
                "less_tied": less,
            }
        )
    return rows


def _best(results: Mapping[str, Any], arm: str) -> float:
    choice = results["sweep"][arm]
    (rate,) = choice["tried"][choice["best"]]["values"].values()
    return float(rate)


def hurdles(decision: Decision) -> list[dict[str, str]]:
    """Per arm of the own width: bits a byte, and bits a token less a bigram's and a trigram's of the text shown."""
    return [
        {"arm": arm} | {name: numbers.spread(summary["hurdles"][name], 2) for name in HURDLES}
        for arm, summary in own(decision)["arms"].items()
        if summary.get("hurdles")
    ]


def memory(decision: Decision) -> list[dict[str, str]]:
    """Tied and untied: bytes of weights, of the optimizer's state and the account, and at inference."""
    return [
        {"arm": arm, "parameters": f"{found['parameters']:,}"}
        | {name: binary(found[name]) for name in ("weights", "optimizer", "account", "inference")}
        for arm, found in decision["memory"].items()
    ]


def time(decision: Decision) -> str:
    """How long an untied step takes, and how many of them fit in the time of the tied run."""
    measured, steps = decision["time"], decision["config"]["train"]["steps"]
    return (
        f"A step of untied takes {measured['ratio']:.3f} times as long as one of tied on this machine, both without an "
        f"account of updates: {measured['steps']:,} of its steps take the time of {steps:,} tied ones."
    )


def common_mode(decision: Decision) -> list[str]:
    """What the output role's gradient of tied is made of at the last snapshot; empty where it was not measured."""
    arm = arms_of(decision).tied
    *_, last = [None, *(row for row in gradients.makeup(own(decision)) if row["arm"] == arm)]
    if last is None:
        return []
    return [
        f"Of the squared norm of the output role’s gradient of {arm} at step {last['step']}, the common mode, which "
        f"moves all rows alike, is {last['common']} and the rest {last['rest']}; twice their inner product makes it "
        "whole."
    ]


def widths(decision: Decision) -> list[dict[str, str]]:
    """Per width: parameters of tied, the table's share of them, its loss, and both differences to it."""
    name, rows = arms_of(decision), []
    for width in sorted(map(int, decision["results"])):
        results = decision["results"][str(width)]
        size = next(run["parameters"] for run in results["runs"] if run["arm"] == name.tied)
        table = results["study"]["config"]["model"]["vocab_size"] * width
        rows.append(
            {
                "width": str(width),
                "parameters": f"{size:,}",
                "share": f"{100 * table / size:.0f}\u00a0%",
                "loss": numbers.spread(results["arms"][name.tied]["eval_loss"]),
                "untied": numbers.signed(vars(difference(results, name.untied, name.tied))),
                "until": numbers.signed(vars(difference(results, name.until, name.tied))),
            }
        )
    return rows


def config_lines(decision: Decision) -> list[str]:
    """The YAML lines of the recommended scheme at its best rate."""
    choice, name = recommended(decision), arms_of(decision)
    arm = {TIE: name.tied, UNTIL: name.until}.get(choice, name.untied)
    lines = ["tying:", f"  scheme: {'tied' if choice in (TIE, UNTIL) else 'untied'}"]
    lines += [f"  untie_at: {decision['until']}"] if choice == UNTIL else []
    return [*lines, "optimizer:", "  tables:", f"    learning_rate: {_best(own(decision), arm):g}"]


def reason(decision: Decision) -> str:
    """Which verdict the lines follow, and where they go."""
    found, where = verdicts(decision)[0], f"the lines for {decision['name']}.yaml"
    if found.choice == UNDECIDED:
        return f"Undecided at equal width, so tie: it takes less memory, and no loss was shown; {where}:"
    return f"The verdict {found.where}; {where}:"


def command(decision: Decision) -> str:
    """The same on the command line."""
    options: list[str] = []
    sections: list[str] = []
    for line in config_lines(decision):
        depth, (key, _, value) = (len(line) - len(line.lstrip())) // 2, line.strip().partition(": ")
        sections = [*sections[:depth], key.rstrip(":")]
        options += [f"--{'.'.join(sections)} {value}"] if value else []
    return f"tiedjax train {decision['name']}.yaml --out runs/{decision['name']} {' '.join(options)}"


def rates(decision: Decision) -> str:
    """Which rate of the tables each arm of the own width had, of those that it tried."""
    results = own(decision)
    best = {arm: f"{_best(results, arm):g}" for arm in results["arms"]}
    points = next(iter(results["sweep"].values()))["tried"]
    (option,) = points[0]["values"]
    tried = ", ".join(f"{point['values'][option]:g}" for point in points)
    if len(set(best.values())) == 1:
        chosen = f"every arm is best with {next(iter(best.values()))}"
    else:
        chosen = f"best are {', '.join(f'{rate} for {arm}' for arm, rate in best.items())}"
    return (
        f"At width {decision['own']}, of {option}, {tried} were tried on {len(points[0]['losses'])} other seeds and on "
        f"the held-out windows with even numbers: {chosen}. Losses are of the odd windows."
    )


def legend(decision: Decision) -> str:
    """What the arms are."""
    name = arms_of(decision)
    said = f"{name.until} is tied until step {decision['until']:,} and has a table for each role from there on"
    trained = own(decision)["arms"]
    if name.wide in trained:
        said += f"; {name.wide} is tied, with a wider MLP, so that it has as many parameters as {name.untied}"
    if name.in_time in trained:
        said += f"; {name.in_time} trains for as long as {name.tied} does"
    said = (
        f"{said}. Differences are paired by seed. All verdicts are tested together by Holm’s method, so that chance "
        "decides any of them in at most 5 % of decisions, and ± in them is wider for that; in tables it is half of a "
        "plain 95 % interval."
    )
    if any(verdict.near_edge for verdict in verdicts(decision)):
        said += (
            " Near the edge: p is within a factor of 2 of its level, and the same decision made again could say "
            "otherwise."
        )
    return said


def not_varied(decision: Decision) -> str:
    """What the ladder holds fixed, and how much text a parameter saw."""
    config, name = decision["config"], arms_of(decision)
    tokens = config["train"]["steps"] * config["data"]["batch_size"] * config["model"]["seq_len"]
    size = decision["memory"][name.tied]["parameters"]
    return (
        f"Not varied: the text, the number of layers, the tokens shown ({tokens:,}, {tokens / size:.2f} for each "
        f"parameter of {name.tied}), the rates of the body, the standard deviation of the initial tables."
    )
