"""Co-occurrence: whether the tables place tokens as the text does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tiedjax.analysis.basis import drawing, numbers, plain_json
from tiedjax.analysis.basis.chance import Score
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.statistics import Interval, interval
from tiedjax.analysis.basis.strata import THIRDS
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.basis.tables import content_hash
from tiedjax.analysis.instruments.cooccurrence.cooccurrence import Contexts, Cooccurrence, Stratum, contexts_of, measure
from tiedjax.errors import UserError

KINDS = ("as_target", "as_context")
VERSION = 2  # of its part of results.json


def collect(study: StudyRuns) -> list[dict[str, Any]]:
    """Both agreements of every last table with its run's text, which runs of the same data share."""
    texts: dict[tuple[str, int], Contexts] = {}
    tables = []
    for table in study.tables:
        try:
            text = _text(study, table.run, texts)
            agreement = measure(table.values, text, kept_V=table.seen)
        except UserError as error:
            tables.append(table.key | {"not_measured": str(error)})
            continue
        description = {"sha256": content_hash(table.values), "text": text.facts}
        tables.append(table.key | description | to_plain(agreement))
    return tables


def _text(study: StudyRuns, run: Any, texts: dict[tuple[str, int], Contexts]) -> Contexts:
    prepared, seq_len = study.text(run), run.config.model.seq_len
    key = prepared.fingerprint, seq_len
    if key not in texts:
        texts[key] = contexts_of(prepared, seq_len, run.token_counts.shape[1])
    return texts[key]


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figures."""
    tables = _by_table(results)
    if tables:
        yield drawing.Plot("cooccurrence", [_draw], (5.0, 0.9 + 0.42 * len(tables)))


def not_measured(results: drawing.Results) -> str | None:
    """Why no table could be measured; None where one could."""
    return None if _by_table(results) else next(iter(plain_json.not_measured(results["cooccurrence"])), "no table")


def facts(results: drawing.Results) -> dict[str, str]:
    """What was sampled and counted, in words."""
    record = next(r for r in results["cooccurrence"] if "text" in r)
    text = record["text"]
    pairs_in_words = f"{text['counted']:,}"
    if text["counted"] < text["available"]:
        pairs_in_words += f" of {text['available']:,}, spread evenly,"
    return {"tokens": f"{record['rows']:,}", "least": str(text["least_count"]), "counted": pairs_in_words}


def rows(results: drawing.Results) -> list[dict[str, Any]]:
    """Per table: both agreements, their difference paired by seed, the chance level, and the strata."""
    lines = []
    for (arm, role), agreements in _by_table(results).items():
        difference = interval(agreement.difference.mean for agreement in agreements)
        floors = [score.floor_deviation for kind in KINDS for score in _scores(agreements, kind)]
        strata = {
            name: [drawing.mean((score.score for score in _scores(parts, kind)), 2) for kind in KINDS]
            for name in THIRDS
            if (parts := [agreement.strata[name] for agreement in agreements if name in agreement.strata])
        }
        lines.append(
            {
                "arm": arm,
                "table": drawing.table_name(arm, role),
                **{kind: numbers.spread(vars(_mean(agreements, kind))) for kind in KINDS},
                "difference": numbers.spread(vars(difference)),
                "verdict": _verdict(difference),
                "chance": numbers.number(max((f for f in floors if f is not None), default=None)),
                "strata": strata,
            }
        )
    return lines


def _verdict(difference: Interval) -> str:
    if difference.mean is None or difference.low is None:
        return "not known"
    if not difference.excludes_zero:
        return "neither"
    return "what precedes" if difference.mean > 0 else "what follows"


def _by_table(results: drawing.Results) -> dict[tuple[str, str], list[Cooccurrence]]:
    return drawing.by_table(plain_json.measured(results["cooccurrence"], Cooccurrence))


def _scores(agreements: Sequence[Cooccurrence | Stratum], kind: str) -> list[Score]:
    return [getattr(agreement, kind) for agreement in agreements]


def _mean(agreements: Sequence[Cooccurrence], kind: str) -> Interval:
    return interval(score.score for score in _scores(agreements, kind))


def _draw(ax: drawing.Axes, results: drawing.Results) -> None:
    tables = _by_table(results)
    for y, ((arm, _), agreements) in enumerate(tables.items()):
        colour = drawing.colours(results)[arm]
        for kind, label in zip(KINDS, ("what precedes", "what follows"), strict=True):
            span = _mean(agreements, kind)
            face = colour if kind == "as_target" else "none"
            if span.low is not None:
                ax.plot([span.low, span.high], [y, y], color=colour, linewidth=5, alpha=0.3, solid_capstyle="round")
            ax.plot(
                [score.score for score in _scores(agreements, kind)],
                [y + 0.27] * len(agreements),
                "o",
                color=colour,
                markersize=3,
                markerfacecolor=face,
                markeredgewidth=0.8,
            )
            ax.plot(span.mean, y, "o", color=colour, markersize=8, markerfacecolor=face, markeredgewidth=1.8)
            if y == 0:  # the legend, in a colour of no arm
                face = drawing.MUTED if kind == "as_target" else "none"
                ax.plot([], [], "o", color=drawing.MUTED, markersize=8, markerfacecolor=face, label=label)
    ax.axvline(0, color=drawing.MUTED, linewidth=1, linestyle=drawing.DASHES, label="chance")
    ax.set_yticks(range(len(tables)), [drawing.table_name(*key) for key in tables])
    ax.set_ylim(len(tables) - 0.5, -0.6)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("rank correlation of cosines with the text’s")
