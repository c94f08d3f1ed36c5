"""`tiedjax import FILE.gguf`: a Llama of llama.cpp as a Hugging Face directory, its quantised weights as float32.

It is written beside its place, read again, and then renamed: what is there is whole. Names and metadata are those of
github.com/ggml-org/ggml/blob/master/docs/gguf.md. Axes: H heads, K head width, D width.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiedjax.data.tokenizer import parse_tokenizer
from tiedjax.errors import UserError
from tiedjax.files import local_path, refuse_irregular
from tiedjax.interop.folder import CONFIG, refuse_filled, written_whole
from tiedjax.interop.model import load_model
from tiedjax.interop.tensors import write_safetensors
from tiedjax.npy import one_line
from tiedjax.text import binary

TABLE = "token_embd.weight"
_ENDS = {
    TABLE: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Keys of the architecture: those that are read, and those that must have this value.
_READ = {
    f"llama.{name}"
    for name in (
        *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
        *("rope.dimension_count", "rope.freq_base", "attention.head_count", "attention.head_count_kv"),
        *("attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length"),
    )
}
_FIXED: dict[str, Any] = {
    "llama.rope.scaling.type": "none",
    "llama.rope.scaling.factor": 1.0,
    "llama.rope.scale_linear": 1.0,
    "llama.expert_count": 0,
    "llama.attention.causal": True,
}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# How text is cut before it is merged, by llama.cpp's name of it.
_CUTS: dict[str, Any] = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
}
_UNKNOWN, _CONTROL, _ADDED = 2, 3, 4  # kinds of tokens


@dataclass(frozen=True)
class Imported:
    """What was written: where, tied or not, numbers and bytes, and how body and table were stored."""

    path: Path
    tied: bool
    parameters: int
    size: int
    stored: str

    def line(self) -> str:
        """All of it as a person reads it."""
        kind = "tied" if self.tied else "untied"
        return (
            f"{self.path}: {kind} llama, {self.parameters:,} parameters in float32, {binary(self.size)}; {self.stored}"
        )


def import_gguf(source: str | Path, out: str | Path) -> Imported:
    """Writes the model in a .gguf file to the new directory `out`.

    UserError for what is damaged, for another architecture than llama, for a form of it or a tokenizer that is not
    known, and where `out` is there already.
    """
    path, folder = local_path(source, "FILE"), local_path(out, "--out")
    refuse_filled(folder)
    file = _File(path)
    config, tokenizer, about = _config(file), _tokenizer(file), _about_tokenizer(file)
    tensors = dict(_tensors(file, config))
    with written_whole(folder) as temporary:
        write_safetensors(temporary / "model.safetensors", {name: (x, "float32") for name, x in tensors.items()})
        trees = {CONFIG: config, "tokenizer.json": tokenizer, "tokenizer_config.json": about}
        for name, tree in trees.items():
            (temporary / name).write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        try:
            load_model(temporary)
        except UserError as error:
            raise UserError(f"{path}: {str(error).removeprefix(f'{temporary}: ')}") from None
        size = sum(each.stat().st_size for each in temporary.iterdir())
    parameters = sum(values.size for values in tensors.values())
    return Imported(folder, config["tie_word_embeddings"], parameters, size, file.stored)


class _File:
    """A .gguf file: its metadata by key, and its tensors by name. UserError for what is none."""

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError:
            raise UserError(f"{path}: takes gguf to read: pip install 'tiedjax[gguf]'") from None

        class Reader(gguf.GGUFReader):
            """It refuses what ends early: an array that is said to go on would be read without end."""

            def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
                values = super()._get(offset, dtype, count, override_order)
                if len(values) != count:
                    raise ValueError("it ends early")
                return values

        self.path, self._dequantize = path, gguf.dequantize
        try:
            refuse_irregular(path)
            reader = Reader(path)
            self._fields = dict(reader.fields)
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, LookupError, OverflowError, TypeError) as error:
            raise UserError(f"{path}: not a GGUF file that can be read: {one_line(error)}") from None
        if self.text("general.architecture") != "llama":
            raise UserError(f"{path}: general.architecture must be llama, got {self.text('general.architecture')!r}")

    def get(self, key: str, default: Any = None) -> Any:
        """What the metadata hold of a key; a list of an array."""
        if key not in self._fields:
            return default
        try:
            return self._fields[key].contents()
        except (ValueError, LookupError) as error:
            raise UserError(f"{self.path}: {key} cannot be read: {one_line(error)}") from None

    def keys_of(self, prefix: str) -> list[str]:
        """The metadata's keys that begin so."""
        return [key for key in self._fields if key.startswith(prefix)]

    def text(self, key: str) -> str:
        """A text. UserError where there is none."""
        value = self.get(key)
        if not isinstance(value, str):
            raise UserError(f"{self.path}: {key} must be a text, got {value!r}")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self.get(key, default)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{self.path}: {key} must be a whole number above 0, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0, of a float32 the shortest that is read back as it."""
        value = self.get(key, default)
        if not isinstance(value, float) or not 0 < value < float("inf"):
            raise UserError(f"{self.path}: {key} must be a number above 0, got {value!r}")
        return float(str(np.float32(value)))

    def listed(self, key: str, kind: type) -> list[Any]:
        """An array of texts or of numbers."""
        values = self.get(key)
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise UserError(f"{self.path}: {key} must be an array, got {type(values).__name__}")
        return values

    def values(self, name: str) -> np.ndarray:
        """A tensor as float32. UserError where it is missing or stored in a way that is not known."""
        if name not in self.tensors:
            raise UserError(f"{self.path}: lacks {name!r}, which a llama model has")
        tensor = self.tensors[name]
        try:
            values = self._dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"{self.path}: {name!r} cannot be read: {one_line(error)}") from None
        shape = tuple(int(size) for size in reversed(tensor.shape))
        return np.asarray(values, np.float32).reshape(shape)

    @property
    def stored(self) -> str:
        """How the body's matrices, most of them, and the table are stored."""
        kinds = Counter[str]()
        for name, tensor in self.tensors.items():
            if name.startswith("blk."):
                kinds[tensor.tensor_type.name] += int(tensor.n_elements)
        if not kinds:
            raise UserError(f"{self.path}: holds no 'blk.0', which a llama model has")
        return f"{kinds.most_common(1)[0][0]} body, {self.tensors[TABLE].tensor_type.name} table"


def _config(file: _File) -> dict[str, Any]:
    """config.json. UserError for a form that a Llama of ours does not have."""
    for key in file.keys_of("llama."):
        if key not in _READ and key not in _FIXED:
            raise UserError(f"{file.path}: holds {key}, which no Llama that is known has")
    for key, allowed in _FIXED.items():
        if file.get(key, allowed) != allowed:
            raise UserError(f"{file.path}: {key} must be {allowed}, got {file.get(key)!r}")
    if file.get("split.count", 1) > 1:
        raise UserError(f"{file.path}: is one part of {file.get('split.count')}; merge them with llama-gguf-split")
    width, heads = file.whole("llama.embedding_length"), file.whole("llama.attention.head_count")
    head = file.whole("llama.attention.key_length", width // heads)
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if file.whole(key, head) != head:
            raise UserError(f"{file.path}: {key} must be {head}, the width of a head, got {file.get(key)}")
    if TABLE not in file.tensors:
        raise UserError(f"{file.path}: lacks {TABLE!r}, which a llama model has")
    ids = {name: file.get(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "vocab_size": int(file.tensors[TABLE].shape[-1]),
        "hidden_size": width,
        "intermediate_size": file.whole("llama.feed_forward_length"),
        "num_hidden_layers": file.whole("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.whole("llama.attention.head_count_kv", heads),
        "head_dim": head,
        "max_position_embeddings": file.whole("llama.context_length"),
        "rope_theta": file.number("llama.rope.freq_base", 1e4),
        "rms_norm_eps": file.number("llama.attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "imported_from": f"{file.path.name}: {file.stored}",
        **{name: value for name, value in ids.items() if value is not None},
    }


def _tensors(file: _File, config: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by its name in Hugging Face's layout, float32. UserError for one that such a model does not have."""
    for name in file.tensors:
        inner = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if name in _ENDS:
            yield _ENDS[name], file.values(name)
        elif inner and inner[2] in _LAYER:
            values = file.values(name)
            if inner[2] in ("attn_q", "attn_k"):
                heads = config["num_attention_heads" if inner[2] == "attn_q" else "num_key_value_heads"]
                values = _in_halves(values, heads, file, name)
            yield f"model.layers.{inner[1]}.{_LAYER[inner[2]]}.weight", values
        else:
            raise UserError(f"{file.path}: holds {name!r}, which no Llama that is known has")


def _in_halves(values: np.ndarray, heads: int, file: _File, name: str) -> np.ndarray:
    """Rows [H K, D] of queries or keys, whose pairs that turn together lie side by side, with their halves apart."""
    if values.ndim != 2 or len(values) % (2 * heads):
        raise UserError(f"{file.path}: {name!r} has the shape {list(values.shape)}, which does not fit {heads} heads")
    return values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def _tokenizer(file: _File) -> dict[str, Any]:
    """tokenizer.json of its vocabulary and merges. UserError for any but the byte-level BPE that are known."""
    kind = file.text("tokenizer.ggml.model")
    cut = file.get("tokenizer.ggml.pre")
    if kind != "gpt2" or cut not in _CUTS:
        raise UserError(
            f"{file.path}: its tokenizer must be gpt2, cut as {' or '.join(_CUTS)}; it is {kind}, cut as {cut}"
        )
    if file.get("tokenizer.ggml.add_bos_token"):
        raise UserError(f"{file.path}: tokenizer.ggml.add_bos_token must be false: no text here begins with a token")
    tokens = file.listed("tokenizer.ggml.tokens", str)
    kinds = file.listed("tokenizer.ggml.token_type", int)
    merges = [merge.split(" ") for merge in file.listed("tokenizer.ggml.merges", str)]
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise UserError(f"{file.path}: its {len(tokens)} tokens are not all different, or {len(kinds)} have a kind")
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _ADDED,
        }
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _ADDED)
    ]
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _CUTS[cut],
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    parse_tokenizer(json.dumps(tree), str(file.path))
    return tree


def _about_tokenizer(file: _File) -> dict[str, Any]:
    """tokenizer_config.json."""
    tokens = file.listed("tokenizer.ggml.tokens", str)
    named = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}
    ids = {name: file.get(f"tokenizer.ggml.{key}_token_id") for name, key in named.items()}
    template = file.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": file.whole("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        **{name: tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)},
        **({} if template is None else {"chat_template": template}),
    }
