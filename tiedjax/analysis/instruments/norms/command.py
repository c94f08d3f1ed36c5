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
    arguments.add_table(parser)
    arguments.add_paper(parser, "the norm alone, all rows")
    arguments.add_counts(parser)
    arguments.add_count(parser, "--draws", 20, "permutations of the counts for the floor of the probe")
    arguments.add_all_rows(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    from tiedjax.analysis.basis.records import to_plain
    from tiedjax.analysis.basis.tables import seen_rows
    from tiedjax.analysis.instruments.norms.norms import curve, norms_by_count, row_norms

    draws = arguments.at_least(args, "draws")
    inputs = arguments.read_tables(args)
    (table,) = inputs.tables
    counts = arguments.counts_of(table)
    if counts is None:
        raise UserError(f"{args.a}: no token counts are known for it; give them with --counts FILE.npy")
    count = counts[-1]  # as target
    every, width = len(count), table.values.shape[1]
    published = curve(row_norms(table.values), count)
    result: dict[str, Any] = {**inputs.described, "counts": "as target"}
    paper = {"rows": every, "norm": to_plain(published)}
    if args.paper:
        result |= {"form": "paper", "rows_masked_out": 0, "width": width, **paper}
        head = arguments.heading(f"{table.name}, L2 norm against count as target; paper's form", every, 0, width)
        return result, f"{head}\n{_published(published)}"
    rows = slice(None) if args.all_rows else seen_rows(counts)
    found = norms_by_count(table.values[rows], count[rows], draws=draws)
    masked_out = every - found.rows
    result |= {"form": "corrected", "rows_masked_out": masked_out, **to_plain(found), "paper": paper}
    head = arguments.heading(f"{table.name}, rows against their counts as target", found.rows, masked_out, width)
    return result, f"{head}\n{_text(found)}\n\npaper's form: L2 norm of all {every} rows\n{_published(published)}"


def _text(found: Norms) -> str:
    """Medians by bin, rank correlations, and the probe."""
    quantities = {"norm": found.norm, "distance": found.distance_to_mean, "cosine": found.cosine_to_mean}
    by_bin: dict[tuple[float, float], dict[str, float]] = {}
    for name, of in quantities.items():
        for b in of.bins:
            by_bin.setdefault((b.low, b.high), {"rows": b.rows})[name] = b.median
    medians = arguments.text_table(
        ["log10(count + 1)", "rows", "norm", "distance to mean", "cosine to mean"],
        [[_span(*ends), *(line.get(name) for name in ("rows", *quantities))] for ends, line in by_bin.items()],
    )
    ranks = arguments.text_table(
        ["Spearman with count", "score", "low", "high", "floor", "+-"],
        [
            [name, of.spearman.mean, of.spearman.low, of.spearman.high, of.floor, of.floor_standard_error]
            for name, of in quantities.items()
        ],
    )
    probe = found.log_frequency
    score, floor, error, corrected = (
        arguments.cell(v) for v in (probe.score, probe.floor, probe.floor_standard_error, probe.corrected)
    )
    return (
        f"medians\n{medians}\n\n{ranks}\n\n"
        f"linear probe of log10(count + 1), {probe.rows} seen rows, {probe.folds} folds: R^2 {score}; permuted counts "
        f"{floor} +- {error}; corrected {corrected}"
    )


def _published(found: Curve) -> str:
    lines = [[_span(b.low, b.high), b.rows, b.mean, b.quantile_25, b.median, b.quantile_75] for b in found.bins]
    table = arguments.text_table(["log10(count + 1)", "rows", "mean", "25%", "median", "75%"], lines)
    rank, error = arguments.cell(found.spearman.mean), arguments.cell(found.floor_standard_error)
    return f"{table}\nSpearman {rank} over {found.spearman.n} seen rows; by chance 0 +- {error}"


def _span(low: float, high: float) -> str:
    return f"{low:.1f}-{high:.1f}" if high else "never"
