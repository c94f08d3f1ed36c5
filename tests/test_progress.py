"""What stands on the screen while a command works: every line of a real process, word for word."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from programs import finish, tiedjax
from runs import STEPS, arguments, rows, start_commands, write_text

from tiedjax.data.prepared import Prepared, load_prepared

WRITES = "will write 6 snapshots (252.80 KiB) and keep 1 of 1 states (134.40 KiB)"


def without_clock(output: str) -> list[str]:
    """The lines, each duration and each rate as `#`, without the progress that only a slow machine shows."""
    lines = [re.sub(r"\([\d,]+ per second\)", "(# per second)", line) for line in output.splitlines()]
    lines = [re.sub(r"[\d.]+ s$", "# s", line) for line in lines if not line.endswith(" left")]
    goes_on = lambda line, after: line.startswith(("scan:", "tokenize:")) and line.split(":")[0] == after.split(":")[0]
    return [line for line, after in pairwise([*lines, ""]) if not goes_on(line, after)]


def preparation(source: str, prepared: Prepared, documents: int, vocab_size: int) -> list[str]:
    """The lines that preparing takes, from what it leaves."""
    train, held_out = prepared.num_tokens("train"), prepared.num_tokens("eval")
    return [
        f"preparing {source} ...",
        f"scan: {documents} documents, # s",
        f"train a tokenizer of {vocab_size} entries",
        f"tokenize: {documents} of {documents} documents, {train + held_out:,} tokens (# per second), # s",
        f"data: {train:,} train tokens in {prepared.documents['train']} documents, {held_out:,} eval tokens in "
        f"{prepared.documents['eval']} documents; {prepared.directory}",
    ]


def cached(cache: Path) -> Prepared:
    """The one preparation in a cache."""
    (folder,) = (cache / "prepared").iterdir()
    return load_prepared(folder)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Text that was never prepared, with an empty cache."""
    monkeypatch.setenv("TIEDJAX_CACHE", str(tmp_path / "cache"))
    return write_text(tmp_path / "text.jsonl", seed=1)


def test_training_says_when_it_prepares_and_when_it_compiles_and_each_once(fresh: Path, tmp_path: Path) -> None:
    commands = [arguments(tmp_path / f"run-{seed}", fresh, {"train.seed": seed}) for seed in (0, 1)]
    out, err = finish(start_commands([*commands, commands[1]]))
    steps = []
    for seed in (0, 1):
        first, *_, last = rows(tmp_path / f"run-{seed}")
        shown = [f"loss {row['loss']:.3f}  output share {row['output_grad_share']:.2f}" for row in (first, last)]
        steps.append(
            [
                f"run-{seed}  1/{STEPS}  {shown[0]}",
                f"run-{seed}  {STEPS}/{STEPS}  {shown[1]}  held-out {last['eval_loss']:.3f}",
            ]
        )
    assert without_clock(out) == [
        *preparation(f"text:{fresh}", cached(tmp_path / "cache"), 80, 320),
        f"run-0: {WRITES}",
        "run-0: compiling the train step ...",
        *steps[0],
        f"run-1: {WRITES}",
        *steps[1],  # whose data and step are there already
        f"run-1: nothing to do, {STEPS} of {STEPS} steps are done",
    ]
    assert err == ""


def test_data_prepare_says_what_it_does_beside_its_result(fresh: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    options = ["--vocab-size", "300", "--holdout", "0.1"]
    out, err = tiedjax("data", "prepare", f"text:{fresh}", "--out", folder, *options)
    assert out == f"data.source: prepared:{folder}\n"
    assert without_clock(err) == preparation(f"text:{fresh}", load_prepared(folder), 80, 300)
