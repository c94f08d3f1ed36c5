"""A model directory: its config, its two tables, and whether these are one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tiedjax.errors import UserError
from tiedjax.files import parse_json, read_text
from tiedjax.interop.tensors import Tensor, equal, inside, read_tensors

CONFIG = "config.json"
FLOATS = ("float32", "bfloat16", "float16", "float64")
OnDisk = Literal["input alone", "output alone", "both, equal", "both, different"]


class TableNames(NamedTuple):
    """What a family calls its tables, and whether they are tied where its config does not say."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tied_by_default: bool


_LLAMA = TableNames(("model.embed_tokens.weight",), ("lm_head.weight",), False)
_GEMMA = _LLAMA._replace(tied_by_default=True)
_WITH_IMAGES = ("model.language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight")
_GPT2 = TableNames(("transformer.wte.weight", "wte.weight"), ("lm_head.weight",), True)
TABLE_NAMES: dict[str, TableNames] = {
    **dict.fromkeys(("llama", "olmo", "olmo2", "olmo3", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _GEMMA),
    "gemma3": TableNames((*_WITH_IMAGES, *_GEMMA.inputs), ("lm_head.weight", "language_model.lm_head.weight"), True),
    "gpt_neox": TableNames(
        ("gpt_neox.embed_in.weight", "embed_in.weight"), ("embed_out.weight", "lm_head.weight"), False
    ),
    "gpt2": _GPT2,
    "gpt_neo": _GPT2,
}


class Tie(NamedTuple):
    """Whether a model's tables are one: by its tensors and by its config.

    Attributes:
      tied: what to take them for; None where one table is missing though the config says that there are two.
      flag: `tie_word_embeddings` of the config; None where it does not say.
      default: what counts then.
      on_disk: which tables there are.
    """

    tied: bool | None
    flag: bool | None
    default: bool
    on_disk: OnDisk

    @property
    def scheme(self) -> Literal["tied", "untied"]:
        """The scheme of a run that begins with such tables."""
        return "tied" if self.tied else "untied"

    @classmethod
    def of(cls, flag: bool | None, default: bool, on_disk: OnDisk) -> Tie:
        """By what is there first, then by what the config says of it."""
        says = default if flag is None else flag
        if on_disk == "both, different":
            return cls(False, flag, default, on_disk)
        if on_disk == "both, equal":
            return cls(says, flag, default, on_disk)
        return cls(True if says else None, flag, default, on_disk)


def config_in_words(tie: Tie, family: str) -> str:
    """What the config says of the tables."""
    if tie.flag is not None:
        return f"tie_word_embeddings: {str(tie.flag).lower()}"
    return f"no tie_word_embeddings, which for {family} means {str(tie.default).lower()}"


def transformers_in_words(tie: Tie) -> str:
    """What transformers 5 makes of tables like these."""
    says = tie.default if tie.flag is None else tie.flag
    if tie.on_disk == "both, different":
        return "keeps both, warns, and writes tie_word_embeddings: true again" if says else "keeps both"
    if says:
        return "ties them"
    if tie.on_disk == "both, equal":
        return "keeps both, equal as they are"
    missing = "output" if tie.on_disk == "input alone" else "input"
    return f"begins the {missing} table at random values"


def missing_in_words(model: ModelFolder) -> str:
    """Why a role of this model has no table, where it has none."""
    there = "input" if model.tie.on_disk == "input alone" else "output"
    missing = "output" if there == "input" else "input"
    says = config_in_words(model.tie, model.family)
    return f"it has no {missing} table, though its config says that it has two ({says}); only #{there} can be read"


def refuse_filled(folder: Path) -> None:
    """UserError where something is in the place of a directory that is to be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already; choose another --out")


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new directory beside `folder`, which gets its name when the block ends without an error, and goes otherwise.

    What a killed process left in its place is removed. UserError where nothing can be written.
    """
    temporary = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.tmp"
    with contextlib.ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _held(folder.parent, wait=True):  # so that none is removed between its making and its hold
                _remove_unfinished(folder)
                temporary.mkdir()
                stack.callback(shutil.rmtree, temporary, ignore_errors=True)
                stack.enter_context(_held(temporary))
            yield temporary
            if folder.exists():
                folder.rmdir()
            temporary.rename(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def _held(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds a directory until the block or the process ends.

    False where another process holds it, unless it is waited for, or where the file system lets none be held.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(handle)


def _remove_unfinished(folder: Path) -> None:
    """Removes what processes that are no more left of `folder`; what lies where no directory can be held stays."""
    for entry in list(folder.parent.iterdir()):
        if re.fullmatch(rf"\.{re.escape(folder.name)}\.[0-9a-f]+\.tmp", entry.name):
            with contextlib.suppress(OSError), _held(entry) as held:
                if held:
                    shutil.rmtree(entry, ignore_errors=True)


def is_model_folder(path: Path) -> bool:
    """Whether this is a directory with a config.json."""
    return path.is_dir() and (path / CONFIG).exists()


@dataclass(frozen=True)
class ModelFolder:
    """A local directory with config.json and weights. Nothing is read before it is asked for."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json. UserError for what is none."""
        path = inside(self.path, CONFIG)
        config = parse_json(read_text(path), str(path))
        if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
            raise UserError(f"{path}: has no 'model_type'; it must be the config of a Hugging Face model")
        return config

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """The part of it that is about text."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def family(self) -> str:
        """`model_type`. UserError where no family of that name is known."""
        name = str(self.config["model_type"])
        if name not in TABLE_NAMES:
            raise UserError(
                f"{self.path}: model_type {name!r} is not known; it is one of {', '.join(sorted(TABLE_NAMES))}"
            )
        return name

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return read_tensors(self.path)

    @cached_property
    def tokenizer_path(self) -> Path | None:
        """tokenizer.json, if there is one."""
        path = inside(self.path, "tokenizer.json")
        return path if path.exists() else None

    @cached_property
    def begin_id(self) -> int | None:
        """The token that its tokenizer puts before every text, None where it puts none or there is no tokenizer."""
        from tiedjax.data.tokenizer import begin_id, parse_tokenizer

        if self.tokenizer_path is None:
            return None
        return begin_id(parse_tokenizer(read_text(self.tokenizer_path), str(self.tokenizer_path)))

    @cached_property
    def names(self) -> dict[str, str]:
        """The name of each role's table that is there; of a tied model perhaps one role alone."""
        family = TABLE_NAMES[self.family]
        candidates = {"input": family.inputs, "output": family.outputs}
        there = {role: [name for name in of if name in self.tensors] for role, of in candidates.items()}
        found = {role: names[0] for role, names in there.items() if names}
        if not found:
            raise UserError(
                f"{self.path}: holds no table; a {self.family} model has {' or '.join(family.inputs + family.outputs)}"
            )
        for name in found.values():
            if self.tensors[name].dtype not in FLOATS:
                raise UserError(
                    f"{self.path}: {name!r} is stored as {self.tensors[name].dtype}: quantised tables are not read; "
                    f"save the model in {', '.join(FLOATS[:-1])} or {FLOATS[-1]}"
                )
            if len(self.tensors[name].shape) != 2:
                raise UserError(f"{self.path}: {name!r} must be [V, D], got {list(self.tensors[name].shape)}")
        if len({self.tensors[name].shape for name in found.values()}) > 1:
            shapes = " and ".join(f"{name} {list(self.tensors[name].shape)}" for name in found.values())
            raise UserError(f"{self.path}: its tables differ in shape: {shapes}")
        return found

    @cached_property
    def tie(self) -> Tie:
        """Whether its tables are one."""
        flag = self.config.get("tie_word_embeddings", self.text_config.get("tie_word_embeddings"))
        if flag is not None and not isinstance(flag, bool):
            raise UserError(f"{self.path / CONFIG}: tie_word_embeddings must be true or false, got {flag!r}")
        if len(self.names) == 2:
            same = equal(*(self.tensors[name] for name in self.names.values()))
            on_disk: OnDisk = "both, equal" if same else "both, different"
        else:
            on_disk = "input alone" if "input" in self.names else "output alone"
        return Tie.of(flag, TABLE_NAMES[self.family].tied_by_default, on_disk)

    def tables(self) -> dict[str, Tensor]:
        """{"shared": table} of a tied model, else those of "input" and "output" that are there."""
        if self.tie.tied:
            return {"shared": self.tensors[self.names.get("input", self.names.get("output", ""))]}
        return {role: self.tensors[name] for role, name in self.names.items()}
