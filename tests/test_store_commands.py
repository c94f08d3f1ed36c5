"""Whole commands with what they read and write in an object store: killed, refused, and beside a store that fails."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from launching import end_what_was_started, launch
from programs import REPOSITORY, finish, start
from runs import STEPS, arguments, assert_same_run, write_config
from stores import Fault, Store, upload
from test_study import results

from tiedjax import cli
from tiedjax.analysis import read_results
from tiedjax.check import check
from tiedjax.config import DataConfig
from tiedjax.data.prepare import prepare
from tiedjax.errors import Status, UserError
from tiedjax.host import storage
from tiedjax.metrics import MetricsLog

SAVES = {"train.checkpoint_every": 3}


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test() -> Iterator[None]:
    yield
    end_what_was_started()


# ---- Killed and continued ----

STUDY = """
base: CONFIG.yaml
arms:
  two: {tying: {scheme: untied}}
  one: {tying: {scheme: tied}}
reference: two
baseline: one
seeds: [3]
"""


@pytest.mark.slow
def test_a_study_that_is_killed_twice_is_the_study_of_a_disk(
    out: Path, store: Store, text: Path, tmp_path: Path
) -> None:
    """Once while it saves a state of its second run, once while it writes its results."""
    write_config(tmp_path / "CONFIG.yaml", text, {"train.steps": 4, "train.checkpoint_every": 2})
    (tmp_path / "STUDY.yaml").write_text(STUDY)
    command = ["-m", "tiedjax", "study", "STUDY.yaml", "--workers", "1", "--instruments", "norms", "--out"]
    on_disk = start([*command, "disk"], cwd=tmp_path)
    for moment in ("runs/one-3/checkpoints/4/commit_success.txt", "results.json"):
        study = start([*command, out], cwd=tmp_path, **store.environment)
        fault = store.fail("cut", "", then=study.kill)
        fault.hits = lambda verb, address, moment=moment: verb == "POST" and f"{out.name}/{moment}" in address
        study.communicate(timeout=120)
        assert (study.returncode, fault.met) == (-signal.SIGKILL, 1)
    finish(start([*command, out], cwd=tmp_path, **store.environment))
    finish(on_disk)
    here, there = tmp_path / "disk", store.download(out.name, tmp_path / "store")
    assert results(there) == results(here)
    for run in ("two-3", "one-3"):
        assert_same_run(there / "runs" / run, here / "runs" / run, 4)
    names = lambda folder: {path.name for path in folder.iterdir()} - {".lock", ".lease"}
    for folder in (Path(), Path("runs"), Path("figures"), Path("runs/one-3"), Path("runs/one-3/checkpoints")):
        assert names(there / folder) == names(here / folder)


def process_of(out: Path, number: int) -> int:
    """The process of this number of the cluster that trains in `out`."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        if str(out) in words and words[-3:] == ["--process-id", str(number), ""]:
            return int(path.parent.name)
    raise AssertionError(f"no process {number} trains in {out}")


@pytest.mark.slow  # minutes, in which three clusters start
def test_a_cluster_keeps_another_out_and_goes_on_after_one_of_its_processes_was_killed(
    out: Path, store: Store, text: Path, tmp_path: Path
) -> None:
    changes = {"mesh.fsdp": 4, **SAVES}
    command = ("local.sh", 2, *arguments(out, text, changes)[1:])
    reached, goes_on = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        goes_on.wait(120)

    store.fail("slow", f"{out.name}/checkpoints/6/", method="POST", then=hold)
    cluster = launch(*command, devices=2, **store.environment)
    try:
        assert reached.wait(120)
        _, said = finish(launch(*command, devices=2, **store.environment), status=79)
        holder = f"process {process_of(out, 0)} on {socket.gethostname()}"
        refusal = f"tiedjax: {out}: {holder} is writing this run; wait for it or choose another --out"
        assert refusal in said.splitlines()
        os.kill(process_of(out, 1), signal.SIGKILL)
    finally:
        goes_on.set()
    finish(cluster, status=128 + signal.SIGKILL)
    assert STEPS not in storage.saved_steps(out / "checkpoints")
    on_disk = tmp_path / "disk"
    finish(launch(*command, devices=2, **store.environment))
    finish(launch("local.sh", 2, *arguments(on_disk, text, changes)[1:], devices=2))
    assert_same_run(store.download(out.name, tmp_path / "store"), on_disk)


def test_what_a_store_does_not_hand_out_is_not_damaged(
    out: Path, store: Store, finished: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    upload(finished, out)
    assert storage.saved_steps(out / "checkpoints") == [STEPS]
    state = f"{out}/checkpoints/{STEPS}"
    denied = store.fail("403", f"{out.name}/checkpoints/{STEPS}/tree/", method="GET", times=10**6)
    denied.hits = lambda verb, address: f"{out.name}/checkpoints/{STEPS}/tree/" in address and "alt=media" in address
    assert cli.main(arguments(out, text)) == Status.FAILED
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"tiedjax: {state}: cannot be read: the store answers: Forbidden: {store.url}/")
    assert said.endswith("; made to fail\n")
    assert storage.names(out / "checkpoints") == [str(STEPS)]


# ---- A store that fails ----

DENIED = "the store answers: Forbidden: "
FAULTS: dict[str, dict[str, tuple[int, str]]] = {
    "train": {
        "403": (1, "{out}/config.yaml: " + DENIED + "b/bucket/o; made to fail"),
        "no bucket": (2, "gs://nobody/run: there is no bucket nobody, or it may not be seen"),
        "cut": (1, "{out}: cannot be reached: the store does not answer: "),
        "503": (1, "{out}: cannot be reached: the store answers: made to fail, 503"),
    },
    "study": {
        "403": (
            1,
            "{out}/study.yaml: cannot be written: " + DENIED + "{url}/upload/storage/v1/b/bucket/o; made to fail",
        ),
        "no bucket": (2, "gs://nobody/run: there is no bucket nobody, or it may not be seen"),
        "cut": (1, "{out}: cannot be reached: the store does not answer: "),
        "503": (1, "{out}: cannot be reached: the store answers: made to fail, 503"),
    },
    "analyze": {
        "403": (1, "{out}/token_counts.npy: cannot be read: " + DENIED + "b/bucket/o; made to fail"),
        "no bucket": (2, "gs://nobody/run: no such file or directory; tables are named by "),
        "cut": (1, "{out}: the store does not answer: "),
        "503": (1, "{out}: the store answers: made to fail, 503"),
    },
    "report": {
        "403": (1, "{out}/results.json: cannot be read: " + DENIED),
        "no bucket": (
            2,
            "gs://nobody/run/results.json: cannot be read: No such file or directory; `tiedjax study` writes it",
        ),
        "cut": (1, "{out}/decision.json: the store does not answer: "),
        "503": (1, "{out}/decision.json: the store answers: made to fail, 503"),
    },
    "check": {
        "403": (1, "{out}/token_counts.npy: " + DENIED + "b/bucket/o; made to fail"),
        "no bucket": (2, "gs://nobody/run: there is no bucket nobody, or it may not be seen"),
        "cut": (1, "{out}/config.yaml: the store does not answer: "),
        "503": (1, "{out}/config.yaml: the store answers: made to fail, 503"),
    },
}
NEEDED = {
    "train": "config.yaml",
    "study": "study.yaml",
    "analyze": "token_counts.npy",
    "report": "results.json",
    "check": "token_counts.npy",
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the store in vain is asked again at once, as often as ever."""
    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0)))


def fails(store: Store, kind: str, name: str) -> None:
    """From here on the store fails: a 403 meets this object alone, all else everything."""
    store.faults.append(Fault(kind, lambda verb, address: kind != "403" or name in address, times=10**6))


def is_line(said: str, line: str) -> bool:
    """Whether this is all that was said; what ends in a space is how the line begins."""
    whole = said.startswith(f"tiedjax: {line}") if line.endswith(" ") else said == f"tiedjax: {line}\n"
    return whole and said.count("\n") == 1


@pytest.mark.parametrize("fault", ["403", "no bucket", "cut", "503"])
@pytest.mark.parametrize("command", FAULTS)
def test_a_store_that_fails_is_said_in_one_line(
    command: str,
    fault: str,
    out: Path,
    store: Store,
    text: Path,
    finished: Path,
    study_folder: Path,
    impatient: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    place = "gs://nobody/run" if fault == "no bucket" else str(out)
    words = {
        "train": arguments(Path("PLACE"), text),
        "study": ["study", str(study_folder / "STUDY.yaml"), "--workers", "1", "--out", "PLACE"],
        "analyze": ["analyze", "norms", "PLACE"],
        "report": ["report", "PLACE"],
        "check": ["check", "PLACE"],
    }[command]
    if fault == "403":
        sources = {"analyze": [finished], "check": [finished], "report": [study_folder / "study"]}.get(command, [])
        for path in (path for source in sources for path in source.rglob("*") if path.is_file()):
            if command != "report" or path.name == "results.json":
                storage.write_atomically(out / path.relative_to(sources[0]).as_posix(), path.read_bytes())
    if fault != "no bucket":
        fails(store, fault, f"{out.name}/{NEEDED[command]}")
    status = cli.main([place if word == "PLACE" else word for word in words])
    said = capfd.readouterr().err
    expected, line = FAULTS[command][fault]
    assert is_line(said, line.format(out=out, url=store.url))
    assert status == expected


@pytest.mark.slow  # half a minute of asking again
def test_a_server_that_is_not_there_is_said_in_one_line(out: Path, text: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        _, said = finish(start(["-m", "tiedjax", *arguments(out, text)], STORAGE_EMULATOR_HOST=url), status=1)
    assert said.startswith(f"tiedjax: {out}: cannot be reached: the store does not answer: Cannot connect to host ")
    assert said.count("\n") == 1


# ---- Data in a store ----


def test_text_in_a_store_is_what_it_is_on_a_disk(
    out: Path, store: Store, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects are fetched when their documents are read: once, and not where they are prepared already."""
    lines = text.read_text().splitlines(keepends=True)
    (tmp_path / "parts").mkdir()
    for name, part in (("a.jsonl", lines[:40]), ("b.jsonl.gz", lines[40:])):
        content = "".join(part).encode()
        (tmp_path / "parts" / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    upload(tmp_path / "parts", out / "deep")
    storage.write_atomically(out / "deep" / "c.txt", "no part of it")
    quiet = lambda line: None
    on_disk = prepare(DataConfig(source=f"text:{tmp_path}/parts/*.jsonl*"), 320, report=quiet)
    monkeypatch.setenv("TIEDJAX_CACHE", str(tmp_path / "cache"))
    data = DataConfig(source=f"text:{out}/**/*.jsonl*")
    there = prepare(data, 320, report=quiet)
    assert there.fingerprint == on_disk.fingerprint
    assert there.directory != on_disk.directory
    fetched = lambda: [address for _, address in store.asked if out.name in address and "alt=media" in address]
    assert len(fetched()) == 2
    shutil.rmtree(tmp_path / "cache" / "objects")
    assert prepare(data, 320, report=quiet).directory == there.directory
    assert len(fetched()) == 2
    storage.write_atomically(out / "deep" / "a.jsonl", "".join(lines[:39]) + '{"text": 1}\n')
    with pytest.raises(UserError) as error:
        prepare(data, 320, report=quiet)
    assert str(error.value) == (
        f"{out}/deep/a.jsonl: line 40: no text in field 'text'; what is there is 1 (see data.text_field)"
    )
    with pytest.raises(UserError) as error:
        prepare(DataConfig(source=f"text:{out}/*.md"), 320, report=quiet)
    assert str(error.value) == (
        f"data.source: missing corpus: no file matches '{out}/*.md'; give a path or a glob of files"
    )


def test_tokens_in_a_store_are_what_they_are_on_a_disk(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.random.default_rng(0).integers(0, 300, 5000).astype(np.uint16)
    (tmp_path / "parts").mkdir()
    np.save(tmp_path / "parts" / "a.npy", ids[:3000])
    (tmp_path / "parts" / "b.u16").write_bytes(ids[3000:].tobytes())
    upload(tmp_path / "parts", out)
    quiet = lambda line: None
    on_disk = prepare(DataConfig(source=f"tokens:{tmp_path}/parts/*"), 320, report=quiet)
    monkeypatch.setenv("TIEDJAX_CACHE", str(tmp_path / "cache"))
    there = prepare(DataConfig(source=f"tokens:{out}/*"), 320, report=quiet)
    assert there.fingerprint == on_disk.fingerprint
    for a, b in zip(there.arrays("train"), on_disk.arrays("train"), strict=True):
        np.testing.assert_array_equal(a, b)


PREPARED = "gs://bucket/prepared"


@pytest.fixture(scope="module")
def of_prepared(store: Store, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a disk of prepared tokens in a store."""
    local = prepare(DataConfig(source=f"text:{text}"), 320, report=lambda line: None)
    for path in (local.directory / name for name in storage.names(local.directory)):
        storage.write_atomically(storage.place(f"{PREPARED}/{path.name}", "place"), path.read_bytes())
    run = tmp_path_factory.mktemp("prepared") / "run"
    assert cli.main(arguments(run, text, {"data.source": f"prepared:{PREPARED}"})) == 0
    return run


def test_tokens_in_a_store_are_checked_by_the_copy_here(
    of_prepared: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.faults.clear()
    monkeypatch.setenv("TIEDJAX_CACHE", str(tmp_path))
    found = check(of_prepared)
    assert found.whole
    assert found.lines()[4] == "files of its data: 4 of 4 are whole"
    (shard,) = tmp_path.rglob("train-00000.npy")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert [str(damage) for damage in check(of_prepared).damage] == [
        f"{shard}: does not hold the tokens that were prepared"
    ]


@pytest.mark.parametrize(
    ("kind", "status", "line"),
    [
        ("403", 1, f"{PREPARED}/train-00000.npy: cannot be read: {DENIED}b/bucket/o; made to fail"),
        ("cut", 1, f"{PREPARED}/meta.json: the store does not answer: "),
        ("503", 1, f"{PREPARED}/meta.json: the store answers: made to fail, 503"),
    ],
)
def test_a_check_says_in_one_line_that_a_store_fails(
    kind: str,
    status: int,
    line: str,
    of_prepared: Path,
    store: Store,
    tmp_path: Path,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TIEDJAX_CACHE", str(tmp_path))
    store.faults.clear()
    fails(store, kind, "prepared/train-00000.npy")
    capfd.readouterr()
    assert cli.main(["check", str(of_prepared)]) == status
    said = capfd.readouterr().err
    assert is_line(said, line)


def test_a_service_finds_its_run_again_in_a_store(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's files lie below the run, and its name too: a command on another machine goes on under it."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("tiedjax.sinks.PATIENCE", 120)
    for first, last in ((1, 4), (4, 5)):
        log = MetricsLog(out, first - 1, trackers=["wandb"], label="tied-0", config={})
        for step in range(first, last + 1):
            log.write({"step": step, "loss": 1 / step})
        log.close()
    kept = storage.read_json(out / "wandb.json")["run"]
    offline = [name for name in storage.names(out / "wandb") if name.startswith("offline-run-")]
    assert [f"run-{kept}.wandb" in storage.names(out / "wandb" / name) for name in offline] == [True, True]
    steps = [json.loads(line)["step"] for line in storage.read_text(out / "metrics.jsonl").splitlines()]
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.timeout(900)  # dozens of runs
def test_a_decision_in_a_store_is_that_of_a_disk(out: Path, store: Store, text: Path, tmp_path: Path) -> None:
    write_config(tmp_path / "CONFIG.yaml", text, {"model.d_model": 16})
    command = ["-m", "tiedjax", "decide", "CONFIG.yaml", "--seeds", "2", "--widths", "16", "--rates", "1,2", "--out"]
    told, _ = finish(start([*command, out], cwd=tmp_path, **store.environment), seconds=600)
    assert told.splitlines()[-2] == f"decision: {out}/decision.html"
    there = store.download(out.name, tmp_path / "there")
    page = (there / "decision.html").read_bytes()
    store.download(out.name, tmp_path / "again")
    finish(start(["-m", "tiedjax", "report", "again"], cwd=tmp_path))
    assert (tmp_path / "again" / "decision.html").read_bytes() == page
    finish(start(["-m", "tiedjax", "report", out], **store.environment))
    assert storage.read_bytes(out / "decision.html") == page


@pytest.mark.slow  # it shows every figure of the account
def test_a_notebook_reads_a_study_in_a_store(out: Path, study_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells of `account`, one after the other, in this process."""
    upload(study_folder / "study", out)
    monkeypatch.setenv("TIEDJAX_STUDY", str(out))
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = (REPOSITORY / "notebooks" / "account.py").read_text()
    cells: dict[str, Any] = {}
    exec(compile(notebook, "account.py", "exec"), cells)
    assert cells["study"] == read_results(study_folder / "study")["study"]
    assert sorted(cells["runs"]) == [3, 5]
    assert str(cells["runs"][3].path) == f"{out}/runs/one-3"
