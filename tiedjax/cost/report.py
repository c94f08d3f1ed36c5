"""What `tiedjax compile` tells of a compiled step: as lines for a person, as JSON for a script."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tiedjax.config import RunConfig
from tiedjax.cost import hlo
from tiedjax.cost.hlo import Traffic
from tiedjax.cost.roofline import Work

GIB = 2**30
ESTIMATE = "static estimate of XLA's compiler; nothing was run"
PACKAGES = ("tiedjax", "jax", "jaxlib", "flax", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")


@dataclass(frozen=True, kw_only=True)
class GpuWork:
    """What a step does on one GPU, from its compiled program.

    Attributes:
      parts: by part of the step, with the seconds that the card needs at least: a bound.
      operands: dtypes of the operands of its matrix products, such as "bf16 x bf16": FLOP.
      attention_calls: calls of cuDNN's attention.
      mfu_causal_bound: FLOP utilisation if the step took the bound's time.
    """

    parts: dict[str, Work]
    operands: dict[str, int]
    attention_calls: int
    mfu_causal_bound: float

    @property
    def total(self) -> Work:
        """Of all parts."""
        return sum(self.parts.values(), Work())


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one device holds and sends in a step; None is what XLA did not tell.

    Attributes:
      noun: what a device is called.
      argument_bytes: state, batch and constants; the new state takes the place of the old.
      needed_bytes: arguments, temporaries, outputs that replace no argument, and the program.
      hbm_bytes: of a device's memory; `usable_bytes` of it are a program's.
      recomputes: whether XLA computes some of it twice because memory was short (GPU).
      fsdp_bytes: by kind, what ZeRO-3 has to send (`fsdp_traffic`); None under tensor parallelism.
      unknown_loops: loops of unknown length, whose collectives are counted once.
      gpu: None for TPUs, whose programs say less.
    """

    topology: str
    noun: str
    slices: int
    devices: int
    mesh: dict[str, int]
    argument_bytes: int
    temp_bytes: int | None = None
    output_bytes: int | None = None
    needed_bytes: int | None = None
    hbm_bytes: int
    usable_bytes: int
    fits: bool = False
    recomputes: bool = False
    collectives: dict[str, Traffic] | None = None
    fsdp_bytes: dict[str, int] | None
    unknown_loops: list[str] = field(default_factory=list)
    gpu: GpuWork | None = None
    trace_seconds: float
    compile_seconds: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def short_bytes(self) -> int | None:
        """Bytes that the usable memory is too small by."""
        return None if self.needed_bytes is None else max(0, self.needed_bytes - self.usable_bytes)


def lines(cfg: RunConfig, report: Report) -> list[str]:
    """The report as a person reads it."""
    noun = report.noun
    devices = f"{report.devices} {noun}{'s' * (report.devices > 1)}"
    text = [
        f"{report.topology}: {devices}, mesh {product(report.mesh)}; {ESTIMATE}",
        "",
        f"memory per {noun}",
        f"  state, batch and constants  {_gib(report.argument_bytes):>14}",
        f"  temporary                   {_gib(report.temp_bytes):>14}",
        f"  needed, with the program    {_gib(report.needed_bytes):>14}",
        f"  available                   {_gib(report.usable_bytes):>14}",
    ]
    if report.usable_bytes < report.hbm_bytes:
        text[-1] += f", of the card's {_gib(report.hbm_bytes)}"
    text += ["", *_collective_lines(report), *_gpu_lines(report)]
    text += ["", f"traced in {report.trace_seconds:.0f} s, compiled in {report.compile_seconds:.0f} s"]
    if report.fits and report.needed_bytes is not None:
        spare = f"fits, {_gib(report.usable_bytes - report.needed_bytes)} to spare"
        if report.recomputes:
            spare += f", but XLA computes some of it twice; to avoid that try {' or '.join(advice(cfg, report))}"
        return [*text, spare]
    short = "" if report.short_bytes is None else f", short by {_gib(report.short_bytes)}"
    return [*text, f"does not fit{short}; try {' or '.join(advice(cfg, report))}"]


def _collective_lines(report: Report) -> list[str]:
    if not report.collectives:
        return [f"collectives  {'unknown' if report.collectives is None else 'none'}"]
    # What a TPU sends beside its computing stands in no one place of its program.
    columns = {"GB": "bytes"} | ({"asynchronous": "asynchronous_bytes"} if report.gpu else {})
    columns |= {"between slices": "between_slices_bytes"} if report.slices > 1 else {}
    heads = "".join(f"{head:>16}" for head in (*columns, "FSDP by hand"))
    text = [f"{f'collectives per step and {report.noun}':<33}{'count':>7}{heads}"]
    by_hand = report.fsdp_bytes or {}
    for kind in hlo.KINDS:
        done, due = report.collectives.get(kind, Traffic()), by_hand.get(kind, 0)
        if done.count or due:
            sizes = "".join(f"{getattr(done, column) / 1e9:>16.3f}" for column in columns.values())
            text.append(f"  {kind:<31}{done.count:>7}{sizes}{f'{due / 1e9:.3f}' if report.fsdp_bytes else '-':>16}")
    if report.unknown_loops:
        text.append(f"  counted once, as their length is unknown: loops {', '.join(report.unknown_loops)}")
    return text


def _gpu_lines(report: Report) -> list[str]:
    if report.gpu is None:
        return []
    text = ["", f"{'kernels per step and GPU':<34} launches       GB    TFLOP  bound, ms"]
    total = report.gpu.total
    for part, work in [*report.gpu.parts.items(), ("in all", total)]:
        numbers = f"{work.launches:>8} {work.bytes / 1e9:>8.2f} {work.flops / 1e12:>8.2f} {1e3 * work.seconds:>10.2f}"
        text.append(f"  {part:<32} {numbers}")
    products = ", ".join(f"{flops / 1e12:.2f} TFLOP {dtypes}" for dtypes, flops in report.gpu.operands.items())
    return [
        *text,
        f"products: {products}; {report.gpu.attention_calls} calls of cuDNN's attention",
        f"bound: no step in less than {1e3 * total.seconds:.1f} ms, collectives left out, so MFU is at most "
        f"{report.gpu.mfu_causal_bound:.1%}",
    ]


def advice(cfg: RunConfig, report: Report) -> list[str]:
    """What makes a step need less memory, what helps most first."""
    rows = cfg.data.batch_size // cfg.data.microbatches // (report.mesh["data"] * report.mesh["fsdp"])
    options = []
    if report.argument_bytes > report.usable_bytes / 2 and report.mesh["data"] > 1:
        options.append(f"--mesh.fsdp {report.mesh['fsdp'] * report.mesh['data']} (cuts the state further)")
    if rows > 1:
        options.append(f"--data.microbatches {2 * cfg.data.microbatches} (half as many sequences at a time)")
    if report.noun == "GPU" and cfg.model.remat == "none":
        options.append("--model.remat dots")
    elif cfg.model.remat != "full":
        options.append("--model.remat full")
    if report.argument_bytes > report.usable_bytes / 2 and cfg.optimizer.moments_dtype == "float32":
        options.append("--optimizer.moments_dtype bfloat16")
    if rows <= 1:
        options.append(f"--mesh.tensor {2 * report.mesh['tensor']} (cuts activations too)")
    return [*options, "more GPUs" if report.noun == "GPU" else "a larger slice"]


def _gib(amount: int | None) -> str:
    return "unknown" if amount is None else f"{amount / GIB:.2f} GiB"


def product(mesh: dict[str, int]) -> str:
    """A mesh in words."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items())


def as_json(report: Report) -> dict[str, Any]:
    """The report for scripts, with what it was made of."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    gpu = dataclasses.asdict(report)["gpu"]
    if report.gpu:
        gpu["total"] = dataclasses.asdict(report.gpu.total)
    return {
        **dataclasses.asdict(report),
        "gpu": gpu,
        "short_bytes": report.short_bytes,
        "kind": ESTIMATE,
        "versions": versions,
    }
