"""A run whose scheme changes: one table until a step and a copy for each role after it, or two tables and then one.

Untying changes no number of the tables, so the loss goes on where it was. What an update will do depends on the moments
too: `untie_moments` says what each role's are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tiedjax.config import ROLES, RunConfig, TyingConfig
from tiedjax.errors import UserError
from tiedjax.tying.account import follow
from tiedjax.tying.schemes import OPTIONS, scheme_of
from tiedjax.tying.tables import SHARED, Tables

WATCH = 0.95  # the decay of the average that decides on untying
LOOK_EVERY = 10  # updates; each look waits for the device
LOOK_FROM = 20
CARRIED = ("adamw", "sgd", "coupled", "by_role", "lion")  # kinds of optimizer whose state can be that of other tables


def changes_after(cfg: RunConfig) -> int | None:
    """After how many updates the scheme changes by the config; None if it never does, or if the run is to find out."""
    for when in (cfg.tying.untie_at, cfg.tying.tie_at):
        if when is not None:
            return when if isinstance(when, int) else max(1, min(round(when * cfg.train.steps), cfg.train.steps - 1))
    return None


def earliest_change(cfg: RunConfig) -> int | None:
    """After how many updates the scheme changes at the earliest; None if it never does."""
    return LOOK_FROM if cfg.tying.untie_when is not None else changes_after(cfg)


def changes(cfg: RunConfig) -> bool:
    """Whether the scheme of a run changes, or may."""
    return _unties(cfg.tying) or cfg.tying.tie_at is not None


def stage(cfg: RunConfig, changed: bool) -> RunConfig:
    """The config in force before the scheme of a run has changed, and after it: its own scheme and the rare-token gate,
    and no change to come.

    After it that of `cfg` itself where it never changes.
    """
    options = cfg.tying
    if not (changed and changes(cfg)):
        return cfg
    if _unties(options):
        later = TyingConfig(scheme="untied", account=options.account, rare_gate=options.rare_gate)
    else:  # whose account would be that of the time from the change on
        scheme: Any = "transform" if options.tie_by == "transform" else "tied"
        later = TyingConfig(scheme=scheme, account="off", rare_gate=options.rare_gate)
    return dataclasses.replace(cfg, tying=later)


def change_in_words(cfg: RunConfig) -> str:
    """What holds once the scheme of a run has changed."""
    if cfg.tying.tie_at is None:
        return "each role has a table of its own"
    if cfg.tying.tie_by == "transform":
        return "the output table is a transform of the input table"
    return "the roles have one table"


def keeps_squares(cfg: RunConfig) -> bool:
    """Whether the shared table's state has a second moment of each role, for the time when they part."""
    return _unties(cfg.tying) and cfg.tying.untie_moments == "split"


def _unties(options: TyingConfig) -> bool:
    return options.untie_at is not None or options.untie_when is not None


def watched(options: TyingConfig, before: jax.Array, metrics: Mapping[str, jax.Array]) -> jax.Array:
    """[2], the averages whose quotient is compared with `untie_above`, after an update with these metrics.

    `before` is what they were, 0 at the start; an update without a number changes nothing.
    """
    if options.untie_when == "harm":
        cost = metrics["m_in_out"] + metrics["m_out_in"]
        now = jnp.stack([cost, jnp.abs(metrics["m_in_in"] + metrics["m_out_out"])])
    else:
        now = jnp.stack([metrics["output_update_share"], jnp.ones(())])
    return jnp.where(jnp.isfinite(now).all(), WATCH * before + (1 - WATCH) * now, before)


def unties_now(cfg: RunConfig, update: int, value: Callable[[], float]) -> bool:
    """Whether a run that waits for `untie_when` unties after this update; only where it looks `value` is asked."""
    options = cfg.tying
    if options.untie_when is None or options.untie_above is None or update % LOOK_EVERY or update >= cfg.train.steps:
        return False
    return update >= max(LOOK_FROM, cfg.optimizer.warmup_steps) and value() > options.untie_above


def carried(options: TyingConfig, arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays of the scheme after the change, from those before it."""
    if _unties(options):
        table = arrays[SHARED]
        return {"input": table, "output": table}
    E_VD, U_VD = Tables(arrays["input"], arrays["output"])
    if options.tie_by != "transform":
        return {SHARED: E_VD if options.tie_by == "input" else U_VD}
    # R minimises |E (I + R) - U|: the normal equations, of D numbers, and not of V.
    product: Any = partial(jnp.matmul, precision="highest")
    R_DD = jnp.linalg.solve(product(E_VD.T, E_VD), product(E_VD.T, U_VD - E_VD))
    return {SHARED: E_VD, "output_transform": R_DD}


def begun_from(before: TyingConfig, now: TyingConfig, arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a scheme from those of another run's: the same, or copies of its one table for each role."""
    if _alike(before) == _alike(now):
        return arrays
    return {"input": arrays[SHARED], "output": arrays[SHARED]}


def refuse_two_anchors(theirs: TyingConfig, ours: TyingConfig, text: str) -> None:
    """UserError where the run that `regularisers.anchor_to` names has two tables and this one has one."""
    if scheme_of(ours).shares_one_table and not scheme_of(theirs).shares_one_table:
        raise UserError(f"regularisers.anchor_to: {text}: has two tables, and this run one; name a run of one table")


def refuse_another_scheme(before: TyingConfig, now: TyingConfig, init: str) -> None:
    """UserError where arrays of the scheme `before`, of the run `init`, cannot begin a run of the scheme `now`."""
    if _alike(before) == _alike(now):
        return
    if not scheme_of(before).shares_one_table or [p.name for p in scheme_of(now).parameters] != ["input", "output"]:
        own = "" if before.scheme != now.scheme else " with other options"
        raise UserError(
            f"tying.scheme: a run of the {now.scheme} scheme cannot begin with the tables of train.init {init}, which "
            f"are of the {before.scheme} scheme{own}; take that, or untied for those of one table"
        )


def plain(options: TyingConfig) -> TyingConfig:
    """The scheme of a config with its options, and nothing else."""
    return TyingConfig(**{name: getattr(options, name) for name in ("scheme", *OPTIONS)})


def _alike(options: TyingConfig) -> dict[str, Any]:
    """What two schemes must have in common to have the same arrays, whatever those start from."""
    scheme = "untied" if options.scheme == "untied_equal" else options.scheme
    return vars(plain(options)) | {"scheme": scheme}


def refuse_impossible_changes(cfg: RunConfig) -> None:
    """UserError for a change of scheme that cannot be made, or an option of one that is not wanted."""
    options, tables = cfg.tying, cfg.optimizer.tables
    planned = {"untie_at": options.untie_at, "untie_when": options.untie_when, "tie_at": options.tie_at}
    given = [name for name, when in planned.items() if when is not None]
    if len(given) > 1:
        raise UserError(f"tying.{given[1]}: cannot be given with tying.{given[0]}; a run changes its scheme once")
    if (options.untie_when is None) != (options.untie_above is None):
        missing, there = ("untie_above", "untie_when") if options.untie_above is None else ("untie_when", "untie_above")
        raise UserError(f"tying.{there}: needs tying.{missing} too; give both or neither")
    if options.untie_when is not None and follow(cfg) == "off":
        raise UserError("tying.untie_when: looks at the account's metrics, and tying.account is off; set it to auto")
    for name in given:
        when, shares = planned[name], name != "tie_at"
        if isinstance(when, float) and when >= 1:
            raise UserError(f"tying.{name}: must be a number of updates, or a share of them below 1, got {when}")
        if (changed := changes_after(cfg)) is not None and changed >= cfg.train.steps:
            raise UserError(f"tying.{name}: must be < train.steps = {cfg.train.steps}, got {when}")
        scheme = scheme_of(options)
        if scheme.shares_one_table != shares or scheme.shares_nothing == shares:
            wanted = "one table in both roles" if shares else "a table for each role"
            raise UserError(f"tying.{name}: needs a scheme with {wanted}, tying.scheme is {options.scheme!r}")
        for role in ROLES:
            if (kind := tables.of(role).kind) != tables.kind:
                raise UserError(
                    f"tying.{name}: needs one kind of optimizer for all tables; optimizer.tables.{role}.kind is "
                    f"{kind}, and that of the other {tables.kind}"
                )
        if cfg.model.table_rows < cfg.model.d_model and options.tie_by == "transform":
            raise UserError(
                f"tying.tie_by: transform needs a table with at least as many rows as columns, got "
                f"{cfg.model.table_rows} of model.d_model = {cfg.model.d_model}"
            )
        if tables.kind not in CARRIED:
            raise UserError(
                f"tying.{name}: the state of optimizer.tables.kind {tables.kind} is not that of other tables; take "
                f"{', '.join(CARRIED[:-1])} or {CARRIED[-1]}"
            )
        if options.output_update_share is not None:
            raise UserError(f"tying.output_update_share: cannot be held in a run with tying.{name}; leave one out")
    if not _unties(options) and options.untie_moments != "copy":
        raise UserError("tying.untie_moments: split is for a run that unties; give tying.untie_at, or leave it out")
    if options.tie_at is None and options.tie_by != "input":
        raise UserError(f"tying.tie_by: {options.tie_by} is for a run that ties; give tying.tie_at, or leave it out")
    if keeps_squares(cfg) and tables.kind != "adamw":
        raise UserError(
            f"tying.untie_moments: split is for optimizer.tables.kind adamw, got {tables.kind}; leave it out"
        )
