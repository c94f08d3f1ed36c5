"""The text of several runs: looked for once where their data are the same, refused where it is another run's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tiedjax.analysis.basis import run_data
from tiedjax.analysis.basis.run_data import data_of, data_of_several
from tiedjax.errors import UserError
from tiedjax.run import load_run


def test_the_text_that_runs_share_is_looked_for_once_and_compared_with_each(finished: Path, monkeypatch):
    run = load_run(finished)
    looked_for = []
    prepare = run_data.prepare
    monkeypatch.setattr(
        run_data, "prepare", lambda *args, report: looked_for.append(args) or prepare(*args, report=report)
    )
    text = data_of_several()
    assert text(run) is text(load_run(finished))
    assert looked_for == [(run.config.data, run.config.model.vocab_size)]
    assert text(run).fingerprint == data_of(run).fingerprint
    other = SimpleNamespace(config=run.config, token_counts=run.token_counts + 1, path=run.path, tokenizer_path=None)
    with pytest.raises(UserError, match=r"was trained on other text than .* holds now; say where it is by --data"):
        text(other)
