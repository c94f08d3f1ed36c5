"""Two real processes are one run."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from launching import end_what_was_started, launch
from programs import finish, start, until
from runs import STEPS, arguments, assert_same_run, rows, write_text

import tiedjax


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test() -> Iterator[None]:
    yield
    end_what_was_started()


# ---- Joining by what the environment says ----

JOINS = """
import jax
from tiedjax.host import process
process.join_cluster(None, None, None)
print(jax.process_index(), jax.process_count(), len(jax.devices()))
process.part_from_cluster_if_any()
"""


def announced(launcher: str, port: int, number: int) -> dict[str, str]:
    """What a launcher sets in the environment of this of two processes; JAX makes a port of a job's number."""
    return {
        "JAX": {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(number),
        },
        "SLURM": {
            "SLURM_JOB_ID": str(port),
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(number),
            "SLURM_LOCALID": str(number),
        },
        "Open MPI 4": {
            "OMPI_MCA_orte_hnp_uri": f"{port * 2**12}.0;tcp://127.0.0.1:1",
            **{f"OMPI_COMM_WORLD_{name}": str(number) for name in ("RANK", "LOCAL_RANK")},
            "OMPI_COMM_WORLD_SIZE": "2",
        },
        "Open MPI 5": {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "OMPI_COMM_WORLD_RANK": str(number),
            "OMPI_COMM_WORLD_SIZE": "2",
        },
    }[launcher]


@pytest.mark.parametrize("launcher", ["JAX", "SLURM", "Open MPI 4", "Open MPI 5"])
def test_processes_join_by_their_environment(launcher: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [start(["-c", JOINS], **announced(launcher, port, number)) for number in range(2)]
    assert [finish(each, seconds=60)[0].split()[-3:] for each in processes] == [["0", "2", "2"], ["1", "2", "2"]]


# ---- A run of two processes ----


def test_two_processes_are_the_run_of_one(finished: Path, text: Path, tmp_path: Path) -> None:
    """Parameters cut over both processes, two devices each: every line and parameter agrees to 1e-5."""
    out = tmp_path / "run"
    argv = arguments(out, text, {"mesh.fsdp": 4})[1:]
    stdout, stderr = finish(launch("local.sh", 2, *argv, devices=2))
    assert f"run  {STEPS}/{STEPS}" in stdout
    assert f"  {STEPS}/{STEPS}" not in stderr  # process 1 leaves speaking to process 0
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in finished.iterdir())
    assert [p.name for p in (out / "checkpoints").iterdir()] == [str(STEPS)]
    two, one = tiedjax.load_run(out), tiedjax.load_run(finished)
    assert two.snapshot_steps == one.snapshot_steps
    assert two.metrics.keys() == one.metrics.keys()
    for name in two.metrics.keys() - {"tokens_per_second"}:
        # Where two role gradients cancel, Adam divides both by nearly 0: rounding grows with what it makes of them.
        rtol = 1e-3 if "update" in name or "change" in name or name.startswith("m_") else 1e-5
        np.testing.assert_allclose(two.metrics[name], one.metrics[name], rtol=rtol, atol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), two.params(), one.params())
    np.testing.assert_array_equal(two.tables(0).input, one.tables(0).input)
    np.testing.assert_array_equal(two.token_counts, one.token_counts)


MANY = """
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tiedjax.checkpoint import fingerprints
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
full = np.arange(512, dtype=np.float32).reshape(64, 8)
for part in (PartitionSpec("fsdp"), PartitionSpec()):
    cut = jax.make_array_from_callback(full.shape, NamedSharding(mesh, part), lambda index: full[index])
    for _ in range(20):
        sums = fingerprints([cut + i for i in range(60)])
    print(sums == fingerprints([full + np.float32(i) for i in range(60)]))
"""


def test_fingerprints_of_many_arrays_do_not_wait_for_one_another() -> None:
    """More of them than XLA lets be under way, over two devices of each of two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = [start(["-c", MANY, address, str(number)], devices=2) for number in range(2)]
    assert [finish(process, seconds=60)[0].split()[-2:] for process in processes] == [["True", "True"]] * 2


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes(finished: Path, text: Path, tmp_path: Path) -> None:
    """1, 2, 4 and again 1, over which parameters are cut: the run of one process up to rounding, no line twice."""
    out = tmp_path / "run"
    for processes, step in ((1, 2), (2, 4), (4, 6), (1, STEPS)):
        changes = {"mesh.fsdp": processes, "train.stop_at": step}
        finish(launch("local.sh", processes, *arguments(out, text, changes)[1:]))
    assert [row["step"] for row in rows(out)] == list(range(1, STEPS + 1))
    many, one = tiedjax.load_run(out), tiedjax.load_run(finished)
    assert many.snapshot_steps == one.snapshot_steps
    np.testing.assert_allclose(many.metrics["loss"], one.metrics["loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), many.params(), one.params())


def test_sigterm_stops_both_processes_at_one_step_and_the_run_continues(text: Path, tmp_path: Path) -> None:
    changes = {"train.steps": 100_000, "train.snapshot_every": 100_000, "train.eval_batches": 1}
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = launch("local.sh", 2, *arguments(stopped, text, changes)[1:])
    until(lambda: (stopped / "metrics.jsonl").exists() and len(rows_so_far(stopped)) >= 5, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = finish(process, status=75)
    assert stderr.count("stopped by SIGTERM; the same command continues") == 2
    (step,) = (int(p.name) for p in (stopped / "checkpoints").iterdir())
    assert [row["step"] for row in rows(stopped)] == list(range(1, step + 1))
    last = {**changes, "train.stop_at": step + 3}
    finish(launch("local.sh", 2, *arguments(stopped, text, last)[1:]))
    finish(launch("local.sh", 2, *arguments(whole, text, last)[1:]))
    assert_same_run(stopped, whole, step + 3)


def rows_so_far(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def test_processes_with_different_data_are_refused(text: Path, tmp_path: Path) -> None:
    """Each host prepares its own copy: another one on one of them would change the batches without a word."""
    other = write_text(tmp_path / "other.jsonl", seed=7)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = []
    for i, source in enumerate([text, other]):
        flags = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id", str(i)]
        both.append(start(["-m", "tiedjax", *arguments(tmp_path / "run", source), *flags]))
    try:
        errors = [process.communicate(timeout=120)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    refusals = {
        f"data.source: text:{source}: the processes have prepared different data (other files, another Python?); "
        "prepare it once and give all of them prepared:DIR"
        for source in (text, other)
    }
    # Whichever notices first speaks for itself, and the other may pass on what it said.
    last = [re.sub(r"^tiedjax: (process \d failed: )?", "", error.splitlines()[-1]) for error in errors]
    assert set(last) <= refusals
    assert all(process.returncode for process in both)
    assert not (tmp_path / "run" / "config.yaml").exists()
