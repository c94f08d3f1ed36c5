"""`tiedjax.load_model(DIR)`: another's model as tables and a body that the Flax transformer takes.

Axes: B batch, T position, V rows of a table, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tiedjax.config import ModelConfig
from tiedjax.errors import UserError
from tiedjax.files import local_path
from tiedjax.interop.families import FAMILIES
from tiedjax.interop.families.common import Held, Settings, is_buffer
from tiedjax.interop.folder import CONFIG, ModelFolder, is_model_folder, missing_in_words
from tiedjax.interop.tensors import Tensor
from tiedjax.model import Transformer, capped, init_body
from tiedjax.run import RunTables


@dataclass(frozen=True, eq=False)
class Model:
    """Another's model in our form.

    Attributes:
      path: its directory.
      family: its `model_type`.
      config: its shape and arithmetic, in float32.
      tables: the two tables, NumPy float32 [V, D], one and the same array where they are tied.
      body: the body's Flax variables, NumPy float32.
    """

    path: Path
    family: str
    config: ModelConfig
    tables: RunTables
    body: dict[str, Any]

    @property
    def tokenizer_path(self) -> Path | None:
        """Its tokenizer.json, if it has one."""
        return ModelFolder(self.path).tokenizer_path

    def layers_as(self, *, scanned: bool) -> dict[str, Any]:
        """The parameters of the body with each layer's by itself, or all layers' stacked along a first axis."""
        params = dict(self.body["params"])
        if not scanned:
            return params
        layers = [params.pop(f"layer_{i}") for i in range(self.config.layers)]
        return params | {"layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer.json as a `tokenizers.Tokenizer`; None where it has none."""
        from tiedjax.data.tokenizer import parse_tokenizer
        from tiedjax.files import read_text

        path = self.tokenizer_path
        return None if path is None else parse_tokenizer(read_text(path), str(path))

    def logits(self, tokens_BT: Any) -> jax.Array:
        """float32 [B, T, V]: before each next token. UserError for ids outside the table, or too many positions."""
        return self._outputs(tokens_BT)[0]

    def hidden_states(self, tokens_BT: Any) -> jax.Array:
        """float32 [L + 1, B, T, D]: what enters the first layer, then what leaves each, the last before the final norm.

        UserError as of `logits`.
        """
        return self._outputs(tokens_BT)[1]

    def _outputs(self, tokens_BT: Any) -> tuple[jax.Array, jax.Array]:
        tokens = np.asarray(tokens_BT)
        rows = len(self.tables.input)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise UserError(f"tokens: must be ids of shape [B, T], got {tokens.dtype} {list(tokens.shape)}")
        if not tokens.shape[1]:
            raise UserError(f"tokens: must hold at least one position, got {list(tokens.shape)}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < rows:
            raise UserError(f"tokens: must be from 0 to {rows - 1}, got {tokens.min()} to {tokens.max()}")
        if tokens.shape[1] > self.config.seq_len:
            raise UserError(f"tokens: the model has {self.config.seq_len} positions, got {tokens.shape[1]}")
        with jax.default_matmul_precision("highest"):
            logits_BTV, states_LBTD = _forward(self.config, self._on_device, jnp.asarray(tokens))
        return logits_BTV, states_LBTD

    @cached_property
    def _on_device(self) -> Any:
        return jax.tree.map(jnp.asarray, (self.tables.input, self.tables.output, self.body))


@jax.jit(static_argnums=0)
def _forward(cfg: ModelConfig, params: Any, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    input_VD, output_VD, body = params
    h_BTD: Any
    states_LBTD: Any
    h_BTD, states_LBTD = Transformer(cfg).apply(body, input_VD[tokens_BT], hidden_states=True)
    return capped(cfg, jnp.einsum("btd,vd->btv", h_BTD, output_VD)), states_LBTD


def load_model(path: str | Path) -> Model:
    """Reads a local Hugging Face directory of a family that is known.

    UserError for any other, for a form of it that ours does not have, and where a tensor is missing or left over.
    """
    model, cfg = checked_folder(path)
    by_role = {role: _read(table) for role, table in model.tables().items()}
    one = by_role.get("shared")
    tables = RunTables(*((by_role["input"], by_role["output"]) if one is None else (one, one)), tied=one is not None)
    return Model(model.path, model.family, cfg, tables, _body(model, cfg))


def checked_folder(path: str | Path) -> tuple[ModelFolder, ModelConfig]:
    """A directory that `load_model` reads, and the model's shape and arithmetic; numbers stay in the files.

    Two tables that may be one are compared block by block. UserError as of `load_model`.
    """
    folder = local_path(path, "DIR")
    if not is_model_folder(folder):
        raise UserError(f"{folder}: is no Hugging Face model: it holds no {CONFIG}")
    model = ModelFolder(folder)
    cfg = config_of(model)
    if model.tie.tied is None:
        raise UserError(f"{folder}: {missing_in_words(model)}")
    rows = next(iter(model.tables().values())).shape[0]
    if rows != cfg.vocab_size:
        raise UserError(f"{folder}: its tables have {rows} rows, and its config says {cfg.vocab_size}")
    _refuse_misfit(model, cfg)
    return model, cfg


def config_of(model: ModelFolder) -> ModelConfig:
    """Ours for that model. UserError for what ours does not have."""
    family = FAMILIES[model.family]
    where = str(model.path / CONFIG)
    try:
        return ModelConfig(**family.config(Settings(model.text_config, where)), dtype="float32", scan_layers=False)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None


def _read(tensor: Tensor) -> np.ndarray:
    whole = np.empty(tensor.shape, np.float32)
    for a, b in tensor.blocks():
        whole[a:b] = tensor.rows(a, b)
    return whole


def _held(model: ModelFolder, cfg: ModelConfig) -> Iterator[tuple[Held, str]]:
    """The body's tensors, and what the directory calls each. UserError for one that is missing."""
    family = FAMILIES[model.family]
    for held in family.held(cfg):
        name = next((name for name in family.names(held.tensor) if name in model.tensors), None)
        if name is None:
            raise UserError(f"{model.path}: lacks {held.tensor!r}, which a {model.family} model has")
        yield held, name


def _refuse_misfit(model: ModelFolder, cfg: ModelConfig) -> None:
    """UserError unless every tensor is used and every parameter found, by their names and shapes."""
    shapes = nn.unbox(jax.eval_shape(lambda: init_body(cfg, jax.random.key(0))))["params"]
    wanted = {name: leaf.shape for name, leaf in flat(shapes).items()}
    besides = FAMILIES[model.family].besides
    left = {name for name in model.tensors if not (is_buffer(name) or name.startswith(besides))}
    left -= set(model.names.values())
    found: set[str] = set()
    for held, name in _held(model, cfg):
        left.discard(name)
        shape = model.tensors[name].shape
        if not shape:
            raise UserError(f"{model.path}: {name!r} is a single number, which does not fit its config")
        try:
            parts = held.split(np.broadcast_to(np.float32(0), shape))
        except ValueError:
            parts = ()
        fits = {key for key, part in zip(held.parameters, parts, strict=False) if part.shape == wanted.get(key)}
        if fits != set(held.parameters):
            raise UserError(f"{model.path}: {name!r} has the shape {list(shape)}, which does not fit its config")
        found |= fits
    if left:
        raise UserError(f"{model.path}: holds {min(left)!r}, which a {model.family} model of its config does not have")
    if missing := wanted.keys() - found:
        raise AssertionError(f"{model.family}: {min(missing)} is in no tensor")


def _body(model: ModelFolder, cfg: ModelConfig) -> dict[str, Any]:
    """The body's variables."""
    found: dict[str, np.ndarray] = {}
    for held, name in _held(model, cfg):
        parts = held.split(_read(model.tensors[name]))
        found |= {key: np.ascontiguousarray(part) for key, part in zip(held.parameters, parts, strict=True)}
    return {"params": nested(found)}


def flat(tree: Any) -> dict[str, Any]:
    """The leaves of nested dicts by their paths, as layer_0/mlp/up/kernel."""
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """What `flat` makes of it."""
    tree: dict[str, Any] = {}
    for path, array in leaves.items():
        *folders, last = path.split("/")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = array
    return tree
