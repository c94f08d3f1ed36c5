"""Should I tie? A ladder of studies, one for each width: tied, untied and tied for a while, each at its own best rate.

The rung of the config's own width comes first: it is the one that the verdict is about. Beside the three it has a tied
model with as many parameters as untied, and an untied one that trains for as long as tied takes. The other rungs say
how far the verdict carries.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from tiedjax import sharding, tying
from tiedjax.config import ModelConfig, RunConfig, StudyConfig
from tiedjax.config_files import flatten, merge, parse_overrides, read_yaml, structure, to_tree
from tiedjax.errors import UserError
from tiedjax.estimate import foreseen
from tiedjax.host import process
from tiedjax.host.storage import exists, read_json, sole_writer, write_atomically
from tiedjax.loop import Outcome
from tiedjax.plan import Plan, plan_of
from tiedjax.step import make_steps
from tiedjax.study import Extent, environment_now, run_study
from tiedjax.text import duration
from tiedjax.work import steps_left

TIED, UNTIED, WIDE, IN_TIME = "tied", "untied", "tied-wide", "untied-in-time"
UNTIL = 2 / 3  # of all steps, tied: what public training speedruns do
FACTORS = (0.5, 1.0, 2.0)  # of the config's own rate of the tables, that each arm tries
WIDTHS = (0.75, 1.0, 1.5)  # of the config's own width
SEEDS, SWEEP_SEEDS = 5, (100, 101)
RECORD = "decision.json"
OWN_INSTRUMENTS = ("account", "hurdles", "regret")
_SET_HERE = ("untie_at", "untie_when", "tie_at")  # of tying: an arm's, not the config's

StepRatio = Callable[[RunConfig, RunConfig], float]  # how many times the second's step takes as long as the first's


@dataclass(frozen=True)
class Ladder:
    """What is to be trained: `tree` is the config as given, `own` its width, `widths` those of the rungs, own first."""

    path: Path
    tree: Mapping[str, Any]
    config: RunConfig
    widths: tuple[int, ...]
    seeds: int
    factors: tuple[float, ...]

    @property
    def own(self) -> int:
        """The width that the verdict is about."""
        return self.config.model.d_model

    @property
    def until(self) -> int:
        """The update after which the arm that is tied for a while unties."""
        return round(UNTIL * self.config.train.steps)

    @property
    def arm_until(self) -> str:
        """What that arm is called."""
        return f"until-{self.until}"

    def plan(self, width: int, steps_in_time: int | None = None) -> Plan:
        """The study of one rung; with `steps_in_time`, which untied makes in the time that tied takes, its arm too."""
        arms: dict[str, dict[str, Any]] = {
            UNTIED: {"tying": {"scheme": "untied"}},
            TIED: {"tying": {"scheme": "tied"}},
            self.arm_until: {"tying": {"scheme": "tied", "untie_at": self.until}},
        }
        is_own = width == self.own
        if is_own:
            arms[WIDE] = {"tying": {"scheme": "tied"}}
        if is_own and steps_in_time not in (None, self.config.train.steps):
            arms[IN_TIME] = {"tying": {"scheme": "untied"}, "train": {"steps": steps_in_time}}
        study = StudyConfig(
            base=self.path.name,
            overrides={"model": _shape(self.config.model, width)},
            arms=arms,
            seeds=tuple(range(self.seeds)),
            sweep={"optimizer.tables.learning_rate": [factor * self._rate for factor in self.factors]},
            sweep_seeds=SWEEP_SEEDS,
            equal_parameters={WIDE: "mlp"} if is_own else {},
            slow_arms=(TIED, UNTIED),
        )
        return plan_of(self.path, study, self.tree, {})

    @property
    def _rate(self) -> float:
        rate = self.config.optimizer.tables.learning_rate
        return self.config.optimizer.learning_rate if rate is None else rate


def load_ladder(
    path: Path,
    overrides: Mapping[str, str],
    widths: Sequence[int] | None = None,
    seeds: int = SEEDS,
    factors: Sequence[float] = FACTORS,
) -> Ladder:
    """The ladder over a run's config; UserError for options that the ladder sets itself, and for impossible widths."""
    file = read_yaml(path)
    structure(RunConfig, file, str(path))  # so that an error of the file is not blamed on the overrides
    tree = merge(file, parse_overrides(overrides))
    config = structure(RunConfig, tree, "overrides")
    given = dict(flatten(tree))
    for key in (f"tying.{name}" for name in _SET_HERE):
        if given.get(key) is not None:
            raise UserError(f"{key}: decide sets it for each arm; leave it out")
    scheme = tying.scheme_of(config.tying)
    if not (scheme.shares_one_table or scheme.independent):
        raise UserError(
            f"tying.scheme: decide compares tied with untied and sets it for each arm; got {config.tying.scheme}"
        )
    for role in ("input", "output"):
        if given.get(f"optimizer.tables.{role}.learning_rate") is not None:
            raise UserError(
                f"optimizer.tables.{role}.learning_rate: decide tries one rate for both roles; leave it out"
            )
    if seeds < 2:
        raise UserError(f"--seeds: must be at least 2, or there is no interval; got {seeds}")
    if len(factors) < 2 or len(set(factors)) < len(factors) or min(factors) <= 0:
        given_factors = ",".join(f"{factor:g}" for factor in factors)
        raise UserError(f"--rates: must be two or more distinct factors above 0, such as 0.5,1,2; got {given_factors}")
    if config.train.steps < 3:
        raise UserError(f"train.steps: must be at least 3 to tie for two thirds of them, got {config.train.steps}")
    if "threads" not in tree.get("train", {}):  # small runs go side by side
        tree = merge(tree, {"train": {"threads": 1}})
        config = structure(RunConfig, tree, str(path))
    chosen = dict.fromkeys([config.model.d_model, *(_widths(config.model) if widths is None else widths)])
    for width in chosen:
        _refuse_width(config.model, width)
    return Ladder(path, tree, config, tuple(chosen), seeds, tuple(factors))


def _widths(model: ModelConfig) -> Iterator[int]:
    """The config's own width and those beside it, as near as heads of an even width come."""
    unit = _unit(model)
    for factor in WIDTHS:
        yield max(unit, round(factor * model.d_model / unit) * unit)


def _unit(model: ModelConfig) -> int:
    return model.heads * (2 if model.position == "rope" else 1)


def _refuse_width(model: ModelConfig, width: int) -> None:
    if width < 1 or width % _unit(model):
        raise UserError(
            f"--widths: must be multiples of {_unit(model)} for {model.heads} heads of model.position "
            f"{model.position}, got {width}"
        )


def _shape(model: ModelConfig, width: int) -> dict[str, int]:
    """The options of a model of another width: an MLP that is as much wider, to a multiple of 8."""
    if width == model.d_model:
        return {}
    return {"d_model": width, "d_ff": max(8, round(model.d_ff * width / model.d_model / 8) * 8)}


def decide(ladder: Ladder, out: Path, workers: int, limit: float | None, ratio: StepRatio) -> Outcome:
    """Trains and analyses every rung that is not done, then writes decision.json and decision.html in `out`.

    `limit` are the seconds after which training stops, between two steps. `ratio` measures how many times as long as a
    tied step an untied one takes, once. UserError where `out` holds another ladder's runs.
    """
    began = time.monotonic()
    process.refuse_unshared(out)
    with sole_writer(out):
        steps_in_time = _steps_in_time(ladder, out, ratio)
    plans = {width: ladder.plan(width, steps_in_time) for width in ladder.widths}
    left = [
        (cfg, steps_left(folder, cfg)) for width, plan in plans.items() for folder, cfg in _folders(out, width, plan)
    ]
    if line := foreseen(left, workers):
        print(f"{len(plans)} widths ({', '.join(map(str, plans))}): {line}", flush=True)
    outcome, done = Outcome(0, finished=True), _done(out)
    for width, plan in plans.items():
        if width in done:
            continue
        print(f"width {width}", flush=True)
        rest = None if limit is None else max(0.0, limit - (time.monotonic() - began))
        instruments = OWN_INSTRUMENTS if width == ladder.own else ("hurdles",)
        extent = Extent(instruments=instruments, time_limit=rest, partial=False)
        outcome = run_study(plan, folder_of(out, width), workers, extent)
        if outcome.stopped or not outcome.finished:
            break
        done.append(width)
        write_atomically(out / RECORD, json.dumps(_record(out) | {"rungs": done}, indent=1) + "\n")
    if ladder.own in done:
        print(draw_decision(out))
    elif not outcome.signal:
        print(f"no verdict yet: width {ladder.own} is not trained; the same command continues", flush=True)
    print(f"{duration(time.monotonic() - began)} in all", flush=True)
    return outcome


def folder_of(out: Path, width: int) -> Path:
    """Where a rung's study lies."""
    return out / f"width-{width}"


def draw_decision(out: Path) -> str:
    """Redraws decision.html from decision.json and the rungs' results; returns the verdict and where the page is."""
    from tiedjax.analysis.decision import page, verdicts

    decision = page.read(out)
    page.write(decision, out)
    return "\n".join([*verdicts.said(decision), f"decision: {out / page.PAGE}"])


def _folders(out: Path, width: int, plan: Plan) -> Iterator[tuple[Path, RunConfig]]:
    """Every run of a rung with its folder."""
    folder = folder_of(out, width)
    for (arm, place, seed), cfg in plan.trials.items():
        yield folder / "sweep" / f"{arm}-{place}-{seed}", cfg
    for (arm, seed), cfg in plan.runs.items():
        yield folder / "runs" / f"{arm}-{seed}", cfg


def _steps_in_time(ladder: Ladder, out: Path, ratio: StepRatio) -> int:
    """How many steps of untied take as long as all of tied; measured once, and then on record."""
    path, config = out / RECORD, to_tree(ladder.config)
    if exists(path):
        record = _record(out)
        recorded = (record["config"], record["widths"], record["seeds"], record["factors"])
        if recorded != (config, list(ladder.widths), ladder.seeds, list(ladder.factors)):
            raise UserError(f"{out}: holds the decision of another config, widths, rates or seeds; give another --out")
        return int(record["time"]["steps"])
    runs = ladder.plan(ladder.own).runs
    measured = ratio(*(_without_account(runs[arm, 0]) for arm in (TIED, UNTIED)))
    steps = max(1, round(ladder.config.train.steps / measured))
    record = {
        "kind": "decision",
        "schema": 1,
        "name": ladder.path.stem,
        "config": config,
        "widths": list(ladder.widths),
        "own": ladder.own,
        "seeds": ladder.seeds,
        "factors": list(ladder.factors),
        "arms": {"tied": TIED, "untied": UNTIED, "until": ladder.arm_until, "wide": WIDE, "in_time": IN_TIME},
        "until": ladder.until,
        "time": {"ratio": measured, "steps": steps},
        "memory": {arm: memory(runs[arm, 0]) for arm in (TIED, UNTIED)},
        "rungs": [],
        "environment": environment_now(),
    }
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    return steps


def _without_account(cfg: RunConfig) -> RunConfig:
    """The run as it is timed: an account is kept to learn from, and of tied tables alone."""
    return dataclasses.replace(cfg, tying=dataclasses.replace(cfg.tying, account="off"))


def _record(out: Path) -> dict[str, Any]:
    """What decision.json holds."""
    record: Any = read_json(out / RECORD)
    if not isinstance(record, dict) or not isinstance(record.get("rungs"), list):
        raise UserError(f"{out / RECORD}: does not hold a decision; `tiedjax decide` writes it in a new --out")
    return record


def _done(out: Path) -> list[int]:
    """The widths that are trained and analysed, by the record."""
    return [int(width) for width in _record(out)["rungs"]]


def memory(cfg: RunConfig) -> dict[str, int]:
    """Bytes of a run: its parameters in training, what the optimizer and an account keep beside them, and inference.

    Inference has every parameter in bfloat16. Gradients and activations come on top of training.
    """
    mesh = sharding.make_mesh(dataclasses.replace(cfg.mesh, data=1, fsdp=1, tensor=1), jax.devices()[:1])
    last = tying.stage(cfg, changed=True)
    state = make_steps(_without_account(last), mesh).abstract
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return {
        "parameters": numbers,
        "weights": _bytes(state.params),
        "optimizer": _bytes(state.opt_state),
        "account": _bytes(make_steps(last, mesh).abstract) - _bytes(state),
        "inference": 2 * numbers,
    }


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
