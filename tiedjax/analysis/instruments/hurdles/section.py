"""Hurdles: each arm's held-out loss beside n-grams of the text that it was shown."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from tiedjax.analysis.basis import drawing, numbers, plain_json
from tiedjax.analysis.basis.held_out import FrozenModel
from tiedjax.analysis.basis.ngrams import PREDICTORS
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.statistics import Interval, interval
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.instruments.hurdles.hurdles import MODEL, Hurdle, Hurdles, Text, measure, name_of_text, text_of
from tiedjax.errors import UserError

BESIDE = ("bigram", "trigram")  # with which every arm's loss is compared


def collect(study: StudyRuns, seed: int) -> list[dict[str, Any]]:
    """Every run of one seed; runs that were shown the same text have it counted once.

    Where a sweep has chosen options by the held-out windows with even numbers, the losses are those of the odd ones.
    """
    texts: dict[Hashable, Text] = {}
    return [{"arm": arm, "seed": s} | _record(study, run, texts) for (arm, s), run in study.runs.items() if s == seed]


def together(reference: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `collect` gave for every seed."""
    return {"runs": list(runs)}


def _record(study: StudyRuns, run: Any, texts: dict[Hashable, Text]) -> dict[str, Any]:
    try:
        prepared, model = study.text(run), FrozenModel(run)
        of_run = run, prepared, model.step, model.U_VD.shape[0]
        name = name_of_text(*of_run)
        if name not in texts:
            texts[name] = text_of(*of_run)
        text = texts[name]
        sweeps = study.study.sweep or study.study.arm_sweeps
        windows = slice((len(text.tokens_WS) + 1) // 2 if sweeps else 0, None)
        return dict(to_plain(measure(model, run, prepared, text=text, windows=windows)))
    except UserError as error:
        return {"not_measured": str(error)}


def over_seeds(runs: Sequence[Mapping[str, Any]], arm: str) -> dict[str, Interval]:
    """An arm's loss in bits a byte, and in bits a token less those of BESIDE; by the records of `together`."""
    of_arm = [run.value.losses for run in plain_json.measured(runs, Hurdles) if run.arm == arm]
    less = {f"less_{name}": _model_less(of_arm, name) for name in BESIDE}
    return {"bits_per_byte": interval(losses[MODEL].bits_per_byte for losses in of_arm), **less}


def _model_less(of_runs: Sequence[Mapping[str, Hurdle]], name: str) -> Interval:
    """The model's bits a token less a predictor's, over seeds."""
    spans = [losses[name].model_less for losses in of_runs]
    return interval(span.mean for span in spans if span)


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """It has none."""
    yield from ()


def not_measured(results: drawing.Results) -> list[str]:
    """What could not be measured, and why."""
    return plain_json.not_measured(results["hurdles"]["runs"])


def rows(results: drawing.Results) -> list[dict[str, str]]:
    """Per arm, over seeds: its loss in three units, and in bits a token less each predictor's."""
    lines = []
    for arm, runs in _by_arm(results).items():
        models = [run.losses[MODEL] for run in runs]
        line = {
            "arm": arm,
            "nats": drawing.spread(loss.nats for loss in models),
            "bits": drawing.spread(loss.bits.mean for loss in models),
            "bits_per_byte": drawing.spread(loss.bits_per_byte for loss in models),
        }
        less = {name: _model_less([run.losses for run in runs], name) for name in PREDICTORS}
        lines.append(line | {name: numbers.signed(vars(span)) for name, span in less.items()})
    return lines


def without_a_model(results: drawing.Results) -> list[str]:
    """What predicting without a model costs, and how much text was counted and asked about; in sentences."""
    runs = [run for runs in _by_arm(results).values() for run in runs]
    if not runs:
        return []
    costs = [f"{drawing.mean(run.losses[name].bits.mean for run in runs)} bits ({name})" for name in PREDICTORS]
    tokens = numbers.ends([run.held_out_tokens for run in runs])
    windows = numbers.ends([run.held_out_windows for run in runs])
    counted = numbers.ends([run.training_tokens for run in runs])
    beta, gamma = numbers.ends([run.beta for run in runs]), numbers.ends([run.gamma for run in runs])
    return [
        f"Without a model a token costs {', '.join(costs)}: means over runs.",
        f"Losses are over {tokens} held-out tokens in {windows} windows, those of each run’s own evaluation.",
        f"The predictors count {counted} training tokens that the run was shown; the strength of the bigram’s prior is "
        f"{beta}, of the trigram’s {gamma}.",
    ]


def _by_arm(results: drawing.Results) -> dict[str, list[Hurdles]]:
    return drawing.by_run(plain_json.measured(results["hurdles"]["runs"], Hurdles))
