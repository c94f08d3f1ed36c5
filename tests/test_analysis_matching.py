"""Rows of different tokenizers: matched by token, counted, said; refused where too few match."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import SHRUNK, arguments, write_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import tiedjax
from tiedjax import cli
from tiedjax.analysis.basis.matching import Matching, match, matched
from tiedjax.analysis.basis.tables import Table
from tiedjax.analysis.basis.tokens import token_bytes, token_strings
from tiedjax.data.tokenizer import train_bpe
from tiedjax.errors import UserError

PROSE = [
    "The ship came home in the evening, and the whole town stood on the quay to see her, as if nobody could believe it"
] * 9
CODE = [
    "def home(self, evening): return self.town[evening] if quay is None else isinstance(evening, collections.abc)"
] * 9
D = 24
INSTRUMENTS = {
    "align": ["--draws", "2"],
    "knn": ["--k", "5"],
    "spectral": ["--k", "8", "--eigenpairs", "8"],
    "spectrum": ["--draws", "2"],
    "map": ["--neighbours", "3"],
}


@dataclass(frozen=True)
class Planted:
    """Two byte-level BPEs of different text in a.json and b.json, and tables of one vector for every token string."""

    vocabulary: tuple[dict[str, int], dict[str, int]]
    common: list[str]  # in order of A's ids

    def rows(self, side: int) -> list[int]:
        return [self.vocabulary[side][token] for token in self.common]


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planted:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    vectors: dict[str, np.ndarray] = {}
    vocabularies = []
    for name, text, size, padding in [("a", PROSE, 312, 6), ("b", CODE, 300, 0)]:
        tokenizer = train_bpe(text, size)
        tokenizer.save(f"{name}.json")
        vocabulary = tokenizer.get_vocab()
        table = rng.normal(size=(len(vocabulary) + padding, D))
        for token in sorted(vocabulary):
            table[vocabulary[token]] = vectors.setdefault(token, rng.normal(size=D))
        np.save(f"{name}.npy", table)
        vocabularies.append(vocabulary)
    common = [token for token in sorted(vocabularies[0], key=vocabularies[0].get) if token in vocabularies[1]]
    assert 257 < len(common) < 300
    assert [vocabularies[0][t] for t in common] != [vocabularies[1][t] for t in common]
    return Planted((vocabularies[0], vocabularies[1]), common)


def analyze(*words: str) -> dict[str, Any]:
    assert cli.main(["analyze", *words, "--json", "out.json"]) == 0
    return json.loads(Path("out.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a command that ends with status 2."""
    capsys.readouterr()
    assert cli.main(["analyze", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said.removeprefix("tiedjax: ").rstrip("\n")


# ---- matching


def test_rows_match_by_token_in_the_order_of_the_first_table():
    a, b = match(["x", None, "y", "z"], ["z", "w", None, "x"])
    assert (a.tolist(), b.tolist()) == ([0, 3], [3, 0])


def test_matching_undoes_any_order():
    order = np.random.default_rng(1).permutation(50)
    tokens = [f"t{i}" for i in range(50)]
    a, b = match(tokens, [tokens[i] for i in order])
    assert a.tolist() == list(range(50))
    assert order[b].tolist() == list(range(50))


def test_of_several_rows_of_one_token_the_first_matches_and_padding_never_does():
    a, b = match(["x", "x", None, "y"], [None, "y", "x", "y"])
    assert (a.tolist(), b.tolist()) == ([0, 3], [2, 1])
    a, b = match([None, "x"], [None, "y"])
    assert (a.dtype.kind, len(a), len(b)) == ("i", 0, 0)


@pytest.mark.parametrize("larger", [0, 1])
@pytest.mark.parametrize(
    ("tokens", "matches", "enough"),
    [(6000, 1000, True), (6000, 999, False), (4000, 800, True), (4000, 799, False), (30, 6, True), (30, 5, False)],
)
def test_a_thousand_matches_are_enough_and_so_is_a_fifth_of_the_larger_vocabulary(
    larger, tokens, matches, enough, tmp_path
):
    tables = []
    for side in (0, 1):
        own = tokens if side == larger else matches
        names = [f"t{i}" for i in range(matches)] + [f"{side}-{i}" for i in range(own - matches)]
        path = tmp_path / f"{side}.json"
        Tokenizer(models.WordLevel({name: i for i, name in enumerate(reversed(names))}, "t0")).save(str(path))
        tables.append(Table(f"{side}.npy", np.ones((own, 2)), tokenizer_path=path))
    if enough:
        assert matched(*tables)[2].rows == matches
        return
    sizes = [f"{tokens:,} in {larger}.npy", f"{matches:,} in {1 - larger}.npy"]
    first, second = sizes if larger == 0 else sizes[::-1]
    with pytest.raises(UserError) as error:
        matched(*tables)
    assert str(error.value) == (
        f"{matches:,} tokens match, of {first} and {second}: too few to compare; "
        "1,000 must match, or 20 % of the larger vocabulary"
    )


def test_every_line_that_is_said():
    by_token = Matching(("A", "B"), "token", 3, (5, 1234), (), True, np.array([True, False, True]))
    assert by_token.lines(None) == [
        "3 tokens match, of 5 in A and 1,234 in B: only their rows are compared",
        "A and B started from the same initial array: 2 of 3 compared rows were equal at step 0, and their likeness at "
        "identity is inherited, not learnt",
    ]
    kept = np.array([False, True, False])
    assert by_token.lines(kept)[1] == (
        "A and B started from the same initial array: 0 of 1 compared rows were equal at step 0"
    )
    assert by_token.describe(np.array([True, True, False])) == {
        "by": "token",
        "rows": 3,
        "tokens": (5, 1234),
        "same_start": True,
        "rows_equal_at_start": 1,
    }
    apart = Matching(("A", "B"), "same tokenizer", 3, same_start=False, equal_at_start=np.zeros(3, bool))
    assert apart.lines(None) == []
    assert apart.describe(None)["rows_equal_at_start"] == 0
    as_they_stand = Matching(("A", "B"), "row", 3, unknown=("A", "B"))
    assert as_they_stand.lines(None) == [
        "rows are taken as they stand: the tokenizer of A and of B is not known",
    ]
    assert as_they_stand.describe(None) == {
        "by": "row",
        "rows": 3,
        "tokens": None,
        "same_start": None,
        "rows_equal_at_start": None,
    }


@pytest.mark.parametrize(
    ("first", "second", "same", "equal"),
    [
        ([[1, 2], [3, 4], [5, 6], [7, 8]], [[1, 2], [3, 4], [5, 6], [7, 8]], True, [False, True]),
        ([[1, 2], [3, 4], [5, 6], [7, 8]], [[0, 0], [3, 9], [0, 6]], False, [False, False]),
        ([[1, 2], [3, 4], [5, 6], [7, 8]], [[1, 2], [0, 4], [5, 6]], True, [False, True]),
        ([[1, 2], [3, 4], [5, 6], [7, 8]], [[1], [3], [5]], False, [False, False]),
    ],
)
def test_rows_that_began_equal_are_those_of_one_number(first, second, same, equal, tmp_path):
    tables = []
    for name, start, vocabulary in [("a", first, {"x": 0, "z": 2}), ("b", second, {"x": 1, "z": 2})]:
        path = tmp_path / f"{name}.json"
        Tokenizer(models.WordLevel(vocabulary, "x")).save(str(path))
        initial = np.array(start, np.float32)
        tables.append(Table(name, initial, tokenizer_path=path, initial=lambda initial=initial: initial))
    matching = matched(*tables)[2]
    assert (matching.rows, matching.same_start) == (2, same)
    assert matching.equal_at_start.tolist() == equal


# ---- what a token stands for


def test_byte_level_tokens_stand_for_their_text(tmp_path):
    tokenizer = train_bpe([*PROSE, "naïve café 日本 " * 30], 400)
    tokenizer.save(str(tmp_path / "t.json"))
    strings = token_strings(tmp_path / "t.json")
    assert len(strings) == len(set(strings)) == tokenizer.get_vocab_size()
    for i, string in enumerate(strings):
        text = tokenizer.decode([i], skip_special_tokens=False)
        if "\ufffd" in text:  # bytes that are no text by themselves
            assert not string.isprintable()
        else:
            assert string == text
    assert {" the", " café", "\n", "<|endoftext|>"} <= set(strings)
    assert {string.encode("utf-8", "surrogateescape") for string in strings} >= {bytes([b]) for b in range(256)}


def test_words_of_sentencepiece_and_of_byte_level_bpe_are_the_same_words(tmp_path):
    train_bpe(PROSE, 340).save(str(tmp_path / "bytes.json"))
    other = Tokenizer(models.BPE())
    other.pre_tokenizer, other.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    other.train_from_iterator(PROSE, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    other.save(str(tmp_path / "pieces.json"))
    assert "▁the" in other.get_vocab()
    first, second = token_strings(tmp_path / "bytes.json"), token_strings(tmp_path / "pieces.json")
    assert " the" in {first[i] for i in match(first, second)[0]}


def test_added_tokens_and_other_spellings_stand_as_they_are(tmp_path):
    tokenizer = train_bpe(PROSE, 300)
    tokenizer.add_tokens(["   ", "Ġquayside", "日本"])
    tokenizer.save(str(tmp_path / "t.json"))
    assert token_strings(tmp_path / "t.json")[-3:] == ["   ", "Ġquayside", "日本"]
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##s": 3}, unk_token="[UNK]"))
    pieces.save(str(tmp_path / "p.json"))
    assert token_strings(tmp_path / "p.json") == ["[UNK]", "the", None, "##s"]


def test_bytes_of_tokens_add_up_to_those_of_the_text(tmp_path):
    text = "naïve café 日本, the ship 🚢 came home\n\tin the evening\x00"
    tokenizer = train_bpe([*PROSE, "naïve café 日本 " * 30], 400)
    tokenizer.add_tokens(["evening"])
    tokenizer.save(str(tmp_path / "t.json"))
    ids = tokenizer.encode(text).ids
    assert "\ufffd" in {tokenizer.decode([i]) for i in ids}, "some tokens are parts of a character"
    bytes_N = token_bytes(tmp_path / "t.json")
    assert bytes_N[ids].sum() == len(text.encode())
    assert (len(bytes_N), bytes_N[tokenizer.token_to_id("<|endoftext|>")]) == (tokenizer.get_vocab_size(), 0)
    assert bytes_N[tokenizer.token_to_id("evening")] == 7


def test_bytes_of_tokens_of_other_families(tmp_path):
    vocabulary = {"<unk>": 0, "<0x0A>": 1, "<0xE6>": 2, "▁the": 3, "日": 5}
    for fallback in (True, False):
        pieces = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=fallback))
        pieces.add_special_tokens(["<unk>"])
        pieces.save(str(tmp_path / "p.json"))
        found = token_bytes(tmp_path / "p.json")
        np.testing.assert_array_equal(found, [0, 1, 1, 4, np.nan, 3] if fallback else [0, 6, 6, 4, np.nan, 3])
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##s": 3}, unk_token="[UNK]"))
    words.save(str(tmp_path / "w.json"))
    assert token_bytes(tmp_path / "w.json") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "t.json: cannot be read: No such file or directory"),
        ("{", "t.json: not a tokenizer.json: "),
        ("{}", "t.json: not a tokenizer.json: it has no 'model'"),
        ('{"model": {"type": "Rhyme"}}', "t.json: not a tokenizer.json: "),
        ('{"version": "1.0", "model": {"type": "BPE", "vocab": 3}}', "t.json: not a tokenizer.json: "),
    ],
)
def test_what_is_no_tokenizer_is_one_line(planted, capsys, text, message):
    if text is not None:
        Path("t.json").write_text(text)
    assert refused(capsys, "align", "a.npy", "b.npy", "--tokens", "t.json", "b.json").startswith(message)


# ---- the commands


def test_tables_of_one_vector_for_every_token_are_identical_once_matched(planted, capsys):
    out = analyze("align", "a.npy", "b.npy", "--tokens", "a.json", "b.json", "--fit", "identity")
    assert out["fits"]["identity"]["score"] == pytest.approx(1, abs=1e-12)
    assert out["raw_cosine"]["score"] == pytest.approx(1, abs=1e-12)
    n = len(planted.common)
    assert (
        f"\n{n} tokens match, of 312 in a.npy and 300 in b.npy: only their rows are compared\n"
        in capsys.readouterr().out
    )
    assert out["matching"] == {
        "by": "token",
        "rows": n,
        "tokens": [312, 300],
        "same_start": None,
        "rows_equal_at_start": None,
    }
    assert [(i["rows"], i["width"]) for i in out["inputs"]] == [(318, D), (300, D)]
    assert (out["rows"], out["rows_masked_out"]) == (n, 0)

    np.save("short.npy", np.load("a.npy")[:300])
    by_row = analyze("align", "short.npy", "b.npy", "--fit", "identity")
    assert by_row["fits"]["identity"]["score"] < 0.95
    line = "rows are taken as they stand: the tokenizer of short.npy and of b.npy is not known"
    assert f"\n{line}\n" in capsys.readouterr().out
    assert by_row["matching"]["by"] == "row"


FORMS = ([], ["--counts"], ["--counts", "--all-rows"], ["--counts", "--paper"])
WITHOUT_PAPERS_FORM = ("spectrum", "map")


@pytest.mark.parametrize(
    ("instrument", "form"),
    [
        pytest.param(instrument, form, id=f"{instrument}{''.join(form)}")
        for instrument in INSTRUMENTS
        for form in FORMS
        if "--paper" not in form or instrument not in WITHOUT_PAPERS_FORM
    ],
)
def test_every_instrument_measures_what_it_does_of_rows_matched_by_hand(instrument, form, planted, capsys):
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(300, D))
    np.save("b.npy", np.load("b.npy") + noise)
    counts = rng.integers(0, 5, (2, 318)) * rng.integers(0, 2, 318)
    np.save("counts.npy", counts)
    a, b = planted.rows(0), planted.rows(1)
    np.save("by-hand-a.npy", np.load("a.npy")[a])
    np.save("by-hand-b.npy", np.load("b.npy")[b])
    np.save("by-hand-counts.npy", counts[:, a])
    options = [*INSTRUMENTS[instrument], *(word for word in form if word != "--counts")]
    option = "--tokenizers" if instrument == "map" else "--tokens"
    given = lambda place: ["--counts", place] if "--counts" in form else []
    out = analyze(instrument, "a.npy", "b.npy", option, "a.json", "b.json", *options, *given("counts.npy"))
    by_hand = analyze(instrument, "by-hand-a.npy", "by-hand-b.npy", *options, *given("by-hand-counts.npy"))
    assert out["matching"]["by"] == "token"
    for result in (out, by_hand):
        for key in ("inputs", "matching", "texts"):
            result.pop(key, None)
    if instrument == "map":  # which names rows by A's ids
        by_hand["tokens"] = [a[i] for i in by_hand["tokens"]]
        for near in (near for of in by_hand["nearest"] for near in of):
            near |= {"token": a[near["token"]], "neighbours": [a[i] for i in near["neighbours"]]}
    assert out == by_hand


def test_tables_of_different_length_and_one_tokenizer_lose_their_padding_alone(planted, capsys):
    values = np.load("b.npy")
    np.save("padded.npy", np.concatenate([values, np.ones((5, D))]))
    out = analyze("align", "padded.npy", "b.npy", "--tokens", "b.json", "b.json", "--fit", "identity")
    assert (out["rows"], out["matching"]["by"]) == (300, "token")
    assert out["fits"]["identity"]["score"] == pytest.approx(1)


def test_tables_of_one_vocabulary_stay_as_they_are(planted, capsys):
    Path("same.json").write_text(json.dumps(json.loads(Path("a.json").read_text()), indent=3))
    noisy = np.load("a.npy") + np.random.default_rng(3).normal(size=(318, D))
    np.save("noisy.npy", noisy)
    words = ["align", "a.npy", "noisy.npy", "--draws", "2"]
    out = analyze(*words, "--tokens", "a.json", "same.json")
    shown = capsys.readouterr().out
    plain = analyze(*words)
    assert out.pop("matching") == plain.pop("matching") | {"by": "same tokenizer"}
    assert out == plain
    assert (out["rows"], out["inputs"][0]["rows"]) == (318, 318)
    head, line, *rest = capsys.readouterr().out.splitlines()
    assert line == "rows are taken as they stand: the tokenizer of a.npy and of noisy.npy is not known"
    assert shown.splitlines() == [head, *rest]


def test_what_cannot_be_matched_is_one_line(planted, capsys):
    align = ["align", "a.npy", "b.npy"]
    assert refused(capsys, *align) == (
        "a.npy has 318 rows but b.npy has 300; rows must be the same tokens in the same order, or both tokenizers "
        "known: that of a.npy and of b.npy is not"
    )
    assert refused(capsys, *align, "--tokens", "a.json", "a.json") == (
        "b.npy: has 300 rows but its tokenizer a.json has 312 ids"
    )
    words = Tokenizer(
        models.WordLevel({**{f"w{i}": i for i in range(291)}, **{f"{d}": 291 + d for d in range(9)}}, "w0")
    )
    words.save("words.json")
    for instrument, options in INSTRUMENTS.items():
        option = "--tokenizers" if instrument == "map" else "--tokens"
        assert refused(capsys, instrument, "a.npy", "b.npy", option, "a.json", "words.json", *options) == (
            "9 tokens match, of 312 in a.npy and 300 in b.npy: too few to compare; "
            "1,000 must match, or 20 % of the larger vocabulary"
        )
    assert refused(capsys, "spectrum", "a.npy", "--tokens", "a.json", "b.json") == (
        "a.json: tokenizers match the rows of two tables, but there is one"
    )
    np.save("counts.npy", np.ones(300, int))
    assert refused(capsys, *align, "--tokens", "a.json", "b.json", "--counts", "counts.npy") == (
        "a.npy: has 318 rows but there are counts for 300 tokens"
    )


def test_the_map_names_tokens_by_the_first_tokenizer(planted, capsys):
    words = ["map", "a.npy", "b.npy", "--tokenizers", "a.json", "b.json", "--neighbours", "2"]
    shared, alone = "in", "the"
    vocabulary = planted.vocabulary[0]
    assert "Ġthe" in vocabulary
    assert "Ġthe" not in planted.common
    out = analyze(*words, "--tokens", shared)
    token = vocabulary[shared]
    assert [of[0]["token"] for of in out["nearest"]] == [token] * 2
    assert out["nearest"][0][0]["neighbours"] == out["nearest"][1][0]["neighbours"]
    assert out["texts"][str(token)] == shared
    assert refused(capsys, *words, "--tokens", alone) == (
        f"map: token {vocabulary['Ġthe']} of a.npy matches no token of the other table"
    )


# ---- runs


@pytest.fixture(scope="module")
def others(finished: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run` and `copy`, as `finished`, and `other`, of the same seed, other words and more tokens."""
    folder = tmp_path_factory.mktemp("others")
    words = write_text(folder / "text.jsonl", seed=1)
    shutil.copytree(finished, folder / "run")
    shutil.copytree(finished, folder / "copy")
    assert cli.main(arguments(folder / "other", words, {"model.vocab_size": SHRUNK["model.vocab_size"] + 32})) == 0
    return folder


def test_runs_are_matched_by_their_tokenizers_and_said_to_have_started_alike(others, monkeypatch, capsys):
    monkeypatch.chdir(others)
    tokenizers = [Tokenizer.from_file(f"{name}/tokenizer.json").get_vocab() for name in ("run", "other")]
    runs = [tiedjax.load_run(name) for name in ("run", "other")]
    common = [token for token in sorted(tokenizers[0], key=tokenizers[0].get) if token in tokenizers[1]]
    a, b = ([of[token] for token in common] for of in tokenizers)
    seen = (runs[0].token_counts[:, a].sum(axis=0) > 0) & (runs[1].token_counts[:, b].sum(axis=0) > 0)
    equal = (runs[0].tables(0).output[a] == runs[1].tables(0).output[b]).all(axis=1)
    x, y = runs[0].tables().output[a][seen], runs[1].tables().output[b][seen]
    assert 0 < (equal & seen).sum() < seen.sum() < len(common) < 320

    out = analyze("align", "run", "other", "--fit", "identity")
    shown = capsys.readouterr().out
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    score = np.mean(np.sum(x * y, axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1))
    assert out["fits"]["identity"]["score"] == pytest.approx(score, abs=1e-5)
    assert out["rows"] == seen.sum()
    assert out["matching"] == {
        "by": "token",
        "rows": len(common),
        "tokens": [len(of) for of in tokenizers],
        "same_start": True,
        "rows_equal_at_start": (equal & seen).sum(),
    }
    assert shown.splitlines()[1:3] == [
        f"{len(common)} tokens match, of {len(tokenizers[0])} in run and {len(tokenizers[1])} in other: "
        "only their rows are compared",
        f"run and other started from the same initial array: {(equal & seen).sum()} of {seen.sum()} compared rows were "
        "equal at step 0, and their likeness at identity is inherited, not learnt",
    ]
    strata = out["fits"]["identity"]["strata"]
    assert sum(of["rows"] for of in strata.values()) == seen.sum()


def test_runs_of_one_tokenizer_stay_as_they_are(others, monkeypatch, capsys):
    monkeypatch.chdir(others)
    for pair in [("run", "copy"), ("run@0", "run")]:
        out = analyze("align", *pair, "--fit", "identity", "--all-rows")
        assert (out["matching"]["by"], out["matching"]["rows"], out["rows"]) == ("same tokenizer", 320, 320)
        assert capsys.readouterr().out.splitlines()[1] == (
            f"{pair[0]} and {pair[1]} started from the same initial array: 320 of 320 compared rows were equal at step "
            "0, and their likeness at identity is inherited, not learnt"
        )


def test_one_known_tokenizer_leaves_rows_as_they_stand_and_says_so(others, monkeypatch, capsys):
    monkeypatch.chdir(others)
    np.save("file.npy", tiedjax.load_run("run").tables().output)
    out = analyze("align", "run", "file.npy", "--fit", "identity")
    assert out["fits"]["identity"]["score"] == pytest.approx(1)
    assert out["matching"]["by"] == "row"
    assert capsys.readouterr().out.splitlines()[1] == (
        "rows are taken as they stand: the tokenizer of file.npy is not known"
    )
    assert refused(capsys, "align", "file.npy", "other") == (
        "file.npy has 320 rows but other has 352; rows must be the same tokens in the same order, or both tokenizers "
        "known: that of file.npy is not"
    )
    out = analyze("align", "file.npy", "other", "--tokens", "run/tokenizer.json", "other/tokenizer.json")
    assert out["matching"]["by"] == "token"


def test_all_matches_what_it_compares_with_another_run(others, monkeypatch, capsys):
    monkeypatch.chdir(others)
    out = analyze("all", "run", "--against", "other")["instruments"]
    shown = capsys.readouterr().out
    alone = analyze("align", "other", "run")
    for name in ("align", "knn"):
        assert out[name][0]["matching"] == alone["matching"]
    assert out["align"][0]["fits"]["identity"]["score"] == pytest.approx(alone["fits"]["identity"]["score"])
    line = capsys.readouterr().out.splitlines()[1]
    assert line.endswith("in run: only their rows are compared")
    assert shown.splitlines().count(line) == 2
