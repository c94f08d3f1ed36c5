"""A study file resolved: the config of every run, those of the arms and those of the sweeps that settle their options.

An arm is the base config, the study's overrides, the arm's own changes, then those of the command line; with the seed
it is a run. Nothing here computes on a device.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tiedjax import tying
from tiedjax.config import ModelConfig, RunConfig, StudyConfig
from tiedjax.config_files import flatten, merge, parse_overrides, read_yaml, structure
from tiedjax.errors import UserError
from tiedjax.flops import matmul_parameters, model_flops

Point = Mapping[str, Any]  # of a sweep: the values of its options by dotted key
NEVER_SWEPT = ("tying.scheme", "train.seed", "train.threads")  # what makes an arm, a run, a machine
LENGTH = ("train.steps", "data.batch_size")  # what decides how many FLOPs a run of one shape takes
TOLERANCE = 0.01  # of parameter counts that are called equal
_MULTIPLES = (128, 64, 32, 16, 8, 4, 2, 1)  # of the MLP's width, the first that meets half of the tolerance


@dataclass(frozen=True)
class Arm:
    """An arm before its seed: its changes to the defaults as a tree, and the points of its sweep (none: no sweep)."""

    tree: Mapping[str, Any]
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Plan:
    """A study with the config of each of its runs, by (arm, seed), in the order of training.

    `trials` are the runs of its sweeps, by (arm, place of the point, seed); the options of `runs` that a sweep is to
    settle have the values of the first point until `settled`.
    """

    path: Path
    study: StudyConfig
    arms: dict[str, Arm]
    runs: dict[tuple[str, int], RunConfig]
    trials: dict[tuple[str, int, int], RunConfig]

    @property
    def name(self) -> str:
        """That of the study file."""
        return self.path.stem

    @property
    def threads(self) -> int:
        """CPU threads of every run."""
        return next(iter(self.runs.values())).train.threads

    def settled(self, best: Mapping[str, int]) -> Plan:
        """The plan whose runs have the options of each arm's best point, by its place."""
        runs = {
            (arm, seed): _resolved(self.path, arm, self.arms[arm].tree, seed, self.arms[arm].points[best[arm]])
            if arm in best
            else cfg
            for (arm, seed), cfg in self.runs.items()
        }
        return dataclasses.replace(self, runs=runs)


def load_study(path: str | Path, overrides: Mapping[str, str] | None = None) -> Plan:
    """Resolves a study file; `overrides` ({"train.steps": "50"}) apply to every run, after its arm."""
    path = Path(path)
    study = structure(StudyConfig, read_yaml(path), str(path))
    if not study.base:
        raise UserError(f"{path}: base: missing; it names the run config that all arms share")
    base_path = path.parent / study.base
    base = read_yaml(base_path)
    structure(RunConfig, base, str(base_path))
    return plan_of(path, study, base, parse_overrides(overrides or {}))


def plan_of(path: Path, study: StudyConfig, base: Mapping[str, Any], last: Mapping[str, Any]) -> Plan:
    """Resolves a study over the tree of its base config; `last` are changes to every run, after its arm.

    UserErrors name `path`, the file that the study is from.
    """
    _refuse_seeds(path, study, last)
    _refuse_swept(path, study, last)
    arms = {
        arm: Arm(merge(merge(merge(base, study.overrides), changes), last), _points(swept_by(study, arm)))
        for arm, changes in study.arms.items()
    }
    resolved = partial(_resolved, path)
    arms |= {arm: _of_equal_parameters(path, study, arms, arm) for arm in study.equal_parameters}
    arms |= {arm: _of_equal_flops(path, study, arms, arm) for arm in study.equal_flops}
    runs, trials = {}, {}
    for seed, (name, arm) in itertools.product(study.seeds, arms.items()):
        runs[name, seed] = resolved(name, arm.tree, seed, arm.points[0] if arm.points else {})
    for name, arm in arms.items():
        for (place, point), seed in itertools.product(enumerate(arm.points), study.sweep_seeds):
            trial = resolved(name, arm.tree, seed, point)
            few = dataclasses.replace(trial.train, snapshot_every=trial.train.steps)  # nobody looks at its tables
            trials[name, place, seed] = dataclasses.replace(trial, train=few)
    for name, shared in [(study.reference, False), (study.baseline, True)]:
        options = runs[name, study.seeds[0]].tying
        scheme = tying.scheme_of(options)
        if not (scheme.shares_one_table if shared else scheme.independent) or tying.changes(runs[name, study.seeds[0]]):
            wanted = (
                "one table in both roles" if shared else "a table for each role, drawn by itself, from first to last"
            )
            raise UserError(
                f"{path}: arm {name!r} needs a scheme with {wanted}, its tying.scheme is {options.scheme!r}"
            )
    if len(threads := sorted({cfg.train.threads for cfg in runs.values()})) > 1:
        raise UserError(f"{path}: train.threads: must be one number for all arms, got {threads}")
    return Plan(path, study, arms, runs, trials)


def _refuse_seeds(path: Path, study: StudyConfig, last: Mapping[str, Any]) -> None:
    for where, changes in [("--train.seed", last), (f"{path}: overrides", study.overrides), *study.arms.items()]:
        if "seed" in (changes.get("train") or {}):
            raise UserError(f"{where}: train.seed is set from the study's seeds; change those in the study file")


def swept_by(study: StudyConfig, arm: str) -> dict[str, list[Any]]:
    """The options that an arm sweeps, by dotted key, and their values."""
    own: dict[str, list[Any]] | None = study.arm_sweeps.get(arm)
    return study.sweep if own is None else own


def _refuse_swept(path: Path, study: StudyConfig, last: Mapping[str, Any]) -> None:
    """UserError for a sweep that cannot choose: too few values, the study's seeds, an option given elsewhere."""
    given, both = dict(flatten(last)), sorted(set(study.seeds) & set(study.sweep_seeds))
    made_equal = {"equal_parameters": set(study.equal_parameters), "equal_flops": set(study.equal_flops)}
    for arm, changes in study.arms.items():
        for key, values in swept_by(study, arm).items():
            if len(values) < 2 or any(values.count(value) > 1 for value in values):
                raise UserError(f"{path}: arm {arm!r}: sweep: {key}: needs two or more distinct values, got {values}")
            if both:
                raise UserError(
                    f"{path}: sweep_seeds: must be other seeds than the study's, or a choice is judged by what made "
                    f"it; both have {both}"
                )
            if key in NEVER_SWEPT:
                raise UserError(f"{path}: arm {arm!r}: sweep: {key} cannot be swept; give each value an arm of its own")
            for option, made in made_equal.items():
                settled = key.startswith("model.") or (option == "equal_flops" and key in LENGTH)
                if settled and made and arm in {*made, study.reference}:
                    what = "the length" if key in LENGTH else "the shape"
                    raise UserError(f"{path}: arm {arm!r}: sweep: {key} cannot be swept where {option} settles {what}")
            if key in given:
                raise UserError(f"--{key}: {path} sweeps it; change its values there")
            if key in dict(flatten(changes)):
                raise UserError(f"{path}: arm {arm!r}: {key} is swept; leave it out of the arm")


def _resolved(path: Path, arm: str, tree: Mapping[str, Any], seed: int, point: Point) -> RunConfig:
    """The config of an arm's run from a seed at a point of its sweep; UserError names the arm."""
    where = f"{path}: arm {arm!r}"
    swept = _tree(point)
    cfg = structure(RunConfig, merge(merge(tree, swept), {"train": {"seed": seed}}), where)
    try:
        tying.refuse_options_of_roles(cfg)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return cfg


def _points(options: Mapping[str, list[Any]]) -> tuple[Point, ...]:
    """Every combination of the values of all options; none without options."""
    return tuple(dict(zip(options, values, strict=True)) for values in itertools.product(*options.values()) if options)


def _tree(point: Point) -> dict[str, Any]:
    """Dotted keys as a nested mapping."""
    tree: dict[str, Any] = {}
    for key, value in point.items():
        *sections, leaf = key.split(".")
        nested: Any = {leaf: value}
        for section in reversed(sections):
            nested = {section: nested}
        tree = merge(tree, nested)
    return tree


def _of_equal_parameters(path: Path, study: StudyConfig, arms: Mapping[str, Arm], name: str) -> Arm:
    """The arm with as many parameters as the reference has, the difference put into its MLP or its layers."""
    arm = arms[name]
    reference = _resolved(path, study.reference, arms[study.reference].tree, study.seeds[0], {})
    own = _resolved(path, name, arm.tree, study.seeds[0], {})
    wanted = parameters(reference)
    model = widened(
        own.model, wanted - in_tables(own), deeper=study.equal_parameters[name] == "layers", of=own.mesh.tensor
    )
    count = parameters(dataclasses.replace(own, model=model))
    if abs(count - wanted) > TOLERANCE * wanted:
        raise UserError(
            f"{path}: equal_parameters: {name}: no {study.equal_parameters[name]} comes within {TOLERANCE:.0%} of the "
            f"{wanted:,} parameters of {study.reference}; the nearest has {count:,}"
        )
    return Arm(merge(arm.tree, {"model": {"layers": model.layers, "d_ff": model.d_ff}}), arm.points)


def _of_equal_flops(path: Path, study: StudyConfig, arms: Mapping[str, Arm], name: str) -> Arm:
    """The arm with the steps that make its model's FLOPs in all those of the reference, to half a step's."""
    if "steps" in (study.arms[name].get("train") or {}):
        raise UserError(f"{path}: arm {name!r}: equal_flops settles train.steps; leave it out of the arm")
    arm = arms[name]
    reference = _resolved(path, study.reference, arms[study.reference].tree, study.seeds[0], {})
    own = _resolved(path, name, arm.tree, study.seeds[0], {})
    steps = max(1, round(reference.train.steps * model_flops(reference) / model_flops(own)))
    return Arm(merge(arm.tree, {"train": {"steps": steps}}), arm.points)


def in_tables(cfg: RunConfig) -> int:
    """Numbers that the run's scheme owns and trains, at its end."""
    last = tying.stage(cfg, changed=True)
    return tying.scheme_of(last.tying).size(cfg.model.table_rows, cfg.model.d_model)


def parameters(cfg: RunConfig) -> int:
    """Numbers in the matrices and tables of a run, those that it trains but for norm scales."""
    return matmul_parameters(cfg.model) - cfg.model.table_rows * cfg.model.d_model + in_tables(cfg)


def widened(model: ModelConfig, body: int, *, deeper: bool, of: int = 1) -> ModelConfig:
    """The model whose body has about `body` parameters: with a wider MLP, or with more layers of about its own width.

    The width is a multiple of `of`, and of as large a power of two as the tolerance allows.
    """

    def size(candidate: ModelConfig) -> int:
        return matmul_parameters(candidate) - candidate.table_rows * candidate.d_model

    if deeper:
        layers = max(1, round(model.layers * body / size(model)))
        model = dataclasses.replace(model, layers=layers)
    per_width = size(dataclasses.replace(model, d_ff=model.d_ff + 1)) - size(model)
    exact = model.d_ff + (body - size(model)) / per_width
    for multiple in _MULTIPLES:
        unit = multiple * of
        candidate = dataclasses.replace(model, d_ff=max(unit, round(exact / unit) * unit))
        if abs(size(candidate) - body) <= TOLERANCE / 2 * body:
            break
    return candidate
