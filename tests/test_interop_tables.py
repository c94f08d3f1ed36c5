"""The tables of other people's models: read from their directories as they lie, and told tied from untied."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from programs import finish, start
from safetensors.numpy import load_file, save_file

from tiedjax import cli
from tiedjax.analysis import instruments
from tiedjax.analysis.basis.tables import read_table
from tiedjax.errors import UserError
from tiedjax.interop import ModelFolder, Rows, read_safetensors
from tiedjax.interop.inspection import inspect

V, D = 50, 8
INPUT, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def table(seed: int, shape: tuple[int, int] = (V, D), dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(dtype)


def write_model(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    about = {"model_type": "llama", "vocab_size": V, "hidden_size": D, "num_hidden_layers": 1, **config}
    (folder / "config.json").write_text(json.dumps(about))
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, folder / "model.safetensors")
    return folder


def write_tokenizer(folder: Path, tokens: int) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({f"t{i}": i for i in range(tokens)}, unk_token="t0")).save(str(folder / "tokenizer.json"))


# ---- Tied or not ----

A, B = table(0), table(1)
CASES: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], bool | None, str]] = {
    "true, no head": ({INPUT: A}, {"tie_word_embeddings": True}, True, "ties them"),
    "true, an equal head": ({INPUT: A, OUTPUT: A}, {"tie_word_embeddings": True}, True, "ties them"),
    "true, another head": (
        {INPUT: A, OUTPUT: B},
        {"tie_word_embeddings": True},
        False,
        "keeps both, warns, and writes tie_word_embeddings: true again",
    ),
    "true, the head alone": ({OUTPUT: A}, {"tie_word_embeddings": True}, True, "ties them"),
    "false, a head": ({INPUT: A, OUTPUT: B}, {"tie_word_embeddings": False}, False, "keeps both"),
    "false, an equal head": (
        {INPUT: A, OUTPUT: A},
        {"tie_word_embeddings": False},
        False,
        "keeps both, equal as they are",
    ),
    "false, no head": (
        {INPUT: A},
        {"tie_word_embeddings": False},
        None,
        "begins the output table at random values",
    ),
    "not said, no head, llama": ({INPUT: A}, {}, None, "begins the output table at random values"),
    "not said, no head, gpt2": ({"transformer.wte.weight": A}, {"model_type": "gpt2"}, True, "ties them"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_is_tied_by_its_tensors_and_its_config(case: str, tmp_path: Path) -> None:
    tensors, config, tied, transformers = CASES[case]
    folder = write_model(tmp_path / "model", tensors, **config)
    found = inspect(folder)
    assert (found.tie.tied, found.transformers) == (tied, transformers)
    by_role = {name: values for name, values in tensors.items() if name != OUTPUT} or tensors
    first = next(iter(by_role.values()))
    if tied:
        for pick in ("", "#input", "#output"):
            read = read_table(f"{folder}{pick}")
            assert read.role == "shared"
            np.testing.assert_array_equal(np.asarray(read.values), first)
        return
    np.testing.assert_array_equal(np.asarray(read_table(f"{folder}#input").values), tensors[INPUT])
    if tied is False:
        np.testing.assert_array_equal(np.asarray(read_table(f"{folder}#output").values), tensors[OUTPUT])
        refusal = f"{folder}: the model has two tables; pick one with {folder}#input or {folder}#output"
        with pytest.raises(UserError) as error:
            read_table(str(folder))
    else:
        says = "tie_word_embeddings: false" if config else "no tie_word_embeddings, which for llama means false"
        refusal = (
            f"{folder}#output: it has no output table, though its config says that it has two ({says}); "
            "only #input can be read"
        )
        with pytest.raises(UserError) as error:
            read_table(f"{folder}#output")
    assert str(error.value) == refusal


@pytest.mark.parametrize("case", [case for case in CASES if "alone" not in case])
def test_transformers_makes_of_it_what_is_said(case: str, tmp_path: Path) -> None:
    import torch
    import transformers

    tensors, config, tied, said = CASES[case]
    if config.get("model_type") == "gpt2":
        made: Any = transformers.GPT2Config(vocab_size=V, n_embd=D, n_layer=1, n_head=2, n_positions=16)
    else:
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": V}
        made = transformers.LlamaConfig(hidden_size=D, **sizes)
    folder = tmp_path / "model"
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    kept = {name: values for name, values in load_file(folder / "model.safetensors").items() if name != OUTPUT}
    save_file({**kept, **tensors}, folder / "model.safetensors", metadata={"format": "pt"})
    about = json.loads((folder / "config.json").read_text())
    about.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(about | config))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    both = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    one, expected = both[0] is both[1], list(tensors.values())
    assert one == said.startswith("ties")
    assert one == (tied is True)
    assert torch.equal(both[0], torch.from_numpy(expected[0]))
    assert torch.equal(both[1], torch.from_numpy(expected[-1])) == (tied is not None)


# ---- Names, files, shards ----

TABLES = {
    "olmo": (INPUT, OUTPUT),
    "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight"),
    "gpt_neo": ("transformer.wte.weight", OUTPUT),
    "gpt2": ("wte.weight", OUTPUT),
    "gemma3": ("model.language_model.embed_tokens.weight", OUTPUT),
}


@pytest.mark.parametrize("family", TABLES)
def test_tables_have_the_names_of_their_family(family: str, tmp_path: Path) -> None:
    names = TABLES[family]
    folder = write_model(tmp_path / "m", dict(zip(names, (A, B), strict=True)), model_type=family)
    for role, values in (("input", A), ("output", B)):
        np.testing.assert_array_equal(np.asarray(read_table(f"{folder}#{role}").values), values)


def sharded(folder: Path, **weight_map: str) -> Path:
    write_model(folder, {INPUT: A})
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    save_file({OUTPUT: B}, folder / "two.safetensors")
    names = {INPUT: "one.safetensors", OUTPUT: "two.safetensors", **weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def test_shards_are_one_model(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    np.testing.assert_array_equal(np.asarray(read_table(f"{folder}#output").values), B)


def test_what_cannot_be_read_is_one_line_and_nothing_outside_is_read(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    save_file({OUTPUT: B}, outside)

    def refused(folder: Path, line: str) -> None:
        with pytest.raises(UserError) as error:
            read_table(f"{folder}#output")
        assert str(error.value) == line.replace("DIR", str(folder))

    for name in ("../outside.safetensors", str(outside), ".."):
        refused(sharded(tmp_path / "a", **{OUTPUT: name}), f"DIR: {name!r} is not the name of a file in it")
        shutil.rmtree(tmp_path / "a")
    linked = sharded(tmp_path / "b")
    (linked / "two.safetensors").unlink()
    (linked / "two.safetensors").symlink_to(outside)
    refused(linked, "DIR/two.safetensors: is a link that leads out of DIR; copy the file there")
    (linked / "two.safetensors").unlink()
    refused(
        linked,
        "DIR/model.safetensors.index.json: names two.safetensors, which is not there; fetch the whole model",
    )
    lacking = sharded(tmp_path / "c", **{OUTPUT: "one.safetensors"})
    refused(
        lacking,
        f"DIR/one.safetensors: lacks {OUTPUT!r}, which model.safetensors.index.json says is in it",
    )
    more = sharded(tmp_path / "h")
    save_file({INPUT: A, "more": A}, more / "one.safetensors")
    refused(more, "DIR/one.safetensors: holds 'more', which model.safetensors.index.json does not name")
    (lacking / "model.safetensors.index.json").write_text("{}")
    refused(lacking, "DIR/model.safetensors.index.json: has no 'weight_map' of tensors' names to files")
    cut = write_model(tmp_path / "d", {INPUT: A, OUTPUT: B})
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"/d/model\.safetensors: not a readable .safetensors file: "):
        read_table(f"{cut}#output")
    (cut / "model.safetensors").unlink()
    refused(
        cut,
        "DIR: holds no weights; they are in model.safetensors or model.safetensors.index.json or pytorch_model.bin "
        "or pytorch_model.bin.index.json",
    )
    other = write_model(tmp_path / "e", {INPUT: A}, model_type="mamba")
    refused(
        other,
        "DIR: model_type 'mamba' is not known; it is one of gemma, gemma2, gemma3, gemma3_text, gpt2, gpt_neo, "
        "gpt_neox, llama, olmo, olmo2, olmo3, qwen2, qwen3",
    )
    (other / "config.json").write_text("[]")
    refused(other, "DIR/config.json: has no 'model_type'; it must be the config of a Hugging Face model")
    uneven = write_model(tmp_path / "f", {INPUT: A, OUTPUT: B[:-1]})
    refused(uneven, f"DIR: its tables differ in shape: {INPUT} [50, 8] and {OUTPUT} [49, 8]")
    packed = write_model(tmp_path / "i", {INPUT: A.view(np.uint32), OUTPUT: B})
    refused(
        packed,
        f"DIR: {INPUT!r} is stored as U32: quantised tables are not read; save the model in float32, bfloat16, float16 "
        "or float64",
    )
    none = write_model(tmp_path / "g", {"model.norm.weight": A[0]})
    refused(none, f"DIR: holds no table; a llama model has {INPUT} or {OUTPUT}")


def test_a_snapshot_in_the_cache_is_read_through_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    write_model(blobs, {INPUT: A, OUTPUT: B})
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    np.testing.assert_array_equal(np.asarray(read_table(f"{snapshot}#output").values), B)


def test_weights_of_torch_are_read_with_it_and_refused_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    folder = write_model(tmp_path / "m", {INPUT: A})
    (folder / "model.safetensors").unlink()
    state = {INPUT: torch.from_numpy(A).to(torch.bfloat16), OUTPUT: torch.from_numpy(B)}
    torch.save(state, folder / "pytorch_model.bin")
    rounded = A.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(read_table(f"{folder}#input").values), rounded)
    np.testing.assert_array_equal(np.asarray(read_table(f"{folder}#output").values), B)
    torch.save({INPUT: Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: not weights that can be read safely: "):
        read_table(f"{folder}#input")
    assert not (tmp_path / "evil").exists()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError) as error:
        read_table(f"{folder}#input")
    assert str(error.value) == (
        f"{folder}/pytorch_model.bin: takes torch to read: pip install torch, or save the model again as .safetensors"
    )


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("unpickled",))


# ---- A table that stays in its file ----


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_rows_are_what_the_array_is(dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiedjax.interop.rows._PIECE_BYTES", 7 * 4 * D)  # blocks of seven rows
    values = table(3).astype(dtype)
    save_file({"table": values}, tmp_path / "t.safetensors")
    rows: Any = Rows(read_safetensors(tmp_path / "t.safetensors")["table"])
    whole = values.astype(np.float64 if dtype is np.float64 else np.float32)
    assert (rows.shape, rows.ndim, rows.size, rows.dtype, len(rows)) == ((V, D), 2, V * D, whole.dtype, V)
    mask = np.random.default_rng(4).random(V) < 0.3
    picked = np.random.default_rng(5).integers(-V, V, (3, 11))
    indices: list[Any] = [
        slice(3, 20),
        slice(None),
        slice(-5, None),
        slice(20, 3),
        slice(None, None, 3),
        slice(40, 2, -4),
    ]
    indices += [
        mask,
        np.zeros(V, bool),
        picked,
        [],
        [4, 4, 0],
        7,
        -1,
        np.int64(3),
        (slice(2, 9), 3),
        (mask, slice(1, 4)),
    ]
    indices += [(5, 2), (picked, 0), ..., None, (mask, [0] * int(mask.sum())), (slice(None), [3, 1])]
    for index in indices:
        np.testing.assert_array_equal(rows[index], whole[index], err_msg=str(index))
        assert np.asarray(rows[index]).dtype == whole.dtype
    for index in (V, np.array([V]), np.zeros(3, bool)):
        with pytest.raises(IndexError):
            rows[index]
    np.testing.assert_array_equal(rows - whole.mean(0), whole - whole.mean(0))
    np.testing.assert_array_equal(2 * rows, 2 * whole)
    np.testing.assert_array_equal(rows.T @ rows, whole.T @ whole)
    np.testing.assert_array_equal(np.linalg.norm(rows, axis=1), np.linalg.norm(whole, axis=1))
    np.testing.assert_array_equal(rows.astype(np.float64), whole.astype(np.float64))
    np.testing.assert_array_equal(np.abs(rows).max(), np.abs(whole).max())
    np.testing.assert_array_equal(np.asarray(rows, np.float64), whole.astype(np.float64))


def test_rows_without_a_token_are_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "m", {INPUT: A, OUTPUT: B})
    write_tokenizer(folder, V - 3)
    seen = read_table(f"{folder}#input").seen
    assert seen is not None
    assert seen.tolist() == [True] * (V - 3) + [False] * 3
    assert cli.main(["analyze", "align", f"{folder}#input", f"{folder}#output", "--fit", "identity"]) == 0
    assert "47 rows (3 padding or never-seen rows left out), width 8" in capfd.readouterr().out


INSTRUMENTS = [["align"], ["knn"], ["spectral"], ["norms"], ["spectrum"]]


@pytest.mark.parametrize("words", INSTRUMENTS, ids=lambda words: words[0])
def test_a_model_measures_as_the_same_tables_do(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    big = [table(seed, (400, 16), ml_dtypes.bfloat16) for seed in (6, 7)]
    folder = write_model(tmp_path / "m", {INPUT: big[0], OUTPUT: big[1]}, vocab_size=400, hidden_size=16)
    found = []
    counts = tmp_path / "counts.npy"
    np.save(counts, np.arange(1, 401))
    for name, values in zip(("a", "b"), big, strict=True):
        np.save(tmp_path / f"{name}.npy", values.astype(np.float32))
    for a, b in ((f"{folder}#input", f"{folder}#output"), (f"{tmp_path}/a.npy", f"{tmp_path}/b.npy")):
        one = words[0] in ("norms", "spectrum")
        file = tmp_path / "found.json"
        argv = ["analyze", *words, *([a] if one else [a, b]), "--counts", str(counts), "--json", str(file)]
        status = cli.main(argv)
        assert status == 0, capfd.readouterr().err
        found.append(json.loads(file.read_text()))
    for each in found:
        for gone in ("inputs", "matching", "seconds", "command", "created"):
            each.pop(gone, None)
    assert found[0] == found[1]


# Not ru_maxrss, which begins at that of the process that started this one.
PEAK = """
import sys
from pathlib import Path
from tiedjax import cli
def peak():
    return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))
"""
BEYOND_IMPORTS = """
import numpy, scipy.linalg, tiedjax.analysis.basis.arguments, safetensors, ml_dtypes
import tiedjax.analysis.instruments.alignment.command, tiedjax.analysis.instruments.alignment.align
before = peak()
assert cli.main(sys.argv[1:]) == 0
print(peak() - before)
"""


@pytest.mark.slow  # 0.8 GB of tables
def test_identity_takes_no_memory_for_tables_that_stay_in_their_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shape = (50_304, 2_048)
    tensors = {name: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16) for name in (INPUT, OUTPUT)}
    folder = write_model(tmp_path / "m", tensors, vocab_size=shape[0], hidden_size=shape[1])
    argv = ["analyze", "align", f"{folder}#input", f"{folder}#output", "--fit", "identity"]
    out, _ = finish(start(["-c", PEAK + BEYOND_IMPORTS, *argv]), seconds=280)
    assert float(out.splitlines()[-1]) < 150


OF_TABLES: dict[str, list[list[str]]] = {  # by instrument: tables by their roles, and options
    "align": [["input", "output", "--draws", "1", "--fit", "identity", "--fit", "orthogonal"]],
    "knn": [["input", "output", "--draws", "1"]],
    "spectral": [["input", "output", "--eigenpairs", "4"]],
    "norms": [["input", "--draws", "1", "--counts", "COUNTS"], ["input", "--all-rows", "--counts", "COUNTS"]],
    "spectrum": [["input", "output", "--draws", "1"]],
    "map": [["input", "output"]],
}
IN_ALL = """
assert cli.main(sys.argv[1:]) == 0
print(peak())
"""


def test_the_memory_of_every_instrument_of_tables_is_measured() -> None:
    assert OF_TABLES.keys() == {
        name for name, module in instruments.INSTRUMENTS.items() if module.SUBJECT in ("table", "tables", "pair")
    }


@pytest.mark.parametrize("name", OF_TABLES)
def test_no_instrument_of_tables_reads_one_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: table(seed, (400, 16), ml_dtypes.bfloat16) for seed, name in enumerate((INPUT, OUTPUT))}
    folder = write_model(tmp_path / "m", tensors, vocab_size=400, hidden_size=16)
    np.save(tmp_path / "counts.npy", np.arange(1, 401))
    slices, places = Rows.__getitem__, {role: f"{folder}#{role}" for role in ("input", "output")}

    def by_rows(rows: Rows, index: Any) -> Any:
        assert not (isinstance(index, slice) and index == slice(None) and name != "align"), "all rows"
        return slices(rows, index)

    def whole(rows: Rows, dtype: Any = None, copy: bool | None = None) -> Any:
        raise AssertionError("the whole table")

    monkeypatch.setattr(Rows, "__getitem__", by_rows)
    monkeypatch.setattr(Rows, "__array__", whole)
    for words in OF_TABLES[name]:
        of = places | {"COUNTS": str(tmp_path / "counts.npy")}
        assert cli.main(["analyze", name, *(of.get(word, word) for word in words)]) == 0


@pytest.mark.slow  # two processes for each, over 15 million numbers
@pytest.mark.parametrize("name", OF_TABLES)
def test_a_model_takes_no_more_memory_than_its_tables_do_as_arrays(name: str, tmp_path: Path) -> None:
    """Of bfloat16 and float32; 61 MB each as the latter, and peaks of one program differ by a few from run to run."""
    shape, places = (20_000, 768), {}
    tensors = {name: table(seed, shape, ml_dtypes.bfloat16) for seed, name in enumerate((INPUT, OUTPUT))}
    folder = write_model(tmp_path / "m", tensors, vocab_size=shape[0], hidden_size=shape[1])
    places["model"] = {role: f"{folder}#{role}" for role in ("input", "output")}
    places["arrays"] = {role: f"{tmp_path}/{role}.npy" for role in ("input", "output")}
    for role, values in zip(("input", "output"), tensors.values(), strict=True):
        np.save(tmp_path / f"{role}.npy", values.astype(np.float32))
    np.save(tmp_path / "counts.npy", np.arange(1, shape[0] + 1))
    for words in OF_TABLES[name]:
        peaks = {}
        for kind, names in places.items():
            of = names | {"COUNTS": str(tmp_path / "counts.npy")}
            out, _ = finish(
                start(["-c", PEAK + IN_ALL, "analyze", name, *(of.get(word, word) for word in words)]), seconds=900
            )
            peaks[kind] = float(out.splitlines()[-1])
        print(name, words, peaks)
        assert peaks["model"] < peaks["arrays"] + 8, words


# ---- tiedjax inspect ----


def test_inspect_says_what_a_model_holds(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = {"model.norm.weight": table(8, (1, D))[0], "model.layers.0.self_attn.rotary_emb.inv_freq": A[0]}
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16, "tie_word_embeddings": False}
    folder = write_model(
        tmp_path / "m", {INPUT: A.astype(ml_dtypes.bfloat16), OUTPUT: B.astype(ml_dtypes.bfloat16), **body}, **sizes
    )
    write_tokenizer(folder, V - 3)
    assert cli.main(["inspect", str(folder), "--json", str(tmp_path / "found.json")]) == 0
    assert (
        capfd.readouterr().out.replace(str(folder), "DIR")
        == """\
DIR: llama, 808 parameters in bfloat16 and float32
layers 1, width 8, heads 2, kv heads 1, mlp width 16
untied: two tables [50, 8], model.embed_tokens.weight and lm_head.weight
config.json: tie_word_embeddings: false; on disk: both, different; transformers keeps both
tables: 800 of the parameters, 99.0%
vocabulary: 50 rows for 47 tokens, 3 of them padding
"""
    )
    tree = json.loads((tmp_path / "found.json").read_text())
    assert tree == inspect(folder).tree()
    assert (tree["tied"], tree["parameters"], tree["tokens"]) == (False, 808, 47)


VERDICTS = {
    "true, no head": f"tied: one table [50, 8], {INPUT}",
    "true, an equal head": f"tied: one table [50, 8], {INPUT} and {OUTPUT}",
    "true, the head alone": f"tied: one table [50, 8], {OUTPUT}",
    "false, an equal head": f"untied: two tables [50, 8], {INPUT} and {OUTPUT}, which are equal now",
    "false, no head": (
        "not whole: it has no output table, though its config says that it has two (tie_word_embeddings: false); only "
        "#input can be read"
    ),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_the_verdict_names_the_tables(case: str, tmp_path: Path) -> None:
    tensors, config, _, _ = CASES[case]
    found = inspect(write_model(tmp_path / "m", tensors, **config))
    assert found.verdict == VERDICTS[case]
    assert found.parameters == (2 if case == "false, an equal head" else 1) * V * D
    assert found.lines()[-1] == "vocabulary: 50 rows; there is no tokenizer.json to say which are tokens"


def test_biases_are_parameters_and_old_buffers_are_not(tmp_path: Path) -> None:
    biases = {"h.0.attn.c_attn.bias": A[0], "h.0.attn.c_proj.bias": A[0]}
    buffers = {"h.0.attn.bias": A, "h.0.attn.masked_bias": A}
    tensors = {"wte.weight": A, **biases, **buffers}
    assert inspect(write_model(tmp_path / "m", tensors, model_type="gpt2")).parameters == V * D + 2 * D


def test_inspect_refuses_what_is_no_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tmp_path)]) == 2
    line = f"tiedjax: {tmp_path}: is no Hugging Face model: it holds no config.json\n"
    assert capfd.readouterr().err == line
    assert ModelFolder(tmp_path).tokenizer_path is None
