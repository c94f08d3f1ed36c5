"""The words in which a config is refused, and what an unknown option may have meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Any

from tiedjax.text import nearest

# What others call our options: the last word of their keys, without a first num or max.
SYNONYMS = {
    "optimizer": ("optim", "opt", "adamw"),
    "train": ("training", "trainer"),
    "model.layers": ("depth", "blocks", "hidden_layers"),
    "model.d_model": ("dim", "width", "hidden", "hidden_size", "hidden_dim", "embd", "embed_dim", "embedding_dim"),
    "model.heads": ("attention_heads",),
    "model.kv_heads": ("kv", "key_value_heads", "query_groups"),
    "model.d_ff": ("ff", "ffn", "ffn_dim", "mlp_dim", "intermediate_size"),
    "model.seq_len": ("ctx", "context", "context_length", "seq", "sequence", "block_size", "max_position_embeddings"),
    "model.vocab_size": ("vocab", "vocabulary"),
    "model.norm": ("norm_type", "normalization"),
    "model.position": ("pos", "position_embeddings"),
    "model.dtype": ("precision",),
    "model.remat": ("rematerialization", "gradient_checkpointing"),
    "tying.scheme": ("tying", "tie", "tied", "untied", "weight_tying", "tie_embeddings", "tie_word_embeddings"),
    "tying.input_grad_scale": ("input_scale",),
    "tying.output_grad_scale": ("output_scale",),
    "optimizer.learning_rate": ("lr", "rate", "peak_lr", "base_lr"),
    "optimizer.warmup_steps": ("warmup", "warmup_iters"),
    "optimizer.weight_decay": ("wd", "decay"),
    "optimizer.b1": ("beta1",),
    "optimizer.b2": ("beta2",),
    "optimizer.eps": ("epsilon",),
    "optimizer.clip_norm": ("clip", "grad_clip", "grad_norm", "gradient_clipping"),
    "data.source": ("dataset", "corpus", "text"),
    "data.batch_size": ("bs", "batch"),
    "data.microbatches": ("accumulation", "grad_accum", "gradient_accumulation_steps"),
    "mesh.data": ("dp",),
    "mesh.tensor": ("tp",),
    "train.steps": ("epochs", "iters", "iterations", "updates"),
    "train.seed": ("rng",),
    "train.log_every": ("log_interval", "logging_steps"),
    "train.eval_every": ("eval_interval", "eval_steps"),
    "train.checkpoint_every": ("checkpoint", "save", "save_every", "save_interval", "save_steps"),
    "out": ("output", "output_dir", "outdir", "dir"),
}


def meant_key(name: str, valid: Collection[str]) -> str | None:
    """The key of `valid` that `name` stands for; None where that is not clear.

    Sections decide only between equal last words: whoever writes train.lr thinks of lr. The last word may be that of a
    key, what others call it, one of its words if it is no other's, or a misspelling; a plural makes no difference.
    """
    section, word = _cut(name)
    # Others' word as it is comes first: model.dim means the width, and not an option that is called dims.
    spelled = name.lower().replace("-", "_").rpartition(".")[2]
    if exact := [key for key, words in SYNONYMS.items() if key in valid and spelled in words]:
        return exact[0]
    last_words = {key: _cut(key)[1] for key in valid}
    bare_word = re.sub(r"^(n|num|max|total|adam)_(?=.)", "", word)
    for wanted in dict.fromkeys((word, bare_word)):
        equal = [key for key, last in last_words.items() if last == wanted]
        if len(equal) > 1:
            equal = [key for key in equal if _cut(key)[0] == section]
        synonymous = [key for key, words in SYNONYMS.items() if key in valid and wanted in map(_singular, words)]
        partly = [key for key, last in last_words.items() if wanted in last.split("_")]
        for candidates in (equal, synonymous, partly):
            if len(candidates) == 1:
                return candidates[0]
    close = difflib.get_close_matches(bare_word, last_words.values(), n=1, cutoff=0.75)
    return next((key for key, last in last_words.items() if [last] == close), None)


def _cut(name: str) -> tuple[str, str]:
    """Section and last word of a key, in one spelling."""
    section, _, word = name.lower().replace("-", "_").rpartition(".")
    return section, _singular(word)


def _singular(word: str) -> str:
    return word.removesuffix("s")


def explained(error: Any, valid: Collection[str]) -> str:
    """One of pydantic's errors in one line; `valid` are the sections and dotted keys that there are."""
    key = ".".join(map(str, error["loc"]))
    kind, given = error["type"], error["input"]
    if kind in {"unexpected_keyword_argument", "extra_forbidden"}:
        if key in valid:
            return f"unknown key {key!r}; write it as nested sections, not with a dot"
        meant = meant_key(key, valid)
        return f"unknown key {key!r}" + (f"; did you mean {meant!r}?" if meant else "")
    if kind == "value_error":  # raised by a config's own check, which names the field
        return f"{key}.{error['ctx']['error']}" if key else str(error["ctx"]["error"])
    if kind == "literal_error":
        expected = error["ctx"]["expected"]
        return f"{key}: must be {expected}, got {given!r}{nearest(str(given), expected.split(chr(39)))}"
    wanted = error["msg"].removeprefix("Input should be ").rstrip(".")
    return f"{key}: must be {wanted}, got {given!r}"
