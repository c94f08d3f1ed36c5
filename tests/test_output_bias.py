"""The fixed unigram bias of the logits: what it is, that it stays, and that whatever evaluates the model has it."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import Once, random_tokens, small_config
from runs import STEPS, arguments, assert_same_run, rows, saved_state

import tiedjax
from tiedjax import cli, gradients, model, sample, step, tying
from tiedjax.analysis.basis.held_out import FrozenModel, evaluated_windows, training_windows
from tiedjax.analysis.basis.run_data import data_of
from tiedjax.analysis.instruments.contribution.contribution import contribution
from tiedjax.analysis.instruments.lens import training
from tiedjax.config import DataConfig
from tiedjax.data.counts import log_unigram
from tiedjax.sharding import make_mesh

# So small that before its first update the model says next to nothing but the bias; rows of padding are tokens too.
CHANGES = {"model.output_bias": "unigram", "optimizer.tables.init_std": 1e-4, "model.vocab_multiple": 64}
CHANGES |= {"model.vocab_size": 300, "optimizer.learning_rate": 1e-2, "data.microbatches": 2}


@pytest.fixture(scope="module")
def run(text: Path, once: Once) -> tiedjax.run.Run:
    def train(folder: Path) -> None:
        assert cli.main(arguments(folder / "run", text, CHANGES)) == 0

    return tiedjax.load_run(once("with_output_bias", train) / "run")


def test_the_bias_is_the_log_of_smoothed_counts() -> None:
    bias_V = log_unigram(np.array([3, 0, 1]))
    np.testing.assert_allclose(bias_V, np.log([3.5 / 5.5, 0.5 / 5.5, 1.5 / 5.5]), rtol=1e-6)
    assert bias_V.dtype == np.float32


def test_a_run_saves_the_bias_of_its_targets_and_never_trains_it(run: tiedjax.run.Run) -> None:
    count_V = run.token_counts[1].astype(np.float64)
    assert len(count_V) == 320
    assert (count_V == 0).sum() >= 20
    expected = np.log((count_V + 0.5) / (count_V.sum() + len(count_V) / 2))
    np.testing.assert_allclose(run.params()["output_bias"], expected, rtol=1e-6)
    np.testing.assert_array_equal(run.params()["output_bias"], log_unigram(run.token_counts[1]))
    about_the_bias = [name for name in saved_state(run.path, STEPS) if "output_bias" in name]
    assert about_the_bias == ["params/output_bias"]  # no moments


def test_the_loss_starts_near_the_unigram_entropy_and_falls(run: tiedjax.run.Run) -> None:
    """It is what the first batch costs a unigram, which differs from the entropy by the choice of 128 tokens."""
    count_V, losses = run.token_counts[1], [row["loss"] for row in rows(run.path)]
    first_BS = next(training_windows(run, data_of(run), 10**6))
    np.testing.assert_allclose(losses[0], -run.params()["output_bias"][first_BS[:, 1:]].mean(), atol=1e-3)
    share_V = count_V / count_V.sum()
    entropy = -np.sum(share_V * np.log(np.where(share_V > 0, share_V, 1)))
    assert abs(losses[0] - entropy) < 0.2 < np.log(len(count_V)) - entropy - 1
    assert losses[-1] < losses[0]


def test_analysis_gives_the_held_out_loss_of_the_run(run: tiedjax.run.Run) -> None:
    model = FrozenModel(run)
    prepared = data_of(run)
    tokens_WS = evaluated_windows(run, prepared)
    eval_loss = rows(run.path)[-1]["eval_loss"]
    bits_WT = model.bits(tokens_WS)
    np.testing.assert_allclose(bits_WT.mean() * np.log(2), eval_loss, rtol=1e-5)
    assert contribution(model, tokens_WS).loss.mean == pytest.approx(bits_WT.mean(), rel=1e-5)
    params, tables = run.params(), run.tables()
    h_BTD = np.asarray(run.model().apply(params["body"], tables.input[tokens_WS[:, :-1]]), np.float64)
    logits = h_BTD @ np.float64(tables.output).T + params["output_bias"]  # as a notebook has them
    log_p = scipy.special.log_softmax(logits, axis=-1)
    by_hand = -np.take_along_axis(log_p, tokens_WS[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(bits_WT * np.log(2), by_hand, rtol=1e-4)


def test_the_lens_of_the_last_state_is_the_prediction_itself(run: tiedjax.run.Run) -> None:
    """With the bias on both sides the divergence is 0 at the last state, and its slope is that of the definition."""
    model = FrozenModel(run)
    tokens_WS = evaluated_windows(run, data_of(run))[:4]
    last_ND, x_ND = model.last_states(tokens_WS), model.states(tokens_WS, slice(0, 1))[0]
    lesson, D = training.teacher(model, last_ND), last_ND.shape[1]

    def divergence(theta_ED: jax.Array, x_ND: np.ndarray) -> jax.Array:
        final_NV = model.log_probabilities(model.normed(last_ND))
        lens_NV = model.log_probabilities(training.translated(model.config, model.norm, theta_ED, jnp.asarray(x_ND)))
        return jnp.mean(jnp.sum(jnp.exp(final_NV) * (final_NV - lens_NV), axis=-1))

    loss_and_slope = lambda theta_ED, x_ND: training._loss_and_slope(
        model.config, model.norm, theta_ED, jnp.asarray(x_ND), *lesson[:2], model.U_VD, model.bias_V
    )
    zero_ED = jnp.zeros((D + 1, D))
    assert abs(loss_and_slope(zero_ED, last_ND)[0]) < 1e-5
    value, slope_ED = jax.value_and_grad(divergence)(zero_ED, x_ND)
    found, found_ED = loss_and_slope(zero_ED, x_ND)
    assert value > 1e-3
    np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found_ED, slope_ED, atol=1e-3 * float(jnp.abs(slope_ED).max()))


def test_sampling_draws_by_the_bias(run: tiedjax.run.Run) -> None:
    """The likeliest token after a prompt, of logits written down by hand; without the bias it is another."""
    params, tables = run.params(), run.tables()
    prompt_BP = evaluated_windows(run, data_of(run))[:16, :4]
    h_BPD = np.asarray(run.model().apply(params["body"], tables.input[prompt_BP]))
    logits_BV = h_BPD[:, -1] @ tables.output.T
    drawn = {}
    for name, bias_V in {"with": params["output_bias"], "without": None}.items():
        drawn[name] = sample.continue_tokens(
            run.config.model,
            tying.Tables(tables.input, tables.output),
            params["body"],
            prompt_BP,
            1,
            bias_V=bias_V,
            temperature=0,
            key=jax.random.key(0),
        )[:, 0]
    np.testing.assert_array_equal(drawn["with"], (logits_BV + params["output_bias"])[:, :300].argmax(-1))
    np.testing.assert_array_equal(drawn["without"], logits_BV[:, :300].argmax(-1))
    assert (drawn["with"] != drawn["without"]).any()
    assert sample.sample_text(run, tokens=1, temperature=0)


def test_a_continued_run_has_the_same_bias_and_the_same_bits(run: tiedjax.run.Run, text: Path, tmp_path: Path) -> None:
    for changes in ({"train.stop_at": 3}, {}):
        assert cli.main(arguments(tmp_path / "run", text, {**CHANGES, **changes})) == 0
    assert_same_run(tmp_path / "run", run.path)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_have_the_bias_and_none_of_its_own(parts: int) -> None:
    """dL/dU = (softmax(h U^T + bias) - onehot)^T h / N by hand; the anatomy is of that gradient too."""
    cfg = small_config("untied", output_bias="unigram", data=DataConfig(batch_size=8, microbatches=parts))
    steps = step.make_steps(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), steps.init(jax.random.key(0)).params)
    params["output_bias"] = np.log(np.random.default_rng(0).dirichlet(np.ones(cfg.model.table_rows)))
    tokens_BS = random_tokens(cfg)
    one = tying.Tables(jnp.float32(1), jnp.float32(1))
    _, (grads, roles, _) = jax.jit(gradients.loss_and_gradients(cfg))(params, tokens_BS, one)
    E, U = params["tables"]["input"], params["tables"]["output"]
    h_ND = np.asarray(model.Transformer(cfg.model).apply(params["body"], E[tokens_BS[:, :-1]])).reshape(-1, 16)
    p_NV = scipy.special.softmax(h_ND @ U.T + params["output_bias"], axis=-1)
    r_NV = p_NV - np.eye(len(U))[tokens_BS[:, 1:].reshape(-1)]
    np.testing.assert_allclose(roles.output, r_NV.T @ h_ND / len(h_ND), rtol=0, atol=1e-12)
    assert grads.keys() == {"tables", "body"}
    common = np.sum(np.outer(r_NV.mean(0), h_ND.mean(0)) ** 2) / np.sum((r_NV.T @ h_ND / len(h_ND)) ** 2)
    share = jax.jit(gradients.anatomy(cfg))(params, tokens_BS, None)["output_common_share"]
    np.testing.assert_allclose(share, common, rtol=1e-10)
