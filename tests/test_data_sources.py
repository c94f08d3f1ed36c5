"""Laws of the sources: one text whatever file holds it, one line for whatever is wrong with it."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard

from tiedjax.config import DataConfig
from tiedjax.data import text_files
from tiedjax.data.embedded_corpus import standard_library
from tiedjax.data.prepare import prepare
from tiedjax.data.sources import documents
from tiedjax.errors import UserError

TEXTS = ["first\nwith lines\r\n", "zweites: äöü €", "third 😀 \u2028 inner", "a spelled <|endoftext|> stays text"]


def read(source: str, folder: Path, **options: object) -> list[str]:
    return list(documents(DataConfig(source=source, **options), folder / "cache"))


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> bytes:
    data = "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()
    path.write_bytes(data)
    return data


def test_one_text_whatever_file_holds_it(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain))
    frames = [zstandard.compress(plain[:50]), zstandard.compress(plain[50:])]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))
    (tmp_path / "d.json.zst").write_bytes(zstandard.ZstdCompressor().compressobj().compress(b""))
    with zstandard.open(tmp_path / "d.json.zst", "wb") as file:  # a frame that does not tell its size
        file.write(plain)
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.json.zst"):
        assert read(f"text:{tmp_path}/{name}", tmp_path) == TEXTS, name
    for i, text in enumerate(TEXTS[:3]):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    assert read(f"text:{tmp_path}/*.txt", tmp_path) == TEXTS[:3]
    (tmp_path / "all.txt.zst").write_bytes(zstandard.compress("<|endoftext|>\n".join(TEXTS[:3]).encode()))
    assert read(f"text:{tmp_path}/all.*", tmp_path) == TEXTS[:3]


def test_fields_limits_folders_and_empty_documents(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one", "  \n", "two", "three"], field="body")
    source = f"text:{tmp_path}/**/*.jsonl"
    assert read(source, tmp_path, text_field="body") == ["one", "two", "three"]
    assert read(source, tmp_path, text_field="body", max_documents=2) == ["one", "two"]


def test_half_a_surrogate_becomes_a_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud83d y \\ud83d\\ude00"}\n')
    assert read(f"text:{tmp_path}/a.jsonl", tmp_path) == ["x\ufffd y 😀"]


def test_long_plain_text_is_cut_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "LONGEST", 40)
    text = "".join(f"line {i} of a book\n" for i in range(50)) + "no line break " * 20 + "x" * 90
    (tmp_path / "book.txt").write_text(text)
    pieces = read(f"text:{tmp_path}/book.txt", tmp_path)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 40
    assert pieces[0].endswith("\n")


BAD_TEXT = {
    "bad.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2: not JSON: Expecting value at column 1"),
    "list.jsonl": (b"[1]\n", "line 1: no text in field 'text'; it is not an object (see data.text_field)"),
    "field.jsonl": (b'{"body": "a"}\n', "line 1: no text in field 'text'; its fields are body (see data.text_field)"),
    "number.jsonl": (b'{"text": 3}\n', "line 1: no text in field 'text'; what is there is 3 (see data.text_field)"),
    "open.jsonl": (b'{"text": "a\n', "line 1: not JSON: Invalid control character at column 12"),
    "wide.jsonl": (
        json.dumps({f"k{i}": 1 for i in range(5000)}).encode() + b"\n",
        "line 1: no text in field 'text'; its fields are k0, k1, k2, k3, k4, k5, k6, k7 ... (see data.text_field)",
    ),
    "latin.txt": ("ok\nä".encode("latin-1"), "line 2: not UTF-8 text: unexpected end of data at byte 0"),
    "not.txt.gz": (b"hello", "cannot be read after line 0: Not a gzipped file (b'he')"),
}
# Where and why a packed file breaks off is told in the words of its library.
BROKEN_OFF = {
    "cut.txt.gz": (gzip.compress(b"lines\n" * 99999)[:-20], r"cannot be read after line \d+: Compressed file ended .*"),
    "cut.txt.zst": (zstandard.compress(b"lines\n" * 99999)[:-5], r"cannot be read after line \d+: .* is cut short"),
    "not.txt.zst": (b"hello", r"cannot be read after line 0: not valid zstd: .*"),
}


@pytest.mark.parametrize("name", [*BAD_TEXT, *BROKEN_OFF])
def test_bad_text_is_one_line_that_names_the_file(tmp_path: Path, name: str) -> None:
    content, message = (BAD_TEXT | BROKEN_OFF)[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(f"text:{tmp_path}/{name}", tmp_path)
    where, what = str(caught.value).split(": ", 1)
    assert where == str(tmp_path / name)
    assert what == message if name in BAD_TEXT else re.fullmatch(message, what)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("text:{tmp}/*.nothing", "missing corpus: no file matches '{tmp}/*.nothing'; give a path or a glob of files"),
        (
            "text:{tmp}",
            "missing corpus: no file matches '{tmp}'; it is a folder; name its files, such as '{tmp}/*'",
        ),
        (
            "txet:a",
            "'txet:a' is none of embedded, tfds:NAME[/CONFIG], text:GLOB, tokens:GLOB, prepared:DIR; did you mean "
            "'text'?",
        ),
        ("corpus", "'corpus' is none of embedded, tfds:NAME[/CONFIG], text:GLOB, tokens:GLOB, prepared:DIR"),
        ("tfds:embeded_nothing", "tfds:embeded_nothing: TFDS knows no such dataset, and none is prepared"),
        (
            "tfds:mnst",
            "tfds:mnst: TFDS knows no such dataset, and none is prepared; did you mean 'mnist'?",
        ),
        ("tfds:bad name", "tfds:bad name: Parsing builder name string bad name failed."),
    ],
)
def test_a_source_that_is_not_there_is_one_line(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(source.format(tmp=tmp_path), tmp_path)
    assert str(caught.value) == f"data.source: {message.format(tmp=tmp_path)}"


def test_a_dataset_that_cannot_be_downloaded_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import requests
    import tensorflow_datasets as tfds

    class Unreachable:
        class info:
            full_name = "far/1.0.0"

        def download_and_prepare(self, download_config: object) -> None:
            raise requests.exceptions.ConnectionError("cannot resolve host\nsecond line")

    monkeypatch.setattr(tfds, "builder", lambda name, **options: Unreachable())
    with pytest.raises(UserError, match="tfds:far: cannot be downloaded or prepared: cannot resolve host") as caught:
        read("tfds:far", tmp_path)
    assert "\n" not in str(caught.value)


def test_published_token_files_hold_the_same_tokens_in_every_form(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 500, 3000)
    for dtype in (np.uint16, np.uint32, np.int64):
        np.save(tmp_path / f"header-{np.dtype(dtype).name}.npy", tokens.astype(dtype))
    tokens.astype(np.uint16).tofile(tmp_path / "raw.npy")  # as OLMo publishes them: named .npy, without a header
    tokens.astype(np.uint32).tofile(tmp_path / "raw.u32")
    files = sorted(path.name for path in tmp_path.iterdir())
    for name in files:
        data = DataConfig(source=f"tokens:{tmp_path}/{name}", holdout=0.1, cache=str(tmp_path / "cache"))
        prepared = prepare(data, 500, report=lambda line: None)
        parts = [np.concatenate(prepared.arrays(split)) for split in ("train", "eval")]
        np.testing.assert_array_equal(np.concatenate(parts), tokens, err_msg=name)
        assert len(parts[1]) == 300
        assert not list(prepared.directory.glob("*.npy")), "tokens were copied"


def test_a_large_vocabulary_makes_raw_tokens_uint32(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 100_000, 3000).astype(np.uint32)
    tokens.tofile(tmp_path / "a.npy")
    data = DataConfig(source=f"tokens:{tmp_path}/a.npy", cache=str(tmp_path / "cache"))
    np.testing.assert_array_equal(
        prepare(data, 100_000, report=lambda line: None).arrays("train")[0], tokens[: round(3000 * 0.98)]
    )


def test_token_files_are_cut_behind_an_end_marker_where_it_is_known(tmp_path: Path) -> None:
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    special = {"id": 1, "content": "<|endoftext|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] = [special | flags]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    lengths = np.random.default_rng(0).integers(2, 60, 100)
    documents = [np.full(length, 2 + i % 7, np.uint16) for i, length in enumerate(lengths)]
    np.save(tmp_path / "many.npy", np.concatenate([np.append(d, np.uint16(1)) for d in documents]))
    np.save(tmp_path / "one.npy", np.append(np.full(500, 3, np.uint16), np.uint16(1)))
    data = DataConfig(
        source=f"tokens:{tmp_path}/*.npy",
        tokenizer=str(tmp_path / "tokenizer.json"),
        holdout=0.1,
        cache=str(tmp_path / "cache"),
    )
    prepared = prepare(data, 10, report=lambda line: None)
    for split in ("train", "eval"):
        assert all(array[-1] == 1 for array in prepared.arrays(split))
    assert prepared.documents["train"] + prepared.documents["eval"] == 101
    assert len(prepared.arrays("eval")) == 1, "a file of one document cannot be divided"
    assert 0.05 < prepared.num_tokens("eval") / (prepared.num_tokens("train") - 501) < 0.15


BAD_TOKENS = {
    "odd.npy": (b"\x01\x00\x02", "3 bytes are no whole number of raw uint16 tokens"),
    "empty.npy": (b"", "holds no tokens"),
    "large.npy": (
        np.array([1, 77], np.uint16).tobytes(),
        "token id 77 does not fit model.vocab_size 50 (read as uint16; ids are 0 .. 49)",
    ),
    "wide.npy": (
        np.arange(40, dtype=np.uint32).tobytes(),
        "every second uint16 is 0, so these are uint32 tokens; name the file .u32 or .uint32",
    ),
    "broken.npy": (
        b"\x93NUMPY\x01",
        "not a readable .npy file: EOF: reading magic string, expected 8 bytes got 7",
    ),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_bad_tokens_are_one_line_that_names_the_file(tmp_path: Path, name: str) -> None:
    content, message = BAD_TOKENS[name]
    (tmp_path / name).write_bytes(content)
    data = DataConfig(source=f"tokens:{tmp_path}/{name}", cache=str(tmp_path / "cache"))
    with pytest.raises(UserError) as caught:
        prepare(data, 50, report=lambda line: None)
    assert str(caught.value) == f"{tmp_path}/{name}: {message}"


def test_tokens_of_the_wrong_kind_and_limits_that_cannot_hold(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 3)))
    with pytest.raises(UserError) as caught:
        prepare(DataConfig(source=f"tokens:{tmp_path}/a.npy", cache=str(tmp_path)), 50, report=print)
    assert str(caught.value) == f"{tmp_path}/a.npy: holds float64 [4, 3]; tokens are one row of integers"
    with pytest.raises(UserError) as caught:
        prepare(DataConfig(source=f"tokens:{tmp_path}/a.npy", max_documents=5, cache=str(tmp_path)), 50, report=print)
    assert str(caught.value) == "data.max_documents: tokens: sources are read whole; name fewer files"


def test_the_standard_library_is_whole_and_without_its_tests() -> None:
    found = list(standard_library.documents())
    names = [name for name, _ in found]
    assert names == [name for name, _ in standard_library.documents()]
    assert len(set(names)) == len(names)
    assert {"topics/assert", "argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert sum(len(text) for _, text in found) > 5_000_000


def test_an_unreadable_module_is_skipped_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "good.py").write_text("x = 1")
    (tmp_path / "bad.py").write_bytes(b"# \xff\xfe")
    monkeypatch.setattr(standard_library.sysconfig, "get_path", lambda name: str(tmp_path))
    names = [name for name, _ in standard_library.documents()]
    assert "good.py" in names
    assert "bad.py" not in names
    assert "bad.py" in caplog.text


def test_the_embedded_corpus_needs_neither_network_nor_tensorflow(tmp_path: Path) -> None:
    """In a process of its own, where opening a connection ends it and only our imports are there."""
    program = f"""
import socket, sys
def refuse(*args): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from tiedjax.config import DataConfig
from tiedjax.data.batches import Batches
from tiedjax.data.prepare import prepare
data = DataConfig(max_documents=60, holdout=0.1, cache={str(tmp_path)!r})
prepared = prepare(data, 600, report=lambda line: None)
next(Batches(prepared, 32, 4, 0).iterate())
assert "tensorflow" not in sys.modules
print(prepared.fingerprint, prepared.vocab_size)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "600"
    assert list(tmp_path.glob("tfds/embedded_corpus/*/*/*.array_record*"))
    # What TFDS has prepared is read by name, also where the code that made it is not imported.
    program = "import sys; from pathlib import Path; from tiedjax.config import DataConfig as D\n"
    program += "from tiedjax.data.sources import documents\n"
    program += "print(len(list(documents(D(source='tfds:embedded_corpus'), Path('.')))), 'tensorflow' in sys.modules)"
    environment = os.environ | {"TFDS_DATA_DIR": str(tmp_path / "tfds")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == [str(len(list(standard_library.documents()))), "False"], done.stderr


def test_importing_the_package_costs_none_of_its_heavy_libraries() -> None:
    modules = [path.stem for path in Path(text_files.__file__).parent.glob("[a-z]*.py")]
    heavy = {"grain", "jax", "tensorflow_datasets", "tokenizers", "zstandard", "tensorflow"}
    program = f"import sys, {', '.join('tiedjax.data.' + name for name in modules)}; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
