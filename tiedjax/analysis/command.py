"""`tiedjax analyze INSTRUMENT A [B]`: one instrument on tables or runs; prints a table, writes JSON on request."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from tiedjax.errors import UserError

# NumPy, SciPy and JAX are imported by the instruments when one runs, so that --help stays quick.
_TABLES = "RUN[@STEP][#input|#output], FILE.npy, FILE.npz[#NAME] or FILE.safetensors[#NAME]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `tiedjax analyze` to `parser`."""
    parser.description = "Runs one instrument and prints its table."
    instruments = parser.add_subparsers(dest="instrument", metavar="INSTRUMENT", required=True)
    for name, (_, wanted, help_text) in INSTRUMENTS.items():
        sub = instruments.add_parser(name, help=help_text, description=help_text)
        for dest, (metavar, meaning) in zip("ab", wanted.items(), strict=False):
            sub.add_argument(dest, metavar=metavar, help=meaning)
        sub.add_argument("--json", metavar="FILE", help="also write the result as JSON")
        if name == "align":
            sub.add_argument("--paper", action="store_true", help="the form of arXiv 2603.26663: all rows, uncorrected")
            sub.add_argument(
                "--fit",
                action="append",
                metavar="FIT",
                help="identity, orthogonal or linear; repeatable (default: all)",
            )
            sub.add_argument(
                "--draws", type=int, default=5, metavar="N", help="row permutations for the floor (default: 5)"
            )
        if name != "gradients":
            sub.add_argument(
                "--all-rows",
                action="store_true",
                help="keep padding rows and never-seen tokens (default: leave them out)",
            )
        if name == "norms":
            sub.add_argument("--counts", metavar="FILE.npy", help="[V] or [2, V] token counts, for tables from a file")


def run(args: argparse.Namespace) -> int:
    """Runs what `add_arguments` parsed; returns the exit status. UserError for bad input."""
    instrument: Callable[[argparse.Namespace], tuple[dict[str, Any], str]] = INSTRUMENTS[args.instrument][0]
    result, text = instrument(args)
    if args.json:
        from tiedjax.analysis.records import write_json

        write_json(args.json, {"instrument": args.instrument, **result})
    print(text)
    return 0


def text_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned plain text: numbers to the right with 4 decimals, None as '-'."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    left = [all(isinstance(row[i], str) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(line, widths, left, strict=True))
        for line in [list(header), *cells]
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _align(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from tiedjax.analysis.align import FITS, align
    from tiedjax.analysis.tables import read_table

    if args.draws < 1:
        raise UserError(f"--draws: must be at least 1, got {args.draws}")
    a, b = read_table(args.a), read_table(args.b)
    if len(a.values) != len(b.values):
        raise UserError(
            f"{a.name} has {len(a.values)} rows but {b.name} has {len(b.values)}; "
            "rows must be the same tokens in the same order"
        )
    seen = [t.seen for t in (a, b) if t.seen is not None]
    rows = None if args.paper or args.all_rows or not seen else seen[0] & seen[-1]
    if rows is not None and not rows.any():
        raise UserError(f"{a.name}, {b.name}: no token was seen in training by both; --all-rows keeps every row")
    found = align(a.values, b.values, fits=args.fit or FITS, rows=rows, draws=args.draws)
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
    table = text_table(
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


def _gradients(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from tiedjax.analysis.gradients import gradient_flow
    from tiedjax.analysis.records import to_plain
    from tiedjax.analysis.tables import content_hash, open_run

    run = open_run(args.a)
    flow = gradient_flow(run.metrics)
    tables = run.tables()
    rows, width = tables.input.shape
    inputs = [{"name": args.a, "sha256": content_hash(tables.input), "rows": rows, "width": width}]
    result = {"inputs": inputs, "rows": rows, "width": width, **to_plain(flow), "cosine_floor": 0.0}
    table = text_table(
        ["steps", "logged", "output share", "cosine"],
        [[f"{w.first}-{w.last}", w.logged_steps, w.output_share, w.cosine] for w in [*flow.windows, flow.overall]],
    )
    return result, (
        f"{args.a}: role gradients of the [{rows}, {width}] table, share of L2 norms output / (input + output)\n"
        f"{table}\n"
        "a share of 0.5 is balance; the cosine between unrelated gradients is 0"
    )


def _evolution(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from tiedjax.analysis.evolution import evolution
    from tiedjax.analysis.records import to_plain
    from tiedjax.analysis.tables import content_hash, open_run, seen_rows

    run = open_run(args.a)
    last = run.tables(run.snapshot_steps[-1])
    rows = None if args.all_rows else seen_rows(run.token_counts)
    roles = {"shared": "input"} if last.tied else {"input": "input", "output": "output"}
    found = {
        role: evolution(((s, getattr(run.tables(s), field)) for s in run.snapshot_steps), rows)
        for role, field in roles.items()
    }
    inputs = [
        {"name": args.a, "role": role, "sha256": content_hash(getattr(last, field))} for role, field in roles.items()
    ]
    count, width = last.input.shape
    result = {
        "inputs": inputs,
        "rows": count if rows is None else int(rows.sum()),
        "width": width,
        "roles": to_plain(found),
    }
    lines = [
        [role, str(step), e.to_start[i], e.to_previous[i], e.floor[i]]
        for role, e in found.items()
        for i, step in enumerate(e.steps)
    ]
    table = text_table(["table", "step", "to step 0", "to previous", "floor"], lines)
    return (
        result,
        f"{args.a}: mean cosine of rows to earlier snapshots, {result['rows']} rows, width {width}\n{table}",
    )


def _norms(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    import numpy as np

    from tiedjax.analysis.norms import norms_by_count
    from tiedjax.analysis.records import to_plain
    from tiedjax.analysis.tables import read_counts, read_table, seen_rows

    table = read_table(args.a)
    counts = read_counts(args.counts) if args.counts else table.counts
    if counts is None:
        raise UserError(f"{args.a}: no token counts are known for it; give them with --counts FILE.npy")
    counts = np.atleast_2d(counts)
    if counts.shape[1] != len(table.values):
        raise UserError(f"{args.a}: has {len(table.values)} rows but there are counts for {counts.shape[1]} tokens")
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
    body = text_table(["log10(count + 1)", "rows", "mean", "25%", "median", "75%"], lines)
    rank = _cell(found.spearman)
    error = _cell(found.floor_standard_error)
    return result, (
        f"{table.name}: L2 norm of {found.rows} rows against their counts as target\n{body}\n"
        f"Spearman {rank} over {found.seen_rows} seen rows; by chance 0 +- {error}"
    )


_Instrument = Callable[[argparse.Namespace], tuple[dict[str, Any], str]]
# What each does, the arguments it wants, one line of help. A new instrument is one more entry.
INSTRUMENTS: dict[str, tuple[_Instrument, dict[str, str], str]] = {
    "align": (
        _align,
        {"A": f"the table that is mapped: {_TABLES}", "B": "the table it is compared with, named likewise"},
        "mean cosine of two tables' rows under three maps, with floors",
    ),
    "gradients": (
        _gradients,
        {"RUN": "a run directory"},
        "share of the table's gradient from each role over the steps",
    ),
    "evolution": (_evolution, {"RUN": "a run directory"}, "how far the tables moved from step 0 and between snapshots"),
    "norms": (_norms, {"TABLE": _TABLES}, "row norm against token frequency"),
}
