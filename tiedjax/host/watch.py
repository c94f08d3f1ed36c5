"""A wire from every process of a cluster to process 0, so that whatever ends one of them ends all, with its cause.

JAX alone leaves the others waiting: a minute in a collective, longer in a barrier, and then they die of an error that
names no cause. Requests to stop or to save take the same way, and all agree on the moment. This file knows sockets and
processes, nothing of JAX.
"""

from __future__ import annotations

import contextlib
import json
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from tiedjax.errors import Status
from tiedjax.host.ending import end

GRACE = 15.0  # seconds in which a process that fails may finish what it is saving before all are ended
SETTLING = 1.0  # seconds in which the death of a process may show that caused a failure reported before it
BEATS = 4  # in the time whose silence ends all
PARTING = 5.0  # seconds in which the others may say the cause and go; process 0 goes last, JAX's service with it
REACHING = 5.0  # seconds to reach process 0
HEARTBEAT = 60.0  # seconds of silence that end all; JAX would end them after 100, without a cause


@dataclass(frozen=True)
class Failure:
    """What ends a cluster: which process, its exit status and cause.

    Without a cause it ended without a word, or has been `silent` for so many seconds.
    """

    process: int
    status: int
    cause: str | None
    silent: float | None = None

    def sentence(self, known: str | None) -> str:
        """The line in which a process says it that failed of the cause `known` itself, or of none."""
        if self.silent is not None:
            return f"process {self.process} has been silent for {self.silent:g} s: it is stopped, or its machine hangs"
        if self.cause is None:
            return f"process {self.process} ended without a word: it was killed, or its machine is lost"
        if self.cause == known:
            return self.cause
        verb = "was" if self.status == Status.AGAIN else "failed:"
        return f"process {self.process} {verb} {self.cause}"


@dataclass
class _Request:
    """What is asked of all processes, and the moment of it once all have said which they have not passed."""

    what: str
    moment: int | None = None


class Watch:
    """One process's end of the wire. Subclasses carry reports to where the first of them is chosen."""

    def __init__(self, process: int, heartbeat: float):
        self._process, self._heartbeat = process, heartbeat
        self._cause: str | None = None
        self._over = threading.Event()
        self._deadline: threading.Timer | None = None
        self.on_asked: Callable[[str], None] = lambda request: None  # called in another thread
        self._moment = threading.Condition()
        self._moments = 0  # that have passed
        self._requests: dict[int, _Request] = {}  # what is asked of all and not reached, in the order of asking

    def fail(self, cause: str, status: int) -> NoReturn:
        """Ends all processes, this one included. The first cause of all that are reported is what each one says."""
        self._say(cause, status)
        time.sleep(SETTLING + 2 * PARTING)
        end(cause, status)  # nobody answered

    def expect(self, cause: str, status: int) -> None:
        """Announces `fail`: all processes end after `GRACE` at the latest."""
        if not self._deadline:
            self._deadline = threading.Timer(GRACE, self._say, [cause, status])
            self._deadline.daemon = True
            self._deadline.start()

    def ask(self, request: str) -> None:
        """Asks something of all processes at one moment, the next that none of them has passed.

        Also within a signal's thread: those that wait in a library hear of it too. What is asked already is asked once.
        """
        raise NotImplementedError

    def reached(self) -> list[str]:
        """What is asked of all processes at this moment, in one order.

        All come to the same moments. Between them they do what needs all.
        """
        with self._moment:
            self._moments += 1
            self._moment.wait_for(lambda: all(asked.moment is not None for asked in self._requests.values()))
            here = [number for number, asked in self._requests.items() if self._moments >= (asked.moment or 0)]
            return [self._requests.pop(number).what for number in here]

    def _asked(self, number: int, request: str) -> int:
        """Hears a request; the next moment that this process has not passed."""
        with self._moment:
            self._requests[number] = _Request(request)
            here = self._moments + 1
        self.on_asked(request)
        return here

    def _agree(self, number: int, moment: int) -> None:
        with self._moment:
            self._requests[number].moment = moment
            self._moment.notify_all()

    def part(self) -> None:
        """Returns when all processes have come here: from then on they may end without being missed."""
        raise NotImplementedError

    def close(self) -> None:
        """Hangs up, as all processes do together; from then on nobody's end is noticed."""
        raise NotImplementedError

    def _say(self, cause: str, status: int) -> None:
        self._cause = self._cause or cause
        self._report(Failure(self._process, status, cause))

    def _report(self, failure: Failure) -> None:
        raise NotImplementedError


class Hub(Watch):
    """Process 0's end: hears the others, and decides which failure was the first."""

    def __init__(self, processes: int, heartbeat: float = HEARTBEAT):
        """`heartbeat`: after so many seconds of silence of one process all end."""
        super().__init__(0, heartbeat)
        self._failures: queue.Queue[Failure] = queue.Queue()
        self._wires: dict[int, socket.socket] = {}
        self._asking = threading.Lock()
        self._asked_so_far = 0
        self._moments_of: dict[int, dict[int, int]] = {}  # of each request, the next moment of each process
        self._processes = processes
        self._waiting, self._all_wait = set(range(1, processes)), threading.Event()
        self._readers: list[threading.Thread] = []
        self._token = secrets.token_hex(16)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=processes, dualstack_ipv6=both)
        for work in (self._accept, self._judge, self._beat):
            threading.Thread(target=work, daemon=True).start()

    def invitation(self, host: str | None) -> dict[str, Any]:
        """What `Spoke.reach` needs: hosts to try in turn (`host` first, if it is known), a port, a password."""
        hosts = [host, socket.gethostname(), _address()]
        port = self._listener.getsockname()[1]
        known = {"port": port, "token": self._token, "heartbeat": self._heartbeat}
        return {"hosts": [name for name in dict.fromkeys(hosts) if name], **known}

    def ask(self, request: str) -> None:
        with self._asking:
            if any(asked.what == request for asked in list(self._requests.values())):
                return
            number = self._asked_so_far = self._asked_so_far + 1
            self._tell({"asked": request, "number": number})
            self._note(number, 0, self._asked(number, request))

    def _note(self, number: int, process: int, moment: int) -> None:
        moments = self._moments_of.setdefault(number, {})
        moments[process] = moment
        if len(moments) == self._processes:
            last = max(self._moments_of.pop(number).values())
            self._tell({"agreed": last, "number": number})
            self._agree(number, last)

    def part(self) -> None:
        self._all_wait.wait()
        self._over.set()
        self._tell({"over": True})

    def close(self) -> None:
        self._over.set()
        self._tell({"over": True})
        self._listener.close()
        for wire in self._wires.values():
            _hang_up(wire)

    def _report(self, failure: Failure) -> None:
        self._failures.put(failure)

    def _accept(self) -> None:
        while True:
            try:
                wire, _ = self._listener.accept()
            except OSError:
                return
            reader = threading.Thread(target=self._listen, args=[wire], daemon=True)
            self._readers.append(reader)
            reader.start()

    def _beat(self) -> None:
        while not self._over.wait(self._heartbeat / BEATS):
            self._tell({"beat": True})

    def _listen(self, wire: socket.socket) -> None:
        wire.settimeout(self._heartbeat)
        messages = _messages(wire)
        greeting = next(messages, {})
        if greeting.get("token") != self._token:
            wire.close()
            return
        process = greeting["process"]
        self._wires[process] = wire
        _send(wire, {"welcome": True})
        for message in messages:
            if "failed" in message:
                self._report(Failure(**message["failed"]))
            elif "ask" in message:
                self.ask(message["ask"])
            elif "moment" in message:
                with self._asking:
                    self._note(message["number"], process, message["moment"])
            elif "silent" in message and not self._over.is_set():
                self._report(Failure(process, Status.STALLED, None, self._heartbeat))
                return
            elif "waiting" in message:
                self._waiting.discard(process)
                if not self._waiting:
                    self._all_wait.set()
        if not self._over.is_set():
            self._report(Failure(process, Status.AGAIN, None))

    def _judge(self) -> None:
        first = self._failures.get()
        settled = time.monotonic() + SETTLING
        while first.cause is not None and (left := settled - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                # Collectives fail in the others when a process dies, and what they say may be here before its end is.
                later = self._failures.get(timeout=left)
                first = later if later.cause is None else first
        self._over.set()
        self._tell({"verdict": vars(first)})
        parted = time.monotonic() + PARTING
        for reader in self._readers:
            reader.join(max(0.0, parted - time.monotonic()))
        end(first.sentence(self._cause), first.status)

    def _tell(self, message: dict[str, Any]) -> None:
        for wire in list(self._wires.values()):  # others may be joining
            _send(wire, message)


class Spoke(Watch):
    """The end of every other process."""

    def __init__(self, process: int, wire: socket.socket, messages: Iterator[dict[str, Any]], heartbeat: float):
        super().__init__(process, heartbeat)
        self._wire, self._messages = wire, messages
        for work in (self._listen, self._beat):
            threading.Thread(target=work, daemon=True).start()

    @classmethod
    def reach(cls, process: int, invitation: dict[str, Any]) -> Spoke | None:
        """Connects to process 0 under the first of its addresses at which it answers; None if it does not."""
        for host in invitation["hosts"]:
            with contextlib.suppress(OSError):
                wire = socket.create_connection((host, invitation["port"]), timeout=REACHING)
                _send(wire, {"token": invitation["token"], "process": process})
                messages = _messages(wire)
                if next(messages, {}).get("welcome"):
                    wire.settimeout(invitation["heartbeat"])
                    return cls(process, wire, messages, invitation["heartbeat"])
                wire.close()
        return None

    def ask(self, request: str) -> None:
        _send(self._wire, {"ask": request})

    def part(self) -> None:
        _send(self._wire, {"waiting": True})
        self._over.wait()

    def close(self) -> None:
        self._over.wait(REACHING)  # until process 0 no longer minds
        _hang_up(self._wire)

    def _report(self, failure: Failure) -> None:
        _send(self._wire, {"failed": vars(failure)})

    def _beat(self) -> None:
        while not self._over.wait(self._heartbeat / BEATS):
            _send(self._wire, {"beat": True})

    def _listen(self) -> None:
        for message in self._messages:
            if "verdict" in message:
                first = Failure(**message["verdict"])
                end(first.sentence(self._cause), first.status)
            elif "asked" in message:
                moment = self._asked(message["number"], message["asked"])
                _send(self._wire, {"moment": moment, "number": message["number"]})
            elif "agreed" in message:
                self._agree(message["number"], message["agreed"])
            elif "silent" in message and not self._over.is_set():
                end(Failure(0, Status.STALLED, None, self._heartbeat).sentence(None), Status.STALLED)
            elif "over" in message:
                self._over.set()
        if not self._over.is_set():
            end(Failure(0, Status.AGAIN, None).sentence(None), Status.AGAIN)


def _send(wire: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the reader of this wire sees its end
        wire.sendall(json.dumps(message).encode() + b"\n")


def _hang_up(wire: socket.socket) -> None:
    with contextlib.suppress(OSError):
        wire.shutdown(socket.SHUT_RDWR)  # closing alone would not wake the reader
    wire.close()


def _messages(wire: socket.socket) -> Iterator[dict[str, Any]]:
    """What comes over the wire until the other process ends, or its machine is lost for half a minute.

    The last is {"silent": True} if nothing has come for the wire's timeout.
    """
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            wire.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    buffer = b""
    try:
        while received := wire.recv(4096):
            *lines, buffer = (buffer + received).split(b"\n")
            yield from (json.loads(line) for line in lines)
    except OSError as error:
        if (
            isinstance(error, TimeoutError) and error.errno is None
        ):  # with a number it is that of a machine that is lost
            yield {"silent": True}
    except ValueError:  # a stranger who speaks another language
        return


def _address() -> str | None:
    """The address of this machine on the network of its default route; nothing is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # an address that is reserved for documentation
        return str(probe.getsockname()[0])
    return None
