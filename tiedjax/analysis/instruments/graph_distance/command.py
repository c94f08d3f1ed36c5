"""`tiedjax analyze spectral A B`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tiedjax.analysis.basis import arguments

if TYPE_CHECKING:
    from tiedjax.analysis.instruments.graph_distance.spectral import Spectral

HELP = "spectral distance of two tables' neighbour graphs, with what it is by chance"
SUBJECT = "pair"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A, B and the options."""
    arguments.add_pair(parser)
    arguments.add_paper(parser, "all rows, rows of zeros too")
    arguments.add_count(parser, "--k", 64, "neighbours per row")
    arguments.add_count(parser, "--eigenpairs", 128, "eigenpairs of largest magnitude that are kept")
    arguments.add_count(parser, "--draws", 2, "row permutations for the floor")
    arguments.add_counts(parser)
    arguments.add_tokenizers(parser)
    arguments.add_all_rows(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    import sys
    from functools import partial

    from tiedjax.analysis.basis.records import to_plain
    from tiedjax.analysis.instruments.graph_distance.spectral import spectral

    k, eigenpairs, draws = (arguments.at_least(args, name) for name in ("k", "eigenpairs", "draws"))
    inputs = arguments.read_tables(args)
    (a, b), mask = inputs.tables, inputs.rows
    report = lambda line: print(line, file=sys.stderr, flush=True)
    measure = partial(spectral, a.values, b.values, k=k, eigenpairs=eigenpairs, report=report)
    found, left_out = measure(rows=mask, zero_rows=args.paper, draws=draws)
    result = {
        **inputs.described,
        "form": "paper" if args.paper else "corrected",
        "k": k,
        "width": a.values.shape[1],
        "other_width": b.values.shape[1],
        "rows_masked_out": len(a.values) - found.rows - left_out,
        "rows_left_out": left_out,
        **to_plain(found),
    }
    lines = [["all" if args.paper else "that count", *_columns(found)]]
    if args.paper:
        del result["relative"]
    else:
        same = found.rows == len(a.values)
        paper = found if same else measure(zero_rows=True, draws=0)[0]
        result["paper"] = {"distance": paper.distance, "rows": paper.rows}
        lines.append(["paper's form: all rows", paper.rows, paper.distance, None, None, None])
    table = arguments.text_table(["tokens", "rows", "distance", "by chance", "+-", "relative"], lines)
    head = arguments.heading(
        f"{a.name} and {b.name}: graphs of {k} nearest neighbours",
        found.rows,
        result["rows_masked_out"],
        a.values.shape[1],
    )
    zeros = f"; {left_out} rows without a direction left out" if left_out else ""
    return result, (
        f"{head}{zeros}{inputs.note}\n{table}\n"
        f"distance: 0 is the same graph; {eigenpairs} eigenpairs\n"
        f"by chance: mean over {draws} row permutations of the second table, +- standard error; "
        "relative: distance / by chance"
    )


def _columns(found: Spectral) -> list[Any]:
    return [found.rows, found.distance, found.floor, found.floor_standard_error, found.relative]
