"""`tiedjax analyze align A B`."""

from __future__ import annotations

import argparse
from typing import Any

from tiedjax.analysis.commands import shared

HELP = "mean cosine of two tables' rows under three maps, with floors"
SUBJECT = "pair"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A, B and the options."""
    shared.add_pair(parser)
    shared.add_paper(parser, "all rows, uncorrected")
    parser.add_argument(
        "--fit", action="append", metavar="FIT", help="identity, orthogonal or linear; repeatable (default: all)"
    )
    shared.add_count(parser, "--draws", 5, "row permutations for the floor")
    shared.add_all_rows(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    from tiedjax.analysis.align import FITS, align

    draws = shared.at_least(args, "draws")
    a, b = shared.read_pair(args)
    rows = shared.counting_rows(args, a, b)
    found = align(a.values, b.values, fits=args.fit or FITS, rows=rows, draws=draws)
    scores = {fit: vars(score).copy() for fit, score in found.scores.items()}
    if args.paper:
        for score in scores.values():
            del score["corrected"]
    result = {
        "inputs": [a.describe(), b.describe()],
        "form": "paper" if args.paper else "corrected",
        "rows": found.rows,
        "rows_masked_out": len(a.values) - found.rows,
        "width": found.width,
        "target_width": found.target_width,
        "centred": True,
        "fits": scores,
    }
    columns = ["score", "floor", "floor_standard_error", "floor_closed_form", *([] if args.paper else ["corrected"])]
    columns.append("rows_left_out")
    table = shared.text_table(
        ["fit", "score", "floor", "+-", "closed form", *([] if args.paper else ["corrected"]), "left out"],
        [[fit, *(score[c] for c in columns)] for fit, score in scores.items()],
    )
    head = f"{a.name} mapped onto {b.name}: {found.rows} rows"
    masked = f" ({result['rows_masked_out']} padding or never-seen rows left out)" if rows is not None else ""
    form = "; paper's form: in sample, uncorrected" if args.paper else ""
    return result, (
        f"{head}{masked}, width {found.width}{form}\n{table}\n"
        "floor: mean over row permutations of the second table, +- standard error; closed form: isotropic tables"
    )
