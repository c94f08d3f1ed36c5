"""GPT-Neo: GPT-2 without a scale of attention, and with a window in some layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tiedjax.config import ModelConfig
from tiedjax.interop.families.common import Family, Held, Settings, linear, shortest, vector

_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}
_KINDS = {"global": "full", "local": "window"}


def _config(settings: Settings) -> dict[str, Any]:
    width, kinds = settings.whole("hidden_size"), _kinds(settings)
    return {
        "layers": settings.whole("num_layers"),
        "d_model": width,
        "heads": settings.whole("num_heads"),
        "d_ff": settings.whole("intermediate_size", 4 * width),
        "seq_len": settings.whole("max_position_embeddings", 2048),
        "vocab_size": settings.whole("vocab_size"),
        "position": "learned",
        "norm": "layernorm",
        "norm_bias": True,
        "norm_eps": settings.number("layer_norm_epsilon", 1e-5),
        "mlp": settings.one_of("activation_function", _ACTIVATIONS, "gelu_new"),
        "biases": "out,mlp",
        "attention_scale": 1.0,
    } | ({"window": settings.whole("window_size", 256), "window_layers": shortest(kinds)} if "window" in kinds else {})


def _kinds(settings: Settings) -> list[str]:
    """Each layer's kind in our words, from [[["global", "local"], 6]]: kinds, and how often they come."""
    layers, key = settings.layers("num_layers"), "attention_types"
    kinds: list[str] = []
    try:
        for names, times in settings.get(key, [[["global", "local"], layers // 2]]):
            kinds += [_KINDS[name] for name in names] * min(times, layers + 1)
    except (KeyError, TypeError, ValueError):
        kinds = []
    if len(kinds) != layers:
        settings.refuse(key, f"lists of global or local and how often they come, of {layers} layers in all")
    return kinds


def _held(cfg: ModelConfig) -> Iterator[Held]:
    yield vector("transformer.wpe.weight", "entry/positions")
    for i in range(cfg.layers):
        there, here = f"transformer.h.{i}", f"layer_{i}"
        for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out")):
            yield linear(f"{there}.attn.attention.{theirs}.weight", f"{here}/attention/{ours}/kernel")
        yield vector(f"{there}.attn.attention.out_proj.bias", f"{here}/attention/out_bias/bias")
        for theirs, ours in (("c_fc", "up"), ("c_proj", "down")):
            yield linear(f"{there}.mlp.{theirs}.weight", f"{here}/mlp/{ours}/kernel")
            yield vector(f"{there}.mlp.{theirs}.bias", f"{here}/mlp/{ours}_bias/bias")
        for theirs, ours in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
            yield vector(f"{there}.{theirs}.weight", f"{here}/{ours}/scale")
            yield vector(f"{there}.{theirs}.bias", f"{here}/{ours}/bias")
    yield vector("transformer.ln_f.weight", "final_norm/scale")
    yield vector("transformer.ln_f.bias", "final_norm/bias")


def _written(cfg: ModelConfig) -> dict[str, Any]:
    kinds = ["local" if window else "global" for window in cfg.windows]
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_layers": cfg.layers,
        "num_heads": cfg.heads,
        "intermediate_size": cfg.d_ff,
        "max_position_embeddings": cfg.seq_len,
        "activation_function": {"gelu": "gelu_new", "gelu_exact": "gelu"}[cfg.mlp],
        "layer_norm_epsilon": cfg.norm_eps,
        "attention_types": [[[kind], 1] for kind in kinds],
        "window_size": cfg.window or 256,
    }


FAMILY = Family(
    "GPTNeoForCausalLM",
    _config,
    _held,
    {
        "norm": ("layernorm",),
        "norm_bias": (True,),
        "mlp": ("gelu", "gelu_exact"),
        "position": ("learned",),
        "attention_scale": (1.0,),
        "biases": ("out,mlp",),
        "window": (),
        "kv_heads": (None,),
        "head_width": (None,),
    },
    _written,
    ("transformer.", ""),
)
