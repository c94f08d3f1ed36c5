"""`tiedjax analyze gradients RUN`."""

from __future__ import annotations

import argparse
from typing import Any

from tiedjax.analysis.commands import shared

HELP = "share of the table's gradient from each role over the steps"
SUBJECT = "run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN."""
    shared.add_run(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    from tiedjax.analysis.gradients import gradient_flow
    from tiedjax.analysis.records import to_plain
    from tiedjax.analysis.tables import content_hash, open_run

    run = open_run(args.a)
    flow = gradient_flow(run.metrics)
    tables = run.tables()
    rows, width = tables.input.shape
    inputs = [{"name": args.a, "sha256": content_hash(tables.input), "rows": rows, "width": width}]
    result = {"inputs": inputs, "rows": rows, "width": width, **to_plain(flow), "cosine_floor": 0.0}
    table = shared.text_table(
        ["steps", "logged", "output share", "cosine"],
        [[f"{w.first}-{w.last}", w.logged_steps, w.output_share, w.cosine] for w in [*flow.windows, flow.overall]],
    )
    return result, (
        f"{args.a}: role gradients of the [{rows}, {width}] table, share of L2 norms output / (input + output)\n"
        f"{table}\n"
        "a share of 0.5 is balance; the cosine between unrelated gradients is 0"
    )
