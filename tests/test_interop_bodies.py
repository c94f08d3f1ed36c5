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
from tiedjax.interop import families
from tiedjax.interop.export import export
from tiedjax.interop.folder import TABLE_NAMES, ModelFolder
from tiedjax.interop.model import config_of

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
GPT_NEO = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 4,
    "max_position_embeddings": 64,
    "window_size": 5,
    "attention_types": [[["global", "local"], 2]],
}
WIDE = {**LLAMA, "head_dim": 16, "num_key_value_heads": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
OLMO3 = {
    **LLAMA,
    "num_key_value_heads": 2,
    "sliding_window": 6,
    "rope_parameters": {
        "full_attention": {**YARN, "attention_factor": 1.2},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
GEMMA2 = {
    **WIDE,
    "sliding_window": 7,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 10.0,
}
GEMMA3 = {
    **WIDE,
    "sliding_window": 7,
    "query_pre_attn_scalar": 24,
    "final_logit_softcapping": 10.0,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": LINEAR,
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
    },
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {**LLAMA, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama, grouped": ("llama", {**LLAMA, "num_key_value_heads": 2, "rope_parameters": {"rope_theta": 500.0}}),
    "llama, biased, wide heads": (
        "llama",
        {**LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 16, "num_key_value_heads": 1},
    ),
    "llama, linear": ("llama", {**WIDE, "rope_parameters": LINEAR}),
    "llama, llama3": ("llama", {**WIDE, "rope_parameters": LLAMA3}),
    "llama, yarn": ("llama", {**WIDE, "rope_parameters": YARN}),
    "llama, yarn, scaled": ("llama", {**WIDE, "rope_parameters": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.3}}),
    "olmo": ("olmo", LLAMA),
    "olmo, clipped": ("olmo", {**LLAMA, "clip_qkv": 0.02, "num_key_value_heads": 2, "attention_bias": True}),
    "olmo2": ("olmo2", {**LLAMA, "num_key_value_heads": 2}),
    "olmo3": ("olmo3", OLMO3),
    "olmo3, one theta each": (
        "olmo3",
        {
            **OLMO3,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 300.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
    ),
    "gemma": ("gemma", {**WIDE, "num_key_value_heads": 1}),
    "gemma2": ("gemma2", GEMMA2),
    "gemma2, exact, no caps": (
        "gemma2",
        {
            **GEMMA2,
            "hidden_activation": "gelu",
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": ("gemma3_text", GEMMA3),
    "qwen2": ("qwen2", {**LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**LLAMA, "num_key_value_heads": 2, "head_dim": 16}),
    "qwen3, biased": ("qwen3", {**LLAMA, "head_dim": 8, "num_key_value_heads": 4, "attention_bias": True}),
    "qwen2, windows": (
        "qwen2",
        {**LLAMA, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3, windows": (
        "qwen3",
        {
            **WIDE,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "qwen3, windows in all": (
        "qwen3",
        {**WIDE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "pythia": ("gpt_neox", NEOX),
    "gpt_neox, in turn, tanh": (
        "gpt_neox",
        {**NEOX, "use_parallel_residual": False, "hidden_act": "gelu_new", "rotary_pct": 1.0, "attention_bias": False},
    ),
    "gpt_neo": ("gpt_neo", GPT_NEO),
    "gpt_neo, exact, untied": (
        "gpt_neo",
        {**GPT_NEO, "activation_function": "gelu", "intermediate_size": 40, "tie_word_embeddings": False},
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2, exact, wide": ("gpt2", {**GPT2, "activation_function": "gelu", "n_inner": 40}),
}


def without(options: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != key}


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


# The same models as older configs say them: what stands in place of what transformers 5 writes.
OLDER: dict[str, dict[str, Any]] = {
    "llama, linear": {
        "rope_parameters": None,
        "rope_theta": 100.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "llama, llama3": {"rope_parameters": None, "rope_theta": 100.0, "rope_scaling": without(LLAMA3, "rope_theta")},
    "olmo3": {
        "rope_parameters": None,
        "rope_theta": 100.0,
        "rope_scaling": {**without(YARN, "rope_theta"), "attention_factor": 1.2},
        "layer_types": None,
    },
    "gemma": {"hidden_act": "gelu"},
    "qwen2, windows": {"layer_types": None},
    "gemma2": {"layer_types": None},
    "gemma3": {
        "rope_parameters": None,
        "rope_theta": 100.0,
        "rope_local_base_freq": 30.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "layer_types": None,
        "sliding_window_pattern": 3,
    },
}


@pytest.mark.parametrize("name", OLDER)
def test_older_configs_mean_the_same(name: str, tmp_path: Path) -> None:
    kind, config = FAMILIES[name]
    write(kind, config, tmp_path)
    newer = tiedjax.load_model(tmp_path).config
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | OLDER[name]))
    assert tiedjax.load_model(tmp_path).config == newer


IMAGES = {
    "text_config": GEMMA3,
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    },
    "mm_tokens_per_image": 4,
    "boi_token_index": V - 3,
    "eoi_token_index": V - 2,
    "image_token_index": V - 1,
}


def test_of_a_model_with_images_the_text_is_read(tmp_path: Path) -> None:
    """Under either of the names that its tensors have had; and it is not written."""
    text = {**GEMMA3, "final_logit_softcapping": None}  # which transformers leaves out here
    theirs = write("gemma3", {**IMAGES, "text_config": text}, tmp_path / "model")
    path, tokens = tmp_path / "model" / "model.safetensors", prompts() % (V - 3)
    logits, states = reference(theirs, tokens)
    tensors = load_file(path)
    assert "language_model.model.norm.weight" in tensors
    for start in ("language_model.model.", "model.language_model."):
        save_file({name.replace("language_model.model.", start): values for name, values in tensors.items()}, path)
        model = tiedjax.load_model(tmp_path / "model")
        assert_close(model.logits(tokens), logits)
        assert_close(model.hidden_states(tokens)[:-1], states)
        assert model.tables.tied
    with pytest.raises(UserError) as error:
        export(str(tmp_path / "model"), tmp_path / "out")
    line = "a gemma3 model is read and not written: what is of no text would be lost"
    assert str(error.value) == f"{tmp_path / 'model'}: {line}"


@pytest.mark.parametrize("kind", ["gemma3", "gemma3_text"])
def test_what_a_config_of_gemma_3_leaves_out_is_what_transformers_takes(kind: str, tmp_path: Path) -> None:
    """As published models with images leave out heads, key and value heads, widths of heads and positions."""
    text = {"hidden_size": 2560, "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    for said in ({}, text, {"sliding_window": 1024, "num_attention_heads": 16}):
        whole = {"model_type": "gemma3", "text_config": said} if kind == "gemma3" else {"model_type": kind, **said}
        (tmp_path / "config.json").write_text(json.dumps(whole))
        ours, theirs = config_of(ModelFolder(tmp_path)), transformers.Gemma3TextConfig(**said)
        assert (ours.vocab_size, ours.d_model, ours.d_ff) == (
            theirs.vocab_size,
            theirs.hidden_size,
            theirs.intermediate_size,
        )
        assert (ours.layers, ours.heads, ours.groups, ours.key_width) == (
            theirs.num_hidden_layers,
            theirs.num_attention_heads,
            theirs.num_key_value_heads,
            theirs.head_dim,
        )
        assert (ours.seq_len, ours.window) == (theirs.max_position_embeddings, theirs.sliding_window)
        assert [window is not None for window in ours.windows] == [
            layer == "sliding_attention" for layer in theirs.layer_types
        ]
        thetas = {layer: rope["rope_theta"] for layer, rope in theirs.rope_parameters.items()}
        assert thetas == {"full_attention": ours.rope_theta, "sliding_attention": ours.window_theta}
        assert (ours.rope_scaling, ours.rope_factor) == (("linear", 8.0) if "rope_scaling" in said else ("none", None))


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
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None},
        "rope_scaling: rope of type 'dynamic' is not known; default, linear, llama3 and yarn are",
    ),
    "scaled rope of transformers 5": (
        "llama",
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}},
        "rope_parameters: rope of type 'longrope' is not known; default, linear, llama3 and yarn are",
    ),
    "scaled by nothing": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        "rope_parameters: factor: must be a number above 0, got None",
    ),
    "yarn between whole pairs": (
        "llama",
        {"rope_parameters": {**YARN, "truncate": False}},
        "rope_parameters: truncate: must be True, got False",
    ),
    "rope by layer": (
        "llama",
        {"rope_parameters": {"full_attention": LINEAR}},
        f"rope_parameters: must be those of all layers alike, got { ({'full_attention': LINEAR})!r}",
    ),
    "rope of all layers": (
        "olmo3",
        {"rope_parameters": LINEAR},
        f"rope_parameters: must be those of full_attention and sliding_attention, got {LINEAR!r}",
    ),
    "rope that is no object": ("llama", {"rope_scaling": "linear"}, "rope_scaling: must be an object, got 'linear'"),
    "scaled windows": (
        "olmo3",
        {"rope_parameters": {"sliding_attention": LINEAR}},
        "rope_parameters: sliding_attention: rope_type: must be default, got 'linear'",
    ),
    "layers of other kinds": (
        "olmo3",
        {"layer_types": ["chunked_attention"] * 4},
        "layer_types: must be full_attention or sliding_attention for each layer, got ['chunked_attention', "
        "'chunked_attention', 'chunked_attention', 'chunked_attention']",
    ),
    "layers left out": (
        "gemma2",
        {"layer_types": ["full_attention"]},
        "layer_types: must be full_attention or sliding_attention for each layer, got ['full_attention']",
    ),
    "both directions": (
        "gemma",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention: must be False, got True",
    ),
    "scaled rope with windows": (
        "gemma2",
        {"rope_parameters": LINEAR},
        "rope of type 'linear' is not known in layers with a window",
    ),
    "capped scores": (
        "gemma3_text",
        {"attn_logit_softcapping": 2.0},
        "attn_logit_softcapping: must be None, got 2.0",
    ),
    "kinds of layers": (
        "gpt_neo",
        {"attention_types": [[["global", "random"], 2]]},
        "attention_types: must be lists of global or local and how often they come, of 4 layers in all, got "
        "[[['global', 'random'], 2]]",
    ),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act: must be silu, got 'gelu'"),
    "activations": (
        "gpt2",
        {"activation_function": ["gelu"]},
        "activation_function: must be gelu_new or gelu_pytorch_tanh or gelu, got ['gelu']",
    ),
    "kinds that are no list": (
        "qwen2",
        {"layer_types": 5},
        "layer_types: must be full_attention in every layer, where use_sliding_window is false, got 5",
    ),
    "part of a head": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: must be 1.0, got 0.5"),
    "part of a head, below": (
        "llama",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "rope_parameters: partial_rotary_factor: must be 1.0, got 0.5",
    ),
    "huge number": ("llama", {"rms_norm_eps": 10**400}, f"rms_norm_eps: must be a number above 0, got {10**400}"),
    "many layers": (
        "olmo3",
        {"num_hidden_layers": 10**12},
        "num_hidden_layers: must be at most 10000, got 1000000000000",
    ),
    "window": ("qwen2", {"use_sliding_window": 1}, "use_sliding_window: must be true or false, got 1"),
    "first window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": -1},
        "max_window_layers: must be a whole number of at least 0, got -1",
    ),
    "windows that are scaled": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 2,
            "layer_types": None,
            "rope_parameters": LINEAR,
        },
        "rope of type 'linear' is not known in layers with a window",
    ),
    "layers with windows": (
        "qwen3",
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        "layer_types: must be full_attention in every layer, where use_sliding_window is false, got "
        "['full_attention', 'sliding_attention', 'full_attention', 'sliding_attention']",
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
    write(kind, {"gpt2": GPT2, "gpt_neo": GPT_NEO}.get(kind, LLAMA), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError) as error:
        tiedjax.load_model(tmp_path)
    assert str(error.value) == f"{path}: {line}"


def test_what_is_said_of_a_scaled_rope_comes_first(tmp_path: Path) -> None:
    """Before what is said of any rope, as transformers reads it; of first positions the top level does."""
    write("llama", LLAMA, tmp_path)
    path = tmp_path / "config.json"
    plain = {key: value for key, value in json.loads(path.read_text()).items() if key != "rope_parameters"}
    scaled = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 5e5, "original_max_position_embeddings": 24}
    path.write_text(json.dumps({**plain, "rope_scaling": scaled, "original_max_position_embeddings": 16}))
    model = tiedjax.load_model(tmp_path)
    assert (model.config.rope_theta, model.config.rope_positions) == (5e5, 16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_close(model.logits(prompts()), reference(theirs, prompts())[0])


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


def test_what_is_no_model_that_is_known_is_refused(tmp_path: Path) -> None:
    write("llama", LLAMA, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mamba"}))
    with pytest.raises(UserError) as error:
        tiedjax.load_model(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: model_type 'mamba' is not known; it is one of gemma, gemma2, gemma3, gemma3_text, gpt2, gpt_neo, "
        "gpt_neox, llama, olmo, olmo2, olmo3, qwen2, qwen3"
    )
    with pytest.raises(UserError, match=r"is no Hugging Face model: it holds no config\.json"):
        tiedjax.load_model(tmp_path / "nothing")


def test_every_family_whose_tables_are_known_has_a_body() -> None:
    assert families.FAMILIES.keys() == TABLE_NAMES.keys()
