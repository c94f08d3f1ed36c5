"""Runs and models as Hugging Face directories: transformers reads them, and nothing is lost on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from conftest import slow_but
from programs import start
from runs import arguments
from safetensors.numpy import load_file, save_file
from test_interop_bodies import FAMILIES, assert_close, prompts, reference, write

import tiedjax
from tiedjax import cli
from tiedjax.errors import TrainingError, UserError
from tiedjax.interop import export as exporting
from tiedjax.interop import tensors
from tiedjax.interop.export import export
from tiedjax.interop.folder import written_whole

# ---- A model in and out ----

KEPT = ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_comes_out_as_it_went_in(name: str, tmp_path: Path) -> None:
    kind, config = FAMILIES[name]
    theirs = write(kind, config, tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    halved = {tensor: values.astype(ml_dtypes.bfloat16) for tensor, values in load_file(path).items()}
    for tensor, values in halved.items():
        if "norm" in tensor:
            values[0] = 1e-6  # 1 added and taken off again would leave another number
    save_file(halved, path, metadata={"format": "pt"})
    exported = export(str(tmp_path / "in"), tmp_path / "out")
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == KEPT
    was, now = load_file(path), load_file(tmp_path / "out" / "model.safetensors")
    assert was.keys() == now.keys()
    for tensor, values in was.items():
        assert now[tensor].dtype == values.dtype, tensor
        assert now[tensor].tobytes() == values.tobytes(), tensor
        assert now[tensor].shape == values.shape, tensor
    assert exported.difference == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert_close(tiedjax.load_model(tmp_path / "in").logits(prompts()), reference(theirs, prompts())[0])


def test_a_tied_model_untied_has_two_equal_tables(tmp_path: Path) -> None:
    kind, config = FAMILIES["llama, tied"]
    write(kind, config, tmp_path / "in")
    exported = export(str(tmp_path / "in"), tmp_path / "out", untie=True)
    assert (exported.tied, exported.difference) == (False, 0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tables = theirs.get_input_embeddings().weight, theirs.get_output_embeddings().weight
    assert tables[0] is not tables[1]
    assert torch.equal(*tables)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_second_table_is_stored_as_the_first_and_files_of_the_tokenizer_go_along(tmp_path: Path) -> None:
    kind, config = FAMILIES["llama, tied"]
    write(kind, config, tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: x if "embed" in name else x.astype(np.float16) for name, x in tensors.items()}, path)
    (tmp_path / "in" / "chat_template.jinja").write_text("{{ messages }}")
    export(str(tmp_path / "in"), tmp_path / "out", untie=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["lm_head.weight"].dtype == np.float32
    np.testing.assert_array_equal(written["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "in" / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError) as error:
        export(str(tmp_path / "in"), tmp_path / "other")
    there = tmp_path / "in"
    assert str(error.value) == f"{there}/merges.txt: is a link that leads out of {there}; copy the file there"
    assert not (tmp_path / "other").exists()


# ---- A run out ----

RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "tied": ({}, "olmo"),
    "untied": ({"tying.scheme": "untied"}, "olmo"),
    "scanned, padded": ({"model.scan_layers": True, "model.layers": 2, "model.vocab_multiple": 64}, "olmo"),
    "grouped": ({"model.norm": "rmsnorm", "model.heads": 4, "model.kv_heads": 2}, "llama"),
    "query norms": ({"model.norm": "rmsnorm", "model.qk_norm": "head"}, "qwen3"),
    "biases of queries": ({"model.norm": "rmsnorm", "model.biases": "qkv"}, "qwen2"),
    "whole query norms": (
        {"model.norm": "rmsnorm", "model.qk_norm": "whole", "model.norm_place": "post"},
        "olmo2",
    ),
    "linear rope": ({"model.norm": "rmsnorm", "model.rope_scaling": "linear", "model.rope_factor": 4.0}, "llama"),
    "llama3 rope": (
        {
            "model.norm": "rmsnorm",
            "model.rope_scaling": "llama3",
            "model.rope_factor": 4.0,
            "model.rope_positions": 16,
            "model.rope_turns": "[0.5, 2.0]",
        },
        "llama",
    ),
    "yarn": (
        {
            "model.norm": "rmsnorm",
            "model.rope_scaling": "yarn",
            "model.rope_factor": 4.0,
            "model.rope_positions": 300,
        },
        "llama",
    ),
    "windows": (
        {
            "model.norm": "rmsnorm",
            "model.qk_norm": "whole",
            "model.norm_place": "post",
            "model.layers": 2,
            "model.window": 4,
            "model.window_layers": "window,full",
            "model.window_theta": 50.0,
            "model.rope_scaling": "linear",
            "model.rope_factor": 3.0,
        },
        "olmo3",
    ),
    "late windows": (
        {
            "model.norm": "rmsnorm",
            "model.biases": "qkv",
            "model.layers": 2,
            "model.window": 4,
            "model.window_layers": "full,window",
        },
        "qwen2",
    ),
    "gates in gelu": ({"model.norm": "rmsnorm", "model.mlp": "geglu", "model.input_multiplier": "sqrt_d"}, "gemma"),
    "caps": (
        {
            "model.norm": "rmsnorm",
            "model.mlp": "geglu_exact",
            "model.input_multiplier": "sqrt_d",
            "model.norm_place": "both",
            "model.attention_scale": 0.25,
            "model.attention_cap": 0.5,
            "model.logit_cap": 0.3,
            "model.layers": 2,
            "model.window": 4,
            "model.window_layers": "full,window",
        },
        "gemma2",
    ),
    "window theta": (
        {
            "model.norm": "rmsnorm",
            "model.mlp": "geglu",
            "model.input_multiplier": "sqrt_d",
            "model.norm_place": "both",
            "model.qk_norm": "head",
            "model.layers": 2,
            "model.window": 4,
            "model.window_layers": "full,window",
            "model.window_theta": 50.0,
        },
        "gemma3_text",
    ),
    "no scale of attention": (
        {
            "model.norm": "layernorm",
            "model.mlp": "gelu",
            "model.position": "learned",
            "model.attention_scale": 1.0,
            "model.layers": 2,
            "model.window": 4,
            "model.window_layers": "full,window",
        },
        "gpt_neo",
    ),
    "no bias, gelu": ({"model.norm": "layernorm", "model.mlp": "gelu"}, "gpt_neox"),
    "learned positions": (
        {"model.norm": "layernorm", "model.mlp": "gelu", "model.position": "learned"},
        "gpt2",
    ),
}


@pytest.mark.parametrize("case", slow_but(RUNS, "untied", "scanned, padded", "grouped", "learned positions"))
def test_a_run_gives_transformers_its_logits(
    case: str, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes, family = RUNS[case]
    run = tmp_path / "run"
    assert cli.main(arguments(run, text, {"train.steps": 2, "optimizer.learning_rate": 0.05, **changes})) == 0
    capfd.readouterr()
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    said = capfd.readouterr().out
    tied = "untied" if case == "untied" else "tied"
    assert said.startswith(f"{tmp_path / 'out'}: {tied} {family}, ")
    opened = tiedjax.load_run(run)
    cfg = opened.config.model
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, cfg.seq_len))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tables, body = opened.tables(), opened.params()["body"]
    h_BTD = opened.model().apply(body, tables.input[tokens])
    ours = np.asarray(h_BTD) @ tables.output[: cfg.vocab_size].T
    if cfg.logit_cap is not None:
        ours = cfg.logit_cap * np.tanh(ours / cfg.logit_cap)
    assert np.abs(ours).max() > 0.1
    assert_close(reference(theirs, tokens)[0], ours)
    one = theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight
    assert one == tables.tied
    assert theirs.get_input_embeddings().weight.shape == (cfg.vocab_size, cfg.d_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) <= cfg.vocab_size
    assert tokenizer.eos_token_id is not None
    again = tiedjax.load_model(tmp_path / "out")
    assert_close(again.logits(tokens), ours)


REFUSED = {
    "eps": (
        {"model.norm_eps": 1e-6},
        "model.norm_eps: olmo models must have 1e-05, got 1e-06; no other family is nearer",
    ),
    "no positions": (
        {"model.position": "none"},
        "model.position: olmo models must have 'rope', got 'none'; no other family is nearer",
    ),
    "multiplied": (
        {"model.input_multiplier": "sqrt_d"},
        "model.input_multiplier: olmo models must have 'one', got 'sqrt_d'; no other family is nearer",
    ),
    "attention scale": (
        {
            "model.norm": "rmsnorm",
            "model.mlp": "geglu",
            "model.input_multiplier": "sqrt_d",
            "model.norm_place": "both",
            "model.attention_scale": 0.3,
        },
        "model.attention_scale: Gemma has 1 / sqrt of a whole number, got 0.3",
    ),
    "windows that are not scaled": (
        {
            "model.norm": "rmsnorm",
            "model.qk_norm": "head",
            "model.layers": 2,
            "model.window": 4,
            "model.window_layers": "full,window",
            "model.rope_scaling": "linear",
            "model.rope_factor": 3.0,
        },
        "model.rope_scaling: Qwen scales layers with a window too; it must be none beside model.window, got 'linear'",
    ),
    "output bias": (
        {"model.output_bias": "unigram"},
        "model.output_bias: no family adds one to its logits; it must be none",
    ),
}


@pytest.mark.parametrize("case", slow_but(REFUSED, "eps", "output bias"))
def test_what_no_family_has_is_refused_by_its_key(case: str, text: Path, tmp_path: Path) -> None:
    changes, line = REFUSED[case]
    run = tmp_path / "run"
    assert cli.main(arguments(run, text, {"train.steps": 1, **changes})) == 0
    with pytest.raises(UserError) as error:
        export(str(run), tmp_path / "out")
    assert str(error.value) == f"{run}: {line}"
    assert [each.name for each in tmp_path.iterdir()] == ["run"]


def test_nothing_is_left_of_an_export_that_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, config = FAMILIES["qwen3"]
    write(kind, config, tmp_path / "in")

    def wrong(folder: Path) -> Any:
        path = Path(folder) / "model.safetensors"
        tensors = load_file(path)
        save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"][::-1].copy()}, path)
        return tiedjax.load_model(folder)

    monkeypatch.setattr(
        exporting, "load_model", lambda path: wrong(path) if "tmp" in Path(path).suffix else tiedjax.load_model(path)
    )
    with pytest.raises(TrainingError, match="what was written is another model: its logits differ by "):
        export(str(tmp_path / "in"), tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["in"]


def test_an_export_replaces_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kind, config = FAMILIES["gpt2"]
    write(kind, config, tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    capfd.readouterr()
    assert cli.main(["export", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    assert capfd.readouterr().err == f"tiedjax: {tmp_path / 'out'}: is there already; choose another --out\n"
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(UserError) as error:
        export(f"{tmp_path / 'in'}@7", tmp_path / "new")
    assert str(error.value) == f"{tmp_path / 'in'}@7: a model has no steps; name {tmp_path / 'in'}"


UNFINISHED = """
import sys, time
from pathlib import Path
from tiedjax.interop.folder import written_whole
with written_whole(Path(sys.argv[1])) as temporary:
    (temporary / "model.safetensors").write_bytes(b"half")
    print(temporary, flush=True)
    time.sleep(300)
"""


def test_what_a_killed_export_left_is_removed_by_the_next_and_a_live_one_s_is_not(tmp_path: Path) -> None:
    target = tmp_path / "model"
    killed, live = (start(["-c", UNFINISHED, target]) for _ in range(2))
    try:
        assert killed.stdout is not None
        assert live.stdout is not None
        left, held = (Path(process.stdout.readline().strip()) for process in (killed, live))
        killed.kill()
        killed.wait()
        (tmp_path / ".model.beside.tmp").mkdir()
        (tmp_path / ".another.12.tmp").mkdir()
        (tmp_path / ".model.12.tmp").mkdir()  # by a process id, as it was called before
        with written_whole(target) as temporary:
            assert not left.exists()
            assert (held / "model.safetensors").exists()
            (temporary / "config.json").write_text("{}")
        names = {".model.beside.tmp", ".another.12.tmp", held.name, "model"}
        assert {entry.name for entry in tmp_path.iterdir()} == names
        assert [entry.name for entry in target.iterdir()] == ["config.json"]
    finally:
        for process in (killed, live):
            process.kill()
            process.communicate()


def test_weights_may_be_read_by_whoever_may_read_the_other_files(tmp_path: Path) -> None:
    (tmp_path / "beside").touch()
    tensors.write_safetensors(tmp_path / "model.safetensors", {"E": (np.ones((2, 2), np.float32), "float32")})
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "beside").stat().st_mode
