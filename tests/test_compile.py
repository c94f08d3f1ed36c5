"""Compiling for TPUs and GPUs that are not there: their names, reading HLO, the count by hand, and the command."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from conftest import small_config
from jax.experimental import topologies
from programs import REPOSITORY, TESTS, finish, start, tiedjax

from tiedjax import cli, sharding, step
from tiedjax.config import DataConfig, MeshConfig
from tiedjax.config_files import flatten, load_run_config
from tiedjax.cost import compile as compiling
from tiedjax.cost import gpus, hlo, kernels, roofline, topology, tpus
from tiedjax.cost import report as reports
from tiedjax.cost.gpus import CARDS, Hosts
from tiedjax.cost.kernels import Kernel
from tiedjax.cost.roofline import Work
from tiedjax.cost.tpus import Slices
from tiedjax.errors import UserError
from tiedjax.host import platform_flags

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
needs_cuda = pytest.mark.skipif(not platform_flags.has_cuda_plugin(), reason="JAX for CUDA is not installed")

# ---- Names ----

EXAMPLES = "such as v5p:4x4x4, 2*v5p:4x4x4, h100:8 or h100:2x8"


@pytest.mark.parametrize(
    ("name", "chips", "wrap"),
    [
        ("v5e:1x1", 1, (False, False, False)),
        ("v5e:8x16", 128, (False, True, False)),
        ("v6e:16x16", 256, (True, True, False)),
        ("v5p:2x2x1", 4, (False, False, False)),
        ("v5p:2x4x4", 32, (False, False, False)),
        ("v5p:4x4x8", 128, (True, True, True)),
        ("2*v5p:4x4x4", 128, (True, True, True)),
        ("v5p:16x16x24", 6144, (True, True, True)),
    ],
)
def test_slices_are_known_by_name(name: str, chips: int, wrap: tuple[bool, ...]) -> None:
    found = topology.parse(name)
    assert isinstance(found, Slices)
    assert (found.name, found.chips, found.wrap) == (name, chips, wrap)


@pytest.mark.parametrize(
    ("name", "slices", "shape", "chips"),
    [
        ("h100:8", 1, (1, 8), 8),
        ("h100:4x8", 1, (4, 8), 32),
        ("h200:1", 1, (1, 1), 1),
        ("2*h100:8", 2, (1, 8), 16),
        ("3*h200:2x4", 3, (2, 4), 24),
    ],
)
def test_hosts_are_known_by_name(name: str, slices: int, shape: tuple[int, ...], chips: int) -> None:
    found = topology.parse(name)
    assert isinstance(found, Hosts)
    assert (found.name, found.slices, found.shape, found.chips) == (name, slices, shape, chips)


def test_of_a_card_a_program_may_use_what_jax_takes_of_it() -> None:
    """0.92 of 79.10 GiB; XLA, which plans for 0.8 of a card that it is told of, is told of that much more."""
    hosts = topology.parse("h100:8")
    assert (hosts.memory_bytes, hosts.usable_bytes) == (84_929_347_584, int(84_929_347_584 * 0.92))
    told = re.search(r"device_memory_size: (\d+)", CARDS["h100"].target)
    assert told
    assert abs(int(told[1]) * 0.8 - hosts.usable_bytes) <= 1


def test_a_card_is_one_whose_flop_rate_is_known() -> None:
    assert {name: card.bfloat16_flops for name, card in CARDS.items()} == {"h100": 989.4e12, "h200": 989.4e12}
    assert CARDS["h100"].exponentials_per_second == 16 * 132 * 1.98e9


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p", f"must be KIND:SHAPE or SLICES*KIND:SHAPE {EXAMPLES}, got 'v5p'"),
        ("v5p:", f"must be KIND:SHAPE or SLICES*KIND:SHAPE {EXAMPLES}, got 'v5p:'"),
        ("v5p:4x4x", f"must be KIND:SHAPE or SLICES*KIND:SHAPE {EXAMPLES}, got 'v5p:4x4x'"),
        ("v5p:4,4,4", f"must be KIND:SHAPE or SLICES*KIND:SHAPE {EXAMPLES}, got 'v5p:4,4,4'"),
        ("0*v5p:4x4x4", f"must be KIND:SHAPE or SLICES*KIND:SHAPE {EXAMPLES}, got '0*v5p:4x4x4'"),
        ("-1*h100:8", f"must be KIND:SHAPE or SLICES*KIND:SHAPE {EXAMPLES}, got '-1*h100:8'"),
        ("a100:8", "the kind must be one of v5e, v5p, v6e, h100, h200, got 'a100'"),
        ("h100:2x2x2", "a shape of h100 is GPUS or HOSTSxGPUS, such as 8 or 2x8, got '2x2x2'"),
        ("h200:0", "a shape of h200 is GPUS or HOSTSxGPUS, such as 8 or 2x8, got '0'"),
        ("h100:16", "a host of h100 has at most 8 GPUs, got 16"),
        ("v5p:4x4", "a shape of v5p has 3 sides, got '4x4'"),
        ("v6e:4x4x4", "a shape of v6e has 2 sides, got '4x4x4'"),
        ("v5e:3x3", "v5e has no slice '3x3'; near it are 2x2, 2x4, 4x4"),
        ("v5e:8x4", "v5e has no slice '8x4'; its sides go upwards: 4x8"),
        ("v5p:16x24x24", "v5p has no slice '16x24x24'; near it are 12x20x24, 16x16x20, 16x16x24"),
    ],
)
def test_a_slice_that_there_is_not_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        topology.parse(name)
    assert str(caught.value) == f"--topology: {message}"


def test_without_libtpu_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        topology.parse("v5e:2x2").devices()
    assert str(caught.value) == 'compiling for TPUs needs libtpu, which is not installed: pip install ".[tpu]"'


def test_what_libtpu_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise RuntimeError("INVALID_ARGUMENT: no such topology\nand a long explanation")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(topologies, "get_topology_desc", refuses)
    with pytest.raises(UserError) as caught:
        topology.parse("v5e:2x4").devices()
    assert str(caught.value) == "--topology v5e:2x4: libtpu refuses: INVALID_ARGUMENT: no such topology"


def test_what_libtpu_is_told_does_not_stay_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "mine")
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    before = dict(os.environ)
    with tpus.libtpu_environment():
        assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"
        assert os.environ["TPU_WORKER_HOSTNAMES"] == "localhost"
    assert dict(os.environ) == before


def test_without_jax_for_cuda_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        topology.parse("h100:8").devices()
    assert str(caught.value) == 'compiling for GPUs needs JAX for CUDA, which is not installed: pip install ".[cuda]"'


def test_hosts_that_jax_cannot_describe_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def refuses(*_: Any, **options: Any) -> None:
        given.update(options)
        raise NotImplementedError("topology not implemented for cuda\nand more")

    monkeypatch.setattr(gpus.platform_flags, "has_cuda_plugin", lambda: True)
    monkeypatch.setattr(topologies, "get_topology_desc", refuses)
    with pytest.raises(UserError) as caught:
        topology.parse("2*h100:3x8").devices()
    assert str(caught.value) == (
        f"--topology 2*h100:3x8: JAX {jax.__version__} refuses: topology not implemented for cuda"
    )
    assert given["topology"] == "2x3x8"


# ---- Reading HLO ----


@pytest.fixture(scope="module")
def programs() -> dict[str, Any]:
    """What `hlo` finds in each program of hlo_program.py."""
    out, _ = finish(start([TESTS / "hlo_program.py"], devices=8))
    return json.loads(out.splitlines()[-1])


# Each device holds 64 bytes, or 512 where it gives a part to every other.
@pytest.mark.parametrize(
    ("program", "kinds"),
    [
        ("none", {}),
        ("psum", {"all-reduce": (1, 2 * 64)}),
        ("all_gather", {"all-gather": (1, 512)}),
        ("psum_scatter", {"reduce-scatter": (1, 512)}),
        ("all_to_all", {"all-to-all": (1, 512)}),
        ("ppermute", {"collective-permute": (1, 64)}),
        ("scan", {"all-reduce": (3 * 5, 3 * 5 * 2 * 64)}),
        ("while", {"all-reduce": (1, 2 * 64)}),
    ],
)
def test_collectives_of_known_programs(
    programs: dict[str, Any], program: str, kinds: dict[str, tuple[int, int]]
) -> None:
    found = programs[program]["kinds"]
    assert {kind: (each["count"], each["bytes"]) for kind, each in found.items()} == kinds
    assert bool(programs[program]["unknown_loops"]) == (program == "while")


TPU_PROGRAM = """HloModule jit_train, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter (input: bf16[64,128]) -> bf16[16,128] {
  %input = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %whole = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %own = bf16[16,128]{1,0:T(8,128)(2,1)} dynamic-slice(%whole, %zero, %zero), dynamic_slice_sizes={16,128}
}

%gathered (part: f32[2,4]) -> f32[8,4] {
  %part = f32[2,4]{1,0} parameter(0)
  ROOT %all = f32[8,4]{1,0} all-gather(%part), channel_id=2, dimensions={0}
}

%body (carry: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %carry = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %one = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} add(%i, %one)
  %mine = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
  %start = (bf16[16,128]{1,0}, bf16[64,128]{1,0}, u32[]{:S(2)}) all-gather-start(%mine), channel_id=3, dimensions={0}
  %done = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather-done(%start)
  ROOT %result = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%next, %done)
}

%condition (state: (s32[], bf16[64,128])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%state), index=0
  %limit = s32[]{:T(128)} constant(LIMIT)
  ROOT %more = pred[]{:T(512)} compare(%count, %limit), direction=LT
}

ENTRY %main (p: f32[2,4], q: bf16[64,128], r: f32[3]) -> f32[8,4] {
  %p = f32[2,4]{1,0} parameter(0)
  %q = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %r = f32[3]{0} parameter(2)
  %from = s32[]{:T(128)} constant(START)
  %copied = s32[]{:T(128)} copy(%from)
  %begin = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%copied, /*index=1*/%q)
  %loop = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) while(%begin), condition=%condition, body=%body
  %both = (f32[3]{0}, f32[2,4]{1,0}) all-reduce(%r, %p), channel_id=4, to_apply=%add
  %go = ((f32[2,4]{1,0}), f32[8,4]{1,0}, u32[]) async-start(%p), calls=%gathered
  %wait = ((f32[2,4]{1,0}), f32[8,4]{1,0}, u32[]) async-update(%go), calls=%gathered
  ROOT %end = f32[8,4]{1,0} async-done(%wait), calls=%gathered
}
"""


@pytest.mark.parametrize(
    ("begin", "limit", "by", "rounds"), [(0, 7, 1, 7), (1, 7, 1, 6), (0, 7, 2, 4), (9, 7, 1, 0), (0, 7, 0, None)]
)
def test_the_forms_that_tpu_programs_have(begin: int, limit: int, by: int, rounds: int | None) -> None:
    """Reduce-scatters as fusions, asynchronous pairs and wrappers, tuples, and loops known by their counter alone."""
    text = TPU_PROGRAM.replace("START", str(begin)).replace("LIMIT", str(limit)).replace("STEP", str(by))
    found = hlo.collectives(text)
    times, array = 1 if rounds is None else rounds, 64 * 128 * 2
    assert {kind: (each.count, each.bytes) for kind, each in found.kinds.items()} == {
        "reduce-scatter": (times, times * array),
        "all-gather": (times + 1, times * array + 8 * 4 * 4),
        "all-reduce": (1, 2 * (3 * 4 + 2 * 4 * 4)),
    }
    assert found.unknown_loops == (["loop"] if rounds is None else [])


GPU_PROGRAM = (TESTS / "gpu_program.hlo").read_text(encoding="utf-8")


def test_the_kernels_of_a_gpu_program() -> None:
    """Products by XLA, cuBLAS and our own kernel, attention, what is cut out of stacks and updated in place, loops."""
    found = {kernel.name: kernel for kernel in kernels.kernels(GPU_PROGRAM)}
    product = {"flops": 2 * 64 * 32 * 16, "operands": ("bf16", "bf16")}
    operands, result = 2 * (64 * 32 + 32 * 16), 4 * 64 * 16
    scores, head = 2 * 3 * 10 * 10, 2 * 10 * 3 * 8 * 2
    powers = 2 * (64 * 32 + 50 * 32 + 64 * 50) + 4 * 2 * 64
    expected = [
        Kernel("gemm", "products of the body", 1, operands + result, **product),
        Kernel("cublas", "products of the loss", 1, operands + result + 4, **product),
        Kernel("new", "optimizer and roles", 1, 400 + 400 + 4),  # the row written, the row read, its place
        Kernel("added", "lookup", 1, 2 * 4 * 12 + 4 * 12 + 4 * 3),
        Kernel("exp", "products of the loss", 1, powers, 2 * 64 * 50 * 32, ("bf16", "bf16")),
        Kernel("exp.1", "elementwise of the loss", 1, 0),  # where nothing is to be mended
        Kernel("attention", "attention", 1, 4 * head + 4 * 60, 2 * 2 * scores // 2 * 8, ("bf16", "bf16"), scores // 2),
        Kernel("gradients", "attention", 1, 5 * head, 2 * 5 * scores * 8, ("bf16", "bf16"), scores),
        Kernel("row.1", "layer stacking", 8, 400 + 400 + 4),
        Kernel("off", "other", 1, 2 * 3200),
        Kernel("end", "norms", 1, 3 * result),
    ]
    assert found == {kernel.name: kernel for kernel in expected}


def test_a_kernel_takes_as_long_as_its_slowest_resource() -> None:
    card = dataclasses.replace(CARDS["h100"], bytes_per_second=1e12, float32_flops=1e12)
    of = lambda *work: roofline.work_of(Kernel("k", "p", 3, *work), card)
    gap = roofline.LAUNCH_SECONDS
    assert of(10**9, 10, ("bf16", "bf16")) == Work(3, 3 * 10**9, 30, 3 * (1e-3 + gap))
    assert of(10, 989_400_000, ("bf16", "bf16")).seconds == pytest.approx(3 * (1e-6 + gap))
    assert of(10, 10**9, ("f32", "f32")).seconds == pytest.approx(3 * (1e-3 + gap))
    assert of(10, 10, ("bf16", "bf16"), 16 * 132 * 1980).seconds == pytest.approx(3 * (1e-6 + gap))
    parts = roofline.by_part([Kernel("a", "few", 1, 1), Kernel("b", "many", 9, 1), Kernel("c", "few", 2, 1)], card)
    assert {part: (work.launches, work.bytes) for part, work in parts.items()} == {"many": (9, 9), "few": (3, 3)}
    assert list(parts) == ["many", "few"]


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add", [[0, 1], [2, 3]]),
        ("replica_groups=[2,4]<=[8], dimensions={0}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=1] {'data'}, use_global_device_ids=true", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=1] {'data','fsdp'}, x=1", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=1] {'fsdp'}, x=1", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,4},{4,0}}", [[0, 4], [4, 0]]),
        ("replica_groups={}, to_apply=%add", []),
    ],
)
def test_groups_of_devices(attributes: str, groups: list[list[int]]) -> None:
    assert hlo.device_groups(attributes) == groups


def test_what_crosses_slices_and_what_runs_beside_computing() -> None:
    """In XLA's own collectives on GPUs, and in what a TPU's host sends to the other slices."""
    lines = """HloModule m

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %within = f32[8,4]{1,0} all-reduce(%p), replica_groups=[2,2]<=[4], to_apply=%add
  %across = f32[8,4]{1,0} all-reduce-start(%p), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  %done = f32[8,4]{1,0} all-reduce-done(%across)
  %sync = f32[8,4]{1,0} all-reduce-start(%p), replica_groups={{0,1},{2,3}}, backend_config={"is_sync":true}
  %sync.1 = f32[8,4]{1,0} all-reduce-done(%sync)
  %t = token[] after-all()
  %send = (f32[8,4]{1,0}, u32[], token[]) send(%p, %t), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send)
  ROOT %end = f32[8,4]{1,0} add(%done, %sync.1)
}
"""
    one = 2 * 4 * 8 * 4
    assert hlo.collectives(lines, slice_size=2).kinds == {"all-reduce": hlo.Traffic(4, 4 * one, 2 * one, 2 * one)}
    assert hlo.collectives(lines).kinds == {"all-reduce": hlo.Traffic(4, 4 * one, 2 * one, one)}


def test_sizes_of_shapes() -> None:
    sizes = {"f32[]{:T(128)}": 4, "bf16[8,128]{1,0:T(8,128)(2,1)S(1)}": 2048, "pred[3]": 3, "s4[3]{0}": 2}
    sizes |= {"(f8e4m3fn[2,2]{1,0}, /*index=1*/c64[2]{0})": 20, "token[]": 0, "f32[0,5]": 0}
    assert {shape: hlo.array_bytes(shape) for shape in sizes} == sizes


def test_text_without_a_program_raises() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.collectives("HloModule empty")


# ---- What is made of it ----


def report(**changes: Any) -> reports.Report:
    """A report of a step that fits in half of the memory."""
    values: dict[str, Any] = {
        "topology": "v5e:2x2",
        "noun": "chip",
        "slices": 1,
        "devices": 4,
        "mesh": {"data": 2, "fsdp": 2, "tensor": 1},
        "argument_bytes": 2**30,
        "temp_bytes": 2**30,
        "output_bytes": 2**30,
        "needed_bytes": 2**31,
        "hbm_bytes": 2**32,
        "usable_bytes": 2**32,
        "fits": True,
        "collectives": {"all-gather": hlo.Traffic(3, 10**9, 4 * 10**8, 3 * 10**8)},
        "fsdp_bytes": {"all-gather": 2 * 10**9, "all-to-all": 0},
        "unknown_loops": [],
        "trace_seconds": 1.0,
        "compile_seconds": 2.0,
    }
    return reports.Report(**values | changes)


def test_a_step_that_fits_says_what_is_left() -> None:
    gib = {"argument_bytes": 2**29, "temp_bytes": 2**30, "needed_bytes": 7 * 2**28, "unknown_loops": ["a", "b"]}
    assert reports.lines(small_config(), report(**gib)) == [
        "v5e:2x2: 4 chips, mesh data 2 x fsdp 2 x tensor 1; static estimate of XLA's compiler; nothing was run",
        "",
        "memory per chip",
        "  state, batch and constants        0.50 GiB",
        "  temporary                         1.00 GiB",
        "  needed, with the program          1.75 GiB",
        "  available                         4.00 GiB",
        "",
        "collectives per step and chip      count              GB    FSDP by hand",
        "  all-gather                           3           1.000           2.000",
        "  counted once, as their length is unknown: loops a, b",
        "",
        "traced in 1 s, compiled in 2 s",
        "fits, 2.25 GiB to spare",
    ]
    *_, gathers, _, _, _ = reports.lines(small_config(), report(fsdp_bytes=None))
    assert gathers == "  all-gather                           3           1.000               -"
    joined = reports.lines(small_config(), report(slices=2))
    assert joined[8:10] == [
        "collectives per step and chip      count              GB  between slices    FSDP by hand",
        "  all-gather                           3           1.000           0.300           2.000",
    ]
    assert "collectives  none" in reports.lines(small_config(), report(collectives={}))


def test_a_step_on_gpus_says_what_it_launches_and_a_bound() -> None:
    parts = {"products of the body": Work(7, 2 * 10**9, 3 * 10**12, 4e-3), "norms": Work(8, 5 * 10**8, 0, 6e-4)}
    work = reports.GpuWork(
        parts=parts,
        operands={"bf16 x bf16": 2 * 10**12, "f32 x f32": 10**12},
        attention_calls=32,
        mfu_causal_bound=0.361,
    )
    changes = {"topology": "h100:4", "noun": "GPU", "gpu": work, "hbm_bytes": 2**33, "collectives": {}}
    assert reports.lines(small_config(), report(**changes)) == [
        "h100:4: 4 GPUs, mesh data 2 x fsdp 2 x tensor 1; static estimate of XLA's compiler; nothing was run",
        "",
        "memory per GPU",
        "  state, batch and constants        1.00 GiB",
        "  temporary                         1.00 GiB",
        "  needed, with the program          2.00 GiB",
        "  available                         4.00 GiB, of the card's 8.00 GiB",
        "",
        "collectives  none",
        "",
        "kernels per step and GPU           launches       GB    TFLOP  bound, ms",
        "  products of the body                    7     2.00     3.00       4.00",
        "  norms                                   8     0.50     0.00       0.60",
        "  in all                                 15     2.50     3.00       4.60",
        "products: 2.00 TFLOP bf16 x bf16, 1.00 TFLOP f32 x f32; 32 calls of cuDNN's attention",
        "bound: no step in less than 4.6 ms, collectives left out, so MFU is at most 36.1%",
        "",
        "traced in 1 s, compiled in 2 s",
        "fits, 2.00 GiB to spare",
    ]
    assert reports.as_json(report(**changes))["gpu"]["total"] == {
        "launches": 15,
        "bytes": 25 * 10**8,
        "flops": 3 * 10**12,
        "seconds": pytest.approx(4.6e-3),
    }
    sending = reports.lines(
        small_config(), report(**changes | {"collectives": {"all-gather": hlo.Traffic(3, 10**9, 10**8)}})
    )
    assert sending[8:10] == [
        "collectives per step and GPU       count              GB    asynchronous    FSDP by hand",
        "  all-gather                           3           1.000           0.100           2.000",
    ]
    one = report(**changes | {"devices": 1})
    assert reports.lines(small_config(), one)[0].startswith("h100:4: 1 GPU, mesh")


def test_a_step_that_fits_because_it_computes_twice_says_so() -> None:
    twice = report(noun="GPU", recomputes=True)
    cfg = small_config(data=DataConfig(batch_size=16, microbatches=2))
    assert reports.lines(cfg, twice)[-1] == (
        "fits, 2.00 GiB to spare, but XLA computes some of it twice; to avoid that try --data.microbatches 4 (half as "
        "many sequences at a time) or --model.remat dots or more GPUs"
    )
    assert reports.advice(small_config(remat="dots"), twice)[1:] == ["--model.remat full", "more GPUs"]


def test_a_step_that_does_not_fit_says_by_how_much_and_what_to_try() -> None:
    cfg = small_config(data=DataConfig(batch_size=16, microbatches=2))
    short = report(fits=False, needed_bytes=2**32 + 3 * 2**29, argument_bytes=2**32)
    assert reports.lines(cfg, short)[-1] == (
        "does not fit, short by 1.50 GiB; try --mesh.fsdp 4 (cuts the state further) or --data.microbatches 4 (half as "
        "many sequences at a time) or --model.remat full or --optimizer.moments_dtype bfloat16 or a larger slice"
    )
    unknown = report(fits=False, needed_bytes=None, temp_bytes=None, collectives=None)
    assert reports.lines(cfg, unknown)[4:] == [
        "  temporary                          unknown",
        "  needed, with the program           unknown",
        "  available                         4.00 GiB",
        "",
        "collectives  unknown",
        "",
        "traced in 1 s, compiled in 2 s",
        "does not fit; try --data.microbatches 4 (half as many sequences at a time) or --model.remat full or a larger "
        "slice",
    ]


def test_what_to_try_goes_by_what_needs_the_memory() -> None:
    one_row = small_config(remat="full", data=DataConfig(batch_size=8, microbatches=2))
    assert reports.advice(one_row, report()) == [
        "--mesh.tensor 2 (cuts activations too)",
        "a larger slice",
    ]
    two_rows = small_config(data=DataConfig(batch_size=8, microbatches=1))
    assert reports.advice(two_rows, report()) == [
        "--data.microbatches 2 (half as many sequences at a time)",
        "--model.remat full",
        "a larger slice",
    ]
    whole_slice = report(mesh={"data": 1, "fsdp": 4, "tensor": 1}, argument_bytes=2**32)
    assert reports.advice(one_row, whole_slice) == [
        "--optimizer.moments_dtype bfloat16",
        "--mesh.tensor 2 (cuts activations too)",
        "a larger slice",
    ]


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 34.50G of 15.75G hbm. Exceeded", 34.5),
        ("the total memory required for HLO temporaries (80.00G) exceeds available HBM (15.75G).", 80.0),
        ("RESOURCE_EXHAUSTED: no numbers", None),
    ],
)
def test_the_memory_that_xla_wanted(message: str, gib: float | None) -> None:
    assert compiling.needed_bytes(message) == (None if gib is None else gib * 2**30)


def test_the_count_by_hand() -> None:
    """Layers of 4 D^2 + 3 D F each, the scales of their norms left out, and a tied table of V D; in float32."""
    cfg = small_config(layers=3, norm="rmsnorm", dtype="float32", data=DataConfig(batch_size=16, microbatches=2))
    D, F, V, T = 16, 24, 32, 8
    body, table, tokens = 3 * (4 * D * D + 3 * D * F), V * D, 16 * T // 8
    steps = step.make_steps(cfg, sharding.make_mesh(cfg.mesh, jax.devices()[:1]))
    shaped = lambda *shape: jax.sharding.AbstractMesh(shape, sharding.MESH_AXES)
    of = lambda *shape: compiling.fsdp_traffic(cfg, steps, shaped(*shape))
    gathers = {"all-gather": 2 * 4 * (body + table), "reduce-scatter": 2 * 4 * (body + table)}
    exchanged = {"all-to-all": 2 * 4 * tokens * D}
    reduced = 2 * 2 * 4 * (body + 2 * table)
    assert of(1, 8, 1) == gathers | exchanged | {"all-reduce": 0}
    assert of(2, 4, 1) == gathers | exchanged | {"all-reduce": reduced // 4}
    assert of(8, 1, 1) == {"all-gather": 0, "reduce-scatter": 0, "all-to-all": 0, "all-reduce": reduced}
    assert of(1, 4, 2) is None
    for again in ({"scan_layers": True}, {"remat": "dots"}):  # what was gathered is not kept for the backward pass
        model = dataclasses.replace(cfg.model, **again)
        found = compiling.fsdp_traffic(dataclasses.replace(cfg, model=model), steps, shaped(1, 8, 1))
        assert found == gathers | exchanged | {"all-gather": 2 * 4 * (2 * body + table), "all-reduce": 0}


@pytest.mark.parametrize("slices", [2, 4])
def test_slices_lie_along_data(slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 chips, TPUs by their links (which decides nothing here) or GPUs in order: fsdp never leaves a slice."""
    chips = [
        SimpleNamespace(id=i, slice_index=i // (8 // slices), process_index=0, platform="tpu", device_kind="TPU v5p")
        for i in range(8)
    ]
    asked: dict[str, Any] = {}

    def hybrid(within: tuple[int, ...], across: tuple[int, ...], devices: list[Any], **_: Any) -> np.ndarray:
        asked.update(within=within, across=across)
        return np.array(devices).reshape(np.multiply(within, across))

    monkeypatch.setattr(sharding, "create_hybrid_device_mesh", hybrid)
    monkeypatch.setattr(sharding, "Mesh", lambda devices, names: devices)
    sharding.make_mesh(MeshConfig(fsdp=2), chips)  # type: ignore[arg-type]
    assert asked == {"within": (4 // slices, 2, 1), "across": (slices, 1, 1)}
    gpus_ = [
        SimpleNamespace(id=i, process_index=0, platform="gpu", device_kind="NVIDIA H100 80GB HBM3") for i in range(8)
    ]
    placed: Any = sharding.make_mesh(MeshConfig(fsdp=2), gpus_, slices)  # type: ignore[arg-type]
    assert [[device.id for device in row[:, 0]] for row in placed] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    for devices, told in ((chips, None), (gpus_, slices)):
        with pytest.raises(UserError) as caught:
            sharding.make_mesh(MeshConfig(fsdp=8), devices, told)  # type: ignore[arg-type]
        assert str(caught.value) == (
            f"mesh: data -1 x fsdp 8 x tensor 1 makes data 1, which the {slices} slices do not divide: they are joined "
            "along data"
        )


def test_what_xla_warns_of_memory_is_read_and_the_rest_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    with compiling._standard_error() as warnings:
        os.write(2, b"E0000 Can't reduce memory use below 70.00GiB by rematerialization\nanother line\n")
    assert "rematerialization" in warnings.getvalue()
    assert capfd.readouterr().err == "another line\n"


# ---- The command, with libtpu ----

TINY = ["compile", str(REPOSITORY / "configs" / "tiny.yaml"), "--model.scan_layers", "true", "--data.batch_size", "16"]


@needs_libtpu
def test_the_command_reports_what_a_slice_would_hold(tmp_path: Path) -> None:
    """Two at a time: libtpu's lock is for those who take a chip."""
    saved = tmp_path / "report.json"
    other = start(["-m", "tiedjax", *TINY, "--topology", "v6e:2x2", "--mesh.tensor", "2"])
    out, err = tiedjax(*TINY, "--topology", "v5p:2x2x1", "--mesh.fsdp", "4", "--json", saved)
    assert err == ""
    assert "static estimate" in out
    assert "fits" in out.splitlines()[-1]
    found = json.loads(saved.read_text())
    assert (found["topology"], found["devices"], found["fits"]) == ("v5p:2x2x1", 4, True)
    assert found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    state = 3 * 4 * 163_000 / 4  # parameters and two moments of a model of 0.16 M, in float32, on each of 4 chips
    assert state < found["argument_bytes"] < 2 * state
    assert 0 < found["temp_bytes"] < found["needed_bytes"] < found["hbm_bytes"]
    assert found["output_bytes"] > 0
    assert found["compile_seconds"] > 0
    assert found["unknown_loops"] == []
    assert "static estimate" in found["kind"]
    assert found["collectives"]["all-gather"]["count"] > 0
    finish(other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "the following arguments are required: --topology; usage: tiedjax compile CONFIG --topology KIND:SHAPE "
            "[options] (see tiedjax compile --help)",
        ),
        (["--topology", "v5p:2x2"], "--topology: a shape of v5p has 3 sides, got '2x2'"),
        (
            ["--topology", "v5p:2x2x1", "--json", "no/such/folder/x.json"],
            "--json: must be a file in a folder that exists, got no/such/folder/x.json",
        ),
        (
            ["--topology", "v5p:2x2x1", "--mesh.tensor", "3"],
            "overrides: mesh.tensor: 3 does not divide model.heads = 2",
        ),
    ],
)
def test_what_is_refused_before_libtpu_is_loaded(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*TINY, *arguments]) == 2
    assert capsys.readouterr().err == f"tiedjax: {message}\n"


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (
            ["--mesh.fsdp", "8"],
            "mesh: data -1 x fsdp 8 x tensor 1 does not fit 4 devices; the product must be their number",
        ),
        (
            ["--mesh.data", "2"],
            "mesh: data 2 x fsdp 1 x tensor 1 = 2 is not the 4 chips of v5p:2x2x1; mesh.data -1 takes what fsdp and "
            "tensor leave",
        ),
    ],
)
def test_a_mesh_must_be_all_of_the_slice(
    mesh: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Slices, "devices", lambda slice_: jax.devices()[:1] * slice_.chips)
    assert cli.main([*TINY, "--topology", "v5p:2x2x1", *mesh]) == 2
    assert capsys.readouterr() == ("", f"tiedjax: {message}\n")


@pytest.mark.parametrize(
    ("needed", "status", "last_line"),
    [
        (2**32, 0, "fits, 0.00 GiB to spare"),
        (
            5 * 2**30,
            1,
            "does not fit, short by 1.00 GiB; try --data.microbatches 2 (half as many sequences at a time) or "
            "--model.remat full or a larger slice",
        ),
    ],
)
def test_the_exit_status_says_whether_a_step_fits(
    needed: int, status: int, last_line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step_report = report(needed_bytes=needed, fits=status == 0)
    monkeypatch.setattr(compiling, "compile_step", lambda cfg, topology: step_report)
    assert cli.main([*TINY, "--topology", "v5e:2x2"]) == status
    assert capsys.readouterr().out.splitlines()[-1] == last_line


@needs_libtpu
def test_too_large_a_step_does_not_fit(tmp_path: Path) -> None:
    """The state alone, 3 x 4 bytes x 2 x 10^9 numbers, is above the memory of a v5e."""
    saved = tmp_path / "report.json"
    huge = [
        "--model.d_model",
        "4096",
        "--model.vocab_size",
        "262144",
        "--model.d_ff",
        "16384",
        "--model.seq_len",
        "128",
    ]
    out, _ = tiedjax(*TINY, *huge, "--topology", "v5e:2x2", "--json", saved, status=1)
    assert re.match(r"does not fit, short by \d+\.\d\d GiB; try ", out.splitlines()[-1])
    found = json.loads(saved.read_text())
    assert found["fits"] is False
    assert found["short_bytes"] > 0
    assert found["argument_bytes"] > 12 * 2**30


@needs_cuda
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["olmo_60m", "olmo_300m", "olmo_1b"])
def test_the_step_on_an_h100_keeps_what_it_has_reached(name: str) -> None:
    """Two calls of cuDNN a layer, no product of float32, memory, and at most 2 % more bytes than were saved."""
    saved = json.loads((REPOSITORY / "benchmarks" / "results" / "compile_gpu.json").read_text(encoding="utf-8"))[name]
    changes = {key: str(value) for key, value in flatten(saved["config"]) if value is not None}
    cfg = load_run_config(REPOSITORY / "configs" / f"{name}.yaml", changes)
    found = compiling.compile_step(cfg, topology.parse("h100:1"))
    assert found.fits
    assert not found.recomputes
    assert found.gpu is not None
    assert found.gpu.attention_calls == 2 * cfg.model.layers
    assert list(found.gpu.operands) == ["bf16 x bf16"]
    assert found.gpu.total.bytes <= 1.02 * saved["gpu"]["total"]["bytes"]
    assert found.gpu.mfu_causal_bound >= 0.98 * saved["gpu"]["mfu_causal_bound"]


@needs_cuda
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_traffic_of_olmo_1b_on_gpus_is_that_counted_by_hand() -> None:
    """On 8, and on two slices of 8, between which the gradients' reduction alone is sent."""
    for name, batch in (("h100:8", 64), ("2*h100:8", 128)):
        changes = {"mesh.fsdp": "8", "data.batch_size": str(batch)}
        cfg = load_run_config(REPOSITORY / "configs" / "olmo_1b.yaml", changes)
        found = compiling.compile_step(cfg, topology.parse(name))
        assert found.fits
        assert found.collectives is not None
        assert found.fsdp_bytes is not None
        sent, due = sum(kind.bytes for kind in found.collectives.values()), sum(found.fsdp_bytes.values())
        assert abs(sent / due - 1) <= 0.1, (name, dataclasses.asdict(found))
        between = {kind: each.between_slices_bytes for kind, each in found.collectives.items()}
        assert {kind for kind, size in between.items() if size} == ({"all-reduce"} if found.slices > 1 else set())
        beside = sum(kind.asynchronous_bytes for kind in found.collectives.values())
        assert beside >= 0.9 * sent


@needs_libtpu
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_and_traffic_of_olmo_1b_do_not_grow_with_the_slice() -> None:
    """Equal tokens per chip: temporary memory at most 10 % above 4 chips', bytes within 10 % of the count by hand."""
    temporary = {}
    for name, fsdp in [("v5p:2x2x1", 4), ("v5p:4x4x4", 16), ("v5p:8x8x8", 64)]:
        found = topology.parse(name)
        changes = {"mesh.fsdp": str(fsdp), "data.batch_size": str(4 * found.chips)}
        cfg = load_run_config(REPOSITORY / "configs" / "olmo_1b.yaml", changes)
        each = compiling.compile_step(cfg, found)
        assert each.fits
        assert each.unknown_loops == []
        assert each.collectives is not None
        assert each.fsdp_bytes is not None
        sent, due = sum(kind.bytes for kind in each.collectives.values()), sum(each.fsdp_bytes.values())
        assert abs(sent / due - 1) <= 0.1, (name, dataclasses.asdict(each))
        temporary[name] = each.temp_bytes
    first, *others = temporary.values()
    assert all(each <= 1.1 * first for each in others), temporary
