"""Laws of preparation: the same shards whoever makes them, and nothing that looks finished before it is."""

import argparse
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from tiedjax import cli
from tiedjax.config import DataConfig
from tiedjax.data import command, shards
from tiedjax.data.folders import locked
from tiedjax.data.prepare import prepare
from tiedjax.data.prepared import Prepared, Segment, load_prepared
from tiedjax.data.tokenizer import END_MARKER, end_id, load_tokenizer, train_bpe
from tiedjax.errors import UserError

V = 400


def quiet(line: str) -> None:
    pass


def corpus(path: Path, count: int = 120) -> list[str]:
    """Distinct documents in a .jsonl file, two of them there twice."""
    random.seed(0)
    words = ["table", "token", "gradient", "role", "matrix", "λ", "木", "🌲", "weight", "tying"]
    texts = [f"{i}: " + " ".join(random.choices(words, k=random.randint(5, 80))) for i in range(count)]
    texts += texts[:2]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def config(tmp_path: Path, **options: object) -> DataConfig:
    settings = {"source": f"text:{tmp_path}/a.jsonl", "holdout": 0.2, "cache": str(tmp_path / "cache")}
    return DataConfig(**{**settings, **options})


def decoded(prepared: Prepared, split: str) -> list[str]:
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    text = tokenizer.decode(np.concatenate(prepared.arrays(split)).tolist(), skip_special_tokens=False)
    assert text.endswith(END_MARKER)
    return text.split(END_MARKER)[:-1]


def test_every_document_is_in_exactly_one_split_and_unchanged(tmp_path: Path) -> None:
    texts = corpus(tmp_path / "a.jsonl")
    prepared = prepare(config(tmp_path), V, report=quiet)
    train, held_out = decoded(prepared, "train"), decoded(prepared, "eval")
    assert sorted(train + held_out) == sorted(texts)
    assert not set(train) & set(held_out), "equal documents must not be divided between the splits"
    assert len(set(held_out)) == 24
    assert prepared.documents == {"train": len(train), "eval": len(held_out)}
    assert prepared.num_tokens("train") == sum(map(len, prepared.arrays("train")))
    assert prepared.vocab_size <= V


def test_neither_workers_nor_shards_nor_order_decide_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = corpus(tmp_path / "a.jsonl")
    one = prepare(config(tmp_path, workers=1), V, report=quiet, out=tmp_path / "one")
    monkeypatch.setattr("tiedjax.data.tokenizer._CHUNK_CHARACTERS", 100)
    many = prepare(config(tmp_path, workers=5), V, report=quiet, out=tmp_path / "many")
    assert many.fingerprint == one.fingerprint
    monkeypatch.setattr(shards, "SHARD_TOKENS", 500)
    split = prepare(config(tmp_path), V, report=quiet, out=tmp_path / "split")
    assert len(split.arrays("train")) > 5
    assert np.array_equal(np.concatenate(split.arrays("train")), one.arrays("train")[0])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in reversed(texts)))
    turned = prepare(config(tmp_path), V, report=quiet, out=tmp_path / "turned")
    assert sorted(decoded(turned, "eval")) == sorted(decoded(one, "eval"))


def test_the_cache_answers_again_and_its_key_is_everything_that_matters(tmp_path: Path) -> None:
    corpus(tmp_path / "a.jsonl")
    lines: list[str] = []
    first = prepare(config(tmp_path), V, report=lines.append)
    assert any("tokenize: 122 of 122 documents" in line for line in lines)
    lines.clear()
    assert prepare(config(tmp_path, workers=1, batch_size=4), V, report=lines.append) == first
    assert not lines, "nothing is made again"
    others = [({"holdout": 0.3}, V), ({"max_documents": 50}, V), ({}, V + 1)]
    prepared = [prepare(config(tmp_path, **options), vocab, report=quiet) for options, vocab in others]
    given = str(first.tokenizer_path)
    prepared.append(prepare(config(tmp_path, tokenizer=given), V, report=quiet))
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    prepared.append(prepare(config(tmp_path), V, report=quiet))
    assert len({p.directory for p in (first, *prepared)}) == 6
    assert prepared[3].fingerprint == first.fingerprint, "the same tokens, by another way"


def test_a_killed_preparation_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    corpus(tmp_path / "a.jsonl")
    program = f"""
import os, signal
from tiedjax.config import DataConfig
from tiedjax.data import prepare as module
def die(*args, **options):
    folder = args[0]
    assert list(folder.glob("train-*.npy")), "shards are there"
    os.kill(os.getpid(), signal.SIGKILL)
module.save_meta = die
module.prepare({config(tmp_path)!r}, {V}, report=print, out={str(tmp_path / "out")!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert left, "the killed process had begun"
    for folder in (*left, tmp_path / "out"):
        with pytest.raises(UserError, match="holds no prepared data"):
            load_prepared(folder)
    assert prepare(config(tmp_path), V, report=quiet, out=tmp_path / "out").documents["train"]
    assert not list(tmp_path.glob(".*")), "scratch and lock are gone"


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    corpus(tmp_path / "a.jsonl")
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(UserError) as caught:
        prepare(config(tmp_path), V, report=quiet, out=tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path}/a.jsonl: line 123: not JSON: Expecting property name enclosed in double quotes at column 1"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_processes_that_prepare_one_key_at_once_agree_and_one_works(tmp_path: Path) -> None:
    corpus(tmp_path / "a.jsonl", 3000)
    program = f"""
from tiedjax.config import DataConfig
from tiedjax.data.prepare import prepare
prepared = prepare({config(tmp_path)!r}, {V}, report=print)
print("fingerprint", prepared.fingerprint)
"""
    command = [sys.executable, "-c", program]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len({output.split()[-1] for output in outputs}) == 1
    assert sum("train a tokenizer" in output for output in outputs) == 1
    assert len(list((tmp_path / "cache" / "prepared").iterdir())) == 1


def test_a_lock_excludes_also_those_who_come_while_it_changes_hands(tmp_path: Path) -> None:
    """The holder removes the lock's file: who waited on it must not take it for one that newcomers can see."""
    waiting, second_inside, second_may_end = threading.Event(), threading.Event(), threading.Event()
    inside: list[str] = []

    def second() -> None:
        with locked(tmp_path / "made", lambda line: waiting.set()):
            inside.append("second")
            second_inside.set()
            second_may_end.wait(10)
            inside.append("second left")

    with ThreadPoolExecutor(1) as pool:
        with locked(tmp_path / "made", quiet):
            done = pool.submit(second)
            assert waiting.wait(10)
            time.sleep(0.05)  # the call after the report blocks
            inside.append("first")
        assert second_inside.wait(10)
        with locked(tmp_path / "made", lambda line: second_may_end.set()):
            inside.append("third")
        second_may_end.set()
        done.result()
    assert inside == ["first", "second", "second left", "third"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("before", "after"), [("table", "tablet"), ('"}\n{', '"}\n{"text": "new"}\n{')])
def test_text_that_changes_while_it_is_read_is_noticed(tmp_path: Path, before: str, after: str) -> None:
    corpus(tmp_path / "a.jsonl")

    def change(line: str) -> None:
        if line.startswith("train a tokenizer"):
            path = tmp_path / "a.jsonl"
            path.write_text(path.read_text().replace(before, after))

    with pytest.raises(UserError) as caught:
        prepare(config(tmp_path), V, report=change)
    assert str(caught.value) == f"data.source: text:{tmp_path}/a.jsonl changed while it was read; run it again"


def test_a_prepared_folder_is_a_source(tmp_path: Path) -> None:
    corpus(tmp_path / "a.jsonl")
    made = prepare(config(tmp_path), V, report=quiet, out=tmp_path / "out")
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    found = prepare(DataConfig(source=f"prepared:{moved}"), V, report=quiet)
    assert found.fingerprint == made.fingerprint
    assert np.array_equal(found.arrays("train")[0], np.load(moved / "train-00000.npy"))
    other = train_bpe(["other"], 300)
    (tmp_path / "other.json").write_text(other.to_str())
    with pytest.raises(UserError) as caught:
        prepare(DataConfig(source=f"prepared:{moved}", tokenizer=str(tmp_path / "other.json")), V, report=quiet)
    assert str(caught.value) == (
        f"data.tokenizer: {tmp_path}/other.json is not the tokenizer that {moved} was made with"
    )


def test_shards_and_tokenizers_that_changed_are_refused(tmp_path: Path) -> None:
    corpus(tmp_path / "a.jsonl")
    prepare(config(tmp_path), V, report=quiet, out=tmp_path / "out")
    tokenizer = tmp_path / "out" / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text + " ")
    with pytest.raises(UserError) as caught:
        load_prepared(tmp_path / "out")
    assert str(caught.value) == f"{tokenizer}: is not the tokenizer that the tokens beside it were made with"
    tokenizer.write_text(text)
    shard = tmp_path / "out" / "train-00000.npy"
    size = shard.stat().st_size
    with shard.open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError) as caught:
        load_prepared(tmp_path / "out")
    assert str(caught.value) == f"{shard}: has {size + 1:,} bytes, {size:,} when it was prepared; prepare it again"
    shard.unlink()
    with pytest.raises(UserError) as caught:
        load_prepared(tmp_path / "out")
    assert str(caught.value) == (
        f"{shard}: prepared tokens cannot be read: No such file or directory; prepare them again"
    )
    meta = tmp_path / "out" / "meta.json"
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError) as caught:
        load_prepared(tmp_path / "out")
    assert str(caught.value) == f"{tmp_path}/out: was prepared by another version of tiedjax; prepare it again"


NOT_THERE = object()
DAMAGES: dict[str, tuple[dict[str, object], str]] = {
    "no documents": ({"documents": NOT_THERE}, "lacks documents"),
    "no key and end": ({"key": NOT_THERE, "end_id": NOT_THERE}, "lacks key, end_id"),
    "no split": ({"segments": {"train": []}}, "does not say which tokens belong to which split"),
    "no list": ({"segments": 3}, "does not say which tokens belong to which split"),
    "half a segment": (
        {"segments": {"train": [{"file": "train-00000.npy"}], "eval": []}},
        "does not say which tokens belong to which split",
    ),
    "text for numbers": (
        {"segments": {"train": [dict.fromkeys((f.name for f in dataclasses.fields(Segment)), "1")], "eval": []}},
        "does not say which tokens belong to which split",
    ),
    "no JSON": ({}, "is not JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_meta_json_is_one_line(damage: str, tmp_path: Path) -> None:
    corpus(tmp_path / "a.jsonl")
    prepare(config(tmp_path), V, report=quiet, out=tmp_path / "out")
    path, (changes, says) = tmp_path / "out" / "meta.json", DAMAGES[damage]
    meta = json.loads(path.read_text()) | changes
    text = json.dumps({key: value for key, value in meta.items() if value is not NOT_THERE})
    path.write_text(text if changes else text[:-1])
    with pytest.raises(UserError) as caught:
        load_prepared(tmp_path / "out")
    assert str(caught.value) == f"{path}: {says}; remove the folder and prepare the data again"


def test_damaged_counts_are_one_line_and_made_again_once_removed(tmp_path: Path) -> None:
    corpus(tmp_path / "a.jsonl")
    prepared = prepare(config(tmp_path), V, report=quiet, out=tmp_path / "out")
    counts = prepared.token_counts(16, V)
    path, size = tmp_path / "out" / "counts-16.npy", prepared.vocab_size
    whole = path.read_bytes()
    np.save(tmp_path / "other.npy", np.zeros((2, 3), np.int64))
    for damaged in (b"", b"rubbish", whole[:-8], (tmp_path / "other.npy").read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            prepared.token_counts(16, V)
        says = f"{path}: is damaged: it holds no int64 [2, {size}]; remove it and it is made again"
        assert str(caught.value) == says
    path.unlink()
    np.testing.assert_array_equal(prepared.token_counts(16, V), counts)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("options", "vocab_size", "message"),
    [
        ({}, 200, "model.vocab_size: a byte-level BPE needs at least 257, got 200"),
        (
            {"tokenizer": "{tmp}/nowhere.json"},
            V,
            "data.tokenizer: {tmp}/nowhere.json: cannot be read: No such file or directory; give 'bpe' or the path of "
            "a tokenizer.json",
        ),
        (
            {"tokenizer": "{tmp}/two.json"},
            V,
            "{tmp}/two.json: not a tokenizer.json: line 2 is not JSON: Extra data",
        ),
        (
            {"tokenizer": "{tmp}/config.json"},
            V,
            "{tmp}/config.json: not a tokenizer.json: it has no 'model' (save it with tokenizers or transformers)",
        ),
        (
            {"tokenizer": "{tmp}/model.json"},
            V,
            "{tmp}/model.json: not a tokenizer.json: invalid type: integer `3`, expected a map at line 1 column 56",
        ),
        (
            {"tokenizer": "{tmp}/list.json"},
            V,
            "{tmp}/list.json: not a tokenizer.json: it has no 'model' (save it with tokenizers or transformers)",
        ),
        (
            {"tokenizer": "{tmp}/endless.json"},
            V,
            "{tmp}/endless.json: the tokenizer has no end marker; it needs one of <|endoftext|>, <|end_of_text|>, "
            "</s>, <eos>, [SEP]",
        ),
        (
            {"tokenizer": "gs://bucket/tokenizer.json"},
            V,
            "data.tokenizer: must be a path on a disk, got the gs:// address 'gs://bucket/tokenizer.json'; mount it "
            "and name the folder",
        ),
        (
            {"tokenizer": "{tmp}/large.json"},
            280,
            "model.vocab_size: 280 is less than the 300 token ids of {tmp}/large.json",
        ),
        (
            {"cache": "{tmp}/a.jsonl/cache"},
            V,
            "{tmp}/a.jsonl/cache/prepared/KEY: cannot be written: Not a directory; name another folder",
        ),
        (
            {"source": "text:{tmp}/one.txt"},
            V,
            "data.source: text:{tmp}/one.txt: too little text: 1 distinct document(s), and one has to be held out; "
            "give several files, .jsonl lines, or parts separated by <|endoftext|>",
        ),
        (
            {"source": "prepared:{tmp}/none"},
            V,
            "{tmp}/none: holds no prepared data; make some with: tiedjax data prepare",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, options: dict[str, str], vocab_size: int, message: str) -> None:
    corpus(tmp_path / "a.jsonl")
    (tmp_path / "one.txt").write_text("a single document")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "two.json").write_text("{}\n{}")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "model.json").write_text('{"version": "1.0", "model": {"type": "BPE", "vocab": 3}}')
    (tmp_path / "endless.json").write_text(Tokenizer(models.BPE({"a": 0}, [])).to_str())
    (tmp_path / "large.json").write_text(train_bpe(["many words " * 9] + [f"w{i}" for i in range(200)], 300).to_str())
    options = {key: value.format(tmp=tmp_path) for key, value in options.items()}
    with pytest.raises(UserError) as caught:
        prepare(config(tmp_path, **options), vocab_size, report=quiet)
    assert re.sub(r"/[0-9a-f]{20}:", "/KEY:", str(caught.value)) == message.format(tmp=tmp_path)


def test_out_never_overwrites_what_it_did_not_make(tmp_path: Path) -> None:
    corpus(tmp_path / "a.jsonl")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError) as caught:
        prepare(config(tmp_path), V, report=quiet, out=tmp_path / "mine")
    assert str(caught.value) == f"{tmp_path}/mine: exists and holds no prepared data; name an empty or a new folder"
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    prepare(config(tmp_path), V, report=quiet, out=tmp_path / "out")
    with pytest.raises(UserError) as caught:
        prepare(config(tmp_path, holdout=0.5), V, report=quiet, out=tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path}/out: holds data prepared with other options; remove it or name another folder"
    )


def test_any_text_survives_the_tokenizer() -> None:
    random.seed(1)
    tokenizer = train_bpe(["some english text, and its repetition, and its repetition"] * 9, 300)
    ranges = [(0, 128), (0, 0xD800), (0xE000, 0x110000)]
    texts = ["".join(chr(random.randrange(*random.choice(ranges))) for _ in range(50)) for _ in range(200)]
    texts += ["", " ", f"a {END_MARKER} b", "\r\n\t\x00"]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert end_id(tokenizer, "") not in ids


def test_training_a_tokenizer_gives_one_result_on_any_number_of_threads() -> None:
    program = """
from tiedjax.data.embedded_corpus import standard_library
from tiedjax.data.tokenizer import train_bpe, tokenizer_hash
texts = [text for _, text in standard_library.documents()][:100]
print(tokenizer_hash(train_bpe(texts, 1000).to_str()))
"""
    hashes = set()
    for threads in ("1", "4"):
        environment = os.environ | {"RAYON_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env=environment)
        hashes.add(done.stdout)
    assert len(hashes) == 1


def test_the_command_prepares_a_folder_to_train_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus(tmp_path / "a.jsonl")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = tmp_path / "out"
    options = ["--out", str(out), "--vocab-size", "300", "--holdout", "0.2"]
    args = parser.parse_args(["prepare", f"text:{tmp_path}/a.jsonl", *options])
    assert command.run(args) == 0
    printed = capsys.readouterr()
    assert printed.out == f"data.source: prepared:{out}\n"
    assert "tokenize: 122 of 122 documents" in printed.err
    assert prepare(DataConfig(source=f"prepared:{out}"), 300, report=quiet).vocab_size == 300


def test_the_command_counts_ahead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus(tmp_path / "a.jsonl")
    out = tmp_path / "out"
    prepared = ["data", "prepare", f"text:{tmp_path}/a.jsonl", "--out", str(out), "--vocab-size", "300"]
    assert cli.main([*prepared, "--holdout", "0.2", "--seq-len", "8", "--seq-len", "0"]) == 2
    assert capsys.readouterr().err == "tiedjax: --seq-len: must be at least 1, got 0\n"
    assert not out.exists()
    assert cli.main([*prepared, "--holdout", "0.2", "--seq-len", "8", "--seq-len", "1024"]) == 0
    assert capsys.readouterr().err.endswith("count tokens of windows of 8\ncount tokens of windows of 1,024\n")
    for seq_len in (8, 1024):
        windows = load_prepared(out).windows("train", seq_len)
        tokens_NS = windows.read(range(len(windows)))
        expected = [np.bincount(part.ravel(), minlength=300) for part in (tokens_NS[:, :-1], tokens_NS[:, 1:])]
        np.testing.assert_array_equal(np.load(out / f"counts-{seq_len}.npy"), expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["prepared:pf"],
            "SOURCE: prepared:pf is prepared already; give the text that it was made of: embedded, tfds:, text: or "
            "tokens:\n",
        ),
        (["text:nowhere/*"], "SOURCE: missing corpus: no file matches 'nowhere/*'; give a path or a glob of files"),
        (["embedded", "--holdout", "2"], "--holdout: must be < 1, got 2.0"),
        (["embedded", "--workers", "-3"], "--workers: must be >= 1, got -3"),
        (["embedded", "--vocab-size", "0"], "--vocab-size: "),
        (["embedded", "--max-documents", "0"], "--max-documents: must be "),
    ],
)
def test_the_command_names_its_own_options(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "prepare", *words, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"tiedjax: {message.rstrip()}")
    assert not (tmp_path / "out").exists()
