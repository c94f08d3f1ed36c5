"""Another's model and a text: what instruments read where they otherwise read a run and the text that it was shown."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tiedjax.analysis.basis.run_data import prepared_text
from tiedjax.config import DataConfig, RunConfig, TrainConfig, TyingConfig
from tiedjax.data.prepared import Prepared
from tiedjax.errors import UserError
from tiedjax.files import local_path
from tiedjax.interop import ModelFolder, Rows, missing_in_words

EMBEDDED = "embedded"  # the text where none is named
MOST_POSITIONS = 512  # of a window unless asked for: scores of all pairs of positions are held on a CPU
_READY = ("tokens", "prepared")  # kinds of sources that need no tokenizer


class ModelOnText:
    """A Hugging Face directory and a text that it is measured on. Nothing is read before it is asked for.

    Instruments take it where they take a `Run`, and its `prepared` where they take a run's text:

        model = ModelOnText("smollm2", "text:*.txt")
        lens(FrozenModel(model), model, model.prepared)

    Whatever they say of the text that a run was shown (token counts, n-grams, what is fitted) is then said of the
    training part of this text: the model was trained on another.

    Attributes:
      path: the directory.
      source: the text, as `data.source` names one; documents are held out of it as of a run's.

    UserError, now or later, for a directory that is no model, and for a text that its tokenizer cannot read.
    """

    checkpoint_steps: tuple[int, ...] = ()

    def __init__(self, path: str | Path, source: str | None = None, seq_len: int | None = None):
        self.path = local_path(path, "DIR")
        self.source = source or EMBEDDED
        self._folder, self._seq_len = ModelFolder(self.path), seq_len

    def __repr__(self) -> str:
        return f"ModelOnText({str(self.path)!r}, {self.source!r})"

    @cached_property
    def seq_len(self) -> int:
        """Positions of a window of text: as asked for, otherwise all that the model has, at most MOST_POSITIONS."""
        from tiedjax.interop.inspection import sizes_of

        positions = sizes_of(self._folder.text_config).get("positions")
        if self._seq_len is None:
            return min(MOST_POSITIONS, positions or MOST_POSITIONS)
        if self._seq_len < 1 or self._seq_len > (positions or self._seq_len):
            most = f"1 to {positions:,}, the positions of {self.path}" if positions else "at least 1"
            raise UserError(f"--seq-len: must be {most}, got {self._seq_len}")
        return self._seq_len

    @property
    def tokenizer_path(self) -> Path | None:
        """Its tokenizer.json, if it has one."""
        return self._folder.tokenizer_path

    @cached_property
    def config(self) -> RunConfig:
        """That of a run of this model that reads the training part of its text once. UserError for an unknown form."""
        from tiedjax.interop.model import config_of

        whole = config_of(self._folder)
        alike = len(set(whole.windows)) == 1  # a loop has one compiled layer for all
        model = dataclasses.replace(whole, seq_len=self.seq_len, scan_layers=alike)
        tying = TyingConfig(scheme="tied" if self._folder.tie.tied else "untied")
        windows = len(self.prepared.windows("train", self.seq_len))
        train = TrainConfig(steps=-(-windows // self.data.batch_size))
        return RunConfig(model=model, tying=tying, data=self.data, train=train)

    @cached_property
    def data(self) -> DataConfig:
        """How its text becomes tokens: by its own tokenizer."""
        if self.tokenizer_path is not None:
            return DataConfig(source=self.source, tokenizer=str(self.tokenizer_path))
        if self.source.partition(":")[0] not in _READY:
            raise UserError(
                f"{self.path}: holds no tokenizer.json to read text with; save its tokenizer there, or give token ids: "
                "--data tokens:GLOB"
            )
        return DataConfig(source=self.source)

    @cached_property
    def prepared(self) -> Prepared:
        """Its text as tokens, from the cache or prepared now; windows begin as the model's own tokenizer begins texts.

        UserError where that is with a token that has no row.
        """
        begin_id = self._folder.begin_id
        if begin_id is not None and begin_id >= self._rows:
            raise UserError(
                f"{self.path}: its tokenizer begins texts with token {begin_id}, and it has {self._rows} rows"
            )
        return dataclasses.replace(prepared_text(self.data, self._rows), begin_id=begin_id)

    @cached_property
    def token_counts(self) -> np.ndarray:
        """int64 [2, V]: how often each token is an input and a target in one pass over the training part of its text.

        Every row of the table has a count; padding has 0.
        """
        return self.prepared.token_counts(self.seq_len, self._rows)

    def tables(self) -> Any:
        """Its two tables, `input` and `output`, [V, D] each, one and the same where tied; rows are read from the file.

        UserError where one is missing.
        """
        from tiedjax.run import RunTables

        if self._folder.tie.tied is None:
            raise UserError(f"{self.path}: {missing_in_words(self._folder)}")
        by_role: dict[str, Any] = {role: Rows(tensor) for role, tensor in self._folder.tables().items()}
        one = by_role.get("shared")
        return RunTables(*((by_role["input"], by_role["output"]) if one is None else (one, one)), tied=one is not None)

    def params(self, step: int | None = None) -> dict[str, Any]:
        """{"tables", "body"} as NumPy float32, layers that are alike stacked. UserError for a step."""
        if step is not None:
            raise UserError(f"{self.path}: a model has no steps; leave out {step}")
        from tiedjax.interop.model import load_model
        from tiedjax.tying import distinct

        model = load_model(self.path)
        body = model.layers_as(scanned=bool(self.config.model.scan_layers))
        if "positions" in body.get("entry", {}):
            body["entry"] = body["entry"] | {"positions": body["entry"]["positions"][: self.seq_len]}
        return {"tables": distinct(model.tables), "body": {"params": body}}

    def scheme(self, step: int | None = None) -> Any:
        """How its tables come from those parameters."""
        from tiedjax.tying import scheme_of

        return scheme_of(self.config.tying)

    def describe(self) -> dict[str, Any]:
        """The text, as every result of a model states it."""
        return {
            "source": self.source,
            "fingerprint": self.prepared.fingerprint,
            "seq_len": self.seq_len,
            "begin_id": self._folder.begin_id,
            "training_tokens": self.prepared.num_tokens("train"),
            "held_out_tokens": self.prepared.num_tokens("eval"),
        }

    def in_words(self) -> str:
        """The same as the texts of commands say it."""
        of = self.describe()
        begun = "" if of["begin_id"] is None else f", each begun with token {of['begin_id']}"
        return (
            f"{self.source} ({of['training_tokens']:,} training and {of['held_out_tokens']:,} held-out tokens, windows "
            f"of {self.seq_len:,}{begun})"
        )

    @property
    def _rows(self) -> int:
        return next(iter(self._folder.tables().values())).shape[0]
