"""XLA flags: only for the platform that is there, never over the user's, and none that XLA does not know."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
from programs import finish, start

from tiedjax.host import platform_flags

LATENCY, SCATTER = (flag.text for flag in platform_flags.CUDA_FLAGS)
(QUICKLY,) = (flag.text for flag in platform_flags.CPU_FLAGS)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As where the plugin for CUDA 13 and jaxlib 0.10.2 are installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "jax_cuda13_plugin" else None)
    pretend_jaxlib("0.10.2", monkeypatch)
    return monkeypatch


def pretend_jaxlib(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"jaxlib": version}[name])


def applied(**environment: str) -> dict[str, str]:
    platform_flags.apply(environment)
    return environment


@pytest.mark.parametrize("platforms", [{}, {"JAX_PLATFORMS": "cuda,cpu"}, {"JAX_PLATFORMS": "gpu"}])
def test_a_gpu_gets_its_flags(cuda: pytest.MonkeyPatch, platforms: dict[str, str]) -> None:
    assert applied(**platforms)["XLA_FLAGS"].split() == [LATENCY, SCATTER]


def test_jax_takes_most_of_a_gpu_unless_the_user_says_how_much(cuda: pytest.MonkeyPatch) -> None:
    assert applied()["XLA_CLIENT_MEM_FRACTION"] == "0.92"
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):  # JAX refuses both at once
        said = {key: value for key, value in applied(**{name: ".5"}).items() if "FRACTION" in key}
        assert said == {name: ".5"}
    assert "XLA_CLIENT_MEM_FRACTION" not in applied(XLA_PYTHON_CLIENT_PREALLOCATE="false")


@pytest.mark.parametrize("platforms", ["tpu", "tpu,cpu"])
def test_a_platform_that_is_not_asked_for_gets_none(cuda: pytest.MonkeyPatch, platforms: str) -> None:
    assert applied(JAX_PLATFORMS=platforms) == {"JAX_PLATFORMS": platforms}


def test_a_cpu_compiles_quickly_where_nothing_else_can_be_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert applied() == {"XLA_FLAGS": QUICKLY}
    assert applied(XLA_FLAGS="--xla_backend_optimization_level=2") == {
        "XLA_FLAGS": "--xla_backend_optimization_level=2"
    }
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ["rocm"] if group == "jax_plugins" else [])
    assert applied() == {}
    assert applied(JAX_PLATFORMS="cpu")["XLA_FLAGS"] == QUICKLY
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "libtpu" else None)
    assert applied() == {}


def test_what_is_compiled_for_others_is_compiled_as_they_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    environment: dict[str, str] = {}
    platform_flags.apply_for_absent(environment)
    assert environment == {"JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        ("0.10.1", False),
        ("0.10.2", True),
        ("0.11.0", True),
        ("0.11.0.post1", True),
        ("0.11.1", False),
        ("0.12.0.1", False),
    ],
)
def test_slow_scatters_are_mended_in_the_versions_that_have_them(
    cuda: pytest.MonkeyPatch, version: str, wanted: bool
) -> None:
    pretend_jaxlib(version, cuda)
    assert (SCATTER in applied()["XLA_FLAGS"].split()) == wanted


@pytest.mark.parametrize(
    "theirs", ["--xla_gpu_enable_latency_hiding_scheduler=false", SCATTER.partition("=")[0] + "=x"]
)
def test_what_the_user_set_wins_and_stays(cuda: pytest.MonkeyPatch, theirs: str) -> None:
    given = f"--xla_dump_to=here {theirs}"
    found = applied(XLA_FLAGS=given, LIBTPU_INIT_ARGS="--a=1")
    assert found["LIBTPU_INIT_ARGS"] == "--a=1"
    assert found["XLA_FLAGS"].endswith(given)
    names = [flag.partition("=")[0] for flag in found["XLA_FLAGS"].split()]
    assert len(names) == len(set(names)) == 3
    again = dict(found)
    platform_flags.apply(again)
    assert again == found, "applied twice is applied once"
    assert platform_flags.in_force(found) == found
    assert platform_flags.in_force({"XLA_FLAGS": "", "HOME": "x"}) == {}


PROGRAM = """
import sys
from tiedjax import cli
from tiedjax.host import platform_flags
platform_flags._for_cuda = lambda environment: platform_flags.CUDA_FLAGS
seen = {}
cli._train = lambda args: seen.update(platform_flags.in_force(), jax="jax" in sys.modules) or 0
assert cli.main(["train", "x.yaml"]) == 0
assert not seen["jax"], "applied before JAX is there"
import jax
jax.numpy.zeros(1).block_until_ready()
print(seen["XLA_FLAGS"])
"""


def test_a_command_sets_them_before_jax_and_jax_starts_with_every_one() -> None:
    """In a process of its own: XLA ends a process that is given a flag it does not know."""
    out, _ = finish(start(["-c", PROGRAM], XLA_FLAGS=""))
    assert out.split() == [LATENCY, SCATTER, QUICKLY]
    unknown = start(["-c", "import jax; jax.numpy.zeros(1)"], XLA_FLAGS="--xla_gpu_no_such_flag=1")
    _, err = unknown.communicate(timeout=120)
    assert unknown.returncode != 0
    assert "no_such_flag" in err


def test_deciding_imports_no_jax() -> None:
    program = "import sys; from tiedjax.host import platform_flags as p; p.apply(); print('jax' in sys.modules)"
    assert finish(start(["-c", program]))[0] == "False\n"


def test_the_compile_command_has_no_flags_of_this_machine() -> None:
    program = """
from tiedjax import cli
from tiedjax.host import platform_flags
cli._compile = lambda args: print(platform_flags.in_force()) or 0
assert cli.main(["compile", "tiny", "--topology", "v5p:2x2x1"]) == 0
"""
    assert finish(start(["-c", program], XLA_FLAGS=""))[0] == "{}\n"
