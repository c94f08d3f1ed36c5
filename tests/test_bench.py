"""What `tiedjax bench` counts and reports, what the role split may cost, and the programs in benchmarks/ that ask."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow_but, small_config
from jax.extend.core import ClosedJaxpr, Jaxpr
from programs import REPOSITORY, environment, finish, start, tiedjax

from tiedjax import cli, gradients, lm, sharding, step, tying
from tiedjax.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig
from tiedjax.config_files import load_run_config
from tiedjax.cost import bench
from tiedjax.errors import UserError
from tiedjax.flops import PEAK_BF16_FLOPS, flops_per_token, matmul_parameters
from tiedjax.optimizer import rules

TINY = REPOSITORY / "configs" / "tiny.yaml"


def benchmark(name: str) -> ModuleType:
    """A program in benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", REPOSITORY / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def step_benchmark() -> ModuleType:
    """benchmarks/step.py as a module."""
    return benchmark("step")


@pytest.fixture
def gpu_benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/gpu.py as a module; it imports its neighbours."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return benchmark("gpu")


# ---- What is counted ----


def matrix_flops(jaxpr: Any) -> int:
    """Floating-point operations of every matrix product that a program runs, a loop's as often as it runs them."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(matrix_flops(inner) for inner in inner_programs(equation))
    return total


def inner_programs(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each


SHAPES: dict[str, dict[str, Any]] = {
    "olmo": {},
    "llama": {"heads": 4, "kv_heads": 2, "norm": "rmsnorm", "qk_norm": "head"},
    "gelu": {"mlp": "gelu", "position": "none"},
    "gates in gelu, windows": {"mlp": "geglu", "norm_place": "both", "window": 3, "window_layers": "window,full"},
    "padded": {"vocab_size": 30, "vocab_multiple": 16},
    "scanned": {"scan_layers": True},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parts", [1, 2])
def test_flops_are_those_of_the_matrix_products_of_forward_and_backward(shape: str, parts: int) -> None:
    """Where attention computes every score, as on a CPU; the split by role must not add any."""
    cfg = small_config("untied", **SHAPES[shape], data=DataConfig(batch_size=8, microbatches=parts))
    params = nn.unbox(jax.eval_shape(lambda key: lm.init_params(cfg, key), jax.random.key(0)))
    tokens_BS = np.zeros((cfg.data.batch_size, cfg.model.seq_len + 1), np.int32)
    program = jax.make_jaxpr(gradients.loss_and_gradients(cfg))(params, tokens_BS, tying.role_scale(cfg.tying))
    tokens = cfg.data.batch_size * cfg.model.seq_len
    assert matrix_flops(program.jaxpr) == tokens * flops_per_token(cfg.model, causal=False)


def test_the_causal_count_is_that_of_the_design() -> None:
    """6 per matmul parameter + 6 L T D, with every parameter of OLMo-1B a matmul parameter; full attention 12 L T D."""
    cfg = load_run_config(REPOSITORY / "configs" / "olmo_1b.yaml")
    params = jax.eval_shape(lambda key: lm.init_params(cfg, key), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert matmul_parameters(cfg.model) == count
    assert flops_per_token(cfg.model, causal=True) == 6 * count + 6 * 16 * 2048 * 2048
    assert flops_per_token(cfg.model, causal=False) == 6 * count + 12 * 16 * 2048 * 2048


def test_windows_take_from_the_causal_count_what_they_do_not_see() -> None:
    """By the pairs of positions: T^2 / 2 of them in a full layer, and W T - W^2 / 2 in one with a window W."""
    shape = {"layers": 3, "seq_len": 16, "d_model": 8, "heads": 2}
    pairs = lambda **window: flops_per_token(ModelConfig(**shape, **window), causal=True) * 16 / (12 * 8)
    assert pairs() - pairs(window=6, window_layers="window,full") == 2 * (16**2 / 2 - (6 * 16 - 6**2 / 2))
    assert pairs(window=16) == pairs(window=99) == pairs()
    full = flops_per_token(ModelConfig(**shape), causal=False)
    assert flops_per_token(ModelConfig(**shape, window=6), causal=False) == full


def test_utilisation_is_of_one_device_or_says_why_it_is_unknown() -> None:
    cfg = RunConfig(model=ModelConfig(layers=1, d_model=2, heads=1, d_ff=3, seq_len=4, vocab_size=5))
    assert matmul_parameters(cfg.model) == 4 * 2 * 2 + 3 * 2 * 3 + 5 * 2
    found = bench.utilisation(cfg, "NVIDIA H100 80GB HBM3", 1e9)
    assert found["mfu_causal"] == pytest.approx(1e9 * (6 * 44 + 6 * 4 * 2) / 989.4e12)
    assert found["mfu_full"] == pytest.approx(1e9 * (6 * 44 + 12 * 4 * 2) / 989.4e12)
    unknown = bench.utilisation(cfg, "a slice of something", 1e9)
    assert unknown["mfu_causal"] is None
    assert unknown["mfu_full"] is None
    assert "'a slice of something'" in unknown["mfu_unknown"]
    assert all(1e13 < peak < 1e16 for peak in PEAK_BF16_FLOPS.values())


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("NVIDIA H100 80GB HBM3", "MFU                25.0% causal, 50.0% full attention"),
        ("abacus", "MFU                unknown: no dense bfloat16 peak is known for 'abacus'"),
    ],
)
def test_the_table_says_the_utilisation_or_why_it_is_unknown(kind: str, line: str) -> None:
    known = {"mfu_causal": 0.25, "mfu_full": 0.5, "peak_flops": 1e15}
    result = {
        "device": {"platform": "gpu", "kind": kind, "count": 1},
        "compute_dtype": "bfloat16",
        "tokens_per_second": 1234567.0,
        "step_seconds": {"median": 0.5, "p10": 0.25, "p90": 0.75},
        "steps": {"warm_up": 3, "measured": 40, "windows": 10},
        "muon_over_model_flops": 0.0 if kind == "abacus" else 0.0625,
        "peak_memory_bytes": 2_500_000,
        "peak_memory_source": "device",
        "loss": 2.0,
        "first_loss": 3.0,
        "compile_seconds": 4.0,
        **(known if kind in PEAK_BF16_FLOPS else bench.utilisation(small_config(), kind, 1.0)),
    }
    assert bench.table(result).splitlines() == [
        f"devices            1 x {kind}, bfloat16",
        "tokens per second  1,234,567",
        "step               500.00 ms (p10 250.00, p90 750.00 of 10 windows)",
        line,
        *([] if kind == "abacus" else ["Muon               6.2% of the model's FLOPs on top"]),
        "peak memory        2.5 MB a device (by the device)",
        "loss               2.0000 in step 43, 3.0000 in step 1",
        "compilation        4.0 s",
    ]


# ---- How it is measured ----


def test_tokens_follow_zipf_and_the_seed() -> None:
    cfg = small_config(vocab_size=4096, seq_len=64, data=DataConfig(batch_size=64))
    tokens = bench.zipf_tokens(cfg, 4)
    assert tokens.shape == (4, 64, 65)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, bench.zipf_tokens(cfg, 4))
    other = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seed=1))
    assert np.any(tokens != bench.zipf_tokens(other, 4))
    counts_V = np.bincount(tokens.ravel(), minlength=4096)
    assert len(counts_V) == 4096
    expected_V = 1 / (np.arange(4096) + 2.7)
    expected_V *= tokens.size / expected_V.sum()
    np.testing.assert_allclose(counts_V[:20], expected_V[:20], rtol=0.2)
    np.testing.assert_allclose(counts_V[2048:].sum(), expected_V[2048:].sum(), rtol=0.1)


def make_stepper(cfg: RunConfig) -> bench.Stepper:
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    return bench.Stepper(cfg, mesh, step.make_steps(cfg, mesh))


def test_nothing_waits_for_the_devices_within_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = make_stepper(small_config())
    events: list[str] = []
    compiled, wait, read = stepper.compiled, jax.block_until_ready, jax.device_get
    monkeypatch.setattr(stepper, "compiled", lambda *args: (events.append("step"), compiled(*args))[1])
    monkeypatch.setattr(jax, "block_until_ready", lambda x: (events.append("wait"), wait(x))[1])
    monkeypatch.setattr(jax, "device_get", lambda x: (events.append("read"), read(x))[1])
    stepper.run(3)
    assert events == ["wait", "step", "step", "step", "wait"]
    assert len(stepper.losses) == 3
    assert events.count("read") == 3


def test_the_reported_loss_is_that_of_plain_training() -> None:
    """Same data, same seed, same number of steps: the loop's own calls, one by one, end at the very same loss."""
    cfg = small_config()
    result = bench.bench(cfg, 5)
    assert result["steps"] == {"warm_up": bench.WARM_UP, "measured": 5, "windows": 5}
    mesh = sharding.make_mesh(cfg.mesh)
    steps = step.make_steps(cfg, mesh)
    state = steps.init(bench.key_for(jax.random.key(cfg.train.seed), "params"))
    losses = []
    for i in range(bench.WARM_UP + 5):
        tokens_BS = bench.zipf_tokens(cfg, bench.BATCHES)[i % bench.BATCHES]
        state, metrics = steps.train(state, tokens_BS, tying.role_scale(cfg.tying), np.zeros(32, np.int32))
        losses.append(float(metrics["loss"]))
    assert result["loss"] == losses[-1]
    assert result["first_loss"] == losses[0]
    assert result["loss"] < result["first_loss"]


def test_a_loss_that_is_not_finite_is_refused() -> None:
    cfg = small_config(optimizer=OptimizerConfig(learning_rate=1e38, warmup_steps=0, weight_decay=10.0))
    with pytest.raises(UserError, match=r"the loss is (nan|inf) after \d+ steps; try a lower optimizer.learning_rate"):
        bench.bench(cfg, 5)


# ---- The command ----

KEYS = {
    *("tokens_per_second", "step_seconds", "mfu_causal", "mfu_full", "mfu_unknown", "peak_memory_bytes"),
    *("muon_over_model_flops", "peak_memory_source", "loss", "first_loss", "steps", "compile_seconds", "compute_dtype"),
    *("device", "versions", "flags", "config"),
}


def test_the_command_reports_every_key_on_one_device_and_on_two(tmp_path: Path) -> None:
    found = {}
    for devices in (1, 2):
        path = tmp_path / f"{devices}.json"
        out, err = tiedjax("bench", TINY, "--steps", "7", "--json", path, "--data.batch_size", "4", devices=devices)
        assert err == ""
        result = found[devices] = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"bare {name}"))
        assert set(result) == KEYS
        assert result["device"] == {"platform": "cpu", "kind": "cpu", "count": devices}
        seconds = result["step_seconds"]
        assert set(seconds) == {"median", "p10", "p90"}
        assert 0 < seconds["p10"] <= seconds["median"] <= seconds["p90"]
        assert result["tokens_per_second"] == pytest.approx(4 * 64 / seconds["median"])
        assert (result["mfu_causal"], result["mfu_full"]) == (None, None)
        assert "'cpu'" in result["mfu_unknown"]
        assert result["peak_memory_source"] == "compiled program"
        assert result["peak_memory_bytes"] > 3 * 4 * 162_816  # parameters and both moments, float32
        assert {"python", "jax", "flax", "optax", "tiedjax"} <= set(result["versions"])
        assert result["config"]["data"]["batch_size"] == 4
        assert result["steps"]["measured"] == 7
        assert f"{devices} x cpu, float32" in out
        assert f"{result['loss']:.4f}" in out
    assert found[2]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)


CASES = {
    "no steps": (["--steps", "0"], "--steps: must be at least 1, got 0"),
    "steps in words": (
        ["--steps", "many"],
        "argument --steps: invalid int value: 'many'; usage: tiedjax bench CONFIG [options] (see tiedjax bench --help)",
    ),
    "unknown key": (["--data.batchsize", "3"], "unknown option '--data.batchsize'; did you mean '--data.batch_size'?"),
    "mesh": (
        ["--mesh.data", "1", "--mesh.fsdp", "2"],
        "mesh: data 1 x fsdp 2 x tensor 1 does not fit 1 devices; the product must be their number",
    ),
    "no folder": (["--json", "no/such/x.json"], "--json: must be a file in a folder that exists, got no/such/x.json"),
    "a folder": (["--json", "tests"], "--json: must be a file in a folder that exists, got tests"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_option_is_one_line(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    options, says = CASES[case]
    assert cli.main(["bench", str(TINY), *options]) == 2
    assert capfd.readouterr().err == f"tiedjax: {says}\n"


def test_a_missing_config_is_one_line_in_a_process_of_its_own(tmp_path: Path) -> None:
    _, err = tiedjax("bench", tmp_path / "none.yaml", status=2)
    assert err == (
        f"tiedjax: {tmp_path / 'none.yaml'}: no such file, and no run config of that name; there are g43, olmo_1b, "
        "olmo_300m, olmo_60m, olmo_7b, prose, quick, tiny\n"
    )


# ---- What the split by role costs ----


@pytest.mark.parametrize(("scheme", "parts"), [("tied", 1), ("tied", 4), ("untied", 4)])
def test_the_split_costs_no_matrix_product_and_at_most_one_more_table(
    scheme: str, parts: int, step_benchmark: ModuleType
) -> None:
    """By the compiled programs of the step with and without roles. The former holds the two role gradients, the latter
    at least one gradient of a table; so both together with one buffer more are at most two above it."""
    cfg = small_config(scheme, layers=1, vocab_size=4096, data=DataConfig(batch_size=8, microbatches=parts))
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    cfg = step_benchmark.without_account(cfg)
    steps = step.make_steps(cfg, mesh)
    arguments = (
        steps.abstract,
        jax.ShapeDtypeStruct((8, cfg.model.seq_len + 1), jnp.int32),
        tying.Tables(*[jax.ShapeDtypeStruct((), jnp.float32)] * 2),
        jax.ShapeDtypeStruct((cfg.model.table_rows,), jnp.int32),
    )
    products, temporary = {}, {}
    for name, each in [("with", steps), ("without", step_benchmark.without_roles(cfg, mesh, steps))]:
        compiled = each.train.lower(*arguments).compile()
        products[name] = len(re.findall(r"= \S+ (?:dot|convolution|custom-call)\(", compiled.as_text()))
        temporary[name] = compiled.memory_analysis().temp_size_in_bytes
    assert products["with"] == products["without"]
    # 5 matrices (queries, keys and values are one), 2 of attention and the unembedding, forward and twice backward.
    assert products["with"] >= 3 * (5 + 2 + 1)
    table_bytes = 4 * cfg.model.table_rows * cfg.model.d_model
    assert temporary["with"] <= temporary["without"] + 2 * table_bytes


# ---- The programs in benchmarks/ ----


def test_starts_of_two_measurements_are_counted_together_if_nothing_else_differs(step_benchmark: ModuleType) -> None:
    saved = json.loads((REPOSITORY / "benchmarks" / "results" / "account_cpu.json").read_text())["tiny"]
    later = {**saved, "environment": {**saved["environment"], "date": "2030-01-01"}}
    both, side = step_benchmark.pooled(saved, later), "without_account"
    once = saved["sides"][side]["interval"]
    twice = both["sides"][side]["interval"]
    assert twice["starts"] == 2 * once["starts"] == len(both["window_steps"])
    assert twice["mean"] == pytest.approx(once["mean"], abs=1e-12)
    assert twice["high"] - twice["low"] < 0.75 * (once["high"] - once["low"])
    assert both["environment"]["date"] == f"{saved['environment']['date']} and 2030-01-01"
    for other in ({"rounds": 1}, {"failed": {side: "no memory"}}, {"environment": {"machine": "another", "date": ""}}):
        with pytest.raises(SystemExit, match="cannot be counted together"):
            step_benchmark.pooled(saved, {**later, **other})


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_benchmarks_read_configs_as_the_command_line_does(path: Path, step_benchmark: ModuleType) -> None:
    """They need neither pydantic nor ruamel.yaml, which a machine with a GPU may lack."""
    assert step_benchmark.read_config(path) == load_run_config(path)
    changed = step_benchmark.read_config(path, {"data.batch_size": 3, "data.microbatches": 1, "model.layers": 1})
    expected = {"data.batch_size": "3", "data.microbatches": "1", "model.layers": "1"}
    assert changed == load_run_config(path, expected)


def test_sides_are_compared_under_adamw_of_one_rate(step_benchmark: ModuleType) -> None:
    cfg = step_benchmark.read_config(REPOSITORY / "configs" / "quick.yaml", {"optimizer.tables.input.b2": 0.5})
    plain = step_benchmark.under_adamw(cfg).optimizer
    assert (cfg.optimizer.body.kind, cfg.optimizer.tables.input.b2) == ("muon", 0.5)
    assert {(rule.kind, rule.learning_rate, rule.b2) for rule in rules(plain).values()} == {("adamw", 1e-2, 0.95)}


def test_without_roles_training_is_the_same(step_benchmark: ModuleType) -> None:
    cfg = small_config()
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    alone = step_benchmark.without_account(cfg)
    plain = bench.Stepper(alone, mesh, step_benchmark.without_roles(alone, mesh, step.make_steps(alone, mesh)))
    stepper = make_stepper(cfg)
    stepper.run(8)
    plain.run(8)
    np.testing.assert_allclose(plain.losses, stepper.losses, rtol=1e-6)


def test_kernels_are_told_apart_by_the_part_of_the_step(
    gpu_benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of command buffers too, where a kernel of a library says nothing of its place but its neighbours do."""
    names = {
        "select_fusion.1": "jit(train)/jvp(loss)/while/body/select_n",
        "convert_fusion.2": "jit(train)/transpose(jvp(Transformer))/layer_1/mlp/mul",
        "fusion.3": "jit(train)/jvp(Transformer)/layer_0/mlp_norm/mul",
        "add_fusion": "jit(train)/optimizer/add",
    }
    lines = [f'  %{name} = f32[2]{{0}} add(%a, %a), metadata={{op_name="{scope}"}}' for name, scope in names.items()]
    text = "\n".join(["ENTRY %main (a: f32[2]) -> f32[2] {", "  %a = f32[2]{0} parameter(0)", *lines, "}"])
    events = [  # kernel, instruction, begin and duration in ns
        ("select_fusion_1", "buffer_1", 0, 4e6),
        ("nvjet_sm90", "buffer_1", 4e6, 4e6),
        ("nvjet_sm90", "buffer_2", 8e6, 8e6),
        ("convert_fusion_2", "buffer_2", 10e6, 4e6),  # beside the product
        ("cudnn_sdpa_flash", "buffer_2", 20e6, 12e6),
        ("fusion_3", "buffer_2", 32e6, 4e6),
        ("add_fusion", "add_fusion", 36e6, 4e6),
    ]
    stepper = SimpleNamespace(compiled=SimpleNamespace(as_text=lambda: text), run=lambda steps: 0.0)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: Path(folder, "x.xplane.pb").touch())
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    monkeypatch.setattr(gpu_benchmark, "device_events", lambda path: iter(events))
    assert gpu_benchmark.TRACED == 4
    found = gpu_benchmark.kernels(stepper)
    assert found["by_part"] == {
        "attention": 3.0,
        "products of the body": 2.0,
        "elementwise of the loss": 1.0,
        "products of the loss": 1.0,
        "elementwise of the MLP": 1.0,
        "norms": 1.0,
        "optimizer and roles": 1.0,
    }
    assert (found["step_milliseconds"], found["between_kernels"], found["launches"]) == (10.0, 1.0, 7 / 4)
    monkeypatch.setattr(gpu_benchmark, "device_events", lambda path: iter(()))
    assert gpu_benchmark.kernels(stepper) == {"launches": 0}


def test_the_peers_in_pytorch_and_by_hand_train_the_same_model(tmp_path: Path) -> None:
    """A side whose first losses are others than ours is named as failed."""
    path = tmp_path / "step.json"
    program = [REPOSITORY / "benchmarks" / "step.py", TINY, "--machine", "any", "--out", path, "--starts", 1]
    program += ["--rounds", 1, "--window-seconds", 0.01, "--sides", "tiedjax", "by_hand", "torch_eager"]
    shrunk = ["--set", "model.layers=2", "model.d_model=32", "model.d_ff=48", "model.vocab_size=320"]
    finish(start([*map(str, program), *shrunk]))
    (found,) = json.loads(path.read_text()).values()
    assert found["failed"] == {}
    assert set(found["sides"]) == {"tiedjax", "by_hand", "torch_eager"}


# What holds of each kind of part, as far as it needs no PyTorch.
GPU_PARTS: dict[str, Callable[[Any], bool]] = {
    "correctness": lambda found: found["float32"]["holds"] and found["bfloat16"]["holds"],
    "gradients": lambda found: found["float32"]["holds"] and found["bfloat16"]["holds"],
    "resume": lambda found: found["float32"]["holds"] and 0 < found["float32"]["account_error"] < 1e-5,
    "loss": lambda found: found["width 64"]["time"]["relative_difference_of_table_gradients"] < 1e-5,
    "roles:olmo_1b": lambda found: (
        found["config"]["model"]["remat"] == "none"
        and set(found["sides"]) == {"tiedjax", "without_account", "without_roles"}
    ),
    "flags:olmo_60m": lambda found: found["as set"]["loss"] > 0,
}


@pytest.mark.parametrize("parts", slow_but(["gradients", " ".join(GPU_PARTS)], "gradients"))
def test_the_program_for_gpus_runs_with_tiny_sizes(parts: str, tmp_path: Path) -> None:
    """Each part is a process."""
    path = tmp_path / "gpu.json"
    program = [REPOSITORY / "benchmarks" / "gpu.py", "--smoke", "--machine", "any", "--out", path]
    done = subprocess.run(
        [sys.executable, *map(str, program), "--parts", *parts.split()],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert list(found) == parts.split()
    for part, of_part in found.items():
        assert GPU_PARTS[part](of_part), part
        assert of_part["environment"]["machine"] == "any"


def test_losses_of_a_study_whose_tables_stayed_elsewhere(tmp_path: Path) -> None:
    losses = benchmark("study_losses")
    for name, steps, held_out in [("tied-0", 3, 2.0), ("tied-1", 3, 2.5), ("untied-0", 3, 2.25), ("untied-1", 2, 9.0)]:
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text("train: {steps: 3}\n")
        rows = [{"step": i + 1, "tokens": 8, "loss": 1.0, "output_grad_share": i / 4} for i in range(steps)]
        rows[-1]["eval_loss"] = held_out
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "new").mkdir()
    assert losses.ended(tmp_path / "new") is None
    (tmp_path / "untied-1" / "metrics.jsonl").open("a").write('{"step": 3, "lo')
    ended = {run: losses.ended(tmp_path / run) for run in ("tied-0", "tied-1", "untied-0", "untied-1")}
    assert ended["untied-1"] is None
    assert ended["tied-0"]["mean"] == {"output_grad_share": 0.25}
    arms = {"tied": {"0": ended["tied-0"], "1": ended["tied-1"]}, "untied": {"0": ended["untied-0"]}}
    assert losses.differences(arms, "tied")["untied"]["mean"] == 0.25
