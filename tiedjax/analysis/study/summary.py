"""Everything a study's runs say, as one dict that JSON can hold: results.json.

The subject table of every run is compared with the two tables of the reference arm's run of the same seed. Such twins
share the body's initialisation and the data order, but their tables start independent (an arm of the reference's own
scheme excepted, which `notes` then says), so what alignment there is has been learned. Alignment maps the reference
table onto the subject's, over the tokens that both runs saw in training.

How near a table can be at all is another matter: every arm is compared with the reference runs of other seeds too, the
reference arm included. A table that training hardly shapes is near to nothing, its own twin of another seed included.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from tiedjax.analysis.basis import tokens
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.run_data import data_of
from tiedjax.analysis.basis.strata import strata
from tiedjax.analysis.basis.study_runs import Runs, StudyRuns
from tiedjax.analysis.basis.tables import ROLES, seen_rows
from tiedjax.analysis.instruments.alignment.align import Comparison, align, histogram
from tiedjax.analysis.instruments.alignment.align import measure as compare
from tiedjax.analysis.instruments.evolution.evolution import Trail
from tiedjax.analysis.instruments.gradients.gradients import measure as gradient_flow
from tiedjax.analysis.study import verdict, words
from tiedjax.analysis.study.claims import claims
from tiedjax.analysis.study.examples import token_rows
from tiedjax.analysis.study.reproducibility import ReproducibleShare, reproducible_shares
from tiedjax.analysis.study.sections import SCHEMA, SECTIONS, versions
from tiedjax.config import StudyConfig
from tiedjax.config_files import flatten, to_tree
from tiedjax.data.prepared import Prepared
from tiedjax.errors import UserError
from tiedjax.tying import distinct

EXAMPLES = 12


def summarize(
    study: StudyConfig,
    runs: Runs,
    *,
    environment: Mapping[str, Any] | None = None,
    text: Callable[[Any], Prepared] = data_of,
    parts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """results.json of a study, from its runs by (arm, seed).

    `environment` says what the caller knows of the machine, versions and time; `text` finds a run's data; `parts` are
    those of `parts_of`, if others have collected them. Pairs without a run are named in `notes`. UserError when no
    seed has a run of the reference arm.
    """
    seeds = [seed for seed in study.seeds if (study.reference, seed) in runs]
    if not seeds:
        raise UserError(f"study: no run of the reference arm {study.reference!r}; nothing can be compared with it")
    if parts is None:
        held = StudyRuns(study, runs, text)
        parts = {name: collect(name, held) for name in parts_of(study)}
    walk = parts["walk"]
    final = [r for r in walk["comparisons"] if r["final"]]
    flows = {key: gradient_flow(run.metrics) for key, run in runs.items()}
    arms = {
        arm: verdict.arm_summary(
            arm,
            final,
            {seed: flow for (a, seed), flow in flows.items() if a == arm},
            _held_out_losses(runs, arm),
            _held_out_losses(runs, study.baseline),
        )
        | {"overrides": study.arms[arm], "differs_from_reference": _differences(study, runs, arm, seeds[0])}
        for arm in study.arms
        if any(a == arm for a, _ in runs)
    }
    results = {
        "schema": SCHEMA,
        "versions": versions(),
        "kind": "study",
        "headline": verdict.headline(study, arms, final),
        "between_seeds": verdict.between_seeds(parts["between_seeds"]),
        "reproducible_share": parts["reproducible_share"],
        "changes": verdict.changes(study, arms, final),
        "arms": arms,
        "comparisons": [_without(r, "final") for r in final],
        "alignment_over_steps": _over_steps(walk["comparisons"]),
        "gradients": [_key(key) | to_plain(flow) for key, flow in flows.items()],
        "evolution": walk["evolution"],
        **{name: parts[name] for name in SECTIONS if name in parts},
        "lens": SECTIONS["lens"].together(
            study.reference, [run for seed in study.seeds for run in parts[f"lens {seed}"]]
        ),
        "examples": walk["examples"],
        "runs": [_run_facts(key, run) for key, run in runs.items()],
        "study": {
            "reference": study.reference,
            "baseline": study.baseline,
            "seeds": list(study.seeds),
            "arms": dict(study.arms),
            "config": to_tree(runs[study.reference, seeds[0]].config),
        },
        "environment": dict(environment or {}),
        "notes": _notes(study, runs),
    }
    plain = to_plain(results)
    made = verdict.statements(study, arms, final)
    made |= verdict.share_statements(study, plain["reproducible_share"]) | claims(plain)
    plain["statements"] = to_plain(verdict.decided(made))
    answer, *findings = words.answer(plain)
    return {"answer": answer, "findings": findings, **plain}


def parts_of(study: StudyConfig) -> dict[str, Callable[[StudyRuns], Any]]:
    """What takes long, each from the runs alone, so that several processes can share it out: the longest first."""
    sections = {name: section.collect for name, section in SECTIONS.items() if hasattr(section, "collect")}
    of_every_seed = sections.pop("lens")
    return {
        "walk": _walked,
        **{f"lens {seed}": partial(of_every_seed, seed=seed) for seed in study.seeds},
        "between_seeds": lambda held: list(_between_seeds(held)),
        "reproducible_share": _reproducible_shares,
        **sections,
    }


def seed_of(name: str) -> int | None:
    """The seed whose runs alone one of `parts_of` is about; None for those that are about all runs."""
    kind, _, seed = name.partition(" ")
    return int(seed) if kind == "lens" else None


def collect(name: str, held: StudyRuns) -> Any:
    """One of `parts_of` the study, as plain JSON."""
    return to_plain(parts_of(held.study)[name](held))


def _walked(held: StudyRuns) -> dict[str, Any]:
    study, runs = held.study, held.runs
    first = next(seed for seed in study.seeds if (study.reference, seed) in runs)
    walk = _Walk(tokens.most_frequent(runs[study.reference, first].token_counts, EXAMPLES))
    for seed in study.seeds:
        walk.through(study, {arm: runs[arm, seed] for arm in study.arms if (arm, seed) in runs}, seed)
    examples = _examples(study, runs, first, walk)
    return {"comparisons": walk.comparisons, "evolution": walk.evolution, "examples": examples}


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
        for step in sorted({step for run in runs.values() for step in run.snapshot_steps}):
            tables = {arm: run.tables(step) for arm, run in runs.items() if step in run.snapshot_steps}
            for arm, both in tables.items():
                by_role, steps = distinct(both), runs[arm].snapshot_steps
                for role, table in by_role.items():
                    trail = Trail(seen[arm], strata=groups[arm])
                    trails.setdefault((arm, role), trail).add(step, table)
                chosen = {role: table[self.ids] for role, table in by_role.items()}
                first.setdefault(arm, chosen)
                if step == steps[-1]:
                    self.examples[arm, seed] = token_rows(first[arm], chosen)
            if study.reference in tables:
                for arm, both in tables.items():
                    common = set(runs[study.reference].snapshot_steps) & set(runs[arm].snapshot_steps)
                    twin = None if arm == study.reference else both
                    rows, counts = seen[study.reference] & seen[arm], runs[study.reference].token_counts
                    where = {**_key((arm, seed)), "reference_seed": seed, "step": step, "final": step == max(common)}
                    self.comparisons += _compared(tables[study.reference], twin, rows, counts, where)
        for (arm, role), trail in trails.items():
            self.evolution.append(_key((arm, seed)) | {"role": role} | to_plain(trail.result()))


def _compared(
    reference: Any, twin: Any | None, rows: np.ndarray, counts: np.ndarray, where: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The reference's tables against its twin's (against each other without one): all fits if final, else one."""
    for subject_role, reference_role, x, y in _pairs(reference, twin):
        about = {**where, "subject_role": subject_role, "reference_role": reference_role}
        if where["final"]:
            for record in _by_fit(compare(x, y, kept_V=rows, counts=counts)):
                yield about | record
        else:
            fit = verdict.FIT
            yield about | {"fit": fit} | to_plain(align(x, y, fits=(fit,), kept_V=rows, draws=1).scores[fit])


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
            verdict.MAIN: comparison.beyond_frequency[fit].corrected,
            "penalty": alignment.penalty if fit == "ridge" else None,
            **to_plain(score),
        }


def _pairs(reference: Any, twin: Any | None) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """(subject role, reference role, reference table, subject table)."""
    if twin is None:
        yield "output", "input", reference.input, reference.output
        return
    for subject_role, table in distinct(twin).items():
        for reference_role in ROLES:
            yield subject_role, reference_role, getattr(reference, reference_role), table


def _between_seeds(held: StudyRuns) -> Iterator[dict[str, Any]]:
    """Every arm's last tables against those of the reference runs of the other seeds.

    The reference arm's own are compared role by role, and each two seeds once.
    """
    study = held.study
    for (arm, seed), other_seed in itertools.product(held.last, study.seeds):
        own = arm == study.reference
        if (seed <= other_seed) if own else (seed == other_seed):
            continue
        for table, target in itertools.product(held.last[arm, seed], held.last.get((study.reference, other_seed), [])):
            if own and table.role != target.role:
                continue
            about: dict[str, Any] = {"arm": arm, "subject_role": table.role, "reference_role": target.role}
            about |= {"seed": f"{seed} to {other_seed}", "seeds": [seed, other_seed]}
            rows = table.seen & target.seen
            pair = compare(target.values, table.values, fits=(verdict.FIT,), kept_V=rows, counts=target.counts)
            for record in _by_fit(pair):
                yield about | record


def _reproducible_shares(held: StudyRuns) -> dict[str, dict[str, ReproducibleShare]]:
    tables = {run: {table.role: table.values for table in last} for run, last in held.last.items()}
    return reproducible_shares(tables, {run: last[0].counts for run, last in held.last.items()}, held.study.reference)


def _over_steps(comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
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


def _examples(study: StudyConfig, runs: Runs, seed: int, walk: _Walk) -> dict[str, Any]:
    reference = runs[study.reference, seed]
    texts = tokens.token_texts(reference.tokenizer_path, walk.ids)
    found = [
        {
            "id": i,
            "token": texts[n],
            "count": int(reference.token_counts[1][i]),
            "arms": {arm: walk.examples[arm, seed][n] for arm in study.arms if (arm, seed) in walk.examples},
        }
        for n, i in enumerate(walk.ids)
    ]
    return {"seed": seed, "tokens": found}


def _held_out_losses(runs: Runs, arm: str) -> dict[int, float | None]:
    return {seed: _last(run.metrics.get("eval_loss")) for (name, seed), run in runs.items() if name == arm}


def _run_facts(key: tuple[str, int], run: Any) -> dict[str, Any]:
    metrics = run.metrics
    return _key(key) | {
        "name": run.name,
        "steps": int(metrics["step"][-1]),
        "tokens": int(metrics["tokens"][-1]),
        "train_loss": _last(metrics.get("loss")),
        "eval_loss": _last(metrics.get("eval_loss")),
        "parameters": _parameters(run.config),
        "training_seconds": _training_seconds(metrics),
    }


def _parameters(config: Any) -> int:
    """How many numbers a run trains: the body's and the tables', a shared table once."""
    import jax

    from tiedjax.lm import abstract_params

    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def _training_seconds(metrics: Mapping[str, np.ndarray]) -> float | None:
    """The time that the logged lines took, from their tokens and tokens per second; pauses do not count."""
    if "tokens_per_second" not in metrics:
        return None
    seconds = np.diff(metrics["tokens"], prepend=0) / metrics["tokens_per_second"]
    return float(seconds[np.isfinite(seconds)].sum())


def _last(column: np.ndarray | None) -> float | None:
    known = [] if column is None else np.asarray(column, np.float64)[np.isfinite(column)]
    return float(known[-1]) if len(known) else None


def _differences(study: StudyConfig, runs: Runs, arm: str, seed: int) -> dict[str, Any]:
    """Dotted key: [the reference's value, the arm's value], from the configs that the runs resolved to."""
    if (arm, seed) not in runs:
        return {}
    ours = dict(flatten(to_tree(runs[arm, seed].config)))
    theirs = dict(flatten(to_tree(runs[study.reference, seed].config)))
    return {key: [theirs[key], value] for key, value in ours.items() if theirs[key] != value}


def _notes(study: StudyConfig, runs: Runs) -> list[str]:
    notes = [
        "Each subject is compared with the reference run of the same seed: same body initialisation and data order, "
        "independent initial tables."
    ]
    if len(study.seeds) == 1:
        notes.append("One seed: no interval over seeds can be given.")
    scheme = {arm: run.config.tying.scheme for (arm, _), run in runs.items()}
    same = [arm for arm in scheme if arm != study.reference and scheme[arm] == scheme[study.reference]]
    if same:
        notes.append(
            f"{', '.join(same)}: begins with the reference's own tables, so part of its nearness is inherited."
        )
    missing = [f"{arm}-{seed}" for arm in study.arms for seed in study.seeds if (arm, seed) not in runs]
    if missing:
        notes.append(f"Not among the results: {', '.join(missing)}.")
    return notes


def _key(key: tuple[str, int]) -> dict[str, Any]:
    return {"arm": key[0], "seed": key[1]}


def _without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k != name}
