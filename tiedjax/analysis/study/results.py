"""Everything a study's runs say, as one dict that JSON can hold: results.json."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.statistics import interval
from tiedjax.analysis.basis.study_runs import Runs, StudyRuns
from tiedjax.analysis.instruments import SLOW
from tiedjax.analysis.instruments.gradients.gradients import measure as gradient_flow
from tiedjax.analysis.instruments.hurdles.section import over_seeds
from tiedjax.analysis.study import losses, sentences, verdicts
from tiedjax.analysis.study.claims import claims
from tiedjax.analysis.study.comparisons import alignment_over_steps, arm_and_seed, between_seeds, joined, over_snapshots
from tiedjax.analysis.study.reproducibility import ReproducibleShare, reproducible_shares
from tiedjax.analysis.study.run_facts import REPORTED_LOSS, differences, held_out_losses, run_facts
from tiedjax.analysis.study.sections import SCHEMA, SECTIONS, versions
from tiedjax.config import StudyConfig
from tiedjax.config_files import to_tree
from tiedjax.errors import UserError
from tiedjax.text import nearest

OF_EVERY_SEED = ("regret", "lens", "hurdles")  # sections whose seeds are collected one by one, the longest first


def summarize(
    study: StudyConfig,
    runs: Runs,
    *,
    environment: Mapping[str, Any] | None = None,
    parts: Mapping[str, Any] | None = None,
    sweep: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """results.json of a study, from its runs by (arm, seed).

    `environment` says what the caller knows of the machine, versions and time; `parts` are those of `parts_of`, if
    others have collected them; `sweep` says by arm what was tried to choose its options. Pairs
    without a run are named in `notes`. UserError when no seed has a run of the reference arm.
    """
    seeds = [seed for seed in study.seeds if (study.reference, seed) in runs]
    if not seeds:
        raise UserError(f"study: no run of the reference arm {study.reference!r}; nothing can be compared with it")
    if parts is None:
        held = StudyRuns(study, runs)
        parts = {name: collect(name, held) for name in parts_of(study)}
    together = {
        name: SECTIONS[name].together(study.reference, runs_of_all)
        for name in OF_EVERY_SEED
        if (runs_of_all := [run for seed in study.seeds for run in parts.get(f"{name} {seed}", ())])
    }
    walk = joined([parts[name] for seed in study.seeds if (name := f"walk {seed}") in parts])
    loss = REPORTED_LOSS if sweep else "eval_loss"
    final = [r for r in walk["comparisons"] if r["final"]]
    flows = {key: gradient_flow(run.metrics) for key, run in runs.items()}
    arms = {
        arm: verdicts.arm_summary(
            arm,
            final,
            {seed: flow for (a, seed), flow in flows.items() if a == arm},
            held_out_losses(runs, arm, loss),
            held_out_losses(runs, study.baseline, loss),
            held_out_losses(runs, study.reference, loss),
        )
        | {"second_eval_loss": interval(held_out_losses(runs, arm, "second_eval_loss").values())}
        | {"second_source": next(run.config.data.second_source for (a, _), run in runs.items() if a == arm)}
        | ({"hurdles": over_seeds(together["hurdles"]["runs"], arm)} if "hurdles" in together else {})
        | {"overrides": study.arms[arm], "differs_from_reference": differences(study, runs, arm, seeds[0])}
        for arm in study.arms
        if any(a == arm for a, _ in runs)
    }
    results = {
        "schema": SCHEMA,
        "versions": versions(),
        "kind": "study",
        "headline": verdicts.headline(study, arms, final),
        "between_seeds": verdicts.between_seeds(parts["between_seeds"]),
        "reproducible_share": parts["reproducible_share"],
        "changes": verdicts.changes(study, arms, final),
        "arms": arms,
        "comparisons": [_without(r, "final") for r in final],
        "alignment_over_steps": alignment_over_steps(walk["comparisons"]),
        "gradients": [arm_and_seed(key) | to_plain(flow) for key, flow in flows.items()],
        "evolution": walk["evolution"],
        **{name: parts[name] for name in SECTIONS if name in parts},
        **together,
        "examples": walk["examples"],
        "runs": [arm_and_seed(key) | run_facts(run, loss) for key, run in runs.items()],
        "study": {
            "reference": study.reference,
            "baseline": study.baseline,
            "seeds": list(study.seeds),
            "equal_parameters": dict(study.equal_parameters),
            "equal_flops": list(study.equal_flops),
            "arms": dict(study.arms),
            "config": to_tree(runs[study.reference, seeds[0]].config),
        },
        "sweep": dict(sweep or {}),
        "environment": dict(environment or {}),
        "missing": _missing(study, runs),
        "notes": _notes(study, runs),
    }
    plain = to_plain(results)
    made = verdicts.statements(study, arms, final)
    made |= verdicts.share_statements(study, plain["reproducible_share"]) | claims(plain)
    plain["statements"] = to_plain(verdicts.decided(made))
    answer, *findings = [*losses.verdicts(plain), *sentences.answer(plain)]
    return {"answer": answer, "findings": findings, **plain}


def parts_of(study: StudyConfig, instruments: Collection[str] | None = None) -> dict[str, Callable[[StudyRuns], Any]]:
    """What takes long, each from the runs alone, so that several processes can share it out: the longest first.

    Of the instruments whose sections are collected on their own only those named, if any are, else all but the slow
    ones that the study does not name; UserError for a name that none of them has.
    """
    sections = {name: section.collect for name, section in SECTIONS.items() if hasattr(section, "collect")}
    _refuse_unknown("slow_instruments", study.slow_instruments, [name for name in sections if name in SLOW])
    _refuse_unknown("--instruments", instruments or (), sections)
    chosen = (sections.keys() - SLOW).union(study.slow_instruments) if instruments is None else instruments
    sections = {name: collect for name, collect in sections.items() if name in chosen}
    of_every_seed = {name: sections.pop(name) for name in OF_EVERY_SEED if name in sections}
    return {
        **{
            f"{name} {seed}": partial(collect_seed, seed=seed)
            for name, collect_seed in {"walk": over_snapshots, **of_every_seed}.items()
            for seed in study.seeds
        },
        "between_seeds": between_seeds,
        "reproducible_share": _reproducible_shares,
        **sections,
    }


def _refuse_unknown(where: str, names: Collection[str], valid: Collection[str]) -> None:
    for name in names:
        if name not in valid:
            raise UserError(f"{where}: {name!r} is none of {', '.join(valid)}{nearest(name, valid)}")


def seed_of(name: str) -> int | None:
    """The seed whose runs alone one of `parts_of` is about; None for those that are about all runs."""
    kind, _, seed = name.partition(" ")
    return int(seed) if kind in ("walk", *OF_EVERY_SEED) else None


def collect(name: str, held: StudyRuns) -> Any:
    """One of `parts_of` the study, whatever instruments were asked for, as plain JSON."""
    instruments = [section for section in SECTIONS if section == name.partition(" ")[0]]
    return to_plain(parts_of(held.study, instruments)[name](held))


def _reproducible_shares(held: StudyRuns) -> dict[str, dict[str, ReproducibleShare]]:
    tables = {run: {table.role: table.values for table in last} for run, last in held.last.items()}
    return reproducible_shares(tables, {run: last[0].counts for run, last in held.last.items()}, held.study.reference)


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
    model = {arm: run.config.model for (arm, _), run in runs.items()}
    if other := [arm for arm in model if model[arm] != model[study.reference]]:
        names = ", ".join(other)
        notes.append(f"Not twins of {study.reference} in the body, but in the order of the data alone: {names}.")
    if other := _of_other_length(study, runs):
        notes.append(
            f"Of another length than {study.reference}: {', '.join(other)}. Last tables are compared with last tables."
        )
    if missing := _missing(study, runs):
        notes.append(f"Not among the results: {', '.join(missing)}.")
    return notes


def _of_other_length(study: StudyConfig, runs: Runs) -> list[str]:
    """Arms of which a run ends at another step than the reference's of the same seed."""
    last = {key: run.snapshot_steps[-1] for key, run in runs.items()}
    unlike = {arm for (arm, seed), step in last.items() if step != last.get((study.reference, seed), step)}
    return [arm for arm in study.arms if arm in unlike]


def _missing(study: StudyConfig, runs: Runs) -> list[str]:
    """The names of the study's runs that are not among these."""
    return [f"{arm}-{seed}" for arm in study.arms for seed in study.seeds if (arm, seed) not in runs]


def _without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k != name}
