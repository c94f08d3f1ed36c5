"""`tiedjax analyze INSTRUMENT ...`: one instrument, or all that apply, on tables or runs; prints, writes JSON."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from typing import Any

from tiedjax.analysis.basis import arguments
from tiedjax.analysis.instruments import INSTRUMENTS, SLOW
from tiedjax.errors import UserError
from tiedjax.files import local_path

_ALL = f"every instrument that applies to a run or a model, but not {', '.join(sorted(SLOW))}, which takes minutes"
_TEXT = ("data", "seq_len")  # the options that say which text is read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `tiedjax analyze` to `parser`."""
    parser.description = "Runs one instrument and prints its table."
    instruments = parser.add_subparsers(dest="instrument", metavar="INSTRUMENT", required=True)
    for name, module in INSTRUMENTS.items():
        _add_json(_add_instrument(instruments, name, module))
    every = instruments.add_parser("all", help=_ALL, description=_ALL)
    arguments.add_subject(every, "model")
    every.add_argument("--against", metavar="RUN", help="another, whose tables this one's are compared with")
    _add_json(every)


def run(args: argparse.Namespace) -> int:
    """Runs what `add_arguments` parsed; returns the exit status. UserError for bad input."""
    if args.json:
        local_path(args.json, "--json")
    result, text = _all(args) if args.instrument == "all" else INSTRUMENTS[args.instrument].run(args)
    if args.json:
        from tiedjax.analysis.basis.plain_json import write_json

        write_json(args.json, {"instrument": args.instrument, **result})
    print(text)
    return 0


def _add_instrument(instruments: Any, name: str, module: Any) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = instruments.add_parser(name, help=module.HELP, description=module.HELP)
    module.add_arguments(sub)
    return sub


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON")


def _all(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Every instrument with its default options; what cannot be measured is said, and does not stop the others."""
    from tiedjax.analysis.basis.blocked import few_threads

    if args.json and not os.access(os.path.dirname(args.json) or ".", os.W_OK):
        raise UserError(f"--json: {args.json}: cannot be written")  # now rather than after all the work
    runs = {args.a: arguments.open_subject(args.a, args.data, args.seq_len)}
    if args.against:
        runs[args.against] = arguments.open_subject(args.against, None, None)
    names = {place: _tables(place, run) for place, run in runs.items()}
    by_instrument: dict[str, list[Any]] = {}
    began = time.monotonic()
    with few_threads(runs[args.a].tables().input.size):
        for name, module in ((name, module) for name, module in INSTRUMENTS.items() if name not in SLOW):
            by_instrument[name] = []
            for words in _calls(module.SUBJECT, args.a, names[args.a], names.get(args.against, [])):
                result, text = _called(name, module, words, args)
                by_instrument[name].append(result)
                print(f"{text}\n", flush=True)
            if not by_instrument[name]:
                print(f"{name}: needs two tables; this run has one: give another with --against RUN\n", flush=True)
    seconds = time.monotonic() - began
    return {
        "inputs": [{"name": place} for place in runs],
        "instruments": by_instrument,
        "seconds": seconds,
    }, f"{seconds:.0f} s"


def _called(name: str, module: Any, words: list[str], args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What an instrument gives; one that reads a text reads that of `args`."""
    from tiedjax.analysis.basis.tables import names_model

    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    options = parser.parse_args(words)
    if module.SUBJECT == "model" or names_model(args.a):
        vars(options).update({option: vars(args)[option] for option in _TEXT if option in options})
    try:
        result, text = module.run(options)
    except UserError as error:
        return {"not_measured": str(error)}, f"{name}: not measured: {error}"
    return result, text


def _tables(place: str, run: Any) -> list[str]:
    """The names of a run's distinct tables."""
    from tiedjax.tying import distinct

    roles = list(distinct(run.tables()))
    return [place] if len(roles) == 1 else [f"{place}#{role}" for role in roles]


def _calls(subject: str, run: str, own: list[str], others: list[str]) -> Iterator[list[str]]:
    if subject in ("run", "model"):
        yield [run]
    elif subject == "table":
        yield from ([table] for table in own)
    elif subject == "tables":
        yield own
    else:
        if len(own) == 2:
            yield own
        yield from ([other, table] for table in own for other in others)
