"""Laws of counting: nothing large is read whole before the first step; what that would have shown shows beside it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from programs import finish, start, until
from runs import STEPS, arguments, assert_same_run, start_commands
from test_workers import alive, workers_of

from tiedjax import cli, counting, load_run
from tiedjax.config import DataConfig
from tiedjax.config_files import load_run_config
from tiedjax.data import counts, token_files
from tiedjax.data.folders import locked
from tiedjax.data.prepare import prepare
from tiedjax.data.prepared import Prepared, Segment, load_prepared

V, T, TOKENS = 320, 16, 900_000
HELD_OUT = 0.4  # so that each part of the long file is longer than all blocks that are looked at
WAITS = "run: trained; waiting until its {:,} training tokens are counted\n"
LARGE = "from tiedjax.data import counts; counts.COUNTED_AT_ONCE = 0"


def quiet(line: str) -> None:
    pass


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Token files that count as large, one of them longer than all of its blocks."""
    monkeypatch.setattr(token_files, "READ_WHOLE", 2**19)
    monkeypatch.setattr(counts, "COUNTED_AT_ONCE", 2**19)
    monkeypatch.setattr("tiedjax.data.prepared.VERIFIED_WHOLE", 2**19)
    rng = np.random.default_rng(0)
    for name, count in [("a", TOKENS), ("b", 500)]:
        np.minimum(rng.zipf(1.3, count) - 1, V - 1).astype(np.uint16).tofile(tmp_path / f"{name}.u16")
    return DataConfig(source=f"tokens:{tmp_path}/*.u16", holdout=HELD_OUT, cache=str(tmp_path / "cache"))


def change(path: Path, place: int, token: int) -> None:
    tokens = np.fromfile(path, np.uint16)
    tokens[place] = token
    tokens.tofile(path)


def by_hand(prepared: Prepared, seq_len: int) -> np.ndarray:
    expected = np.zeros((2, V), np.int64)
    for tokens in prepared.arrays("train"):
        covered = (len(tokens) - 1) // seq_len * seq_len
        for role in (0, 1):
            expected[role] += np.bincount(tokens[role : covered + role], minlength=V)
    return expected


def test_a_large_source_is_sampled_when_it_is_opened(
    large: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, check, lines = list[int](), Segment.check, list[str]()

    def observed(segment: Segment, tokens: np.ndarray, vocab_size: int) -> None:
        read.append(len(tokens))
        check(segment, tokens, vocab_size)

    monkeypatch.setattr(Segment, "check", observed)
    prepared = prepare(large, V, report=lines.append)
    assert read.count(2**12) == 3 * 64, "of the long file, and of each of its parts when they are verified"
    assert sum(read) == 3 * 64 * 2**12 + 2 * 64 * 500
    assert prepared.fingerprint.startswith("samples:")
    assert prepared.documents == {"train": None, "eval": None}
    assert lines[-2] == "900,500 tokens in all; those that were not read yet are checked when tokens are counted"
    change(tmp_path / "a.u16", TOKENS - 1, 5)  # in the last block
    assert prepare(large, V, report=quiet).fingerprint != prepared.fingerprint
    monkeypatch.setattr(token_files, "READ_WHOLE", TOKENS + 500)
    whole = prepare(large, V, report=quiet, out=tmp_path / "whole")
    assert not whole.fingerprint.startswith("samples:"), "a small one is read whole"


@pytest.mark.parametrize("place", [5000, TOKENS - 5000], ids=["train", "eval"])
def test_an_id_between_the_samples_is_found_when_it_is_counted_or_read(
    large: DataConfig, tmp_path: Path, place: int
) -> None:
    change(tmp_path / "a.u16", place, V)
    prepared = prepare(large, V, report=quiet)
    says = f"{tmp_path}/a.u16: token id 320 does not fit model.vocab_size 320 (read as uint16; ids are 0 .. 319)"
    with pytest.raises(token_files.UserError) as caught:
        prepared.token_counts(T, V)
    assert str(caught.value) == says
    assert not list(prepared.directory.glob("counts*"))
    windows = prepared.windows("train" if place == 5000 else "eval", T)
    number = place // T if place == 5000 else (place - round(TOKENS * (1 - HELD_OUT))) // T
    with pytest.raises(token_files.UserError) as caught:
        windows.read([number])
    assert str(caught.value) == says


def test_counting_finds_what_is_counted_by_hand_and_the_documents(large: DataConfig, tmp_path: Path) -> None:
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] = [{"id": 1, "content": "<|endoftext|>", "special": True, **flags}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    tokenizer_path = str(tmp_path / "tokenizer.json")
    data = DataConfig(source=large.source, holdout=HELD_OUT, cache=large.cache, tokenizer=tokenizer_path)
    prepared = prepare(data, V, report=quiet)
    out = tmp_path / "token_counts.npy"
    counts.count_beside_training(str(prepared.directory), 7, V + 4, str(out))
    np.testing.assert_array_equal(np.load(out), np.pad(by_hand(prepared, 7), ((0, 0), (0, 4))))
    documents = {
        split: sum(int((tokens == 1).sum()) for tokens in prepared.arrays(split)) for split in ("train", "eval")
    }
    counted = load_prepared(prepared.directory)
    assert counted.documents == documents
    assert counted.fingerprint == prepared.fingerprint
    assert not list(prepared.directory.glob(".*")), "the lock is gone"


def test_the_sample_of_a_large_source_depends_on_the_source_alone(
    large: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(large, V, report=quiet)
    whole = by_hand(prepared, T)
    np.testing.assert_array_equal(counts.sampled_counts(prepared, T, V), whole)  # fewer than 2^24 tokens: all of them
    monkeypatch.setattr(counts, "_SAMPLE", 2**17)
    sample = counts.sampled_counts(prepared, T, V + 4)
    assert list(sample.sum(axis=1)) == [2**17, 2**17]
    share = sample[:, :V] / sample.sum(axis=1, keepdims=True)
    assert np.abs(share - whole / whole.sum(axis=1, keepdims=True)).max() < 0.01
    prepared.token_counts(T, V)
    np.testing.assert_array_equal(counts.sampled_counts(load_prepared(prepared.directory), T, V + 4), sample)


# ---- Runs ----


@pytest.fixture
def counts_path(finished: Path, text: Path) -> Iterator[Path]:
    """Where the counts of the run that all tests share are kept; they are put aside meanwhile."""
    cfg = load_run_config(finished / "config.yaml")
    path = prepare(cfg.data, V, report=quiet).counts_path(T)
    before = path.read_bytes()
    path.unlink()
    yield path
    path.write_bytes(before)


def test_counting_beside_training_gives_the_same_run(
    finished: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts_path: Path
) -> None:
    monkeypatch.setattr(counts, "COUNTED_AT_ONCE", 0)
    assert cli.main(arguments(tmp_path / "run", text)) == 0
    assert_same_run(tmp_path / "run", finished)
    np.testing.assert_array_equal(load_run(tmp_path / "run").token_counts, load_run(finished).token_counts)
    assert counts_path.exists()


@pytest.mark.slow
def test_a_finished_run_waits_for_its_counts_until_it_is_asked_to_stop(
    finished: Path, text: Path, tmp_path: Path, counts_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    tokens = load_prepared(counts_path.parent).num_tokens("train")
    with locked(counts_path, quiet):  # so that nobody can count
        process = start_commands([arguments(out, text)], before=LARGE)
        until(lambda: (out / "checkpoints" / str(STEPS)).exists() and bool(workers_of(process.pid)), process)
        (worker,) = workers_of(process.pid)
        assert os.getpriority(os.PRIO_PROCESS, worker) == 19
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = finish(process, status=75)
        assert stdout.endswith(WAITS.format(tokens))
        assert stderr.endswith("tiedjax: stopped by SIGTERM; the same command continues from there\n")
        assert not alive(worker)
        assert not (out / "token_counts.npy").exists()
        process = start_commands([arguments(out, text)], before=LARGE)
        until(lambda: bool(workers_of(process.pid)), process)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = finish(process, status=75)
        assert stdout.endswith(WAITS.format(tokens))
        assert stderr.endswith("tiedjax: stopped by SIGTERM; the same command continues from there\n")
        stopped = arguments(tmp_path / "stopped", text, {"train.stop_at": 2})
        stdout, _ = finish(start_commands([stopped], before=LARGE), seconds=60)
        assert "waiting" not in stdout, "a run that is stopped does not wait"
    stdout, _ = finish(start_commands([arguments(out, text)], before=LARGE))
    assert f"run: nothing to do, {STEPS} of {STEPS} steps are done\n" in stdout
    np.testing.assert_array_equal(load_run(out).token_counts, load_run(finished).token_counts)


def test_a_count_ends_with_a_run_that_is_stopped(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts_path: Path
) -> None:
    monkeypatch.setattr(counts, "COUNTED_AT_ONCE", 0)
    with locked(counts_path, quiet):
        assert cli.main(arguments(tmp_path / "run", text, {"train.stop_at": 2})) == 0
        assert not workers_of(os.getpid())


def test_a_count_ends_with_a_run_that_is_killed(text: Path, tmp_path: Path, counts_path: Path) -> None:
    with locked(counts_path, quiet):
        process = start_commands([arguments(tmp_path / "run", text)], before=LARGE)
        until(lambda: bool(workers_of(process.pid)), process)
        (worker,) = workers_of(process.pid)
        process.kill()
        process.wait()  # its pipes stay open as long as the worker lives
        end = time.monotonic() + 20
        while alive(worker) and time.monotonic() < end:
            time.sleep(0.05)
        assert not alive(worker)


def test_a_count_that_is_killed_is_taken_again_after_training_once(
    finished: Path, text: Path, tmp_path: Path, counts_path: Path
) -> None:
    """Killed beside training, then while the run waits for its counts; the same command goes on from there."""
    out, ended = tmp_path / "run", "run: counting tokens: its process ended with status -9"
    again = f"{ended}; tokens are counted again after training\n"
    tokens = load_prepared(counts_path.parent).num_tokens("train")
    with locked(counts_path, quiet):
        process = start_commands([arguments(out, text)], before=LARGE)
        for _ in range(2):
            until(lambda: bool(workers_of(process.pid)), process)
            (worker,) = workers_of(process.pid)
            os.kill(worker, signal.SIGKILL)
            until(lambda worker=worker: not alive(worker), process)
        stdout, stderr = finish(process, seconds=60, status=1)
        assert stdout.count(again) == 1
        assert stdout.endswith(WAITS.format(tokens))
        assert stderr.endswith(f"tiedjax: {ended}\n")
        assert (out / "checkpoints" / str(STEPS)).exists()
        process = start_commands([arguments(out, text)], before=LARGE)
        until(lambda: bool(workers_of(process.pid)), process)
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        time.sleep(1)
    stdout, _ = finish(process, seconds=60)
    assert stdout.endswith(f"{STEPS} of {STEPS} steps are done\n{WAITS.format(tokens)}{again}")
    np.testing.assert_array_equal(load_run(out).token_counts, load_run(finished).token_counts)
    assert_same_run(out, finished)


def test_an_id_out_of_range_ends_the_run_in_the_line_that_opening_would_have_said(
    large: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(tmp_path / "a.u16", TOKENS - 5000, V)  # where no batch is read from
    changes: dict[str, Any] = {"data.source": large.source, "data.cache": large.cache, "train.eval_batches": 1}
    changes |= {"data.holdout": HELD_OUT, "train.steps": 20_000, "train.snapshot_every": 20_000}
    assert cli.main(arguments(tmp_path / "run", tmp_path, changes)) == 2
    assert capsys.readouterr().err == (
        f"tiedjax: {tmp_path}/a.u16: token id 320 does not fit model.vocab_size 320 "
        "(read as uint16; ids are 0 .. 319)\n"
    )
    assert not (tmp_path / "run" / "token_counts.npy").exists()
    assert not (tmp_path / "run" / "checkpoints" / "20000").exists(), "it does not train on until the end"


def test_a_batch_with_an_id_out_of_range_is_refused_as_it_is_read(
    large: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = np.fromfile(tmp_path / "a.u16", np.uint16)
    blocks = [(TOKENS - 2**12) * i // 63 for i in range(64)]
    bad = np.ones(TOKENS, bool)
    for block in blocks:
        bad[block : block + 2**12] = False
    tokens[bad] = 1000
    tokens.tofile(tmp_path / "a.u16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts, "COUNTED_AT_ONCE", 2**19)
        patch.setattr(Prepared, "verify", lambda prepared: None)  # which looks at other places
        patch.setattr(counting.Counting, "begin", lambda counting: None)  # which would say the same
        patch.setattr(counts, "sampled_counts", lambda prepared, seq_len, rows: np.ones((2, rows), np.int64))
        changes = {"data.source": large.source, "data.cache": large.cache}
        assert cli.main(arguments(tmp_path / "run", tmp_path, changes)) == 2
    assert capsys.readouterr().err.startswith(f"tiedjax: {tmp_path}/a.u16: token id 1000 does not fit")


Pairs = Callable[[Path, Path], list[subprocess.Popen[str]]]


@pytest.fixture
def pairs() -> Iterator[Pairs]:
    """Starts a run of two processes; whatever happens they end with the test."""
    program = f"import json, sys\n{LARGE}\nfrom tiedjax.cli import main\nsys.exit(main(json.loads(sys.argv[1])))"
    started = list[subprocess.Popen[str]]()

    def pair(out: Path, text: Path) -> list[subprocess.Popen[str]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for i in range(2):
            flags = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id", str(i)]
            started.append(start(["-c", program, json.dumps([*arguments(out, text), *flags])]))
        return started[-2:]

    yield pair
    for process in started:
        process.kill()
        process.wait()


def test_of_two_processes_one_counts(
    finished: Path, text: Path, tmp_path: Path, counts_path: Path, pairs: Pairs
) -> None:
    out = tmp_path / "run"
    with locked(counts_path, quiet):
        both = pairs(out, text)
        until(lambda: (out / "checkpoints" / str(STEPS)).exists(), both[0])
        assert [len(workers_of(process.pid)) for process in both] == [1, 0]
    outputs = [finish(process, seconds=120) for process in both]
    assert "waiting" not in outputs[1][0]
    np.testing.assert_array_equal(load_run(out).token_counts, load_run(finished).token_counts)


@pytest.mark.slow
def test_a_signal_to_either_of_two_processes_ends_their_wait_for_the_counts(
    finished: Path, text: Path, tmp_path: Path, counts_path: Path, pairs: Pairs
) -> None:
    """The first time after training, then in a run that has nothing else to do; a third call completes it."""
    out = tmp_path / "run"
    tokens = load_prepared(counts_path.parent).num_tokens("train")
    with locked(counts_path, quiet):
        for receiver in (1, 0):
            both = pairs(out, text)
            until(lambda: (out / "checkpoints" / str(STEPS)).exists(), both[0])
            until(lambda main=both[0]: bool(workers_of(main.pid)), both[0])
            (worker,) = workers_of(both[0].pid)
            time.sleep(1)
            both[receiver].send_signal(signal.SIGTERM)
            outputs = [finish(process, seconds=30, status=75) for process in both]
            assert outputs[0][0].endswith(WAITS.format(tokens))
            for _, stderr in outputs:
                assert stderr.endswith("tiedjax: stopped by SIGTERM; the same command continues from there\n")
            assert not alive(worker)
            assert not (out / "token_counts.npy").exists()
    for process in pairs(out, text):
        finish(process, seconds=60)
    np.testing.assert_array_equal(load_run(out).token_counts, load_run(finished).token_counts)
