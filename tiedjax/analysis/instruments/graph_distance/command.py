"""`tiedjax analyze spectral A B`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tiedjax.analysis.basis import arguments

if TYPE_CHECKING:
    from tiedjax.analysis.instruments.graph_distance.graph_distance import GraphDistance

HELP = "spectral distance of two tables' neighbour graphs, with what it is by chance"
SUBJECT = "pair"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A, B and the options."""
    arguments.add_subject(parser, SUBJECT)
    arguments.add_paper(parser, "all rows, rows of zeros too; 128 eigenpairs")
    arguments.add_count(parser, "--k", 64, "neighbours per row")
    meaning = "eigenpairs of largest magnitude that are kept"
    arguments.add_count(parser, "--eigenpairs", None, meaning, default_in_words="32, the paper's form: 128")
    arguments.add_count(parser, "--draws", 1, "row permutations for the floor")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    from functools import partial

    from tiedjax.analysis.basis.plain_json import to_plain
    from tiedjax.analysis.instruments.graph_distance.graph_distance import (
        EIGENPAIRS,
        PAPER_EIGENPAIRS,
        Embeddings,
        measure,
    )
    from tiedjax.analysis.instruments.neighbours.search import Searches

    k, draws = (arguments.at_least(args, name) for name in ("k", "draws"))
    if args.eigenpairs is not None:
        arguments.at_least(args, "eigenpairs")
    eigenpairs, paper_eigenpairs = args.eigenpairs or EIGENPAIRS, args.eigenpairs or PAPER_EIGENPAIRS
    inputs = arguments.read_tables(args)
    names = [table.name for table in inputs.tables]
    measure_tables = partial(
        measure,
        *inputs.values,
        k=k,
        searches=Searches(),
        embeddings=Embeddings(),
        report=arguments.reporter("spectral"),
    )
    paper_form = measure_tables(eigenpairs=paper_eigenpairs, zero_rows=True, draws=draws if args.paper else 0)
    corrected_form = partial(measure_tables, eigenpairs=eigenpairs, kept_V=inputs.kept_V, draws=draws)
    spectral = paper_form if args.paper else corrected_form()
    distance = spectral.distance
    result = inputs.result(args, distance.rows, distance.rows_left_out)
    result |= {"k": k, "other_width": inputs.values[1].shape[1], "rows_left_out": distance.rows_left_out}
    result |= to_plain(spectral)
    lines = [["all" if args.paper else "that count", *_columns(spectral)]]
    if args.paper:
        del result["relative"]
    else:
        result["paper"] = {"eigenpairs": paper_eigenpairs, **to_plain(paper_form.distance)}
        lines.append(["paper's form: all rows", *_columns(paper_form)[:3], None, None, None])
    table = arguments.text_table(["tokens", "eigenpairs", "rows", "distance", "by chance", "+-", "relative"], lines)
    head = inputs.heading(f"{' and '.join(names)}: graphs of {k} nearest neighbours", result)
    left_out = distance.rows_left_out
    zeros = f"; {left_out} rows without a direction left out" if left_out else ""
    permutations = "1 row permutation" if draws == 1 else f"{draws} row permutations"
    return result, (
        f"{head}{zeros}{inputs.note}\n{table}\n"
        f"distance: 0 is the same graph\n"
        f"by chance: mean over {permutations} of the second table, +- standard error; relative: distance / by chance"
    )


def _columns(spectral: GraphDistance) -> list[Any]:
    distance = spectral.distance
    return [
        spectral.eigenpairs,
        distance.rows,
        distance.score,
        distance.floor,
        distance.floor_standard_error,
        spectral.relative,
    ]
