"""`tiedjax analyze calibration RUN`."""

from __future__ import annotations

import argparse
from typing import Any

from tiedjax.analysis.basis import arguments

HELP = "predicted probability against what happens, by token frequency"
SUBJECT = "run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and the options."""
    arguments.add_run(parser)
    arguments.add_data(parser)
    arguments.add_count(parser, "--held-out-tokens", 32_768, "held-out tokens that are scored")
    arguments.add_count(parser, "--draws", 20, "draws of targets from the model's own predictions for the floors")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    held_out_tokens, draws = (arguments.at_least(args, name) for name in ("held-out-tokens", "draws"))
    from tiedjax.analysis.basis.held_out import FrozenModel, held_out_windows
    from tiedjax.analysis.basis.records import to_plain
    from tiedjax.analysis.basis.run_data import data_of
    from tiedjax.analysis.basis.strata import strata
    from tiedjax.analysis.basis.tables import open_run
    from tiedjax.analysis.instruments.calibration.calibration import calibrate, forecasts, frequency_bins

    run = open_run(args.a)
    prepared = data_of(run, args.data)
    model = FrozenModel(run)
    tokens_WS = held_out_windows(prepared, run.config.model.seq_len, held_out_tokens)
    count_V = run.token_counts[1]  # as target
    partitions = {"strata": strata(count_V), "bins": frequency_bins(count_V)}
    found = {
        name: to_plain(calibrate(forecast, groups, count_V, draws=draws))
        for (name, groups), forecast in zip(
            partitions.items(), forecasts(model, tokens_WS, list(partitions.values())), strict=True
        )
    }
    everywhere = {key: value for key, value in found["strata"].items() if key != "groups"}
    rows, width = model.U_VD.shape
    result = {
        "inputs": model.describe(args.a),
        "form": "corrected",
        "step": model.step,
        "rows": rows,
        "rows_masked_out": 0,
        "width": width,
        "counts": "as target",
        "floor_draws": draws,
        **everywhere,
        **{name: of["groups"] for name, of in found.items()},
    }
    head = f"{args.a} at step {model.step}: {everywhere['positions']} held-out positions, {rows} tokens"
    return result, f"{head}\n{_overall(everywhere)}\n\n{_groups('stratum', result['strata'])}\n\n" + (
        f"{_groups('log10(count + 1)', result['bins'])}\n"
        "log2 ratio: of the mean predicted probability to the share of targets; error: expected calibration error, of\n"
        "the group's probability and of the likeliest token; over: mean probability of the likeliest token less how\n"
        "often it is right; each floor: the same with targets drawn from the model's own predictions"
    )


def _overall(found: dict[str, Any]) -> str:
    means = {name: found[name]["mean"] for name in ("loss", "entropy", "confidence", "accuracy")}
    lines: list[list[Any]] = [[name, value, None, None] for name, value in means.items()]
    for name, title in [("top_error", "calibration error"), ("overconfidence", "overconfidence")]:
        score = found[name]
        lines.append([title, score["score"], score["floor"], score["floor_standard_deviation"]])
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
            g["log2_ratio"]["floor_standard_deviation"],
            g["group_error"]["score"],
            g["group_error"]["floor"],
            g["target_probability"],
            g["entropy"],
            g["top_error"]["score"],
            g["top_error"]["floor"],
            g["overconfidence"]["score"],
            g["overconfidence"]["floor_standard_deviation"],
        ]
        for g in groups
    ]
    return arguments.text_table(header, lines)
