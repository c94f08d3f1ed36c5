"""`tiedjax analyze lens RUN`."""

from __future__ import annotations

import argparse
from typing import Any

from tiedjax.analysis.basis import arguments
from tiedjax.errors import UserError

HELP = "what each layer already predicts: logit lens and tuned lens"
SUBJECT = "model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and the options."""
    arguments.add_subject(parser, SUBJECT)
    meaning = "tokens of the training text that fit the translators"
    arguments.add_count(parser, "--training-tokens", None, meaning, default_in_words="64 D, at most 32,768")
    arguments.add_count(parser, "--held-out-tokens", 4_096, "held-out tokens that are scored")
    parser.add_argument(
        "--translators",
        metavar="STATES",
        help="states whose translators are fitted, 0 the input, between commas, or none; others are read by the logit "
        "lens alone (default: all)",
    )
    arguments.add_paper(parser, "translators read one state late, KL only")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    fitted = _states_named(args)
    held_out_tokens = arguments.at_least(args, "held-out-tokens")
    fitted_on = None if args.training_tokens is None else arguments.at_least(args, "training-tokens")
    from tiedjax.analysis.basis.held_out import FrozenModel
    from tiedjax.analysis.basis.plain_json import to_plain
    from tiedjax.analysis.instruments.lens import rotation
    from tiedjax.analysis.instruments.lens.lens import measure

    run, prepared = arguments.read_text(args)
    model = FrozenModel(run)
    report = arguments.reporter("lens")
    of_text = {"held_out_tokens": held_out_tokens}
    lens = measure(model, run, prepared, **of_text, fitted_on=fitted_on, fitted=fitted, report=report)
    plain = to_plain(lens)
    baselines = plain.pop("baselines")
    result = arguments.run_result(args, run, model.describe(args.a), lens.rows, lens.width) | {
        "unit": "bits",
        **plain,
    }
    name = arguments.subject_in_words(args, run, lens.step)
    which = "" if fitted is None else f" of {', '.join(state.name for state in lens.states if state.fit)}"
    fits = f"translators{which} fitted on {lens.training_tokens} training tokens" if fitted != [] else "no translators"
    head = f"{name}: {lens.held_out_tokens} held-out tokens, {fits}"
    if args.paper:
        for state in result["states"]:
            state["score"] = {"kl": state.pop("published")["kl"]}
            del state["logit"], state["tuned"]
        return result, f"{head}\n{_paper(result['states'])}"
    result["baselines"] = baselines
    result["input"] = to_plain(rotation.measure(model, run, prepared, held_out_tokens=held_out_tokens))
    without = _baselines(result["baselines"], lens.step)
    text = f"{head}\n{_states(result['states'])}\n{_rotated(result['input'])}\n{without}"
    return result, text if fitted == [] else f"{text}\n{_fits(result['states'])}\nconverged: {lens.criterion}"


def _states_named(args: argparse.Namespace) -> list[int] | None:
    if args.translators is None:
        return None
    numbers = [] if args.translators == "none" else args.translators.split(",")
    if args.paper:
        raise UserError("--translators: the paper's form reads a state by that of the state before; leave it out")
    if not all(number.isascii() and number.isdigit() and len(number) < 5 for number in numbers):
        raise UserError(f"--translators: must be none, or numbers of states between commas, got {args.translators!r}")
    return [int(number) for number in numbers]


def _paper(states: list[dict[str, Any]]) -> str:
    lines = [[s["name"], s["score"]["kl"]["mean"], arguments.half_width(s["score"]["kl"])] for s in states]
    table = arguments.text_table(["state", "KL", "+-"], lines)
    return f"{table}\nKL(final || lens), bits; paper's form: each state is read with the translator of the state before"


def _states(states: list[dict[str, Any]]) -> str:
    header = ["state", "tuned KL", "+-", "logit KL", "tuned CE", "+-", "logit CE", "paper's form KL"]
    lines = [
        [
            s["name"],
            *_mean_and_half(s["tuned"], "kl"),
            s["logit"]["kl"]["mean"],
            *_mean_and_half(s["tuned"], "cross_entropy"),
            s["logit"]["cross_entropy"]["mean"],
            _mean_and_half(s["published"], "kl")[0],
        ]
        for s in states
    ]
    note = "bits; KL(final || lens), CE with the next token; +- half a 95 % interval over held-out windows"
    return f"{arguments.text_table(header, lines)}\n{note}; paper's form: translators read one state late\n"


def _mean_and_half(reading: dict[str, Any] | None, score: str) -> tuple[float | None, float | None]:
    return (None, None) if reading is None else (reading[score]["mean"], arguments.half_width(reading[score]))


def _rotated(of_input: dict[str, Any]) -> str:
    kl, ce, less = of_input["kl"], of_input["cross_entropy"], of_input["less_rotated"]
    lines = [
        ["as it is", kl["score"], ce["score"]],
        ["rotated", kl["floor"], ce["floor"]],
        ["+-, single rotations", kl["floor_deviation"], ce["floor_deviation"]],
    ]
    table = arguments.text_table(["input read by the output table", "KL", "CE"], lines)
    size, half = arguments.cell(less["mean"]), arguments.cell(arguments.half_width(less))
    return (
        f"{table}\n{ce['floor_draws']} random rotations of the table's columns; CE as it is less rotated: {size} +- "
        f"{half}, paired by window\n"
    )


def _baselines(baselines: dict[str, Any], step: int | None) -> str:
    lines = [
        [name, baselines[name]["kl"]["mean"], baselines[name]["cross_entropy"]["mean"]]
        for name in ("uniform", "unigram")
    ]
    lines += [[name, None, baselines[f"{name}_cross_entropy"]["mean"]] for name in ("bigram", "trigram")]
    table = arguments.text_table(["without a model", "KL", "CE"], lines)
    tokens = baselines["training_tokens"]
    return f"{table}\ncounted over the {tokens} training tokens {arguments.text_in_words(step)}\n"


def _fits(states: list[dict[str, Any]]) -> str:
    lines = [
        [
            s["name"],
            s["fit"]["iterations"],
            "yes" if s["fit"]["converged"] else "no",
            s["fit"]["training_kl"],
            s["tuned"]["kl"]["mean"],
        ]
        for s in states
        if s["fit"]
    ]
    return arguments.text_table(["translator", "iterations", "converged", "training KL", "held-out KL"], lines)
