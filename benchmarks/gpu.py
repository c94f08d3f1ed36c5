"""Everything that is to be shown on a GPU, in one command for a machine that has one.

    python benchmarks/gpu.py --machine "one H100 80GB"                 # all parts
    python benchmarks/gpu.py --machine "one H100 80GB" --parts correctness loss
    python benchmarks/gpu.py --machine "one H100 80GB" --parts step:olmo_60m --set model.remat=dots --label dots
    JAX_PLATFORMS=cpu python benchmarks/gpu.py --machine any --smoke   # the same with tiny sizes, to test this program

Needs jax, flax and optax; `resume` needs what tiedjax itself needs, `torch:` torch and transformers (and liger-kernel
for its last side). Each part runs in a process of its own, so that its memory is its own, and is saved as soon as it is
done to benchmarks/results/gpu_DEVICE.json. Parts:

    correctness       20 steps of configs/tiny.yaml on the device in float32 and bfloat16, and on the CPU in float32
    muon              the same of configs/quick.yaml, whose body Muon updates, on a GPU with bfloat16 products:
                      differences grow, and the limits are for the first 4 steps
    gradients         both role gradients of one batch of configs/tiny.yaml, beside float64 on the CPU
    resume            `tiedjax train` of configs/tiny.yaml, interrupted and continued, beside itself uninterrupted
    loss              fused loss and both gradients beside the plain ones: seconds and temporary memory
    step:MODEL        seconds, MFU and memory of the train step, with role metrics, and which kernels take its time
    torch:MODEL       the train step beside the compiled PyTorch model (benchmarks/step.py)
    roles:MODEL       the train step beside itself without the account, and without the split and all metrics either
    flags:MODEL       four layers of the model under other XLA flags, each in a process of its own, the usual ones twice
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import loss
import numpy as np
import step as sides

from tiedjax import load_run, model, sharding, tying
from tiedjax.config import RunConfig
from tiedjax.cost import bench, hlo
from tiedjax.cost import kernels as parts
from tiedjax.cost.kernels import scope
from tiedjax.gradients import loss_and_gradients
from tiedjax.host import platform_flags
from tiedjax.step import make_steps

# Positions; sequences of a step that fit a card of 80 GB with nothing recomputed; and sequences beside PyTorch, whose
# state and activations must lie in the same memory.
MODELS = {"olmo_60m": (1024, 32, 32), "olmo_300m": (4096, 8, 4), "olmo_1b": (2048, 8, 4)}
SMOKE = {"layers": 2, "d_model": 64, "heads": 2, "d_ff": 128, "seq_len": 64, "vocab_size": 512}
LOSS_LIMITS = {"float32": 1e-3, "bfloat16": 1e-2}  # nats
GRADIENT_LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}  # of the gradient's own norm
TRACED = 4  # steps
# XLA's flags to be tried, by what they are for; None: nothing but what tiedjax sets.
FLAGS = {
    "as set": None,
    "every product by Triton": "--xla_gpu_triton_gemm_any=true",
    "no product by Triton": "--xla_gpu_enable_triton_gemm=false",
    "no command buffers": "--xla_gpu_enable_command_buffer=",
    "no latency hiding": "--xla_gpu_enable_latency_hiding_scheduler=false",
    "as set, again": None,
}


def model_config(name: str, batch_size: int, smoke: bool, more: Mapping[str, Any]) -> RunConfig:
    """The config of this model for one GPU: no accumulation and nothing recomputed, unless `more` says otherwise."""
    changes: dict[str, Any] = {"model.seq_len": MODELS[name][0], "data.batch_size": batch_size}
    changes |= {"model.remat": "none", "data.microbatches": 1, "mesh.data": 1, **more}
    if smoke:
        changes |= {f"model.{key}": value for key, value in SMOKE.items()} | {"data.batch_size": 4}
    return sides.read_config(sides.CONFIGS / f"{name}.yaml", changes)


def on_one_device(name: str, dtype: str) -> RunConfig:
    """configs/NAME.yaml on one device."""
    return sides.read_config(sides.CONFIGS / f"{name}.yaml", {"model.dtype": dtype, "mesh.data": 1})


def correctness(name: str, limited: int, smoke: bool, _: Any) -> dict[str, Any]:
    """Losses of 20 steps of a config on the device beside those of the CPU, and the largest difference.

    The limit is for the first `limited` steps.
    """
    steps = 3 if smoke else 20

    def losses(dtype: str, device: jax.Device) -> list[float]:
        cfg = on_one_device(name, dtype)
        mesh = sharding.make_mesh(cfg.mesh, [device])
        with jax.default_device(device):
            stepper = bench.Stepper(cfg, mesh, make_steps(cfg, mesh))
            stepper.run(steps)
        return stepper.losses

    expected = losses("float32", jax.devices("cpu")[0])
    result: dict[str, Any] = {"steps": steps, "cpu_float32": expected}
    for dtype, limit in LOSS_LIMITS.items():
        ours = losses(dtype, jax.devices()[0])
        apart = np.abs(np.subtract(ours, expected))
        difference, early = float(apart.max()), float(apart[:limited].max())
        result[dtype] = {
            "losses": ours,
            "largest_difference": difference,
            "limit": limit,
            "holds": early <= limit,
        }
        print(f"  {dtype}: losses differ by at most {difference:.1e}, {early:.1e} within {limited} (limit {limit:.0e})")
    return result


def gradients(*_: Any) -> dict[str, Any]:
    """|difference| / |gradient| of each role's table gradient, against the same function in float64 on the CPU."""
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    tokens_BS = bench.zipf_tokens(on_one_device("tiny", "float32"), 1)[0]
    with jax.default_device(cpu):
        mesh = sharding.make_mesh(on_one_device("tiny", "float32").mesh, [cpu])
        params = jax.device_get(make_steps(on_one_device("tiny", "float32"), mesh).init(jax.random.key(0)).params)

    def roles(cfg: RunConfig, on: jax.Device, params: Any) -> tying.Tables:
        mesh = sharding.make_mesh(cfg.mesh, [on])
        compute = jax.jit(loss_and_gradients(cfg, sharding.Layout(mesh)))
        given = jax.device_put((params, tokens_BS, tying.role_scale(cfg.tying)), on)
        with jax.default_device(on):
            return jax.tree.map(lambda g: np.asarray(g, np.float64), compute(*given)[1][1])

    plain, model.compute_dtype = model.compute_dtype, lambda *_: np.dtype("float64")
    with jax.enable_x64(True):
        exact = roles(on_one_device("tiny", "float32"), cpu, jax.tree.map(lambda leaf: leaf.astype(np.float64), params))
    model.compute_dtype = plain
    result: dict[str, Any] = {}
    for dtype, limit in GRADIENT_LIMITS.items():
        computed = roles(on_one_device("tiny", dtype), device, params)
        apart = jax.tree.map(lambda g, e: float(np.linalg.norm(g - e) / np.linalg.norm(e)), computed, exact)
        result[dtype] = {**apart._asdict(), "limit": limit, "holds": max(apart) <= limit}
        print(f"  {dtype}: {json.dumps(result[dtype])}")
    return result


def resume(smoke: bool, _: Any) -> dict[str, Any]:
    """Whether every metric of a run that was interrupted and continued equals that of one left alone, bit for bit."""
    steps, stop = (40, 10) if smoke else (600, 200)
    result: dict[str, Any] = {"steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32",) if smoke else ("float32", "bfloat16"):
            options = {"train.steps": steps, "model.dtype": dtype, "model.table_gradient": "deterministic"}
            options |= {"train.snapshot_every": steps, "train.checkpoint_every": stop, "train.eval_every": steps}
            whole, parted = Path(folder, f"{dtype}-whole"), Path(folder, f"{dtype}-parted")
            train(whole, options).wait(timeout=400)
            process = train(parted, options)
            path = parted / "metrics.jsonl"
            while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < stop + 5):
                time.sleep(0.002)
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=400)
            interrupted = len(metrics(parted))
            if train(parted, options).wait(timeout=400):
                raise SystemExit(f"tiedjax train failed: {Path(f'{parted}.log').read_text()[-3000:]}")
            same = [a == b for a, b in zip(metrics(whole), metrics(parted), strict=True)]
            leaves = zip(*(jax.tree.leaves(load_run(run).params()) for run in (whole, parted)), strict=True)
            equal_parameters = all(np.array_equal(a, b) for a, b in leaves)
            missed = max(row["account_error"] for row in metrics(whole))
            result[dtype] = {
                "account_error": missed,
                "interrupted_after": interrupted,
                "steps": len(same),
                "equal_steps": sum(same),
                "equal_parameters": equal_parameters,
                "holds": all(same) and equal_parameters and interrupted < len(same),
            }
            print(f"  {dtype}: {json.dumps(result[dtype])}", flush=True)
    return result


def metrics(run: Path) -> list[dict[str, Any]]:
    """What the run wrote of each step, without its speed."""
    path = run / "metrics.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def train(out: Path, options: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    """`tiedjax train configs/tiny.yaml` in a process of its own."""
    changes = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "tiedjax", "train", str(sides.CONFIGS / "tiny.yaml"), "--out", str(out), *changes]
    with Path(f"{out}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=sides.HERE.parent)


def compare_losses(smoke: bool, _: Any) -> dict[str, Any]:
    """Loss and both gradients of 32k tokens at V = 50,304, for the widths of the three models (benchmarks/loss.py)."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    result = {}
    for shapes in [(512, 1024, 64)] if smoke else [(32_768, 50_304, width) for width in (384, 1024, 2048)]:
        measured = result[f"width {shapes[2]}"] = {
            "temporary": loss.memory(shapes, dtype),
            "time": loss.seconds(shapes, dtype),
        }
        print(f"  {json.dumps(measured)}")
    return result


def measured_step(name: str, smoke: bool, more: Mapping[str, Any]) -> dict[str, Any]:
    """`tiedjax bench` of the model at full batch, then a trace of a few steps more."""
    cfg = model_config(name, MODELS[name][1], smoke, more)
    result = bench.bench(cfg, 4 if smoke else 100, None if smoke else lambda stepper: {"kernels": kernels(stepper)})
    print(bench.table(result))
    for key, value in result.get("kernels", {}).items():
        if key != "longest":
            print(f"{key:<18} {json.dumps(value)}", flush=True)
    return result


def kernels(stepper: bench.Stepper) -> dict[str, Any]:
    """Milliseconds of a step on the device by part of the step, between kernels, and of the longest kernels."""
    program = hlo.Program.parse(stepper.compiled.as_text() or "").computations
    # A kernel of XLA's own is called as its instruction is, but for the dots.
    instructions = {
        name: each
        for computation in program.values()
        for each in computation.values()
        for name in (each.name, each.name.replace(".", "_"))
    }
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        stepper.run(TRACED)
        jax.profiler.stop_trace()
        (path,) = Path(folder).rglob("*.xplane.pb")
        events = list(device_events(path))
    if not events:
        return {"launches": 0}
    # Of a library's kernels in a command buffer only names are known: they belong to the loop if they run as often as
    # what surely does.
    launches = Counter((kernel, buffer) for kernel, buffer, *_ in events)
    in_loop = {key: count for key, count in launches.items() if "while/body" in scope(instructions.get(key[0]))}
    trips = Counter(in_loop.values()).most_common(1)[0][0] if in_loop else 0
    buffers = {buffer for _, buffer in in_loop}
    spent: Counter[tuple[str, str]] = Counter()
    runs: Counter[tuple[str, str]] = Counter()
    for kernel, instruction, _, nanoseconds in events:
        each = instructions.get(instruction) or instructions.get(kernel)
        looped = each is None and instruction in buffers and launches[kernel, instruction] == trips
        part = part_of(kernel, each, looped)
        key = part, f"{kernel[:60]} | {instruction} | {scope(each)[-90:]} | {each.shape[:60] if each else ''}"
        spent[key] += nanoseconds
        runs[key] += 1
    by_part: Counter[str] = Counter()
    for (part, _), nanoseconds in spent.items():
        by_part[part] += nanoseconds
    milliseconds = lambda nanoseconds: round(nanoseconds / TRACED / 1e6, 4)
    begin, end = min(e[2] for e in events), max(e[2] + e[3] for e in events)
    return {
        "step_milliseconds": milliseconds(end - begin),
        "between_kernels": milliseconds(end - begin - busy(events)),
        "by_part": {part: milliseconds(each) for part, each in by_part.most_common()},
        "launches": len(events) / TRACED,
        "longest": [[milliseconds(n), runs[key] / TRACED, *key] for key, n in spent.most_common(70)],
    }


def device_events(path: Path) -> Iterator[tuple[str, str, float, float]]:
    """(kernel, HLO instruction, begin, duration in ns) of everything that ran on the GPU's streams."""
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                yield event.name, str(stats.get("hlo_op", event.name)), event.start_ns, event.duration_ns


def busy(events: list[tuple[str, str, float, float]]) -> float:
    """Nanoseconds in which at least one kernel ran."""
    total, until = 0.0, 0.0
    for _, _, begin, duration in sorted(events, key=lambda event: event[2]):
        total += max(0.0, begin + duration - max(begin, until))
        until = max(until, begin + duration)
    return total


def part_of(kernel: str, each: hlo.Instruction | None, in_loop: bool) -> str:
    """The part of the step that a kernel belongs to; of one that no instruction explains, whether it is in the loss."""
    name, where = f"{kernel} {each.name if each else ''}".lower(), scope(each) if each else "loss" * in_loop
    # The only kernel of our own is that of the loss.
    product = any(w in name for w in ("gemm", "nvjet", "xmma", "cublas", "cutlass", "splitk", "mosaic_gpu"))
    return parts.part_of("loss" if "mosaic_gpu" in name else where, name, product)


def beside(name: str, others: tuple[str, ...], batch: int, smoke: bool, more: Mapping[str, Any]) -> dict[str, Any]:
    """The train step beside others, interleaved."""
    cfg = model_config(name, MODELS[name][batch], smoke, more)
    return sides.compare(cfg, ("tiedjax", *others), rounds=2 if smoke else 6, window_seconds=0.1 if smoke else 1.0)


def under_flags(name: str, smoke: bool, more: Mapping[str, Any]) -> dict[str, Any]:
    """`tiedjax bench` of a model's first layers under each of `FLAGS`: seconds of a step, and of compiling it."""
    options = {"model.seq_len": MODELS[name][0], "data.batch_size": MODELS[name][1], "model.layers": 4, **more}
    options |= {f"model.{key}": value for key, value in SMOKE.items()} | {"data.batch_size": 4} if smoke else {}
    changes = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "tiedjax", "bench", name, "--steps", "4" if smoke else "60", *changes]
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, flags in list(FLAGS.items())[: 1 if smoke else None]:
            path = Path(folder, "bench.json")
            path.unlink(missing_ok=True)
            given = {**os.environ, "XLA_FLAGS": " ".join(filter(None, [os.environ.get("XLA_FLAGS"), flags]))}
            given.pop("XLA_PYTHON_CLIENT_PREALLOCATE", None)
            asked = [*command, "--json", str(path)]
            done = subprocess.run(asked, env=given, cwd=sides.HERE.parent, capture_output=True, text=True, check=False)
            if done.returncode:
                result[label] = {"failed": done.stderr[-500:]}
            else:
                measured = json.loads(path.read_text(encoding="utf-8"))
                result[label] = {key: measured[key] for key in ("step_seconds", "compile_seconds", "loss", "flags")}
            print(f"  {label}: {json.dumps(result[label])}", flush=True)
    return result


PARTS: dict[str, Callable[[bool, Mapping[str, Any]], dict[str, Any]]] = {
    "correctness": partial(correctness, "tiny", 20),
    "muon": partial(correctness, "quick", 4),
    "gradients": gradients,
    "resume": resume,
    "loss": compare_losses,
    **{f"step:{name}": partial(measured_step, name) for name in MODELS},
    **{f"torch:{name}": partial(beside, name, ("torch_compiled",), 2) for name in MODELS},
    **{f"roles:{name}": partial(beside, name, ("without_account", "without_roles"), 1) for name in MODELS},
    **{f"flags:{name}": partial(under_flags, name) for name in MODELS},
}


def driver() -> str | None:
    """The version of NVIDIA's driver; None where there is none."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def run_part(name: str, machine: str, out: Path | None, smoke: bool, more: Mapping[str, Any], label: str) -> bool:
    """Runs one part in this process and saves what it found; whether that keeps to the part's limits, if it has any."""
    environment = sides.about(machine, pytorch=name.startswith("torch:"))
    began = time.perf_counter()
    result = PARTS[name](smoke, more)
    environment |= {"driver": driver()}
    result |= {"environment": environment, "seconds_in_all": time.perf_counter() - began, "smoke": smoke}
    name = f"{name}, {label}" if label else name
    kind = "smoke" if smoke else sides.slug(environment["device"]["kind"])
    sides.save(out or sides.HERE / "results" / f"gpu_{kind}.json", name, result)
    return all(each.get("holds", True) for each in result.values() if isinstance(each, dict))


def main() -> int:
    """Runs the parts one after the other; the status is the number of those that failed or broke a limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="what it runs on, in words")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="default: all")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to test this program")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu_DEVICE.json")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the models' configs")
    parser.add_argument("--label", default="", help="what the changes are called in the results")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        changes = {key: sides.scalar(value) for key, _, value in (each.partition("=") for each in args.set)}
        return 0 if run_part(args.parts[0], args.machine, args.out, args.smoke, changes, args.label) else 1
    platform_flags.apply()
    failed = 0
    for part in args.parts:
        print(part, flush=True)
        options = ["--smoke"] * args.smoke + (["--out", str(args.out)] if args.out else [])
        options += ["--set", *args.set, "--label", args.label]
        command = [sys.executable, __file__, "--here", "--parts", part, "--machine", args.machine, *options]
        # Two processes share the GPU: JAX must not take most of its memory beforehand.
        shares = part.startswith(("torch:", "flags:")) or part == "resume"
        shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if shares else {}
        done = subprocess.run(command, env={**os.environ, **shared}, check=False)
        failed += done.returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
