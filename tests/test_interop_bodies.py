"""Bodies of other people's models: the logits and hidden states that transformers gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import tiedjax
from tiedjax.errors import UserError

V, T = 61, 40
LLAMA = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
NEOX = {**LLAMA, "rotary_pct": 0.25, "hidden_act": "gelu"}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {**LLAMA, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama, grouped": ("llama", {**LLAMA, "num_key_value_heads": 2, "rope_parameters": {"rope_theta": 500.0}}),
    "llama, biased, wide heads": (
        "llama",
        {**LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 16, "num_key_value_heads": 1},
    ),
    "olmo": ("olmo", LLAMA),
    "olmo, clipped": ("olmo", {**LLAMA, "clip_qkv": 0.02, "num_key_value_heads": 2, "attention_bias": True}),
    "olmo2": ("olmo2", {**LLAMA, "num_key_value_heads": 2}),
    "qwen2": ("qwen2", {**LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**LLAMA, "num_key_value_heads": 2, "head_dim": 16}),
    "qwen3, biased": ("qwen3", {**LLAMA, "head_dim": 8, "num_key_value_heads": 4, "attention_bias": True}),
    "pythia": ("gpt_neox", NEOX),
    "gpt_neox, in turn, tanh": (
        "gpt_neox",
        {**NEOX, "use_parallel_residual": False, "hidden_act": "gelu_new", "rotary_pct": 1.0, "attention_bias": False},
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2, exact, wide": ("gpt2", {**GPT2, "activation_function": "gelu", "n_inner": 40}),
}


def write(kind: str, config: dict[str, Any], folder: Path, scale: float = 3.0) -> Any:
    """A directory that transformers wrote of a model with random parameters, none of them 0 or 1, and the model."""
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(kind, **config)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or "ln_" in name:
                parameter.copy_(
                    torch.rand(parameter.shape, generator=generator) + 0.5 if "weight" in name else 0.3 * noise
                )
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * scale * (parameter.shape[-1] ** -0.5) / 3)
    model.save_pretrained(folder)
    return model


def prompts(rows: int = 2) -> np.ndarray:
    return np.random.default_rng(2).integers(0, V, (rows, T))


def reference(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and the states of the residual stream but for the last one, which transformers norms."""
    with torch.no_grad():
        out = model(torch.from_numpy(tokens), output_hidden_states=True)
    return out.logits.numpy(), np.stack([state.numpy() for state in out.hidden_states[:-1]])


def assert_close(got: Any, expected: np.ndarray) -> None:
    assert np.abs(np.asarray(got) - expected).max() <= 1e-5 * np.abs(expected).max() + 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_hidden_states_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    kind, config = FAMILIES[name]
    theirs = write(kind, config, tmp_path / "model")
    model = tiedjax.load_model(tmp_path / "model")
    logits, states = reference(theirs, prompts())
    assert np.abs(logits).max() > 1
    assert_close(model.logits(prompts()), logits)
    assert_close(model.hidden_states(prompts())[:-1], states)
    assert model.family == kind
    assert model.tables.tied == (theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight)


# ---- What is refused ----


def test_a_tensor_that_is_missing_or_left_over_is_named(tmp_path: Path) -> None:
    write("llama", LLAMA, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)

    def refused(tensors: dict[str, np.ndarray], line: str) -> None:
        save_file(tensors, path)
        with pytest.raises(UserError) as error:
            tiedjax.load_model(tmp_path)
        assert str(error.value) == line.replace("DIR", str(tmp_path))

    query = "model.layers.1.self_attn.q_proj.weight"
    less = {name: values for name, values in tensors.items() if name != query}
    refused(less, f"DIR: lacks '{query}', which a llama model has")
    more = {**tensors, "model.layers.1.self_attn.q_proj.bias": tensors["model.norm.weight"]}
    refused(
        more,
        "DIR: holds 'model.layers.1.self_attn.q_proj.bias', which a llama model of its config does not have",
    )
    narrow = {**tensors, query: np.ascontiguousarray(tensors[query][:16])}
    refused(narrow, f"DIR: '{query}' has the shape [16, 32], which does not fit its config")
    buffers = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": tensors["model.norm.weight"]}
    save_file(buffers, path)
    assert tiedjax.load_model(tmp_path).config.layers == 4


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "scaled rope": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
        "rope of type 'linear' is not known; only default is",
    ),
    "scaled rope of transformers 5": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        "rope of type 'yarn' is not known; only default is",
    ),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act: must be silu, got 'gelu'"),
    "window": ("qwen2", {"use_sliding_window": True}, "use_sliding_window: must be False, got True"),
    "layers with windows": (
        "qwen3",
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        "layer_types: must be full_attention in every layer, got ['full_attention', 'sliding_attention', "
        "'full_attention', 'sliding_attention']",
    ),
    "inverse scale": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx: must be False, got True",
    ),
    "no width": ("llama", {"hidden_size": None}, "hidden_size: must be a whole number above 0, got None"),
    "no number": ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps: must be a number above 0, got 'small'"),
    "heads": ("llama", {"num_key_value_heads": 3}, "kv_heads: 3 does not divide heads 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_ours_does_not_have_is_refused_by_its_key(case: str, tmp_path: Path) -> None:
    kind, changes, line = REFUSED[case]
    write(kind, GPT2 if kind == "gpt2" else LLAMA, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError) as error:
        tiedjax.load_model(tmp_path)
    assert str(error.value) == f"{path}: {line}"


def test_tokens_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write("llama", LLAMA, tmp_path)
    model = tiedjax.load_model(tmp_path)
    for tokens, line in (
        ([[0, V]], f"tokens: must be from 0 to {V - 1}, got 0 to {V}"),
        ([1, 2], "tokens: must be ids of shape [B, T], got int64 [2]"),
        ([[0] * 65], "tokens: the model has 64 positions, got 65"),
    ):
        with pytest.raises(UserError) as error:
            model.logits(tokens)
        assert str(error.value) == line
    assert model.tokenizer is None


def test_a_body_that_is_not_read_is_named(tmp_path: Path) -> None:
    write("gemma", {**LLAMA, "head_dim": 8, "num_key_value_heads": 1}, tmp_path)
    with pytest.raises(UserError) as error:
        tiedjax.load_model(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: the body of a gemma model is not read; those of llama, olmo, olmo2, qwen2, qwen3, gpt_neox, gpt2 "
        "are, and any model's tables"
    )
    with pytest.raises(UserError, match=r"is no Hugging Face model: it holds no config\.json"):
        tiedjax.load_model(tmp_path / "nothing")
