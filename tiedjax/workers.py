"""Runs side by side on one machine's CPU: long-lived processes that each train one run after the other.

A worker is `python -m tiedjax.workers [CORES]`. It reads a line of JSON for each run from standard input and answers
with lines of JSON: what the run says, then how it ended. A worker whose parent is gone ends at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tiedjax import platform_flags
from tiedjax.config import RunConfig, structure, to_tree
from tiedjax.errors import TrainingError, UserError
from tiedjax.loop import Outcome, train

FAILURES: dict[str, type[Exception]] = {"UserError": UserError, "TrainingError": TrainingError}
PATIENCE = 20.0  # seconds between asking an idle worker to end and killing it


@dataclass(frozen=True)
class Task:
    """One run and its directory."""

    cfg: RunConfig
    out: Path


def train_all(
    tasks: Sequence[Task], workers: int, threads: int, begins: Callable[[int], None], say: Callable[[str], None]
) -> Outcome:
    """Trains every run, `workers` at a time, each in a process with `threads` threads.

    Returns the outcome of the first that ended before its last step, after which no other begins, or else of the last
    to end. `begins` is called with the place of a run in `tasks` when a worker takes it up, `say` with what runs say.
    SIGINT and SIGTERM ask every worker to save its state and stop, and are named in the outcome; a second one ends
    them at once. Raises the UserError or TrainingError of the first run that fails, once the others have saved and
    stopped.
    """
    crew = _Crew(tasks, begins, say)
    with crew:
        cores = _shares(workers, threads)
        for number in range(min(workers, len(tasks))):
            crew.hire(threads, cores[number] if cores else None)
        crew.work()
    if crew.failure:
        raise crew.failure
    if crew.signal:
        return dataclasses.replace(crew.outcome, finished=False, signal=crew.signal)
    return crew.outcome


def _shares(workers: int, threads: int) -> list[list[int]] | None:
    """Cores of its own for every worker: two that wander over the same cores slow each other; None: too few cores."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < workers * threads:
        return None
    return [cores[i * threads : (i + 1) * threads] for i in range(workers)]


class _Worker:
    """A process, the lines it has sent so far, and the run that it trains."""

    def __init__(self, threads: int, cores: Sequence[int] | None):
        environment: dict[str, str] = dict(os.environ)
        platform_flags.use_threads(threads, environment)
        pinned = [",".join(map(str, cores))] if cores else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tiedjax.workers", *pinned],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C reaches the parent alone, which asks each worker once
        )
        assert self.process.stdin
        assert self.process.stdout
        self._input, self.output = self.process.stdin, self.process.stdout
        self.task: Task | None = None
        self._rest = b""

    def give(self, task: Task) -> None:
        """Hands over the next run."""
        self.task = task
        line = json.dumps({"config": to_tree(task.cfg), "out": str(task.out)}) + "\n"
        with contextlib.suppress(BrokenPipeError):  # it has died; its output ends and says so
            self._input.write(line.encode())
            self._input.flush()

    def messages(self) -> Iterator[dict[str, Any] | None]:
        """What it has sent since the last call; None at its end."""
        data = os.read(self.output.fileno(), 2**16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        yield from map(json.loads, lines)
        if not data:
            yield None

    def dismiss(self) -> None:
        """Ends it: at once when it is idle, killed when that takes long."""
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.output.close()


class _Crew:
    """The workers of one call, and what has come of their runs."""

    def __init__(self, tasks: Sequence[Task], begins: Callable[[int], None], say: Callable[[str], None]):
        self._waiting, self._begins, self._say = iter(enumerate(tasks, 1)), begins, say
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._previous: dict[int, Any] = {}
        self.outcome = Outcome(0, finished=True)
        self.signal: signal.Signals | None = None
        self.failure: Exception | None = None

    def __enter__(self) -> _Crew:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.dismiss()
        self._selector.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def hire(self, threads: int, cores: Sequence[int] | None) -> None:
        """Starts one more worker on its first run."""
        worker = _Worker(threads, cores)
        self._workers.append(worker)
        self._selector.register(worker.output, selectors.EVENT_READ, worker)
        self._next(worker)

    def work(self) -> None:
        """Returns when no worker trains any more."""
        while any(worker.task for worker in self._workers):
            for key, _ in self._selector.select():
                for message in key.data.messages():
                    self._take(key.data, message)

    def _next(self, worker: _Worker) -> None:
        worker.task = None
        if self.signal or self.failure or not self.outcome.finished:
            return
        number, task = next(self._waiting, (0, None))
        if task:
            self._begins(number)
            worker.give(task)

    def _take(self, worker: _Worker, message: Mapping[str, Any] | None) -> None:
        if message is None:
            self._selector.unregister(worker.output)
            task, worker.task = worker.task, None
            if task and not self.signal and not self.failure:
                self._fail(TrainingError(f"{task.out}: its process ended with status {worker.process.wait()}"))
        elif "say" in message:
            self._say(message["say"])
        elif "failed" in message:
            worker.task = None
            self._fail(FAILURES[message["failed"]](message["message"]))
        else:
            if self.outcome.finished:
                self.outcome = Outcome(message["step"], message["finished"])
            self._next(worker)

    def _fail(self, error: Exception) -> None:
        self.failure = self.failure or error
        self._ask_all(signal.SIGTERM)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._ask_all(signal.SIGKILL if self.signal else signal.SIGTERM)
        self.signal = signal.Signals(number)

    def _ask_all(self, number: signal.Signals) -> None:
        for worker in self._workers:
            if worker.task and worker.process.poll() is None:
                worker.process.send_signal(number)


# ---- The worker itself ----


class _Said(io.TextIOBase):
    """Standard output of a worker: every line becomes a message."""

    def __init__(self, send: Callable[[Mapping[str, Any]], None]):
        self._send, self._rest = send, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._send({"say": line})
        return len(text)


def serve() -> None:
    """Trains the runs that standard input names, until it ends."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no message

    def send(message: Mapping[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")

    sys.stdout = _Said(send)
    tasks: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_receive_tasks, args=(tasks,), daemon=True).start()
    while True:
        task = json.loads(tasks.get())
        try:
            outcome = train(structure(RunConfig, task["config"], task["out"]), Path(task["out"]))
        except (UserError, TrainingError) as error:
            send({"failed": type(error).__name__, "message": str(error)})
        else:
            send({"step": outcome.step, "finished": outcome.finished})


def _receive_tasks(tasks: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        tasks.put(line)
    os._exit(0)  # the parent has no more runs, or is gone: what was committed is enough to continue from


if __name__ == "__main__":
    if len(sys.argv) > 1:
        os.sched_setaffinity(0, map(int, sys.argv[1].split(",")))
    serve()
