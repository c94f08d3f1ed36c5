"""GPT-NeoX and Pythia: parallel layers, biases everywhere, the first part of each head rotated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tiedjax.config import ModelConfig
from tiedjax.interop.families.common import (
    Arrays,
    Family,
    Held,
    Settings,
    biases,
    linear,
    rope_of_part,
    sizes,
    vector,
    without,
    written_sizes,
)

_ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_pytorch_tanh": "gelu"}
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_QKV = ("query", "key", "value")


def _config(settings: Settings) -> dict[str, Any]:
    attention = settings.flag("attention_bias", True)
    return {
        **sizes(settings),
        **rope_of_part(settings, "rotary_emb_base", "rotary_pct", 0.25),
        "norm": "layernorm",
        "norm_bias": True,
        "norm_eps": settings.number("layer_norm_eps", 1e-5),
        "parallel": settings.flag("use_parallel_residual", True),
        "mlp": settings.one_of("hidden_act", _ACTIVATIONS, "gelu"),
        "biases": biases(qkv=attention, out=attention, mlp=True),
    }


def _held(cfg: ModelConfig) -> Iterator[Held]:
    H, K = cfg.heads, cfg.key_width

    def split(x: np.ndarray) -> Arrays:  # [H 3 K] or [H 3 K, D]: each head's query, key and value after one another
        parts = x.reshape(H, 3, K, *x.shape[1:])
        return tuple(parts[:, n].reshape(H * K, *x.shape[1:]).T for n in range(3))

    def join(parts: Arrays) -> np.ndarray:
        heads = [part.T.reshape(H, 1, K, *part.shape[:-1]) for part in parts]
        return np.concatenate(heads, axis=1).reshape(3 * H * K, *parts[0].shape[:-1])

    for i in range(cfg.layers):
        there, here = f"gpt_neox.layers.{i}", f"layer_{i}"
        fused = f"{there}.attention.query_key_value"
        yield Held(f"{fused}.weight", tuple(f"{here}/attention/{name}/kernel" for name in _QKV), split, join)
        if "qkv" in cfg.bias_names:
            yield Held(f"{fused}.bias", tuple(f"{here}/attention/{name}_bias/bias" for name in _QKV), split, join)
        yield linear(f"{there}.attention.dense.weight", f"{here}/attention/out/kernel")
        if "out" in cfg.bias_names:
            yield vector(f"{there}.attention.dense.bias", f"{here}/attention/out_bias/bias")
        for ours, theirs in (("up", "dense_h_to_4h"), ("down", "dense_4h_to_h")):
            yield linear(f"{there}.mlp.{theirs}.weight", f"{here}/mlp/{ours}/kernel")
            yield vector(f"{there}.mlp.{theirs}.bias", f"{here}/mlp/{ours}_bias/bias")
        for ours, theirs in _NORMS.items():
            yield vector(f"{there}.{theirs}.weight", f"{here}/{ours}/scale")
            yield vector(f"{there}.{theirs}.bias", f"{here}/{ours}/bias")
    yield vector("gpt_neox.final_layer_norm.weight", "final_norm/scale")
    yield vector("gpt_neox.final_layer_norm.bias", "final_norm/bias")


def _written(cfg: ModelConfig) -> dict[str, Any]:
    activation = {"gelu_exact": "gelu", "gelu": "gelu_new"}[cfg.mlp]
    return without(written_sizes(cfg), "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta") | {
        "rotary_pct": cfg.rotary_fraction,
        "rotary_emb_base": cfg.rope_theta,
        "layer_norm_eps": cfg.norm_eps,
        "use_parallel_residual": cfg.parallel,
        "hidden_act": activation,
    }


FAMILY = Family(
    "GPTNeoXForCausalLM",
    _config,
    _held,
    {
        "norm": ("layernorm",),
        "norm_bias": (True,),
        "parallel": (True, False),
        "mlp": ("gelu", "gelu_exact"),
        "position": ("rope",),
        "rotary_fraction": (),
        "rope_scaling": (),
        "biases": ("qkv,out,mlp", "mlp"),
        "kv_heads": (None,),
        "head_width": (None,),
    },
    _written,
    ("gpt_neox.", ""),
)
