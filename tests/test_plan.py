"""Study files with sweeps and with arms of equal parameters: what they resolve to, and what is refused."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import pytest
from programs import REPOSITORY, finish, start

from tiedjax import lm
from tiedjax.config import RunConfig
from tiedjax.errors import UserError
from tiedjax.flops import flops_per_token
from tiedjax.plan import Plan, load_study

ARMS = "base: run.yaml\narms:\n  untied: {tying: {scheme: untied}}\n  tied: {}\n  other: {}\nseeds: [0, 1, 2]\n"


def loaded(folder: Path, rest: str = "", run: str = "", overrides: dict[str, str] | None = None) -> Plan:
    """The plan of a study of three arms over three seeds."""
    (folder / "run.yaml").write_text(run)
    (folder / "study.yaml").write_text(ARMS + rest)
    return load_study(folder / "study.yaml", overrides)


def count(cfg: RunConfig) -> int:
    """Parameters of a run, from the shapes that it would make."""
    shapes = nn.unbox(jax.eval_shape(lambda: lm.init_params(cfg, jax.random.key(0))))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


SWEEP = """
sweep: {optimizer.tables.learning_rate: [0.1, 0.2], train.z_loss: [0.0, 1.0e-4]}
arm_sweeps:
  untied: {optimizer.tables.input.learning_rate: [0.3, 0.4, 0.5]}
  other: {}
sweep_seeds: [7, 8]
"""


def test_every_point_of_every_arm_is_tried_from_the_seeds_of_the_sweep(tmp_path: Path) -> None:
    plan = loaded(tmp_path, SWEEP)
    tried = {
        (arm, place, seed): (
            cfg.optimizer.tables.learning_rate,
            cfg.optimizer.tables.input.learning_rate,
            cfg.train.z_loss,
        )
        for (arm, place, seed), cfg in plan.trials.items()
    }
    points: dict[str, list[Any]] = {
        "untied": [(None, rate, 0.0) for rate in (0.3, 0.4, 0.5)],
        "tied": [(rate, None, z) for rate in (0.1, 0.2) for z in (0.0, 1e-4)],
    }
    assert tried == {
        (arm, place, seed): point for arm, each in points.items() for place, point in enumerate(each) for seed in (7, 8)
    }
    assert {cfg.train.seed for cfg in plan.trials.values()} == {7, 8}
    assert {(arm, seed) for arm, seed in plan.runs} == {(a, s) for a in ("untied", "tied", "other") for s in (0, 1, 2)}


def test_a_settled_plan_has_each_arm_at_its_own_best_point_and_nothing_else_changed(tmp_path: Path) -> None:
    plan = loaded(tmp_path, SWEEP)
    settled = plan.settled({"untied": 2, "tied": 1})
    for seed in plan.study.seeds:
        tied, untied = settled.runs["tied", seed], settled.runs["untied", seed]
        assert (tied.optimizer.tables.learning_rate, tied.train.z_loss, tied.train.seed) == (0.1, 1e-4, seed)
        assert untied.optimizer.tables.input.learning_rate == 0.5
        assert untied.optimizer.tables.output.learning_rate is None
        assert settled.runs["other", seed] == plan.runs["other", seed]
        assert tied.model == plan.runs["tied", seed].model


@pytest.mark.parametrize(
    ("rest", "overrides", "says"),
    [
        (
            "sweep: {train.steps: [5]}",
            {},
            "arm 'untied': sweep: train.steps: needs two or more distinct values, got [5]",
        ),
        ("sweep: {train.steps: [5, 5]}", {}, "sweep: train.steps: needs two or more distinct values, got [5, 5]"),
        (
            "sweep: {train.steps: [5, 6]}\nsweep_seeds: [2, 9]",
            {},
            "sweep_seeds: must be other seeds than the study's, or a choice is judged by what made it; both have [2]",
        ),
        ("sweep: {train.steps: [5, 6]}\nsweep_seeds: [9, 9]", {}, "sweep_seeds: must be distinct and at least one"),
        (
            "sweep: {train.steps: [5, 6]}",
            {"train.steps": "7"},
            "--train.steps: {study} sweeps it; change its values there",
        ),
        (
            "arm_sweeps: {none: {train.steps: [5, 6]}}",
            {},
            "arm_sweeps: no arm is named 'none'; the arms are 'untied', ",
        ),
        (
            "arm_sweeps: {untied: {tying.scheme: [untied, tied]}}",
            {},
            "arm 'untied': sweep: tying.scheme cannot be swept; give each value an arm of its own",
        ),
        ("sweep: {train.stepz: [5, 6]}", {}, "arm 'untied': unknown key 'train.stepz'; did you mean 'train.steps'?"),
        (
            "sweep: {optimizer.tables.input.b2: [0.9, 0.95]}",
            {},
            "arm 'tied': optimizer.tables.input.b2: the tied scheme has no table for the input role alone; ",
        ),
        (
            "arm_sweeps: {tied: {train.seed: [5, 6]}}",
            {},
            "arm 'tied': sweep: train.seed cannot be swept; give each value an arm of its own",
        ),
        (
            "equal_parameters: {other: mlp}\narm_sweeps: {untied: {model.d_ff: [8, 9]}}",
            {},
            "arm 'untied': sweep: model.d_ff cannot be swept where equal_parameters settles the shape",
        ),
        ("equal_parameters: {none: mlp}", {}, "equal_parameters: no arm is named 'none'; the arms are 'untied', "),
        (
            "equal_flops: [other]\narm_sweeps: {untied: {train.steps: [8, 9]}}",
            {},
            "arm 'untied': sweep: train.steps cannot be swept where equal_flops settles the length",
        ),
        (
            "equal_flops: [other]\narm_sweeps: {other: {model.layers: [1, 2]}}",
            {},
            "arm 'other': sweep: model.layers cannot be swept where equal_flops settles the shape",
        ),
        ("equal_flops: [none]", {}, "equal_flops: no arm is named 'none'; the arms are 'untied', "),
        ("equal_flops: [untied]", {}, "equal_flops: 'untied' is the reference that the others are made equal to"),
        (
            "equal_parameters: {untied: mlp}",
            {},
            "equal_parameters: 'untied' is the reference that the others are made equal to",
        ),
    ],
)
def test_a_sweep_that_cannot_choose_is_refused_before_it_trains(
    tmp_path: Path, rest: str, overrides: dict[str, str], says: str
) -> None:
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, rest, overrides=overrides)
    assert says.replace("{study}", str(tmp_path / "study.yaml")) in str(caught.value)


@pytest.mark.parametrize("where", ["mlp", "layers"])
@pytest.mark.parametrize(
    "base", ["quick", "olmo_60m", "olmo_300m", "olmo_1b", "olmo_7b", "model: {mlp: gelu, norm: layernorm, kv_heads: 2}"]
)
def test_an_arm_of_equal_parameters_is_within_one_percent(tmp_path: Path, base: str, where: str) -> None:
    named = REPOSITORY / "configs" / f"{base}.yaml"
    run = named.read_text() if named.exists() else base
    plan = loaded(tmp_path, f"equal_parameters: {{other: {where}}}", run)
    reference, tied, other = (plan.runs[arm, 0] for arm in ("untied", "tied", "other"))
    assert count(other) == pytest.approx(count(reference), rel=0.01)
    assert count(tied) < 0.99 * count(reference)
    assert (other.model.layers > tied.model.layers) == (where == "layers") or base == "olmo_7b"
    if where == "mlp":
        assert other.model.d_ff > tied.model.d_ff
    unchanged = {"layers", "d_ff"}
    assert {k: v for k, v in vars(other.model).items() if k not in unchanged} == {
        k: v for k, v in vars(tied.model).items() if k not in unchanged
    }
    assert (other.optimizer, other.data, other.tying, other.train) == (
        tied.optimizer,
        tied.data,
        tied.tying,
        tied.train,
    )


@pytest.mark.parametrize("rest", ["", "equal_parameters: {other: mlp}\n", "equal_parameters: {other: layers}\n"])
def test_an_arm_of_equal_flops_has_those_of_the_reference_to_half_a_step(tmp_path: Path, rest: str) -> None:
    run = (REPOSITORY / "configs" / "quick.yaml").read_text()
    plan = loaded(tmp_path, rest + "equal_flops: [other]", run, {"data.batch_size": "8"})
    reference, other, tied = (plan.runs[arm, 0] for arm in ("untied", "other", "tied"))
    flops = {name: 8 * cfg.model.seq_len * flops_per_token(cfg.model, causal=True) for name, cfg in plan.runs.items()}
    apart = other.train.steps * flops["other", 0] - reference.train.steps * flops["untied", 0]
    assert abs(apart) <= flops["other", 0] / 2
    assert (other.train.steps < reference.train.steps) == bool(rest)
    assert tied.train.steps == reference.train.steps


def test_an_arm_of_equal_flops_has_no_steps_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("")
    study = ARMS.replace("other: {}", "other: {train: {steps: 9}}") + "equal_flops: [other]"
    (tmp_path / "study.yaml").write_text(study)
    with pytest.raises(UserError) as caught:
        load_study(tmp_path / "study.yaml")
    assert str(caught.value) == (
        f"{tmp_path / 'study.yaml'}: arm 'other': equal_flops settles train.steps; leave it out of the arm"
    )


def test_the_width_of_an_equal_arm_is_cut_by_the_mesh(tmp_path: Path) -> None:
    run = (REPOSITORY / "configs" / "olmo_1b.yaml").read_text() + "mesh: {tensor: 8}\n"
    plan = loaded(tmp_path, "equal_parameters: {other: mlp}", run)
    assert plan.runs["other", 0].model.d_ff % (8 * 128) == 0


def test_a_study_is_loaded_before_a_cluster_is_joined() -> None:
    """JAX refuses to join one in a process that has made an array."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = f"""
from tiedjax.plan import load_study
load_study({str(REPOSITORY / "configs" / "studies" / "rates.yaml")!r})
import jax
jax.distributed.initialize("127.0.0.1:{port}", 1, 0)
print(jax.process_count())
"""
    out, _ = finish(start(["-c", program]), seconds=60)
    assert out.splitlines()[-1] == "1"


def test_too_little_to_make_equal_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        loaded(
            tmp_path,
            "equal_parameters: {other: mlp}",
            "model: {layers: 200, d_model: 4, heads: 1, d_ff: 1, vocab_size: 500}",
        )
    assert str(caught.value) == (
        f"{tmp_path / 'study.yaml'}: equal_parameters: other: no mlp comes within 1% of the 19,200 parameters of "
        "untied; the nearest has 19,600"
    )
