"""Work side by side on one machine's CPU: long-lived processes that each call one function after the other.

A worker is `python -m tiedjax.host.workers [CORES]`. It reads a line of JSON for each call from standard input and
answers with lines of JSON: what the call prints, then what it returns. A worker whose parent is gone ends at once.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import queue
import select
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiedjax.errors import (
    LockedError,
    NoCheckpointError,
    NotFiniteError,
    Status,
    StoreError,
    TakenOverError,
    TrainingError,
    UserError,
)
from tiedjax.host import platform_flags, signals, storage

_ERRORS = (
    *(UserError, LockedError, NoCheckpointError, StoreError),
    *(TrainingError, NotFiniteError, TakenOverError),
)
FAILURES: dict[str, type[Exception]] = {error.__name__: error for error in _ERRORS}
PATIENCE = 20.0  # seconds between asking an idle worker to end and killing it


class ProcessEnded(TrainingError):
    """A process that ended before its call had returned: killed, out of memory, or of an error of ours."""

    def __init__(self, task: str, status: int):
        super().__init__(f"{task}: its process ended with status {status}")


@dataclass(frozen=True)
class Task:
    """One call: `module:function`, its keyword arguments and its result in JSON; `name` says what it is about.

    It begins when those at the places `after` in its batch have ended. Tasks of one `kind` share what a process has
    compiled for the first of them.
    """

    name: str
    function: str
    arguments: dict[str, Any]
    kind: str = ""
    after: tuple[int, ...] = ()


def call(task: Task) -> Any:
    """The call, in this process."""
    return _call(task.function, task.arguments)


def _call(function: str, arguments: Mapping[str, Any]) -> Any:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(**arguments)


class _Worker:
    """A process, the task that it has, and the part of a line that it has sent so far."""

    def __init__(self, threads: int, cores: Sequence[int] | None):
        environment: dict[str, str] = dict(os.environ)
        platform_flags.use_threads(threads, environment)
        pinned = [",".join(map(str, cores))] if cores else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tiedjax.host.workers", *pinned],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C reaches the parent alone, which asks each worker once
        )
        assert self.process.stdin
        assert self.process.stdout
        self._input, self.output = self.process.stdin, self.process.stdout
        self.task: Task | None = None
        self.place = 0  # of the task among those of its batch
        self.kinds: set[str] = set()  # of all tasks that it was given
        self._rest = b""

    def give(self, place: int, task: Task) -> None:
        """Hands over the next task."""
        self.place, self.task = place, task
        self.kinds.add(task.kind)
        line = json.dumps({"function": task.function, "arguments": task.arguments}) + "\n"
        with contextlib.suppress(BrokenPipeError):  # it has died; its output ends and says so
            self._input.write(line.encode())
            self._input.flush()

    def messages(self) -> Iterator[dict[str, Any] | None]:
        """What it has sent since the last call; None at its end."""
        data = os.read(self.output.fileno(), 2**20)
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


class Crew:
    """`workers` processes with `threads` threads each; `say` takes the lines that their calls print.

    While it runs tasks a signal asks every worker that has one to stop, and is remembered as `signal`; a second Ctrl-C
    ends the workers at once, and this process.
    """

    def __init__(self, workers: int, threads: int, say: Callable[[str], None]):
        self.size, self._threads, self._say = workers, threads, say
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._failure: Exception | None = None
        self.signal: signal.Signals | None = None

    def __enter__(self) -> Crew:
        shares = _shares(self.size, self._threads)
        for place in range(self.size):
            worker = _Worker(self._threads, shares[place] if shares else None)
            self._workers.append(worker)
            self._selector.register(worker.output, selectors.EVENT_READ, worker)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.dismiss()
        self._selector.close()

    def run(
        self,
        tasks: Sequence[Task],
        begins: Callable[[int, Task], None] = lambda place, task: None,
        enough: Callable[[Task, Any], bool] = lambda task, result: False,
    ) -> dict[int, Any]:
        """Place: result of the tasks that were called, each by the next worker that is free; `begins` hears of each.

        A worker takes the first that can begin, if it can one of a kind that it has had before. After a result that is
        `enough`, or a signal, no other begins. Raises the UserError or TrainingError of the first that fails, once the
        others have stopped.
        """
        self._waiting = dict(enumerate(tasks))
        self._begins, self._enough = begins, enough
        results: dict[int, Any] = {}
        with signals.held(self._receive):
            self._share_out(results)
            while any(worker.task for worker in self._workers):
                for key, _ in self._selector.select():
                    for message in key.data.messages():
                        self._take(key.data, message, results)
        if self._failure:
            raise self._failure
        return results

    def _share_out(self, results: Mapping[int, Any]) -> None:
        """Gives every idle worker a task, as long as there are some that can begin."""
        for worker in self._workers:
            ready = [place for place, task in self._waiting.items() if results.keys() >= set(task.after)]
            if worker.task or not ready or self.signal or self._failure:
                continue
            place = next((place for place in ready if self._waiting[place].kind in worker.kinds), ready[0])
            task = self._waiting.pop(place)
            self._begins(place, task)
            worker.give(place, task)
            if self.signal:  # it came meanwhile, when this worker had nothing to stop
                worker.process.send_signal(signal.SIGTERM)

    def _take(self, worker: _Worker, message: Mapping[str, Any] | None, results: dict[int, Any]) -> None:
        task = worker.task
        if message is None:
            self._selector.unregister(worker.output)
            worker.task = None
            if task and not self.signal and not self._failure:
                self._fail(ProcessEnded(task.name, worker.process.wait()))
        elif "say" in message:
            self._say(message["say"])
        elif "stopped" in message:
            worker.task = None
        elif "failed" in message:
            worker.task = None
            self._fail(FAILURES[message["failed"]](message["message"]))
        elif task:
            worker.task = None
            results[worker.place] = message["result"]
            if self._enough(task, message["result"]):
                self._waiting.clear()
            self._share_out(results)

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        self._ask_all(signal.SIGTERM)

    def _receive(self, number: int) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            self._ask_all(signal.SIGTERM)

    def _ask_all(self, number: signal.Signals) -> None:
        for worker in self._workers:
            if worker.task and worker.process.poll() is None:
                worker.process.send_signal(number)


class Aside:
    """One call by a process of its own, beside what this one does; it ends with this one, however this one ends."""

    def __init__(self, task: Task):
        self._worker: _Worker | None = _Worker(1, None)
        self._worker.give(0, task)
        self._poll = select.poll()
        self._poll.register(self._worker.output, select.POLLIN)

    def returned(self, seconds: float = 0) -> bool:
        """Whether the call has returned, at once or after waiting so long; raises its UserError or TrainingError.

        ProcessEnded if the process has ended before; from then on there is nothing to wait for.
        """
        if self._worker and self._poll.poll(1000 * seconds):
            for message in self._worker.messages():
                self._take(self._worker, message)
        return self._worker is None

    def _take(self, worker: _Worker, message: Mapping[str, Any] | None) -> None:
        if message is not None and "say" in message:
            return
        self._worker = None
        if message is None:
            assert worker.task
            raise ProcessEnded(worker.task.name, worker.process.wait())
        worker.dismiss()
        if "failed" in message:
            raise FAILURES[message["failed"]](message["message"])

    def end(self) -> None:
        """Ends the process if the call has not returned."""
        if self._worker:
            self._worker.process.kill()
            self._worker.dismiss()
            self._worker = None


def _shares(workers: int, threads: int) -> list[list[int]] | None:
    """Cores of its own for every worker: two that wander over the same cores slow each other; None: too few cores."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < workers * threads:
        return None
    return [cores[i * threads : (i + 1) * threads] for i in range(workers)]


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
    """Makes the calls that standard input names, until it ends."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no message

    def send(message: Mapping[str, Any]) -> None:
        channel.write(json.dumps(message, allow_nan=False) + "\n")

    sys.stdout = _Said(send)
    calls: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_receive_calls, args=(calls,), daemon=True).start()
    while True:
        request = json.loads(calls.get())
        try:
            result = _call(request["function"], request["arguments"])
        except (UserError, TrainingError) as error:
            send({"failed": _known(type(error)), "message": str(error)})
        except signals.Stopped:
            send({"stopped": request["function"]})
        except Exception as error:
            if not (line := storage.failure(error)):
                raise
            send({"failed": StoreError.__name__, "message": line})
        else:
            send({"result": result})


def _known(kind: type[Exception]) -> str:
    """The name of an error, or of what it is a kind of, under which the parent knows it."""
    return next(base.__name__ for base in kind.__mro__ if base.__name__ in FAILURES)


def _receive_calls(calls: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        calls.put(line)
    os._exit(0)  # the parent has no more calls, or is gone: what a run has saved is enough to continue from


if __name__ == "__main__":
    if len(sys.argv) > 1:
        os.sched_setaffinity(0, map(int, sys.argv[1].split(",")))
    with signals.hearing():
        try:
            serve()
        except signals.Stopped:  # between two calls
            sys.exit(Status.AGAIN)
