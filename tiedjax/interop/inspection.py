"""`tiedjax inspect DIR`: what a model directory holds, and whether its tables are one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiedjax.config import ModelConfig
from tiedjax.data.tokenizer import parse_tokenizer
from tiedjax.errors import UserError
from tiedjax.files import local_path, read_text
from tiedjax.interop.families.common import is_buffer
from tiedjax.interop.folder import (
    CONFIG,
    ModelFolder,
    Tie,
    config_in_words,
    is_model_folder,
    missing_in_words,
    transformers_in_words,
)
from tiedjax.interop.model import checked_folder

# What families call a size: the first of these keys that a config has.
SIZES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "width": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "kv_heads": ("num_key_value_heads",),
    "mlp_width": ("intermediate_size", "n_inner"),
    "positions": ("max_position_embeddings", "n_positions"),
}


@dataclass(frozen=True)
class Inspection:
    """What is known of a model directory.

    Attributes:
      path, family: the directory; the `model_type` of its config.
      sizes: of `SIZES` those that its config gives.
      tables: the name of each role's table that is on disk.
      rows, width: of its tables.
      tie: whether they are one.
      tokens: ids of its tokenizer that are tokens; None where it has no tokenizer.json.
      parameters, table_parameters: numbers of the model and of its tables, one that has both roles counted once.
      dtypes: as the tensors are stored, most parameters first.
      imported_from: the file that it was converted from, and how that stored it; None of any other.
      verdict, config, transformers: the tie in words, what the config says of it, and what transformers makes of it.
    """

    path: str
    family: str
    sizes: Mapping[str, int]
    tables: Mapping[str, str]
    rows: int
    width: int
    tie: Tie
    tokens: int | None
    parameters: int
    table_parameters: int
    dtypes: tuple[str, ...]
    imported_from: str | None
    verdict: str
    config: str
    transformers: str

    def lines(self) -> list[str]:
        """All of it as a person reads it."""
        sizes = ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in self.sizes.items())
        share = self.table_parameters / self.parameters
        imported = f", imported from {self.imported_from}" if self.imported_from else ""
        lines = [
            f"{self.path}: {self.family}, {self.parameters:,} parameters in {' and '.join(self.dtypes)}{imported}",
            sizes,
            self.verdict,
            f"config.json: {self.config}; on disk: {self.tie.on_disk}; transformers {self.transformers}",
            f"tables: {self.table_parameters:,} of the parameters, {share:.1%}",
        ]
        if self.tokens is None:
            lines.append(f"vocabulary: {self.rows:,} rows; there is no tokenizer.json to say which are tokens")
        else:
            padding = self.rows - self.tokens
            lines.append(f"vocabulary: {self.rows:,} rows for {self.tokens:,} tokens, {padding:,} of them padding")
        return [line for line in lines if line]

    def tree(self) -> dict[str, Any]:
        """The same as plain JSON."""
        return {
            "path": self.path,
            "family": self.family,
            "sizes": dict(self.sizes),
            "tables": dict(self.tables),
            "rows": self.rows,
            "width": self.width,
            "tied": self.tie.tied,
            "tie_word_embeddings": self.tie.flag,
            "on_disk": self.tie.on_disk,
            "transformers": self.transformers,
            "tokens": self.tokens,
            "parameters": self.parameters,
            "table_parameters": self.table_parameters,
            "dtypes": list(self.dtypes),
            "imported_from": self.imported_from,
        }


def inspect(path: str | Path) -> Inspection:
    """Reads the config, the tensors' headers, the tables where both are there, and the tokenizer. UserError if not."""
    folder = local_path(path, "DIR")
    if not is_model_folder(folder):
        raise UserError(f"{folder}: is no Hugging Face model: it holds no {CONFIG}")
    model = ModelFolder(folder)
    tie, tables = model.tie, model.tables()
    counted = {name: t for name, t in model.tensors.items() if not is_buffer(name)}
    if tie.tied and len(model.names) == 2:
        del counted[model.names["output"]]
    by_dtype: dict[str, int] = {}
    for tensor in counted.values():
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.size
    rows, width = next(iter(tables.values())).shape
    return Inspection(
        str(folder),
        model.family,
        sizes_of(model.text_config),
        model.names,
        rows,
        width,
        tie,
        _tokens(model.tokenizer_path, rows),
        sum(by_dtype.values()),
        sum(table.size for table in tables.values()),
        tuple(sorted(by_dtype, key=lambda dtype: -by_dtype[dtype])),
        imported if isinstance(imported := model.config.get("imported_from"), str) else None,
        _verdict(model),
        config_in_words(tie, model.family),
        transformers_in_words(tie),
    )


def config_for(path: str | Path) -> str:
    """YAML of a run that begins with this model: `model`, `tying` and `train.init`. UserError where none can.

    `train.init` is the path as it was given: like every path of a config it is one from the working directory.
    """
    model, cfg = checked_folder(path)
    plain = ModelConfig()
    own = [f.name for f in dataclasses.fields(cfg) if f.name not in ("dtype", "scan_layers")]
    lines = [
        f"  {name}: {json.dumps(getattr(cfg, name))}" for name in own if getattr(cfg, name) != getattr(plain, name)
    ]
    return "\n".join(
        ["model:", *lines, "tying:", f"  scheme: {model.tie.scheme}", "train:", f"  init: {json.dumps(str(path))}", ""]
    )


def _verdict(model: ModelFolder) -> str:
    tie, names = model.tie, " and ".join(model.names.values())
    shape = list(next(iter(model.tables().values())).shape)
    if tie.tied:
        return f"tied: one table {shape}, {names}"
    if tie.tied is None:
        return f"not whole: {missing_in_words(model)}"
    equal = ", which are equal now" if tie.on_disk == "both, equal" else ""
    return f"untied: two tables {shape}, {names}{equal}"


def sizes_of(config: Mapping[str, Any]) -> dict[str, int]:
    """Of `SIZES` those that a config gives."""
    found = {
        name: next((config[key] for key in keys if type(config.get(key)) is int), None) for name, keys in SIZES.items()
    }
    return {name: size for name, size in found.items() if size is not None}


def _tokens(tokenizer_path: Path | None, rows: int) -> int | None:
    """How many rows are of a token."""
    if tokenizer_path is None:
        return None
    vocabulary = parse_tokenizer(read_text(tokenizer_path), str(tokenizer_path)).get_vocab(with_added_tokens=True)
    return len({i for i in vocabulary.values() if i < rows})
