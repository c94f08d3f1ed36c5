"""Compiles the train step for accelerators that are not there, each case in a process of its own.

    python benchmarks/compile.py tpu                   # some minutes; needs pip install ".[tpu]"
    python benchmarks/compile.py gpu                   # some minutes; needs pip install ".[cuda]" and Python 3.12
    python benchmarks/compile.py tpu --only olmo_7b    # these alone; the others keep what was saved

Writes benchmarks/results/compile.json (TPUs) and compile_gpu.json. On TPUs: olmo_1b at 4 sequences of 2,048 tokens per
chip on 4, 64 and 512 chips of v5p, once cut over one or two axes of the torus (the rest replicas of `data`) and once
over all chips, on two slices, and olmo_7b on 64. On GPUs: the three smaller models on one H100, also without the
account of the updates, and without the role split and its metrics; olmo_1b on 8 and on two slices of 8. On both: a
table of 256,000 rows of 8,192. Static estimates of XLA's compiler: nothing runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SAVED = {"tpu": HERE / "results" / "compile.json", "gpu": HERE / "results" / "compile_gpu.json"}
ALONE = {"model.remat": "none", "data.microbatches": 1}  # one card: nothing is computed again or accumulated
LARGE_TABLE = {
    "model.layers": 2,
    "model.d_model": 8192,
    "model.heads": 64,
    "model.d_ff": 22_016,
    "model.vocab_size": 256_000,
    "mesh.fsdp": 8,
    "data.batch_size": 128,
}

CASES: dict[str, dict[str, tuple[str, str, dict[str, Any]]]] = {
    "tpu": {
        "olmo_1b, 4 chips": ("olmo_1b", "v5p:2x2x1", {"mesh.fsdp": 4, "data.batch_size": 16}),
        "olmo_1b, 64 chips": ("olmo_1b", "v5p:4x4x4", {"mesh.fsdp": 16, "data.batch_size": 256}),
        "olmo_1b, 512 chips": ("olmo_1b", "v5p:8x8x8", {"mesh.fsdp": 64, "data.batch_size": 2048}),
        "olmo_7b, 64 chips": ("olmo_7b", "v5p:4x4x4", {"mesh.fsdp": 16, "data.batch_size": 256}),
        "olmo_1b, 64 chips, no replicas": ("olmo_1b", "v5p:4x4x4", {"mesh.fsdp": 64, "data.batch_size": 256}),
        "olmo_1b, 512 chips, no replicas": ("olmo_1b", "v5p:8x8x8", {"mesh.fsdp": 512, "data.batch_size": 2048}),
        "olmo_1b, 2 slices of 4 chips": ("olmo_1b", "2*v5p:2x2x1", {"mesh.fsdp": 4, "data.batch_size": 32}),
        "large table, 64 chips": ("olmo_7b", "v5p:4x4x4", LARGE_TABLE),
    },
    "gpu": {
        "olmo_60m": ("olmo_60m", "h100:1", {"model.seq_len": 1024, "data.batch_size": 32} | ALONE),
        "olmo_300m": ("olmo_300m", "h100:1", {"model.seq_len": 4096, "data.batch_size": 8} | ALONE),
        "olmo_1b": ("olmo_1b", "h100:1", {"data.batch_size": 8} | ALONE),
        "olmo_1b, batch 16": ("olmo_1b", "h100:1", {"data.batch_size": 16} | ALONE | {"model.remat": "dots"}),
        "olmo_1b, 8 GPUs": ("olmo_1b", "h100:8", {"data.batch_size": 64, "mesh.fsdp": 8} | ALONE),
        "olmo_1b, 2 slices of 8 GPUs": ("olmo_1b", "2*h100:8", {"data.batch_size": 128, "mesh.fsdp": 8} | ALONE),
        "large table, 64 GPUs": ("olmo_7b", "h100:8x8", LARGE_TABLE),
    },
}


def options(overrides: Mapping[str, Any]) -> list[str]:
    """As words of a command line."""
    return [text for key, value in overrides.items() for text in (f"--{key}", str(value))]


def compiled(config: str, topology: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What `tiedjax compile --json` saves, with what is sent beside the count by hand."""
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "report.json"
        command = [sys.executable, "-m", "tiedjax", "compile", f"configs/{config}.yaml", "--topology", topology]
        words = [*command, *options(overrides), "--json", str(saved)]
        status = subprocess.run(words, cwd=HERE.parent, check=False).returncode
        if status not in (0, 1):  # 1: compiled, but does not fit
            raise SystemExit(status)
        report = json.loads(saved.read_text(encoding="utf-8"))
    if report["collectives"] is not None and report["fsdp_bytes"] is not None:
        sent = sum(each["bytes"] for each in report["collectives"].values())
        due = sum(report["fsdp_bytes"].values())
        report["sent_bytes"] = sent
        report["sent_over_count_by_hand"] = sent / due if due else None
    return report


def apart(function: Callable[..., int], case: tuple[str, str, Mapping[str, Any]]) -> int:
    """The function's answer for this case, from a process of its own."""
    config, topology, overrides = case
    words = [sys.executable, __file__, "--here", function.__name__, config, topology, *options(overrides)]
    return int(subprocess.run(words, cwd=HERE.parent, check=True, stdout=subprocess.PIPE, text=True).stdout)


def bytes_without_roles(cfg: Any, mesh: Any) -> int:
    """What the step moves on each GPU if it neither splits the gradient nor measures roles."""
    import step as sides

    from tiedjax.cost import kernels
    from tiedjax.cost.compile import arguments
    from tiedjax.step import make_steps

    cfg = sides.without_account(cfg)
    steps = sides.without_roles(cfg, mesh, make_steps(cfg, mesh))
    text = steps.train.lower(*arguments(cfg, steps)).compile().as_text() or ""
    return sum(kernel.times * kernel.bytes for kernel in kernels.kernels(text))


def bytes_without_account(cfg: Any, mesh: Any) -> int:
    """What the step moves on each GPU if it splits the gradient and keeps no account of the updates."""
    import step as sides

    from tiedjax.cost import kernels
    from tiedjax.cost.compile import arguments
    from tiedjax.step import make_steps

    cfg = sides.without_account(cfg)
    steps = make_steps(cfg, mesh)
    text = steps.train.lower(*arguments(cfg, steps)).compile().as_text() or ""
    return sum(kernel.times * kernel.bytes for kernel in kernels.kernels(text))


def loss_buffers(cfg: Any, mesh: Any) -> int:
    """Bytes that the loss and its gradients need for a while on each device, beside the table whole, in bfloat16, and
    the table's gradient whole, in float32.
    """
    import jax
    import jax.numpy as jnp

    from tiedjax.loss import cross_entropy
    from tiedjax.sharding import Layout, batch_sharding, partition_spec

    layout, rows, D = Layout(mesh), cfg.model.table_rows, cfg.model.d_model
    batch = (cfg.data.batch_size, cfg.model.seq_len)
    by_batch, cut = batch_sharding(mesh), jax.sharding.NamedSharding(mesh, partition_spec(("vocab", "embed")))

    def total(h_BTD: jax.Array, U_VD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        return cross_entropy(h_BTD, U_VD, targets_BT, jnp.ones(targets_BT.shape), layout=layout)[0]

    arguments = (
        jax.ShapeDtypeStruct((*batch, D), jnp.bfloat16, sharding=by_batch),
        jax.ShapeDtypeStruct((rows, D), jnp.float32, sharding=cut),
        jax.ShapeDtypeStruct(batch, jnp.int32, sharding=by_batch),
    )
    step = jax.jit(jax.grad(total, argnums=(0, 1)), out_shardings=(by_batch, cut))
    memory: Any = step.lower(*arguments).compile().memory_analysis()
    return int(memory.temp_size_in_bytes) - 6 * rows * D


def here(function: str, config: str, name: str, words: list[str]) -> int:
    """One of the three functions above, in this process."""
    from tiedjax.host import platform_flags

    platform_flags.apply_for_absent()
    from tiedjax import sharding
    from tiedjax.config_files import load_run_config
    from tiedjax.cost import topology
    from tiedjax.step import decided

    changes = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
    cfg = load_run_config(HERE.parent / "configs" / f"{config}.yaml", changes)
    devices = topology.parse(name)
    mesh = sharding.make_mesh(cfg.mesh, devices.devices(), devices.slices)
    return {each.__name__: each for each in (bytes_without_account, bytes_without_roles, loss_buffers)}[function](
        decided(cfg, mesh), mesh
    )


def main() -> None:
    """Compiles what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("platform", choices=CASES, help="what to compile for")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    args = parser.parse_args()
    saved = SAVED[args.platform]
    results = json.loads(saved.read_text(encoding="utf-8")) if saved.exists() else {}
    for name, case in CASES[args.platform].items():
        if args.only not in name:
            continue
        print(f"\n{name}", flush=True)
        results[name] = compiled(*case)
        if case[1] == "h100:1":
            moved = results[name]["gpu"]["total"]["bytes"]
            plain = apart(bytes_without_account, case)
            results[name]["account_share_of_bytes"] = share = 1 - plain / moved
            print(f"the account of the updates and its metrics move {share:.2%} of the bytes", flush=True)
            results[name]["role_share_of_bytes"] = share = 1 - apart(bytes_without_roles, case) / plain
            print(f"the role split and its metrics move {share:.2%} of the others", flush=True)
        if case[2] is LARGE_TABLE:
            results[name]["loss_buffer_bytes"] = size = apart(loss_buffers, case)
            print(f"the loss needs {size / 2**30:.2f} GiB beside the table and its gradient", flush=True)
        saved.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--here"]:
        print(here(*sys.argv[2:5], sys.argv[5:]))
    else:
        main()
