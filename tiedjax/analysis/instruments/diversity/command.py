"""`tiedjax analyze diversity RUN`."""

from __future__ import annotations

import argparse
from typing import Any

from tiedjax.analysis.basis import arguments

HELP = "how varied what the model writes is, beside as much held-out text, and the entropy of its predictions"
SUBJECT = "model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and the options."""
    arguments.add_subject(parser, SUBJECT)
    arguments.add_count(parser, "--texts", 64, "texts that are written")
    arguments.add_count(
        parser, "--tokens", None, "tokens of each text", default_in_words="64, at most the positions of a window"
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    texts = arguments.at_least(args, "texts")
    tokens = None if args.tokens is None else arguments.at_least(args, "tokens")
    from tiedjax.analysis.basis.held_out import FrozenModel
    from tiedjax.analysis.basis.plain_json import to_plain
    from tiedjax.analysis.instruments.diversity.diversity import measure

    run, prepared = arguments.read_text(args)
    model = FrozenModel(run)
    diversity = measure(model, run, prepared, texts=texts, tokens=tokens)
    result = arguments.run_result(args, run, model.describe(args.a), diversity.rows, diversity.width)
    result |= to_plain(diversity)
    name = arguments.subject_in_words(args, run, diversity.step)
    head = (
        f"{name}: {diversity.texts:,} texts of {diversity.tokens:,} tokens, written at "
        "temperature 1, beside as much held-out text"
    )
    return result, f"{head}\n{_table(result)}\n" + (
        "distinct-n: different n-grams over all n-grams, within texts; entropy: bits a token, of the shares of the\n"
        "tokens, which grows with their number; predicted: mean entropy of the model's predictions along the text;\n"
        "cross-entropy: what the tokens cost the model; both in bits a token, +- half a 95 % interval over texts"
    )


def _table(result: dict[str, Any]) -> str:
    header = ["text", "distinct-1", "distinct-2", "distinct-3", "entropy", "predicted", "+-", "cross-entropy", "+-"]
    lines = []
    for title, text in [("written", result["written"]), ("held out", result["held_out"])]:
        spans = [text["prediction_entropy"], text["cross_entropy"]]
        cells = [cell for span in spans for cell in (span["mean"], arguments.half_width(span))]
        lines.append([title, *(text[name] for name in ("distinct_1", "distinct_2", "distinct_3", "entropy")), *cells])
    return arguments.text_table(header, lines)
