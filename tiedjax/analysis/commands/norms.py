"""`tiedjax analyze norms TABLE`."""

from __future__ import annotations

import argparse
from typing import Any

from tiedjax.analysis.commands import shared
from tiedjax.errors import UserError

HELP = "row norm against token frequency"
SUBJECT = "table"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TABLE and the options."""
    shared.add_table(parser)
    shared.add_counts(parser)
    shared.add_all_rows(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    import numpy as np

    from tiedjax.analysis.norms import norms_by_count
    from tiedjax.analysis.records import to_plain
    from tiedjax.analysis.tables import read_table, seen_rows

    table = read_table(args.a)
    counts = shared.counts_of(args, table)
    if counts is None:
        raise UserError(f"{args.a}: no token counts are known for it; give them with --counts FILE.npy")
    count = counts[-1]  # as target
    rows = np.ones(len(count), bool) if args.all_rows else seen_rows(counts)
    found = norms_by_count(table.values[rows], count[rows])
    result = {
        "inputs": [table.describe()],
        "rows": found.rows,
        "width": table.values.shape[1],
        "counts": "as target",
        **to_plain(found),
    }
    lines = [
        [f"{b.low:.1f}-{b.high:.1f}" if b.high else "never", b.rows, b.mean, b.quantile_25, b.median, b.quantile_75]
        for b in found.bins
    ]
    body = shared.text_table(["log10(count + 1)", "rows", "mean", "25%", "median", "75%"], lines)
    rank = shared.cell(found.spearman)
    error = shared.cell(found.floor_standard_error)
    return result, (
        f"{table.name}: L2 norm of {found.rows} rows against their counts as target\n{body}\n"
        f"Spearman {rank} over {found.seen_rows} seen rows; by chance 0 +- {error}"
    )
