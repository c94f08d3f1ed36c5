"""`tiedjax analyze knn A B`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tiedjax.analysis.basis import arguments

if TYPE_CHECKING:
    from tiedjax.analysis.basis.chance import Score

HELP = "overlap of two tables' nearest neighbours, with its floor, by stratum; hubness"
SUBJECT = "pair"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A, B and the options."""
    arguments.add_subject(parser, SUBJECT)
    arguments.add_paper(parser, "all rows, rows of zeros too, not centred, uncorrected")
    arguments.add_count(parser, "--k", 10, "neighbours per row")
    parser.add_argument("--centre", action="store_true", help="subtract each table's column means first")
    arguments.add_count(parser, "--draws", 5, "row permutations for the floor")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    from tiedjax.analysis.basis.plain_json import to_plain
    from tiedjax.analysis.instruments.neighbours.overlap import measure
    from tiedjax.errors import UserError

    k, draws = arguments.at_least(args, "k"), arguments.at_least(args, "draws")
    if args.paper and args.centre:
        raise UserError("--centre: the paper's form does not centre; leave out --centre or --paper")
    inputs = arguments.read_tables(args)
    names = [table.name for table in inputs.tables]
    knn = measure(
        *inputs.values,
        k=k,
        kept_V=inputs.kept_V,
        centred=args.centre,
        zero_rows=args.paper,
        draws=draws,
        counts=arguments.counts_of(*inputs.tables),
        report=arguments.reporter("knn"),
    )
    plain = to_plain(knn)
    overlap = plain.pop("overlap")
    result = overlap | inputs.result(args, knn.overlap.rows, knn.overlap.rows_left_out)
    result |= {"other_width": inputs.values[1].shape[1], "centred": args.centre, **plain}
    lines = [_line("all", knn.overlap), *(_line(name, score) for name, score in knn.strata.items())]
    if args.paper:
        for score in (result, *result["strata"].values()):
            del score["corrected"]
        del result["paper"]
    else:
        lines.append(_line("paper's form: all rows", knn.paper))
    columns = 6 if args.paper else 7
    table = arguments.text_table(
        ["tokens", "rows", "score", "floor", "+-", "closed form", "corrected"][:columns],
        [line[:columns] for line in lines],
    )
    hubs = arguments.text_table(
        ["hubness", "skewness", "nobody's neighbour", "largest"],
        [[name, h.skewness, h.orphans, h.largest] for name, h in zip(names, knn.hubness, strict=True)],
    )
    head = inputs.heading(f"{' and '.join(names)}: {k} nearest neighbours", result)
    left_out = knn.overlap.rows_left_out
    zeros = f"; {left_out} rows without a direction left out" if left_out else ""
    form = "; paper's form: uncorrected" if args.paper else ""
    score, low, high = (arguments.cell(value) for value in (knn.overlap.score, knn.interval.low, knn.interval.high))
    return result, (
        f"{head}{zeros}{form}{inputs.note}\n{table}\nscore {score}, over rows {low} to {high}\n"
        f"floor: mean over row permutations of the second table, +- standard error; closed form: k / (rows - 1)\n{hubs}"
    )


def _line(name: str, overlap: Score) -> list[Any]:
    columns = ("rows", "score", "floor", "floor_standard_error", "floor_closed_form", "corrected")
    return [name, *(getattr(overlap, column) for column in columns)]
