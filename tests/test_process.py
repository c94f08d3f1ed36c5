"""Who is recognised as one of many processes, and how a process is asked to stop."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import jax
import pytest
from programs import finish, start

from tiedjax import study
from tiedjax.config_files import packaged_configs
from tiedjax.errors import NotFiniteError, NotJoinedError, TrainingError, UserError
from tiedjax.host import launched, process, signals
from tiedjax.plan import load_study

Joined = list[tuple[Any, ...]]


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Joined:
    """The arguments of every call of jax.distributed.initialize, which does nothing; and no launcher around."""
    calls: Joined = []
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TPU_", "OMPI_", "PMI_", "JAX_COORD", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
    return calls


def test_one_process_joins_nothing(joined: Joined) -> None:
    process.join_cluster(None, None, None)
    assert joined == []


def test_flags_are_passed_on(joined: Joined) -> None:
    process.join_cluster("host:1234", 4, 3)
    assert joined == [("host:1234", 4, 3)]


SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
JAX_OWN = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
HNP = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
ADDRESS = {"JAX_COORDINATOR_ADDRESS": "host:1"}


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        (SRUN, (None, 2, 1)),
        ({**SRUN, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"}, (None, 2, 1)),  # of a job of more than this step
        ({**SRUN, "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),  # srun --pty bash
        ({**SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "2"}, None),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}, None),  # sbatch
        ({"SLURM_PROCID": "", "SLURM_NTASKS": ""}, None),
        ({**SRUN, **ADDRESS}, (None, 2, 1)),  # the address JAX reads itself
        (JAX_OWN, ("host:1", 3, 2)),
        ({**SRUN, **OPEN_MPI, **JAX_OWN}, ("host:1", 3, 2)),
        ({**OPEN_MPI, **HNP}, (None, 4, 3)),
        ({**OPEN_MPI, **ADDRESS}, ("host:1", 4, 3)),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        ({"PMI_SIZE": "2", "PMI_RANK": "0", **ADDRESS}, ("host:1", 2, 0)),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, (None, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ],
)
def test_launchers_are_recognised(
    joined: Joined, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], told: tuple[Any, ...] | None
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    process.join_cluster(None, None, None)
    assert joined == ([] if told is None else [told])
    process.join_cluster("host:1", 2, 0)
    assert joined[-1] == ("host:1", 2, 0), "explicit flags win"


WHOLE = "pass SLURM's variables on whole, or give --coordinator, --processes and --process-id"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {**SRUN, "SLURM_LOCALID": ""},
            f"SLURM_LOCALID: is not set, but SLURM_PROCID is 1; {WHOLE}",
        ),
        ({"SLURM_PROCID": "1"}, f"SLURM_JOB_ID: is not set, but SLURM_PROCID is 1; {WHOLE}"),
        ({**SRUN, "SLURM_NTASKS": "2(x3)"}, "SLURM_NTASKS: must be a whole number from 0 on, got '2(x3)'"),
        ({**SRUN, "SLURM_PROCID": "2"}, "SLURM_PROCID: must be below SLURM_NTASKS, got 2 of 2"),
        (
            ADDRESS,
            "JAX_COORDINATOR_ADDRESS is set, but not JAX_NUM_PROCESSES and JAX_PROCESS_ID; set all three or none",
        ),
        (
            {**SRUN, "JAX_PROCESS_ID": "1"},
            "JAX_PROCESS_ID is set, but not JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES; set all three or none",
        ),
        ({**JAX_OWN, "JAX_PROCESS_ID": "3"}, "JAX_PROCESS_ID: must be below JAX_NUM_PROCESSES, got 3 of 3"),
        (
            {**JAX_OWN, "JAX_COORDINATOR_ADDRESS": "host"},
            "JAX_COORDINATOR_ADDRESS: must be HOST:PORT, got 'host'",
        ),
        (
            OPEN_MPI,
            "Open MPI began this as process 3 of 4, but does not say where process 0 runs; set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT to its address",
        ),
        (
            {"PMI_SIZE": "2", "PMI_RANK": "1"},
            "an MPI launcher began this as process 1 of 2, but does not say where process 0 runs; set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT to its address",
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "1"},
            "OMPI_COMM_WORLD_SIZE: is not set, but OMPI_COMM_WORLD_RANK is; pass both on, or neither",
        ),
    ],
)
def test_one_of_many_that_is_not_told_enough_does_not_run_alone(
    joined: Joined, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        process.join_cluster(None, None, None)
    assert (str(caught.value), joined) == (message, [])


@pytest.mark.parametrize(("platforms", "many"), [("", True), ("tpu,cpu", True), ("cpu", False)])
def test_a_tpu_vm_is_recognised_by_its_devices(
    joined: Joined, monkeypatch: pytest.MonkeyPatch, platforms: str, many: bool
) -> None:
    monkeypatch.setattr(launched.importlib.util, "find_spec", lambda name: object() if name == "libtpu" else None)
    monkeypatch.setattr(launched.glob, "glob", lambda pattern: ["/dev/accel0"] if pattern == "/dev/accel*" else [])
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    if not platforms:
        monkeypatch.delenv("JAX_PLATFORMS")
    process.join_cluster(None, None, None)
    assert joined == ([(None, None, None)] if many else [])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *(
            (flags, "--coordinator HOST:PORT, --processes N and --process-id I belong together; give all three or none")
            for flags in (("host:1", None, None), (None, 2, 0), ("host:1", 2, None), ("host:1", None, 0))
        ),
        (("host:1", 0, 0), "--processes: must be at least 1, got 0"),
        (("host:1", 3, 3), "--process-id: must be from 0 to 2 (--processes 3), got 3"),
        (("host:1", 3, -1), "--process-id: must be from 0 to 2 (--processes 3), got -1"),
        (("host", 2, 0), "--coordinator: must be HOST:PORT, got 'host'"),
    ],
)
def test_flags_that_cannot_work_are_refused(joined: Joined, flags: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        process.join_cluster(*flags)
    assert str(caught.value) == message
    assert joined == []


def test_a_coordinator_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("DEADLINE_EXCEEDED: nobody there\nand a long explanation")

    monkeypatch.setattr(jax.distributed, "initialize", fails)
    with pytest.raises(NotJoinedError) as caught:
        process.join_cluster("host:1", 2, 1)
    assert str(caught.value) == "cannot join the cluster: DEADLINE_EXCEEDED: nobody there"
    assert caught.value.status == 76, "launchers start it again"


def test_what_was_compiled_is_kept_where_jax_was_not_told_to_already(tmp_path: Path) -> None:
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        process.keep_compiled(tmp_path / "ours")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "ours")
        jax.config.update("jax_compilation_cache_dir", "theirs")
        process.keep_compiled(tmp_path / "ours")
        assert jax.config.jax_compilation_cache_dir == "theirs"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


# ---- How processes end ----


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("a bad\n  key"), ("a bad key", 2, True)),
        (TrainingError("step 3: the loss is nan"), ("step 3: the loss is nan", 1, True)),
        (KeyboardInterrupt(), ("interrupted", 130, True)),
        (OSError(28, "No space left on device"), ("OSError: [Errno 28] No space left on device", 1, False)),
        (ValueError("one\ntwo"), ("ValueError: one", 1, False)),
        (AssertionError(), ("AssertionError", 1, False)),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB.\nmore"),
            ("RESOURCE_EXHAUSTED: 9 GiB. Try a larger mesh or more data.microbatches.", 1, True),
        ),
    ],
)
def test_why_a_process_ends_is_one_line_and_a_status(error: BaseException, expected: tuple[str, int, bool]) -> None:
    assert process.cause(error) == expected


def test_what_ended_the_work_is_raised_and_what_closing_finds_wrong_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    class Saves:
        def close(self) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(NotFiniteError, match="step 3"), process.closing(Saves()):
        raise NotFiniteError("step 3: the loss is nan")
    assert capsys.readouterr().out == "a save failed too: OSError: [Errno 28] No space left on device\n"
    with pytest.raises(OSError, match="No space"), process.closing(Saves()):
        pass


@pytest.fixture
def cluster_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 0 of two, the other of which sees whatever this one sees."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(process, "_from_main", lambda message: message)
    monkeypatch.setattr(process, "_gathered", lambda seen: [seen, seen])


@pytest.mark.usefixtures("cluster_of_two")
def test_a_shared_folder_is_made_and_nothing_left_in_it(tmp_path: Path) -> None:
    process.refuse_unshared(tmp_path / "new" / "run")
    assert list(tmp_path.rglob("*")) == [tmp_path / "new", tmp_path / "new" / "run"]


@pytest.mark.usefixtures("cluster_of_two")
def test_a_folder_that_is_not_shared_is_refused_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_gathered", lambda seen: [seen, False])
    (tmp_path / "old").mkdir()
    for folder in (tmp_path / "old", tmp_path / "new" / "run"):
        with pytest.raises(UserError) as caught:
            process.refuse_unshared(folder)
        assert str(caught.value) == (
            f"{folder}: --out must name one folder that all processes share; "
            "process 1 does not see what process 0 wrote there"
        )
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]


@pytest.mark.usefixtures("cluster_of_two")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        process.refuse_unshared(tmp_path / "file")
    assert str(caught.value) == f"{tmp_path}/file: cannot be written: File exists"


def test_a_file_may_appear_a_little_later_as_on_a_network_disk(tmp_path: Path) -> None:
    threading.Timer(0.4, (tmp_path / "late").touch).start()
    assert process._appears(tmp_path / "late")
    began = time.monotonic()
    assert not process._appears(tmp_path / "never")
    assert time.monotonic() - began < 4


def test_a_study_asks_for_one_folder_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise UserError(str(folder))

    monkeypatch.setattr(process, "refuse_unshared", refuse)
    with pytest.raises(UserError, match="study"):
        study.run_study(load_study(packaged_configs("study")["quick"]), tmp_path / "study")
    assert list(tmp_path.iterdir()) == []


# ---- Requests to stop ----


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_from_listening_on_a_signal_is_a_request_and_what_was_before_comes_back(number: signal.Signals) -> None:
    def before(*_: Any) -> None:
        heard.append(1)

    heard: list[int] = []
    outside = signal.signal(number, before)
    try:
        with process.Requests() as stop:
            os.kill(os.getpid(), number)
            assert heard == [1]
            stop.listen()
            assert not stop.stops()
            os.kill(os.getpid(), number)
            assert stop.stops()
            assert stop.signal == number
        assert heard == [1]
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, outside)


def test_a_signal_that_comes_after_the_last_step_is_not_lost() -> None:
    with process.Requests() as stop:
        stop.listen()
        assert not stop.stops()
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.signal == signal.SIGUSR1


@pytest.mark.usefixtures("cluster_of_two")
def test_processes_that_cannot_agree_on_a_moment_do_not_save() -> None:
    with process.Requests() as stop:
        stop.listen()
        assert not stop.stops()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(signals.Stopped):
            stop.stops()


def faults_of_a_freed_block(mebibytes: int, threads: int) -> int:
    """Page faults of a second thread that takes and fills a block of this size eight times more after the first."""
    program = f"""
import ctypes, resource, threading
from tiedjax.host.process import keep_freed_memory
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, size = ctypes.c_void_p, {mebibytes} << 20
def fill():
    block = libc.malloc(ctypes.c_size_t(size))
    ctypes.memset(block, 1, size)
    libc.free(ctypes.c_void_p(block))
def fill_often():
    libc.malloc(ctypes.c_size_t(30 << 20))  # beside it no second block fits into the thread's first heap
    fill()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        fill()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=fill_often)
thread.start()
thread.join()
"""
    output, _ = finish(start(["-c", program], NPROC=str(threads)), seconds=60)
    return int(output)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another allocator than glibc's")
@pytest.mark.parametrize(("mebibytes", "threads"), [(40, 1), (40, 2), (100, 1)])
def test_a_thread_that_computes_gets_the_memory_again_that_it_freed(mebibytes: int, threads: int) -> None:
    assert faults_of_a_freed_block(mebibytes, threads) < mebibytes << 8  # pages of one block of eight
