"""`tiedjax analyze rounding RUN`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tiedjax.analysis.basis import arguments

if TYPE_CHECKING:
    from tiedjax.analysis.instruments.rounding.rounding import Rounding

HELP = "what a table of 8 or 4 bits costs each role, in nats a held-out token"
SUBJECT = "model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and the options."""
    arguments.add_subject(parser, SUBJECT)
    arguments.add_count(parser, "--held-out-tokens", 4_096, "held-out tokens that are scored")
    arguments.add_count(parser, "--draws", 3, "noises of the rounding error's norm for the floor")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    held_out_tokens, draws = arguments.at_least(args, "held-out-tokens"), arguments.at_least(args, "draws")
    from tiedjax.analysis.basis.held_out import FrozenModel
    from tiedjax.analysis.basis.plain_json import to_plain
    from tiedjax.analysis.instruments.rounding.rounding import measure

    run, prepared = arguments.read_text(args)
    model, report = FrozenModel(run), arguments.reporter("rounding")
    rounding = measure(model, run, prepared, held_out_tokens=held_out_tokens, draws=draws, report=report)
    result = arguments.run_result(args, run, model.describe(args.a), rounding.rows, rounding.width)
    return result | to_plain(rounding), _text(arguments.subject_in_words(args, run, rounding.step), rounding)


def _text(name: str, rounding: Rounding) -> str:
    loss, half = (arguments.cell(value) for value in (rounding.loss.mean, rounding.loss.half_width))
    header = ["bits", "rounded", "error", "costs", "low", "high", "noise", "less noise", "+-"]
    lines = [
        [
            *(str(cost.bits), cost.use, cost.error, cost.cost.score, cost.cost.low, cost.cost.high, cost.cost.floor),
            *(cost.less_noise.mean, cost.less_noise.half_width),
        ]
        for cost in rounding.costs
    ]
    table = "one table for both roles" if rounding.shared else "a table for each role"
    return (
        f"{name}: {table}, {rounding.held_out_tokens:,} held-out tokens, {loss} +- {half} nats each as trained\n"
        f"{arguments.text_table(header, lines)}\n"
        "costs: nats a held-out token more than as trained, paired by window; error: norm of the rounding error over\n"
        f"the table's; noise: {rounding.draws} Gaussian ones of the same norm in every row; low, high and +-: 95 % "
        "intervals over windows"
    )
