"""What the environment says of the processes that this one belongs to. Nothing here imports JAX.

A process that is one of several and is not told enough to join them must not train alone: each of them would.
"""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Mapping
from typing import NamedTuple

from tiedjax.errors import UserError

ADDRESS, PROCESSES, PROCESS_ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
SLURM_NEEDS = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
# What MPI launchers say of a process: how many there are, and which it is.
MPI = {
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "an MPI launcher": ("PMI_SIZE", "PMI_RANK"),
}
OPEN_MPI_4 = "OMPI_MCA_orte_hnp_uri"  # in which JAX finds an address; later versions have none


class Told(NamedTuple):
    """What `jax.distributed.initialize` is given; what is None JAX finds out itself."""

    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None


def told(environment: Mapping[str, str] = os.environ) -> Told | None:
    """How to join the other processes; None where this one is alone, as far as the environment says.

    JAX's own variables come first, then an srun of several tasks, an MPI launcher, and a TPU slice. UserError for what
    is incomplete or no number.
    """
    env = {name: value for name, value in environment.items() if value}  # an empty one says nothing
    return _by_name(env) or _slurm(env) or _mpi(env) or _tpu(env)


def _by_name(env: Mapping[str, str]) -> Told | None:
    there = [name for name in (ADDRESS, PROCESSES, PROCESS_ID) if name in env]
    if len(there) == 3:
        found = Told(env[ADDRESS], _number(env, PROCESSES), _number(env, PROCESS_ID))
        _refuse_outside(PROCESS_ID, found.process_id, PROCESSES, found.processes)
        if ":" not in env[ADDRESS]:
            raise UserError(f"{ADDRESS}: must be HOST:PORT, got {env[ADDRESS]!r}")
        return found
    if there and (there != [ADDRESS] or not (_slurm(env) or _mpi(env) or _tpu(env))):
        missing = [name for name in (ADDRESS, PROCESSES, PROCESS_ID) if name not in env]
        raise UserError(f"{there[0]} is set, but not {' and '.join(missing)}; set all three or none")
    return None


def _slurm(env: Mapping[str, str]) -> Told | None:
    """An srun of several tasks; the shell of a batch script is one process, whatever the job asked for."""
    many = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    in_a_step = "SLURM_PROCID" in env and ("SLURM_STEP_NODELIST" in env or env["SLURM_PROCID"] != "0")
    if not in_a_step or (many in env and _number(env, many) == 1):
        return None
    if missing := [name for name in SLURM_NEEDS if name not in env]:
        raise UserError(
            f"{missing[0]}: is not set, but SLURM_PROCID is {env['SLURM_PROCID']}; pass SLURM's variables on whole, or "
            "give --coordinator, --processes and --process-id"
        )
    found = Told(None, _number(env, many), _number(env, "SLURM_PROCID"))
    _refuse_outside("SLURM_PROCID", found.process_id, many, found.processes)
    return found


def _mpi(env: Mapping[str, str]) -> Told | None:
    for launcher, (size, rank) in MPI.items():
        if rank not in env and size not in env:
            continue
        if size in env and _number(env, size) == 1:
            continue
        if missing := [name for name in (size, rank) if name not in env]:
            other = rank if missing == [size] else size
            raise UserError(f"{missing[0]}: is not set, but {other} is; pass both on, or neither")
        found = Told(env.get(ADDRESS), _number(env, size), _number(env, rank))
        _refuse_outside(rank, found.process_id, size, found.processes)
        if found.coordinator is None and not (launcher == "Open MPI" and OPEN_MPI_4 in env):
            raise UserError(
                f"{launcher} began this as process {found.process_id} of {found.processes}, but does not say where "
                f"process 0 runs; set {ADDRESS}=HOST:PORT to its address"
            )
        return found
    return None


def _tpu(env: Mapping[str, str]) -> Told | None:
    return Told() if len(env.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1 or _on_tpu_vm(env) else None


def _on_tpu_vm(env: Mapping[str, str]) -> bool:
    usable = "tpu" in env.get("JAX_PLATFORMS", "tpu") and importlib.util.find_spec("libtpu") is not None
    return usable and any(glob.glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/[0-9]*"))


def _number(env: Mapping[str, str], name: str) -> int:
    if not (env[name].isascii() and env[name].isdigit() and len(env[name]) < 10):
        raise UserError(f"{name}: must be a whole number from 0 on, got {env[name]!r}")
    return int(env[name])


def _refuse_outside(rank: str, process_id: int | None, size: str, processes: int | None) -> None:
    if not 0 <= (process_id or 0) < (processes or 0):
        raise UserError(f"{rank}: must be below {size}, got {process_id} of {processes}")
