"""Files that may be anything: what reads them gives a value or one line, ends, and changes nothing."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiedjax import cli, npy, sweep, work
from tiedjax.analysis.basis import tables, tokens
from tiedjax.analysis.study.tasks import read_object
from tiedjax.config_files import load_run_config
from tiedjax.data import token_files
from tiedjax.data.prepare import prepare
from tiedjax.data.prepared import load_prepared, save_meta
from tiedjax.data.shards import ShardWriter
from tiedjax.data.tokenizer import id_bound, load_tokenizer, train_bpe
from tiedjax.errors import Status, UserError
from tiedjax.files import local_path
from tiedjax.host.storage import read_json, read_step
from tiedjax.plan import load_study
from tiedjax.run import owed, read_metrics

SECONDS = 60  # of one case: many times what any takes, on a busy machine too


def cases(count: int) -> Callable[[Any], Any]:
    """Settings of a fuzz of so many cases, the same every time."""
    kept = {"derandomize": True, "database": None, "deadline": None}  # `ends_in_time` is the deadline, also of a hang
    return settings(max_examples=count, suppress_health_check=list(HealthCheck), **kept)


@contextlib.contextmanager
def ends_in_time() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise AssertionError(f"still busy after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every entry below a folder, with the bytes of regular files."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def line_of(read: Callable[[], Any], folder: Path) -> str | None:
    """What `read` says of bad input in `folder`; None if it takes it. Anything but a UserError fails."""
    before = contents(folder)
    try:
        with ends_in_time():
            read()
    except UserError as error:
        line = " ".join(str(error).split())
        status = error.status
    else:
        line, status = None, Status.DONE
    assert line != ""
    assert status in set(Status)
    assert contents(folder) == before
    return line


def command_line(*words: str) -> str:
    """The one line that a command says on bad input."""
    heard = io.StringIO()
    with contextlib.redirect_stderr(heard), ends_in_time():
        status = cli.main(words)
    assert status == Status.BAD_INPUT
    said = heard.getvalue()
    assert said.startswith("tiedjax: ")
    assert said.count("\n") == 1
    return said.removeprefix("tiedjax: ").strip()


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the files of one case; the working directory is another, which stays empty."""
    folder, elsewhere = tmp_path_factory.mktemp("box"), tmp_path_factory.mktemp("elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(elsewhere)
        yield folder
    assert not any(elsewhere.iterdir())


def damaged(content: bytes, seed: int) -> bytes:
    """The content cut, with bits flipped, with a piece twice, or with bytes of its own replaced."""
    rng = random.Random(seed)
    parts = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(parts) or 1)
        kind = rng.randrange(5)
        if kind == 0:
            del parts[place:]
        elif kind == 1 and parts:
            parts[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            parts[place:place] = parts[: rng.randint(0, 40)]
        elif kind == 3:
            parts[place : place + rng.randint(1, 9)] = rng.randbytes(3)
        else:
            odd = [b"NaN", b"-1", b"9" * 5000, b"[" * 3000, b"null", b"\0", b"\xff", b"1e999", b'"\\ud800"', b"true"]
            parts[place : place + rng.randint(0, 5)] = rng.choice(odd)
    return bytes(parts)


seeds = st.integers(0, 2**32)
leaves = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)

CONFIG = b"""
model: {layers: 2, d_model: 16, heads: 2, d_ff: 24, seq_len: 8, vocab_size: 320, norm: rms}
tying: {scheme: tied, input_grad_scale: 1.5}
optimizer: {learning_rate: 1e-3, warmup_steps: 2, clip_norm: 1.0}
data: {source: "text:a.jsonl", batch_size: 8, holdout: 0.1}
mesh: {data: 1}
train: {steps: 10, seed: 0, checkpoint_every: null}
"""
STUDY = b"""
base: base.yaml
arms: {two: {tying: {scheme: untied}}, one: {tying: {scheme: tied}}}
reference: two
baseline: one
seeds: [3, 5]
sweep: {optimizer.learning_rate: [1e-3, 3e-3]}
sweep_seeds: [7]
"""


@cases(150)
@given(seeds)
def test_damaged_configs(box, seed):
    (path := box / "config.yaml").write_bytes(damaged(CONFIG, seed))
    line_of(lambda: load_run_config(path), box)


KEYS = [f"{section}.{key}" for section in ("model", "train", "data") for key in ("layers", "steps", "seed", "source")]
KEYS += ["optimizer.learning_rate", "tying.scheme", "tying.input_grad_scale", "data.holdout", "model.vocab_size"]


@cases(150)
@given(st.sampled_from(KEYS), trees)
def test_values_of_other_kinds_in_configs(box, key, value):
    section, _, name = key.partition(".")
    (path := box / "config.yaml").write_text(json.dumps({section: {name: value}}))
    line_of(lambda: load_run_config(path), box)


@cases(80)
@given(seeds)
def test_damaged_studies(box, seed):
    (box / "base.yaml").write_bytes(CONFIG)
    (path := box / "study.yaml").write_bytes(damaged(STUDY, seed))
    line_of(lambda: load_study(path), box)


def array_file(form: str) -> bytes:
    buffer, table = io.BytesIO(), np.arange(12, dtype=np.float32).reshape(4, 3)
    if form == "npz":
        np.savez(buffer, input=table, output=table)
    elif form == "npy":
        np.save(buffer, table)
    else:
        header = json.dumps({"a": {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}}).encode()
        buffer.write(len(header).to_bytes(8, "little") + header + table.tobytes())
    return buffer.getvalue()


@cases(250)
@given(st.sampled_from(["npy", "npz", "safetensors"]), seeds)
def test_damaged_tables(box, form, seed):
    (path := box / f"table.{form}").write_bytes(damaged(array_file(form), seed))
    line_of(lambda: tables.read_table(f"{path}#input" if form == "npz" else str(path)), box)
    line_of(lambda: tables.read_counts(str(path)), box)
    path.unlink()


@cases(100)
@given(seeds, st.booleans())
def test_damaged_token_files(box, seed, header):
    buffer = io.BytesIO()
    np.save(buffer, np.arange(60, dtype=np.uint16))
    content = buffer.getvalue() if header else buffer.getvalue()[-120:]
    (path := box / "tokens.npy").write_bytes(damaged(content, seed))
    line_of(lambda: token_files.scan([path], 320, None, 0.1, 1, lambda line: None), box)
    path.unlink()


def shards(folder: Path) -> Path:
    """A prepared folder whose two shards hold ids 0 .. 99."""
    folder.mkdir()
    with ShardWriter(folder, "train", np.dtype("<u2")) as train, ShardWriter(folder, "eval", np.dtype("<u2")) as other:
        train.add(np.arange(100, dtype="<u2"))
        other.add(np.arange(100, dtype="<u2"))
    segments = {"train": train.segments, "eval": other.segments}
    about = {"vocab_size": 100, "end_id": 0, "tokenizer": None, "documents": {"train": 1, "eval": 1}}
    save_meta(folder, source="embedded", key="k", segments=segments, **about)
    return folder


@cases(100)
@given(seeds, st.sampled_from(["meta.json", "train-00000.npy"]))
def test_damaged_prepared_folders(box, seed, name):
    folder = box / "prepared"
    if not folder.exists():
        shards(folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(damaged(whole, seed))

    def read() -> None:
        prepared = load_prepared(folder)
        prepared.verify()
        prepared.windows("train", 8).counts(prepared.vocab_size)

    try:
        line_of(read, box)
    finally:
        (folder / name).write_bytes(whole)


@cases(80)
@given(seeds)
def test_damaged_tokenizers(box, seed):
    (path := box / "tokenizer.json").write_bytes(damaged(TOKENIZER, seed))
    line_of(lambda: id_bound(load_tokenizer(path)), box)
    line_of(lambda: tokens.token_bytes(path), box)
    line_of(lambda: tokens.token_ids(path, ["a"]), box)


TOKENIZER = train_bpe(["a b c"], 300).to_str().encode()
RECORDS: dict[str, tuple[bytes, Callable[[Path], Any]]] = {
    "evaluation_owed.json": (b'{"step": 4}', lambda path: owed(path.parent)),
    "saved_state.json": (b'{"step": 4}', read_step),
    "metrics.jsonl": (b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n', read_metrics),
    "diverged.json": (
        b'{"error": "x", "config": {"train": {"steps": 4}}}',
        lambda path: work.diverged(path.parent, {"train": {"steps": 4}}),
    ),
    "results.json": (b'{"kind": "study", "schema": 3, "answer": {}}', lambda path: read_object(path, "study")),
}


@cases(150)
@given(st.sampled_from(sorted(RECORDS)), seeds)
def test_damaged_records(box, name, seed):
    content, read = RECORDS[name]
    (path := box / name).write_bytes(damaged(content, seed))
    line_of(lambda: read(path), box)
    path.unlink()


@cases(50)
@given(st.sampled_from(sorted(RECORDS)), trees)
def test_records_of_other_kinds(box, name, tree):
    (path := box / name).write_text(json.dumps(tree) + "\n")
    line_of(lambda: RECORDS[name][1](path), box)
    path.unlink()


# What a fuzz, or a hand, has found: each ended in a traceback, in a wait or in all memory before.

TEXTS = {
    "YAML nested deeply": ("[" * 5000, "is nested too deeply, more than 32 levels"),
    "YAML of 64 levels": ("train: " + "[" * 64 + "]" * 64, "is nested too deeply, more than 32 levels"),
    "a number of 5,000 digits": ("train: {steps: " + "9" * 5000 + "}", "Exceeds the limit (4300 digits)"),
    "aliases that repeat aliases": (
        "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 12)),
        "holds more than 65,536 values, with those that aliases repeat",
    ),
    "an alias of itself": ("train: &a [*a]", "is nested too deeply, more than 32 levels"),
    "a key that is a list": ("train: {[1]: 2}", "a key must be text, got (1,)"),
    "a date that is none": ("train: {seed: 2001-99-99}", "is not YAML that can be read: month must be in 1..12"),
    "too long": ("# " + "x" * 2**18, "has more than 262,144 bytes"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_configs_that_ended_otherwise(tmp_path, name):
    text, wanted = TEXTS[name]
    (path := tmp_path / "config.yaml").write_text(text)
    line = command_line("train", str(path), "--out", str(tmp_path / "run"))
    assert str(path) in line
    assert wanted in line
    assert list(tmp_path.iterdir()) == [path]


def place(folder: Path, kind: str) -> Path:
    path = folder / "odd"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a link to itself":
        path.symlink_to(path)
    return path


READERS: dict[str, Callable[[Path], Any]] = {
    "config": load_run_config,
    "study": load_study,
    "npy": npy.read_npy,
    "npz": npy.read_npz,
    "tokenizer": load_tokenizer,
    "JSON": read_json,
    "metrics": read_metrics,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device", "a link to itself"])
def test_what_is_no_file_is_refused_unopened(tmp_path, kind, reader):
    path = place(tmp_path, kind)
    line = line_of(lambda: READERS[reader](path), tmp_path)
    assert line is not None
    assert ("symbolic links" if kind == "a link to itself" else f"it is {kind}, not a file") in line


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a\0b", "which holds a NUL character"),
        ("a" * 300, "names of at most 255 bytes"),
        ("a/" * 2500, "4,095 in all"),
        ("\ud800", "which is not text"),
    ],
)
def test_paths_that_no_file_can_have(tmp_path, text, wanted):
    assert wanted in str(line_of(lambda: local_path(text, "CONFIG"), tmp_path))
    for read in (tables.read_table, load_prepared, load_tokenizer, load_run_config):
        assert wanted in str(line_of(lambda read=read: read(text), tmp_path))


def test_a_header_that_promises_more_than_its_file_holds(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2)})
    (tmp_path / "a.npy").write_bytes(buffer.getvalue() + bytes(64))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.write(tmp_path / "a.npy", "a.npy")
    for name in ("a.npy", "a.npz"):
        line = line_of(lambda name=name: tables.read_table(str(tmp_path / name)), tmp_path)
        assert "its header promises 8,796,093,022,208 bytes, 64 are there" in str(line)


def test_a_table_of_8_bits(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [4, 3], "data_offsets": [0, 12]}}).encode()
    (path := tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    assert str(path) in str(line_of(lambda: tables.read_table(str(path)), tmp_path))


def test_a_tokenizer_without_tokens_and_one_of_huge_ids(tmp_path):
    tree = json.loads(TOKENIZER)
    tree["model"] |= {"vocab": {}, "merges": []}
    (path := tmp_path / "tokenizer.json").write_text(json.dumps(tree | {"added_tokens": []}))
    assert "it has no tokens" in str(line_of(lambda: load_tokenizer(path), tmp_path))
    tree["model"] |= {"vocab": {"a": 2**32 - 2}}
    path.write_text(json.dumps(tree | {"added_tokens": []}))
    assert "it has an id of 4,294,967,294; ids are 0 .. 16,777,215" in str(
        line_of(lambda: tokens.token_strings(path), tmp_path)
    )


@pytest.mark.parametrize("name", sorted(RECORDS))
@pytest.mark.parametrize("text", ["", "[" * 100_000, "9" * 5000, "[]", '{"step": true}', '{"step": NaN}', "\ud800"])
def test_records_that_ended_otherwise(tmp_path, name, text):
    (path := tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass") + b"\n")
    line = line_of(lambda: RECORDS[name][1](path), tmp_path)
    assert line is None or str(path) in line


def test_a_sweep_that_is_nested_deeply(tmp_path):
    (tmp_path / "sweep.json").write_text("[" * 100_000)
    line = line_of(lambda: sweep.read(None, tmp_path), tmp_path)  # type: ignore[arg-type]
    assert "does not hold the choices of a sweep" in str(line)


@pytest.mark.parametrize("token", [5, 60_000])
def test_a_shard_that_has_changed_is_named(tmp_path, token):
    """The first is an id like any other, and only its hash tells."""
    folder = shards(tmp_path / "prepared")
    with (folder / "train-00000.npy").open("r+b") as file:
        file.seek(-20, os.SEEK_END)
        file.write(np.array([token], "<u2").tobytes())
    from tiedjax.config import DataConfig

    data = DataConfig(source=f"prepared:{folder}")
    line = line_of(lambda: prepare(data, 100, report=lambda line: None), tmp_path)
    wrong = "its tokens are not those that were prepared" if token == 5 else "token id 60000 does not fit"
    assert f"{folder / 'train-00000.npy'}: {wrong}" in str(line)


def test_a_token_that_goes_bad_after_the_start_is_named_when_it_is_read(tmp_path):
    folder = shards(tmp_path / "prepared")
    prepared = load_prepared(folder)
    prepared.verify()
    with (folder / "train-00000.npy").open("r+b") as file:
        file.seek(-200, os.SEEK_END)
        file.write(b"\xff\xff")
    with pytest.raises(UserError, match=r"train-00000\.npy: token id 65535 does not fit"):
        prepared.windows("train", 8).read([0])
