"""What each arm's model writes: a short text of its first seed's run, begun alike and drawn with the same numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tiedjax.analysis.basis import drawing, numbers, plain_json
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.errors import UserError

TOKENS, TEMPERATURE, DRAW_SEED = 40, 1.0, 0
_BEGINNINGS = {True: "begins a document", False: "follows the token that the model was shown most often"}


def collect(study: StudyRuns) -> dict[str, Any]:
    """A record for each arm that has a run: its `text`, or why there is none; and what all texts have in common."""
    latest_to_first = [(arm, seed) for seed in reversed(study.study.seeds) for arm in study.study.arms]
    first = dict(run for run in latest_to_first if run in study.runs)
    return {
        "tokens": TOKENS,
        "temperature": TEMPERATURE,
        "draw_seed": DRAW_SEED,
        "arms": [
            {"arm": arm, "seed": first[arm]} | _record(study.runs[arm, first[arm]])
            for arm in study.study.arms
            if arm in first
        ],
    }


def _record(run: Any) -> dict[str, Any]:
    from tiedjax.sample import sample_text  # here: it brings JAX, which drawing does not need

    try:
        text = sample_text(run, tokens=TOKENS, temperature=TEMPERATURE, seed=DRAW_SEED)
    except UserError as error:
        return {"not_measured": str(error)}
    return {"begins_document": run.tokenizer_path is not None, "text": text}


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """It has none."""
    yield from ()


def about(results: drawing.Results) -> list[str]:
    """How the texts were made; nothing where there are none."""
    samples = results["samples"]
    written = [record for record in samples["arms"] if "text" in record]
    if not written:
        return []
    beginnings = " or ".join(dict.fromkeys(_BEGINNINGS[record["begins_document"]] for record in written))
    return [
        f"Each text {beginnings} and is {samples['tokens']} tokens long.",
        f"All are drawn at temperature {samples['temperature']:g} with the same random numbers.",
        "A text is an impression; the held-out loss is the measure.",
    ]


def not_measured(results: drawing.Results) -> list[str]:
    """Why arms have no text, each reason once."""
    return plain_json.not_measured(results["samples"]["arms"])


def rows(results: drawing.Results) -> list[dict[str, Any]]:
    """Each arm's run, its held-out loss, and its text with white space visible, in pieces between which lines break."""
    runs = {(run["arm"], run["seed"]): run for run in results["runs"]}
    return [
        {
            "arm": record["arm"],
            "run": run["name"],
            "loss": numbers.number(run["eval_loss"]),
            "pieces": re.findall(r"[^␣⏎]*[␣⏎]|[^␣⏎]+", numbers.visible(record["text"])),
        }
        for record in results["samples"]["arms"]
        if "text" in record
        for run in [runs[record["arm"], record["seed"]]]
    ]
