r"""The whole train step beside PyTorch's, and beside itself without the role split, interleaved.

    python benchmarks/step.py --machine "2-core x86-64 virtual machine"           # configs quick and tiny
    python benchmarks/step.py --machine "one H100" configs/olmo_60m.yaml --set data.batch_size=32
    python benchmarks/step.py --machine "2-core x86-64 virtual machine" --rounds 216 --window-seconds 0.05 \
        --sides tiedjax without_update_metrics without_account --out benchmarks/results/account_cpu.json

Every side starts from the same parameters, sees the same batches and has AdamW of one rate for all parameters, whatever
the config says. `without_account` keeps no account of the updates; `without_update_metrics` keeps it, and leaves out
what metrics.jsonl has of it; `without_roles` does not split the gradient either; `by_hand` is a floor, the same
training in plain JAX (by_hand.py), on CPUs. A side's first losses are compared with ours: one that computes something
else is reported as failed, whatever its speed. Then windows of equally many steps alternate between the sides, in turn
forwards and backwards. PyTorch runs in a process of its own: its threads and its allocator would slow ours down, and
ours them; both processes keep the memory that they free. A ratio is taken within a round: seconds of the side / seconds
of tiedjax. Short windows and many rounds take out what the machine's other guests do meanwhile. A process keeps its
luck, of where its memory lies, through all of its rounds: everything is begun `--starts` times in new processes, and a
ratio's interval is one over starts. Where that leaves open what is asked, more of them are measured, and counted
together by `--pool`. PyTorch (`pip install torch transformers`) is left out of `--sides` where it is not wanted.
Prints, and adds the results by config to benchmarks/results/step_DEVICE.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, get_type_hints
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from tiedjax import sharding, tying
from tiedjax.analysis.basis.statistics import interval
from tiedjax.config import BodyOptimizerConfig, RunConfig, TableOptimizerConfig
from tiedjax.config_files import flatten, to_tree
from tiedjax.cost import bench
from tiedjax.gradients import accumulated
from tiedjax.host import platform_flags, process
from tiedjax.lm import OUTPUT_BIAS, summed_loss, trained
from tiedjax.model import compute_dtype
from tiedjax.optimizer import learning_rate, make_optimizer
from tiedjax.step import Steps, TrainState, _make_steps, decided, make_steps
from tiedjax.step_metrics import StepMetrics
from tiedjax.tying import Tables

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
CURVE = 20  # steps whose losses are compared, which are also the warm-up
SIDES = (
    "tiedjax",
    "without_update_metrics",
    "without_account",
    "without_roles",
    "by_hand",
    "torch_eager",
    "torch_compiled",
)
# How far the losses of a side may be from ours over those steps, relative; only rounding differs.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-2}


class Side(Protocol):
    """One contestant: runs steps, and keeps the loss of each."""

    def run(self, steps: int) -> float: ...
    @property
    def losses(self) -> list[float]: ...


def read_config(path: Path, changes: Mapping[str, Any] | None = None) -> RunConfig:
    """A run's config with dotted changes, read without the libraries that the command line needs for it.

    Reads what configs/*.yaml consist of: sections of plain `key: value` lines, a value that is itself a section within
    braces.
    """
    options: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.split("#")[0].rstrip()
        if text and not line.startswith(" "):
            section = text.rstrip(":")
        elif text:
            key, _, value = text.strip().partition(": ")
            for name, each in entries(key, value):
                options[f"{section}.{name}"] = each
    return structured(RunConfig, options | dict(changes or {}))


def entries(key: str, value: str) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of what a line says."""
    if not value.startswith("{"):
        yield key, scalar(value)
    else:
        for each in value.strip("{}").split(","):
            name, _, inner = each.strip().partition(": ")
            yield f"{key}.{name}", scalar(inner)


def structured(cls: type, options: Mapping[str, Any]) -> Any:
    """The config class with these dotted options."""
    sections: dict[str, dict[str, Any]] = {}
    fields: dict[str, Any] = {}
    for dotted, value in options.items():
        name, _, rest = dotted.partition(".")
        if rest:
            sections.setdefault(name, {})[rest] = value
        else:
            fields[name] = value
    types = get_type_hints(cls)
    return cls(**fields, **{name: structured(types[name], each) for name, each in sections.items()})


def under_adamw(cfg: RunConfig) -> RunConfig:
    """The same run with AdamW of one rate for all: what PyTorch's side has."""
    plain = dataclasses.replace(cfg.optimizer, body=BodyOptimizerConfig(), tables=TableOptimizerConfig())
    return dataclasses.replace(cfg, optimizer=plain)


def scalar(text: str) -> Any:
    """A number, true, false or null; anything else is text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def without_account(cfg: RunConfig) -> RunConfig:
    """The same run without an account of its updates, and without metrics of them."""
    return dataclasses.replace(cfg, tying=dataclasses.replace(cfg.tying, account="off"))


def without_update_metrics(cfg: RunConfig, mesh: Mesh) -> bench.Stepper:
    """Our side, but of the account only the sums are kept: what `without_account` lacks of metrics is not computed."""
    apart = ("update", "change", "step_share", "account_error")
    _make_steps.cache_clear()  # a step of its own is traced, in which no update waits for M
    with mock.patch.object(tying, "compromise", return_value={}):
        steps = make_steps(cfg, mesh)

        def train(state: TrainState, *given: Any) -> tuple[TrainState, StepMetrics]:
            state, metrics = steps.train(state, *given)
            kept = {name: x for name, x in metrics.items() if not any(part in name for part in apart)}
            return state, StepMetrics.of(kept)

        placed = jax.tree.map(lambda leaf: leaf.sharding, steps.abstract)
        train = jax.jit(train, donate_argnums=0, out_shardings=(placed, steps.replicated))
        side = bench.Stepper(cfg, mesh, dataclasses.replace(steps, train=train))
    _make_steps.cache_clear()
    return side


def without_roles(cfg: RunConfig, mesh: Mesh, steps: Steps) -> Steps:
    """`steps`, without an account, but the step neither splits the gradient by role nor measures roles."""
    cfg, layout = decided(cfg, mesh), sharding.Layout(mesh)
    scheme = tying.scheme_of(cfg.tying)
    names = [parameter.name for parameter in scheme.parameters]
    optimizer = make_optimizer(cfg.optimizer, cfg.train.steps, layout, tables=names)
    schedule = learning_rate(cfg.optimizer, cfg.train.steps)
    summed = accumulated(summed_loss(cfg, layout, cfg.train.z_loss), cfg.data.microbatches)

    def mean_loss(params: Any, tokens_BS: jax.Array, bias_V: jax.Array | None) -> jax.Array:
        tables = scheme.tables(params["tables"])
        total, weight = summed(tables, params["body"], tokens_BS, jnp.ones(tokens_BS.shape[0]), None, bias_V)
        return total / weight

    def train(state: TrainState, tokens_BS: jax.Array, *_: Any) -> tuple[TrainState, StepMetrics]:
        with jax.default_matmul_precision("highest" if compute_dtype(cfg.model, layout) == jnp.float32 else None):
            parameters = trained(state.params)
            loss, grads = jax.value_and_grad(mean_loss)(parameters, tokens_BS, state.params.get(OUTPUT_BIAS))
        grad_norm = optax.tree.norm(grads)
        untold = Tables({}, {})
        updates, opt_state, _ = optimizer.update(grads, untold, state.opt_state, parameters, grad_norm=grad_norm)
        params = {**state.params, **optax.apply_updates(parameters, updates)}
        metrics = {"loss": loss, "learning_rate": schedule(state.step), "grad_norm": grad_norm}
        return TrainState(state.step + 1, params, opt_state, state.skipped), StepMetrics.of(metrics)

    placed = jax.tree.map(lambda leaf: leaf.sharding, steps.abstract)
    compiled = jax.jit(
        train,
        donate_argnums=0,
        in_shardings=(placed, steps.batch, steps.replicated, steps.replicated),
        out_shardings=(placed, steps.replicated),
    )
    return dataclasses.replace(steps, train=compiled)


def make_side(name: str, cfg: RunConfig, mesh: Mesh) -> Any:
    """The contestant of this name, ready to run; what only its side needs, PyTorch too, is imported for that."""
    steps = make_steps(cfg, mesh)
    if name == "tiedjax":
        return bench.Stepper(cfg, mesh, steps)
    if name == "without_update_metrics":
        return without_update_metrics(cfg, mesh)
    if name in ("without_account", "without_roles"):
        cfg = without_account(cfg)
        steps = make_steps(cfg, mesh)
        return bench.Stepper(cfg, mesh, steps if name == "without_account" else without_roles(cfg, mesh, steps))
    if name == "by_hand":
        import by_hand

        return by_hand.Stepper(cfg, steps)
    import torch_model

    params = jax.device_get(bench.start(cfg, steps).params)
    tokens = bench.zipf_tokens(cfg, bench.BATCHES)
    device = "cuda" if mesh.devices.flat[0].platform == "gpu" else "cpu"
    return torch_model.TorchStepper(cfg, params, tokens, device=device, compiled=name == "torch_compiled")


class Apart:
    """A side in a process of its own, which sleeps while it is not asked to run.

    It is made and run for `steps` steps, its compilation among them, while this process goes on; `wait` for that.
    """

    def __init__(self, name: str, cfg: RunConfig, steps: int):
        processes = multiprocessing.get_context("spawn")
        self._here, there = processes.Pipe()
        self._process = processes.Process(target=serve, args=(there, name, cfg), daemon=True)
        self._process.start()
        there.close()  # so that a child that dies is noticed
        self._here.send(steps)
        self.losses: list[float] = []
        self.about: dict[str, Any] = {}

    def wait(self) -> None:
        """Until its first steps are done; raises RuntimeError with what went wrong in them."""
        self.about = self._answer()
        _, self.losses = self._answer()

    def run(self, steps: int) -> float:
        """As `Side.run`."""
        self._here.send(steps)
        seconds, self.losses = self._answer()
        return float(seconds)

    def _answer(self) -> Any:
        try:
            answer = self._here.recv()
        except EOFError:
            raise RuntimeError("its process has died") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def serve(there: Any, name: str, cfg: RunConfig) -> None:
    """The other end of `Apart`: makes the side, then runs as many steps as it is told."""
    keep_freed_memory()
    try:
        side = make_side(name, cfg, sharding.make_mesh(cfg.mesh))
        there.send(side.about)
        while True:
            there.send((side.run(there.recv()), side.losses))
    except EOFError:
        return
    except Exception as error:  # the process that waits for an answer must get one, whatever JAX or PyTorch raised
        there.send(RuntimeError(f"{type(error).__name__}: {error}"))


def keep_freed_memory() -> None:
    """On a CPU, as our own programs do: every side allocates in the same way, or the fastest allocator would win."""
    if jax.default_backend() == "cpu":
        process.keep_freed_memory()


def parameters(steps: Steps) -> int:
    """How many parameters we train, a shared table once."""
    return sum(leaf.size for leaf in jax.tree.leaves(steps.abstract.params))


def start(names: Sequence[str], cfg: RunConfig, mesh: Mesh) -> tuple[dict[str, Side], dict[str, str]]:
    """The sides after their first `CURVE` steps, and why others could not run."""
    sides: dict[str, Side] = {}
    failed: dict[str, str] = {}
    apart = {name: Apart(name, cfg, CURVE) for name in names if name.startswith("torch")}
    for name in names:
        try:
            if name in apart:
                sides[name] = apart[name]
                apart[name].wait()
            else:
                sides[name] = make_side(name, cfg, mesh)
                sides[name].run(CURVE)
        except Exception as error:  # a benchmark of the rest is worth having, whatever stopped this side
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"  {name} cannot run: {failed[name]}", flush=True)
            sides.pop(name, None)
    ours = parameters(make_steps(cfg, mesh))
    for name, side in apart.items():
        if name in sides and side.about["parameters"] != ours:
            raise SystemExit(f"{name}: {side.about['parameters']} parameters, not {ours}")
    return sides, failed


def compare_curves(sides: Mapping[str, Side]) -> dict[str, Any]:
    """The first losses of every side, and how far they are from ours, relative."""
    curves = {name: side.losses[:CURVE] for name, side in sides.items()}
    ours = np.array(curves["tiedjax"])
    apart = {name: float(np.abs(np.array(curve) / ours - 1).max()) for name, curve in curves.items()}
    return {"curves": curves, "largest_relative_difference": apart}


def measure(cfg: RunConfig, names: Sequence[str], rounds: int, window_seconds: float) -> dict[str, Any]:
    """Seconds per step of each side in `rounds` interleaved windows, and what else is known of them."""
    mesh = sharding.make_mesh(cfg.mesh)
    sides, failed = start(names, cfg, mesh)
    if "tiedjax" not in sides:
        raise SystemExit(f"tiedjax cannot run: {failed['tiedjax']}")
    losses = compare_curves(sides)
    for name, difference in losses["largest_relative_difference"].items():
        if not difference <= TOLERANCE[bench.compute_dtype(cfg, mesh)]:
            failed[name] = f"its losses differ from ours by {difference:.1e} relative: not the same training"
            print(f"  {name}: {failed[name]}", flush=True)
    steps = max(1, round(window_seconds / (sides["tiedjax"].run(3) / 3)))
    windows: dict[str, list[float]] = {name: [] for name in sides}
    load, apart = [], any(isinstance(side, Apart) for side in sides.values())
    for i in range(rounds):
        load.append(os.getloadavg()[0])
        for name in list(sides)[:: 1 if i % 2 == 0 else -1]:
            if apart:
                time.sleep(0.1)  # until the threads of the side before have gone to sleep
            windows[name].append(round(sides[name].run(steps) / steps, 7))
    return {
        "windows": windows,
        "about": {name: getattr(side, "about", {}) for name, side in sides.items()},
        "failed": failed,
        "losses": losses,
        "window_steps": steps,
        "load_average": load,
    }


def in_a_process(*asked: Any) -> dict[str, Any]:
    """`measure` in a new process."""
    processes = multiprocessing.get_context("spawn")
    here, there = processes.Pipe()
    child = processes.Process(target=answer, args=(there, *asked))
    child.start()
    there.close()  # so that a child that dies is noticed
    try:
        found: dict[str, Any] = here.recv()
    except EOFError:
        raise SystemExit("the process of a start has died") from None
    child.join()
    return found


def answer(there: Any, *asked: Any) -> None:
    """The other end of `in_a_process`."""
    keep_freed_memory()
    there.send(measure(*asked))


def compare(
    cfg: RunConfig, names: Sequence[str], rounds: int, window_seconds: float, starts: int = 1
) -> dict[str, Any]:
    """What `together` says of so many starts: one is in this process, several are in one of their own each."""
    if cfg.mesh.data == -1:
        cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, data=1))
    found = []
    for i in range(starts):
        found.append((measure if starts == 1 else in_a_process)(cfg, names, rounds, window_seconds))
        windows = found[-1]["windows"]
        medians = {name: float(np.median(np.array(each) / windows["tiedjax"])) for name, each in windows.items()}
        print(f"  start {i + 1}: {', '.join(f'{name} {ratio:.3f}' for name, ratio in medians.items())}", flush=True)
    return together(cfg, names, rounds, found)


def together(cfg: RunConfig, names: Sequence[str], rounds: int, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds per step of each side, and each side's ratio to tiedjax, over the rounds and over the starts `found`.

    `interval`: mean of the starts' median ratios with its 95 % t interval, null of one start. A side that failed in one
    start is among `failed`.
    """
    mesh = sharding.make_mesh(cfg.mesh)
    tokens = cfg.data.batch_size * cfg.model.seq_len
    report = {}
    for name in names:
        pairs = [(each["windows"][name], each["windows"]["tiedjax"]) for each in found if name in each["windows"]]
        if not pairs:
            continue
        spread = bench.quantiles(np.concatenate([side for side, _ in pairs]).tolist())
        ratios = [np.array(side) / ours for side, ours in pairs]
        over = interval([float(np.median(each)) for each in ratios])
        report[name] = {
            "step_seconds": spread,
            "tokens_per_second": tokens / spread["median"],
            **bench.utilisation(cfg, mesh.devices.flat[0].device_kind, tokens / spread["median"]),
            "over_tiedjax": bench.quantiles(np.concatenate(ratios).tolist()),
            "interval": {"mean": over.mean, "low": over.low, "high": over.high, "starts": over.n},
            "windows": [side for side, _ in pairs],
            **found[0]["about"].get(name, {}),
        }
        within = "" if over.low is None else f" ({over.low:.3f} to {over.high:.3f}, {over.n} starts)"
        print(f"  {name:<22} {1e3 * spread['median']:9.2f} ms a step, {over.mean:.3f}{within} of ours", flush=True)
    return {
        "config": to_tree(cfg),
        "compute_dtype": bench.compute_dtype(cfg, mesh),
        "parameters": parameters(make_steps(cfg, mesh)),
        "rounds": rounds,
        "sides": report,
        "failed": {name: reason for each in found for name, reason in each["failed"].items()},
        "losses": found[0]["losses"],
        **{key: [each[key] for each in found] for key in ("window_steps", "load_average")},
    }


def starts_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The starts of a saved result in which no side failed, as `together` takes them."""
    sides, per_start = result["sides"], zip(result["window_steps"], result["load_average"], strict=True)
    return [
        {
            "windows": {name: side["windows"][i] for name, side in sides.items()},
            "about": {},
            "failed": {},
            "losses": result["losses"],
            "window_steps": steps,
            "load_average": load,
        }
        for i, (steps, load) in enumerate(per_start)
    ]


def pooled(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """One result of the starts of two, which only their dates and load may tell apart."""
    dated = [{**each["environment"], "date": None} for each in (first, second)]
    same = [
        (dated[0], dated[1]),
        *((first[key], second[key]) for key in ("rounds", "losses", "parameters")),
        (first["failed"], {}),
        (second["failed"], {}),
    ]
    if any(one != other for one, other in same):
        raise SystemExit("these starts cannot be counted together: their machines, versions, rounds or losses differ")
    cfg = structured(RunConfig, dict(flatten(second["config"])))
    found = [*starts_of(first), *starts_of(second)]
    dates = sorted({date for each in (first, second) for date in each["environment"]["date"].split(" and ")})
    environment = {**second["environment"], "date": " and ".join(dates)}
    return together(cfg, list(second["sides"]), second["rounds"], found) | {"environment": environment}


def slug(mesh_or_kind: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", mesh_or_kind.lower()).strip("_")


def about(machine: str, *, pytorch: bool) -> dict[str, Any]:
    """Where and with what a measurement was made; with PyTorch too, if it took part."""
    mesh = sharding.make_mesh(RunConfig().mesh, jax.devices()[:1])
    known = {"machine": machine, "cpus": os.cpu_count(), "date": time.strftime("%Y-%m-%d"), **bench.environment(mesh)}
    if not pytorch:
        return known
    import torch_model

    return known | {"pytorch": torch_model.about("cuda" if jax.default_backend() == "gpu" else "cpu")}


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path, default=[CONFIGS / "quick.yaml", CONFIGS / "tiny.yaml"])
    parser.add_argument("--machine", required=True, help="what it runs on, in words")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--starts", type=int, default=8, help="new processes for each config")
    parser.add_argument("--window-seconds", type=float, default=2.0)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the configs")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/step_DEVICE.json")
    parser.add_argument(
        "--pool", nargs=2, type=Path, metavar="FILE", help="measure nothing: --out has the starts of these two results"
    )
    args = parser.parse_args()
    platform_flags.apply()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two processes share a GPU
    keep_freed_memory()
    if args.pool:
        first, second = (json.loads(path.read_text(encoding="utf-8")) for path in args.pool)
        for name in second:
            print(name)
            save(args.out, name, pooled(first[name], second[name]))
        return
    changes = {key: scalar(value) for key, _, value in (each.partition("=") for each in args.set)}
    environment = about(args.machine, pytorch=any(name.startswith("torch") for name in args.sides))
    path = args.out or HERE / "results" / f"step_{slug(environment['device']['kind'])}.json"
    for config in args.configs:
        print(config.stem, flush=True)
        cfg = under_adamw(read_config(config, changes))
        result = compare(cfg, args.sides, args.rounds, args.window_seconds, args.starts)
        save(path, config.stem, result | {"environment": environment})


def save(path: Path, name: str, result: Mapping[str, Any]) -> None:
    """Adds one result to a file of results."""
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    saved[name] = result
    path.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
