"""Membership of a cluster of processes, how they end together, and requests to stop."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from weakref import WeakSet

import jax
import numpy as np
from jax.experimental import multihost_utils

from tiedjax.errors import NotJoinedError, Status, TrainingError, UserError
from tiedjax.host import launched, platform_flags, signals, storage
from tiedjax.host.ending import end
from tiedjax.host.watch import HEARTBEAT, Hub, Spoke, Watch

_watch: Watch | None = None  # of this process's cluster, once it has joined one
_called: WeakSet[Any] = WeakSet()  # functions that have compiled
_TIME, _SAVE = "the time", "a save"  # what is asked of a run where it is no signal


class _Closeable(Protocol):
    def close(self) -> None: ...


_Saves = TypeVar("_Saves", bound=_Closeable)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def join_cluster(
    coordinator: str | None, processes: int | None, process_id: int | None, heartbeat: float | None = None
) -> None:
    """Joins the other processes of the job, if there are any; must come before JAX is used.

    `heartbeat` is after how many seconds of silence of one of them all end.

    Explicit flags win over what the environment says (`launched.told`); JAX finds the rest itself. UserError if either
    is incomplete, NotJoinedError if nobody answers.
    """
    if heartbeat is not None and not heartbeat >= 1:
        raise UserError(f"--heartbeat: must be at least 1 second, got {heartbeat:g}")
    flags = (coordinator, processes, process_id)
    if any(flag is not None for flag in flags):
        if coordinator is None or processes is None or process_id is None:
            raise UserError(
                "--coordinator HOST:PORT, --processes N and --process-id I belong together; give all three or none"
            )
        if processes < 1:
            raise UserError(f"--processes: must be at least 1, got {processes}")
        if not 0 <= process_id < processes:
            raise UserError(
                f"--process-id: must be from 0 to {processes - 1} (--processes {processes}), got {process_id}"
            )
        if ":" not in coordinator:
            raise UserError(f"--coordinator: must be HOST:PORT, got {coordinator!r}")
    elif found := launched.told():
        coordinator, processes, process_id = found
    else:
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        jax.distributed.initialize(coordinator, processes, process_id)
    except (ValueError, TypeError, KeyError) as error:  # the last two of variables that JAX reads itself
        raise UserError(f"cannot join the cluster: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:  # nobody answers yet, or any more
        raise NotJoinedError(f"cannot join the cluster: {str(error).splitlines()[0]}") from error
    if jax.process_count() > 1:
        _watch_over_cluster(coordinator, HEARTBEAT if heartbeat is None else heartbeat)


def _watch_over_cluster(coordinator: str | None, heartbeat: float) -> None:
    """From here on whatever ends one process ends all; says so in one line if process 0 cannot be reached for that."""
    global _watch
    watch: Watch | None = None
    if is_main():
        with contextlib.suppress(OSError):
            watch = Hub(jax.process_count(), heartbeat)
    host = coordinator.rsplit(":", 1)[0].strip("[]") if coordinator else None
    invitation = _from_main(watch.invitation(host) if isinstance(watch, Hub) else {})
    if invitation and not is_main():
        watch = Spoke.reach(jax.process_index(), invitation)
    unreached = [i for i, laid in enumerate(_gathered(watch is not None)) if not laid]
    if watch and not unreached:
        watch.on_asked = _hear
        signals.pass_on(watch.ask, watch.fail)
        _watch = watch
        return
    if watch:
        watch.close()
    if is_main():
        print(
            f"tiedjax: process {unreached[0]} cannot reach process 0 beside JAX's own port; "
            "when a process fails, the others notice only after a minute or two, and a signal saves nothing",
            file=sys.stderr,
            flush=True,
        )


def _hear(request: str) -> None:
    if request not in (_TIME, _SAVE):
        signals.heard_elsewhere(request)


def _from_main(message: dict[str, Any]) -> dict[str, Any]:
    """Process 0's message, on every process."""
    content = np.zeros(2**15, np.uint8)  # room for the longest path
    text = json.dumps(message).encode()
    content[: len(text)] = np.frombuffer(text, np.uint8)
    return dict(json.loads(bytes(multihost_utils.broadcast_one_to_all(content)).rstrip(b"\0")))


def _gathered(answer: bool) -> list[bool]:
    """Every process's answer, by process, on every process."""
    return np.asarray(multihost_utils.process_allgather(np.array(answer))).ravel().astype(bool).tolist()


def same_everywhere(text: str) -> bool:
    """Whether all processes hold the same text here; all of them ask together."""
    if jax.process_count() == 1:
        return True
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)
    return bool((np.asarray(multihost_utils.process_allgather(digest)) == digest).all())


def main_says(answer: Callable[[], bool]) -> bool:
    """Process 0's answer, on every process; all of them ask together, and it alone looks.

    What another would read, process 0 may be writing or removing already.
    """
    if jax.process_count() == 1:
        return answer()
    return bool(multihost_utils.broadcast_one_to_all(np.array(is_main() and answer())))


def from_main(found: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What process 0 finds, JSON of at most 32 KiB, on every process; all of them ask together.

    What is read of a disk may differ between machines for a while.
    """
    return _from_main(found() if is_main() else {}) if jax.process_count() > 1 else found()


def refuse_unshared(folder: Path) -> None:
    """UserError on every process unless all of them see in `folder` what process 0 writes; nothing is left behind.

    Also where it lies in a bucket that there is not, or that does not answer.
    """
    storage.refuse_unknown_bucket(folder)
    if jax.process_count() == 1 or storage.is_remote(folder):  # a bucket is shared
        return
    missing, message = [path for path in (folder, *folder.parents) if not path.exists()], {}
    if is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, path = tempfile.mkstemp(prefix=".shared-", dir=folder)
            os.close(handle)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
        message = {"folder": str(folder), "name": Path(path).name}
    message = _from_main(message)
    token = folder / message["name"]
    blind = [i for i, seen in enumerate(_gathered(_appears(token))) if not seen]
    if is_main():
        token.unlink()
        for made in missing if blind else []:
            made.rmdir()
    if blind:
        raise UserError(
            f"{message['folder']}: --out must name one folder that all processes share; "
            f"process {blind[0]} does not see what process 0 wrote there"
        )


def _appears(path: Path) -> bool:
    for _ in range(20):
        for folder in (path.parent.parent, path.parent):
            with contextlib.suppress(OSError):
                os.listdir(folder)  # has a network disk look again instead of remembering
        if path.exists():
            return True
        time.sleep(0.1)
    return False


class Cause(NamedTuple):
    """Why a process ends, in one line; its exit status; whether the line says all that a person needs."""

    line: str
    status: int
    enough: bool


def cause(error: BaseException) -> Cause:
    """Why a process ends that raised this."""
    if isinstance(error, KeyboardInterrupt):
        return Cause("interrupted", signals.INTERRUPTED, True)
    if isinstance(error, UserError | TrainingError | signals.Stopped):
        return Cause(" ".join(str(error).split()), error.status, True)
    if line := storage.failure(error):
        return Cause(line, Status.FAILED, True)
    lines = str(error).splitlines()
    if isinstance(error, jax.errors.JaxRuntimeError) and re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)):
        return Cause(f"{lines[0]} Try a larger mesh or more data.microbatches.", 1, True)
    return Cause(": ".join([type(error).__name__, *lines[:1]]), 1, False)


def end_all(line: str, status: int) -> None:
    """Ends this process at once, and in a cluster all others, each with this line as its last one."""
    (_watch.fail if _watch else end)(line, status)


def end_cluster_if_any(why: Cause) -> None:
    """In a cluster ends this process at once, and with it all others, each with this cause as its last line.

    An orderly exit would wait for processes that cannot go on.
    """
    if _watch:
        _watch.fail(why.line, why.status)
    if jax.process_count() > 1:
        end(why.line, why.status)


def end_cluster_soon_if_any(error: BaseException) -> None:
    """As `end_cluster_if_any`, but returns, and leaves this process a little time to finish what it is saving."""
    if _watch:
        why = cause(error)
        _watch.expect(why.line, why.status)


def part_from_cluster_if_any() -> None:
    """Waits until all processes of the cluster, if there is one, are done; what ends one until then ends all."""
    if _watch:
        _watch.part()


@contextlib.contextmanager
def closing(saves: _Saves) -> Iterator[_Saves]:
    """As contextlib.closing. In a cluster all processes are ended if closing takes long after an error.

    It may be waiting for processes that never come. What ended the work is raised, not what closing then finds wrong:
    that is said.
    """
    try:
        yield saves
    except BaseException as error:  # an interrupt too: the others wait for this process, whatever ends it
        end_cluster_soon_if_any(error)
        try:
            saves.close()
        except Exception as later:  # of the file system or a store, as Orbax, TensorStore or Python tell it
            say(f"a save failed too: {cause(later).line}")
        raise
    else:
        saves.close()


def keep_freed_memory() -> None:
    """Lets this process keep the memory it frees, under glibc; elsewhere does nothing.

    XLA:CPU allocates its temporaries anew at every step. glibc by default hands blocks of that size back to the kernel
    each time, and page faults then take a large part of a small model's step. A process that computes with one thread
    has one heap: of the heaps that glibc makes for further threads, none holds a block above 64 MiB. With several
    threads they would wait for one another there, and such a block is still handed back.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, top_pad, mmap_threshold, arena_max = -1, -2, -3, -8  # the numbers of malloc.h
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**30)
        # A thread's heap that is empty is given back unless it is smaller than this, whatever the threshold is.
        libc.mallopt(top_pad, 2**27)
        if platform_flags.threads_in_force() == 1:
            libc.mallopt(arena_max, 1)


def keep_compiled(folder: Path) -> None:
    """Lets this process find what others have compiled, and leave what it compiles, in `folder`.

    What JAX_COMPILATION_CACHE_DIR names comes first, and JAX_ENABLE_COMPILATION_CACHE=false turns it off. Processes may
    share the folder: entries are never changed, in a cluster process 0 alone writes, and an entry that a killed process
    left incomplete is compiled anew. Not for CPUs: there an entry is machine code for one kind of CPU, and on many of
    Intel's the loader rejects even its own, with an error line each that speaks of SIGILL (openxla/xla#44565).
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(folder))


def is_main() -> bool:
    """Whether this is the process that prints and writes files."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """Prints a line, on the main process of a cluster only. Nothing depends on it: the terminal may be gone."""
    if is_main():
        with contextlib.suppress(OSError, ValueError):
            print(line, flush=True)


@contextlib.contextmanager
def first_call(function: _Function) -> Iterator[_Function]:
    """The function, whose first call in this process compiles: no signal waits for the end of that."""
    with contextlib.nullcontext() if function in _called else signals.brief():
        yield function
    _called.add(function)


class Requests:
    """What is asked of a run between its steps: to stop, by a signal or as the time is up, or to `save`.

    From `listen` until it is left signals are held: entered before what must be closed in peace, it lets a save in
    progress be finished. In a cluster a signal to any process stops all of them after one step. The time is up when the
    clock has passed `until`; a save is due `save_every` seconds after the last: in a cluster process 0 says so.
    """

    def __init__(
        self,
        until: float | None = None,
        save_every: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.signal: signal.Signals | None = None
        self.time_is_up = self.save = False
        self._until, self._save_every, self._clock = until, save_every, clock
        self._saved_at = clock()
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Requests:
        return self

    def listen(self) -> None:
        """From here on a signal is a request; until here it ends what this process does."""
        self._held.enter_context(signals.held())

    def __exit__(self, *_: object) -> None:
        self.signal = self.signal or signals.heard()  # while the last save was closed
        self._held.close()

    def saved(self) -> None:
        """A save was begun just now."""
        self.save, self._saved_at = False, self._clock()

    def stops(self) -> bool:
        """Whether to stop here. All processes of a cluster ask at the same moments."""
        now = self._clock()
        due = [
            *([_TIME] if self._until is not None and now >= self._until else []),
            *([_SAVE] if self._save_every is not None and now >= self._saved_at + self._save_every else []),
        ]
        if jax.process_count() == 1:
            self._take([*due, *([number.name] if (number := signals.heard()) else [])])
        elif _watch:
            for request in due if is_main() else []:
                _watch.ask(request)
            self._take(_watch.reached())
        elif number := signals.heard():
            raise signals.Stopped(number)
        return self.signal is not None or self.time_is_up

    def _take(self, requests: list[str]) -> None:
        for request in requests:
            if request == _SAVE:
                self.save = True
            elif request == _TIME:
                self.time_is_up = True
            else:
                self.signal = self.signal or signal.Signals[request]
