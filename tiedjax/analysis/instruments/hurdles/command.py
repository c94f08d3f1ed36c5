"""`tiedjax analyze hurdles RUN`."""

from __future__ import annotations

import argparse
from typing import Any

from tiedjax.analysis.basis import arguments

HELP = "the held-out loss beside uniform, unigram, bigram and trigram, in nats, bits, and bits a byte"
SUBJECT = "model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and the options."""
    arguments.add_subject(parser, SUBJECT)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    from tiedjax.analysis.basis.held_out import FrozenModel
    from tiedjax.analysis.basis.plain_json import to_plain
    from tiedjax.analysis.instruments.hurdles.hurdles import measure

    run, prepared = arguments.read_text(args)
    model = FrozenModel(run)
    hurdles = measure(model, run, prepared)
    result = arguments.run_result(args, run, model.describe(args.a), hurdles.rows, hurdles.width) | to_plain(hurdles)
    size = "" if hurdles.held_out_bytes is None else f", {hurdles.held_out_bytes:,} bytes"
    name = arguments.subject_in_words(args, run, hurdles.step)
    which = "windows that are held out" if hurdles.step is None else "windows of the run's own evaluation"
    head = f"{name}: {hurdles.held_out_tokens:,} held-out tokens{size}, the {hurdles.held_out_windows:,} {which}"
    documents = hurdles.held_out_documents
    over = "held-out windows" if documents is None else f"the {documents:,} documents that the windows begin in"
    foot = (
        f"+- half a 95 % interval over {over}; the others count the first "
        f"{hurdles.training_tokens:,} training tokens\n{arguments.text_in_words(hurdles.step)}; "
        f"strength of the bigram's prior {hurdles.beta:g}, of the trigram's {hurdles.gamma:g}"
    )
    return result, f"{head}\n{_table(result['losses'])}\n{foot}"


def _table(losses: dict[str, Any]) -> str:
    header = ["predictor", "nats a token", "bits a token", "+-", "bits a byte", "model less it, bits", "+-"]
    lines = [
        [name, loss["nats"], *_spread(loss["bits"]), loss["bits_per_byte"], *_spread(loss["model_less"])]
        for name, loss in losses.items()
    ]
    return arguments.text_table(header, lines)


def _spread(span: dict[str, Any] | None) -> tuple[float | None, float | None]:
    """A mean, and half of its interval."""
    if span is None or span["low"] is None:
        return (None if span is None else span["mean"]), None
    return span["mean"], (span["high"] - span["low"]) / 2
