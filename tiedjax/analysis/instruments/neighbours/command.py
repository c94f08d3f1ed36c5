"""`tiedjax analyze knn A B`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tiedjax.analysis.basis import arguments

if TYPE_CHECKING:
    from tiedjax.analysis.instruments.neighbours.knn import Overlap

HELP = "overlap of two tables' nearest neighbours, with its floor, by stratum; hubness"
SUBJECT = "pair"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A, B and the options."""
    arguments.add_pair(parser)
    arguments.add_paper(parser, "all rows, rows of zeros too, not centred, uncorrected")
    arguments.add_count(parser, "--k", 10, "neighbours per row")
    parser.add_argument("--centre", action="store_true", help="subtract each table's column means first")
    arguments.add_count(parser, "--draws", 10, "row permutations for the floor")
    arguments.add_counts(parser)
    arguments.add_tokenizers(parser)
    arguments.add_all_rows(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    import sys
    from functools import partial

    from tiedjax.analysis.basis.records import to_plain
    from tiedjax.analysis.instruments.neighbours.knn import knn
    from tiedjax.errors import UserError

    k, draws = arguments.at_least(args, "k"), arguments.at_least(args, "draws")
    if args.paper and args.centre:
        raise UserError("--centre: the paper's form does not centre; leave out --centre or --paper")
    inputs = arguments.read_tables(args)
    (a, b), mask = inputs.tables, inputs.rows
    counts = arguments.counts_of(a, b)
    report = lambda line: print(line, file=sys.stderr, flush=True)
    measure = partial(knn, a.values, b.values, k=k, draws=draws, counts=counts, report=report)
    found, left_out = measure(zero_rows=True) if args.paper else measure(rows=mask, centre=args.centre)
    same = mask is None and not args.centre and not left_out
    plain = to_plain(found)
    overlap = plain.pop("overlap")
    result = {
        **inputs.described,
        "form": "paper" if args.paper else "corrected",
        **overlap,
        "rows_masked_out": len(a.values) - found.overlap.rows - left_out,
        "rows_left_out": left_out,
        "width": a.values.shape[1],
        "other_width": b.values.shape[1],
        "centred": args.centre,
        **plain,
    }
    lines = [_line("all", found.overlap), *(_line(name, o) for name, o in found.strata.items())]
    if args.paper:
        for score in (result, *result["strata"].values()):
            del score["corrected"]
    else:
        paper = found if same else measure(zero_rows=True)[0]
        result["paper"] = {n: v for n, v in to_plain(paper.overlap).items() if n != "corrected"}
        lines.append([*_line("paper's form: all rows", paper.overlap)[:-1], None])
    columns = 6 if args.paper else 7
    table = arguments.text_table(
        ["tokens", "rows", "score", "floor", "+-", "closed form", "corrected"][:columns],
        [line[:columns] for line in lines],
    )
    hubs = arguments.text_table(
        ["hubness", "skewness", "nobody's neighbour", "largest"],
        [[t.name, h.skewness, h.orphans, h.largest] for t, h in zip((a, b), found.hubness, strict=True)],
    )
    head = arguments.heading(
        f"{a.name} and {b.name}: {k} nearest neighbours",
        found.overlap.rows,
        result["rows_masked_out"],
        a.values.shape[1],
    )
    zeros = f"; {left_out} rows without a direction left out" if left_out else ""
    form = "; paper's form: uncorrected" if args.paper else ""
    low, high = (arguments.cell(end) for end in (found.interval.low, found.interval.high))
    return result, (
        f"{head}{zeros}{form}{inputs.note}\n{table}\nscore {found.overlap.score:.4f}, over rows {low} to {high}\n"
        f"floor: mean over row permutations of the second table, +- standard error; closed form: k / (rows - 1)\n{hubs}"
    )


def _line(name: str, overlap: Overlap) -> list[Any]:
    columns = ("rows", "score", "floor", "floor_standard_error", "floor_closed_form", "corrected")
    return [name, *(getattr(overlap, column) for column in columns)]
