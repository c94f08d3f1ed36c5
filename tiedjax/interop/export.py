"""`tiedjax export`: a run, or a model directory, as a directory that Hugging Face's transformers reads.

It is written beside its place, read again, compared with what it came from, and then renamed: what is there is whole.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from tiedjax.config import ModelConfig
from tiedjax.data.tokenizer import end_id, parse_tokenizer
from tiedjax.errors import TrainingError, UserError
from tiedjax.files import local_path, place_and_step, read_text
from tiedjax.interop.families import FAMILIES, Family
from tiedjax.interop.families.common import PLAIN
from tiedjax.interop.folder import CONFIG, TABLE_NAMES, ModelFolder, is_model_folder, refuse_filled, written_whole
from tiedjax.interop.model import Model, flat, load_model, nested
from tiedjax.interop.tensors import Tensor, inside, write_safetensors
from tiedjax.lm import OUTPUT_BIAS
from tiedjax.model import init_body
from tiedjax.run import RunTables, load_run
from tiedjax.text import binary

TOLERANCE = 1e-5  # by which logits may differ, of the largest
# Of a model directory, beside its config and tensors, where they are there.
KEPT = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
    *("chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"),
)


@dataclass(frozen=True)
class Exported:
    """What was written: where, as which family, tied or not, bytes, and how far its logits are from the source's."""

    path: Path
    family: str
    tied: bool
    size: int
    difference: float
    largest: float

    def line(self) -> str:
        """All of it as a person reads it."""
        kind = f"{'tied' if self.tied else 'untied'} {self.family}"
        differ = f"logits differ by at most {self.difference:.1e}, the largest is {self.largest:.3g}"
        return f"{self.path}: {kind}, {binary(self.size)}; read again, its {differ}"


def export(source: str, out: str | Path, *, untie: bool = False) -> Exported:
    """Writes RUN[@STEP] or a model directory to the new directory `out`; with `untie` as two tables, equal now.

    UserError for what no family has, and where `out` is there already.
    """
    place, step = place_and_step(source)
    folder = local_path(out, "--out")
    refuse_filled(folder)
    path = local_path(place, "source")
    if is_model_folder(path):
        if step is not None:
            raise UserError(f"{source}: a model has no steps; name {place}")
        model, stored = load_model(path), ModelFolder(path).tensors
        if FAMILIES[model.family].besides:
            raise UserError(f"{path}: a {model.family} model is read and not written: what is of no text would be lost")
        family, kept = model.family, {name: inside(path, name) for name in KEPT if (path / name).exists()}
    else:
        model, tokenizer_path = _of_run(place, step)
        family, model = _family(model)
        stored, kept = {}, {} if tokenizer_path is None else {"tokenizer.json": tokenizer_path}
    tied = model.tables.tied and not untie
    with written_whole(folder) as temporary:
        _write(temporary, model, family, tied, stored, kept)
        difference, largest = _compared(model, load_model(temporary))
        size = sum(each.stat().st_size for each in temporary.iterdir())
    return Exported(folder, family, tied, size, difference, largest)


# ---- What is exported ----


def _of_run(place: str, step: int | None) -> tuple[Model, Path | None]:
    run = load_run(place)
    params = run.params(step)
    if OUTPUT_BIAS in params:
        raise UserError(f"{place}: model.output_bias: no family adds one to its logits; it must be none")
    at = run.checkpoint_steps[-1] if step is None else step
    tables = run.scheme(at).tables(params["tables"])
    cfg = run.config.model
    body = params["body"]["params"]
    if cfg.scan_layers:
        layers = body["layers"]
        body = {name: part for name, part in body.items() if name != "layers"} | {
            f"layer_{i}": jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], layers) for i in range(cfg.layers)
        }
    V = cfg.vocab_size  # rows beyond it are padding
    one = tables.input is tables.output
    output_VD = np.asarray(tables.output, np.float32)[:V]
    both = RunTables(output_VD if one else np.asarray(tables.input, np.float32)[:V], output_VD, one)
    plain = dataclasses.replace(
        cfg, dtype="float32", scan_layers=False, remat="none", attention="auto", vocab_multiple=1
    )
    return Model(Path(place), "", plain, both, {"params": jax.tree.map(np.asarray, body)}), run.tokenizer_path


def _family(model: Model) -> tuple[str, Model]:
    """The family that has such a model, and the model with biases of zero where that family always has some.

    UserError, which names the key, where none has.
    """
    cfg = model.config
    cfg = dataclasses.replace(
        cfg,
        kv_heads=None if cfg.groups == cfg.heads else cfg.groups,
        head_width=None if cfg.key_width * cfg.heads == cfg.d_model else cfg.key_width,
    )
    given = (cfg.norm_bias, cfg.biases)
    options = [given]
    if cfg.norm == "layernorm":
        for more in (["mlp"], ["out", "mlp"], ["qkv", "out", "mlp"]):
            biases = sorted({*cfg.bias_names, *more}, key=("qkv", "out", "mlp").index)
            options.append((True, ",".join(biases)))
    nearest: list[tuple[int, str]] = []
    for norm_bias, biases_of in options:
        wanted = dataclasses.replace(cfg, norm_bias=norm_bias, biases=biases_of)
        for name, family in FAMILIES.items():
            unfit = list(_unfit(wanted, family))
            if not unfit:
                return name, dataclasses.replace(model, family=name, config=wanted, body=_with_zeros(model, wanted))
            far = sum(10 if key in ("norm", "mlp", "position") else 1 for key, _, _ in unfit)
            nearest.append((far, f"{unfit[0][0]}: {name} models must have {unfit[0][1]}, got {unfit[0][2]!r}"))
    raise UserError(f"{model.path}: model.{min(nearest)[1]}; no other family is nearer")


def _unfit(cfg: ModelConfig, family: Family) -> Iterator[tuple[str, str, Any]]:
    for key, allowed in {**PLAIN, **family.fits}.items():
        value = getattr(cfg, key)
        if allowed and value not in allowed:
            yield key, " or ".join(repr(each) for each in allowed), value


def _with_zeros(model: Model, cfg: ModelConfig) -> dict[str, Any]:
    shapes = nn.unbox(jax.eval_shape(lambda: init_body(cfg, jax.random.key(0))))["params"]
    there = flat(model.body["params"])
    return {
        "params": nested(
            {name: there.get(name, np.zeros(leaf.shape, np.float32)) for name, leaf in flat(shapes).items()}
        )
    }


# ---- Writing and comparing ----


def _write(
    folder: Path, model: Model, name: str, tied: bool, stored: Mapping[str, Tensor], kept: Mapping[str, Path]
) -> None:
    """`stored` are the tensors of the model directory that it comes from: those of the body are written as they lie."""
    family, cfg = FAMILIES[name], model.config
    body = flat(model.body["params"])
    dtypes = {tensor: of.dtype for tensor, of in stored.items()}
    usual = next(iter(dtypes.values()), "float32")
    tensors = {}
    for held in family.held(cfg):
        short = _as_it_was(held.tensor, stored, family)
        values = stored[short].whole if stored else held.join(tuple(body[each] for each in held.parameters))
        tensors[short] = values, dtypes.get(short, usual)
    names, tables = TABLE_NAMES[name], model.tables
    for tensor, table_VD in [(names.inputs[0], tables.input)] + ([] if tied else [(names.outputs[0], tables.output)]):
        short, first = (_as_it_was(each, stored, family) for each in (tensor, names.inputs[0]))
        values = stored[short].whole if short in stored else table_VD
        tensors[short] = values, dtypes.get(short, dtypes.get(first, usual))
    write_safetensors(folder / "model.safetensors", tensors)
    for file, source in kept.items():
        shutil.copyfile(source, folder / file)
    ids = {}
    if "tokenizer.json" in kept and "tokenizer_config.json" not in kept:
        tokenizer = parse_tokenizer(read_text(kept["tokenizer.json"]), str(kept["tokenizer.json"]))
        end = end_id(tokenizer, str(kept["tokenizer.json"]))
        ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
        spelled = dict.fromkeys(("bos_token", "eos_token", "pad_token"), tokenizer.id_to_token(end))
        _dump(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": cfg.seq_len, **spelled},
        )
    if "generation_config.json" not in kept:
        _dump(folder / "generation_config.json", ids)
    said = ModelFolder(model.path).config if stored else _said(model, family) | ids
    about = {"architectures": [family.architecture], "model_type": name}
    about |= {} if "dtype" in said else {"torch_dtype": usual}
    _dump(folder / CONFIG, {**about, **said, "tie_word_embeddings": tied})


def _said(model: Model, family: Family) -> dict[str, Any]:
    try:
        return family.written(model.config)
    except UserError as error:
        raise UserError(f"{model.path}: {error}") from None


def _as_it_was(tensor: str, stored: Mapping[str, Tensor], family: Family) -> str:
    """The name that the source gave the tensor, of those that the family has for it."""
    return next((name for name in family.names(tensor) if name in stored), tensor)


def _dump(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")


def _compared(source: Model, written: Model) -> tuple[float, float]:
    """The largest difference of their logits and the largest logit. TrainingError where they do not agree."""
    V, T = source.config.vocab_size, min(source.config.seq_len, 64)
    tokens = np.random.default_rng(0).integers(0, V, (2, T))
    expected = np.asarray(source.logits(tokens))
    difference = float(np.abs(np.asarray(written.logits(tokens)) - expected).max())
    largest = float(np.abs(expected).max())
    if not difference <= TOLERANCE * largest:
        raise TrainingError(f"{source.path}: what was written is another model: its logits differ by {difference:.1e}")
    return difference, largest
