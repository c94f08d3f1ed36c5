"""What the train step of a config costs on this machine's devices: time, FLOP utilisation, memory."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tiedjax import model, muon, sharding, tying
from tiedjax.config import RunConfig
from tiedjax.config_files import to_tree
from tiedjax.errors import UserError
from tiedjax.files import write_atomically
from tiedjax.flops import PEAK_BF16_FLOPS, flops_per_token, model_flops
from tiedjax.host import platform_flags, process
from tiedjax.metrics import frequency_deciles
from tiedjax.rng import key_for
from tiedjax.step import Steps, TrainState, decided, make_steps
from tiedjax.step_metrics import StepMetrics

BATCHES = 4
WARM_UP = 3
WINDOWS = 10
PACKAGES = ("tiedjax", "jax", "jaxlib", "flax", "optax", "numpy")


def zipf_shares(cfg: RunConfig) -> np.ndarray:
    """[V], the chance of each id in `zipf_tokens`; 0 for rows that no token has."""
    chance_V = 1 / (np.arange(cfg.model.vocab_size) + 2.7)
    return np.pad(chance_V / chance_V.sum(), (0, cfg.model.table_rows - cfg.model.vocab_size))


def zipf_tokens(cfg: RunConfig, count: int) -> np.ndarray:
    """int32 [count, B, T + 1], a function of the seed: ids are ranks, drawn as Zipf and Mandelbrot find words to occur.

    A gradient of the lookup collides on frequent tokens; uniform tokens would make it cheaper than text does.
    """
    up_to_V = np.cumsum(zipf_shares(cfg)[: cfg.model.vocab_size])
    shape = (count, cfg.data.batch_size, cfg.model.seq_len + 1)
    ranks = np.searchsorted(up_to_V, np.random.default_rng(cfg.train.seed).random(shape))
    return np.minimum(ranks, cfg.model.vocab_size - 1).astype(np.int32)


def step_ratio(first: RunConfig, second: RunConfig, rounds: int = 30, window_seconds: float = 0.3) -> float:
    """How many times as long as a step of the first run one of the second takes: the median over interleaved windows.

    Windows alternate forwards and backwards between the two, so that what else the machine does concerns both alike.
    """
    sides = []
    for cfg in (first, second):
        mesh = sharding.make_mesh(cfg.mesh)
        sides.append(Stepper(cfg, mesh, make_steps(cfg, mesh)))
        sides[-1].run(WARM_UP)
    steps = max(1, round(window_seconds / (sides[0].run(WARM_UP) / WARM_UP)))
    ratios = []
    for number in range(rounds):
        order = sides if number % 2 == 0 else sides[::-1]
        seconds = {id(side): side.run(steps) for side in order}
        ratios.append(seconds[id(sides[1])] / seconds[id(sides[0])])
    return float(np.median(ratios))


def start(cfg: RunConfig, steps: Steps) -> TrainState:
    """The state that a run of `cfg` starts from, if all tokens are equally frequent."""
    sample = steps.sampled and tying.sampled_rows(np.ones(cfg.model.table_rows), steps.sampled)
    return steps.init(key_for(jax.random.key(cfg.train.seed), "params"), sample)


class Stepper:
    """A train step with its state and a few batches on the devices; every step's loss is kept.

    Attributes:
      compiled: the step's executable (`jax.stages.Compiled`).
      compile_seconds: what tracing and compiling it took.
    """

    def __init__(self, cfg: RunConfig, mesh: Mesh, steps: Steps):
        everywhere = partial(jax.device_put, device=steps.replicated)
        tokens = zipf_tokens(cfg, BATCHES)
        rows = sharding.local_rows(mesh, cfg.data.batch_size)
        self._batches = [sharding.global_batch(batch[rows], mesh, cfg.data.batch_size) for batch in tokens]
        deciles = frequency_deciles(np.bincount(tokens.ravel(), minlength=cfg.model.table_rows))
        self._constants = [everywhere(tying.role_scale(cfg.tying)), everywhere(deciles)]
        if cfg.tying.rare_gate is not None:
            self._constants.append(everywhere(tying.rare_gate(cfg, zipf_shares(cfg))))
        self._state = start(cfg, steps)
        self._metrics: list[StepMetrics] = []
        began = time.perf_counter()
        self.compiled = steps.train.lower(self._state, self._batches[0], *self._constants).compile()
        self.compile_seconds = time.perf_counter() - began

    def run(self, steps: int) -> float:
        """Dispatches this many steps, waits for the last, and returns the seconds of all."""
        jax.block_until_ready(self._state)
        began = time.perf_counter()
        for _ in range(steps):
            tokens_BS = self._batches[len(self._metrics) % BATCHES]
            self._state, metrics = self.compiled(self._state, tokens_BS, *self._constants)
            self._metrics.append(metrics)
        jax.block_until_ready(self._state)
        return time.perf_counter() - began

    @property
    def losses(self) -> list[float]:
        """The loss of every step so far, each before its update, in nats."""
        return [metrics.fetched()["loss"] for metrics in self._metrics]

    def peak_memory(self) -> tuple[int, str]:
        """Most bytes on one device, and who says so: its allocator or, where it keeps no count, the executable."""
        devices: Any = self._state.step.sharding.addressable_devices
        stats = [device.memory_stats() for device in devices]
        if all(stats):
            return max(each["peak_bytes_in_use"] for each in stats if each), "device"
        plan: Any = self.compiled.memory_analysis()
        parts = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
        return parts + plan.temp_size_in_bytes + plan.generated_code_size_in_bytes, "compiled program"


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 10 % and 90 % quantile."""
    p10, median, p90 = np.quantile(seconds, (0.1, 0.5, 0.9)).tolist()
    return {"median": median, "p10": p10, "p90": p90}


def environment(mesh: Mesh) -> dict[str, Any]:
    """The devices, versions and XLA flags behind a measurement, for its JSON."""
    device = mesh.devices.flat[0]
    return {
        "device": {"platform": device.platform, "kind": device.device_kind, "count": mesh.size},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "flags": platform_flags.in_force(),
    }


def compute_dtype(cfg: RunConfig, mesh: Mesh) -> str:
    """The name of the dtype of activations on these devices."""
    return str(model.compute_dtype(cfg.model, sharding.Layout(mesh)))


def utilisation(cfg: RunConfig, device_kind: str, tokens_per_second: float) -> dict[str, Any]:
    """`mfu_causal` and `mfu_full` of one device that takes so many tokens; null beside `mfu_unknown`, the reason."""
    peak = PEAK_BF16_FLOPS.get(device_kind)
    if peak is None:
        reason = f"no dense bfloat16 peak is known for {device_kind!r}"
        return {"mfu_causal": None, "mfu_full": None, "mfu_unknown": reason}
    causal, full = (tokens_per_second * flops_per_token(cfg.model, causal=c) / peak for c in (True, False))
    return {"mfu_causal": causal, "mfu_full": full, "peak_flops": peak}


def muon_over_model(cfg: RunConfig) -> float:
    """FLOPs of Muon's iterations in a step over those of the model, causal; 0 where no matrix is updated by it."""
    if cfg.optimizer.body.kind != "muon":
        return 0.0
    return muon.step_flops(cfg.model) / model_flops(cfg)


def bench(
    cfg: RunConfig, steps: int = 50, examine: Callable[[Stepper], Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Measures the train step of `cfg` over `steps` steps after a warm-up; returns what `tiedjax bench --json` saves.

    The steps are cut into at most 10 windows, in which nothing waits for the devices; `step_seconds` are quantiles over
    the windows' means. Batches are on the devices beforehand. `loss` is that of the last step, a function of the config
    and of `steps`: should a faster step be a wrong one, it shows there. `tokens_per_second` counts all devices, MFU is
    per device. What `examine` finds in the stepper afterwards is added. Raises UserError if `steps` is less than 1 or
    the loss is not finite.
    """
    if steps < 1:
        raise UserError(f"--steps: must be at least 1, got {steps}")
    if jax.default_backend() == "cpu":
        process.keep_freed_memory()
    mesh = sharding.make_mesh(cfg.mesh)
    cfg = decided(cfg, mesh)
    program = make_steps(cfg, mesh)
    stepper = Stepper(cfg, mesh, program)
    stepper.run(WARM_UP)
    windows = [len(part) for part in np.array_split(np.arange(steps), min(WINDOWS, steps))]
    seconds = quantiles([stepper.run(window) / window for window in windows])
    losses = stepper.losses
    if not math.isfinite(losses[-1]):
        raise UserError(f"the loss is {losses[-1]} after {len(losses)} steps; try a lower optimizer.learning_rate")
    tokens_per_second = cfg.data.batch_size * cfg.model.seq_len / seconds["median"]
    peak_memory, source = stepper.peak_memory()
    about = environment(mesh)
    return {
        "tokens_per_second": tokens_per_second,
        "step_seconds": seconds,
        **utilisation(cfg, about["device"]["kind"], tokens_per_second / mesh.size),
        "muon_over_model_flops": muon_over_model(cfg),
        "peak_memory_bytes": peak_memory,
        "peak_memory_source": source,
        "loss": losses[-1],
        "first_loss": losses[0],
        "steps": {"warm_up": WARM_UP, "measured": steps, "windows": len(windows)},
        "compile_seconds": stepper.compile_seconds,
        "compute_dtype": compute_dtype(cfg, mesh),
        **about,
        "config": to_tree(cfg),
        **(examine(stepper) if examine else {}),
    }


def table(result: Mapping[str, Any]) -> str:
    """The lines that `tiedjax bench` prints."""
    device, steps = result["device"], result["steps"]
    median, p10, p90 = (1e3 * result["step_seconds"][name] for name in ("median", "p10", "p90"))
    after = steps["warm_up"] + steps["measured"]
    if result["mfu_causal"] is None:
        mfu = f"unknown: {result['mfu_unknown']}"
    else:
        mfu = f"{result['mfu_causal']:.1%} causal, {result['mfu_full']:.1%} full attention"
    rows = {
        "devices": f"{device['count']} x {device['kind']}, {result['compute_dtype']}",
        "tokens per second": f"{result['tokens_per_second']:,.0f}",
        "step": f"{median:.2f} ms (p10 {p10:.2f}, p90 {p90:.2f} of {steps['windows']} windows)",
        "MFU": mfu,
        **({"Muon": f"{extra:.1%} of the model's FLOPs on top"} if (extra := result["muon_over_model_flops"]) else {}),
        "peak memory": f"{result['peak_memory_bytes'] / 1e6:,.1f} MB a device (by the {result['peak_memory_source']})",
        "loss": f"{result['loss']:.4f} in step {after}, {result['first_loss']:.4f} in step 1",
        "compilation": f"{result['compile_seconds']:.1f} s",
    }
    return "\n".join(f"{name:<18} {value}" for name, value in rows.items())


def report(result: Mapping[str, Any], path: Path | None) -> None:
    """Prints the result and, if there is a path, saves it as JSON; raises UserError if that cannot be written."""
    if process.is_main():
        print(table(result))
        if path:
            write_atomically(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
