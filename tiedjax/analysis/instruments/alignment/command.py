"""`tiedjax analyze align A B`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tiedjax.analysis.basis import arguments

if TYPE_CHECKING:
    from tiedjax.analysis.instruments.alignment.align import Alignment, Comparison

HELP = "mean cosine of two tables' rows under four maps, with floors"
SUBJECT = "pair"

_NOTE = """score: mean cosine in sample, both tables centred by their column means;
floor: its mean over row permutations of B;
corrected: (score - floor) / (1 - floor); back: B mapped onto A, corrected;
held out: fitted on one half of the rows, scored on the other;
paper: all rows, in sample, uncorrected"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A, B and the options."""
    arguments.add_subject(parser, SUBJECT)
    arguments.add_paper(
        parser, "centred, identity too; all rows, in sample, uncorrected; rows without a direction count as 0"
    )
    parser.add_argument(
        "--fit", action="append", metavar="FIT", help="identity, orthogonal, linear or ridge; repeatable (default: all)"
    )
    arguments.add_count(parser, "--draws", 5, "row permutations for the floor")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    from tiedjax.analysis.basis.plain_json import to_plain
    from tiedjax.analysis.instruments.alignment.align import align, measure, raw_cosine
    from tiedjax.analysis.instruments.alignment.fitting import FITS, SQUARE

    draws = arguments.at_least(args, "draws")
    inputs = arguments.read_tables(args)
    (a, b), kept_V = inputs.values, inputs.kept_V
    square = a.shape[1] == b.shape[1]
    fits = args.fit or [fit for fit in FITS if (square or fit not in SQUARE) and not (args.paper and fit == "ridge")]
    report = arguments.reporter("align")
    counts = arguments.counts_of(*inputs.tables)
    if args.paper:
        alignment = align(a, b, fits=fits, draws=draws, report=report)
    else:
        comparison = measure(a, b, fits=fits, kept_V=kept_V, counts=counts, draws=draws, report=report)
        alignment = comparison.alignment
    result = inputs.result(args, alignment.rows) | {"target_width": alignment.target_width, "centred": True}
    if square:
        raw = to_plain(raw_cosine(a, b, kept_V=kept_V, zero_rows=args.paper))
        if args.paper:
            del raw["corrected"]
        result["raw_cosine"] = raw
    head = inputs.heading(f"{inputs.tables[0].name} mapped onto {inputs.tables[1].name}", result)
    if args.paper:
        text = f"{head}; paper's form: both tables centred{inputs.note}\n{_paper_table(alignment)}{_raw_line(result)}"
        return result | {"fits": _paper(alignment)}, text
    rectangular_fits = [fit for fit in fits if fit not in SQUARE]
    back = (
        align(b, a, fits=rectangular_fits, kept_V=kept_V, draws=draws, report=report) if rectangular_fits else alignment
    )
    records = {fit: _record(fit, comparison, back) for fit in fits}
    text = f"{head}{inputs.note}\n{_table(records)}{_raw_line(result)}\n{_NOTE}\n\n{_rows_table(records)}"
    return result | {"fits": records}, text + _strata_table(records)


def _record(fit: str, comparison: Comparison, back: Alignment) -> dict[str, Any]:
    from tiedjax.analysis.basis.plain_json import to_plain
    from tiedjax.analysis.instruments.alignment.align import distribution

    alignment = comparison.alignment
    record: dict[str, Any] = to_plain(alignment.scores[fit])
    record["penalty"] = alignment.penalty if fit == "ridge" else None
    record["held_out"] = to_plain(alignment.held_out[fit])
    record["back"] = to_plain(back.scores.get(fit, alignment.scores[fit]))
    record["paper"] = comparison.paper[fit]
    record["rows_distribution"] = to_plain(distribution(alignment.cosines[fit]))
    if comparison.beyond_frequency:
        record["beyond_frequency"] = comparison.beyond_frequency[fit].corrected
        record["strata"] = to_plain(comparison.strata[fit])
    return record


def _raw_line(result: dict[str, Any]) -> str:
    """The raw cosine on a line of its own; nothing for tables of different widths, which have none."""
    if "raw_cosine" not in result:
        return ""
    raw = result["raw_cosine"]
    corrected = f", corrected {arguments.cell(raw['corrected'])}" if "corrected" in raw else ""
    zeros = f"; {raw['rows_left_out']} rows of zeros left out" if raw["rows_left_out"] else ""
    score, floor = arguments.cell(raw["score"]), arguments.cell(raw["floor"])
    return f"\nraw cosine: {score}, floor {floor}{corrected}; rows as they are, not centred{zeros}"


def _paper(alignment: Alignment) -> dict[str, Any]:
    from tiedjax.analysis.basis.plain_json import to_plain
    from tiedjax.analysis.instruments.alignment.align import uncorrected

    names = ("floor", "floor_standard_error", "floor_draws", "floor_closed_form", "rows_left_out")
    return {
        fit: {"score": uncorrected(alignment.cosines[fit])} | {name: to_plain(score)[name] for name in names}
        for fit, score in alignment.scores.items()
    }


def _paper_table(alignment: Alignment) -> str:
    columns = ["score", "floor", "floor_standard_error", "floor_closed_form"]
    rows = [[fit, *(record[c] for c in columns)] for fit, record in _paper(alignment).items()]
    return arguments.text_table(["fit", "score", "floor", "+-", "closed form"], rows)


def _table(records: dict[str, Any]) -> str:
    header = ["fit", "score", "floor", "+-", "closed form", "corrected", "held out", "back", "paper", "left out"]
    names = ["score", "floor", "floor_standard_error", "floor_closed_form", "corrected"]
    rows = []
    for fit, record in records.items():
        other_cells = [
            record["held_out"]["score"],
            record["back"]["corrected"],
            record["paper"],
            record["rows_left_out"],
        ]
        rows.append([fit, *(record[name] for name in names), *other_cells])
    return arguments.text_table(header, rows)


def _rows_table(records: dict[str, Any]) -> str:
    levels = next(iter(records.values()))["rows_distribution"]["quantiles"]
    rows = []
    for fit, record in records.items():
        quantiles, mean = record["rows_distribution"]["quantiles"], record["rows_distribution"]["mean"]
        rows.append([fit, *(quantiles.get(level) for level in levels), mean["low"], mean["high"]])
    header = ["fit", *(f"{level} %" for level in levels), "mean from", "to"]
    table = arguments.text_table(header, rows)
    return f"cosines of single rows, and the mean's 95 % bootstrap interval over rows\n{table}"


def _strata_table(records: dict[str, Any]) -> str:
    first = next(iter(records.values()))
    if "strata" not in first:
        return ""
    rows = [
        [name, first_stratum["rows"], *(record["strata"][name]["corrected"] for record in records.values())]
        for name, first_stratum in first["strata"].items()
    ]
    title = "corrected, by training count; floors: rows shuffled among tokens of like frequency"
    return f"\n\n{title}\n{arguments.text_table(['tokens', 'rows', *records], rows)}"
