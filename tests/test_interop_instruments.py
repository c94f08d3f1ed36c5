"""Instruments on a model directory: what they say of the run whose export it is, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import slow_but
from runs import arguments
from test_analysis_command import analyze
from test_interop_bodies import FAMILIES, LLAMA, write
from tokenizers.processors import TemplateProcessing

import tiedjax
from tiedjax import cli
from tiedjax.analysis import FrozenModel, ModelOnText, blocks, calibration, diversity
from tiedjax.data.tokenizer import train_bpe
from tiedjax.errors import UserError
from tiedjax.interop import ModelFolder
from tiedjax.interop.export import export

CHANGES = {
    "data.holdout": 0.02,  # as a model's text is divided
    "data.batch_size": 16,
    "train.eval_batches": "null",
    "train.steps": 120,  # the whole of the text, and a little of it again
    "model.layers": 2,
    "optimizer.learning_rate": 0.02,
}
WORDS: dict[str, list[str]] = {
    "lens": ["--held-out-tokens", "400", "--training-tokens", "1024"],
    "blocks": ["--held-out-tokens", "400"],
    "calibration": ["--held-out-tokens", "400", "--draws", "3"],
    "cooccurrence": ["--least-count", "2", "--sample", "50", "--draws", "3"],
    "diversity": ["--texts", "9", "--tokens", "5"],
    "hurdles": [],
    "rounding": ["--held-out-tokens", "400", "--draws", "2"],
    "regret": ["--fitting-tokens", "1024", "--held-out-tokens", "400", "--iterations", "3"],
    "norms": ["--draws", "3"],
    "knn": ["--draws", "2"],
    "spectrum": [],
}


@pytest.fixture(scope="module", params=slow_but(["tied", "untied"], "tied"))
def pair(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """A run, the directory that it was exported to, and what follows `#` in a name of a table."""
    folder = tmp_path_factory.mktemp(request.param)
    run, exported = folder / "run", folder / "model"
    assert cli.main(arguments(run, text, {**CHANGES, "tying.scheme": request.param})) == 0
    export(str(run), exported)
    return str(run), str(exported), "" if request.param == "tied" else "#output"


@pytest.mark.parametrize("instrument", WORDS)
def test_a_model_directory_measures_as_the_run_that_it_was(
    instrument: str, pair: tuple[str, str, str], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for place in pair[:2]:
        of_tables = instrument in ("norms", "knn", "spectrum")
        names = [f"{place}{pair[2]}"] * (2 if instrument == "knn" else 1) if of_tables else [place]
        source = [] if place == pair[0] else ["--data", f"text:{text}"]
        if instrument in ("knn", "spectrum"):  # which read no text
            source = [] if place == pair[0] else ["--counts", f"{pair[0]}/token_counts.npy"]
        analyze(instrument, *names, *WORDS[instrument], *source, "--json", tmp_path / "o.json")
        found.append(json.loads((tmp_path / "o.json").read_text()))
    of_run, of_model = found
    if instrument not in ("knn", "spectrum"):
        measured_on = of_model.pop("measured_on")
        assert (measured_on["source"], measured_on["seq_len"]) == (f"text:{text}", 16)
        tokens = f"{measured_on['training_tokens']:,} training and {measured_on['held_out_tokens']:,} held-out tokens"
        shown = capsys.readouterr().out
        assert f"text:{text} ({tokens}, windows of 16)" in shown
        if instrument == "hurdles":
            assert shown.count("windows of the run's own evaluation") == 1
            assert " windows that are held out\n" in shown
    for result in found:
        result.pop("matching", None)  # which says what runs were at step 0
        for of_input in result["inputs"]:
            del of_input["name"]
    if "step" in of_run:
        assert (of_run.pop("step"), of_model.pop("step")) == (120, None)
    assert_alike(of_run, of_model, instrument)


def assert_alike(a: Any, b: Any, where: str) -> None:
    """Equal, numbers to 1e-5 of themselves."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_alike(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_alike(one, other, f"{where}[{i}]")
    elif isinstance(a, float):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-7), where
    else:
        assert a == b, where


def test_every_instrument_that_applies_to_a_model(
    pair: tuple[str, str, str], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    analyze("all", pair[1], "--data", f"text:{text}", "--seq-len", "8", "--json", tmp_path / "o.json")
    found = json.loads((tmp_path / "o.json").read_text())["instruments"]
    refused = {name for name, results in found.items() for result in results if "not_measured" in result}
    assert refused == {"gradients", "account", "evolution"}
    for name in ("lens", "blocks", "calibration", "diversity", "hurdles", "rounding", "cooccurrence", "norms"):
        assert {result["measured_on"]["seq_len"] for result in found[name]} == {8}, name
    assert "account: not measured: " in capsys.readouterr().out


# ---- The token before a text ----

TEMPLATES = {"none": None, "before": "<bos> $A", "behind": "$A <eos>", "both": "<bos> $A <eos>"}
SETTINGS: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "added": {"add_bos_token": True},
    "not added": {"add_bos_token": False},
    "an end added": {"add_eos_token": True},
}


def with_tokenizer(folder: Path, template: str, said: dict[str, Any]) -> None:
    tokenizer = train_bpe(["some text to be cut, some text"], 320)
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<bos>", "<eos>")]
    if single := TEMPLATES[template]:
        tokenizer.post_processor = TemplateProcessing(single, pair=None, special_tokens=ids)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", **said}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


@pytest.mark.parametrize("said", SETTINGS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_token_before_a_text_is_that_of_transformers(template: str, said: str, tmp_path: Path) -> None:
    write("llama", {**LLAMA, "vocab_size": 400}, tmp_path)
    with_tokenizer(tmp_path, template, SETTINGS[said])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    first = theirs("some text")["input_ids"][0]
    begin = ModelFolder(tmp_path).begin_id
    assert begin == (first if first == theirs.bos_token_id else None)
    assert (begin is not None) == (template in ("before", "both"))


def test_windows_begin_with_the_token_before_a_text(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses are those that transformers gives of the same tokens after it; what is predicted stays the same."""
    theirs = write("llama", {**LLAMA, "vocab_size": 400}, tmp_path / "model")
    with_tokenizer(tmp_path / "model", "before", {})
    begin = transformers.AutoTokenizer.from_pretrained(tmp_path / "model").bos_token_id
    subject = ModelOnText(tmp_path / "model", f"text:{text}", 20)
    begun = subject.prepared.windows("eval", 20).read([0, 1, 2])
    plain = dataclasses.replace(subject.prepared, begin_id=None).windows("eval", 20).read([0, 1, 2])
    assert (begun[:, 0] == begin).all()
    np.testing.assert_array_equal(begun[:, 1:], plain[:, 1:])
    assert subject.token_counts[:, begin].tolist() == [0, 0]
    with torch.no_grad():
        logits = theirs(torch.from_numpy(begun[:, :-1].astype(np.int64))).logits
    nats = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), torch.from_numpy(plain[:, 1:].astype(np.int64)), reduction="none"
    )
    np.testing.assert_allclose(FrozenModel(subject).bits(begun), nats.numpy() / np.log(2), rtol=1e-4, atol=1e-4)
    analyze("hurdles", str(tmp_path / "model"), "--data", f"text:{text}", "--seq-len", "20", "--json", tmp_path / "o")
    assert json.loads((tmp_path / "o").read_text())["measured_on"]["begin_id"] == begin
    assert f" held-out tokens, windows of 20, each begun with token {begin})" in capsys.readouterr().out
    analyze("diversity", str(tmp_path / "model"), "--data", f"text:{text}", "--texts", "3", "--tokens", "5")


def test_a_token_before_a_text_that_has_no_row_is_refused(tmp_path: Path, text: Path) -> None:
    write("llama", {**LLAMA, "vocab_size": 259}, tmp_path / "model")
    with_tokenizer(tmp_path / "model", "before", {})
    begin = ModelFolder(tmp_path / "model").begin_id
    with pytest.raises(UserError) as error:
        _ = ModelOnText(tmp_path / "model", f"text:{text}", 20).prepared
    line = f"its tokenizer begins texts with token {begin}, and it has 259 rows"
    assert str(error.value) == f"{tmp_path / 'model'}: {line}"


# ---- What is refused ----


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write(*FAMILIES["llama, tied"], tmp_path / "model")
    return tmp_path / "model"


NEEDS = {
    "gradients": "the role gradients of every step",
    "account": "what each update wrote into the table",
    "evolution": "tables saved over training",
}


@pytest.mark.parametrize("instrument", NEEDS)
def test_what_only_training_leaves_is_not_asked_of_a_model(instrument: str, model: Path) -> None:
    with pytest.raises(UserError) as error:
        analyze(instrument, str(model))
    assert str(error.value) == (
        f"{model}: {instrument} reads {NEEDS[instrument]}, which a run keeps and a model directory does not; to train "
        f"on from it: tiedjax inspect {model} --config FILE"
    )


def test_text_needs_a_tokenizer_and_ready_tokens_none(
    model: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as error:
        analyze("lens", str(model), "--data", f"text:{text}")
    assert str(error.value) == (
        f"{model}: holds no tokenizer.json to read text with; save its tokenizer there, or give token ids: "
        "--data tokens:GLOB"
    )
    ids = np.random.default_rng(0).integers(0, LLAMA["vocab_size"], 4000).astype(np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    words = ["--data", f"tokens:{tmp_path / 'ids.npy'}", "--seq-len", "32", "--json", tmp_path / "o.json"]
    analyze("calibration", str(model), "--held-out-tokens", "64", "--draws", "2", *words)
    found = json.loads((tmp_path / "o.json").read_text())
    assert (found["measured_on"]["seq_len"], found["positions"], found["rows"]) == (32, 64, 61)
    assert f"\n{model} on tokens:{tmp_path / 'ids.npy'} (" in capsys.readouterr().out


LINES: dict[str, tuple[list[str], str]] = {
    "too long": (["blocks", "MODEL", "--seq-len", "65"], "--seq-len: must be 1 to 64, the positions of MODEL, got 65"),
    "none": (["blocks", "MODEL", "--seq-len", "0"], "--seq-len: must be 1 to 64, the positions of MODEL, got 0"),
    "of a run": (
        ["blocks", "A_RUN", "--seq-len", "8"],
        "--seq-len: a run is read in windows of its model.seq_len; leave it out",
    ),
    "counts of a run": (
        ["norms", "A_RUN", "--data", "embedded"],
        "--data: A_RUN has counts of its own, or takes --counts FILE.npy; leave it out",
    ),
    "no model, no run": (
        ["lens", "NOTHING"],
        "NOTHING: no such file or directory; tables are named by a run directory, RUN@STEP, a Hugging Face directory, "
        "or a .npy, .npz or .safetensors file",
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_options_that_do_not_fit_are_refused(case: str, model: Path, finished: Path, tmp_path: Path) -> None:
    words, line = LINES[case]
    np.save(tmp_path / "ids.npy", np.zeros(4000, np.uint16))
    places = {"MODEL": str(model), "A_RUN": str(finished), "NOTHING": str(tmp_path / "nothing")}
    if words[1] == "MODEL":
        words = [*words, "--data", f"tokens:{tmp_path / 'ids.npy'}"]
    with pytest.raises(UserError) as error:
        analyze(*(places.get(word, word) for word in words))
    for name, place in places.items():
        line = line.replace(name, place)
    assert str(error.value) == line


def test_instruments_of_tables_read_no_body(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor refuse a form of one that ours does not have."""
    folder = tmp_path / "llama"
    write("llama", LLAMA, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 61, 9000).astype(np.uint16))
    words = ["--data", f"tokens:{tmp_path / 'ids.npy'}"]
    analyze("cooccurrence", str(folder), "--draws", "2", *words)
    analyze("norms", f"{folder}#input", "--draws", "2", *words)
    assert "61 rows, width 32" in capsys.readouterr().out
    with pytest.raises(UserError, match="hidden_act: must be silu, got 'relu'"):
        analyze("lens", str(folder), *words)


@pytest.mark.parametrize("name", slow_but(FAMILIES, "llama, tied", "gemma2", "gpt2", "pythia"))
def test_every_family_predicts_through_instruments_what_it_predicts(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write(*FAMILIES[name], folder)
    np.save(tmp_path / "ids.npy", np.random.default_rng(3).integers(0, 61, 3000).astype(np.uint16))
    subject = ModelOnText(folder, f"tokens:{tmp_path / 'ids.npy'}", 20)
    model = FrozenModel(subject)
    prepared = subject.prepared
    assert calibration(model, subject, prepared, held_out_tokens=40, draws=1).step is None
    assert len(blocks(model, subject, prepared, held_out_tokens=40).blocks) == 4
    assert diversity(model, subject, prepared, texts=2, tokens=5).tokens == 5
    windows_WS = prepared.windows("eval", 20).read([0, 1])
    logits = np.asarray(tiedjax.load_model(folder).logits(windows_WS[:, :-1]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    bits = -np.take_along_axis(log_p, windows_WS[:, 1:, None], axis=-1) / np.log(2)
    np.testing.assert_allclose(model.bits(windows_WS), bits[..., 0], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="a model has no steps; leave out 7"):
        FrozenModel(subject, 7)
