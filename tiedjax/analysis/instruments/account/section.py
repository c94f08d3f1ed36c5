"""The account: who wrote each shared table, when, and what that did to the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from tiedjax.analysis.basis import drawing, numbers, plain_json
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.statistics import interval
from tiedjax.analysis.basis.strata import STRATA
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.instruments.account.account import CHANGES, LossChange, RunAccount, Shares, measure
from tiedjax.analysis.instruments.account.reading import PARTS, Reading, parts_of
from tiedjax.config import REGULARISERS
from tiedjax.errors import UserError
from tiedjax.tying import SHARED, Tables

VERSION = 2  # of its part of results.json
NAMES = {
    "initial": "initial table",
    "input": "input role",
    "output": "output role",
    **{name: f"{name} regulariser" for name in REGULARISERS},
}
_FILL = {
    "initial": drawing.GRID,
    "input": drawing.LIGHT[5],
    "output": drawing.LIGHT[1],
    **{name: drawing.LIGHT[i] for name, i in zip(REGULARISERS, (2, 3, 4, 0), strict=True)},
}


def collect(study: StudyRuns) -> list[dict[str, Any]]:
    """The account of every run whose roles share an array; beside that of a shared table the tables of its twin."""
    records = []
    for (arm, seed), tables in study.last.items():
        shared = [table.role for table in tables] == [SHARED]
        run = tables[0].run
        if not shared and not run.scheme(run.snapshot_steps[-1]).followed:
            continue
        found = {"arm": arm, "seed": seed}
        twin = study.last.get((study.study.reference, seed), []) if shared else []
        alike = len(twin) == 2 and all(table.values.shape == tables[0].values.shape for table in twin)
        try:
            account = measure(run, twin=Tables(*(table.values for table in twin)) if alike else None)
            if not shared and not account.tables:
                raise UserError(f"{run.name}: its account is of a sample of rows, from which no table can be made")
            records.append(found | to_plain(account))
        except UserError as error:
            records.append(found | {"not_measured": str(error)})
    return records


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figure; none where no run has an account."""
    accounts = [account for accounts in _by_arm(results).values() for account in accounts]
    if accounts:
        logged = any(value is not None for account in accounts for value in account.curve.in_in)
        yield drawing.Plot("account", [_draw_shares, *(_changes(reader) for reader in ("in", "out") if logged)])


def not_measured(results: drawing.Results) -> list[str]:
    """What could not be measured, and why."""
    return plain_json.not_measured(results["account"])


def why(results: drawing.Results) -> list[str]:
    """Two sentences on the baseline arm, for the first screen too: who wrote its table, and what that does to loss."""
    arm = results["headline"]["arm"]
    accounts = _by_arm(results).get(arm)
    return [_wrote(arm, accounts), _lookups_loss(arm, accounts)] if accounts else []


def others(results: drawing.Results) -> list[str]:
    """The same two of every other arm with a shared table."""
    baseline = results["headline"]["arm"]
    return [
        sentence
        for arm, accounts in _by_arm(results).items()
        if arm != baseline
        for sentence in (_wrote(arm, accounts), _lookups_loss(arm, accounts))
    ]


def when(results: drawing.Results) -> list[str]:
    """One sentence for each arm: how much of the table the first tenth of the steps wrote, beside its rates."""
    return [
        f"The first {accounts[0].early.last:,} steps wrote "
        f"{_percent([a.early.written for a in accounts])} of the final {arm} table; they have "
        f"{_percent([a.early.rate for a in accounts], digits=0)} of the summed learning rate."
        for arm, accounts in _by_arm(results).items()
    ]


def shares(results: drawing.Results) -> list[dict[str, Any]]:
    """Per arm and stratum of token frequency: the shares, over seeds; "–" for a regulariser that it lacks."""
    return [
        {"arm": arm, "tokens": name, "first": name == "all"}
        | {part: drawing.spread(parts_of(each).get(part) for each in of_seeds) for part in (*PARTS, *REGULARISERS)}
        for arm, accounts in _by_arm(results).items()
        for name, of_seeds in _strata(accounts).items()
    ]


def changes(results: drawing.Results) -> list[dict[str, Any]]:
    """Per arm and stretch of steps: M, decay, regularisers and the body in thousandths of a nat a token, over seeds."""
    lines: list[dict[str, Any]] = []
    for arm, accounts in _by_arm(results).items():
        for i, span in enumerate(accounts[0].changes):
            of_seeds = [account.changes[i] for account in accounts]
            cells = {
                name: drawing.spread((_thousandths(getattr(each, name)) for each in of_seeds), 2)
                for name in (*CHANGES, "decay", "body")
            } | {
                name: drawing.spread((_thousandths(each.regularisers.get(name)) for each in of_seeds), 2)
                for name in REGULARISERS
            }
            lines.append({"arm": arm, "steps": f"{span.first + 1:,}–{span.last:,}", "first": i == 0} | cells)
    return lines


def regularisers(results: drawing.Results) -> list[str]:
    """The names of those that wrote some arm's table."""
    return _regularisers(account for accounts in _all(results).values() for account in accounts)


def updates(results: drawing.Results) -> list[dict[str, str]]:
    """Per arm, over all steps: the output role's share of updates, their cosine, the input role's share of the second
    moment, the share of steps whose gradient was clipped."""
    names = ("output_update_share", "cosine", "input_step_share", "clipped")
    return [
        {"arm": arm} | {name: drawing.spread(getattr(a.changes[-1], name) for a in accounts) for name in names}
        for arm, accounts in _by_arm(results).items()
    ]


def nearness(results: drawing.Results) -> list[dict[str, str]]:
    """Per arm: what each role wrote beside the twin's two tables, corrected for frequency, over seeds."""
    return [
        {"arm": arm}
        | {name: drawing.spread(a.nearness[name].corrected for a in accounts) for name in accounts[0].nearness}
        for arm, accounts in _by_arm(results).items()
        if all(account.nearness for account in accounts)
    ]


def carried(results: drawing.Results) -> list[str]:
    """A sentence for each arm whose roles share an array but read different tables: who wrote these."""
    return [
        f"The output role wrote {_percent(_shares_of(accounts, 'input', 'output'))} of {arm}’s lookup table and "
        f"{_percent(_shares_of(accounts, 'output', 'output'))} of its output table."
        for arm, accounts in _between(results).items()
    ]


def readers(results: drawing.Results) -> list[dict[str, Any]]:
    """Per such arm and table: the shares of its writers, and the remainder, over seeds."""
    names = (*PARTS, *REGULARISERS, "remainder")
    return [
        {"arm": arm, "table": {"input": "lookup", "output": "output"}[role], "first": role == "input"}
        | {name: drawing.spread(_shares_of(accounts, role, name)) for name in names}
        for arm, accounts in _between(results).items()
        for role in ("input", "output")
    ]


def _shares_of(accounts: list[RunAccount], role: str, name: str) -> list[Any]:
    readings: list[Reading] = [account.tables[role].whole for account in accounts]
    return [(parts_of(reading) | {"remainder": reading.remainder}).get(name) for reading in readings]


def _by_arm(results: drawing.Results) -> dict[str, list[RunAccount]]:
    """Of runs with one table for both roles."""
    return {arm: accounts for arm, accounts in _all(results).items() if not accounts[0].tables}


def _between(results: drawing.Results) -> dict[str, list[RunAccount]]:
    """Of runs whose roles read different tables that share an array."""
    return {arm: accounts for arm, accounts in _all(results).items() if all(account.tables for account in accounts)}


def _all(results: drawing.Results) -> dict[str, list[RunAccount]]:
    return drawing.by_run(plain_json.measured(results["account"], RunAccount))


def _strata(accounts: list[RunAccount]) -> dict[str, list[Shares]]:
    """All tokens, then each stratum that every seed has."""
    names = [name for name in STRATA if all(name in account.strata for account in accounts)]
    return {"all": [a.shares for a in accounts]} | {name: [a.strata[name] for a in accounts] for name in names}


def _regularisers(accounts: Iterable[RunAccount]) -> list[str]:
    on = {name for account in accounts for name in account.shares.regularisers}
    return [name for name in REGULARISERS if name in on]


def _wrote(arm: str, accounts: list[RunAccount]) -> str:
    output, first, start = (
        _percent([getattr(a.shares, part) for a in accounts]) for part in ("output", "input", "initial")
    )
    others = [
        f" The {name} regulariser wrote {_percent([a.shares.regularisers[name] for a in accounts])}."
        for name in _regularisers(accounts)
    ]
    return (
        f"The output role wrote {output} of the final {arm} table and the input role {first}; "
        f"{start} is left of the initial one.{''.join(others)}"
    )


def _lookups_loss(arm: str, accounts: list[RunAccount]) -> str:
    overall: list[LossChange] = [account.changes[-1] for account in accounts]
    span = vars(interval(_thousandths(change.in_out) for change in overall))
    own = drawing.spread((_thousandths(change.in_in) for change in overall), 2)
    size = numbers.spread(span, 2)
    if span["mean"] is None:
        return f"What the updates of {arm} did to the next batch’s loss was not logged."
    ended = f"The input role’s change it by {own}."
    if span["low"] is not None and span["low"] <= 0 <= span["high"]:
        return (
            f"Whether the output role’s updates of {arm} help or harm the lookup is undecided: through it they change "
            f"the next batch’s loss by {size} thousandths of a nat each. {ended}"
        )
    way, verb = ("harm", "raise") if span["mean"] > 0 else ("help", "lower")
    return (
        f"The output role’s updates of {arm} {way} the lookup: through it they {verb} the next batch’s loss by "
        f"{size.removeprefix('−')} thousandths of a nat each. {ended}"
    )


def _percent(values: list[float], digits: int = 1) -> str:
    scaled = vars(interval(100 * value for value in values))
    return f"{numbers.spread(scaled, digits)}\u00a0%"


def _thousandths(value: float | None) -> float | None:
    return None if value is None else 1000 * value


def _draw_shares(ax: drawing.Axes, results: drawing.Results) -> None:
    """One bar for each arm and stratum: what is left of the initial table, then what each role wrote."""
    bars = [(arm, name, each) for arm, accounts in _by_arm(results).items() for name, each in _strata(accounts).items()]
    left, places = np.zeros(len(bars)), np.arange(len(bars))
    for part in (*PARTS, *regularisers(results)):
        widths = np.array([np.mean([parts_of(shares).get(part, 0.0) for shares in each]) for _, _, each in bars])
        ax.barh(places, widths, left=left, color=_FILL[part], label=NAMES[part])
        left += widths
    ax.set_yticks(places, [arm if name == "all" else name for arm, name, _ in bars])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlim(min(0.0, left.min()), 1)
    ax.set_xlabel("share of the squared norm of the table")
    ax.set_title("who wrote the table")


def _changes(reader: str) -> Callable[[drawing.Axes, drawing.Results], None]:
    """M through one role's use, by what each role wrote, over training: the baseline arm, mean over seeds."""

    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        arm = results["headline"]["arm"]
        for writer in PARTS[1:]:
            name = f"{reader}_{writer.removesuffix('put')}"
            binned = [
                drawing.log_binned(np.array(a.curve.steps), 1000 * drawing.floats(getattr(a.curve, name)))
                for a in _by_arm(results).get(arm, [])
            ]
            if binned and len(steps := binned[0][0]):
                mean = np.mean([values for _, values in binned if len(values) == len(steps)], axis=0)
                ax.plot(steps, mean, color=_FILL[writer], label=NAMES[writer])
        ax.axhline(0, color=drawing.MUTED, linestyle=drawing.DASHES, linewidth=1.2)
        drawing.log_steps(ax)
        ax.set_yscale("symlog", linthresh=0.1, linscale=0.3)
        ax.yaxis.set_major_formatter(drawing.plain_ticks)
        ax.set_ylabel("thousandths of a nat an update")
        ax.set_title(f"{arm}’s loss through the {'lookup' if reader == 'in' else 'prediction'}")

    return draw
