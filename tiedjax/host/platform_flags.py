"""XLA flags by platform, each with its reason: put into the environment before JAX is imported. Imports no JAX.

The list is short on purpose. XLA aborts the process at a flag that it does not know, so a flag stands here only if it
has a known reason and a name that every supported jaxlib accepts. Of those that might speed up a CPU
(xla_cpu_opt_preset, _scheduler_type, _copy_insertion_use_region_analysis, _multi_thread_eigen, _use_onednn,
_use_xnnpack, _enable_fast_math) none made the step of configs/quick.yaml measurably faster. There is none for TPUs:
asynchronous collectives and their fusion with matrix products are defaults of libtpu (openxla.org/xla/flags_guidance).
"""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_CLIENT_MEM_FRACTION")
# What JAX takes of a GPU's memory at its start; by itself it would take 0.75. What is left is for the CUDA context, for
# cuDNN and for cuBLAS.
CUDA_MEMORY_FRACTION = "0.92"
_MEMORY_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")
_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


@dataclass(frozen=True)
class Flag:
    """A flag of XLA_FLAGS, and the versions `since <= jaxlib < until` that need it (None: no bound)."""

    text: str
    since: tuple[int, ...] | None = None
    until: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """What stands before the value."""
        return self.text.partition("=")[0]

    def wanted_by(self, jaxlib: tuple[int, ...]) -> bool:
        """Whether this version of jaxlib needs the flag."""
        return (self.since is None or self.since <= jaxlib) and (self.until is None or jaxlib < self.until)


CUDA_FLAGS = (
    # Lets the collectives of one layer run while the next computes; by default XLA:GPU does not schedule for that. Of
    # use with several GPUs only; recommended for them by docs.jax.dev/en/latest/gpu_performance_tips.html.
    Flag("--xla_gpu_enable_latency_hiding_scheduler=true"),
    # These versions compile a float32 scatter-add, such as the gradient of the lookup, to a compare-and-swap loop: up
    # to 2,000 times slower where many updates go to one row (openxla/xla#46225, jax-ml/jax#38806). The option brings
    # back the hardware's atomic addition, which flushes subnormal sums to 0, as in the other versions. No GPU has run
    # these versions yet.
    Flag("--xla_backend_extra_options=-nvptx-allow-ftz-atomics", since=(0, 10, 2), until=(0, 11, 1)),
)

CPU_FLAGS = (
    # Programs compile in two thirds of the time, and steps take as long: XLA itself writes the loops of its kernels in
    # vectors, and matrix products are calls of libraries.
    Flag("--xla_backend_optimization_level=1"),
)


def apply(environment: MutableMapping[str, str] = os.environ) -> None:
    """Puts the flags of the platform that is present into XLA_FLAGS, before what the user has set there.

    A flag that the user has set, to whatever value, is left alone. Without effect once JAX has started a backend.
    """
    _add(environment, *(CPU_FLAGS if _only_cpu(environment) else ()))
    _prepare_cuda(environment)


def _add(environment: MutableMapping[str, str], *flags: Flag) -> None:
    given = environment.get("XLA_FLAGS", "")
    names = {flag.partition("=")[0] for flag in given.split()}
    added = [flag.text for flag in flags if flag.name not in names]
    if added:
        environment["XLA_FLAGS"] = " ".join([*added, given]).strip()


def _prepare_cuda(environment: MutableMapping[str, str]) -> None:
    _add(environment, *_for_cuda(environment))
    if _may_use_cuda(environment) and not any(environment.get(name) for name in _MEMORY_VARIABLES):
        environment["XLA_CLIENT_MEM_FRACTION"] = CUDA_MEMORY_FRACTION


def apply_for_absent(environment: MutableMapping[str, str] = os.environ) -> None:
    """Before JAX is imported: it computes on the CPU, and compiles for others with the flags that they would run with.

    A TPU or GPU of this machine has no part in it; JAX's CUDA plugin looks for no driver when it is not asked for.
    """
    environment.pop("JAX_PLATFORMS", None)
    _prepare_cuda(environment)
    environment["JAX_PLATFORMS"] = "cpu"


def use_cpu(environment: MutableMapping[str, str] = os.environ) -> None:
    """Before JAX is imported: it leaves every other device of this machine alone."""
    environment["JAX_PLATFORMS"] = "cpu"


def use_threads(count: int, environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets XLA compute with this many threads where the CPU is what computes; before JAX starts a backend."""
    if not has_accelerator(environment):
        environment["NPROC"] = str(count)  # XLA asks it before it asks the machine


def threads_in_force(environment: Mapping[str, str] = os.environ) -> int | None:
    """What `use_threads` set; None: as many as the machine has."""
    text = environment.get("NPROC", "")
    return int(text) if text.isdigit() else None


def has_accelerator(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether JAX will compute on a GPU or TPU: by JAX_PLATFORMS, else by its plugins and the devices they need."""
    if platforms := environment.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] != "cpu"
    gpu = _present(_CUDA_PLUGINS, "/dev/nvidia[0-9]*", "/dev/dxg")
    return gpu or _present(("libtpu",), "/dev/accel*", "/dev/vfio/[0-9]*")


def _present(modules: tuple[str, ...], *devices: str) -> bool:
    return any(map(importlib.util.find_spec, modules)) and any(map(glob.glob, devices))


def has_cuda_plugin() -> bool:
    """Whether JAX for CUDA is installed, with or without a GPU."""
    return any(map(importlib.util.find_spec, _CUDA_PLUGINS))


def in_force(environment: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that hold flags for XLA, as they stand: the user's and, after `apply`, ours."""
    return {name: environment[name] for name in VARIABLES if environment.get(name)}


def _may_use_cuda(environment: Mapping[str, str]) -> bool:
    platforms = environment.get("JAX_PLATFORMS", "").split(",")
    return bool({"", "cuda", "gpu"} & set(platforms)) and has_cuda_plugin()


def _only_cpu(environment: Mapping[str, str]) -> bool:
    """Whether JAX can compile for nothing else, whatever this machine has."""
    if platforms := environment.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not (plugins or has_cuda_plugin() or importlib.util.find_spec("libtpu"))


def _for_cuda(environment: Mapping[str, str]) -> Iterator[Flag]:
    if not _may_use_cuda(environment):
        return
    jaxlib = tuple(map(int, re.findall(r"\d+", importlib.metadata.version("jaxlib"))[:3]))
    yield from (flag for flag in CUDA_FLAGS if flag.wanted_by(jaxlib))
