"""`tiedjax analyze evolution RUN`."""

from __future__ import annotations

import argparse
from typing import Any

from tiedjax.analysis.commands import shared

HELP = "how far the tables moved from step 0 and between snapshots"
SUBJECT = "run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and the options."""
    shared.add_run(parser)
    shared.add_all_rows(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    from tiedjax.analysis.evolution import evolution
    from tiedjax.analysis.records import to_plain
    from tiedjax.analysis.tables import content_hash, open_run, seen_rows

    run = open_run(args.a)
    last = run.tables(run.snapshot_steps[-1])
    rows = None if args.all_rows else seen_rows(run.token_counts)
    roles = {"shared": "input"} if last.tied else {"input": "input", "output": "output"}
    found = {
        role: evolution(((s, getattr(run.tables(s), field)) for s in run.snapshot_steps), rows)
        for role, field in roles.items()
    }
    inputs = [
        {"name": args.a, "role": role, "sha256": content_hash(getattr(last, field))} for role, field in roles.items()
    ]
    count, width = last.input.shape
    result = {
        "inputs": inputs,
        "rows": count if rows is None else int(rows.sum()),
        "width": width,
        "roles": to_plain(found),
    }
    lines = [
        [role, str(step), e.to_start[i], e.to_previous[i], e.floor[i]]
        for role, e in found.items()
        for i, step in enumerate(e.steps)
    ]
    table = shared.text_table(["table", "step", "to step 0", "to previous", "floor"], lines)
    return (
        result,
        f"{args.a}: mean cosine of rows to earlier snapshots, {result['rows']} rows, width {width}\n{table}",
    )
