"""Running the real thing in a process of its own: devices are chosen before JAX starts, signals need a target."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent

# XLA's option that leaves out what LLVM can do: twice as fast to compile, slower to run, and other last bits. For
# programs that are only read, and for children that nobody compares bit by bit with processes that compile as users do.
PLAIN = {"xla_backend_optimization_level": 0}


def environment(devices: int = 1, *, plain: bool = False, **more: str) -> dict[str, str]:
    """The environment of a child with this many fake CPU devices, which compiles as `PLAIN` says or as users do."""
    flags = {"xla_force_host_platform_device_count": devices, **(PLAIN if plain else {})}
    text = " ".join(f"--{name}={value}" for name, value in flags.items())
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": text, **more}


def start(
    args: Sequence[str | Path], *, devices: int = 1, cwd: Path = REPOSITORY, plain: bool = False, **more: str
) -> subprocess.Popen[str]:
    """Starts `python ARGS` in that environment with its output piped."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = environment(devices, plain=plain, **more)
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
    *args: str | Path, status: int = 0, devices: int = 1, cwd: Path = REPOSITORY, plain: bool = False, **more: str
) -> tuple[str, str]:
    """Runs the command line and returns (standard output, standard error)."""
    return finish(start(["-m", "tiedjax", *args], devices=devices, cwd=cwd, plain=plain, **more), status=status)
