"""Whatever ends one process of a cluster ends all of them, soon, and each says the first cause last."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import slow_but
from programs import REPOSITORY, environment, finish, start
from runs import STEPS, arguments, assert_same_run, rows

from tiedjax.host import storage, watch

# ---- The wire alone, between processes without JAX ----

WIRE = """
import json, os, signal, sys, threading, time
from tiedjax.host import watch
from tiedjax.host.watch import Hub, Spoke
process, processes = int(sys.argv[1]), int(sys.argv[2])
if process == 0:
    end = Hub(processes)
    print(json.dumps(end.invitation("127.0.0.1")), flush=True)
else:
    end = Spoke.reach(process, json.loads(sys.argv[3]))
    print("reached", flush=True)
sys.stdin.readline()
"""
WAIT = "time.sleep(600)"
PATIENT = "watch.SETTLING = 4.0"  # on a busy machine


def wire(*bodies: str) -> list[subprocess.Popen[str]]:
    """Connected processes, each of which then runs its body."""
    processes: list[subprocess.Popen[str]] = []
    invitation = ""
    for number, body in enumerate(bodies):
        argv = [sys.executable, "-c", WIRE + body, str(number), str(len(bodies)), invitation]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        processes.append(subprocess.Popen(argv, cwd=REPOSITORY, env=environment(), text=True, **pipes))  # type: ignore[call-overload]
        invitation = invitation or processes[0].stdout.readline()  # type: ignore[union-attr]
    for process in processes[1:]:
        assert process.stdout
        assert process.stdout.readline() == "reached\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    return processes


def ended(processes: list[subprocess.Popen[str]], seconds: float = 30) -> list[tuple[int, str]]:
    """Exit status and standard error of each, which must come within so many seconds."""
    deadline = time.monotonic() + seconds
    try:
        errors = [process.communicate(timeout=deadline - time.monotonic())[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def test_the_cause_and_status_of_one_are_those_of_all() -> None:
    assert ended(wire(WAIT, "end.fail('no luck', 2)", WAIT)) == [
        (2, "tiedjax: process 1 failed: no luck\n"),
        (2, "tiedjax: no luck\n"),
        (2, "tiedjax: process 1 failed: no luck\n"),
    ]
    assert ended(wire("end.fail('no luck', 1)", WAIT)) == [
        (1, "tiedjax: no luck\n"),
        (1, "tiedjax: process 0 failed: no luck\n"),
    ]


def test_what_all_find_together_each_says_for_itself() -> None:
    assert ended(wire(*[f"{PATIENT}; end.fail('one and the same', 2)"] * 3)) == [(2, "tiedjax: one and the same\n")] * 3


def test_the_first_failure_is_the_cause_and_later_ones_are_silent() -> None:
    late = f"{PATIENT}; time.sleep(1); end.fail('the collective failed', 1)"
    for status, line in ended(wire(late, "end.fail('no luck', 2)", late)):
        assert status == 2
        assert line.endswith("no luck\n")
        assert line.count("\n") == 1


def test_the_cause_is_the_last_line_whatever_other_threads_say() -> None:
    """They fail of the same cause a moment later, each with a traceback of its own."""
    chatter = (
        "for _ in range(4): threading.Thread(target=lambda: [os.write(2, b'and so\\n') for _ in iter(int, 1)]).start()"
    )
    for status, error in ended(wire(f"{WAIT}", f"exec({chatter!r}); end.fail('no luck', 2)")):
        assert status == 2
        assert error.splitlines()[-1].endswith("no luck")


def test_a_death_is_the_cause_of_what_was_reported_just_before() -> None:
    """The others' collectives fail when a process dies, and may say so before its end is seen."""
    says = f"{PATIENT}; end.fail('the collective failed', 1)"
    dies = "time.sleep(0.2); os.kill(os.getpid(), signal.SIGKILL)"
    line = "tiedjax: process 2 ended without a word: it was killed, or its machine is lost\n"
    assert ended(wire(says, WAIT, dies)) == [(75, line), (75, line), (-signal.SIGKILL, "")]


def test_the_death_of_process_0_ends_the_others() -> None:
    line = "tiedjax: process 0 ended without a word: it was killed, or its machine is lost\n"
    assert ended(wire("os.kill(os.getpid(), signal.SIGKILL)", WAIT)) == [(-signal.SIGKILL, ""), (75, line)]


def test_processes_that_are_done_wait_for_each_other_and_then_go_unnoticed() -> None:
    slow = "time.sleep(1); end.part(); print(time.time())"
    quick = "end.part(); print(time.time()); os._exit(0)"
    processes = wire(quick, slow, quick)
    outputs = [process.communicate(timeout=30) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert [error for _, error in outputs] == ["", "", ""]
    times = [float(out.splitlines()[-1]) for out, _ in outputs]
    assert max(times) - min(times) < 0.9


def test_a_failure_ends_those_that_are_done_too() -> None:
    fails = "time.sleep(0.5); end.fail('no luck', 1)"
    assert ended(wire("end.part()", "end.part()", fails)) == [
        (1, "tiedjax: process 2 failed: no luck\n"),
        (1, "tiedjax: process 2 failed: no luck\n"),
        (1, "tiedjax: no luck\n"),
    ]


def test_a_wire_that_is_taken_down_ends_nobody() -> None:
    for late in range(2):
        bodies = [f"time.sleep({float(number == late)}); end.close(); time.sleep(2)" for number in range(2)]
        assert ended(wire(*bodies)) == [(0, ""), (0, "")]


@pytest.mark.parametrize("busy", [0, 1])
def test_a_failure_that_is_announced_comes_after_its_grace(busy: int) -> None:
    announces = f"watch.GRACE = 1.0; end.expect('no luck', 2); {WAIT}"
    began = time.monotonic()
    bodies = [announces, WAIT] if busy == 0 else [WAIT, announces]
    for number, (status, line) in enumerate(ended(wire(*bodies))):
        assert status == 2
        assert line == ("tiedjax: no luck\n" if number == busy else f"tiedjax: process {busy} failed: no luck\n")
    assert time.monotonic() - began > 1


def test_all_stop_at_the_same_moment_the_next_that_none_has_passed() -> None:
    """Three that pass moments at their own speed; the slowest asks when it has passed 5, the fastest waits for it."""
    body = """
asks = {asks}
for moment in range(1, 1000):
    time.sleep({pause})
    if moment == asks:
        end.ask("SIGHUP")
    requests = end.reached()
    if requests:
        break
print(moment, *requests, flush=True)
end.part()
"""
    processes = wire(*[body.format(asks=5 if i == 2 else None, pause=0.01 * 4**i) for i in range(3)])
    said = {process.communicate(timeout=60)[0].splitlines()[-1] for process in processes}
    assert len(said) == 1
    moment, reason = said.pop().split()
    assert reason == "SIGHUP"
    assert 5 < int(moment) < 200


def test_several_requests_reach_all_in_one_order_and_each_once() -> None:
    asks = "time.sleep(1); end.ask('SIGHUP'); time.sleep(1)"
    body = (
        f"{{first}}; {asks}; print(end.reached(), end.reached(), flush=True); {asks}; print(end.reached(), flush=True)"
    )
    body += "; end.part()"
    processes = wire(*[body.format(first=first) for first in ("end.ask('SIGTERM')", "pass")])
    for process in processes:
        assert process.communicate(timeout=60)[0].splitlines()[-2:] == ["['SIGTERM', 'SIGHUP'] []", "['SIGHUP']"]


def test_strangers_are_not_listened_to() -> None:
    hub = watch.Hub(2)
    try:
        invitation = hub.invitation(None)
        for greeting in (b"GET / HTTP/1.1\r\n\r\n", b'{"token": "guessed", "process": 1}\n'):
            with socket.create_connection(("127.0.0.1", invitation["port"]), timeout=10) as stranger:
                stranger.sendall(greeting)
                stranger.settimeout(10)
                assert stranger.recv(100) == b""
    finally:
        hub.close()


def test_process_0_is_looked_for_under_each_of_its_names() -> None:
    hub = watch.Hub(2)
    try:
        invitation = hub.invitation("no.such.host.invalid")
        assert invitation["hosts"][:2] == ["no.such.host.invalid", socket.gethostname()]
        invitation["hosts"] = ["no.such.host.invalid", "127.0.0.1"]
        spoke = watch.Spoke.reach(1, invitation)
        assert spoke
        assert watch.Spoke.reach(1, {**invitation, "hosts": []}) is None
        assert watch.Spoke.reach(1, {**invitation, "token": "guessed"}) is None
    finally:
        hub.close()
    spoke.close()


@pytest.mark.parametrize("status", [1, 76])
def test_a_process_ends_though_nobody_hears_why(status: int) -> None:
    """Its output is a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    program = f"from tiedjax.host.watch import end; end('no luck', {status})"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=writing, stderr=writing, env=environment())
    os.close(writing)
    assert process.wait(60) == status


# ---- Training processes, each started by hand as on a cluster ----

PRELUDE = """
import contextlib, errno, hashlib, os, pathlib, signal, sys, threading, time
import orbax.checkpoint as ocp
from tiedjax import loop
from tiedjax.cli import main
from tiedjax.errors import TrainingError, UserError
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may have it ignored
def now():
    pathlib.Path({mark!r}).touch()
def fails(error):
    def failing(*args, **kwargs):
        now()
        raise error
    return failing
stops = loop.process.Requests.stops
def at_step_3(act):
    asked = []
    def observed(self):
        asked.append(None)
        if len(asked) == 3:
            act()
        return stops(self)
    loop.process.Requests.stops = observed
def dies(number):
    now()
    os.kill(os.getpid(), number)
prepare = loop.prepare
def prepared_and_signalled(number):
    def preparing(*args, **kwargs):
        prepared = prepare(*args, **kwargs)
        threading.Timer(2, dies, [number]).start()
        return prepared
    return preparing
"""


def cluster(
    tmp_path: Path,
    text: Path,
    hooks: Mapping[int, str],
    outs: Mapping[int, Path] | None = None,
    more: Mapping[str, object] | None = None,
    heartbeat: float = 60,
) -> list[subprocess.Popen[str]]:
    """Two processes of one run, each after its hook."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    changes = {"train.checkpoint_every": 2, "train.steps": 1000, "train.eval_batches": 1, **(more or {})}
    for number in range(2):
        flags = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id", str(number)]
        flags += ["--heartbeat", str(heartbeat)]
        argv = [*arguments((outs or {}).get(number, tmp_path / "run"), text, changes), *flags]
        program = (
            f"{PRELUDE.format(mark=str(tmp_path / 'mark'))}\n{hooks.get(number, '')}\nsys.exit(main(sys.argv[1:]))"
        )
        processes.append(start(["-c", program, *argv]))
    return processes


NO_SPACE = "OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))"
FAILURES = {
    "data": (1, "loop.prepare = fails(RuntimeError('no luck'))", 1, "RuntimeError: no luck"),
    "state": (0, "loop.begin = fails(UserError('no luck'))", 2, "no luck"),
    "step": (1, "at_step_3(fails(TrainingError('no luck')))", 1, "no luck"),
    "save": (0, f"ocp.PyTreeCheckpointHandler.finalize = fails({NO_SPACE})", 1, "[Errno 28] No space left on device"),
}


@pytest.mark.parametrize("moment", slow_but(FAILURES, "data", "save"))
def test_a_failure_of_one_process_ends_all_with_its_cause(moment: str, text: Path, tmp_path: Path) -> None:
    failing, hook, status, cause = FAILURES[moment]
    hooks = {failing: hook}
    processes = cluster(tmp_path, text, hooks)
    results = ended(processes, seconds=240)
    assert time.time() - (tmp_path / "mark").stat().st_mtime < 30
    for number, (code, error) in enumerate(results):
        assert code == status, error
        last = error.splitlines()[-1]
        assert last.startswith("tiedjax: " if number == failing else f"tiedjax: process {failing} failed: "), error
        assert last.endswith(cause), error
    if moment == "step":
        assert (tmp_path / "run" / "checkpoints" / "2").is_dir(), "the save under way is finished"


BLIND = """
restore = ocp.CheckpointManager.restore
def blind(self, step, *args, **kwargs):
    if step == 4 and "tree" in kwargs["args"].keys():
        raise ValueError("a broken chunk")
    return restore(self, step, *args, **kwargs)
ocp.CheckpointManager.restore = blind
"""


def test_what_one_process_cannot_read_is_damaged_for_all(text: Path, tmp_path: Path) -> None:
    """Both go on from the state before it, together."""
    out, saves = tmp_path / "run", {"train.checkpoint_every": 2, "train.steps": 1000, "train.eval_batches": 1}
    more = {"train.keep_checkpoints": 9}
    finish(start(["-m", "tiedjax", *arguments(out, text, {**saves, **more, "train.stop_at": 4})]))
    for status, error in ended(cluster(tmp_path, text, {1: BLIND}, more={**more, "train.stop_at": 6}), seconds=240):
        assert status == 0, error
    left = {path.name for path in (out / "checkpoints").iterdir()}
    assert left == {"2", "4", "6", "damaged-4"}
    assert [row["step"] for row in rows(out)] == list(range(1, 7))


INTERRUPTIONS = {
    "a step": "at_step_3(lambda: dies(signal.{}))",
    "a collective": "loop.prepare = prepared_and_signalled(signal.{})",
}


SIGNALS = ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT")


@pytest.mark.parametrize(
    ("moment", "receiver", "number"),
    slow_but(
        [
            *(("a step", i % 2, signal.Signals[name]) for i, name in enumerate(SIGNALS)),
            *(("a collective", receiver, signal.SIGINT) for receiver in range(2)),
        ],
        ("a step", 0, signal.SIGTERM),
        ("a collective", 1, signal.SIGINT),
    ),
)
def test_a_signal_to_one_process_stops_all_after_one_step(
    moment: str, receiver: int, number: signal.Signals, text: Path, tmp_path: Path
) -> None:
    hooks = {receiver: INTERRUPTIONS[moment].format(number.name)}
    if moment == "a collective":  # in which the receiver waits for the other, where Python runs no handler
        hooks[1 - receiver] = "loop.prepare = lambda *args, **kwargs: time.sleep(600)"
    results = ended(cluster(tmp_path, text, hooks), seconds=240)
    assert time.time() - (tmp_path / "mark").stat().st_mtime < 20
    sentence = f"stopped by {number.name}; the same command continues from there"
    for status, error in results:
        assert status == 75
        assert error.splitlines()[-1].endswith(sentence)
    run = tmp_path / "run"
    if moment == "a step":
        assert [error for _, error in results] == [f"tiedjax: {sentence}\n"] * 2
        step = max(int(path.name) for path in (run / "checkpoints").iterdir())
        assert 3 <= step < 30  # some milliseconds each; without the signal there are a thousand
        assert [row["step"] for row in rows(run)] == list(range(1, step + 1))


@pytest.mark.parametrize("killed", slow_but([0, 1], 1))
def test_a_killed_process_ends_the_other(killed: int, text: Path, tmp_path: Path) -> None:
    results = ended(cluster(tmp_path, text, {killed: "at_step_3(lambda: dies(signal.SIGKILL))"}), seconds=240)
    assert time.time() - (tmp_path / "mark").stat().st_mtime < 30
    assert results[killed][0] == -signal.SIGKILL
    status, error = results[1 - killed]
    assert status == 75
    line = f"tiedjax: process {killed} ended without a word: it was killed, or its machine is lost"
    assert error.splitlines()[-1] == line


GONE = "process {} ended without a word: it was killed, or its machine is lost"


@pytest.mark.parametrize("stopped", slow_but([0, 1], 1))
def test_a_process_that_is_stopped_ends_the_other(stopped: int, text: Path, tmp_path: Path) -> None:
    hooks = {stopped: "at_step_3(lambda: dies(signal.SIGSTOP))"}
    processes = cluster(tmp_path, text, hooks, heartbeat=10)
    (result,) = ended([processes[1 - stopped]], seconds=240)
    assert time.time() - (tmp_path / "mark").stat().st_mtime < 30
    status, error = result
    assert status == 76
    line = f"tiedjax: process {stopped} has been silent for 10 s: it is stopped, or its machine hangs"
    assert error.splitlines()[-1] == line
    processes[stopped].send_signal(signal.SIGCONT)
    status, error = ended([processes[stopped]])[0]  # and when it goes on, it ends too
    if stopped == 0:
        assert (status, error.splitlines()[-1]) == (75, "tiedjax: " + GONE.format(1))
    else:
        assert (status, error.splitlines()[-1]) == (76, line)


def test_a_step_that_does_not_end_ends_all_with_what_each_is_at(text: Path, tmp_path: Path) -> None:
    """Process 1 sleeps, process 0 waits for it in a collective; the state of step 2 is there to go on from."""
    hooks = {1: "def asleep():\n    now()\n    time.sleep(600)\nat_step_3(asleep)"}
    results = ended(cluster(tmp_path, text, hooks, more={"train.stall_seconds": 5}), seconds=240)
    assert time.time() - (tmp_path / "mark").stat().st_mtime < 30
    for status, error in results:
        assert status == 76
        assert re.search(r"no step has ended for \d+ s; the same command continues from there\n$", error), error
        assert "Current thread" in error
    assert "in asleep" in results[1][1]
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


def test_folders_that_are_not_one_are_refused_at_once_and_nothing_is_left(text: Path, tmp_path: Path) -> None:
    joined = """
refuse = loop.process.refuse_unshared
def marked(folder):
    now()
    refuse(folder)
loop.process.refuse_unshared = marked
"""
    outs = {number: tmp_path / f"host-{number}" / "run" for number in range(2)}
    results = ended(cluster(tmp_path, text, {0: joined}, outs), seconds=120)
    assert time.time() - (tmp_path / "mark").stat().st_mtime < 5
    line = (
        f"tiedjax: {outs[0]}: --out must name one folder that all processes share; "
        "process 1 does not see what process 0 wrote there\n"
    )
    assert results == [(2, line), (2, line)]
    assert [path.name for path in tmp_path.iterdir()] == ["mark"]


def test_processes_that_cannot_be_watched_say_so_and_go_on(text: Path, tmp_path: Path) -> None:
    hook = "loop.process.Spoke.reach = classmethod(lambda *_: None)\nloop.train = lambda *args, **kwargs: None"
    processes = cluster(tmp_path, text, {0: hook, 1: hook})
    assert ended(processes, seconds=120) == [
        (
            0,
            "tiedjax: process 1 cannot reach process 0 beside JAX's own port; "
            "when a process fails, the others notice only after a minute or two, and a signal saves nothing\n",
        ),
        (0, ""),
    ]


def test_the_launcher_ends_with_the_cause(text: Path, tmp_path: Path) -> None:
    """Process 1 fails in the launcher's hands, while process 0 is in the middle of the same step."""
    program = f"{PRELUDE.format(mark=str(tmp_path / 'mark'))}\nif sys.argv[-1] == '1':\n    "
    program += "at_step_3(fails(TrainingError('no luck')))\nsys.exit(main(sys.argv[1:]))"
    stand_in = tmp_path / "bin" / "tiedjax"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/usr/bin/env bash\nexec {shlex.join([sys.executable, "-c", program])} "$@"\n')
    stand_in.chmod(0o755)
    argv = [str(REPOSITORY / "launch" / "local.sh"), "2", *arguments(tmp_path / "run", text, {"train.steps": 1000})[1:]]
    path = f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"
    launcher = subprocess.Popen(
        ["bash", *argv],
        cwd=REPOSITORY,
        env=environment(PATH=path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _, error = finish(launcher, seconds=240, status=1)
    assert time.time() - (tmp_path / "mark").stat().st_mtime < 30
    lines = {"tiedjax: process 1 failed: no luck", "[1] tiedjax: no luck"}
    assert lines <= set(error.splitlines())
    assert error.splitlines()[-1] in lines


# ---- What ends a cluster leaves a run that the same command completes ----

SHORT: dict[str, object] = {"train.steps": STEPS}
CAUSES = {
    "an exception": "at_step_3(fails(TrainingError('no luck')))",
    "a kill": "at_step_3(lambda: dies(signal.SIGKILL))",
    "a stop": "at_step_3(lambda: dies(signal.SIGSTOP))",
    "an interrupt": "at_step_3(lambda: dies(signal.SIGINT))",
}
PHASES = {  # of one process; in all but the first two it trains
    "preparation": """
def preparing(*args, **kwargs):
    threading.Timer(1, dies, [NUMBER]).start()
    time.sleep(600)
loop.prepare = preparing
""",
    "compilation": """
first_call = loop.process.first_call
@contextlib.contextmanager
def deaf(function):
    "Like a compiler: runs no Python, and no signal interrupts it."
    with first_call(function) as called:
        if function not in loop.process._called:
            threading.Timer(1, dies, [NUMBER]).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
        yield called
loop.process.first_call = deaf
""",
    "a step": "at_step_3(lambda: dies(NUMBER))",
    "an evaluation": """
evaluate = loop.Evaluation.__call__
def evaluating(self, *args):
    dies(NUMBER)
    return evaluate(self, *args)
loop.Evaluation.__call__ = evaluating
""",
    "the last save": f"""
wait = loop.Checkpoints.wait
def waiting(self):
    if self.begun == {STEPS} and self.directory.name == "checkpoints":
        dies(NUMBER)
    wait(self)
loop.Checkpoints.wait = waiting
""",
}


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert [status for status, _ in ended(cluster(folder, text, {}, more=SHORT), seconds=240)] == [0, 0]
    return folder / "run"


def assert_completed(tmp_path: Path, text: Path, undisturbed: Path) -> None:
    """The same command ends well, with the bits of the run that nobody disturbed."""
    results = ended(cluster(tmp_path, text, {}, more=SHORT), seconds=240)
    assert [status for status, _ in results] == [0, 0], results
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_saves_of_two_kinds_do_not_wait_for_each_other(text: Path, tmp_path: Path, undisturbed: Path) -> None:
    """Process 1 is slow to end the save of a state, while both have begun that of the next snapshot."""
    slow = """
from orbax.checkpoint import checkpoint_manager
finalize = checkpoint_manager.CheckpointManager._finalize_checkpoint
def finalizing(self, step):
    finalize(self, step)
    if self.directory.name == "checkpoints":
        time.sleep(2)
checkpoint_manager.CheckpointManager._finalize_checkpoint = finalizing
"""
    results = ended(cluster(tmp_path, text, {1: slow}, more=SHORT), seconds=120)
    assert [status for status, _ in results] == [0, 0], results
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(
    ("cause", "rank"), slow_but(itertools.product(CAUSES, range(2)), ("an exception", 0), ("a kill", 1))
)
def test_whatever_ends_a_process_ends_both_with_its_cause_and_the_run_completes(
    cause: str, rank: int, text: Path, tmp_path: Path, undisturbed: Path
) -> None:
    stopped = "stopped by SIGINT; the same command continues from there"
    silent = f"process {rank} has been silent for 10 s: it is stopped, or its machine hangs"
    own, other = {  # status and last line
        "an exception": ((1, "no luck"), (1, f"process {rank} failed: no luck")),
        "a kill": ((-signal.SIGKILL, None), (75, GONE.format(rank))),
        "a stop": ((-signal.SIGKILL, None), (76, silent)),
        "an interrupt": ((75, stopped), (75, stopped)),
    }[cause]
    processes = cluster(tmp_path, text, {rank: CAUSES[cause]}, more=SHORT, heartbeat=10)
    results = {1 - rank: ended([processes[1 - rank]], seconds=240)[0]}
    assert time.time() - (tmp_path / "mark").stat().st_mtime < 30
    if cause == "a stop":
        processes[rank].kill()
    results[rank] = ended([processes[rank]])[0]
    for number, (status, line) in ((rank, own), (1 - rank, other)):
        assert results[number][0] == status, results
        assert line is None or results[number][1].splitlines()[-1] == f"tiedjax: {line}"
    assert_completed(tmp_path, text, undisturbed)


@pytest.mark.parametrize(
    ("phase", "rank", "name"), slow_but(itertools.product(PHASES, range(2), SIGNALS), ("an evaluation", 1, "SIGUSR1"))
)
def test_a_signal_to_one_process_in_every_phase_and_the_run_completes(
    phase: str, rank: int, name: str, text: Path, tmp_path: Path, undisturbed: Path
) -> None:
    hook = PHASES[phase].replace("NUMBER", f"signal.{name}")
    results = ended(cluster(tmp_path, text, {rank: hook}, more=SHORT), seconds=240)
    assert time.time() - (tmp_path / "mark").stat().st_mtime < 20
    for status, error in results:
        assert status == 75, results
        assert error.splitlines()[-1].endswith(f"stopped by {name}; the same command continues from there")
    if phase not in ("preparation", "compilation"):
        newest = max(storage.saved_steps(tmp_path / "run" / "checkpoints"))
        assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, newest + 1))
        assert newest == STEPS or phase == "a step"
    assert_completed(tmp_path, text, undisturbed)
