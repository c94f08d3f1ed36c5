"""`tiedjax analyze calibration RUN`."""

from __future__ import annotations

import argparse
from typing import Any

from tiedjax.analysis.basis import arguments

HELP = "predicted probability against what happens, by token frequency"
SUBJECT = "model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and the options."""
    arguments.add_subject(parser, SUBJECT)
    arguments.add_count(parser, "--held-out-tokens", 16_384, "held-out tokens that are scored")
    arguments.add_count(parser, "--draws", 20, "draws of targets from the model's own predictions for the floors")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    held_out_tokens, draws = (arguments.at_least(args, name) for name in ("held-out-tokens", "draws"))
    from tiedjax.analysis.basis.held_out import FrozenModel
    from tiedjax.analysis.basis.plain_json import to_plain
    from tiedjax.analysis.instruments.calibration.calibration import measure

    run, prepared = arguments.read_text(args)
    model = FrozenModel(run)
    calibration = measure(model, run, prepared, held_out_tokens=held_out_tokens, draws=draws)
    overall = to_plain(calibration.by_stratum)
    strata = overall.pop("groups")
    result = arguments.run_result(args, run, model.describe(args.a), calibration.rows, calibration.width) | {
        "step": calibration.step,
        "counts": "as target",
        "floor_draws": draws,
        **overall,
        "strata": strata,
        "bins": to_plain(calibration.by_bin.groups),
    }
    name = arguments.subject_in_words(args, run, calibration.step)
    head = f"{name}: {overall['positions']} held-out positions, {calibration.rows} tokens"
    return result, f"{head}\n{_overall_table(overall)}\n\n{_groups('stratum', result['strata'])}\n\n" + (
        f"{_groups('log10(count + 1)', result['bins'])}\n"
        "log2 ratio: of the mean predicted probability to the share of targets; error: expected calibration error, of\n"
        "the group's probability and of the likeliest token; over: mean probability of the likeliest token less how\n"
        "often it is right; each floor: the same with targets drawn from the model's own predictions"
    )


def _overall_table(overall: dict[str, Any]) -> str:
    means = {name: overall[name]["mean"] for name in ("loss", "entropy", "confidence", "accuracy")}
    lines: list[list[Any]] = [[name, value, None, None] for name, value in means.items()]
    for name, title in [("top_error", "calibration error"), ("overconfidence", "overconfidence")]:
        score = overall[name]
        lines.append([title, score["score"], score["floor"], score["floor_deviation"]])
    return arguments.text_table(["over all positions", "", "floor", "+-"], lines)


def _groups(title: str, groups: list[dict[str, Any]]) -> str:
    header = [title, "tokens", "share", "predicted", "log2 ratio", "+-", "error", "floor"]
    header += ["p(target)", "entropy", "top error", "floor", "over", "+-"]
    lines = [
        [
            g["name"],
            g["tokens"],
            g["share"],
            g["mass"],
            g["log2_ratio"]["score"],
            g["log2_ratio"]["floor_deviation"],
            g["group_error"]["score"],
            g["group_error"]["floor"],
            g["target_probability"],
            g["entropy"],
            g["top_error"]["score"],
            g["top_error"]["floor"],
            g["overconfidence"]["score"],
            g["overconfidence"]["floor_deviation"],
        ]
        for g in groups
    ]
    return arguments.text_table(header, lines)
