"""`tiedjax analyze cooccurrence RUN`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tiedjax.analysis.basis import arguments

if TYPE_CHECKING:
    from tiedjax.analysis.instruments.cooccurrence.cooccurrence import Contexts, Cooccurrence

HELP = "whether a table places tokens as the text does: by what precedes them, by what follows them"
SUBJECT = "run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and the options."""
    arguments.add_run(parser)
    arguments.add_data(parser)
    arguments.add_count(parser, "--sample", 1000, "tokens whose pairs are compared")
    arguments.add_count(parser, "--least-count", 10, "occurrences of a sampled token in either role")
    arguments.add_count(parser, "--draws", 20, "permutations of the tokens for the floor")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    from tiedjax.analysis.basis.records import to_plain
    from tiedjax.analysis.basis.run_data import data_of
    from tiedjax.analysis.basis.tables import content_hash, open_run, seen_rows
    from tiedjax.analysis.instruments.cooccurrence.cooccurrence import bigram_counts, contexts, cooccurrence
    from tiedjax.tying import distinct

    sample, least = arguments.at_least(args, "sample", 4), arguments.at_least(args, "least-count")
    draws = arguments.at_least(args, "draws")
    run = open_run(args.a)
    tables = distinct(run.tables())
    windows = data_of(run, args.data).windows("train", run.config.model.seq_len)
    counts = bigram_counts(windows, run.token_counts.shape[1], report=arguments.reporter("cooccurrence"))
    told = contexts(counts, available=len(windows) * windows.seq_len, sample=sample, least_count=least)
    seen = seen_rows(run.token_counts)
    found = {role: cooccurrence(values, told, rows=seen, draws=draws) for role, values in tables.items()}
    V, width = next(iter(tables.values())).shape
    result = {
        "inputs": [
            {"name": args.a, "role": role, "sha256": content_hash(values), "rows": V, "width": width}
            for role, values in tables.items()
        ],
        "form": "corrected",
        "rows": len(told.tokens),
        "rows_masked_out": V - told.eligible,
        "width": width,
        "text": {name: getattr(told, name) for name in ("counted", "available", "eligible", "least_count")},
        "roles": to_plain(found),
    }
    return result, _text(args.a, told, found, width)


def _text(name: str, told: Contexts, found: dict[str, Cooccurrence], width: int) -> str:
    head = (
        f"{name}: {len(told.tokens)} of {told.eligible} tokens that occur at least {told.least_count} times in either "
        f"role, width {width}; {told.counted:,} of {told.available:,} pairs of neighbours counted"
    )
    lines: list[list[Any]] = []
    for role, of in found.items():
        for kind, a in [("what precedes", of.as_target), ("what follows", of.as_context)]:
            lines.append([role, "all", kind, a.score, a.low, a.high, a.floor, a.floor_standard_error])
        lines.append([role, "all", "difference", *(getattr(of.difference, f) for f in ("score", "low", "high")), 0, 0])
        for stratum, part in of.strata.items():
            for kind, a in [("what precedes", part.as_target), ("what follows", part.as_context)]:
                lines.append([role, stratum, kind, a.score, a.low, a.high, a.floor, a.floor_standard_error])
    table = arguments.text_table(["table", "tokens", "contexts", "score", "low", "high", "floor", "+-"], lines)
    return (
        f"{head}\n{table}\n"
        "score: Spearman over pairs of tokens, cosine in the centred table against cosine of PPMI contexts; "
        "low, high: 95 % bootstrap over tokens; floor: tokens permuted, +- standard error"
    )
