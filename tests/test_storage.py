"""Places in an object store, against a server that speaks its protocol and fails when it is told to."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import slow_but
from programs import finish, start
from runs import STEPS, arguments, assert_same_run
from stores import Fault, Store

from tiedjax import files
from tiedjax.config import DataConfig
from tiedjax.data.prepare import prepare
from tiedjax.data.prepared import load_prepared
from tiedjax.errors import LockedError, Status, TakenOverError, TrainingError, UserError
from tiedjax.host import storage
from tiedjax.host.storage import Growing, Holder, Lease, place


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        """What time.sleep is for the clock of the machine."""
        self.now += seconds


# ---- Places ----


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "ftp://host/run",
            "--out: ftp:// is not known; use a path or one of gs://, s3://; got 'ftp://host/run'",
        ),
        ("gs://", "--out: must name a bucket and a folder, such as gs://BUCKET/RUN; got 'gs://'"),
        ("gs://bucket", "--out: must name a bucket and a folder, such as gs://BUCKET/RUN; got 'gs://bucket'"),
        ("gs://bucket/a\0b", "--out: must be a path, got 'gs://bucket/a\\x00b', which holds a NUL character"),
    ],
)
def test_an_address_that_cannot_be_one_is_refused(given: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        place(given, "--out")
    assert str(error.value) == said


def test_a_package_that_is_missing_is_named() -> None:
    program = """
import sys
sys.modules["gcsfs"] = None
from tiedjax.errors import UserError
from tiedjax.host.storage import place
try:
    place("gs://bucket/run", "--out")
except UserError as error:
    print(error)
"""
    out, _ = finish(start(["-c", program]))
    assert out == "gs:// needs a package that is not installed: pip install 'tiedjax[gcs]'\n"


def test_a_disk_needs_nothing_of_a_store(tmp_path: Path) -> None:
    program = """
import sys, pathlib
from tiedjax import cli
from tiedjax.host import storage
assert storage.place("runs/a", "--out") == pathlib.Path("runs/a")
with storage.sole_writer(pathlib.Path(sys.argv[1])):
    storage.write_atomically(pathlib.Path(sys.argv[1]) / "a", "b")
print({"fsspec", "etils", "gcsfs", "jax", "numpy"} & sys.modules.keys())
"""
    out, _ = finish(start(["-c", program, tmp_path]))
    assert out == "set()\n"


def test_a_place_in_a_store_behaves_like_a_path(out: Path) -> None:
    assert str(out).startswith("gs://bucket/")
    assert str(storage.absolute(out)) == str(out)
    assert (out / "a" / "b.txt").name == "b.txt"
    assert not storage.exists(out)
    assert storage.names(out) == []
    storage.write_atomically(out / "a" / "b.txt", "one")
    storage.write_atomically(out / "c", b"two")
    assert storage.names(out) == ["a", "c"]
    assert storage.exists(out)
    assert storage.exists(out / "a")
    assert storage.read_text(out / "a" / "b.txt") == "one"
    storage.write_atomically(out / "c", "three")
    assert storage.read_text(out / "c") == "three"
    storage.remove(out / "c")
    storage.remove(out / "c")
    assert storage.names(out) == ["a"]
    with pytest.raises(FileNotFoundError) as error:
        storage.read_bytes(out / "c")
    assert error.value.strerror == "No such file or directory"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, 'cannot be read: No such file or directory; it must hold {"step": N}'),
        (b"\xff", 'cannot be read: not UTF-8 at byte 0; it must hold {"step": N}'),
        (b"{", 'line 1 is not JSON: Expecting property name enclosed in double quotes; it must hold {"step": N}'),
        (b'{"step": true}', 'is damaged: it must hold {"step": N}'),
    ],
)
@pytest.mark.parametrize("where", ["store", "disk"])
def test_a_record_is_read_alike_in_a_store_and_on_a_disk(
    where: str, content: bytes | None, said: str, out: Path, tmp_path: Path
) -> None:
    path = (out if where == "store" else tmp_path) / "a.json"
    if content is not None:
        storage.write_atomically(path, content)
    with pytest.raises(UserError) as error:
        storage.read_step(path)
    assert str(error.value) == f"{path}: {said}"


def test_a_save_counts_once_its_last_object_is_there(out: Path, tmp_path: Path) -> None:
    for step in (2, 10):
        storage.write_atomically(out / "checkpoints" / str(step) / "tree" / "a", "values")
    storage.write_atomically(out / "checkpoints" / "2" / storage.COMMITTED, "done")
    assert storage.saved_steps(out / "checkpoints") == [2]
    assert storage.saved_steps(out / "snapshots") == []
    for name in ("2", "10", "12.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    assert storage.saved_steps(tmp_path) == [2, 10]


def test_what_is_not_complete_is_cleared(out: Path, tmp_path: Path) -> None:
    for step in (2, 10):
        storage.write_atomically(out / str(step) / "tree" / "a", "values")
    storage.write_atomically(out / "2" / storage.COMMITTED, "done")
    storage.clear_unfinished(out)
    assert storage.names(out) == ["2"]
    storage.uncommit(out / "2")
    storage.clear_unfinished(out)
    storage.clear_unfinished(out / "nothing")
    assert storage.names(out) == []
    (tmp_path / "2").mkdir()
    storage.uncommit(tmp_path / "2")
    storage.clear_unfinished(tmp_path)
    assert storage.saved_steps(tmp_path) == [2]


def test_what_a_save_has_left_is_cleared_while_its_threads_still_write(tmp_path: Path) -> None:
    left, made = tmp_path / "3.orbax-checkpoint-tmp", threading.Event()
    left.mkdir()

    def write() -> None:
        until = time.monotonic() + 0.3
        for number in itertools.count():
            if time.monotonic() > until:
                return
            with contextlib.suppress(FileNotFoundError):
                (left / str(number)).touch()
            made.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert made.wait(10)
    storage.clear_unfinished(tmp_path)
    writer.join()
    assert not left.exists()


def test_a_damaged_save_is_set_aside(out: Path, tmp_path: Path) -> None:
    """Without what says that it is complete, and beside what was set aside before."""
    for folder in (out, tmp_path):
        for _ in range(2):
            for name in ("tree/a", "about", storage.COMMITTED):
                storage.made((folder / "2" / name).parent)
                storage.write_atomically(folder / "2" / name, name)
            storage.set_aside(folder / "2")
        assert storage.saved_steps(folder) == []
        assert storage.names(folder) == ["damaged-2", "damaged-2-1"]
        assert storage.read_text(folder / "damaged-2-1" / "tree" / "a") == "tree/a"
    assert storage.names(out / "damaged-2") == ["about", "tree"]


# ---- A store that fails ----


def test_a_store_that_does_not_answer_has_no_damage_for_that(out: Path, store: Store, tmp_path: Path) -> None:
    storage.refuse_silent(out / "2")
    storage.refuse_silent(tmp_path / "2")
    store.fail("403", out.name, times=10)
    with pytest.raises(UserError, match="2: cannot be read: the store answers: "):
        storage.refuse_silent(out / "2")


@pytest.mark.parametrize("kind", ["503", "cut", "lost", "slow"])
def test_a_request_that_fails_is_sent_again(kind: str, out: Path, store: Store) -> None:
    storage.write_atomically(out / "a", "old")
    written = store.fail(kind, "upload", seconds=0.5)
    storage.write_atomically(out / "a", "new")
    read = store.fail(kind, f"/{out.name}/a", method="GET", seconds=0.5)
    assert storage.read_text(out / "a") == "new"
    assert (written.met, read.met) == (1, 1)


def test_a_refusal_is_one_line(out: Path, store: Store) -> None:
    store.fail("403", "upload")
    with pytest.raises(UserError) as error:
        storage.write_atomically(out / "a", "new")
    assert str(error.value) == (
        f"{out}/a: cannot be written: the store answers: Forbidden: {store.url}/upload/storage/v1/b/bucket/o; "
        "made to fail"
    )


# ---- One writer ----


def test_a_second_writer_is_refused_by_name(out: Path) -> None:
    with storage.sole_writer(out):
        with pytest.raises(LockedError) as error, storage.sole_writer(out):
            pass
        who = f"process {os.getpid()} on {Holder.this().host}"
        assert str(error.value) == f"{out}: {who} is writing this run; wait for it or choose another --out"
    with storage.sole_writer(out):  # it was given back
        assert storage.names(out / storage.LEASE) == ["000002"]


def test_a_second_writer_on_a_disk_is_refused_by_name(tmp_path: Path) -> None:
    with storage.sole_writer(tmp_path):
        with pytest.raises(LockedError) as error, storage.sole_writer(tmp_path):
            pass
        who = f"process {os.getpid()} on {Holder.this().host}"
        assert str(error.value) == f"{tmp_path}: {who} is writing this run; wait for it or choose another --out"


def test_a_disk_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuses)
    with pytest.raises(UserError) as caught, storage.sole_writer(tmp_path):
        pass
    assert str(caught.value) == f"{tmp_path}: cannot be locked: No locks available; choose another --out"


def test_what_a_dead_process_of_this_machine_held_is_taken_at_once(out: Path) -> None:
    hold = """
import sys
from tiedjax.host import storage
with storage.sole_writer(storage.place(sys.argv[1], "--out")):
    print("held", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", hold, str(out)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on "), storage.sole_writer(out):
        pass
    holder.kill()
    holder.communicate(timeout=30)
    with storage.sole_writer(out) as lease:
        lease.check()


def _elsewhere(lease: Lease) -> None:
    """Has the record say that its holder runs on another machine."""
    other = dataclasses.replace(lease._holder, host="other", pid=7, machine="elsewhere")
    storage.write_atomically(lease._record(lease._number), other.dumps().decode())


@pytest.mark.parametrize("fast", [0, 590])
def test_a_silent_holder_of_another_machine_is_watched_for_as_long_as_a_lease_lasts(
    fast: int, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the clock of the one that watches is fast."""
    clock = Clock()
    with Lease(out, 120, clock) as gone:
        _elsewhere(gone)
        clock.now += fast
        began = clock.now
        with Lease(out, 120, clock, clock.pause) as taken:
            assert clock.now - began == 130
            assert capsys.readouterr().err == (
                f"tiedjax: {out}: process 7 on other holds this run and may be gone; this process takes it over in "
                "130 s unless that one renews its lease\n"
            )
            taken.check()
            who = f"process {os.getpid()} on {Holder.this().host}"
            with pytest.raises(TakenOverError) as lost:
                gone.check()
            assert lost.value.status == Status.LOCKED
            assert str(lost.value) == f"{out}: {who} has taken over this run; this one ends"
            taken.renew()
            taken.check()


@pytest.mark.parametrize(
    ("change", "writer"), [("renewed", "process 7 on other"), ("taken by a third", "process 8 on third")]
)
def test_a_holder_of_another_machine_that_shows_up_while_it_is_waited_for_keeps_its_run(
    change: str, writer: str, out: Path
) -> None:
    clock = Clock()
    with Lease(out, 120, clock) as held:
        _elsewhere(held)
        began = clock.now

        def pause(seconds: float) -> None:
            clock.pause(seconds)
            if clock.now - began == 30 and change == "renewed":
                held.renew()
                _elsewhere(held)
            elif clock.now - began == 30:
                third = dataclasses.replace(held._holder, host="third", pid=8, machine="a third")
                storage.write_atomically(held._record(held._number + 1), third.dumps())

        with pytest.raises(LockedError) as error, Lease(out, 120, clock, pause):
            pass
        assert str(error.value) == f"{out}: {writer} is writing this run; wait for it or choose another --out"
        assert clock.now - began == 30


def test_a_lease_that_is_given_back_while_it_is_waited_for_is_taken_at_once(out: Path) -> None:
    clock = Clock()
    with Lease(out, 120, clock) as held:
        _elsewhere(held)
        began = clock.now

        def pause(seconds: float) -> None:
            clock.pause(seconds)
            ended = dataclasses.replace(held._holder, host="other", pid=7, machine="elsewhere", expires=0.0)
            storage.write_atomically(held._record(held._number), ended.dumps())

        with Lease(out, 120, clock, pause) as taken:
            taken.check()
        assert clock.now - began == 120 / storage.LOOKS


def test_a_lease_that_was_created_though_the_answer_was_lost_is_held(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    with Lease(out, 120, clock) as held:
        before, created = held._holder, held._created

        def lost(number: int) -> bool:
            created(number)
            held._holder = before
            raise OSError(errno.EIO, "no answer")

        clock.now += 500  # expired, as after a night in which this machine slept
        monkeypatch.setattr(held, "_created", lost)
        held.renew()
        monkeypatch.setattr(held, "_created", created)
        held.check()
        assert held._number == 2


def test_a_clock_that_is_far_ahead_makes_nobody_wait_longer_than_a_lease_lasts(out: Path) -> None:
    clock, ahead = Clock(), Clock()
    ahead.now += 86_400
    with Lease(out, 120, ahead) as gone:
        _elsewhere(gone)
        began = clock.now
        with Lease(out, 120, clock, clock.pause):
            assert clock.now - began == 130


def _left_by_another_machine(out: Path, seconds: float) -> Holder:
    """Writes the lease of a process of another machine, which is over in so long."""
    holder = Holder("other", 7, "1", "elsewhere", "token", time.time() + seconds - storage.SKEW)
    storage.write_atomically(out / storage.LEASE / "000001", holder.dumps())
    return holder


@pytest.mark.slow
def test_a_run_waits_for_a_machine_that_is_lost_and_goes_on(out: Path, store: Store, text: Path) -> None:
    _left_by_another_machine(out, 20)
    told, said = finish(start(["-m", "tiedjax", *arguments(out, text)], **store.environment))
    assert re.fullmatch(
        re.escape(f"tiedjax: {out}: process 7 on other holds this run and may be gone; this process takes it over in ")
        + r"\d+ s unless that one renews its lease",
        said.splitlines()[0],
    )
    assert f"{STEPS}/{STEPS}" in told


def test_a_run_that_waits_for_a_machine_which_is_not_lost_is_refused(out: Path, store: Store, text: Path) -> None:
    holder = _left_by_another_machine(out, 100)
    run = start(["-m", "tiedjax", *arguments(out, text)], **store.environment)
    assert run.stderr
    assert run.stderr.readline().startswith(f"tiedjax: {out}: process 7 on other holds this run and may be gone; ")
    renewed = dataclasses.replace(holder, expires=holder.expires + 30)
    storage.write_atomically(out / storage.LEASE / "000001", renewed.dumps())
    _, said = finish(run, status=79)
    assert said == f"tiedjax: {out}: process 7 on other is writing this run; wait for it or choose another --out\n"


def test_an_expired_lease_that_nobody_took_goes_on(out: Path) -> None:
    clock = Clock()
    with Lease(out, 120, clock) as lease:
        clock.now += 1000
        lease.check()
        with pytest.raises(UserError), Lease(out, 120, clock):
            pass
        clock.now += 60
        lease.renew()
        clock.now += 100
        lease.check()
        assert storage.names(out / storage.LEASE) == ["000002"]


def test_whoever_took_over_and_ended_is_noticed_too(out: Path) -> None:
    clock = Clock()
    with Lease(out, 120, clock) as gone:
        _elsewhere(gone)
        clock.now += 721
        with Lease(out, 120, clock):
            pass
        with pytest.raises(TrainingError, match="has taken over this run"):
            gone.check()


def test_a_store_that_does_not_answer_ends_no_lease_by_itself(out: Path, store: Store) -> None:
    clock = Clock()
    with Lease(out, 120, clock) as lease:
        silent = store.fail("403", ".lease", times=2)
        lease.renew()
        lease.check()  # until it expires there is nothing to ask
        clock.now += 121
        with pytest.raises(TrainingError, match="could not be renewed: the store answers: Forbidden"):
            lease.check()
        assert silent.met == 2
        lease.check()


@pytest.mark.parametrize("kind", ["503", "cut", "lost", "slow"])
def test_a_lease_is_taken_over_a_bad_line(kind: str, out: Path, store: Store) -> None:
    """Also where the answer is lost: the request that is sent again finds the record that the first has written."""
    fault = store.fail(kind, "upload", seconds=0.5)
    with storage.sole_writer(out) as lease:
        lease.check()
        assert storage.names(out / storage.LEASE) == ["000001"]
    assert fault.met == 1


@pytest.mark.parametrize("left", ["nothing", "an expired one"])
def test_of_many_who_come_at_once_one_gets_it(left: str, out: Path) -> None:
    clock = Clock()
    if left != "nothing":
        with Lease(out, 120, clock) as gone:
            _elsewhere(gone)
            gone._lost = "gone"  # it does not give it back
        clock.now += 721
    winners: list[Lease] = []
    refused: list[str] = []
    begin = threading.Barrier(8)

    def come() -> None:
        lease = Lease(out, 120, clock)
        begin.wait()
        try:
            winners.append(lease.__enter__())
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(winners), len(refused)) == (1, 7)
    winners[0].check()
    winners[0].__exit__(None, None, None)


# ---- Files that grow ----


def test_lines_are_uploaded_at_every_sync_and_survive_a_store_that_fails(out: Path, store: Store) -> None:
    lines: list[str] = []
    growing = Growing(out, say=lines.append)
    file = growing.folder / "metrics.jsonl"
    file.write_text("1\n")
    assert growing.sync()
    assert storage.read_text(out / "metrics.jsonl") == "1\n"
    file.write_text("1\n2\n")
    store.fail("403", "upload", times=2)
    assert not growing.sync()
    assert not growing.sync()
    assert growing.sync()
    assert storage.read_text(out / "metrics.jsonl") == "1\n2\n"
    assert len(lines) == 2
    assert lines[0].endswith("the run goes on and tries again")
    assert lines[1] == f"{out}: can be written again; nothing of it is lost"
    file.write_text("1\n3\n")  # a line that was cut, and another of its length
    assert growing.sync()
    assert storage.read_text(out / "metrics.jsonl") == "1\n3\n"
    file.write_text("1\n2\n3\n")
    growing.close()
    assert storage.read_text(out / "metrics.jsonl") == "1\n2\n3\n"
    assert not growing.folder.exists()
    again = Growing(out)
    again.fetch("metrics.jsonl")
    assert (again.folder / "metrics.jsonl").read_text() == "1\n2\n3\n"
    asked = len(store.asked)
    again.close()
    assert not [verb for verb, _ in store.asked[asked:] if verb != "GET"]  # nothing has grown


def test_who_has_lost_the_run_uploads_nothing(out: Path) -> None:
    def check() -> None:
        raise TrainingError("lost")

    lines: list[str] = []
    growing = Growing(out, check, lines.append)
    (growing.folder / "metrics.jsonl").write_text("1\n")
    with pytest.raises(TrainingError):
        growing.sync()
    growing.close()
    assert not storage.exists(out / "metrics.jsonl")
    assert lines == [f"{out}: what could not be written is in {growing.folder}"]


def test_on_a_disk_they_lie_where_they_are(tmp_path: Path) -> None:
    growing = Growing(tmp_path)
    assert growing.folder == tmp_path
    growing.fetch("metrics.jsonl")
    assert growing.sync()
    growing.close()
    assert tmp_path.exists()


# ---- Copies ----


def test_an_object_is_fetched_once_and_again_when_it_was_replaced(out: Path, store: Store, tmp_path: Path) -> None:
    storage.write_atomically(out / "a.npy", "one" * 1000)
    media = lambda: sum("alt=media" in address for _, address in store.asked)
    before = media()
    path = storage.cached(out / "a.npy", tmp_path)
    assert storage.cached(out / "a.npy", tmp_path) == path
    assert path.read_text() == "one" * 1000
    assert path.name == "a.npy"
    assert media() == before + 1
    storage.write_atomically(out / "a.npy", "two" * 1000)
    assert storage.cached(out / "a.npy", tmp_path).read_text() == "two" * 1000
    assert storage.cached(path, tmp_path) == path
    with pytest.raises(UserError) as error:
        storage.cached(out / "b.npy", tmp_path)
    assert str(error.value) == f"{out}/b.npy: cannot be read: No such file or directory"


@pytest.mark.parametrize("kind", ["503", "cut", "lost", "slow"])
def test_a_copy_is_whole_or_not_there(kind: str, out: Path, store: Store, tmp_path: Path) -> None:
    storage.write_atomically(out / "a.npy", "one" * 1000)
    fault = store.fail(kind, "alt=media", seconds=0.5)
    assert storage.cached(out / "a.npy", tmp_path).read_text() == "one" * 1000
    assert fault.met == 1
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


# ---- A run ----

SAVES = {"train.checkpoint_every": 3}


@pytest.fixture(scope="module")
def uninterrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a disk with the saves of those below."""
    out = tmp_path_factory.mktemp("disk") / "run"
    finish(start(["-m", "tiedjax", *arguments(out, text, SAVES)]))
    return out


@pytest.mark.parametrize(
    ("moment", "kind"),
    slow_but(
        [
            ("checkpoints/6/tree/ocdbt", "cut"),  # while arrays are written
            ("checkpoints/6/commit_success.txt", "lost"),  # all is there, and that too
            ("checkpoints/6/commit_success.txt", "cut"),  # all but what says so
            ("metrics.jsonl", "lost"),
        ],
        ("checkpoints/6/tree/ocdbt", "cut"),
    ),
)
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(
    moment: str, kind: str, out: Path, store: Store, text: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    command = ["-m", "tiedjax", *arguments(out, text, SAVES)]
    run = start(command, **store.environment)
    fault = store.fail(kind, "", then=run.kill)
    fault.hits = lambda verb, address: verb == "POST" and f"{out.name}/{moment}" in address
    run.communicate(timeout=120)
    assert (run.returncode, fault.met) == (-9, 1)
    finish(start(command, **store.environment))
    assert_same_run(store.download(out.name, tmp_path / "run"), uninterrupted)


@pytest.mark.slow
def test_a_damaged_state_is_set_aside_and_an_older_one_is_used(
    out: Path, store: Store, text: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    command = ["-m", "tiedjax", *arguments(out, text, SAVES)]
    finish(start(command, **store.environment))
    damaged = out / "checkpoints" / str(STEPS)
    for name in storage.names(damaged / "about"):
        storage.write_atomically(damaged / "about" / name, "{}")
    said, _ = finish(start(command, **store.environment))
    assert f"{damaged}: cannot be restored: 'digest'; the state before it is tried\n" in said
    assert f"damaged-{STEPS}" in storage.names(out / "checkpoints")
    assert STEPS in storage.saved_steps(out / "checkpoints")
    assert_same_run(store.download(out.name, tmp_path / "run"), uninterrupted)


def test_a_second_run_of_one_place_is_refused_in_a_line(out: Path, store: Store, text: Path) -> None:
    with storage.sole_writer(out):
        _, said = finish(start(["-m", "tiedjax", *arguments(out, text)], **store.environment), status=79)
    assert said.splitlines()[-1].startswith(f"tiedjax: {out}: process {os.getpid()} on ")


def test_a_bucket_that_may_not_be_asked_about_is_refused_in_a_line(out: Path, store: Store, text: Path) -> None:
    denied = Fault("403", lambda verb, address: address.split("?")[0].endswith("/b/bucket"), times=10**6)
    store.faults.append(denied)
    _, said = finish(start(["-m", "tiedjax", *arguments(out, text)], **store.environment), status=2)
    assert said.splitlines()[-1] == (
        f"tiedjax: {out}: the bucket bucket cannot be asked what it is; that takes the right "
        "storage.buckets.get, as in roles/storage.legacyBucketReader (the store answers: Forbidden: "
        "b/bucket; made to fail)"
    )


def test_prepared_tokens_are_fetched_once(
    out: Path, store: Store, text: Path, monkeypatch: Any, tmp_path: Path
) -> None:
    local = prepare(DataConfig(source=f"text:{text}"), 320, report=lambda line: None)
    for path in local.directory.iterdir():
        if path.is_file():
            storage.write_atomically(out / path.name, path.read_bytes())
    monkeypatch.setenv("TIEDJAX_CACHE", str(tmp_path))
    cut = store.fail("cut", "train-00000.npy", method="GET")
    fetched = load_prepared(str(out))
    assert cut.met == 1
    assert fetched.fingerprint == local.fingerprint
    assert all((a == b).all() for a, b in zip(fetched.arrays("train"), local.arrays("train"), strict=True))
    before = [address for _, address in store.asked if "alt=media" in address and ".npy" in address]
    assert load_prepared(str(out)).directory == fetched.directory
    assert [address for _, address in store.asked if "alt=media" in address and ".npy" in address] == before
    with pytest.raises(UserError) as error:
        load_prepared(f"{out}/nothing")
    assert str(error.value) == f"{out}/nothing: holds no prepared data; make some with: tiedjax data prepare"


def test_a_run_in_a_store_is_read_as_one_on_a_disk(out: Path, store: Store, uninterrupted: Path) -> None:
    from tiedjax import load_run

    for path in sorted(uninterrupted.rglob("*")):
        if path.is_file():
            storage.write_atomically(out / path.relative_to(uninterrupted).as_posix(), path.read_bytes())
    there, here = load_run(str(out)), load_run(uninterrupted)
    assert there.snapshot_steps == here.snapshot_steps
    assert (there.tables().input == here.tables().input).all()
    assert (there.token_counts == here.token_counts).all()
    assert (there.metrics["loss"] == here.metrics["loss"]).all()
    assert there.tokenizer_path
    assert here.tokenizer_path
    assert there.tokenizer_path.read_text() == here.tokenizer_path.read_text()
