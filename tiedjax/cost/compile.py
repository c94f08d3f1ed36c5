"""The real train step compiled for TPUs that are not there: memory and collectives of a chip, compile time.

Every number but the seconds is a static estimate of XLA's compiler: nothing runs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tiedjax import sharding
from tiedjax.config import RunConfig
from tiedjax.config_files import to_tree
from tiedjax.cost import hlo
from tiedjax.cost.hlo import Traffic
from tiedjax.cost.topology import Topology
from tiedjax.errors import UserError
from tiedjax.files import write_atomically
from tiedjax.step import Steps, decided, make_steps
from tiedjax.tying import Tables

GIB = 2**30
ESTIMATE = "static estimate of XLA's compiler; nothing was run"
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one chip holds and sends in a step; None is what XLA did not tell.

    Attributes:
      argument_bytes: state, batch and constants; the new state takes the place of the old.
      needed_bytes: arguments, temporaries, outputs that replace no argument, and the program.
      fsdp_bytes: by kind, what ZeRO-3 has to send (`fsdp_traffic`); None under tensor parallelism.
      unknown_loops: loops of unknown length, whose collectives are counted once.
    """

    topology: str
    devices: int
    mesh: dict[str, int]
    argument_bytes: int
    temp_bytes: int | None = None
    output_bytes: int | None = None
    needed_bytes: int | None = None
    hbm_bytes: int
    fits: bool = False
    collectives: dict[str, Traffic] | None = None
    fsdp_bytes: dict[str, int] | None
    unknown_loops: list[str] = field(default_factory=list)
    trace_seconds: float
    compile_seconds: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def short_bytes(self) -> int | None:
        """Bytes that the chip's memory is too small by."""
        return None if self.needed_bytes is None else max(0, self.needed_bytes - self.hbm_bytes)


def compile_step(cfg: RunConfig, topology: Topology) -> Report:
    """Compiles the train step of `cfg` for `topology`. Raises UserError if its mesh is not all of the slice."""
    mesh = sharding.make_mesh(cfg.mesh, topology.devices())
    if mesh.size != topology.chips:
        raise UserError(
            f"mesh: {_product(dict(mesh.shape))} = {mesh.size} is not the {topology.chips} chips of {topology.name}; "
            "mesh.data -1 takes what fsdp and tensor leave"
        )
    cfg = decided(cfg, mesh)
    steps = make_steps(cfg, mesh)
    inputs = arguments(cfg, steps)
    began = time.perf_counter()
    lowered = steps.train.lower(*inputs)
    traced = time.perf_counter()
    report = Report(
        config=to_tree(cfg),
        topology=topology.name,
        devices=topology.chips,
        mesh=dict(mesh.shape),
        argument_bytes=_held_bytes(inputs),
        hbm_bytes=topology.kind.hbm_bytes,
        fsdp_bytes=fsdp_traffic(cfg, steps, mesh),
        trace_seconds=traced - began,
    )
    try:
        compiled = lowered.compile()
        outcome = _compiled_fields(compiled, topology.kind.hbm_bytes)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        outcome = {"needed_bytes": needed_bytes(str(error))}
    return dataclasses.replace(report, **outcome, compile_seconds=time.perf_counter() - traced)


def _compiled_fields(compiled: jax.stages.Compiled, hbm_bytes: int) -> dict[str, Any]:
    """The fields of a report that only a compiled step has."""
    memory: Any = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    fields = {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "needed_bytes": needed,
        "fits": needed <= hbm_bytes,
    }
    try:
        traffic = hlo.collectives(compiled.as_text() or "")
    except (jax.errors.JaxRuntimeError, ValueError):  # XLA cannot print every program
        return fields
    return {**fields, "collectives": traffic.kinds, "unknown_loops": traffic.unknown_loops}


def arguments(cfg: RunConfig, steps: Steps) -> tuple[Any, ...]:
    """The shapes and shardings of what `steps.train` takes."""
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=steps.replicated)
    return (
        steps.abstract,
        jax.ShapeDtypeStruct((cfg.data.batch_size, cfg.model.seq_len + 1), jnp.int32, sharding=steps.batch),
        Tables(scalar, scalar),
        jax.ShapeDtypeStruct((cfg.model.table_rows,), jnp.int32, sharding=steps.replicated),
    )


def _held_bytes(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def needed_bytes(message: str) -> int | None:
    """The bytes that XLA says a program needs when it refuses it."""
    amount = r"([\d.]+)([KMGT]?)B?"
    match = re.search(rf"Used {amount} of ", message) or re.search(rf"\({amount}\) exceeds available HBM", message)
    return int(float(match[1]) * _UNITS[match[2]]) if match else None


def fsdp_traffic(cfg: RunConfig, steps: Steps, mesh: Mesh) -> dict[str, int] | None:
    """Bytes per chip and step that ZeRO-3 (arXiv 1910.02054) has to send, as `hlo.collectives` counts them.

    With P numbers in the body's matrices, c bytes each in the compute dtype, N tokens per chip and m microbatches:

      all-gather      m c (2 P + V D)      the body forward and again backward, the output table once
      reduce-scatter  m (c P + 4 V D)      the body's gradient in the compute dtype, the output role's in float32
      all-to-all      2 c N D              looked-up vectors and their gradients, columns exchanged for tokens
      all-reduce      2 m (c P + 8 V D)/f  with replicas along `data`: gradients of what one of f = fsdp chips keeps

    None under tensor parallelism, which sends activations too. Norms, token ids and metrics are left out.
    """
    if mesh.shape["tensor"] > 1:
        return None
    leaves = jax.tree_util.tree_leaves_with_path(steps.abstract.params["body"])
    body = sum(leaf.size for path, leaf in leaves if path[-1] == jax.tree_util.DictKey("kernel"))
    table = cfg.model.table_rows * cfg.model.d_model
    c, m, f = 4 if cfg.model.dtype == "float32" else 2, cfg.data.microbatches, mesh.shape["fsdp"]
    tokens = cfg.data.batch_size * cfg.model.seq_len // mesh.size
    cut, replicated = f > 1, mesh.shape["data"] > 1
    return {
        "all-gather": cut * m * c * (2 * body + table),
        "reduce-scatter": cut * m * (c * body + 4 * table),
        "all-to-all": cut * 2 * c * tokens * cfg.model.d_model,
        "all-reduce": replicated * 2 * m * (c * body + 8 * table) // f,
    }


def advice(cfg: RunConfig, report: Report) -> list[str]:
    """What makes a step need less memory, what helps most first."""
    rows = cfg.data.batch_size // cfg.data.microbatches // (report.mesh["data"] * report.mesh["fsdp"])
    options = []
    if report.argument_bytes > report.hbm_bytes / 2 and report.mesh["data"] > 1:
        options.append(f"--mesh.fsdp {report.mesh['fsdp'] * report.mesh['data']} (cuts the state further)")
    if rows > 1:
        options.append(f"--data.microbatches {2 * cfg.data.microbatches} (half as many sequences at a time)")
    if cfg.model.remat != "full":
        options.append("--model.remat full")
    if report.argument_bytes > report.hbm_bytes / 2 and cfg.optimizer.moments_dtype == "float32":
        options.append("--optimizer.moments_dtype bfloat16")
    if rows <= 1:
        options.append(f"--mesh.tensor {2 * report.mesh['tensor']} (cuts activations too)")
    return [*options, "a larger slice"]


def lines(cfg: RunConfig, report: Report) -> list[str]:
    """The report as a person reads it."""
    text = [
        f"{report.topology}: {report.devices} chips, mesh {_product(report.mesh)}; {ESTIMATE}",
        "",
        "memory per chip",
        f"  state, batch and constants  {_gib(report.argument_bytes):>14}",
        f"  temporary                   {_gib(report.temp_bytes):>14}",
        f"  needed, with the program    {_gib(report.needed_bytes):>14}",
        f"  available                   {_gib(report.hbm_bytes):>14}",
    ]
    if not report.collectives:
        text += ["", f"collectives  {'unknown' if report.collectives is None else 'none'}"]
    else:
        text += ["", "collectives per step and chip      count            GB    FSDP by hand"]
        by_hand = report.fsdp_bytes or {}
        for kind in hlo.KINDS:
            done, due = report.collectives.get(kind, Traffic()), by_hand.get(kind, 0)
            if done.count or due:
                hand = f"{due / 1e9:.3f}" if report.fsdp_bytes else "-"
                text.append(f"  {kind:<26} {done.count:>11} {done.bytes / 1e9:>13.3f} {hand:>15}")
        if report.unknown_loops:
            text.append(f"  counted once, as their length is unknown: loops {', '.join(report.unknown_loops)}")
    text += ["", f"traced in {report.trace_seconds:.0f} s, compiled in {report.compile_seconds:.0f} s"]
    if report.fits and report.needed_bytes is not None:
        return [*text, f"fits, {_gib(report.hbm_bytes - report.needed_bytes)} to spare"]
    short = "" if report.short_bytes is None else f", short by {_gib(report.short_bytes)}"
    return [*text, f"does not fit{short}; try {' or '.join(advice(cfg, report))}"]


def _gib(amount: int | None) -> str:
    return "unknown" if amount is None else f"{amount / GIB:.2f} GiB"


def _product(mesh: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items())


def as_json(report: Report) -> dict[str, Any]:
    """The report for scripts, with what it was made of."""
    packages = ("tiedjax", "jax", "jaxlib", "flax", "libtpu")
    return {
        **dataclasses.asdict(report),
        "short_bytes": report.short_bytes,
        "kind": ESTIMATE,
        "versions": {name: version(name) for name in packages},
    }


def run(cfg: RunConfig, topology: str, json_path: Path | None) -> int:
    """Compiles, prints the report and saves it; returns the exit status: 0 it fits, 1 it does not."""
    parsed = Topology.parse(topology)
    jax.config.update("jax_platforms", "cpu")  # a TPU or GPU of this machine has no part in it
    report = compile_step(cfg, parsed)
    if json_path:
        write_atomically(json_path, json.dumps(as_json(report), indent=1) + "\n")
    print("\n".join(lines(cfg, report)))
    return 0 if report.fits else 1
