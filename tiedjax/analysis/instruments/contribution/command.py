"""`tiedjax analyze blocks RUN`."""

from __future__ import annotations

import argparse
from typing import Any

from tiedjax.analysis.basis import arguments

HELP = "how much each block adds to the residual stream, and what held-out text costs without it"
SUBJECT = "model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and the options."""
    arguments.add_subject(parser, SUBJECT)
    arguments.add_count(parser, "--held-out-tokens", 4_096, "held-out tokens that are read")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    held_out_tokens = arguments.at_least(args, "held-out-tokens")
    from tiedjax.analysis.basis.held_out import FrozenModel
    from tiedjax.analysis.basis.plain_json import to_plain
    from tiedjax.analysis.instruments.contribution.contribution import measure

    run, prepared = arguments.read_text(args)
    model = FrozenModel(run)
    contribution = measure(model, run, prepared, held_out_tokens=held_out_tokens)
    result = arguments.run_result(args, run, model.describe(args.a), contribution.rows, contribution.width)
    result |= to_plain(contribution)
    blocks = result["blocks"]
    name = arguments.subject_in_words(args, run, contribution.step)
    head = f"{name}: {contribution.held_out_tokens} held-out tokens"
    return result, f"{head}, {_spread(result['loss'])} bits each\n{_table('added / read', blocks, 'added')}\n\n" + (
        f"{_table('cost of skipping', blocks, 'skip_cost')}\n"
        "added / read: norm of what is added over that of what is read, mean over positions; cost of skipping: bits a\n"
        "token; +- half a 95 % interval over held-out windows; attention reads what its block reads, the MLP that and\n"
        "what attention adds; blocks after a skipped one read a stream that training never showed them"
    )


def _table(title: str, blocks: list[dict[str, Any]], quantity: str) -> str:
    """One quantity of every block and of its two parts."""
    header = [title, "block", "+-", "attention", "+-", "MLP", "+-"]
    lines = []
    for block in blocks:
        spans = [block[part][quantity] for part in ("whole", "attention", "mlp")]
        pairs = [(span["mean"], arguments.half_width(span)) for span in spans]
        lines.append([f"block {block['block']}", *(value for pair in pairs for value in pair)])
    return arguments.text_table(header, lines)


def _spread(span: dict[str, Any]) -> str:
    return f"{arguments.cell(span['mean'])} +- {arguments.cell(arguments.half_width(span))}"
