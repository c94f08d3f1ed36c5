"""Requests to stop: SIGTERM, SIGUSR1, SIGHUP and Ctrl-C, heard from before JAX is imported until the last close.

What the first of them does depends on what the process is at:

* `Stopped` is raised where the program is; nothing that it leaves is half-written. While it imports a module, which
  would be left half-made (XLA's then ends the process), that waits until the import is done.
* While a part of the program has signals `held`, they are remembered, and it asks for them (`heard`) when it can save.
* Where neither helps, as Python runs no handler inside a compiler, a thread ends the process after `PATIENCE`.

A second Ctrl-C ends the process at once. This file knows nothing of JAX.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from tiedjax.errors import Status
from tiedjax.host.ending import end

HEARD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
PATIENCE = 10.0  # seconds in which a program that is not saving must have ended by itself
AGAIN_AFTER = 0.02  # seconds until a place is looked at again where no exception may be raised
INTERRUPTED = 128 + signal.SIGINT


class Stopped(BaseException):
    """A signal came that was not held; str() is what a person reads."""

    status = Status.AGAIN

    def __init__(self, number: int):
        super().__init__(sentence(signal.Signals(number).name))
        self.number = number


def sentence(reason: str) -> str:
    """How a process says that it was stopped."""
    return f"stopped by {reason}; the same command continues from there"


def _remember(number: int) -> None:
    """What most do with a signal while they hold it."""


def _must_go_on(frame: FrameType | None) -> bool:
    """Whether an exception would leave a module half-made, or be lost in JAX's callback of the garbage collector."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib") or code.co_name == "_xla_gc_callback":
            return True
        frame = frame.f_back
    return False


class _Hearing:
    """While this is entered signals are requests to stop; all but `_listen` is the main thread's."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.holds: list[Callable[[int], None]] = []  # what is done with a signal, by the innermost that holds it last
        self.brief = 0  # how many parts of what is held must end soon
        self.told: list[Callable[[str], None]] = []
        self.end: Callable[[str, int], Any] = end
        self.elsewhere: signal.Signals | None = None  # what another process of the cluster heard first
        self._previous: dict[int, Any] = {}
        self._reading, self._writing, self._wakeup = -1, -1, -1

    def __enter__(self) -> _Hearing:
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        for number in HEARD:
            # What whoever started this process has it ignore, as nohup does, stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if signal.SIGALRM in self._previous:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writing)  # which ends the thread

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_first, self.first = self.first is None, self.first or self.elsewhere or signal.Signals(number)
        if self.holds:
            self.holds[-1](number)
        elif is_first:
            self._stop(self.first, frame)

    def _stop(self, first: signal.Signals, frame: FrameType | None) -> None:
        if not _must_go_on(frame):
            raise Stopped(first)

        def again(_: int, frame: FrameType | None) -> None:
            if self.holds:
                self.holds[-1](first)
            else:
                self._stop(first, frame)

        self._previous.setdefault(signal.SIGALRM, signal.getsignal(signal.SIGALRM))
        signal.signal(signal.SIGALRM, again)
        signal.setitimer(signal.ITIMER_REAL, AGAIN_AFTER)

    def _listen(self) -> None:
        interrupts, reason, deadline = 0, "", 0.0
        while True:
            if select.select([self._reading], [], [], 0.2 if reason else None)[0]:
                number = os.read(self._reading, 1)
                if not number:
                    break
                if number[0] not in HEARD:
                    continue  # that of `again`, which gives up before these could keep this from looking at the time
                interrupts += number[0] == signal.SIGINT
                if interrupts > 1:
                    self.end("interrupted", INTERRUPTED)
                if not reason:
                    reason = (self.elsewhere or signal.Signals(number[0])).name
                    deadline = time.monotonic() + PATIENCE
                    for tell in list(self.told):
                        tell(reason)
            elif self.holds and not self.brief:
                deadline = time.monotonic() + PATIENCE
            elif time.monotonic() >= deadline:
                self.end(sentence(reason), Status.AGAIN)
        os.close(self._reading)


_hearing: _Hearing | None = None


@contextlib.contextmanager
def hearing() -> Iterator[None]:
    """From here on signals are requests to stop, until the outermost of these is left. Only the main thread hears."""
    global _hearing
    if _hearing or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _Hearing() as _hearing:
        try:
            yield
        finally:
            _hearing = None


@contextlib.contextmanager
def held(receive: Callable[[int], None] = _remember) -> Iterator[None]:
    """While this is entered a signal does nothing but call `receive`, in the main thread."""
    with hearing():
        here = _hearing
        if here:
            here.holds.append(receive)
        try:
            yield
        finally:
            if here:
                here.holds.pop()


@contextlib.contextmanager
def brief() -> Iterator[None]:
    """A part of what is held that is not to delay the end: after `PATIENCE` there is no more."""
    here = _hearing
    if here:
        here.brief += 1
    try:
        yield
    finally:
        if here:
            here.brief -= 1


def is_brief() -> bool:
    """Whether such a part is under way."""
    return _hearing is not None and _hearing.brief > 0


def heard() -> signal.Signals | None:
    """The first signal."""
    return _hearing.first if _hearing else None


def heard_elsewhere(reason: str) -> None:
    """Another process of the cluster has heard this signal: as if it had come here too."""
    if _hearing and _hearing.first is None:
        _hearing.elsewhere = signal.Signals[reason]
        os.kill(os.getpid(), signal.SIGTERM)


def pass_on(tell: Callable[[str], None], end_all: Callable[[str, int], Any]) -> None:
    """From here on `tell` hears the name of the first signal, in another thread, and `end_all` ends the process."""
    if _hearing:
        _hearing.told.append(tell)
        _hearing.end = end_all
