"""Sinks beside metrics.jsonl: what fails, hangs or lags costs its own lines and says so; nothing waits for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import slow_but

from tiedjax import sinks
from tiedjax.config import TrainConfig
from tiedjax.errors import UserError
from tiedjax.metrics import MetricsLog
from tiedjax.sinks import Sink


class Stub:
    """A writer that a test leads."""

    def __init__(self, fails: tuple[int, ...] = (), hangs: int | None = None):
        self.over, self.unsure = False, 0
        self.took: list[int] = []
        self.fails, self.hangs, self.abandoned = fails, hangs, threading.Event()

    def open(self) -> None:
        self._meet(0)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._meet(step)
        self.took.append(step)

    def close(self) -> None:
        self._meet(-1)

    def abandon(self) -> None:
        self.abandoned.set()

    def _meet(self, step: int) -> None:
        if step == self.hangs:
            self.abandoned.wait(30)
        if step in self.fails:
            raise ValueError(f"no {step}\nand more")


def told(stub: Stub, lines: int = 5) -> None:
    sink = Sink("out: X", stub)
    for step in range(1, lines + 1):
        sink.write(step, {"loss": 1.0})
    sinks.close([sink])


@pytest.mark.parametrize(
    ("fails", "took", "said"),
    [
        ((), [1, 2, 3, 4, 5], ""),
        ((2, 4), [1, 3, 5], "out: X cannot be written: no 2; the run goes on|out: X lost 2 of 5 lines"),
        ((0,), [], "out: X cannot be written: no 0; the run goes on|out: X lost 5 of 5 lines"),
        ((-1,), [1, 2, 3, 4, 5], "out: X cannot be written: no -1; the run goes on"),
    ],
)
def test_a_failure_is_said_once_and_counted(
    capsys: pytest.CaptureFixture[str], fails: tuple[int, ...], took: list[int], said: str
) -> None:
    stub = Stub(fails)
    told(stub)
    assert stub.took == took
    assert capsys.readouterr().err == "".join(f"tiedjax: {line}\n" for line in said.split("|") if line)


@pytest.mark.parametrize(
    ("hangs", "said", "abandoned"),
    [
        (0, "out: X lost 5 of 5 lines; it did not answer within 0.3 s", True),
        (3, "out: X lost 3 of 5 lines; it did not answer within 0.3 s", True),
        (-1, "out: X did not end within 0.3 s; nothing waits for it", False),
    ],
)
def test_nothing_waits_for_what_hangs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hangs: int, said: str, abandoned: bool
) -> None:
    monkeypatch.setattr(sinks, "PATIENCE", 0.3)
    stub, begun = Stub(hangs=hangs), time.monotonic()
    told(stub)
    assert time.monotonic() - begun < 5
    assert capsys.readouterr().err == f"tiedjax: {said}\n"
    assert stub.abandoned.is_set() == abandoned
    stub.abandon()


def test_several_that_hang_are_waited_for_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "PATIENCE", 0.5)
    stubs, begun = [Stub(hangs=-1) for _ in range(8)], time.monotonic()
    sinks.close([Sink("X", stub) for stub in stubs])
    assert time.monotonic() - begun < 2.5
    for stub in stubs:
        stub.abandon()


def test_lines_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sinks, "LIMIT", 3)
    monkeypatch.setattr(sinks, "PATIENCE", 30)
    stub = Stub(hangs=0)
    sink = Sink("out: X", stub)
    for step in range(1, 8):
        sink.write(step, {})
    stub.abandon()
    sinks.close([sink])
    assert stub.took == [1, 2, 3]
    assert capsys.readouterr().err == (
        "tiedjax: out: X cannot be written: 3 lines wait for it; the run goes on\ntiedjax: out: X lost 4 of 7 lines\n"
    )


def test_a_stream_that_nobody_reads_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def write(self, *_: object) -> None:
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stderr", Broken())
    told(Stub((1,)))


# ---- A service's process, with a stand-in for its library ----

LIBRARY = """
import atexit, os, sys, time
print("a line of its own"), print("another", file=sys.stderr)
class Run:
    def define_metric(self, *a, **k): pass
    def log(self, row):
        if row["step"] == 2:
            AT_2
    def finish(self):
        AT_END
def init(**options):
    AT_START
    return Run()
"""
RECORDED = """
import pathlib, sys, time
from tiedjax import sinks
sink = sinks.Sink("out: W&B", sinks.Tracker("wandb", pathlib.Path(sys.argv[1]), "tied-0", {}))
slowest = 0.0
for step in range(1, 4):
    begun = time.monotonic()
    sink.write(step, {"loss": 0.5})
    slowest = max(slowest, time.monotonic() - begun)
print(slowest)
time.sleep(float(sys.argv[2]))
sinks.PATIENCE = float(sys.argv[3])
sinks.close([sink])
"""
HANGS = "time.sleep(1000)"
NEVER_STOPS = "import threading; threading.Thread(target=time.sleep, args=(1000,)).start()"


def with_library(folder: Path, moment: str, does: str) -> dict[str, str]:
    """The environment of a process that finds a wandb which does this at that moment."""
    text = LIBRARY.replace(f"AT_{moment}", does)
    for other in ("START", "2", "END"):
        text = text.replace(f"AT_{other}", "pass")
    library = folder / "library"
    library.mkdir()
    (library / "wandb.py").write_text(text)
    paths = [str(library), *([os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.mark.parametrize(
    ("moment", "does", "said"),
    [
        ("START", "raise RuntimeError('no network')", "cannot be written: no network; GOES_ON|lost 3 of 3 lines"),
        ("START", "sys.exit('log in first')", "cannot be written: log in first; GOES_ON|lost 3 of 3 lines"),
        (
            "START",
            "raise ModuleNotFoundError('No module', name='wandb')",
            'cannot be written: it is not installed: pip install "tiedjax[wandb]"; GOES_ON|lost 3 of 3 lines',
        ),
        (
            "START",
            "os._exit(3)",
            "cannot be written: its process ended with status 3; GOES_ON|lost 3 of 3 lines",
        ),
        ("START", HANGS, "lost 3 of 3 lines; it did not answer within 5 s"),
        ("START", "assert sys.stdin.read() == ''", ""),
        ("2", "raise OSError(28, 'No space left on device')", "cannot be written: [Errno 28] FULL|lost 1 of 3 lines"),
        (
            "2",
            "os._exit(4)",
            "cannot be written: its process ended with status 4; GOES_ON|lost 2 of 3 lines",
        ),
        ("2", HANGS, "lost 2 of 3 lines; it did not answer within 5 s"),
        ("END", "raise RuntimeError('half sent')", "cannot be written: half sent; GOES_ON"),
        *slow_but(
            [
                ("END", does, "did not end within 5 s; nothing waits for it")
                for does in (HANGS, f"atexit.register(lambda: {HANGS})", NEVER_STOPS)
            ],
            ("END", NEVER_STOPS, "did not end within 5 s; nothing waits for it"),
        ),
    ],
)
def test_a_library_can_neither_stop_a_run_nor_keep_it_from_ending(
    tmp_path: Path, moment: str, does: str, said: str
) -> None:
    hangs, early = "within" in said, moment == "START"
    waits = [str(4 if hangs and not early else 0), str(5 if hangs else 60)]  # for its process to begin; for its end
    command, begun = [sys.executable, "-c", RECORDED, str(tmp_path), *waits], time.monotonic()
    result = subprocess.run(
        command, env=with_library(tmp_path, moment, does), capture_output=True, text=True, timeout=60
    )
    assert time.monotonic() - begun < 25
    assert result.returncode == 0
    assert float(result.stdout) < 1, "a line of another program, or a wait"
    said = said.replace("GOES_ON", "the run goes on").replace("FULL", "No space left on device; the run goes on")
    assert result.stderr == "".join(f"tiedjax: out: W&B {line}\n" for line in said.split("|") if line)


@pytest.mark.parametrize("does", [HANGS, f"atexit.register(lambda: {HANGS})", NEVER_STOPS])
def test_a_service_ends_soon_after_its_input(tmp_path: Path, does: str) -> None:
    """Which ends with the run's process, however that ends."""
    program = "from tiedjax import trackers; trackers.LAST_SECONDS = 1.0; trackers.main('wandb')"
    begun = {"folder": str(tmp_path), "label": "tied-0", "config": {}}
    lines = "".join(json.dumps(line) + "\n" for line in (begun, {"step": 1, "scalars": {}}))
    result = subprocess.run(
        [sys.executable, "-c", program],
        input=lines,
        env=with_library(tmp_path, "END", does),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 1
    assert result.stdout.splitlines()[:2] == ['{"error": null}'] * 2


# ---- The services themselves, without a network ----


def two_commands(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed after step 4, and goes on from step 3 to step 5; what was evaluated late comes last."""
    monkeypatch.setattr(sinks, "PATIENCE", 120)
    folder.mkdir()
    config = {"train": {"steps": 5, "init": None}, "names": {f"n{i}": i for i in range(150)}}
    for first, last in ((1, 4), (4, 5)):
        log = MetricsLog(folder, first - 1, trackers=[kind], label="tied-0", config=config)
        for step in range(first, last + 1):
            log.write({"step": step, "loss": 1 / step, "grad_norm": float("nan"), "deciles": [1.0]})
        if last == 5:
            log.complete(5, {"eval_loss": 3.0})
        log.close()


def test_mlflow_continues_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    store = tmp_path / "store"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{store}")
    two_commands(tmp_path / "run", "mlflow", monkeypatch)
    assert capfd.readouterr() == ("", "")
    (metrics,) = store.glob("*/*/metrics")
    kept = json.loads((tmp_path / "run" / "mlflow.json").read_text())
    assert kept == {"run": metrics.parent.name}
    losses = [line.split()[1:] for line in (metrics / "loss").read_text().splitlines()]
    assert [(float(value), int(step)) for value, step in losses] == [(1 / s, s) for s in (1, 2, 3, 4, 4, 5)]
    assert (metrics / "eval_loss").read_text().split()[1:] == ["3.0", "5"]
    parameters = metrics.parent / "params"
    assert (parameters / "train.steps").read_text() == "5"
    assert len(list(parameters.iterdir())) == 152
    assert "run_name: tied-0" in (metrics.parent / "meta.yaml").read_text()
    assert "status: 3" in (metrics.parent / "meta.yaml").read_text()  # finished


def test_trackio_continues_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    two_commands(tmp_path / "run", "trackio", monkeypatch)
    assert capfd.readouterr() == ("", "")
    kept = json.loads((tmp_path / "run" / "trackio.json").read_text())["run"]
    assert kept.startswith("tied-0-")
    read = (
        "import json, sys, trackio; (run,) = trackio.Api().runs('tiedjax'); "
        "print(json.dumps([run.name, trackio.SQLiteStorage.get_logs('tiedjax', run.name)]))"
    )
    shown = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True, timeout=120)
    name, rows = json.loads(shown.stdout.splitlines()[-1])
    assert name == kept
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(s, 1 / s) for s in (1, 2, 3, 4, 4, 5)]
    assert [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row] == [(5, 3.0)]


def offline_records(path: Path) -> list[Any]:
    """The records of a file that W&B writes offline: blocks of 32 KiB, as of LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    content, at, part, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        part += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole one, the last part of one
            records.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return records


def test_weights_and_biases_continues_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run"
    two_commands(folder, "wandb", monkeypatch)
    assert capfd.readouterr() == ("", "")
    kept = json.loads((folder / "wandb.json").read_text())["run"]
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [path.name for path in files] == [f"run-{kept}.wandb"] * 2
    rows: list[dict[str, Any]] = []
    for path in files:
        for record in offline_records(path):
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(s, 1 / s) for s in (1, 2, 3, 4, 4, 5)]
    assert [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row] == [(5, 3.0)]


# ---- The option ----


@pytest.mark.parametrize(
    ("text", "names"), [("", ()), (" ", ()), ("wandb", ("wandb",)), ("mlflow, wandb", ("mlflow", "wandb"))]
)
def test_services_are_named_by_one_option(text: str, names: tuple[str, ...]) -> None:
    assert TrainConfig(sinks=text).trackers == names


@pytest.mark.parametrize("text", ["comet", "wandb,", "wandb,wandb", "W&B"])
def test_a_service_that_is_not_known_is_refused(text: str) -> None:
    with pytest.raises(UserError) as caught:
        TrainConfig(sinks=text)
    assert str(caught.value) == (
        f"sinks: must name some of wandb, trackio, mlflow, each once, separated by commas, got {text!r}"
    )
