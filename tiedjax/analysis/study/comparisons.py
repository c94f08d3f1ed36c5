"""Every comparison of two tables of a study: with the twin's at each snapshot, and between seeds at the end.

The subject table of every run is compared with the two tables of the reference arm's run of the same seed. Such twins
share the body's initialisation and the data order, but their tables start independent (an arm of the reference's own
scheme excepted, which the results' `notes` then say), so what alignment there is has been learned. Alignment maps the
reference table onto the subject's, over the tokens that both runs saw in training.

How near a table can be at all is another matter: every arm is compared with the reference runs of other seeds too, the
reference arm included. A table that training hardly shapes is near to nothing, its own twin of another seed included.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tiedjax.analysis.basis import tokens
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.strata import strata
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.basis.tables import ROLES, seen_rows
from tiedjax.analysis.instruments.alignment.align import Comparison, align_rows, histogram
from tiedjax.analysis.instruments.alignment.align import measure as compare
from tiedjax.analysis.instruments.alignment.fitting import CentredTables
from tiedjax.analysis.instruments.evolution.evolution import Trail
from tiedjax.analysis.study import verdicts
from tiedjax.analysis.study.examples import token_rows
from tiedjax.config import StudyConfig
from tiedjax.tying import as_roles, distinct

EXAMPLES = 12  # tokens


def over_snapshots(held: StudyRuns, seed: int) -> dict[str, Any]:
    """Every snapshot of a seed's runs: `comparisons` with the twin's tables, `evolution`, and rows of `examples`.

    `examples` is None where the seed has no run of the reference arm.
    """
    study, runs = held.study, {arm: held.runs[arm, seed] for arm in held.study.arms if (arm, seed) in held.runs}
    reference = runs.get(study.reference)
    walk = _Walk([] if reference is None else tokens.most_frequent(reference.token_counts, EXAMPLES))
    walk.through(study, runs, seed)
    examples = None if reference is None else _examples(study, reference, seed, walk)
    return {"comparisons": walk.comparisons, "evolution": walk.evolution, "examples": examples}


def joined(walks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `over_snapshots` gives of several seeds as one; the examples are those of the first that has any."""
    chained = {name: [each for walk in walks for each in walk[name]] for name in ("comparisons", "evolution")}
    return chained | {"examples": next(walk["examples"] for walk in walks if walk["examples"])}


class _Walk:
    """One pass over the snapshots, each read once: what several instruments make of them."""

    def __init__(self, ids: list[int]):
        self.ids = ids
        self.comparisons: list[dict[str, Any]] = []
        self.evolution: list[dict[str, Any]] = []
        self.examples: dict[tuple[str, int], list[dict[str, Any]]] = {}

    def through(self, study: StudyConfig, runs: Mapping[str, Any], seed: int) -> None:
        """Takes every snapshot of one seed's runs, by arm."""
        seen = {arm: seen_rows(run.token_counts) for arm, run in runs.items()}
        groups = {arm: strata(run.token_counts) for arm, run in runs.items()}
        trails: dict[tuple[str, str], Trail] = {}
        first: dict[str, dict[str, np.ndarray]] = {}
        last = {arm: run.snapshot_steps[-1] for arm, run in runs.items()}
        roles = {arm: list(distinct(run.tables(last[arm]))) for arm, run in runs.items()}
        ended: dict[str, Any] = {}  # the last tables of runs that are shorter than others
        for step in sorted({step for run in runs.values() for step in run.snapshot_steps}):
            tables = {arm: run.tables(step) for arm, run in runs.items() if step in run.snapshot_steps}
            centred = CentredTables()
            for arm, both in tables.items():
                by_role, steps = as_roles(both, roles[arm]), runs[arm].snapshot_steps
                for role, table in by_role.items():
                    trail = Trail(seen[arm], strata=groups[arm])
                    trails.setdefault((arm, role), trail).add(step, table, centred.rows(table, seen[arm]))
                chosen = {role: table[self.ids] for role, table in by_role.items()}
                first[arm] = chosen | first.get(arm, {})
                if step == steps[-1]:
                    self.examples[arm, seed] = token_rows(first[arm], chosen)
            ended |= {arm: both for arm, both in tables.items() if step == last[arm] < max(last.values())}
            for arm in runs if study.reference in runs else ():
                final = step == max(last[arm], last[study.reference])
                of_reference, both = (
                    tables.get(name, ended.get(name) if final else None) for name in (study.reference, arm)
                )
                if of_reference is not None and both is not None:
                    twin = None if arm == study.reference else both
                    kept_V, counts = seen[study.reference] & seen[arm], runs[study.reference].token_counts
                    where = {**arm_and_seed((arm, seed)), "reference_seed": seed, "step": step, "final": final}
                    names = roles[arm]
                    self.comparisons += _compared(of_reference, twin, names, kept_V, counts, where, centred)
        for (arm, role), trail in trails.items():
            self.evolution.append(arm_and_seed((arm, seed)) | {"role": role} | to_plain(trail.result()))


def _compared(
    reference: Any,
    twin: Any | None,
    names: list[str],
    kept_V: np.ndarray,
    counts: np.ndarray,
    where: Mapping[str, Any],
    centred: CentredTables,
) -> Iterator[dict[str, Any]]:
    """The reference's tables against those of its twin with these names: all fits if final, else one.

    Without a twin they are compared with each other.
    """
    for subject_role, reference_role, x, y in _pairs(reference, twin, names):
        about = {**where, "subject_role": subject_role, "reference_role": reference_role}
        if where["final"]:
            for record in _by_fit(compare(x, y, kept_V=kept_V, counts=counts, held_out_floors=False)):
                yield about | record
        else:
            fit = verdicts.FIT
            alignment = align_rows(centred.rows(x, kept_V), centred.rows(y, kept_V), fits=(fit,), draws=1)
            yield about | {"fit": fit} | to_plain(alignment.scores[fit])


def _by_fit(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """A record for each fit."""
    alignment = comparison.alignment
    for fit, score in alignment.scores.items():
        yield {
            "fit": fit,
            "width": alignment.width,
            "held_out": alignment.held_out[fit].score,
            "paper": comparison.paper[fit],
            "histogram": histogram(alignment.cosines[fit]),
            "strata": to_plain(comparison.strata[fit]),
            verdicts.MAIN: comparison.beyond_frequency[fit].corrected,
            "penalty": alignment.penalty if fit == "ridge" else None,
            **to_plain(score),
        }


def _pairs(reference: Any, twin: Any | None, names: list[str]) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """(subject role, reference role, reference table, subject table)."""
    if twin is None:
        yield "output", "input", reference.input, reference.output
        return
    for subject_role, table in as_roles(twin, names).items():
        for reference_role in ROLES:
            yield subject_role, reference_role, getattr(reference, reference_role), table


def between_seeds(held: StudyRuns) -> list[dict[str, Any]]:
    """Every arm's last tables against those of the reference runs of the other seeds.

    The reference arm's own are compared role by role, and each two seeds once.
    """
    return list(_between_seeds(held))


def _between_seeds(held: StudyRuns) -> Iterator[dict[str, Any]]:
    study = held.study
    for (arm, seed), other_seed in itertools.product(held.last, study.seeds):
        is_reference = arm == study.reference
        if (seed <= other_seed) if is_reference else (seed == other_seed):
            continue
        for table, target in itertools.product(held.last[arm, seed], held.last.get((study.reference, other_seed), [])):
            if is_reference and table.role != target.role:
                continue
            about: dict[str, Any] = {"arm": arm, "subject_role": table.role, "reference_role": target.role}
            about |= {"seed": f"{seed} to {other_seed}", "seeds": [seed, other_seed]}
            pair = compare(
                target.values,
                table.values,
                fits=(verdicts.FIT,),
                kept_V=table.seen & target.seen,
                counts=target.counts,
                held_out_floors=False,
            )
            for record in _by_fit(pair):
                yield about | record


def alignment_over_steps(comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A curve over the snapshots for each pair of tables: steps, and the score with its floor at each."""
    curves: dict[tuple[Any, ...], dict[str, Any]] = {}
    names = ("arm", "seed", "subject_role", "reference_role")
    for record in comparisons:
        if record["fit"] != "orthogonal":
            continue
        key = tuple(record[name] for name in names)
        empty: dict[str, list[Any]] = {"steps": [], "score": [], "floor": [], "corrected": []}
        curve = curves.setdefault(key, dict(zip(names, key, strict=True)) | {"fit": "orthogonal"} | empty)
        curve["steps"].append(record["step"])
        for name in ("score", "floor", "corrected"):
            curve[name].append(record[name])
    return list(curves.values())


def _examples(study: StudyConfig, reference: Any, seed: int, walk: _Walk) -> dict[str, Any]:
    texts = tokens.token_texts(reference.tokenizer_path, walk.ids)
    rows = [
        {
            "id": i,
            "token": texts[n],
            "count": int(reference.token_counts[1][i]),
            "arms": {arm: walk.examples[arm, seed][n] for arm in study.arms if (arm, seed) in walk.examples},
        }
        for n, i in enumerate(walk.ids)
    ]
    return {"seed": seed, "tokens": rows}


def arm_and_seed(key: tuple[str, int]) -> dict[str, Any]:
    """What names a run in a record."""
    return {"arm": key[0], "seed": key[1]}
