"""`tiedjax analyze norms TABLE`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tiedjax.analysis.basis import arguments
from tiedjax.errors import UserError

if TYPE_CHECKING:
    from tiedjax.analysis.instruments.norms.norms import Curve, Norms

HELP = "row norm, distance and cosine to the mean row against token frequency, and a probe of it"
SUBJECT = "table"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TABLE and the options."""
    arguments.add_subject(parser, SUBJECT)
    arguments.add_data(parser)
    arguments.add_paper(parser, "the norm alone, all rows")
    arguments.add_count(parser, "--draws", 20, "permutations of the counts for the floor of the probe")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    from tiedjax.analysis.basis.plain_json import to_plain
    from tiedjax.analysis.basis.tables import seen_rows
    from tiedjax.analysis.instruments.norms.norms import curve, measure, row_norms

    draws = arguments.at_least(args, "draws")
    inputs = arguments.read_tables(args)
    (table,) = inputs.tables
    counts = arguments.counts_of(table)
    if counts is None:
        raise UserError(f"{args.a}: no token counts are known for it; give them with --counts FILE.npy")
    count_V = counts[-1]  # as target
    V = len(count_V)
    published = curve(row_norms(table.values), count_V)
    paper = {"rows": V, "norm": to_plain(published)}
    if args.paper:
        result = inputs.result(args, V) | {"counts": "as target", **paper}
        head = inputs.heading(f"{table.name}, L2 norm against count as target; paper's form", result)
        return result, f"{head}{inputs.note}\n{_published(published)}"
    if args.all_rows:
        norms = measure(table.values, count_V, draws=draws)
    else:
        seen_V = seen_rows(counts)
        norms = measure(table.values[seen_V], count_V[seen_V], draws=draws)
    result = inputs.result(args, norms.rows) | {"counts": "as target", **to_plain(norms), "paper": paper}
    head = inputs.heading(f"{table.name}, rows against their counts as target", result)
    return (
        result,
        f"{head}{inputs.note}\n{_text(norms)}\n\npaper's form: L2 norm of all {V} rows\n{_published(published)}",
    )


def _text(norms: Norms) -> str:
    """Medians by bin, rank correlations, and the probe."""
    from tiedjax.analysis.instruments.norms.probe import FOLDS

    quantities = {"norm": norms.norm, "distance": norms.distance_to_mean, "cosine": norms.cosine_to_mean}
    by_bin: dict[tuple[float, float], dict[str, float]] = {}
    for name, curve in quantities.items():
        for b in curve.bins:
            by_bin.setdefault((b.low, b.high), {"rows": b.rows})[name] = b.median
    medians = arguments.text_table(
        ["log10(count + 1)", "rows", "norm", "distance to mean", "cosine to mean"],
        [[_span(*ends), *(line.get(name) for name in ("rows", *quantities))] for ends, line in by_bin.items()],
    )
    ranks = arguments.text_table(
        ["Spearman with count", "score", "low", "high", "floor", "+-"],
        [
            [name, rank.score, rank.low, rank.high, rank.floor, rank.floor_deviation]
            for name, rank in ((name, curve.spearman) for name, curve in quantities.items())
        ],
    )
    probe = norms.log_frequency
    score, floor, error, corrected = (
        arguments.cell(v) for v in (probe.score, probe.floor, probe.floor_standard_error, probe.corrected)
    )
    return (
        f"medians\n{medians}\n\n{ranks}\n\n"
        f"linear probe of log10(count + 1), {probe.rows} seen rows, {FOLDS} folds: R^2 {score}; permuted counts "
        f"{floor} +- {error}; corrected {corrected}"
    )


def _published(norm: Curve) -> str:
    lines = [[_span(b.low, b.high), b.rows, b.mean, b.quantile_25, b.median, b.quantile_75] for b in norm.bins]
    table = arguments.text_table(["log10(count + 1)", "rows", "mean", "25%", "median", "75%"], lines)
    rank, deviation = arguments.cell(norm.spearman.score), arguments.cell(norm.spearman.floor_deviation)
    return f"{table}\nSpearman {rank} over {norm.spearman.rows} seen rows; by chance 0 +- {deviation}"


def _span(low: float, high: float) -> str:
    return f"{low:.1f}-{high:.1f}" if high else "never"
