"""The launchers start, stop, end and start again exactly what they should: with stand-ins for tiedjax and the clouds.

Nothing here trains, and no cloud is reached: `gcloud`, `kubectl`, `srun`, `scontrol`, `sbatch` and `sky` are programs
that note their arguments and play what a test wants of them. Two processes that train are in test_cluster.py.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import LAUNCH, end_what_was_started, launch
from programs import REPOSITORY, TESTS, finish, until
from ruamel.yaml import YAML

GOLDEN = TESTS / "launchers"
AGAIN, NEVER = [75, 76], [1, 2, 77, 78, 79]  # exit statuses of tiedjax after which the same command may succeed
SCRIPTS = sorted(LAUNCH.glob("*.s*h"))
DRY = {
    "local.txt": ["local.sh", "--restarts", "3", "2", "a config.yaml", "--out", "/mnt/a b", "--dry-run"],
    "slurm.txt": ["slurm.sbatch", "--dry-run", "--requeues", "3", "configs/tiny.yaml", "--out", "/mnt/a b"],
    "tpu_vm_create.txt": ["tpu_vm.sh", "create", "--dry-run", "--spot", "pod", "us-east5-a", "v6e-16"],
    "tpu_vm_run.txt": ["tpu_vm.sh", "run", "pod", "us-east5-a", "c.yaml", "--out", "/mnt/a b", "--dry-run"],
    "tpu_vm_attach.txt": ["tpu_vm.sh", "attach", "--dry-run", "pod", "us-east5-a"],
    "tpu_vm_status.txt": ["tpu_vm.sh", "status", "--dry-run", "pod", "us-east5-a"],
    "tpu_vm_stop.txt": ["tpu_vm.sh", "stop", "--dry-run", "pod", "us-east5-a"],
    "tpu_vm_delete.txt": ["tpu_vm.sh", "delete", "--dry-run", "pod", "us-east5-a"],
    "tpu_vm_keep.txt": ["tpu_vm.sh", "keep", "--spot", "--runtime", "tpu-x", "pod", "z", "v9-8", "c.yaml", "--dry-run"],
    "gke_tpu.yaml": [
        *("gke.sh", "--dry-run", "--image", "eu.io/p/tiedjax:1", "--claim", "disk", "--tpu", "tpu-v5p-slice:4x4x4"),
        *("--slices", "2", "--spot", "olmo", "study", "configs/studies/olmo_1b.yaml", "--out", "/runs/it's $(1) $2"),
    ],
    "gke_store.yaml": [
        *("gke.sh", "--dry-run", "--image", "eu.io/p/tiedjax:1", "--tpu", "tpu-v5-lite-podslice:2x4"),
        *("tiny", "configs/tiny.yaml", "--out", "gs://bucket/tiny"),
    ],
    "gke_gpu.yaml": [
        *("gke.sh", "--image", "eu.io/p/tiedjax:1", "--claim", "disk", "--gpu", "nvidia-h100-80gb:8", "--workers", "2"),
        *("--restarts", "7", "olmo", "configs/olmo_1b.yaml", "--out", "/runs/olmo", "--dry-run"),
    ],
}


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test() -> Iterator[None]:
    yield
    end_what_was_started()


def program(path: Path, body: str, interpreter: str = "/usr/bin/env bash") -> Path:
    """A program at `path`; returns its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{interpreter}\n{body}\n")
    path.chmod(0o755)
    return path.parent


def noting(folder: Path, name: str, body: str = "") -> Path:
    """A program that adds the line of its call to `folder`/calls before it does `body`; returns its folder."""
    note = f"""{{ printf '%q ' {name} "$@"; echo; }} >> "{folder}/calls\""""
    return program(folder / "bin" / name, f"{note}\n{body}")


def calls(folder: Path) -> list[list[str]]:
    return [shlex.split(line) for line in (folder / "calls").read_text().splitlines()]


# ---- What every launcher promises ----


@pytest.mark.parametrize("golden", DRY)
def test_a_dry_run_prints_what_it_printed_before(golden: str, tmp_path: Path) -> None:
    """With nothing on the PATH but `dirname`: no cloud's tool is called."""
    (tmp_path / "dirname").symlink_to(shutil.which("dirname") or "")
    script, *args = DRY[golden]
    stdout, stderr = finish(launch(script, *args, PATH=str(tmp_path)))
    assert stderr == ""
    printed = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", stdout.replace(str(REPOSITORY), "CHECKOUT"))
    assert printed == (GOLDEN / golden).read_text()


def test_every_golden_file_is_compared() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == DRY.keys()


def test_shellcheck_has_nothing_to_say() -> None:
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    tool = shutil.which("shellcheck", path=here)
    assert tool, "shellcheck is part of the extra `test`"
    assert len(SCRIPTS) == 5
    checked = subprocess.run([tool, *SCRIPTS], text=True, capture_output=True)
    assert (checked.returncode, checked.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_can_be_run_as_it_is(script: Path) -> None:
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert script.suffix == ".sbatch" or os.access(script, os.X_OK)


LOCAL = "launch/local.sh [--restarts K] [--dry-run] N [study] CONFIG [ARGS...]"
SLURM = "sbatch launch/slurm.sbatch [--dry-run] [--requeues K] [study] CONFIG [ARGS...]"
TPU = "launch/tpu_vm.sh create | run | attach | status | stop | delete | keep [--dry-run] ..."
TPU_CREATE = "launch/tpu_vm.sh create [--dry-run] [--spot] [--runtime VERSION] NAME ZONE TYPE"
TPU_RUN = "launch/tpu_vm.sh run [--dry-run] NAME ZONE [study] CONFIG [ARGS...]"
TPU_KEEP = (
    "launch/tpu_vm.sh keep [--dry-run] [--spot] [--runtime VERSION] [--restarts K] [--poll SECONDS] "
    "NAME ZONE TYPE [study] CONFIG [ARGS...]"
)
TPU_STOP = "launch/tpu_vm.sh stop [--dry-run] NAME ZONE"
GKE = (
    "launch/gke.sh [--dry-run] --image IMAGE [--claim CLAIM] (--tpu TYPE:TOPOLOGY [--chips N] [--slices N] | "
    "--gpu TYPE:COUNT [--workers N]) [--restarts K] [--spot] NAME [study] CONFIG [ARGS...]"
)
WORKER = "launch/worker.sh start COMMAND [ARGS...] | status | follow | stop | end"
POD = "--image i --claim c --tpu v:2x4"


@pytest.mark.parametrize(
    ("line", "wrong", "usage"),
    [
        ("local.sh", "N and CONFIG are missing", LOCAL),
        ("local.sh 2", "N and CONFIG are missing", LOCAL),
        ("local.sh 2 study --dry-run", "CONFIG is missing", LOCAL),
        ("local.sh c.yaml 2", "N must be a number of processes, got 'c.yaml'", LOCAL),
        ("local.sh 0 c.yaml --dry-run", "N must be a number of processes, got '0'", LOCAL),
        ("local.sh --restarts x 2 c.yaml", "K must be a number of restarts, got 'x'", LOCAL),
        ("local.sh --restarts", "K must be a number of restarts, got ''", LOCAL),
        ("slurm.sbatch --dry-run", "CONFIG is missing", SLURM),
        ("slurm.sbatch --requeues -1 c.yaml", "K must be a number of requeues, got '-1'", SLURM),
        ("slurm.sbatch c.yaml", "submit it with sbatch", SLURM),
        ("tpu_vm.sh", "'' is not a command", TPU),
        ("tpu_vm.sh pod us-east5-a c.yaml", "'pod' is not a command", TPU),
        ("tpu_vm.sh create pod us-east5-a", "one of NAME ZONE TYPE is missing", TPU_CREATE),
        ("tpu_vm.sh create --poll 5 pod z v4-8", "--poll is not an option", TPU_CREATE),
        ("tpu_vm.sh create --runtime", "--runtime is without its value", TPU_CREATE),
        ("tpu_vm.sh create Pod z v4-8", "NAME must be of small letters, digits and hyphens, got 'Pod'", TPU_CREATE),
        (
            "tpu_vm.sh create pod z v9-8",
            "the runtime version of 'v9-8' is not known, give it with --runtime",
            TPU_CREATE,
        ),
        ("tpu_vm.sh run pod us-east5-a", "one of NAME ZONE CONFIG is missing", TPU_RUN),
        ("tpu_vm.sh run pod us-east5-a study", "CONFIG is missing", TPU_RUN),
        ("tpu_vm.sh stop pod us-east5-a now", "'now' is too much", TPU_STOP),
        ("tpu_vm.sh keep --restarts x pod z v4-8 c", "K must be a number of restarts, got 'x'", TPU_KEEP),
        ("tpu_vm.sh keep --poll 0 pod z v4-8 c", "SECONDS must be a number of seconds, got '0'", TPU_KEEP),
        ("gke.sh --claim c --tpu v:2x4 pod c.yaml", "--image must name an image, got ''", GKE),
        ("gke.sh --image i --claim C_ --tpu v:2x4 pod c.yaml", "--claim must name a claim, got 'C_'", GKE),
        ("gke.sh --image i --claim c pod c.yaml", "one of --tpu and --gpu is needed", GKE),
        (f"gke.sh {POD} --gpu h:8 pod c.yaml", "one of --tpu and --gpu is needed", GKE),
        ("gke.sh --image i --claim c --tpu v:8 pod c.yaml", "--tpu must be TYPE:TOPOLOGY, got 'v:8'", GKE),
        ("gke.sh --image i --claim c --gpu h100 pod c.yaml", "--gpu must be TYPE:COUNT, got 'h100'", GKE),
        (f"gke.sh {POD} --chips 3 pod c.yaml", "2x4 is 8 chips, which hosts of 3 do not divide", GKE),
        (f"gke.sh {POD} --chips x pod c.yaml", "--chips must be a number, got 'x'", GKE),
        (f"gke.sh {POD} --workers 2 pod c.yaml", "--workers goes with --gpu", GKE),
        ("gke.sh --image i --claim c --gpu h:8 --slices 2 pod c", "--chips and --slices go with --tpu", GKE),
        (f"gke.sh {POD} --restarts x pod c.yaml", "K must be a number of restarts, got 'x'", GKE),
        (f"gke.sh {POD} --zone z pod c.yaml", "--zone is not an option", GKE),
        ("gke.sh --image", "--image is without its value", GKE),
        (f"gke.sh {POD} pod", "NAME and CONFIG are needed", GKE),
        (f"gke.sh {POD} pod study", "CONFIG is missing", GKE),
        (f"gke.sh {POD} c.yaml x", "NAME must be of at most 40 small letters, digits and hyphens, got 'c.yaml'", GKE),
        (f"gke.sh {POD} pod c.yaml 'a\nb'", "an argument has a line break or another control character", GKE),
        ("worker.sh", "'' is not a command", WORKER),
        ("worker.sh start", "COMMAND is missing", WORKER),
        ("worker.sh follow", "nothing was started here", WORKER),
    ],
)
def test_a_launcher_that_is_called_wrongly_says_so_in_one_line(line: str, wrong: str, usage: str) -> None:
    script, *args = shlex.split(line)
    stdout, stderr = finish(launch(script, *args, SLURM_JOB_ID=""), status=2)
    assert stdout == ""
    assert stderr == f"launch/{script}: {wrong}; usage: {usage}\n"


STUDIES = [
    ("local.sh", ["2"]),
    ("slurm.sbatch", []),
    ("tpu_vm.sh", ["run", "pod", "us-east5-a"]),
    ("tpu_vm.sh", ["keep", "pod", "us-east5-a", "v4-8"]),
    ("gke.sh", [*POD.split(), "pod"]),
]


@pytest.mark.parametrize(("script", "before"), STUDIES)
def test_every_launcher_runs_studies_too(script: str, before: list[str]) -> None:
    stdout, _ = finish(launch(script, *before, "study", "configs/studies/quick.yaml", "--dry-run"))
    words = re.sub(r"[\\'-]|\s+", " ", stdout).split()
    assert words[words.index("study") + 1] == "configs/studies/quick.yaml"
    assert "train" not in words


@pytest.mark.parametrize(("script", "before"), STUDIES)
def test_a_launcher_passes_on_the_address_of_a_run_in_a_store(script: str, before: list[str]) -> None:
    stdout, _ = finish(launch(script, *before, "configs/tiny.yaml", "--out", "gs://bucket/run", "--dry-run"))
    words = re.sub(r"[\\'-]|\s+", " ", stdout).split()
    assert words[words.index("out") + 1] == "gs://bucket/run"


# ---- One machine ----


def stand_in(folder: Path, body: str) -> Path:
    """A folder with a `tiedjax`; its `note` writes its pid to pid-I, I being its --process-id (its last argument)."""
    note = f'for last; do :; done\nnote() {{ echo $$ > "{folder}/pid-$last"; }}'
    return program(folder / "bin" / "tiedjax", f"{note}\n{body}")


def pids(folder: Path) -> list[int]:
    return [int(text) for path in sorted(folder.glob("pid-*")) if (text := path.read_text().strip())]


def state(pid: int) -> str | None:
    """The letter of the state of a process, None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0]
    except FileNotFoundError:
        return None


def alive(pid: int) -> bool:
    return state(pid) is not None


def test_the_first_failure_ends_the_others_and_is_passed_on(tmp_path: Path) -> None:
    fails = f"until [[ -s {tmp_path}/pid-0 && -s {tmp_path}/pid-2 ]]; do sleep 0.05; done; echo broken >&2; exit 7"
    waits = "sleep 600 & child=$!; trap 'kill $child; exit 75' TERM; note; wait"
    folder = stand_in(tmp_path, f"if ((last == 1)); then note; {fails}; fi\n{waits}")
    process = launch("local.sh", 3, "config.yaml", path=folder)
    _, stderr = finish(process, seconds=60, status=7)
    assert "[1] broken" in stderr
    assert not any(alive(pid) for pid in pids(tmp_path))


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_reaches_every_process_once_and_nothing_starts_again(tmp_path: Path, number: signal.Signals) -> None:
    """As a terminal does it: Ctrl-C goes to the whole process group; the others to the launcher alone."""
    body = "sleep 600 & child=$!\ntrap 'echo asked; kill $child; exit 75' TERM\necho ready; note\nwait"
    process = launch("local.sh", "--restarts", 3, 2, "config.yaml", path=stand_in(tmp_path, body))
    until(lambda: len(pids(tmp_path)) == 2, process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    stdout, stderr = finish(process, seconds=60, status=75)
    assert stdout.splitlines() == ["ready", "asked"]
    assert stderr.splitlines() == ["[1] ready", "[1] asked"]
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_a_second_signal_kills(tmp_path: Path) -> None:
    body = "trap '' TERM; note; while :; do sleep 0.05; done"
    process = launch("local.sh", "--restarts", 3, 2, "c.yaml", path=stand_in(tmp_path, body))
    until(lambda: len(pids(tmp_path)) == 2, process)
    for number in (signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
        time.sleep(0.3)
    _, stderr = finish(process, seconds=60, status=128 + signal.SIGKILL)
    assert "restart" not in stderr
    assert not any(alive(pid) for pid in pids(tmp_path))


KILLED = [128 + number for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)]


def counting_starts(folder: Path, statuses: list[int]) -> Path:
    """A stand-in whose process 1 ends its start number i with the i-th status, the last one for ever after."""
    ends = "\n".join(f"  {i}) end {status} ;;" for i, status in enumerate(statuses[:-1], 1))
    end = 'end() { ((${1} <= 128)) || kill -s "$((${1} - 128))" $$; exit "$1"; }'
    starts = f'echo >> "{folder}/starts-$last"; n=$(wc -l < "{folder}/starts-$last")'
    rest = "sleep 600 & child=$!; trap 'kill $child; exit 75' TERM; wait"
    body = f"{end}\n{starts}\nif ((last == 0 && {int(statuses[-1] > 0)})); then {rest}; fi"
    return stand_in(folder, f"{body}\n((last)) || end 0\ncase $n in\n{ends}\n  *) end {statuses[-1]} ;;\nesac")


def starts(folder: Path) -> list[int]:
    return [len(path.read_text().splitlines()) for path in sorted(folder.glob("starts-*"))]


@pytest.mark.parametrize("status", [*AGAIN, *KILLED])
def test_all_start_again_as_often_as_allowed(tmp_path: Path, status: int) -> None:
    process = launch("local.sh", "--restarts", 2, 2, "c.yaml", path=counting_starts(tmp_path, [status]))
    _, stderr = finish(process, seconds=60, status=status)
    assert [line for line in stderr.splitlines() if line.startswith("launch/")] == [
        f"launch/local.sh: exit status {status}; restart 1 of 2",
        f"launch/local.sh: exit status {status}; restart 2 of 2",
    ]
    assert starts(tmp_path) == [3, 3]


@pytest.mark.parametrize("status", [0, *NEVER])
def test_nothing_starts_again_after_any_other_status(tmp_path: Path, status: int) -> None:
    process = launch("local.sh", "--restarts", 2, 2, "c.yaml", path=counting_starts(tmp_path, [status]))
    _, stderr = finish(process, seconds=60, status=status)
    assert "restart" not in stderr
    assert starts(tmp_path) == [1, 1]


def test_without_the_option_nothing_starts_again(tmp_path: Path) -> None:
    finish(launch("local.sh", 2, "c.yaml", path=counting_starts(tmp_path, [76])), seconds=60, status=76)
    assert starts(tmp_path) == [1, 1]


def test_a_run_that_is_done_after_a_restart_is_done(tmp_path: Path) -> None:
    body = f'echo >> "{tmp_path}/starts-$last"\n(($(wc -l < "{tmp_path}/starts-$last") > 1)) || exit 76'
    _, stderr = finish(launch("local.sh", "--restarts", 5, 2, "c.yaml", path=stand_in(tmp_path, body)), seconds=60)
    assert stderr == "launch/local.sh: exit status 76; restart 1 of 5\n"
    assert starts(tmp_path) == [2, 2]


def test_a_killed_process_is_the_cause_of_what_fails_with_it(tmp_path: Path) -> None:
    """Process 0 notices at once that process 1 was killed, and fails with an exit status of its own."""
    first = (
        f"until [[ -s {tmp_path}/pid-1 ]]; do sleep 0.01; done; while kill -0 $(<{tmp_path}/pid-1); do :; done; exit 1"
    )
    body = f"note; if ((last == 0)); then {first}; fi; sleep 0.3; kill -s KILL $$"
    process = launch("local.sh", 2, "c.yaml", path=stand_in(tmp_path, body))
    finish(process, seconds=60, status=128 + signal.SIGKILL)


def test_a_stopped_process_is_killed_only_once_another_has_failed(tmp_path: Path) -> None:
    """As SIGSTOP or a debugger leaves it: it cannot hear that it is to end. The failure is what is passed on."""
    waits = f"until [[ -e {tmp_path}/fail ]]; do sleep 0.05; done"
    body = f"note; if ((last)); then kill -s STOP $$; else {waits}; fi; exit 76"
    process = launch("local.sh", 2, "c.yaml", path=stand_in(tmp_path, body))
    until(lambda: len(pids(tmp_path)) == 2 and state(pids(tmp_path)[1]) == "T", process)
    time.sleep(6)  # longer than a stopped process is spared
    assert state(pids(tmp_path)[1]) == "T"
    (tmp_path / "fail").touch()
    began = time.monotonic()
    finish(process, seconds=30, status=76)
    assert 4 < time.monotonic() - began < 12
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_local_runs_what_its_dry_run_prints(tmp_path: Path) -> None:
    args = ["2", "a config.yaml", "--train.steps", "3", "--data.source", "text:*.txt"]
    stdout, _ = finish(launch("local.sh", "--dry-run", *args))
    printed = [shlex.split(line) for line in stdout.splitlines()]
    body = f'printf "%s\\n" "$@" > "{tmp_path}/args-$last"'
    finish(launch("local.sh", *args, path=stand_in(tmp_path, body)))
    assert len(printed) == 2
    for i, command in enumerate(printed):
        at = command.index("--coordinator") + 1
        assert command[:2] == ["tiedjax", "train"]
        assert command[2:at] == [*args[1:], "--coordinator"]
        assert command[at].startswith("127.0.0.1:")
        assert command[at + 1 :] == ["--processes", "2", "--process-id", str(i)]
        ran = (tmp_path / f"args-{i}").read_text().splitlines()
        assert [*ran[: at - 1], *ran[at:]] == [*command[1:at], *command[at + 1 :]]
    assert printed[0][at] == printed[1][at]


# ---- SLURM ----


def slurm(folder: Path, statuses: list[int | str], args: list[str], status: int) -> str:
    """What a job prints. `sbatch` runs it until it ends without being queued again; its i-th `srun` ends with the i-th
    status, or with the failure of a node, which kills the job's shell and queues the job again if it has --requeue.
    """
    noting(folder, "scontrol", f'[[ $1 == requeue && $2 == 7 ]] && touch "{folder}/queued"')
    fails = "kill -s KILL $PPID"
    cases = "\n".join(f"  {i}) {fails if end == 'node' else f'exit {end}'} ;;" for i, end in enumerate(statuses))
    noting(folder, "srun", f"case ${{SLURM_RESTART_COUNT:-0}} in\n{cases}\nesac")
    sbatch = f"""
export SLURM_JOB_ID=7
for ((count = 0; ; )); do
  bash "$@" && status=0 || status=$?
  if ((status == 137)) && grep -q '^#SBATCH --requeue$' "$1"; then touch "{folder}/queued"; fi
  [[ -e {folder}/queued ]] || exit $status
  rm "{folder}/queued"
  export SLURM_RESTART_COUNT=$((count += 1))
done"""
    path = program(folder / "bin" / "sbatch", sbatch)
    child = {**os.environ, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    child.pop("SLURM_RESTART_COUNT", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = ["sbatch", str(LAUNCH / "slurm.sbatch"), *args]
    process = subprocess.Popen(command, env=child, cwd=REPOSITORY, text=True, executable=path / "sbatch", **pipes)
    return finish(process, seconds=60, status=status)[0]


@pytest.mark.parametrize("status", AGAIN)
def test_a_job_that_may_succeed_is_queued_again(tmp_path: Path, status: int) -> None:
    stdout = slurm(tmp_path, [status, 0], ["c.yaml", "--out", "a b"], 0)
    assert stdout == f"exit status {status}; job 7 is queued again\n"
    step = ["srun", "--wait=60", "--label", "tiedjax", "train", "c.yaml", "--out", "a b"]
    assert calls(tmp_path) == [step, ["scontrol", "requeue", "7"], step]


@pytest.mark.parametrize("status", [0, *NEVER, 137, 143])
def test_any_other_job_is_not(tmp_path: Path, status: int) -> None:
    (tmp_path / "bin").mkdir()
    noting(tmp_path, "scontrol", "exit 1")
    noting(tmp_path, "srun", f"exit {status}")
    process = launch("slurm.sbatch", "c.yaml", path=tmp_path / "bin", SLURM_JOB_ID="7")
    assert finish(process, status=status) == ("", "")
    assert [call[0] for call in calls(tmp_path)] == ["srun"]


def test_a_job_that_stalls_for_ever_ends(tmp_path: Path) -> None:
    stdout = slurm(tmp_path, [76] * 9, ["--requeues", "2", "c.yaml"], 76)
    again = "exit status 76; job 7 is queued again\n"
    assert stdout == f"{again}{again}exit status 76; job 7 has been queued again 2 times and ends\n"
    assert sum(call[0] == "scontrol" for call in calls(tmp_path)) == 2


def test_slurm_itself_queues_a_job_again_that_lost_a_node(tmp_path: Path) -> None:
    assert slurm(tmp_path, ["node", 0], ["c.yaml"], 0) == ""
    assert [call[0] for call in calls(tmp_path)] == ["srun", "srun"]


def test_slurm_asks_the_processes_to_stop_and_not_the_shell() -> None:
    """With B: the shell would be asked. TERM would have SLURM take the step for cancelled, exit statuses and all."""
    directives = re.findall(r"^#SBATCH (.+)$", (LAUNCH / "slurm.sbatch").read_text(), flags=re.M)
    assert [line for line in directives if line.startswith("--signal")] == ["--signal=USR1@300"]
    assert {"--requeue", "--open-mode=append"} <= set(directives)


# ---- A slice of TPUs ----


def gcloud(folder: Path, states: list[str], looks: list[str], status: int = 0) -> Path:
    """A `gcloud` whose slice has these states in turn and whose workers these processes, with `|` between workers.

    The last of each stays; `failure` is a call that fails. All others end with `status`. `sleep` takes no time.
    """
    (folder / "states").write_text("".join(f"{line}\n" for line in states))
    (folder / "looks").write_text("".join(f"{line}\n" for line in looks))
    body = f"""
set -o pipefail
next() {{ # the first line of a file, which goes unless it is the last
  local line; line=$(head -n 1 "{folder}/$1")
  (($(wc -l < "{folder}/$1") == 1)) || sed -i 1d "{folder}/$1"
  [[ $line != failure ]] || exit 1
  [[ -z $line ]] || tr '|' '\\n' <<< "$line"
}}
case $* in
  *"queued-resources list"*) next states ;;
  *"worker.sh status"*) next looks | sed 's/^/status: /' ;;
esac"""
    noting(folder, "gcloud", f"{body} || exit 1\nexit {status}")
    program(folder / "bin" / "git", "exit 0")
    return program(folder / "bin" / "sleep", "exit 0")


KEEP = ["keep", "--spot", "pod", "us-east5-a", "v5p-16", "c.yaml", "--out", "/mnt/a b"]


def short(call: list[str]) -> str:
    """What a call of gcloud does, in a word."""
    words = " ".join(call)
    kinds = ["list", "create", "delete", "scp", "install", "start", "status", "stop", "end"]
    marks = ["resources list", "resources create", "resources delete", "tpu-vm scp", "pip install"]
    marks += [f"worker.sh {kind}" for kind in kinds[5:]]
    (kind,) = (kind for kind, mark in zip(kinds, marks, strict=True) if mark in words)
    return kind


def kept(folder: Path, states: list[str], looks: list[str], status: int, *options: str) -> tuple[list[str], list[str]]:
    """What `keep` had done, in words without the looks, and what it said."""
    path = gcloud(folder, states, looks)
    process = launch("tpu_vm.sh", "keep", *options, *KEEP[1:], path=path)
    _, stderr = finish(process, seconds=60, status=status)
    done = [short(call) for call in calls(folder)]
    return [word for word in done if word not in ("list", "status")], stderr.splitlines()


BEGUN = ["scp", "install", "start"]


def test_keep_creates_starts_and_waits_until_all_workers_are_done(tmp_path: Path) -> None:
    states = ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    looks = ["failure", "", "none|none", "running|running", "running|running", "ended 0|running", "ended 0|ended 0"]
    assert kept(tmp_path, states, looks, 0) == (["create", *BEGUN], ["launch/tpu_vm.sh: exit status 0"])
    create = next(call for call in calls(tmp_path) if short(call) == "create")
    assert create[1:] == [
        *("compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod", "--zone=us-east5-a"),
        *("--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5", "--spot"),
    ]
    start = next(call for call in calls(tmp_path) if short(call) == "start")
    assert "--worker=all" in start
    on_the_worker = shlex.split(start[-1].removeprefix("--command="))
    assert on_the_worker == ["bash", "tiedjax/launch/worker.sh", "start", "train", *KEEP[5:]]


def test_keep_creates_a_slice_again_that_was_pre_empted(tmp_path: Path) -> None:
    states = ["ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "ACTIVE"]
    done, said = kept(tmp_path, states, ["none|none", "running|failure", "none|none", "ended 0"], 0)
    assert done == [*BEGUN, "delete", "create", *BEGUN]
    assert said == ["launch/tpu_vm.sh: pod was pre-empted; it is created again", "launch/tpu_vm.sh: exit status 0"]


@pytest.mark.parametrize(
    ("look", "reason"),
    [
        ("ended 75|ended 75", "exit status 75"),
        ("ended 76|ended 76", "exit status 76"),
        ("ended 1|ended 137", "exit status 137"),
        ("lost|ended 1", "a worker lost its process"),
    ],
)
def test_keep_starts_a_run_again_that_may_succeed(tmp_path: Path, look: str, reason: str) -> None:
    done, said = kept(tmp_path, ["ACTIVE"], [look, "running|running", "ended 0|ended 0"], 0)
    assert done == ["start"]
    assert said == [f"launch/tpu_vm.sh: {reason}; restart 1 of 50", "launch/tpu_vm.sh: exit status 0"]


@pytest.mark.parametrize("status", NEVER)
def test_keep_gives_up_at_any_other_status(tmp_path: Path, status: int) -> None:
    done, said = kept(tmp_path, ["ACTIVE"], [f"ended 75|ended {status}|ended 75"], status)
    assert (done, said) == ([], [f"launch/tpu_vm.sh: exit status {status}"])


def test_keep_gives_up_after_so_many_restarts(tmp_path: Path) -> None:
    done, said = kept(tmp_path, ["ACTIVE"], ["ended 76|ended 76"], 76, "--restarts", "2")
    assert done == ["start", "start"]
    assert said == [
        "launch/tpu_vm.sh: exit status 76; restart 1 of 2",
        "launch/tpu_vm.sh: exit status 76; restart 2 of 2",
        "launch/tpu_vm.sh: exit status 76 after 2 restarts",
    ]


def test_keep_does_not_start_a_run_again_that_a_person_stopped(tmp_path: Path) -> None:
    done, said = kept(tmp_path, ["ACTIVE"], ["stopped 75|stopped 75"], 75)
    assert (done, said) == ([], ["launch/tpu_vm.sh: stopped; exit status 75"])


def test_keep_ends_what_is_left_of_a_run(tmp_path: Path) -> None:
    """Those that still run at the look after the one that found others ended."""
    looks = ["running|ended 76", "running|ended 76", "ended 137|ended 76", "ended 0|ended 0"]
    done, _ = kept(tmp_path, ["ACTIVE"], looks, 0)
    assert done == ["end", "start"]


def test_keep_installs_where_a_worker_is_new(tmp_path: Path) -> None:
    done, said = kept(tmp_path, ["ACTIVE"], ["none|ended 1", "ended 0"], 0)
    assert done == BEGUN
    assert said[0] == "launch/tpu_vm.sh: a worker lost its process; restart 1 of 50"


def test_keep_gives_up_a_request_that_failed(tmp_path: Path) -> None:
    done, said = kept(tmp_path, ["FAILED"], ["none"], 1)
    assert (done, said) == ([], ["launch/tpu_vm.sh: the request for pod failed"])


def test_keep_ends_if_the_cloud_refuses_its_first_question(tmp_path: Path) -> None:
    assert kept(tmp_path, ["failure"], ["none"], 1) == ([], [])


def test_keep_goes_on_if_the_cloud_refuses_a_later_one(tmp_path: Path) -> None:
    done, _ = kept(tmp_path, ["ACTIVE", "failure", "ACTIVE"], ["running|running", "ended 0"], 0)
    assert done == []


def test_the_other_commands_of_a_slice_ask_gcloud_once(tmp_path: Path) -> None:
    path = gcloud(tmp_path, ["ACTIVE"], ["running|ended 75"])
    for command in ("status", "stop", "attach", "delete"):
        stdout, _ = finish(launch("tpu_vm.sh", command, "pod", "us-east5-a", path=path))
        if command == "status":
            assert stdout.splitlines()[1:] == ["status: running", "status: ended 75"]
    workers = [[word for word in call if word.startswith("--worker")] for call in calls(tmp_path)]
    assert workers == [["--worker=all"], ["--worker=all"], ["--worker=0"], []]


def test_a_failed_installation_starts_nothing(tmp_path: Path) -> None:
    path = gcloud(tmp_path, ["ACTIVE"], ["none"], status=9)
    finish(launch("tpu_vm.sh", "run", "pod", "us-east5-a", "c.yaml", path=path), status=1)
    assert [short(call) for call in calls(tmp_path)] == ["scp"]


# ---- On a worker ----


class Worker:
    """A checkout of a worker, with a stand-in for its tiedjax."""

    def __init__(self, folder: Path, body: str):
        self._folder = folder / "checkout"
        program(self._folder / ".venv" / "bin" / "tiedjax", body)
        (self._folder / "launch").mkdir()
        shutil.copy(LAUNCH / "worker.sh", self._folder / "launch")

    def __call__(self, *args: str, status: int = 0) -> str:
        command = ["bash", str(self._folder / "launch" / "worker.sh"), *args]
        done = subprocess.run(command, text=True, capture_output=True, timeout=60)
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    def pid(self) -> int:
        return int((self._folder / ".detached" / "pid").read_text())

    def log(self) -> str:
        return (self._folder / ".detached" / "log").read_text()

    def wait(self, said: str) -> None:
        end = time.monotonic() + 30
        while self("status") != f"status: {said}\n":
            assert time.monotonic() < end, self("status")
            time.sleep(0.1)


def test_a_worker_runs_detached_and_keeps_log_pid_and_status(tmp_path: Path) -> None:
    worker = Worker(tmp_path, 'echo "$@"; trap "echo asked; exit 75" TERM; while :; do sleep 0.05; done')
    assert worker("status") == "status: none\n"
    assert worker("start", "train", "c.yaml", "--out", "a b") == ""
    assert worker("status") == "status: running\n"
    assert os.getsid(worker.pid()) != os.getsid(0)  # it does not end with whoever started it
    assert worker("start", "train", "c.yaml", status=1) == "launch/worker.sh: it is running already\n"
    assert worker("stop") == "status: stopped 75\n"
    assert worker("follow") == worker.log() == "train c.yaml --out a b\nasked\n"
    worker("start", "train", "d.yaml")
    assert worker("end") == "status: ended 75\n"
    assert worker.log().splitlines()[2:] == ["train d.yaml", "asked"]


@pytest.mark.parametrize("status", [0, *AGAIN, *NEVER])
def test_a_worker_keeps_every_exit_status(tmp_path: Path, status: int) -> None:
    worker = Worker(tmp_path, f"exit {status}")
    worker("start", "train", "c.yaml")
    worker.wait(f"ended {status}")
    assert worker("stop") == f"status: stopped {status}\n"  # so that `keep` does not start it again


def test_a_worker_knows_a_process_that_was_killed_from_one_that_is_lost(tmp_path: Path) -> None:
    worker = Worker(tmp_path, "while :; do sleep 0.05; done")
    worker("start", "train", "c.yaml")
    os.kill(worker.pid(), signal.SIGKILL)
    worker.wait("ended 137")
    worker("start", "train", "c.yaml")
    parent = int(Path(f"/proc/{worker.pid()}/stat").read_text().rsplit(") ", 1)[1].split()[1])
    for pid in (parent, worker.pid()):
        os.kill(pid, signal.SIGKILL)
    worker.wait("lost")


# ---- Kubernetes ----


def manifest(golden: str) -> Any:
    return YAML(typ="safe").load((GOLDEN / golden).read_text())


@pytest.mark.parametrize("golden", ["gke_tpu.yaml", "gke_gpu.yaml"])
def test_a_jobset_starts_again_after_the_statuses_that_may_succeed(golden: str) -> None:
    """By the rules of Job and JobSet: FailJob fails the Job with the reason PodFailurePolicy, and FailJobSet the whole;
    any other failure is one more than backoffLimit, and starts all workers again.
    """
    spec = manifest(golden)["spec"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    job = spec["replicatedJobs"][0]["template"]["spec"]
    (pod_rule,) = job["podFailurePolicy"]["rules"]
    assert pod_rule["action"] == "FailJob"
    assert pod_rule["onExitCodes"] == {"containerName": "tiedjax", "operator": "In", "values": NEVER}
    assert not set(AGAIN) & set(pod_rule["onExitCodes"]["values"])
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert [container["name"] for container in job["template"]["spec"]["containers"]] == ["tiedjax"]


def test_a_jobset_of_tpus_has_a_worker_for_each_host() -> None:
    jobset = manifest("gke_tpu.yaml")
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (2, 16, 16)
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    # In a container $$ is $: what tiedjax is given is what was asked for.
    assert [argument.replace("$$", "$") for argument in container["args"]] == DRY["gke_tpu.yaml"][-4:]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert "nvidia" not in (GOLDEN / "gke_tpu.yaml").read_text()


def test_a_jobset_of_gpus_tells_its_workers_of_each_other() -> None:
    jobset = manifest("gke_gpu.yaml")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    assert job["completions"] == 2
    assert container["args"][-6:] == [
        *("--coordinator", "olmo-worker-0-0.olmo:8476", "--processes", "2", "--process-id", "$(PROCESS_ID)")
    ]
    index = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    assert container["env"][0] == {"name": "PROCESS_ID", "valueFrom": {"fieldRef": index}}
    assert "tpu" not in (GOLDEN / "gke_gpu.yaml").read_text().replace("tputer", "")


@pytest.mark.parametrize("golden", ["gke_tpu.yaml", "gke_gpu.yaml"])
def test_gke_applies_what_its_dry_run_prints(golden: str, tmp_path: Path) -> None:
    path = noting(tmp_path, "kubectl", f'cat > "{tmp_path}/applied"')
    script, *args = DRY[golden]
    finish(launch(script, *(word for word in args if word != "--dry-run"), path=path))
    assert calls(tmp_path) == [["kubectl", "apply", "--filename=-"]]
    header, applied = (GOLDEN / golden).read_text().split("\n", 1)
    assert header == "# kubectl apply --filename=-"
    assert (tmp_path / "applied").read_text() == applied


def test_gke_passes_on_what_kubectl_fails_with(tmp_path: Path) -> None:
    path = noting(tmp_path, "kubectl", "cat > /dev/null; exit 3")
    finish(launch("gke.sh", *POD.split(), "pod", "c.yaml", path=path), status=3)


def test_the_template_is_yaml_itself() -> None:
    template = YAML(typ="safe").load((LAUNCH / "jobset.yaml.template").read_text())
    assert template["kind"] == "JobSet"


# ---- SkyPilot and containers ----

SKY = """
import os, shlex, subprocess, sys
from ruamel.yaml import YAML
assert sys.argv[1:3] == ["jobs", "launch"] and sys.argv[4] == "--env"
task = YAML(typ="safe").load(open(sys.argv[3]))
name, value = sys.argv[5].split("=", 1)
assert name in task["envs"]
nodes = task["num_nodes"]
for restart in range(5):
    codes = []
    for rank in range(nodes):
        told = dict(SKYPILOT_NUM_NODES=str(nodes), SKYPILOT_NODE_RANK=str(rank))
        told |= {"SKYPILOT_NODE_IPS": "10.0.0.1\\n10.0.0.2", name: value}
        ran = subprocess.run(["bash", "-c", task["run"]], env={**os.environ, **told})
        codes.append(ran.returncode)
    if not set(codes) & set(task["resources"]["job_recovery"]["recover_on_exit_codes"]):
        sys.exit(max(codes))
"""


@pytest.mark.parametrize(("statuses", "status"), [([75, 76, 0], 0), *(([status], status) for status in NEVER)])
def test_skypilot_starts_again_after_the_statuses_that_may_succeed(
    tmp_path: Path, statuses: list[int], status: int
) -> None:
    cases = "\n".join(f"  {i}) exit {end} ;;" for i, end in enumerate(statuses, 1))
    body = f"""printf '%s|' "$@" >> {tmp_path}/ran; echo >> {tmp_path}/ran
case $((($(wc -l < {tmp_path}/ran) + 1) / 2)) in\n{cases}\nesac"""
    program(tmp_path / ".venv" / "bin" / "tiedjax", body)
    program(tmp_path / "bin" / "sky", SKY, sys.executable)
    command = ["jobs", "launch", str(LAUNCH / "sky.yaml"), "--env", "TIEDJAX=train c.yaml --out *"]
    done = subprocess.run([str(tmp_path / "bin" / "sky"), *command], cwd=tmp_path, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (status, "")
    ran = [line.split("|")[:-1] for line in (tmp_path / "ran").read_text().splitlines()]
    assert len(ran) == 2 * len(statuses)
    for i, args in enumerate(ran):
        where = ["--coordinator", "10.0.0.1:8476", "--processes", "2", "--process-id", str(i % 2)]
        assert args == ["train", "c.yaml", "--out", "*", *where]


def test_the_image_has_what_the_package_is_built_of() -> None:
    lines = (LAUNCH / "Containerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    needed = [*project["project"]["license-files"], project["project"]["readme"], "pyproject.toml"]
    needed += project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed += project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert sorted(copied) == sorted(needed)
    (default,) = (line.removeprefix("ARG EXTRA=") for line in lines if line.startswith("ARG "))
    assert default in project["project"]["optional-dependencies"]
    assert 'RUN pip install --no-cache-dir ".[${EXTRA}]"' in lines
    assert lines[-1] == 'ENTRYPOINT ["tini", "--", "tiedjax"]'
