"""`tiedjax analyze cooccurrence RUN`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tiedjax.analysis.basis import arguments

if TYPE_CHECKING:
    from tiedjax.analysis.instruments.cooccurrence.cooccurrence import Contexts, Cooccurrence

HELP = "whether a table places tokens as the text does: by what precedes them, by what follows them"
SUBJECT = "model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and the options."""
    arguments.add_subject(parser, SUBJECT)
    arguments.add_count(parser, "--sample", 1000, "tokens whose pairs are compared")
    arguments.add_count(parser, "--least-count", 10, "occurrences of a sampled token in either role")
    arguments.add_count(parser, "--draws", 20, "permutations of the tokens for the floor")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    from tiedjax.analysis.basis.plain_json import to_plain
    from tiedjax.analysis.basis.tables import seen_rows
    from tiedjax.analysis.instruments.cooccurrence.cooccurrence import contexts_of, measure
    from tiedjax.tying import distinct

    sample, least = arguments.at_least(args, "sample", 4), arguments.at_least(args, "least-count")
    draws = arguments.at_least(args, "draws")
    run, prepared = arguments.read_text(args)
    tables = distinct(run.tables())
    V, width = next(iter(tables.values())).shape
    report = arguments.reporter("cooccurrence")
    text = contexts_of(prepared, run.seq_len, V, sample=sample, least_count=least, report=report)
    seen_V = seen_rows(run.token_counts)
    by_role = {role: measure(values, text, kept_V=seen_V, draws=draws) for role, values in tables.items()}
    description = arguments.described_roles(args.a, tables)
    result = arguments.run_result(args, run, description, len(text.tokens), width, V - text.eligible)
    result |= {"text": text.facts, "roles": to_plain(by_role)}
    return result, _text(arguments.subject_in_words(args, run), text, by_role, width)


def _text(name: str, text: Contexts, by_role: dict[str, Cooccurrence], width: int) -> str:
    head = (
        f"{name}: {len(text.tokens)} of {text.eligible} tokens that occur at least {text.least_count} times in either "
        f"role, width {width}; {text.counted:,} of {text.available:,} pairs of neighbours counted"
    )
    lines: list[list[Any]] = []
    for role, agreement in by_role.items():
        for kind, score in [("what precedes", agreement.as_target), ("what follows", agreement.as_context)]:
            lines.append(
                [role, "all", kind, score.score, score.low, score.high, score.floor, score.floor_standard_error]
            )
        lines.append(
            [role, "all", "difference", *(getattr(agreement.difference, f) for f in ("mean", "low", "high")), 0, 0]
        )
        assert agreement.partial
        for kind, score in [
            ("precedes, follows fixed", agreement.partial.as_target),
            ("follows, precedes fixed", agreement.partial.as_context),
        ]:
            lines.append(
                [role, "all", kind, score.score, score.low, score.high, score.floor, score.floor_standard_error]
            )
        position = agreement.partial.position
        lines.append([role, "all", "position", position.mean, position.low, position.high, 0, 0])
        for stratum, part in agreement.strata.items():
            for kind, score in [("what precedes", part.as_target), ("what follows", part.as_context)]:
                lines.append(
                    [role, stratum, kind, score.score, score.low, score.high, score.floor, score.floor_standard_error]
                )
    table = arguments.text_table(["table", "tokens", "contexts", "score", "low", "high", "floor", "+-"], lines)
    return (
        f"{head}\n{table}\n"
        "score: Spearman over pairs of tokens, cosine in the centred table against cosine of PPMI contexts; "
        "low, high: 95 % bootstrap over tokens; floor: tokens permuted, +- standard error; fixed: partial "
        "correlations;\nposition: the first of these minus the second"
    )
