"""`tiedjax analyze regret RUN`."""

from __future__ import annotations

import argparse
from typing import Any

from tiedjax.analysis.basis import arguments

HELP = "what the tie costs each role, in nats a held-out token: tables re-fitted with the body frozen"
SUBJECT = "model"
SLOW = True

_COUNTS = ("fitting-tokens", "held-out-tokens", "iterations")
_ROWS = {"input": "then input alone", "output": "then output alone", "both": "then both apart"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and the options."""
    arguments.add_subject(parser, SUBJECT)
    arguments.add_count(parser, "--fitting-tokens", 65_536, "tokens shown in training that tables are re-fitted on")
    arguments.add_count(parser, "--held-out-tokens", 16_384, "held-out tokens that are scored")
    arguments.add_count(parser, "--iterations", 200, "most iterations of a re-fit")
    arguments.add_count(
        parser,
        "--hold",
        None,
        "occurrences with whose weight a row is held where training left it",
        default_in_words="16 for each of a row's numbers",
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    options = {name.replace("-", "_"): arguments.at_least(args, name) for name in _COUNTS}
    hold = None if args.hold is None else arguments.at_least(args, "hold", 0)
    from tiedjax.analysis.basis.held_out import FrozenModel
    from tiedjax.analysis.basis.plain_json import to_plain
    from tiedjax.analysis.instruments.regret.regret import measure

    run, prepared = arguments.read_text(args)
    model = FrozenModel(run)
    regret = measure(model, run, prepared, **options, hold=hold, report=arguments.reporter("regret"))
    result = arguments.run_result(args, run, model.describe(args.a), regret.rows, regret.width)
    result |= to_plain(regret)
    name = arguments.subject_in_words(args, run, regret.step)
    head = (
        f"{name}: re-fitted on {regret.fitting_tokens:,} tokens, scored on "
        f"{regret.held_out_tokens:,} held-out ones, {_spread(result['loss'])} nats each as trained"
    )
    return result, f"{head}\n{_table(result)}\n{_ending(result, regret.converged)}\n" + (
        "saves: nats a held-out token, +- half a 95 % interval over held-out windows; rare, middle, frequent: the\n"
        "target's third of the tokens; fitting: on the text that tables are re-fitted on; every row is held where\n"
        f"training left it with the weight of {regret.hold:,} occurrences"
    )


def _table(result: dict[str, Any]) -> str:
    own = result["own"]
    header = ["re-fitted", "saves", "+-", *own["strata"], "fitting", "iterations"]
    named = {"the shared table" if result["shared"] else "both tables": own}
    named |= {_ROWS[name]: saving for name, saving in result["regrets"].items()}
    lines = []
    for name, saving in named.items():
        held_out, strata = saving["held_out"], [span["mean"] for span in saving["strata"].values()]
        saved = [held_out["mean"], arguments.half_width(held_out), *strata, saving["fitting"]]
        known = saving["converged"] or saving is own
        lines.append([name, *(saved if known else [None] * len(saved)), saving["iterations"]])
    return arguments.text_table(header, lines)


def _ending(result: dict[str, Any], converged: bool) -> str:
    if not converged:
        return "not converged, so neither balance nor tension: give more --iterations or a larger --hold"
    if not result["shared"]:
        return "a table for each role: nothing is tied, so what is saved after the first re-fit is a control"
    cosines = f"{arguments.cell(result['balance'])} ({arguments.cell(result['trained_balance'])} as trained)"
    return (
        f"balance {cosines}: cosine of the two role gradients on the fitting text\n"
        f"tension {_spread(result['regrets']['both']['held_out'])}: what both apart save after the shared one's re-fit"
    )


def _spread(span: dict[str, Any]) -> str:
    return f"{arguments.cell(span['mean'])} +- {arguments.cell(arguments.half_width(span))}"
