"""The real train step compiled for TPUs or GPUs that are not there: memory, collectives and, on GPUs, a bound on time.

Every number but the seconds is a static estimate of XLA's compiler: nothing runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tiedjax import sharding, tying
from tiedjax.config import RunConfig
from tiedjax.config_files import to_tree
from tiedjax.cost import hlo, roofline
from tiedjax.cost import topology as topologies
from tiedjax.cost.bench import zipf_shares
from tiedjax.cost.gpus import Hosts
from tiedjax.cost.kernels import kernels
from tiedjax.cost.report import GpuWork, Report, as_json, lines, product
from tiedjax.cost.topology import Topology
from tiedjax.errors import UserError
from tiedjax.files import write_atomically
from tiedjax.flops import model_flops
from tiedjax.step import Steps, decided, make_steps
from tiedjax.tying import Tables

# What XLA:GPU warns of where it has computed things twice and still needs more than it planned for.
_REMATERIALISES = "Can't reduce memory use below"
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compile_step(cfg: RunConfig, topology: Topology) -> Report:
    """Compiles the train step of `cfg` for `topology`. Raises UserError if its mesh is not all of it."""
    mesh = sharding.make_mesh(cfg.mesh, topology.devices(), topology.slices)
    if mesh.size != topology.chips:
        raise UserError(
            f"mesh: {product(dict(mesh.shape))} = {mesh.size} is not the {topology.chips} {topology.noun}s of "
            f"{topology.name}; mesh.data -1 takes what fsdp and tensor leave"
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
        noun=topology.noun,
        slices=topology.slices,
        devices=topology.chips,
        mesh=dict(mesh.shape),
        argument_bytes=_held_bytes(inputs),
        hbm_bytes=topology.memory_bytes,
        usable_bytes=topology.usable_bytes,
        fsdp_bytes=fsdp_traffic(cfg, steps, mesh),
        trace_seconds=traced - began,
    )
    try:
        with _standard_error() as warnings:
            compiled = lowered.compile()
        outcome = _memory(compiled, topology.usable_bytes) | {"recomputes": _REMATERIALISES in warnings.getvalue()}
        outcome |= _program(compiled, cfg, topology)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        outcome = {"needed_bytes": needed_bytes(str(error))}
    return dataclasses.replace(report, **outcome, compile_seconds=time.perf_counter() - traced)


def _memory(compiled: jax.stages.Compiled, usable_bytes: int) -> dict[str, Any]:
    memory: Any = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "needed_bytes": needed,
        "fits": needed <= usable_bytes,
    }


def _program(compiled: jax.stages.Compiled, cfg: RunConfig, topology: Topology) -> dict[str, Any]:
    """The fields of a report that the program's text tells."""
    try:
        text = compiled.as_text() or ""
        traffic = hlo.collectives(text, topology.chips // topology.slices if topology.slices > 1 else None)
    except (jax.errors.JaxRuntimeError, ValueError):  # XLA cannot print every program
        return {}
    fields = {"collectives": traffic.kinds, "unknown_loops": traffic.unknown_loops}
    return fields | ({"gpu": gpu_work(text, cfg, topology)} if isinstance(topology, Hosts) else {})


def gpu_work(text: str, cfg: RunConfig, hosts: Hosts) -> GpuWork:
    """What the program of this text, the step of `cfg`, does on each of the GPUs."""
    launched = kernels(text)
    operands: Counter[str] = Counter()
    for kernel in launched:
        if kernel.flops:
            operands[" x ".join(kernel.operands)] += kernel.times * kernel.flops
    parts = roofline.by_part(launched, hosts.card)
    most = model_flops(cfg) / hosts.chips / hosts.card.bfloat16_flops
    return GpuWork(
        parts=parts,
        operands=dict(operands.most_common()),
        attention_calls=sum(kernel.times for kernel in launched if kernel.part == "attention"),
        mfu_causal_bound=most / sum(work.seconds for work in parts.values()),
    )


@contextlib.contextmanager
def _standard_error() -> Iterator[io.StringIO]:
    """Holds what is written to standard error, by XLA too: read from what is yielded, and passed on at the end."""
    held = io.StringIO()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield held
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            held.write(file.read().decode(errors="replace"))
            passed_on = [line for line in held.getvalue().splitlines(keepends=True) if _REMATERIALISES not in line]
            sys.stderr.write("".join(passed_on))


def arguments(cfg: RunConfig, steps: Steps) -> tuple[Any, ...]:
    """The shapes and shardings of what `steps.train` takes; tokens are as rare as those of `zipf_tokens`."""
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=steps.replicated)
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=steps.replicated)
    gate = jax.tree.map(like, tying.rare_gate(cfg, zipf_shares(cfg)))
    return (
        steps.abstract,
        jax.ShapeDtypeStruct((cfg.data.batch_size, cfg.model.seq_len + 1), jnp.int32, sharding=steps.batch),
        Tables(scalar, scalar),
        jax.ShapeDtypeStruct((cfg.model.table_rows,), jnp.int32, sharding=steps.replicated),
        *([] if cfg.tying.rare_gate is None else [gate]),
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

      all-gather      m c (g P + V D)      the body g times, the output table once
      reduce-scatter  m (c P + 4 V D)      the body's gradient in the compute dtype, the output role's in float32
      all-to-all      2 c N D              looked-up vectors and their gradients, columns exchanged for tokens
      all-reduce      2 m (c P + 8 V D)/f  with replicas along `data`: gradients of what one of f = fsdp chips keeps

    g is 1 where the layers are unrolled and nothing is computed again, as XLA then keeps what was gathered for the
    forward pass; 2 elsewhere. None under tensor parallelism, which sends activations too. Norms, token ids and metrics
    are left out.
    """
    if mesh.shape["tensor"] > 1:
        return None
    gathers = 2 if cfg.model.scan_layers or cfg.model.remat != "none" else 1
    leaves = jax.tree_util.tree_leaves_with_path(steps.abstract.params["body"])
    body = sum(leaf.size for path, leaf in leaves if path[-1] == jax.tree_util.DictKey("kernel"))
    table = cfg.model.table_rows * cfg.model.d_model
    c, m, f = 4 if cfg.model.dtype == "float32" else 2, cfg.data.microbatches, mesh.shape["fsdp"]
    tokens = cfg.data.batch_size * cfg.model.seq_len // mesh.size
    cut, replicated = f > 1, mesh.shape["data"] > 1
    return {
        "all-gather": cut * m * c * (gathers * body + table),
        "reduce-scatter": cut * m * (c * body + 4 * table),
        "all-to-all": cut * 2 * c * tokens * cfg.model.d_model,
        "all-reduce": replicated * 2 * m * (c * body + 8 * table) // f,
    }


def run(cfg: RunConfig, topology: str, json_path: Path | None) -> int:
    """Compiles, prints the report and saves it; returns the exit status: 0 it fits, 1 it does not."""
    report = compile_step(cfg, topologies.parse(topology))
    if json_path:
        write_atomically(json_path, json.dumps(as_json(report), indent=1) + "\n")
    print("\n".join(lines(cfg, report)))
    return 0 if report.fits else 1
