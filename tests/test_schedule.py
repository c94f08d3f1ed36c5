"""A run whose scheme changes: nothing jumps when it unties, moments are as its rule says, and it can be continued."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_tokens, slow_but, small_config
from programs import finish
from runs import STEPS, arguments, assert_same_run, start_commands, write_text

import tiedjax
from tiedjax import cli, gradients, optimizer, step, tying
from tiedjax.analysis.basis.tables import read_table
from tiedjax.config import OptimizerConfig, RoleOptimizerConfig, RunConfig, TableOptimizerConfig, TyingConfig
from tiedjax.errors import UserError
from tiedjax.sharding import make_mesh
from tiedjax.table_rules import TableRule, united, with_decay
from tiedjax.tying import Tables

CHANGE = 4  # of 10 updates
ONES = Tables(np.float32(1), np.float32(1))
ROLES = ("input", "output")


def config(**options: Any) -> RunConfig:
    hard = OptimizerConfig(learning_rate=0.02, warmup_steps=3, weight_decay=0.3, clip_norm=1e-2)
    sections = {"optimizer": hard} | {key: options.pop(key) for key in ("optimizer",) if key in options}
    return small_config(tying=TyingConfig(**options), **sections)


def one_device(cfg: RunConfig) -> Any:
    return make_mesh(cfg.mesh, jax.devices()[:1])


def loss_of(cfg: RunConfig, state: step.TrainState, update: int, batch: int) -> float:
    steps = step.make_steps(cfg, one_device(cfg), CHANGE if update > CHANGE else 0)
    loss, weight = steps.evaluate(state.params, random_tokens(cfg, batch), np.ones(cfg.data.batch_size, np.float32))
    return float(loss) / float(weight)


def trained(cfg: RunConfig, count: int, dtype: Any = jnp.float32) -> list[step.TrainState]:
    """The states after 0, 1, ... updates; the one that the change of scheme makes comes after that it is made of."""
    mesh = one_device(cfg)
    state = step.make_steps(cfg, mesh).init(jax.random.key(1))
    widened = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    states = [jax.tree.map(widened, state)]
    for update in range(1, count + 1):
        if update == CHANGE + 1:
            states.append(step.make_change(cfg, mesh, CHANGE)(jax.tree.map(jnp.copy, states[-1])))
        given = jax.tree.map(jnp.copy, states[-1])
        train = step.make_steps(cfg, mesh, CHANGE if update > CHANGE else 0).train
        states.append(train(given, random_tokens(cfg, update), ONES, np.zeros(cfg.model.table_rows, np.int32))[0])
    return states


@pytest.mark.parametrize("moments", ["copy", "split"])
def test_untying_changes_no_number_of_the_tables_and_not_the_loss(moments: str) -> None:
    cfg = config(untie_at=CHANGE, untie_moments=moments)
    *_, before, after = trained(cfg, CHANGE + 1)[: CHANGE + 2]
    for role in ROLES:
        np.testing.assert_array_equal(after.params["tables"][role], before.params["tables"]["shared"])
    jax.tree.map(np.testing.assert_array_equal, after.params["body"], before.params["body"])
    jax.tree.map(np.testing.assert_array_equal, after.opt_state.body, before.opt_state.body)
    assert int(after.step) == int(before.step) == CHANGE
    assert loss_of(cfg, before, CHANGE, 7) == pytest.approx(loss_of(cfg, after, CHANGE + 1, 7), abs=1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("moments", ["copy", "split"])
@pytest.mark.parametrize("account", slow_but(["whole", "checked", "off"], "whole"))
def test_the_moments_after_untying_are_those_of_a_hand_written_adamw(moments: str, account: str) -> None:
    """All updates of the tables from gradients alone, in NumPy: one v before; then each role's own, from its rule."""
    cfg = config(untie_at=CHANGE, untie_moments=moments, account=account)
    states, options = trained(cfg, 8, jnp.float64), cfg.optimizer
    rate = optimizer.learning_rate(options, cfg.train.steps)
    E = {role: np.asarray(states[0].params["tables"]["shared"], np.float64) for role in ROLES}
    m, v = ({role: np.zeros_like(E["input"]) for role in ROLES} for _ in range(2))
    v_shared = np.zeros_like(E["input"])
    for update in range(1, 9):
        tied = update <= CHANGE
        now = tying.stage(cfg, update > CHANGE)
        state = states[update - 1 if tied else update]
        _, (grads, roles, _) = jax.jit(gradients.loss_and_gradients(now))(
            state.params, random_tokens(cfg, update), ONES
        )
        leaves = jax.tree.leaves(grads)
        norm = np.sqrt(sum(float(jnp.sum(jnp.square(leaf.astype(jnp.float64)))) for leaf in leaves))
        g = {role: min(1, options.clip_norm / norm) * np.asarray(G) for role, G in zip(ROLES, roles, strict=True)}
        b1, b2, decay = options.b1, options.b2, options.weight_decay
        for role in ROLES:
            m[role] = b1 * m[role] + (1 - b1) * g[role]
            v[role] = b2 * v[role] + (1 - b2) * g[role] ** 2
        v_shared = b2 * v_shared + (1 - b2) * (g["input"] + g["output"]) ** 2
        if update == CHANGE + 1 and moments == "copy":  # the moments of the one table, then one more gradient each
            whole = {role: (m[role] - (1 - b1) * g[role]) / b1 for role in ROLES}
            before = (v_shared - (1 - b2) * (g["input"] + g["output"]) ** 2) / b2
            for role in ROLES:
                m[role] = b1 * (whole["input"] + whole["output"]) + (1 - b1) * g[role]
                v[role] = b2 * before + (1 - b2) * g[role] ** 2
        lr = float(rate(update - 1))
        for role in ROLES:
            first, second = (m["input"] + m["output"], v_shared) if tied else (m[role], v[role])
            direction = first / (1 - b1**update) / (np.sqrt(second / (1 - b2**update)) + options.eps)
            E[role] = E[role] - lr * (direction + decay * E[role])
    for role in ROLES:
        np.testing.assert_allclose(states[-1].params["tables"][role], E[role], rtol=0, atol=1e-7)
    moved = np.abs(E["input"] - E["output"]).max()
    assert moved > 1e-3, "the two tables have parted"


def test_copied_and_split_moments_take_different_ways() -> None:
    ends = [trained(config(untie_at=CHANGE, untie_moments=how), 6)[-1].params["tables"] for how in ("copy", "split")]
    for role in ROLES:
        assert np.abs(np.asarray(ends[0][role]) - np.asarray(ends[1][role])).max() > 1e-4


@pytest.mark.parametrize("kind", slow_but(["sgd", "coupled", "by_role", "lion"], "coupled", "by_role"))
def test_every_kind_whose_state_can_be_carried_goes_on(kind: str) -> None:
    tables = TableOptimizerConfig(kind=kind)  # type: ignore[arg-type]
    account = "off" if kind == "lion" else "auto"
    options = OptimizerConfig(learning_rate=0.01, tables=tables)
    for changes in ({"untie_at": CHANGE}, {"scheme": "untied", "tie_at": CHANGE, "tie_by": "output"}):
        cfg = config(account=account, optimizer=options, **changes)
        *_, last = trained(cfg, 6)
        later = step.make_steps(cfg, one_device(cfg), CHANGE).abstract
        assert jax.tree.map(jnp.shape, last) == jax.tree.map(lambda leaf: leaf.shape, later)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last))


def test_the_first_update_after_untying_says_nothing_of_the_one_before_it() -> None:
    """With copied moments the last update of each table is not what its moments say."""
    cfg = config(untie_at=CHANGE)
    state, mesh = trained(cfg, CHANGE + 1)[CHANGE + 1], one_device(cfg)
    deciles = np.zeros(cfg.model.table_rows, np.int32)
    train = step.make_steps(cfg, mesh, CHANGE).train
    state, first = train(state, random_tokens(cfg, 5), ONES, deciles)
    _, second = train(state, random_tokens(cfg, 6), ONES, deciles)
    assert np.isnan(first["m_in_in"])
    assert np.isfinite(second["m_in_in"])


@pytest.mark.parametrize("by", ["input", "output", "transform"])
def test_tying_late_keeps_the_table_that_it_says(by: str) -> None:
    cfg = config(scheme="untied", tie_at=CHANGE, tie_by=by)
    *_, before, after, _ = trained(cfg, CHANGE + 1)
    E, U = (np.asarray(before.params["tables"][role], np.float64) for role in ROLES)
    scheme = tying.scheme_of(tying.stage(cfg, changed=True).tying)
    tables = scheme.tables(after.params["tables"])
    np.testing.assert_array_equal(tables.input, U if by == "output" else E)
    expected = {"input": E, "output": U, "transform": E @ np.linalg.lstsq(E, U, rcond=None)[0]}[by]
    np.testing.assert_allclose(tables.output, expected, rtol=0, atol=1e-5)
    moments = after.opt_state.tables["shared"]
    for moment, name in ((moments.mu, "mu"), (moments.nu, "nu")):
        both = sum(np.asarray(getattr(before.opt_state.tables[role], name)) for role in ROLES)
        np.testing.assert_allclose(moment, both, rtol=1e-6)
    assert after.account is None


# ---- Runs ----


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "words.jsonl")


@pytest.mark.parametrize("changes", [{"tying.untie_at": 4}, {"tying.untie_at": 0.5, "tying.untie_moments": "split"}])
def test_a_run_that_unties_continues_bit_for_bit_from_before_at_and_after_it(
    changes: dict[str, Any], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main(arguments(whole, text, changes)) == 0
    said = capsys.readouterr().out
    found = re.search(
        r"whole: after step 4 each role has a table of its own; the next batch's loss goes from (\S+) to (\S+)\n", said
    )
    assert found, said
    assert found[1] == found[2]
    for last in (3, 4, 5):
        assert cli.main(arguments(parts, text, {**changes, "train.stop_at": last})) == 0
    assert cli.main(arguments(parts, text, changes)) == 0
    assert_same_run(parts, whole)
    run = tiedjax.load_run(whole)
    assert [run.tables(saved).tied for saved in run.snapshot_steps] == [True, True, True, True, False, False]
    account = run.account(4)
    np.testing.assert_allclose(account.initial + account.input + account.output, run.tables(4).input, rtol=0, atol=1e-6)
    with pytest.raises(UserError) as error:
        run.account()
    assert str(error.value) == (
        f"{whole}: has no account of one table: under untied each role has its own table, as it is after step 4"
    )
    assert list(run.scheme(4).trained) == ["shared"]
    last = run.scheme(STEPS).tables(run.params()["tables"])
    np.testing.assert_array_equal(last.output, run.tables().output)
    assert np.isnan(run.metrics["m_in_in"][4])
    assert np.isfinite(run.metrics["m_in_in"][5])


def test_a_run_that_unties_is_the_same_on_eight_devices(text: Path, tmp_path: Path) -> None:
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "tying.untie_at": 4, "tying.untie_moments": "split"}
    whole, parts, one = tmp_path / "whole", tmp_path / "parts", tmp_path / "one"
    commands = [
        arguments(whole, text, mesh),
        arguments(parts, text, {**mesh, "train.stop_at": 4}),
        arguments(parts, text, mesh),
    ]
    finish(start_commands(commands, devices=8))
    assert_same_run(whole, parts)
    assert cli.main(arguments(one, text, {"tying.untie_at": 4, "tying.untie_moments": "split"})) == 0
    losses = [tiedjax.load_run(run).metrics["loss"] for run in (whole, one)]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("when", "above"), [("output_update_share", 0.2), ("harm", -5.0)])
def test_a_run_unties_when_it_is_time_and_continues_bit_for_bit(
    when: str, above: float, text: Path, tmp_path: Path
) -> None:
    """At the first look, after update 20; what it looks at is the average of a hand-written loop."""
    changes = {"tying.untie_when": when, "tying.untie_above": above, "tying.untie_moments": "split", "train.steps": 24}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main(arguments(whole, text, changes)) == 0
    for last in (19, 20, 22):
        assert cli.main(arguments(parts, text, {**changes, "train.stop_at": last})) == 0
    assert cli.main(arguments(parts, text, changes)) == 0
    assert_same_run(parts, whole, 24)
    run = tiedjax.load_run(whole)
    assert run.changed_after == 20
    assert json.loads((whole / "untied.json").read_text()) == {"step": 20}
    assert [run.tables(saved).tied for saved in (18, 24)] == [True, False]
    m, num, den = run.metrics, 0.0, 0.0
    for i in range(20):
        now = (
            (m["output_update_share"][i], 1.0)
            if when == "output_update_share"
            else (m["m_in_out"][i] + m["m_out_in"][i], abs(m["m_in_in"][i] + m["m_out_out"][i]))
        )
        if np.isfinite(now).all():
            num, den = 0.95 * num + 0.05 * now[0], 0.95 * den + 0.05 * now[1]
            assert m["untie_watched"][i] == pytest.approx(num / den, rel=1e-4)
    assert np.isnan(m["untie_watched"][20:]).all()
    for record in ("{}", '{"step": -3}', '{"step": 20.5}', '{"step": true}', '{"step": 100000}', "no"):
        (whole / "untied.json").write_text(record)
        with pytest.raises(UserError) as error:
            tiedjax.load_run(whole).tables()
        assert (
            str(error.value) == f'{whole}/untied.json: must hold {{"step": N}}, the update after which the run untied'
        )


def test_a_run_for_which_it_is_never_time_stays_tied(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = {"tying.untie_when": "output_update_share", "tying.untie_above": 1, "train.steps": 24}
    assert cli.main(arguments(out, text, changes)) == 0
    run = tiedjax.load_run(out)
    assert run.changed_after is None
    assert run.tables().tied
    assert run.params()["tables"].keys() == {"shared"}


def test_a_decision_that_was_lost_and_is_not_made_again_leaves_no_trace(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = {"tying.untie_when": "output_update_share", "tying.untie_above": 1, "train.steps": 24}
    assert cli.main(arguments(out, text, {**changes, "train.stop_at": 12})) == 0
    (out / "untied.json").write_text('{"step": 20}\n')
    assert cli.main(arguments(out, text, changes)) == 0
    assert not (out / "untied.json").exists()
    assert tiedjax.load_run(out).tables().tied


def test_a_share_of_the_steps_is_never_all_of_them() -> None:
    assert tying.changes_after(config(untie_at=0.999)) == 9
    assert tying.changes_after(config(untie_at=0.001)) == 1


def test_a_decision_that_was_lost_with_the_states_since_is_made_again(text: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    changes = {"tying.untie_when": "output_update_share", "tying.untie_above": 0.2, "train.steps": 24}
    assert cli.main(arguments(whole, text, changes)) == 0
    assert cli.main(arguments(killed, text, {**changes, "train.stop_at": 12})) == 0
    (killed / "untied.json").write_text('{"step": 20}\n')  # and a kill before the next state
    assert cli.main(arguments(killed, text, changes)) == 0
    assert_same_run(killed, whole, 24)


def test_a_run_that_ties_late_says_what_that_costs(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for by, what in (
        ("output", "the roles have one table"),
        ("transform", "the output table is a transform of the input table"),
    ):
        out = tmp_path / by
        changes = {"tying.scheme": "untied", "tying.tie_at": 4, "tying.tie_by": by}
        assert cli.main(arguments(out, text, changes)) == 0
        said = capsys.readouterr().out
        found = re.search(rf"{by}: after step 4 {what}; the next batch's loss goes from (\S+) to (\S+)\n", said)
        assert found, said
        assert abs(float(found[2]) - float(found[1])) > 1e-3, "it jumps"
        assert tiedjax.load_run(out).tables().tied == (by == "output")


def test_a_change_may_be_decided_on_while_it_lies_ahead_and_not_later(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert cli.main(arguments(out, text, {"train.stop_at": 3})) == 0
    capsys.readouterr()
    assert cli.main(arguments(out, text, {"tying.untie_at": 2})) == 2
    says = "tying.untie_at: step 2 lies behind step 3, which the run has reached; give a later one\n"
    assert capsys.readouterr().err.endswith(says)
    assert cli.main(arguments(out, text, {"tying.untie_at": 4})) == 0
    assert cli.main(arguments(whole, text, {"tying.untie_at": 4})) == 0
    assert_same_run(out, whole)
    capsys.readouterr()
    assert cli.main(arguments(out, text)) == 2
    says = f"{out}: holds a run whose scheme changed after step 4; choose another --out or go back to it\n"
    assert capsys.readouterr().err.endswith(says)


def test_analysis_follows_a_run_by_the_tables_that_it_ends_with(text: Path, tmp_path: Path) -> None:
    """Two of a run that unties, from its start; one of a run that ties, from the step after which it has one."""
    untied, tied, out = tmp_path / "untied", tmp_path / "tied", tmp_path / "out.json"
    assert cli.main(arguments(untied, text, {"tying.untie_at": 4})) == 0
    assert cli.main(arguments(tied, text, {"tying.scheme": "untied", "tying.tie_at": 4})) == 0
    steps = {untied: {"input": [0, 1, 2, 4, 6, 8], "output": [0, 1, 2, 4, 6, 8]}, tied: {"shared": [6, 8]}}
    for run, expected in steps.items():
        assert cli.main(["analyze", "evolution", str(run), "--json", str(out)]) == 0
        found = json.loads(out.read_text())["roles"]
        assert {role: curve["steps"] for role, curve in found.items()} == expected
    for command in (["norms", f"{untied}#output"], ["align", f"{untied}#input", str(tied)], ["gradients", str(untied)]):
        assert cli.main(["analyze", *command, "--json", str(out)]) == 0
    assert read_table(str(tied)).initial() is None
    np.testing.assert_array_equal(read_table(f"{untied}#output").initial(), tiedjax.load_run(untied).tables(0).input)


# ---- What is refused ----


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"untie_at": 10}, "tying.untie_at: must be < train.steps = 10, got 10"),
        ({"untie_at": 1.5}, "tying.untie_at: must be a number of updates, or a share of them below 1, got 1.5"),
        (
            {"untie_at": 3, "tie_at": 5},
            "tying.tie_at: cannot be given with tying.untie_at; a run changes its scheme once",
        ),
        (
            {"scheme": "untied", "untie_at": 3},
            "tying.untie_at: needs a scheme with one table in both roles, tying.scheme is 'untied'",
        ),
        (
            {"scheme": "low_rank", "untie_at": 3},
            "tying.untie_at: needs a scheme with one table in both roles, tying.scheme is 'low_rank'",
        ),
        (
            {"tie_at": 3},
            "tying.tie_at: needs a scheme with a table for each role, tying.scheme is 'tied'",
        ),
        (
            {"untie_moments": "split"},
            "tying.untie_moments: split is for a run that unties; give tying.untie_at, or leave it out",
        ),
        (
            {"scheme": "untied", "tie_by": "transform"},
            "tying.tie_by: transform is for a run that ties; give tying.tie_at, or leave it out",
        ),
        (
            {"untie_at": 3, "untie_when": "harm", "untie_above": 0.1},
            "tying.untie_when: cannot be given with tying.untie_at; a run changes its scheme once",
        ),
        ({"untie_when": "harm"}, "tying.untie_when: needs tying.untie_above too; give both or neither"),
        ({"untie_above": 0.5}, "tying.untie_above: needs tying.untie_when too; give both or neither"),
        (
            {"untie_when": "harm", "untie_above": 0.1, "account": "off"},
            "tying.untie_when: looks at the account's metrics, and tying.account is off; set it to auto",
        ),
        (
            {"untie_at": 3, "output_update_share": 0.5},
            "tying.output_update_share: cannot be held in a run with tying.untie_at; leave one out",
        ),
    ],
)
def test_impossible_changes_are_refused(options: dict[str, Any], says: str) -> None:
    cfg = config(**options)
    with pytest.raises(UserError) as error:
        step.make_steps(cfg, one_device(cfg))
    assert str(error.value) == says


def test_an_optimizer_whose_state_is_not_another_table_s_is_refused() -> None:
    def refused(kind: str, own: str | None = None, **options: Any) -> str:
        tables = TableOptimizerConfig(kind=kind, output=RoleOptimizerConfig(kind=own))  # type: ignore[arg-type]
        cfg = config(optimizer=OptimizerConfig(tables=tables), **options)
        with pytest.raises(UserError) as error:
            step.make_steps(cfg, one_device(cfg))
        return str(error.value)

    assert refused("by_role_lazy", untie_at=3) == (
        "tying.untie_at: the state of optimizer.tables.kind by_role_lazy is not that of other tables; take adamw, sgd, "
        "coupled, by_role or lion"
    )
    assert refused("adamw", "sgd", scheme="untied", tie_at=3) == (
        "tying.tie_at: needs one kind of optimizer for all tables; optimizer.tables.output.kind is sgd, and that of "
        "the other adamw"
    )
    assert refused("sgd", untie_at=3, untie_moments="split") == (
        "tying.untie_moments: split is for optimizer.tables.kind adamw, got sgd; leave it out"
    )


def test_a_role_may_have_options_for_the_time_when_it_has_a_table() -> None:
    own = TableOptimizerConfig(output=RoleOptimizerConfig(weight_decay=0.9))
    options = OptimizerConfig(learning_rate=0.02, tables=own)
    plain, other = (
        trained(config(untie_at=CHANGE, optimizer=each), 6)
        for each in (dataclasses.replace(options, tables=TableOptimizerConfig()), options)
    )
    np.testing.assert_array_equal(plain[CHANGE].params["tables"]["shared"], other[CHANGE].params["tables"]["shared"])
    first = [states[CHANGE + 2].params["tables"] for states in (plain, other)]
    np.testing.assert_array_equal(first[0]["input"], first[1]["input"])
    assert np.abs(np.asarray(first[0]["output"]) - np.asarray(first[1]["output"])).max() > 1e-4


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["adamw", "coupled", "by_role"])
@pytest.mark.parametrize("ties", [False, True])
def test_another_decay_of_second_moments_changes_no_direction_at_the_change(kind: str, ties: bool) -> None:
    """Of a constant gradient Adam's direction is 1 before the change and after it, whatever b2 each side has."""

    def rule(role: str | None, b2: float) -> TableRule:
        writers = (role,) if role else ROLES
        return TableRule(kind, 0.9, b2, 0.0, None, writers, "off")

    one, both = jnp.ones((3, 2)), Tables(jnp.ones((3, 2)), jnp.ones((3, 2)))
    shared, apart = rule(None, 0.95), {role: rule(role, b2) for role, b2 in zip(ROLES, (0.95, 0.999), strict=True)}
    made = jnp.asarray(True)
    if ties:
        states = {role: apart[role].init(one, None) for role in ROLES}
        for _ in range(30):
            states = {role: apart[role].update(one, both, states[role], None, made=made)[1] for role in ROLES}
        own = Tables(*(with_decay(states[role], apart[role].b2, shared.b2) for role in ROLES))
        direction, _ = shared.update(2 * one, both, united(shared, own, None), None, made=made)
        # v of the sum of two equal gradients is four times each; united sums them, for gradients that do not correlate.
        before = {"adamw": 2 / np.sqrt(2), "coupled": 2 / np.sqrt(2), "by_role": 2.0}[kind]
        np.testing.assert_allclose(direction, before, rtol=0.03)
        return
    state = shared.init(one, None)
    for _ in range(30):
        gradient = one if kind != "by_role" else 2 * one
        state = shared.update(gradient, both, state, None, made=made)[1]
    for role, divided in shared.divided(state)._asdict().items():
        divided = with_decay(divided, shared.b2, apart[role].b2)
        direction, _ = apart[role].update(one, both, divided, None, made=made)
        np.testing.assert_allclose(direction, 1, rtol=1e-9)
