"""A diagnosis in words: of each part what was found, its null, what it claims, and what it cannot say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tiedjax.analysis.basis import numbers
from tiedjax.analysis.basis.plain_json import from_plain
from tiedjax.analysis.basis.statistics import Interval
from tiedjax.analysis.diagnosis.measure import Diagnosis
from tiedjax.analysis.instruments.cooccurrence.cooccurrence import Cooccurrence
from tiedjax.analysis.instruments.lens.rotation import InputLens
from tiedjax.analysis.instruments.norms.norms import Norms
from tiedjax.analysis.instruments.regret.refit import BALANCED
from tiedjax.analysis.instruments.regret.regret import RunRegret
from tiedjax.analysis.instruments.rounding.rounding import BITS, Cost, Rounding


@dataclass(frozen=True)
class Part:
    """One part of the page; `not_measured` says why where there is nothing else."""

    name: str
    title: str
    claims: str
    limits: str
    found: list[str] = field(default_factory=list)
    null: list[str] = field(default_factory=list)
    not_measured: str = ""


def headline(d: Diagnosis) -> str:
    """The page's first sentence: where the shared table lies, or that there is none."""
    if not d["shared"]:
        return f"{d['name']} has a table for each role: with no tie to lose, all that follows is a control."
    if "not_measured" in d["cooccurrence"]:
        return f"{d['name']} has one table for both roles."
    return _position("shared", _agreements(d)["shared"])


def about(d: Diagnosis) -> str:
    """What was measured, on which text."""
    step = "" if d["step"] is None else f" at step {d['step']:,}"
    tables = "one table for both roles" if d["shared"] else "a table for each role"
    return f"{d['name']}{step}: {tables}, {d['rows']:,} rows of width {d['width']:,}; measured on {d['text']}."


def parts(d: Diagnosis) -> list[Part]:
    """In the order of the page."""
    made = [_cooccurrence(d), _norms(d), _lens(d), _rounding(d), _regret(d)]
    return [Part(**vars(part) | {"not_measured": d[part.name].get("not_measured", "")}) for part in made]


def lines(d: Diagnosis) -> Iterator[str]:
    """The diagnosis as the command line prints it."""
    yield about(d)
    yield headline(d)
    for part in parts(d):
        yield ""
        yield part.title
        if part.not_measured:
            yield f"  Not measured: {part.not_measured}"
            continue
        yield from (f"  {sentence}" for sentence in part.found)
        yield f"  Null: {' '.join(part.null)}"
        yield f"  It says {part.claims}."
        yield f"  It cannot say {part.limits}."


def _agreements(d: Diagnosis) -> dict[str, Cooccurrence]:
    return {role: from_plain(Cooccurrence, plain) for role, plain in d["cooccurrence"]["roles"].items()}


def _cooccurrence(d: Diagnosis) -> Part:
    found, null = [], []
    if "not_measured" not in d["cooccurrence"]:
        for role, agreement in _agreements(d).items():
            partial = agreement.partial
            assert partial
            precedes, follows = (
                _size(Interval(s.score, s.low, s.high, s.rows, 0.95)) for s in (partial.as_target, partial.as_context)
            )
            found.append(
                f"The {role} table’s cosines correlate with what precedes a token at {precedes} and with what follows "
                f"it at {follows}, each with the other held fixed."
            )
            found.append(_position(role, agreement))
            floors = [numbers.number(s.floor) for s in (partial.as_target, partial.as_context)]
            chance = max(s.floor_deviation or 0 for s in (partial.as_target, partial.as_context))
            null.append(
                f"Permuted tokens give the {role} table {floors[0]} and {floors[1]}, with a standard deviation of "
                f"{numbers.number(chance)}."
            )
        null.append(_reference(d))
    return Part(
        "cooccurrence",
        "Position: what precedes a token, or what follows it",
        "which contexts of this text the table’s cosines follow: tables that predict follow what precedes a token, "
        "tables that look up what follows it",
        "which role wrote the table, or what that costs; on other text the numbers are others",
        found,
        null,
    )


def _position(role: str, agreement: Cooccurrence) -> str:
    assert agreement.partial
    span = agreement.partial.position
    size = numbers.signed(vars(span))
    if span.low is None or span.high is None or span.low <= 0 <= span.high:
        return (
            f"Whether the {role} table agrees more with what precedes a token or with what follows it is undecided: "
            f"its position is {size}."
        )
    if span.low > 0:
        return (
            f"The {role} table agrees more with what precedes a token than with what follows it, as tables that "
            f"predict do: its position is {size}."
        )
    return (
        f"The {role} table agrees more with what follows a token than with what precedes it, as tables that look up "
        f"do: its position is {size}."
    )


def _reference(d: Diagnosis) -> str:
    known = d["references"]
    if known is None:
        sizes = " or ".join(f"{size:,}" for size in d["reference_sizes"])
        return f"There is no reference for tables of {d['rows']:,} rows: our own untied runs have {sizes}."
    input_, output = (numbers.signed(known["position"][role]) for role in ("input", "output"))
    return (
        f"Of our own untied runs with as many rows (study {known['study']}, {known['seeds']} seeds, their own text), "
        f"input tables lie at {input_} and output tables at {output}."
    )


def _norms(d: Diagnosis) -> Part:
    found, null = [], []
    for role, plain in d["norms"].get("roles", {}).items():
        norms = from_plain(Norms, plain)
        probe, rank = norms.log_frequency, norms.norm.spearman
        found.append(
            f"A linear probe reads log10 of a token’s count from the {role} table with a cross-validated R² of "
            f"{numbers.number(probe.score)}."
        )
        correlation = _size(Interval(rank.score, rank.low, rank.high, rank.rows, 0.95))
        found.append(f"The norms of its rows have a rank correlation with the counts of {correlation}.")
        null.append(
            f"Permuted counts give the {role} table’s probe {numbers.number(probe.floor)} ± "
            f"{numbers.number(probe.floor_deviation)}."
        )
    if known := d["references"]:
        input_, output = (numbers.spread(known["frequency"][role]) for role in ("input", "output"))
        null.append(
            f"The probe reads {input_} from the input tables of our own untied runs, {output} from the output tables."
        )
    return Part(
        "norms",
        "Frequency: a direction of the table",
        "how much of a token’s frequency in this text a linear direction of the table holds",
        "which role put it there: the tables of untied models hold some of it too",
        found,
        null,
    )


def _lens(d: Diagnosis) -> Part:
    found, null = [], []
    if "not_measured" not in d["lens"]:
        lens = from_plain(InputLens, d["lens"])
        ce, less = lens.cross_entropy, lens.less_rotated
        whole = Interval(ce.score, ce.low, ce.high, lens.held_out_windows, 0.95)
        found = [
            f"Read by the output table, looked-up vectors predict the next token at {_size(whole)} bits; the whole "
            f"model takes {_size(lens.final)}.",
            _against_rotations(less, ce.floor_deviation or 0),
        ]
        null = [
            f"{ce.floor_draws} random rotations of the output table’s columns give {numbers.number(ce.floor)} bits, "
            f"with a standard deviation of {numbers.number(ce.floor_deviation)}."
        ]
    return Part(
        "lens",
        "Layer 0: what looked-up vectors predict",
        "whether looked-up vectors and output rows lie in one space, and whether that helps to predict the next token",
        "what any later layer holds, or what the model would do with another table",
        found,
        null,
    )


def _against_rotations(less: Interval, deviation: float) -> str:
    size = _size(less, absolute=True)
    if not less.excludes_zero or abs(less.mean or 0) < 2 * deviation:
        return f"Whether rotated output tables predict otherwise is undecided: the difference is {_size(less)} bits."
    if (less.mean or 0) < 0:
        return f"Rotated output tables take {size} bits more: the tables share directions that help."
    return f"Rotated output tables take {size} bits less: the tables share directions, but not towards the next token."


def _rounding(d: Diagnosis) -> Part:
    found, null = [], []
    if "not_measured" not in d["rounding"]:
        rounding = from_plain(Rounding, d["rounding"])
        by_use = {(cost.bits, cost.use): cost for cost in rounding.costs}
        for bits in BITS:
            of_input, of_output, both = (by_use[bits, use] for use in ("input", "output", "both"))
            found.append(
                f"At {bits} bits the lookup’s rows cost {_cost(of_input)} nats a held-out token, the prediction’s rows "
                f"{_cost(of_output)}, and both {_cost(both)}."
            )
            floors = [numbers.number(cost.cost.floor, 4) for cost in (of_input, of_output, both)]
            null.append(
                f"Noise of the same norm in every row costs {floors[0]}, {floors[1]} and {floors[2]} at {bits} bits."
            )
    return Part(
        "rounding",
        "Rounding: what fewer bits cost each role",
        "how much precision each use of the table needs, with the body as it is",
        "what a scheme of quantisation that is fitted would cost, or that the tie is the cause",
        found,
        null,
    )


def _cost(cost: Cost) -> str:
    span = cost.cost
    return numbers.spread({"mean": span.score, "low": span.low, "high": span.high}, 4)


def _regret(d: Diagnosis) -> Part:
    found, null = [], []
    if "not_measured" not in d["regret"]:
        regret = from_plain(RunRegret, d["regret"])
        found, null = list(_regrets(regret)), [_control(d, regret)]
    return Part(
        "regret",
        "Role regret: what a table of its own would save each role",
        "what untying is worth to the finished body on this much text, once the tables are re-fitted",
        "what training untied from the start would have cost: the body has grown to its table",
        found,
        null,
    )


def _regrets(regret: RunRegret) -> Iterator[str]:
    tables = "the shared table" if regret.shared else "both tables"
    if not regret.own.converged:
        unbalanced = regret.balance is not None and regret.balance > BALANCED
        why = f"balance {numbers.number(regret.balance)}, above {numbers.number(BALANCED, 1)}" if unbalanced else "loss"
        yield f"The re-fit of {tables} has not come to rest ({why}): there is neither regret nor tension."
        return
    if not regret.converged:
        yield "A later re-fit has not come to rest: there is neither regret nor tension."
        return
    of = {name: saving.held_out for name, saving in regret.regrets.items()}
    yield f"Re-fitting {tables} saves {_size(regret.own.held_out)} nats a held-out token: what training left undone."
    if not regret.shared:
        yield (
            f"From there another re-fit of both saves {_size(of['both'])}: the control, for there is no tie to lose."
        )
        return
    yield _tension(of["both"])
    yield f"An output table alone saves {_size(of['output'])} nats, an input table alone {_size(of['input'])}."
    trained, balance = (numbers.number(value) for value in (regret.trained_balance, regret.balance))
    yield f"The cosine of the two roles’ gradients is {trained} as trained and {balance} after the first re-fit."


def _tension(both: Interval) -> str:
    if not both.excludes_zero:
        return f"Whether a table for each role then saves anything is undecided: {_size(both)} nats a held-out token."
    if (both.mean or 0) < 0:
        return f"With a table for each role a held-out token then costs {_size(both, absolute=True)} nats more."
    return f"With a table for each role a held-out token then costs {_size(both)} nats less: the tension of the roles."


def _control(d: Diagnosis, regret: RunRegret) -> str:
    known: Any = d["references"] and d["references"]["regret"]
    if not known or any(known[name] != getattr(regret, name) for name in ("fitting_tokens", "held_out_tokens")):
        return (
            "Its null is an untied model, which has no tie to lose; we have none with as many rows, on as many tokens."
        )
    return (
        f"Our own untied runs with as many rows, which have no tie to lose, save {numbers.spread(known)} nats by the "
        f"same re-fits ({known['n']} seeds)."
    )


def _size(span: Interval, *, absolute: bool = False) -> str:
    words = numbers.spread(vars(span))
    return words.removeprefix("−") if absolute else words
