"""Regularisers: their gradients, what they leave alone, whose part of an update they are, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import penalties
import pytest
from conftest import GRADIENT_DESCENT, random_tokens, slow_but, small_config
from programs import OPTIMIZED
from runs import arguments, assert_same_run, write_text

import tiedjax
from tiedjax import cli, estimate, gradients, loop, step, tying
from tiedjax.analysis import account
from tiedjax.config import (
    OptimizerConfig,
    RegularisersConfig,
    RoleOptimizerConfig,
    RunConfig,
    TableOptimizerConfig,
    TyingConfig,
)
from tiedjax.cost.kernels import part_of
from tiedjax.errors import UserError
from tiedjax.sharding import ONE_DEVICE, make_mesh
from tiedjax.tying import Tables

WEIGHTS = {"cosine": 0.7, "orthogonality": 30.0, "mean": 4.0, "anchor": 0.3}
ROWS, TOKENS, WIDTH = 9, 7, 5


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    """Programs that a test compiled under its own patches are not the next one's."""
    step._make_steps.cache_clear()
    yield
    step._make_steps.cache_clear()


def regularised(scheme: str = "tied", weights: dict[str, float] | None = None, **changes: Any) -> RunConfig:
    cfg = small_config(scheme, **changes)
    return dataclasses.replace(cfg, regularisers=RegularisersConfig(**(WEIGHTS if weights is None else weights)))


def table_and_start(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """With a mean row that is not small, and rows of several lengths."""
    rng = np.random.default_rng(seed)
    table = (rng.standard_normal((ROWS, WIDTH)) + 0.5) * np.exp(rng.standard_normal((ROWS, 1)))
    return table, rng.standard_normal((ROWS, WIDTH))


def one_alone(name: str, tokens: int = TOKENS) -> RunConfig:
    return regularised(weights={name: 1.0}, vocab_size=tokens, vocab_multiple=3, d_model=WIDTH - 1)


def ours(name: str, table: Any, start: Any, tokens: int = TOKENS) -> tuple[float, np.ndarray]:
    """The value and the gradient that a run with this regulariser alone has."""
    of = lambda E_VD: tying.penalty(one_alone(name, tokens), name, Tables(E_VD, E_VD), {"shared": jnp.asarray(start)})
    found, gradient = jax.value_and_grad(of)(jnp.asarray(table))
    return float(found), np.asarray(gradient)


# ---- The functions ----


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", penalties.NAMES)
@pytest.mark.parametrize("tokens", [TOKENS, ROWS])
def test_value_and_gradient_are_those_of_the_definition_in_float64(name: str, tokens: int) -> None:
    table, start = table_and_start()
    value, gradient = ours(name, table, start, tokens)
    assert value == pytest.approx(penalties.value(name, table, tokens, start), rel=1e-12)
    np.testing.assert_allclose(gradient, penalties.gradient(name, table, tokens, start), rtol=1e-11, atol=1e-14)
    numeric = np.zeros_like(table)
    for at in np.ndindex(table.shape):
        moved = [table.copy(), table.copy()]
        for each, sign in zip(moved, (1, -1), strict=True):
            each[at] += sign * 1e-5
        numeric[at] = np.subtract(*(penalties.value(name, each, tokens, start) for each in moved)) / 2e-5
    np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-8)
    assert np.abs(gradient[:tokens]).min() > 0
    assert not gradient[tokens:].any()


@pytest.mark.parametrize("name", penalties.NAMES)
def test_the_gradient_in_float32_is_that_of_float64(name: str) -> None:
    table, start = (each.astype(np.float32) for each in table_and_start())
    value, gradient = ours(name, table, start)
    expected = penalties.gradient(name, table, TOKENS, start)
    assert gradient.dtype == np.float32
    assert value == pytest.approx(penalties.value(name, table, TOKENS, start), rel=1e-5)
    assert np.linalg.norm(gradient - expected) < 1e-5 * np.linalg.norm(expected)


def test_a_row_of_zeros_has_no_direction_and_no_gradient() -> None:
    table, start = (each.astype(np.float32) for each in table_and_start())
    table[2] = 0
    value, gradient = ours("cosine", table, start)
    others = np.delete(table[:TOKENS], 2, axis=0)
    n = TOKENS - 1
    assert value == pytest.approx(penalties.value("cosine", others, n, others) * n * (n - 1) / TOKENS / n, rel=1e-5)
    assert np.isfinite(gradient).all()
    assert not gradient[2].any()


@pytest.mark.usefixtures("float64")
def test_orthogonality_is_0_for_columns_of_one_length_and_the_gradient_that_of_a_fixed_c() -> None:
    rng = np.random.default_rng(3)
    columns = 1.7 * np.linalg.qr(rng.standard_normal((ROWS, WIDTH)))[0]
    assert ours("orthogonality", columns, columns, ROWS)[0] == pytest.approx(0, abs=1e-15)
    table = table_and_start()[0]
    c = np.sum(table**2) / ROWS / WIDTH

    def fixed(E_VD: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(E_VD.T @ E_VD / ROWS - c * jnp.eye(WIDTH)))

    np.testing.assert_allclose(ours("orthogonality", table, table, ROWS)[1], jax.grad(fixed)(table), rtol=1e-10)


# ---- In a run ----


class Trained:
    """A run of a few updates: its states, before each and after the last, and their metrics."""

    def __init__(self, cfg: RunConfig, count: int = 3, dtype: Any = jnp.float32, optimized: bool = False):
        self.steps = step.make_steps(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
        unshared = tying.unshared_rows(cfg.tying, cfg.model, np.arange(cfg.model.table_rows))
        widened = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
        state = jax.tree.map(widened, self.steps.init(jax.random.key(1), None, unshared))
        self.states, self.metrics = [jax.tree.map(jnp.copy, state)], []
        decile_V = np.zeros(cfg.model.table_rows, np.int32)
        others = tying.role_scale(cfg.tying), decile_V
        train: Any = self.steps.train
        if optimized:
            train = train.lower(state, random_tokens(cfg), *others).compile(compiler_options=OPTIMIZED)
        for i in range(count):
            state, metrics = train(state, random_tokens(cfg, i), *others)
            self.states.append(jax.tree.map(jnp.copy, state))
            self.metrics.append(metrics)


def tables_of(cfg: RunConfig, state: step.TrainState) -> dict[str, np.ndarray]:
    tables = tying.scheme_of(cfg.tying).tables(state.params["tables"])
    return {name: np.asarray(E_VD) for name, E_VD in tying.distinct(tables).items()}


def mesh_of(cfg: RunConfig) -> jax.sharding.Mesh:
    return make_mesh(cfg.mesh, jax.devices()[:1])


def deciles(cfg: RunConfig) -> np.ndarray:
    return np.zeros(cfg.model.table_rows, np.int32)


def plain(state: step.TrainState) -> step.TrainState:
    """What a run without regularisers has of a state."""
    tables = {name: table._replace(regulariser_mu=None) for name, table in state.opt_state.tables.items()}
    account = state.account and state.account._replace(regulariser=None)
    return state._replace(opt_state=state.opt_state._replace(tables=tables), account=account, anchor=None)


def paths(tree: Any) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scheme", ["tied", "untied", "partial_dims"])
def test_an_update_gains_minus_the_rate_times_the_gradient_and_the_rest_of_a_step_stays(scheme: str) -> None:
    cfg = regularised(scheme, optimizer=GRADIENT_DESCENT, vocab_size=30, vocab_multiple=4)
    with_them, off = Trained(cfg, 2, jnp.float64), dataclasses.replace(cfg, regularisers=RegularisersConfig())
    begun, alone = tables_of(cfg, with_them.states[0]), step.make_steps(off, mesh_of(off)).train
    for i, (before, after) in enumerate(zip(with_them.states, with_them.states[1:], strict=False)):
        found = with_them.metrics[i]
        given = {name: (E, 30, begun[name]) for name, E in tables_of(cfg, before).items()}
        values = [w * penalties.value(kind, *each) for each in given.values() for kind, w in WEIGHTS.items()]
        assert float(found["regulariser"]) == pytest.approx(sum(values), rel=1e-9)
        gradient = {
            name: sum(w * penalties.gradient(kind, *each) for kind, w in WEIGHTS.items())
            for name, each in given.items()
        }
        if scheme == "partial_dims":  # what both share gets the sum of both gradients, of its own columns
            both = sum(gradient.values())
            gradient = {name: np.concatenate([both[:, :8], each[:, 8:]], axis=1) for name, each in gradient.items()}
        given_alone = jax.tree.map(jnp.copy, plain(before)), random_tokens(cfg, i), tying.role_scale(cfg.tying)
        without, metrics = alone(*given_alone, deciles(cfg))
        new = tables_of(cfg, after)
        for name, E in tables_of(cfg, without).items():
            np.testing.assert_allclose(new[name] - E, -0.1 * gradient[name], rtol=0, atol=2e-9)
            assert np.abs(new[name] - E).max() > 1e-4
        for name in ("loss", "input_grad_norm", "output_grad_norm", "role_grad_cosine", "activation_grad_norm"):
            assert float(found[name]) == pytest.approx(float(metrics[name]), rel=1e-12)
        assert float(found["grad_norm"]) != pytest.approx(float(metrics["grad_norm"]), rel=1e-3)
        bodies = (each.params["body"] for each in (after, without))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), *bodies)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scheme", tying.SCHEMES)
def test_every_scheme_is_regularised_by_its_distinct_tables(scheme: str) -> None:
    """What its arrays get is the gradient of the tables, by hand, through the scheme."""
    cfg = regularised(scheme, optimizer=GRADIENT_DESCENT, layers=1)
    run = Trained(cfg, 2, jnp.float64)
    state, arrays, start = run.states[1], run.states[1].params["tables"], tables_of(cfg, run.states[0])
    tables, n = tables_of(cfg, state), cfg.model.vocab_size
    values = [w * penalties.value(kind, tables[e], n, start[e]) for e in tables for kind, w in WEIGHTS.items()]
    assert float(run.metrics[1]["regulariser"]) == pytest.approx(sum(values), rel=1e-9)
    gradient = [
        jnp.asarray(sum(w * penalties.gradient(kind, tables[e], n, start[e]) for kind, w in WEIGHTS.items()))
        for e in tables
    ]
    of_tables = Tables(gradient[0], gradient[1] if len(gradient) > 1 else jnp.zeros_like(gradient[0]))
    of_arrays = tying.scheme_of(cfg.tying).transposed(arrays, of_tables)
    size = np.sqrt(sum(np.sum(np.square(each)) for each in of_arrays.values()))
    assert float(run.metrics[1]["regulariser_grad_norm"]) == pytest.approx(size, rel=1e-9)


def test_weights_of_zero_change_no_bit_and_add_no_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of them is in the program; and as weights tend to 0, that with them gives the same parameters."""
    off = regularised(weights=dict.fromkeys(WEIGHTS, 0.0))
    assert off == small_config()
    least = Trained(regularised(weights=dict.fromkeys(WEIGHTS, 1e-30)), 5, optimized=True)
    step._make_steps.cache_clear()
    monkeypatch.setattr(tying, "penalty", None)
    monkeypatch.setattr(tying, "anchored", None)
    without = Trained(off, 5, optimized=True)
    jax.tree.map(np.testing.assert_array_equal, without.states[-1], plain(least.states[-1]))
    assert set(least.metrics[0]) - set(without.metrics[0]) == {
        "regulariser",
        "regulariser_grad_norm",
        *(f"regulariser_{name}_{what}" for name in WEIGHTS for what in ("update_norm", "loss_change")),
    }
    assert set(paths(least.states[0])) - set(paths(without.states[0])) == {
        *(f".opt_state.tables['shared'].regulariser_mu['{name}']" for name in WEIGHTS),
        *(f".account.regulariser['shared']['{name}']" for name in WEIGHTS),
        ".anchor['shared']",
    }
    given = without.states[0], random_tokens(off), tying.role_scale(off.tying), deciles(off)
    assert "/regularisers/" not in without.steps.train.lower(*given).as_text(debug_info=True)


@pytest.mark.parametrize("kind", slow_but(["adamw", "coupled", "sgd"], "adamw"))
@pytest.mark.parametrize("scheme", ["tied", "untied"])
def test_keeping_an_account_changes_parameters_by_rounding_alone(kind: str, scheme: str) -> None:
    tables = TableOptimizerConfig(kind=kind)  # type: ignore[arg-type]
    ends = []
    for form in ("off", "whole"):
        cfg = regularised(scheme, optimizer=OptimizerConfig(learning_rate=0.02, clip_norm=0.1, tables=tables))
        cfg = dataclasses.replace(cfg, tying=dataclasses.replace(cfg.tying, account=form))
        ends.append(Trained(cfg, 4))
    params = [run.states[-1].params for run in ends]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), *params)
    held = [[path for path in paths(run.states[0]) if "regulariser" in path] for run in ends]
    assert not held[0]
    assert held[1]


def test_clipping_limits_the_gradient_with_the_regularisers_in_it() -> None:
    """Which is the norm of the body's gradient and of what both roles and the regularisers have in the table's."""
    clipped = dataclasses.replace(GRADIENT_DESCENT, clip_norm=1e-3)
    cfg = regularised(weights={"anchor": 0.0, "mean": 1e4}, optimizer=clipped)
    run = Trained(cfg, 1)
    before, after = (state.params["tables"]["shared"] for state in run.states)
    metrics, n = run.metrics[0], cfg.model.vocab_size
    size = 1e4 * np.linalg.norm(penalties.gradient("mean", before, n, before))
    assert float(metrics["regulariser_grad_norm"]) == pytest.approx(size, rel=1e-4)
    assert float(metrics["grad_norm"]) > 0.8 * size > 10 * float(metrics["output_grad_norm"])
    assert float(metrics["clip_factor"]) == pytest.approx(1e-3 / float(metrics["grad_norm"]), rel=1e-6)
    assert 0.8e-4 < np.linalg.norm(after - before) <= 1e-4 * (1 + 1e-4)


def test_their_kernels_are_a_part_of_the_step_by_themselves() -> None:
    """Also the products, which are not the body's."""
    cfg = regularised(weights={"orthogonality": 1.0})
    steps = step.make_steps(cfg, mesh_of(cfg))
    given = steps.abstract, random_tokens(cfg), tying.role_scale(cfg.tying), deciles(cfg)
    program = steps.train.lower(*given).compile().as_text()
    scopes = set(re.findall(r'op_name="([^"]*/regularisers/[^"]*dot_general)"', program))
    assert scopes
    assert {part_of(where, "dot", product=True) for where in scopes} == {"regularisers"}


# ---- Whose part ----


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("kind", "form", "scheme", "rates"),
    [
        *((kind, form, "tied", None) for kind in ("adamw", "coupled", "sgd") for form in ("whole", "checked")),
        ("adamw", "whole", "tied", (0.3, 0.05)),
        ("adamw", "checked", "tied", (0.3, 0.05)),
        ("adamw", "whole", "low_rank", None),
        ("sgd", "whole", "untied", None),
    ],
)
def test_parts_and_decay_sum_to_the_update(
    kind: str, form: str, scheme: str, rates: tuple[float, float] | None
) -> None:
    """Of every array; an array of one role has a part of each regulariser too."""
    own = [RoleOptimizerConfig(learning_rate=rate) for rate in rates or (None, None)]
    tables = TableOptimizerConfig(kind=kind, input=own[0], output=own[1], centered=scheme == "tied")  # type: ignore[arg-type]
    options = OptimizerConfig(learning_rate=0.1, warmup_steps=2, weight_decay=0.2, clip_norm=0.1, tables=tables)
    cfg = regularised(scheme, optimizer=options, tying=TyingConfig(scheme=scheme, account=form))  # type: ignore[arg-type]
    run = Trained(cfg, 4, jnp.float64)
    optimizer = step._optimizer(cfg, ONE_DEVICE)
    for before, after in zip(run.states, run.states[1:], strict=False):
        rows_of = after.account.rows if after.account else None
        for name, parts in optimizer.last_parts(after.opt_state, rows_of).items():
            kept = (1 - parts.decay) * before.params["tables"][name]
            if scheme == "tied":
                kept -= kept.mean(axis=0, keepdims=True)
            written = [*(part for part in parts.roles if part is not None), *parts.regulariser.values()]
            np.testing.assert_allclose(kept + sum(written), after.params["tables"][name], rtol=0, atol=1e-12)
            for regulariser, part in parts.regulariser.items():
                centred_away = regulariser == "mean" and scheme == "tied"  # which moves all rows alike, sizes apart
                assert np.abs(part).max() > 1e-7 or centred_away or after is not run.states[-1]
            assert list(parts.regulariser) == sorted(WEIGHTS)
            assert len(written) == (6 if name == "shared" else 5)


@pytest.mark.usefixtures("float64")
def test_each_of_two_regularisers_has_the_part_of_its_own_first_moment() -> None:
    """Both by hand, from the table before every update; they share the second moment with the roles."""
    weights = {"mean": 40.0, "anchor": 3.0}
    options = OptimizerConfig(learning_rate=0.1, warmup_steps=2, weight_decay=0.2, clip_norm=0.1)
    cfg = regularised(weights=weights, optimizer=options, tying=TyingConfig(account="checked"))
    run, optimizer = Trained(cfg, 4, jnp.float64), step._optimizer(cfg, ONE_DEVICE)
    start, n = np.asarray(run.states[0].params["tables"]["shared"]), cfg.model.vocab_size
    moments = dict.fromkeys(weights, np.zeros_like(start))
    written = dict.fromkeys(weights, np.zeros_like(start))
    for i, (before, after) in enumerate(zip(run.states, run.states[1:], strict=False)):
        E, table = np.asarray(before.params["tables"]["shared"]), after.opt_state.tables["shared"]
        parts = optimizer.last_parts(after.opt_state, after.account.rows)["shared"]  # type: ignore[union-attr]
        factor, rate = float(run.metrics[i]["clip_factor"]), float(run.metrics[i]["learning_rate"])
        size = np.sqrt(np.asarray(table.nu) / (1 - options.b2 ** (i + 1))) + options.eps
        assert factor < 1
        for kind, weight in weights.items():
            gradient = factor * weight * penalties.gradient(kind, E, n, start)
            moments[kind] = options.b1 * moments[kind] + (1 - options.b1) * gradient
            np.testing.assert_allclose(table.regulariser_mu[kind], moments[kind], rtol=1e-6, atol=1e-12)
            part = -rate * moments[kind] / (1 - options.b1 ** (i + 1)) / size
            np.testing.assert_allclose(parts.regulariser[kind], part, rtol=2e-6, atol=1e-12)
            written[kind] = (1 - rate * options.weight_decay) * written[kind] + part
            of_account = after.account.regulariser["shared"][kind]  # type: ignore[union-attr, index]
            np.testing.assert_allclose(of_account, written[kind], rtol=0, atol=1e-7)
    assert all(np.abs(each).max() > 1e-3 for each in written.values())


@pytest.mark.usefixtures("float64")
def test_the_input_role_s_step_share_is_of_a_second_moment_that_has_regularisers_in_it() -> None:
    cfg = regularised(optimizer=OptimizerConfig(clip_norm=None))
    run, by_role = Trained(cfg, 3, jnp.float64), jax.jit(gradients.loss_and_gradients(cfg))
    start, n = np.asarray(run.states[0].params["tables"]["shared"]), cfg.model.vocab_size
    from_input, whole = 0.0, 0.0
    for i, state in enumerate(run.states[:-1]):
        E = np.asarray(state.params["tables"]["shared"])
        of_roles = by_role(state.params, random_tokens(cfg, i), tying.role_scale(cfg.tying))[1][1]
        of_input, of_output = map(np.asarray, of_roles)
        total = of_input + of_output + sum(w * penalties.gradient(kind, E, n, start) for kind, w in WEIGHTS.items())
        from_input = 0.95 * from_input + 0.05 * np.sum(of_input * total)
        whole = 0.95 * whole + 0.05 * np.sum(np.square(total))
    assert float(run.metrics[-1]["input_step_share"]) == pytest.approx(from_input / whole, rel=1e-6)


def test_first_order_changes_have_that_by_each_regulariser() -> None:
    """It is the inner product of the next batch's gradient, both roles', with what that one wrote."""
    cfg = regularised(tying=TyingConfig(account="checked"))
    run = Trained(cfg, 3)
    optimizer = step._optimizer(cfg, ONE_DEVICE)
    by_role = jax.jit(gradients.loss_and_gradients(cfg))
    for i in (1, 2):
        state, metrics = run.states[i], run.metrics[i]
        part = optimizer.last_parts(state.opt_state, state.account.rows)["shared"]  # type: ignore[union-attr]
        G = sum(
            np.asarray(each) for each in by_role(state.params, random_tokens(cfg, i), tying.role_scale(cfg.tying))[1][1]
        )
        changes = {kind: float(np.sum(G * np.asarray(wrote))) for kind, wrote in part.regulariser.items()}
        for kind, expected in changes.items():
            assert float(metrics[f"regulariser_{kind}_loss_change"]) == pytest.approx(expected, rel=1e-3, abs=1e-7)
        written = [np.asarray(each) for each in (*part.roles, *part.regulariser.values())]
        before = np.asarray(state.params["tables"]["shared"]) - sum(written)
        decay = float(part.decay)
        assert float(metrics["decay_loss_change"]) == pytest.approx(-decay / (1 - decay) * np.sum(G * before), rel=1e-3)
        now = optimizer.last_parts(run.states[i + 1].opt_state, state.account.rows)["shared"]  # type: ignore[union-attr]
        for kind, wrote in now.regulariser.items():
            norm = np.linalg.norm(wrote)
            assert float(metrics[f"regulariser_{kind}_update_norm"]) == pytest.approx(norm, rel=1e-5)
    assert np.isnan(float(run.metrics[0]["regulariser_anchor_loss_change"]))


# ---- A run on the disk ----


@pytest.fixture(scope="module")
def anchored(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two regularisers."""
    out = tmp_path_factory.mktemp("regularised") / "run"
    assert cli.main(arguments(out, text, ON)) == 0
    return out


ON_NAMES = ("cosine", "anchor")
ON = {"regularisers.cosine": 50.0, "regularisers.anchor": 3.0}


def test_a_run_continues_bit_for_bit(anchored: Path, text: Path, tmp_path: Path) -> None:
    assert cli.main(arguments(tmp_path / "run", text, {**ON, "train.stop_at": 3})) == 0
    assert cli.main(arguments(tmp_path / "run", text, ON)) == 0
    assert_same_run(tmp_path / "run", anchored)


def test_the_shares_of_five_parts_sum_to_one(anchored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiedjax.load_run(anchored)
    parts, found, table = run.account(), account(run), run.tables().input
    assert list(parts.regularisers) == ["anchor", "cosine"]
    of_roles = parts.initial + parts.input + parts.output
    np.testing.assert_allclose(of_roles + sum(parts.regularisers.values()), table, rtol=0, atol=1e-6)
    for shares in (found.shares, *found.strata.values()):
        others = sum(shares.regularisers.values())
        assert shares.initial + shares.input + shares.output + others == pytest.approx(1, abs=1e-5)
    for name, wrote in parts.regularisers.items():
        along = np.sum(wrote * table) / np.sum(np.square(table))
        assert found.shares.regularisers[name] == pytest.approx(along, abs=1e-6)
        assert abs(along) > 1e-5
        assert sum(span.regularisers[name] for span in found.spans) == pytest.approx(along, abs=1e-6)
        logged = run.metrics[f"regulariser_{name}_loss_change"]
        assert found.changes[2].regularisers[name] == pytest.approx(np.nanmean(logged))
    span = found.spans[1]
    assert span.written == span.input + span.output + sum(span.regularisers.values())
    assert found.error is not None
    assert found.error < 1e-6
    assert cli.main(["analyze", "account", str(anchored)]) == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert lines[1] == ["tokens", "rows", "initial", "input", "output", "cosine", "anchor"]
    assert lines[2][-2:] == [f"{found.shares.regularisers[name]:.4f}" for name in ON_NAMES]
    assert (
        "initial: what is left of the first table; input, output: of what that role's updates wrote; cosine, anchor: "
        "of what that regulariser wrote; they sum to 1\n"
    ) in shown
    assert ["steps", "of", "all", "rates", "input", "output", "cosine", "anchor", "all"] in lines
    assert ["steps", "in<-in", "in<-out", "out<-in", "out<-out", "decay", "cosine", "anchor", "body"] in lines
    changes = [found.changes[1].regularisers[name] for name in ON_NAMES]
    shown_changes = next(line for line in lines if line[:1] == ["2-8"] and len(line) == 9)[6:8]
    assert shown_changes == [f"{1000 * change:.4f}" for change in changes if change is not None]


def test_the_anchor_of_a_run_that_begins_with_another_is_that_one_s_table(
    finished: Path, text: Path, tmp_path: Path
) -> None:
    """So that its regulariser is 0 in the first update, and then what the distance says."""
    changes = {"train.init": finished, "train.seed": 9, "regularisers.anchor": 2.0, "tying.scheme": "untied"}
    assert cli.main(arguments(tmp_path / "tuned", text, changes)) == 0
    run, began = tiedjax.load_run(tmp_path / "tuned"), tiedjax.load_run(finished).tables().input
    after = run.tables(1)
    logged = run.metrics["regulariser"]
    assert logged[0] == 0
    expected = [2.0 * penalties.value("anchor", E, 320, began) for E in (after.input, after.output)]
    assert min(expected) > 0
    assert logged[1] == pytest.approx(sum(expected), rel=1e-4)


@pytest.mark.parametrize("scheme", ["tied", "untied"])
def test_the_anchor_may_be_the_table_of_another_run(scheme: str, finished: Path, text: Path, tmp_path: Path) -> None:
    """Its newest one, or that of a step; of every table of this run, which needs it no more once it has begun."""
    other, weight = tmp_path / "other", {"regularisers.anchor": 2.0, "tying.scheme": scheme, "train.seed": 9}
    other.symlink_to(finished)
    for step_at, named in ((8, other), (1, f"{other}@1")):
        whole, parts = (tmp_path / f"{part}-{step_at}" for part in ("whole", "parts"))
        changes = {**weight, "regularisers.anchor_to": named}
        assert cli.main(arguments(whole, text, changes)) == 0
        run, near = tiedjax.load_run(whole), tiedjax.load_run(finished).tables(step_at).input
        logged = run.metrics["regulariser"]
        for at in (0, 1):
            tables = tying.distinct(run.tables(at)).values()
            expected = sum(2.0 * penalties.value("anchor", E, 320, near) for E in tables)
            assert expected > 0.01
            assert logged[at] == pytest.approx(expected, rel=1e-5)
        assert cli.main(arguments(parts, text, {**changes, "train.stop_at": 3})) == 0
        other.rename(tmp_path / "away")
        assert cli.main(arguments(parts, text, changes)) == 0
        assert_same_run(parts, whole)
        (tmp_path / "away").rename(other)


@pytest.mark.parametrize("scheme", ["tied", "untied", "low_rank"])
def test_what_is_saved_is_foreseen(scheme: str) -> None:
    """All that regularisers add to what a run's files take."""
    sizes = []
    for weights in (WEIGHTS, dict.fromkeys(WEIGHTS, 0.0)):
        cfg = regularised(scheme, weights)
        sizes.append((estimate._sizes(cfg), loop._sizes(step.make_steps(cfg, mesh_of(cfg)))))
    (foreseen, real), (foreseen_without, real_without) = sizes
    for field in ("tables", "account", "state"):
        more = [getattr(a, field) - getattr(b, field) for a, b in ((foreseen, foreseen_without), (real, real_without))]
        assert more[0] == more[1], field
    assert real.state > real_without.state


# ---- What is refused ----


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"tying": TyingConfig(untie_at=3)},
            "regularisers.cosine: cannot be given with tying.untie_at: it is added over the tables, of which there is "
            "another number after the change; leave one of the two out",
        ),
        (
            {"optimizer": OptimizerConfig(tables=TableOptimizerConfig(kind="by_role_matched"))},
            "regularisers.cosine: by_role_matched has moments of the roles alone, and this is of neither; set "
            "optimizer.tables.kind to adamw, coupled or sgd",
        ),
        (
            {
                "tying": TyingConfig(scheme="untied"),
                "optimizer": OptimizerConfig(
                    tables=TableOptimizerConfig(input=RoleOptimizerConfig(kind="by_role_lazy"))
                ),
            },
            "regularisers.cosine: by_role_lazy has moments of the roles alone, and this is of neither; set "
            "optimizer.tables.input.kind to adamw, coupled or sgd",
        ),
    ],
)
def test_where_regularisers_have_no_part_they_are_refused(changes: dict[str, Any], says: str) -> None:
    cfg = regularised(**changes)
    with pytest.raises(UserError) as error:
        step.make_steps(cfg, mesh_of(cfg))
    assert str(error.value) == says
    off = dataclasses.replace(cfg, regularisers=RegularisersConfig())
    step.make_steps(off, mesh_of(off))


def test_lion_takes_regularisers_without_an_account() -> None:
    options = OptimizerConfig(tables=TableOptimizerConfig(kind="lion"))
    run = Trained(regularised(tying=TyingConfig(account="off"), optimizer=options), 2)
    assert float(run.metrics[1]["regulariser"]) > 0
    assert "regulariser_cosine_update_norm" not in run.metrics[1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"regularisers.anchor_to": "nowhere"}, "nowhere: is no run directory: it holds no config.yaml"),
        ({"regularisers.anchor_to": "RUN@5"}, "RUN: holds no snapshot of step 5; there are 0, 1, 2, 4, 6, 8"),
        (
            {"model.d_model": 32},
            "RUN: its tables are [320, 16], those of this run [320, 32]; name one of this shape",
        ),
        (
            {"regularisers.anchor_to": "UNTIED"},
            "UNTIED: has two tables, and this run one; name a run of one table",
        ),
        (
            {"data.tokenizer": "OTHER"},
            "RUN: has another tokenizer; give that as data.tokenizer",
        ),
    ],
)
def test_an_anchor_that_the_run_cannot_have_is_refused(
    changes: dict[str, Any], says: str, finished: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untied, others = tmp_path / "untied", tmp_path / "others"
    assert cli.main(arguments(untied, text, {"tying.scheme": "untied", "train.stop_at": 1})) == 0
    assert cli.main(arguments(others, write_text(tmp_path / "other.jsonl", 5), {"train.stop_at": 1})) == 0
    names = {"RUN": finished, "UNTIED": untied, "OTHER": others / "tokenizer.json"}

    def named(value: Any) -> str:
        return functools.reduce(lambda done, name: done.replace(name, str(names[name])), names, str(value))

    capsys.readouterr()
    given = {"regularisers.anchor": 1.0, "regularisers.anchor_to": "RUN", **changes}
    assert cli.main(arguments(tmp_path / "run", text, {key: named(value) for key, value in given.items()})) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"tiedjax: regularisers.anchor_to: {named(says)}"
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_an_anchor_without_a_weight_is_refused() -> None:
    with pytest.raises(UserError) as error:
        RegularisersConfig(mean=1.0, anchor_to="runs/tied")
    assert str(error.value) == "anchor_to: is void without a weight of anchor; give it one, or leave this out"


def test_weights_below_0_are_refused() -> None:
    with pytest.raises(UserError, match=r"^cosine: must be >= 0, got -1.0$"):
        RegularisersConfig(cosine=-1.0)
