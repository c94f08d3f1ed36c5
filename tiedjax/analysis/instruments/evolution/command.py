"""`tiedjax analyze evolution RUN`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tiedjax.analysis.basis import arguments

if TYPE_CHECKING:
    from tiedjax.analysis.instruments.evolution.evolution import Evolution

HELP = "how far the tables moved from step 0 and between snapshots"
SUBJECT = "run"
READS = "tables saved over training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and the options."""
    arguments.add_subject(parser, SUBJECT)
    arguments.add_paper(parser, "uncentred rows against step 0, all rows")
    arguments.add_count(parser, "--draws", 1, "row permutations for the floor of the rotation-free form")
    arguments.add_all_rows(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    from tiedjax.analysis.basis.plain_json import to_plain
    from tiedjax.tying import distinct

    draws = arguments.at_least(args, "draws")
    run = arguments.open_trained(args.a, "evolution", READS)
    corrected, paper = _followed(run, args, draws)
    last = run.tables(run.snapshot_steps[-1])
    roles = distinct(last)
    first = (paper if args.paper else corrected)[next(iter(roles))]
    description = arguments.described_roles(args.a, roles)
    result = arguments.run_result(args, run, description, first.rows, first.width, len(last.input) - first.rows)
    published = {role: _published(evolution) for role, evolution in paper.items()}
    if args.paper:
        result["roles"] = published
        lines = [[role, str(step), e.to_start[i], e.floor[i]] for role, e in paper.items() for i, step in _steps(e)]
        body = arguments.text_table(["table", "step", "to step 0", "floor"], lines)
    else:
        result |= {"roles": to_plain(corrected), "paper": {"rows": len(last.input), "roles": published}}
        body = _text(corrected, paper)
    form = "; paper's form: all rows as they are" if args.paper else ""
    subject = f"{args.a}, mean cosine of rows to earlier snapshots{form}"
    head = arguments.heading(subject, result["rows"], result["rows_masked_out"], first.width)
    return result, f"{head}\n{body}"


def _followed(run: Any, args: argparse.Namespace, draws: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evolution by role: over the counting rows with strata and without rotation, and of all rows as they are."""
    from tiedjax.analysis.basis.strata import strata
    from tiedjax.analysis.basis.tables import seen_rows
    from tiedjax.analysis.instruments.evolution.evolution import Trail
    from tiedjax.errors import UserError
    from tiedjax.tying import as_roles, distinct

    steps = run.snapshot_steps
    if not steps:
        raise UserError(f"{args.a}: holds no snapshot of its tables")
    roles = list(distinct(run.tables(steps[-1])))
    rows = None if args.all_rows else seen_rows(run.token_counts)
    corrected: dict[str, Trail] = {}
    paper: dict[str, Trail] = {}
    report = arguments.reporter("evolution")
    for i, step in enumerate(steps):
        for role, table in as_roles(run.tables(step), roles).items():
            paper.setdefault(role, Trail(draws=0)).add(step, table)
            if not args.paper:
                with_strata = Trail(rows, strata=strata(run.token_counts), draws=draws)
                corrected.setdefault(role, with_strata).add(step, table)
        report(f"{i + 1} of {len(steps)} snapshots")
    return {role: trail.result() for role, trail in corrected.items()}, {
        role: trail.result() for role, trail in paper.items()
    }


def _published(evolution: Evolution) -> dict[str, Any]:
    return {name: getattr(evolution, name) for name in ("steps", "to_start", "floor", "floor_standard_error")}


def _steps(evolution: Evolution) -> list[tuple[int, int]]:
    return list(enumerate(evolution.steps))


def _text(corrected: dict[str, Any], paper: dict[str, Any]) -> str:
    """Every snapshot's cosines, and those of the strata to step 0."""
    names = ["table", "step", "to step 0", "floor", "paper", "to previous", "rotation-free", "floor", "corrected"]
    lines = []
    for role, evolution in corrected.items():
        for i, step in _steps(evolution):
            rotation_free = [getattr(evolution.rotation_free, name)[i] for name in ("to_start", "floor", "corrected")]
            lines.append(
                [
                    role,
                    str(step),
                    evolution.to_start[i],
                    evolution.floor[i],
                    paper[role].to_start[i],
                    evolution.to_previous[i],
                    *rotation_free,
                ]
            )
    strata = list(dict.fromkeys(name for evolution in corrected.values() for name in evolution.strata))
    by_stratum = [
        [role, str(step), *(evolution.strata[name].to_start[i] for name in strata)]
        for role, evolution in corrected.items()
        for i, step in _steps(evolution)
    ]
    return (
        f"{arguments.text_table(names, lines)}\n"
        "to step 0, to previous: rows as they are; paper: all rows; rotation-free: centred, after the best rotation "
        "onto step 0; floors: other rows of the same tables\n\nto step 0 by frequency of the token\n"
        f"{arguments.text_table(['table', 'step', *strata], by_stratum)}"
    )
