"""Membership of a cluster of processes, and requests to stop."""

from __future__ import annotations

import ctypes
import glob
import hashlib
import importlib.util
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tiedjax.errors import UserError


def join_cluster(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Joins the other processes of the job, if there are any; must come before JAX is used.

    Explicit flags win; otherwise an srun of several tasks or a TPU slice is recognised by its environment, a TPU VM
    by its devices, and JAX finds the rest itself. Raises UserError if the flags are incomplete or nobody answers.
    """
    flags = (coordinator, processes, process_id)
    if any(flag is not None for flag in flags):
        if coordinator is None or processes is None or process_id is None:
            raise UserError(
                "--coordinator HOST:PORT, --processes N and --process-id I belong together; give all three or none"
            )
        if processes < 1:
            raise UserError(f"--processes: must be at least 1, got {processes}")
        if not 0 <= process_id < processes:
            raise UserError(
                f"--process-id: must be from 0 to {processes - 1} (--processes {processes}), got {process_id}"
            )
        if ":" not in coordinator:
            raise UserError(f"--coordinator: must be HOST:PORT, got {coordinator!r}")
    elif not _launched_as_one_of_many():
        return
    try:
        jax.distributed.initialize(coordinator, processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot join the cluster: {str(error).splitlines()[0]}") from error


def _launched_as_one_of_many() -> bool:
    # SLURM_STEP_NODELIST is there under srun only: the shell of a batch script is one process, whatever it asked for.
    slurm = {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= os.environ.keys() and int(
        os.environ.get("SLURM_NTASKS", "1")
    ) > 1
    return slurm or len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1 or _on_tpu_vm()


def _on_tpu_vm() -> bool:
    wanted = "tpu" in os.environ.get("JAX_PLATFORMS", "tpu") and importlib.util.find_spec("libtpu") is not None
    return wanted and any(glob.glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/[0-9]*"))


def same_everywhere(text: str) -> bool:
    """Whether all processes hold the same text here; all of them ask together."""
    if jax.process_count() == 1:
        return True
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)
    return bool((np.asarray(multihost_utils.process_allgather(digest)) == digest).all())


def leave_cluster_if_any(status: int) -> None:
    """Ends this process at once, with this status, if others are waiting for it in a cluster.

    An orderly exit would wait for processes that cannot go on; their launcher ends them when it sees this one gone.
    """
    if jax.process_count() > 1:
        os._exit(status)


def keep_freed_memory() -> None:
    """Lets this process keep the memory it frees, under glibc; elsewhere does nothing.

    XLA:CPU allocates its temporaries anew at every step. glibc by default hands blocks of that size back to the kernel
    each time, and page faults then take a large part of a small model's step.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3  # the numbers of malloc.h
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_mmap_threshold, 2**30)


def keep_compiled(folder: Path) -> None:
    """Lets this process find what others have compiled, and leave what it compiles, in `folder`.

    What JAX_COMPILATION_CACHE_DIR names comes first, and JAX_ENABLE_COMPILATION_CACHE=false turns it off. Processes may
    share the folder: entries are never changed, in a cluster process 0 alone writes, and an entry that a killed process
    left incomplete is compiled anew. Not for CPUs: there an entry is machine code for one kind of CPU, and on many of
    Intel's the loader rejects even its own, with an error line each that speaks of SIGILL (openxla/xla#44565).
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(folder))


def is_main() -> bool:
    """Whether this is the process that prints and writes files."""
    return jax.process_index() == 0


class StopRequest:
    """Turns SIGINT and SIGTERM into a request to stop after the step in progress; a second one kills the process.

    From `listen` until it is left: entered before what must be closed in peace, it lets a save in progress be finished.
    In a cluster, where all processes must stop after the same step, the request is JAX's preemption notice (SIGTERM
    to any of them); there SIGINT keeps its meaning.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        return self

    def listen(self) -> None:
        """From here on a signal is a request; until here it does what it always did."""
        if jax.process_count() == 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)  # which ends a process even while it waits in a library

    def requested_at(self, step: int) -> bool:
        """Whether to stop after this step. All processes ask at every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None
