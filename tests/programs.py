"""Running the real thing in a process of its own: devices are chosen before JAX starts, signals need a target."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent

# How every process of the tests compiles: up to fifteen times as fast as users' programs are compiled, to programs
# that run slower and differ from them in the last bits. XLA ends a process that it gives an option which it does not
# know, as it no longer knows that of the emitters from jax 0.11 on.
_KNOWN = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
_EMITTERS = {"xla_cpu_use_fusion_emitters": False} if _KNOWN else {}
PLAIN = {"xla_backend_optimization_level": 0, **_EMITTERS}
# What users have: for what must be so bit by bit in two programs that are not the same.
OPTIMIZED = {"xla_backend_optimization_level": 1, **dict.fromkeys(_EMITTERS, True)}


def environment(devices: int = 1, *, optimized: bool = False, **more: str) -> dict[str, str]:
    """The environment of a child with this many fake CPU devices, which compiles as `PLAIN` says or as users do."""
    flags = {"xla_force_host_platform_device_count": devices, **({} if optimized else PLAIN)}
    text = " ".join(f"--{name}={str(value).lower()}" for name, value in flags.items())
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": text, **more}


def start(
    args: Sequence[str | Path], *, devices: int = 1, cwd: Path = REPOSITORY, optimized: bool = False, **more: str
) -> subprocess.Popen[str]:
    """Starts `python ARGS` in that environment with its output piped."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = environment(devices, optimized=optimized, **more)
    return subprocess.Popen([sys.executable, *map(str, args)], cwd=cwd, env=child, text=True, **pipes)


def finish(process: subprocess.Popen[str], *, seconds: float = 240, status: int = 0) -> tuple[str, str]:
    """(standard output, standard error) of a process that must end in time with this exit status."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {seconds} s\n{out}\n{err}") from None
    assert process.returncode == status, f"exit {process.returncode}, not {status}\n{out}\n{err}"
    return out, err


def shell(line: str, folder: Path) -> str:
    """Standard output of a command line, run by a shell in `folder` with this Python's programs found first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    child = environment(8 if "--mesh.fsdp 8" in line else 1, PATH=path)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    out, err = finish(subprocess.Popen(["bash", "-c", line], cwd=folder, env=child, text=True, **pipes), seconds=280)
    assert "Traceback" not in out + err
    return out


def until(holds: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Waits until `holds()`, while the process lives."""
    end = time.monotonic() + seconds
    while not holds():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"waited in vain; exit {process.returncode}\n{out}\n{err}")
        time.sleep(0.05)


def tiedjax(
    *args: str | Path, status: int = 0, devices: int = 1, cwd: Path = REPOSITORY, optimized: bool = False, **more: str
) -> tuple[str, str]:
    """Runs the command line and returns (standard output, standard error)."""
    return finish(start(["-m", "tiedjax", *args], devices=devices, cwd=cwd, optimized=optimized, **more), status=status)
