"""What a diagnosis measures of one run or model: each part by its instrument, with its command's defaults."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import numpy as np

from tiedjax.analysis.basis import arguments
from tiedjax.analysis.basis.held_out import FrozenModel
from tiedjax.analysis.basis.model_on_text import EMBEDDED, ModelOnText
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.run_data import data_of
from tiedjax.analysis.basis.tables import seen_rows
from tiedjax.analysis.instruments.cooccurrence import cooccurrence
from tiedjax.analysis.instruments.lens import rotation
from tiedjax.analysis.instruments.norms import norms
from tiedjax.analysis.instruments.regret import regret
from tiedjax.analysis.instruments.rounding import rounding
from tiedjax.data.prepared import Prepared
from tiedjax.errors import UserError
from tiedjax.files import place_and_step
from tiedjax.tying import distinct

SCHEMA = 1
SOURCES = ("text", "tokens", "prepared", "tfds")  # the kinds of `data.source` with a name behind a colon
Report = Callable[[str], None]
Diagnosis = Mapping[str, Any]


def diagnose(
    place: str,
    text: str | None = None,
    seq_len: int | None = None,
    *,
    with_regret: bool = True,
    held_out: int | None = None,
    report: Report = lambda line: None,
    **regret_options: int,
) -> dict[str, Any]:
    """Every part of the run, RUN@STEP or model in a directory, as plain JSON; a part that cannot be measured says why.

    `text` names the text of a model as `data.source` does, or where that of a run lies now. `held_out` is about how
    many held-out tokens `lens` and `rounding` score, by default as many as these do. Regret is measured of a run, and
    of a model whose text is named; `regret_options` are those of its `measure`. Of a step with a snapshot and no
    checkpoint, what reads the body is not measured. UserError where there is no run and no model, no step, or no text.
    """
    named, (place, step) = place, place_and_step(place)
    subject = arguments.open_subject(place, text, seq_len)
    is_model = isinstance(subject, ModelOnText)
    if is_model and step is not None:
        raise UserError(f"{named}: a model has no steps; leave out @{step}")
    prepared = subject.prepared if is_model else data_of(subject, text)
    scored = {} if held_out is None else {"held_out_tokens": held_out}
    tables = distinct(subject.tables() if step is None else subject.tables(step))
    counts = np.asarray(subject.token_counts)
    rows, width = next(iter(tables.values())).shape
    trained: dict[str, FrozenModel] = {}

    def model() -> FrozenModel:
        if not trained:
            trained["model"] = FrozenModel(subject, step)
        return trained["model"]

    def of_lens() -> Any:
        return rotation.measure(model(), subject, prepared, **scored)

    def of_rounding() -> Any:
        return rounding.measure(model(), subject, prepared, **scored, report=report)

    def of_regret() -> Any:
        if not with_regret:
            raise UserError("left out, as --no-regret asks")
        if is_model and text is None:
            raise UserError("re-fits read a text that is named: give one with --text")
        return regret.measure(model(), subject, prepared, report=report, **regret_options)

    parts: dict[str, Callable[[], Any]] = {
        "cooccurrence": lambda: _contexts(tables, counts, prepared, subject.seq_len, rows, report),
        "norms": lambda: _norms(tables, counts),
        "lens": of_lens,
        "rounding": of_rounding,
        "regret": of_regret,
    }
    measured: dict[str, Any] = {}
    for name, measure in parts.items():
        report(name)
        try:
            measured[name] = to_plain(measure())
        except UserError as error:
            measured[name] = {"not_measured": str(error)}
    return {
        "kind": "diagnosis",
        "schema": SCHEMA,
        "inputs": arguments.described_roles(named, tables),
        **({"measured_on": subject.describe()} if is_model else {}),
        "name": place,
        "text": subject.in_words() if is_model else prepared_in_words(subject, prepared),
        "step": trained["model"].step if trained else step,
        "shared": len(tables) == 1,
        "rows": rows,
        "width": width,
        "references": references().get(str(rows)),
        "reference_sizes": sorted(int(size) for size in references()),
        **measured,
    }


def source_of(text: str | None) -> str | None:
    """What `--text` says as `data.source`: a glob of text files, unless it is such a source already."""
    if text is None or text == EMBEDDED or text.partition(":")[0] in SOURCES:
        return text
    return f"text:{text}"


def prepared_in_words(run: Any, prepared: Prepared) -> str:
    """A run's text, as that of a model is said."""
    return (
        f"{run.config.data.source} ({prepared.num_tokens('train'):,} training and {prepared.num_tokens('eval'):,} "
        f"held-out tokens, windows of {run.seq_len:,})"
    )


def references() -> dict[str, Any]:
    """What our own untied runs measure, by the rows of their tables: `benchmarks/diagnosis.py` writes it."""
    text = resources.files("tiedjax.analysis.diagnosis").joinpath("references.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def _contexts(
    tables: Mapping[str, Any], counts: np.ndarray, prepared: Prepared, seq_len: int, rows: int, report: Report
) -> dict[str, Any]:
    text = cooccurrence.contexts_of(prepared, seq_len, rows, report=report)
    seen_V = seen_rows(counts)
    by_role = {role: cooccurrence.measure(table, text, kept_V=seen_V) for role, table in tables.items()}
    return {"text": text.facts, "roles": by_role}


def _norms(tables: Mapping[str, Any], counts: np.ndarray) -> dict[str, Any]:
    seen_V, count_V = seen_rows(counts), counts[-1]  # as target
    return {"roles": {role: norms.measure(table[seen_V], count_V[seen_V]) for role, table in tables.items()}}
