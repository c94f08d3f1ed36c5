"""Where lines of metrics go beside metrics.jsonl: each place has a thread of its own, and none of them stops a run."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

LIMIT = 4096  # lines that wait for a sink; those that come after are lost
PATIENCE = 5.0  # seconds in which all sinks together must end
TITLES = {"wandb": "W&B", "trackio": "trackio", "mlflow": "MLflow"}


class Writer(Protocol):
    """What a sink's thread calls. Whatever it raises costs the line, and those that are `unsure` then.

    Attributes:
      over: it takes no further line.
      unsure: how many lines it took which may not have arrived yet.
    """

    over: bool
    unsure: int

    def open(self) -> None:
        """Begins; nothing is written if it raises."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Takes the scalars of one step."""

    def close(self) -> None:
        """Ends in order."""

    def abandon(self) -> None:
        """Ends at once what hangs; called by another thread."""


class Sink:
    """Hands lines to a writer in a thread of its own, which opens it too; never raises, and waits in `close` alone.

    The first failure is said in one line on standard error, which begins with `name`, and at the end how many lines
    were lost. `advice` is what follows on "the run goes on" when that is said.
    """

    def __init__(self, name: str, writer: Writer, advice: Callable[[], str] = str):
        self._name, self._writer, self._advice = name, writer, advice
        self._lines: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._handed = self._arrived = 0
        self._failed = self._left = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Leaves the scalars of one step to the thread; they are lost if too many lines wait."""
        self._handed += 1
        if self._lines.qsize() < LIMIT:
            self._lines.put((step, scalars))
        else:
            self._say_failed(f"{LIMIT} lines wait for it")

    def end(self) -> None:
        """No line follows."""
        self._lines.put(None)

    def close(self, until: float) -> None:
        """Waits until the thread has ended, after `end`, or the clock has passed `until`; says what was lost."""
        self._thread.join(max(0.0, until - time.monotonic()))
        hangs = self._thread.is_alive()
        self._left = True
        lost = self._handed - self._arrived
        if lost:
            reason = f"; it did not answer within {PATIENCE:g} s" if hangs else ""
            say(f"{self._name} lost {lost} of {self._handed} lines{reason}")
            if hangs:
                self._writer.abandon()
        elif hangs:
            say(f"{self._name} did not end within {PATIENCE:g} s; nothing waits for it")

    def _work(self) -> None:
        writer = self._writer
        try:
            writer.open()
        except Exception as error:  # of any library
            writer.over = True
            self._say_failed(reason_of(error))
        while (line := self._lines.get()) is not None:
            if not writer.over:
                try:
                    writer.write(*line)
                    self._arrived += 1
                except Exception as error:
                    self._lose(error)
        if not writer.over:
            try:
                writer.close()
            except Exception as error:
                self._lose(error)

    def _lose(self, error: Exception) -> None:
        self._arrived -= self._writer.unsure
        self._writer.unsure = 0
        self._say_failed(reason_of(error))

    def _say_failed(self, reason: str) -> None:
        if not self._failed and not self._left:
            self._failed = True
            say(f"{self._name} cannot be written: {reason}; the run goes on{self._advice()}")


class Tracker:
    """A tracking service, whose library runs in a process of its own: `tiedjax.trackers`.

    These libraries take signals, start servers, and wait at the end of their process for a network that may be gone.
    The process answers each line. It is in no terminal's group, and ends a minute after this one if not before.
    """

    def __init__(self, kind: str, folder: Path, label: str, config: dict[str, Any]):
        self.over, self.unsure = False, 0
        self._command = [sys.executable, "-m", "tiedjax.trackers", kind]
        self._begun = {"folder": str(folder.absolute()), "label": label, "config": config}
        self._process: subprocess.Popen[bytes] | None = None

    def open(self) -> None:
        """Starts the process, and the service's run in it."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._ask(self._begun)
        except OSError:
            self.abandon()
            raise

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Raises OSError with the library's reason if it does not take them."""
        self._ask({"step": step, "scalars": scalars})

    def close(self) -> None:
        """Waits until everything is where it belongs."""
        self.over = True
        assert self._process
        assert self._process.stdin
        self._process.stdin.close()
        self._answered()
        self._process.wait()

    def abandon(self) -> None:
        """Kills the process and those that it started."""
        if self._process:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _ask(self, request: dict[str, Any]) -> None:
        assert self._process
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended, perhaps with a reason
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        self._answered()

    def _answered(self) -> None:
        assert self._process
        assert self._process.stdout
        answer = self._process.stdout.readline()
        if not answer.endswith(b"\n"):
            self.over = True
            raise OSError(f"its process ended with status {self._process.wait()}")
        if error := json.loads(answer)["error"]:
            raise OSError(error)


def close(sinks: list[Sink]) -> None:
    """Ends them all, side by side, in at most `PATIENCE` seconds."""
    until = time.monotonic() + PATIENCE
    for sink in sinks:
        sink.end()
    for sink in sinks:
        sink.close(until)


def say(line: str) -> None:
    """Prints a line of the program on standard error."""
    with contextlib.suppress(OSError, ValueError):  # closed, or a pipe that nobody reads
        print(f"tiedjax: {line}", file=sys.stderr, flush=True)


def reason_of(error: Exception) -> str:
    """Why it failed, in a few words."""
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or (str(error).splitlines() or [type(error).__name__])[0]
