"""A cap on the logits: whatever computes them from states and a table has it, or refuses."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.special
from conftest import Once
from runs import arguments, rows

import tiedjax
from tiedjax import cli, sample, tying
from tiedjax.analysis.basis.held_out import FrozenModel, evaluated_windows
from tiedjax.analysis.basis.run_data import data_of
from tiedjax.analysis.instruments.contribution.contribution import contribution
from tiedjax.analysis.instruments.regret.refit import HeldLoss
from tiedjax.config import ModelConfig, RunConfig, TrainConfig
from tiedjax.errors import UserError

CAP = 0.9
# Tables so long that most products are above the cap; some layers have a window, and scores a cap of their own.
CHANGES = {
    "model.logit_cap": CAP,
    "model.attention_cap": 0.5,
    "model.layers": 2,
    "model.window": 3,
    "model.window_layers": "window,full",
    "optimizer.tables.init_std": 1.0,
    "train.snapshot_every": 4,
}


@pytest.fixture(scope="module")
def run(text: Path, once: Once) -> tiedjax.run.Run:
    def train(folder: Path) -> None:
        assert cli.main(arguments(folder / "run", text, CHANGES)) == 0

    return tiedjax.load_run(once("with_logit_cap", train) / "run")


def by_hand(run: tiedjax.run.Run, tokens_WT: np.ndarray) -> np.ndarray:
    """Logits [W, T, V] in float64, from the last states."""
    tables = run.tables()
    h_WTD = np.asarray(run.model().apply(run.params()["body"], tables.input[tokens_WT]), np.float64)
    return CAP * np.tanh(h_WTD @ np.float64(tables.output).T / CAP)


def test_every_loss_is_that_of_capped_logits(run: tiedjax.run.Run) -> None:
    tokens_WS = evaluated_windows(run, data_of(run))
    log_p = scipy.special.log_softmax(by_hand(run, tokens_WS[:, :-1]), axis=-1)
    nats_WT = -np.take_along_axis(log_p, tokens_WS[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(rows(run.path)[-1]["eval_loss"], nats_WT.mean(), rtol=1e-5)
    model = FrozenModel(run)
    np.testing.assert_allclose(model.bits(tokens_WS) * np.log(2), nats_WT, rtol=1e-4)
    last_CD = model.last_states(tokens_WS[:2])
    found_CV = model.log_probabilities(model.normed(last_CD))
    np.testing.assert_allclose(found_CV, log_p[:2].reshape(found_CV.shape), rtol=0, atol=1e-4)
    assert contribution(model, tokens_WS).loss.mean * np.log(2) == pytest.approx(nats_WT.mean(), rel=1e-5)
    held_loss = HeldLoss(model, tokens_WS, 100)
    assert held_loss.slopes(held_loss.trained).loss == pytest.approx(nats_WT.mean(), rel=1e-5)


def test_tokens_are_drawn_by_capped_logits(run: tiedjax.run.Run) -> None:
    """From a cache of windows: 20,000 draws after one prompt, against the probabilities by hand."""
    prompt_1P = evaluated_windows(run, data_of(run))[:1, :9]
    share_V = scipy.special.softmax(by_hand(run, prompt_1P)[0, -1][: run.config.model.vocab_size])
    tables = run.tables()
    drawn_B1 = sample.continue_tokens(
        run.config.model,
        tying.Tables(tables.input, tables.output),
        run.params()["body"],
        np.repeat(prompt_1P, 20_000, axis=0),
        1,
        key=jax.random.key(0),
    )
    counted_V = np.bincount(drawn_B1[:, 0], minlength=len(share_V))
    assert np.abs(counted_V - 20_000 * share_V).max() < 5 * np.sqrt(20_000 * share_V.max())
    assert share_V.max() < 3.5 * np.exp(2 * CAP) / len(share_V)  # without the cap it would be nearly 1


def test_a_tuned_lens_is_refused(run: tiedjax.run.Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert cli.main(["analyze", "lens", str(run.path)]) == 2
    line = f"tiedjax: lens: a translator is fitted to logits without a cap, and model.logit_cap is {CAP}\n"
    assert capfd.readouterr().err.endswith(line)


def test_the_output_gradient_is_not_taken_apart(run: tiedjax.run.Run) -> None:
    assert not any("output_push_share" in row for row in rows(run.path))
    with pytest.raises(UserError) as error:
        RunConfig(model=ModelConfig(logit_cap=30.0), train=TrainConfig(anatomy=True))
    assert str(error.value) == "train.anatomy: takes logits apart that have no cap; leave it out with a model.logit_cap"
