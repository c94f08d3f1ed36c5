"""A run that begins with the parameters of another: it starts where that one ended, tied or untied from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from runs import STEPS, arguments, assert_same_run, write_text

import tiedjax
from tiedjax import cli, lm, tying
from tiedjax.sharding import ONE_DEVICE


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "words.jsonl")


@pytest.fixture(scope="module")
def other_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of other words, which a tokenizer of its own would cut otherwise."""
    return write_text(tmp_path_factory.mktemp("other") / "words.jsonl", seed=7)


@pytest.fixture(scope="module")
def pretrained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "tied"
    assert cli.main(arguments(out, text, {"train.checkpoint_every": 4})) == 0
    return out


def loss_on(params: dict[str, Any], run: tiedjax.run.Run, step: int, tokens_BS: np.ndarray) -> float:
    """Of one batch, in float32, by the tables and the body of a run."""
    tables = run.scheme(step).tables(params["tables"])
    total, weight = lm.summed_loss(run.config, ONE_DEVICE, 0.0)(
        tying.Tables(*map(jax.numpy.asarray, tables)), params["body"], tokens_BS, np.ones(len(tokens_BS), np.float32)
    )
    return float(total) / float(weight)


@pytest.mark.parametrize("scheme", ["tied", "untied"])
def test_the_first_loss_is_the_other_run_s_to_the_bit(
    scheme: str, pretrained: Path, other_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On another text, under the other run's tokenizer; untied too, whose two tables are copies of the one."""
    out = tmp_path / "tuned"
    changes = {"train.init": pretrained, "tying.scheme": scheme, "train.seed": 9}
    assert cli.main(arguments(out, other_text, changes)) == 0
    assert f"tuned: begins with the parameters of {pretrained}\n" in capsys.readouterr().out
    tuned, before = tiedjax.load_run(out), tiedjax.load_run(pretrained)
    for role in ("input", "output"):
        np.testing.assert_array_equal(getattr(tuned.tables(0), role), getattr(before.tables(), role))
    assert tuned.tables(0).tied == (scheme == "tied")
    assert (out / "tokenizer.json").read_bytes() == (pretrained / "tokenizer.json").read_bytes()
    tokens_BS = np.random.default_rng(0).integers(0, 320, (8, 17)).astype(np.int32)
    start = {"tables": {role: getattr(tuned.tables(0), role) for role in ("input", "output")}}
    if scheme == "tied":
        start = {"tables": {"shared": tuned.tables(0).input}}
    params = before.params()
    ours = loss_on({**start, "body": params["body"]}, tuned, 0, tokens_BS)
    assert ours == loss_on(params, before, STEPS, tokens_BS)


def test_the_account_of_such_a_run_begins_with_the_tables_that_it_began_with(
    pretrained: Path, other_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tuned"
    assert cli.main(arguments(out, other_text, {"train.init": f"{pretrained}@4"})) == 0
    tuned, before = tiedjax.load_run(out), tiedjax.load_run(pretrained)
    np.testing.assert_array_equal(tuned.tables(0).input, before.tables(4).input)
    account = tuned.account()
    np.testing.assert_allclose(account.initial, np.exp(account.log_kept) * before.tables(4).input, rtol=1e-6)
    assert tuned.metrics["account_error"].max() < 1e-6


def test_such_a_run_continues_bit_for_bit_and_without_the_other(
    pretrained: Path, other_text: Path, tmp_path: Path
) -> None:
    whole, parts, elsewhere = tmp_path / "whole", tmp_path / "parts", tmp_path / "moved"
    changes = {"train.init": tmp_path / "other", "tying.scheme": "untied"}
    (tmp_path / "other").symlink_to(pretrained)
    assert cli.main(arguments(whole, other_text, changes)) == 0
    assert cli.main(arguments(parts, other_text, {**changes, "train.stop_at": 3})) == 0
    (tmp_path / "other").rename(elsewhere)
    assert cli.main(arguments(parts, other_text, changes)) == 0
    assert_same_run(parts, whole)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train.init": "nowhere"}, "train.init: nowhere: is no run directory: it holds no config.yaml"),
        ({"train.init": "RUN@5"}, "train.init: RUN: holds no checkpoint of step 5; there are 4, 8"),
        (
            {"train.init": "RUN", "model.d_ff": 48},
            "model.d_ff: is 48, that of train.init RUN is 32; give that",
        ),
        (
            {"train.init": "RUN", "tying.scheme": "low_rank"},
            "tying.scheme: a run of the low_rank scheme cannot begin with the tables of train.init RUN, which are of "
            "the tied scheme; take that, or untied for those of one table",
        ),
    ],
)
def test_what_cannot_be_begun_with_is_refused(
    changes: dict[str, Any], says: str, pretrained: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {key: str(value).replace("RUN", str(pretrained)) for key, value in changes.items()}
    assert cli.main(arguments(tmp_path / "run", text, given)) == 2
    assert capsys.readouterr().err == f"tiedjax: {says.replace('RUN', str(pretrained))}\n"
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_another_tokenizer_is_refused(
    pretrained: Path, other_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(tmp_path / "own", other_text, {"train.stop_at": 1})) == 0
    capsys.readouterr()
    changes = {"train.init": pretrained, "data.tokenizer": tmp_path / "own" / "tokenizer.json"}
    assert cli.main(arguments(tmp_path / "run", other_text, changes)) == 2
    says = f"data.tokenizer: is not that of train.init {pretrained}; leave it out to take that"
    assert capsys.readouterr().err == f"tiedjax: {says}\n"
