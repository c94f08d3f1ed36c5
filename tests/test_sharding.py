"""The mesh changes where arrays are, never what they are."""

from __future__ import annotations

import json

import jax
import pytest
from conftest import slow_but, small_config
from programs import TESTS, finish, start

from tiedjax import sharding, step, tying
from tiedjax.config import DataConfig, MeshConfig
from tiedjax.errors import UserError


@pytest.mark.parametrize("subject", slow_but([*tying.SCHEMES, "muon", "regularised"], "tied", "muon"))
def test_every_mesh_gives_the_loss_and_gradients_of_one_device(subject: str) -> None:
    out, _ = finish(start([TESTS / "mesh_program.py", subject], devices=8))
    differences = json.loads(out.splitlines()[-1])
    assert len(differences) == {"muon": 4, "regularised": 4, "tied": 5, "untied": 5}.get(subject, 1)
    for case, difference in differences.items():
        assert difference <= 1e-5, case


def test_every_mesh_gives_the_anatomy_of_one_device() -> None:
    out, _ = finish(start([TESTS / "mesh_program.py", "anatomy"], devices=8))
    differences = json.loads(out.splitlines()[-1])
    assert len(differences) == 3
    assert max(differences.values()) <= 1e-5


def test_muon_sends_each_matrix_once_there_and_once_back() -> None:
    """All that a device holds of the stack, in float32 on a CPU, and nothing else: no norm, no second copy."""
    out, _ = finish(start([TESTS / "mesh_program.py", "sent by muon"], devices=8))
    assert json.loads(out.splitlines()[-1]) == {"all-to-all": [2, 2 * 8 * 16 * 24 * 4 // 8]}


def test_colliding_axes_raise() -> None:
    assert sharding.partition_spec(["vocab", "embed"]) == jax.P("tensor", "fsdp")
    with pytest.raises(ValueError, match="claim a mesh axis twice"):
        sharding.partition_spec(["heads", "mlp"])
    with pytest.raises(KeyError):
        sharding.partition_spec(["no such axis"])


def test_a_mesh_that_does_not_fit_is_refused() -> None:
    one = jax.devices()[:1]
    assert sharding.make_mesh(MeshConfig(), one).shape == {"data": 1, "fsdp": 1, "tensor": 1}
    for cfg in (MeshConfig(fsdp=2), MeshConfig(data=2), MeshConfig(data=1, tensor=3)):
        with pytest.raises(UserError, match="does not fit 1 devices"):
            sharding.make_mesh(cfg, one)


def test_a_microbatch_must_be_divisible() -> None:
    cfg = small_config(data=DataConfig(batch_size=8, microbatches=8))
    mesh = jax.sharding.AbstractMesh((2, 1, 1), sharding.MESH_AXES)
    with pytest.raises(UserError, match="2 devices do not divide the 1 sequences"):
        step.make_steps(cfg, mesh)


@pytest.mark.parametrize(
    ("platform", "layers", "asked", "scanned"),
    [
        ("cpu", 2, None, False),
        ("cpu", 32, None, True),
        ("cpu", 32, False, False),
        ("cpu", 2, True, True),
        ("gpu", 31, None, False),
        ("gpu", 32, None, True),
        ("tpu", 11, None, False),
        ("tpu", 12, None, True),
    ],
)
def test_layers_are_scanned_by_depth_and_platform_unless_the_config_says(
    platform: str, layers: int, asked: bool | None, scanned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = small_config(layers=layers, scan_layers=asked)
    mesh = sharding.make_mesh(MeshConfig(data=1))
    if platform == "cpu":
        assert ("layers" in step.make_steps(cfg, mesh).abstract.params["body"]["params"]) is scanned
    monkeypatch.setattr(sharding.Layout, "platform", platform)
    assert step.decided(cfg, mesh).model.scan_layers is scanned


def test_layers_of_different_windows_are_not_scanned_by_themselves() -> None:
    mesh = sharding.make_mesh(MeshConfig(data=1))
    scanned = lambda layers: (
        step.decided(small_config(layers=40, window=4, window_layers=layers), mesh).model.scan_layers
    )
    assert scanned("window")
    assert scanned("window,full") is False
