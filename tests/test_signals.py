"""Each signal in each phase of a command: it ends within 20 s with status 75, and the same command then completes."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import slow_but
from programs import finish, start, tiedjax, until
from runs import STEPS, arguments, assert_same_run, rows

from tiedjax import cli, load_run
from tiedjax.host import signals

LIMIT = 20.0  # seconds from a signal to the end
SENTENCE = "tiedjax: stopped by {}; the same command continues from there"
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT]

PRELUDE = """
import contextlib, hashlib, os, pathlib, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may have it ignored
from tiedjax import cli
def now():
    pathlib.Path({mark!r}).touch()
    os.kill(os.getpid(), {number})
def soon(seconds=1.0):
    threading.Timer(seconds, now).start()
def deaf(*_):
    "Like a compiler: runs no Python, and no signal interrupts it."
    soon()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
def signalled(*_, **__):
    soon()
    time.sleep(600)
"""

PHASES = {
    "reading the config": "cli.load_run_config = signalled",
    "preparation": "from tiedjax import loop\nloop.prepare = signalled",
    "preparation in a library": "from tiedjax import loop\nloop.prepare = lambda *_, **__: deaf()",
    "the beginning": "from tiedjax import loop\nloop.begin = signalled",
    "compilation": """
from tiedjax.host import process
first_call = process.first_call
@contextlib.contextmanager
def slow(function):
    with first_call(function) as called:
        if function not in process._called:
            deaf()
        yield called
process.first_call = slow
""",
    "training": """
from tiedjax import loop
stops, asked = loop.process.Requests.stops, []
def at_3(self):
    asked.append(None)
    if len(asked) == 3:
        now()
    return stops(self)
loop.process.Requests.stops = at_3
""",
    "evaluation": """
from tiedjax import evaluation
eval_batches = evaluation.eval_batches
def slow(*arguments):
    for i, batch in enumerate(eval_batches(*arguments)):
        yield batch
        if i == 0:
            now()
        else:
            time.sleep(30)
evaluation.eval_batches = slow
""",
    "the last save": """
import orbax.checkpoint as ocp
finalize = ocp.PyTreeCheckpointHandler.finalize
def slow(self, directory):
    if "checkpoints/8" in str(directory):
        now()
        time.sleep(2)
    finalize(self, directory)
ocp.PyTreeCheckpointHandler.finalize = slow
""",
}


# Of all that is the product of these, what is tried at every change.
def program(tmp_path: Path, number: int, hook: str, argv: list[str]) -> subprocess.Popen[str]:
    prelude = PRELUDE.format(mark=str(tmp_path / "mark"), number=int(number))
    return start(["-c", f"{prelude}\n{hook}\nsys.exit(cli.main(sys.argv[1:]))", *argv])


def ended(process: subprocess.Popen[str], tmp_path: Path, number: signal.Signals) -> None:
    """It ended with status 75 in time, and says why in its last line, the only one on standard error."""
    _, stderr = finish(process, seconds=120, status=75)
    assert time.time() - (tmp_path / "mark").stat().st_mtime < LIMIT
    assert stderr == SENTENCE.format(number.name) + "\n"


@pytest.mark.parametrize(
    ("phase", "number"),
    slow_but(
        itertools.product(PHASES, SIGNALS),
        *((phase, signal.SIGTERM) for phase in ("preparation", "compilation", "training")),
        *(("training", signal.SIGINT), ("evaluation", signal.SIGINT), ("the last save", signal.SIGUSR1)),
    ),
)
def test_a_signal_ends_a_run_in_every_phase_and_it_continues(
    phase: str, number: signal.Signals, finished: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    ended(program(tmp_path, number, PHASES[phase], arguments(out, text)), tmp_path, number)
    assert not list(tmp_path.rglob("*.tmp"))
    if phase in ("training", "evaluation", "the last save"):
        assert load_run(out).checkpoint_steps == [3 if phase == "training" else STEPS]
    assert cli.main(arguments(out, text)) == 0
    assert_same_run(out, finished)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in finished.iterdir())


def test_an_evaluation_that_was_given_up_is_made_before_anything_else(
    finished: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where no step is left: until then the run is not trained for a study."""
    out = tmp_path / "run"
    ended(program(tmp_path, signal.SIGTERM, PHASES["evaluation"], arguments(out, text)), tmp_path, signal.SIGTERM)
    assert [row["step"] for row in rows(out)] == list(range(1, STEPS + 1))
    assert "eval_loss" not in rows(out)[-1]
    assert (out / "evaluation_owed.json").read_text() == f'{{"step": {STEPS}}}\n'
    assert cli.main(arguments(out, text)) == 0
    assert "nothing to do" not in capfd.readouterr().out
    assert rows(out) == rows(finished)
    assert cli.main(arguments(out, text)) == 0
    assert "nothing to do" in capfd.readouterr().out


def test_a_second_interrupt_ends_at_once(text: Path, tmp_path: Path) -> None:
    hook = "from tiedjax.checkpoint import Checkpoints\nCheckpoints.close = lambda self: (now(), time.sleep(600))"
    process = program(tmp_path, signal.SIGINT, hook, arguments(tmp_path / "run", text))
    until(lambda: (tmp_path / "mark").exists(), process)
    time.sleep(0.5)
    assert process.poll() is None, "it saves"
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, stderr = finish(process, seconds=20, status=130)
    assert time.monotonic() - began < 5
    assert stderr == "tiedjax: interrupted\n"


def test_what_was_ignored_stays_ignored(text: Path, tmp_path: Path) -> None:
    """As under nohup, which has a command live on when its terminal hangs up."""
    hook = f"signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{PHASES['training']}"
    finish(program(tmp_path, signal.SIGHUP, hook, arguments(tmp_path / "run", text)), seconds=120)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_an_analysis(number: signal.Signals, finished: Path, tmp_path: Path) -> None:
    hook = "from tiedjax.analysis.instruments.norms import command\ncommand.run = signalled"
    ended(program(tmp_path, number, hook, ["analyze", "norms", str(finished)]), tmp_path, number)


# ---- What is heard, in this process ----


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS[:3])
def test_a_signal_is_raised_where_nobody_holds_it(number: signal.Signals) -> None:
    with pytest.raises(signals.Stopped) as caught, signals.hearing():
        os.kill(os.getpid(), number)
    assert (str(caught.value), caught.value.status) == (SENTENCE.format(number.name).removeprefix("tiedjax: "), 75)


def test_a_held_signal_is_remembered_and_only_the_first_counts() -> None:
    received: list[int] = []
    with signals.hearing():
        assert signals.heard() is None
        with signals.held(received.append):
            for number in (signal.SIGUSR1, signal.SIGTERM):
                os.kill(os.getpid(), number)
        assert signals.heard() == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)
    assert received == [signal.SIGUSR1, signal.SIGTERM]
    assert signals.heard() is None


def test_what_is_held_takes_its_time_but_not_what_must_be_brief(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[tuple[str, int]] = []
    monkeypatch.setattr(signals, "PATIENCE", 0.5)
    monkeypatch.setattr(signals, "end", lambda line, status: ended.append((line, status)))
    with signals.hearing(), signals.held():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.5)
        assert not ended
        with signals.brief():
            time.sleep(1.5)
    assert ended[0] == (SENTENCE.format("SIGTERM").removeprefix("tiedjax: "), 75)


def test_help_of_a_command_hears_nothing() -> None:
    assert tiedjax("--version")[0].startswith("tiedjax ")


IMPORTING = """
import os, signal, sys, tempfile, pathlib
from tiedjax.host import signals
folder = tempfile.mkdtemp()
pathlib.Path(folder, "half.py").write_text(
    "import os, signal, time\\nos.kill(os.getpid(), signal.SIGTERM)\\ntime.sleep(0.3)\\nwhole = True\\n"
)
sys.path.insert(0, folder)
def _xla_gc_callback():
    os.kill(os.getpid(), signal.SIGTERM)
    sum(range(10**6))
    print("collected")
try:
    with signals.hearing():
        {act}
        sum(range(10**8))
except signals.Stopped as stopped:
    print(stopped, "half" not in sys.modules or sys.modules["half"].whole)
"""


@pytest.mark.parametrize("act", ["import half", "_xla_gc_callback()"])
def test_a_signal_waits_where_an_exception_would_be_lost_or_leave_a_module_half_made(act: str) -> None:
    out, err = finish(start(["-c", IMPORTING.format(act=act)]))
    said = "stopped by SIGTERM; the same command continues from there True\n"
    assert (out, err) == (said if "half" in act else f"collected\n{said}", "")


EARLY = """
import os, runpy, signal, sys
class Killing:
    def find_spec(self, name, path=None, target=None):
        if name == "tiedjax.cli":
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Killing())
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["tiedjax", "report", "nowhere"]
runpy.run_module("tiedjax", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_heard_while_the_command_line_is_imported(number: signal.Signals) -> None:
    out, err = finish(start(["-c", EARLY.format(number=int(number))]), status=75)
    assert (out, err) == ("", SENTENCE.format(number.name) + "\n")
