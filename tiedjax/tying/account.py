"""The account: what each role's updates wrote into a table that both write, and what they did to the next batch's loss.

An optimizer says which part of every update is whose (`parts`); their running sums, decayed as the table is, are C:

    E_t = A_t E_0 + C_input,t + C_output,t [+ C_anchor,t + ...]    A_t: the product of all (1 - rate * weight decay)

Each regulariser that is on has a part of its own, which is no role's. Exact on the trajectory that was run,
whatever clipping, schedule and row scales were: an account, not a cause, since both roles decide the gradients and the
second moment. C_output is the rest where only C_input is kept; of the check rows both are, and what (1) misses there is
the account's error.

Axes: V rows of a table, D its width, S the rows that are followed (all of them, or a sample), R the check rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tiedjax.config import ROLES, RunConfig
from tiedjax.errors import UserError
from tiedjax.tying.schemes import scheme_of
from tiedjax.tying.tables import Tables

Follow = Literal["off", "rows", "whole", "checked"]

WHOLE_BELOW = 2**26  # numbers of a table
SAMPLE_ROWS = 2048
CHECK_ROWS = 16
MOST_FREQUENT = 256


class Rows(NamedTuple):
    """The rows that are followed.

    Attributes:
      sample: [S] of a table, None where all are.
      check: [R] of a table, where what the output role wrote is known by itself and not as the rest.
      places: [R], where those are among the rows that are followed.
    """

    sample: Any
    check: Any
    places: Any


class Parts(NamedTuple):
    """What the roles wrote into one table in an update.

    Attributes:
      directions: `Tables` of [S, D], which `scales` multiply; of a table that one role writes, the other's is None.
      regulariser: {its name: [S, D]}, what each regulariser wrote; None without any.
      check: [R, D], what the output role wrote by its own moment, or [V, D] where it is not the rest anywhere.
      decay: which part of the table the update took away, rate * weight decay.
      scales: `Tables` of numbers, minus the learning rate of each role's part. Apart from the directions, so that a sum
        over a table is multiplied once, and not the table.
    """

    directions: Tables
    check: Any = None
    decay: Any = None
    regulariser: Any = None
    scales: Tables = Tables(1.0, 1.0)

    @property
    def roles(self) -> Tables:
        """`Tables` of [S, D], what each role wrote; None where `directions` is."""
        both = zip(self.scales, self.directions, strict=True)
        return Tables(*(None if part is None else scale * part for scale, part in both))


class Account(NamedTuple):
    """The running sums, by the name of each table that both roles write.

    Attributes:
      rows: the rows that are followed.
      written: {name: `Tables` of C}: the input role's [S, D], the output role's as `Parts.check`.
      initial: {name: E_0 of the check rows, less the mean row where the first update takes that away}.
      log_kept: {name: [2]}, the logarithm of A_t, and what is to be taken off the next addition to it.
      regulariser: {name: {a regulariser's name: its C [S, D]}}; None without any.
    """

    rows: Rows
    written: dict[str, Tables]
    initial: dict[str, Any]
    log_kept: dict[str, Any]
    regulariser: dict[str, dict[str, Any]] | None = None

    def reopened(self, tables: Mapping[str, Any], centered: bool) -> Account:
        """The account before the first update of other tables of these names."""
        initial = {name: _started(tables[name], centered)[self.rows.check] for name in self.initial}
        return self._replace(initial=initial)


def follow(cfg: RunConfig) -> Follow:
    """The form that a run's account has."""
    form = cfg.tying.account
    if scheme_of(cfg.tying).account == "none":
        return "off"
    if form == "auto":
        # A mean row is that of all rows: centring needs what was written into each.
        small = cfg.model.table_rows * cfg.model.d_model < WHOLE_BELOW or cfg.optimizer.tables.centered
        return "whole" if small else "rows"
    if form == "rows" and cfg.optimizer.tables.centered:
        raise UserError(
            "tying.account: rows cannot be followed with optimizer.tables.centered, whose mean is that of all rows; "
            "set it to whole or off"
        )
    return form


def anatomy_wanted(cfg: RunConfig) -> bool:
    """Whether a run measures at its snapshots what the output role's gradient is made of."""
    small = cfg.model.table_rows * cfg.model.d_model < WHOLE_BELOW
    return small and cfg.model.logit_cap is None if cfg.train.anatomy is None else cfg.train.anatomy


def sampled_rows(counts_V: np.ndarray, rows: int = SAMPLE_ROWS) -> np.ndarray:
    """int32, ascending: the `MOST_FREQUENT` tokens and others evenly spaced by frequency, `rows` in all.

    Tokens that never occur are the rarest.
    """
    order = np.argsort(-np.asarray(counts_V), kind="stable")
    often, others = order[:MOST_FREQUENT], order[MOST_FREQUENT:]
    places = np.linspace(0, len(others) - 1, min(rows - len(often), len(others))).round().astype(int)
    return np.sort(np.concatenate([often, others[places]])).astype(np.int32)


def rows_of(form: Follow, table_rows: int, sample: Any = None) -> Rows | None:
    """The rows of an account of this form; `sample` are those of the form "rows"."""
    if form == "off":
        return None
    if form == "rows":
        places = np.linspace(0, len(sample) - 1, CHECK_ROWS).round().astype(np.int32)
        return Rows(jnp.asarray(sample), jnp.asarray(sample)[places], jnp.asarray(places))
    check = jnp.asarray(np.unique(np.linspace(0, table_rows - 1, CHECK_ROWS).round().astype(np.int32)))
    return Rows(None, check, check)


def opened(
    tables: Mapping[str, Any],
    names: Iterable[str],
    form: Follow,
    rows: Rows | None,
    regularisers: Iterable[str] = (),
    centered: bool = False,
) -> Account | None:
    """The account before the first update of those of these tables that have the names.

    Tables may be boxed with their logical axes, which the sums then have. `regularisers` are the names of those that
    write them too; `centered` is whether each update takes the mean row away. None where nothing is followed.
    """
    names, kinds = tuple(names), tuple(regularisers)
    if rows is None or not names:
        return None

    def zeros(name: str, kept: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, taken(tables[name], kept))

    check = None if form == "checked" else rows.check
    return Account(
        rows,
        {name: Tables(zeros(name, rows.sample), zeros(name, check)) for name in names},
        {name: taken(_started(tables[name], centered), rows.check) for name in names},
        {name: jnp.zeros(2, jax.tree.leaves(tables[name])[0].dtype) for name in names},
        {name: {kind: zeros(name, rows.sample) for kind in kinds} for name in names} if kinds else None,
    )


def _started(table: Any, centered: bool) -> Any:
    """What an update adds to: the initial table, which may be boxed, as the first update leaves its mean row."""
    return jax.tree.map(lambda E_VD: E_VD - jnp.mean(E_VD, axis=0, keepdims=True), table) if centered else table


def taken(table: Any, rows: Any) -> Any:
    """These rows of an array (None: all), which may be boxed with its logical axes."""
    if rows is None:
        return table
    if isinstance(table, nn.LogicallyPartitioned):
        return nn.LogicallyPartitioned(table.value[rows], names=(None, *table.names[1:]))
    return table[rows]


def advanced(account: Account, parts: Mapping[str, Parts]) -> Account:
    """The account after an update that consisted of `parts`."""
    written, log_kept, regulariser = {}, {}, None if account.regulariser is None else dict(account.regulariser)
    for name, sums in account.written.items():
        part = parts[name]
        new = Tables(part.roles.input, part.check)
        written[name] = Tables(*(C + (D - part.decay * C) for C, D in zip(sums, new, strict=True)))
        if regulariser is not None:
            regulariser[name] = {
                kind: C + (part.regulariser[kind] - part.decay * C) for kind, C in regulariser[name].items()
            }
        # A sum of very many small numbers: what each addition loses is taken off the next (Kahan).
        total, lost = account.log_kept[name]
        step = jnp.log1p(-part.decay).astype(total.dtype) - lost
        log_kept[name] = jnp.stack([total + step, (total + step - total) - step])
    return account._replace(written=written, log_kept=log_kept, regulariser=regulariser)


def error(account: Account, tables: Mapping[str, jax.Array]) -> jax.Array:
    """||E - A E_0 - C_input - C_output [- C_anchor - ...]|| / ||E|| over the check rows of all tables of both roles."""
    missed, size = [], []
    for name, sums in account.written.items():
        E_RD = tables[name][account.rows.check]
        output_RD = sums.output if len(sums.output) == len(E_RD) else sums.output[account.rows.check]
        kept = jnp.exp(account.log_kept[name][0])
        rest_RD = E_RD - kept * account.initial[name] - sums.input[account.rows.places] - output_RD
        if account.regulariser is not None:
            for C_SD in account.regulariser[name].values():
                rest_RD -= C_SD[account.rows.places]
        missed.append(jnp.sum(jnp.square(rest_RD)))
        size.append(jnp.sum(jnp.square(E_RD)))
    return jnp.sqrt(sum(missed) / sum(size))


def update_metrics(parts: Mapping[str, Parts]) -> dict[str, jax.Array]:
    """Norms and share of what the two roles wrote in an update, and the cosine of that where they wrote one table.

    The share is output / (input + output). Of each regulariser the norm of what it wrote, too.
    """
    square = dict.fromkeys(ROLES, jnp.zeros(()))
    product = jnp.zeros(())
    for part in parts.values():
        for role, scale, part_SD in zip(ROLES, part.scales, part.directions, strict=True):
            if part_SD is not None:
                square[role] += jnp.square(scale) * jnp.sum(jnp.square(part_SD))
        if _of_both(part):
            whole = jnp.sum(part.directions.input * part.directions.output)
            product += part.scales.input * part.scales.output * whole
    norm = {role: jnp.sqrt(value) for role, value in square.items()}
    metrics = {
        "input_update_norm": norm["input"],
        "output_update_norm": norm["output"],
        "output_update_share": norm["output"] / (norm["input"] + norm["output"]),
    }
    by_others: dict[str, jax.Array] = {}
    for part in parts.values():
        for kind, part_SD in (part.regulariser or {}).items():
            by_others[kind] = by_others.get(kind, 0) + jnp.sum(jnp.square(part_SD))
    metrics |= {f"regulariser_{kind}_update_norm": jnp.sqrt(value) for kind, value in by_others.items()}
    if any(_of_both(part) for part in parts.values()):
        metrics["role_update_cosine"] = product / (norm["input"] * norm["output"])
    return metrics


def compromise(
    role_grads: Tables, parts: Mapping[str, Parts], tables: Mapping[str, jax.Array], rows: Rows | None
) -> dict[str, jax.Array]:
    """What the last update did to this batch's loss through the tables, to first order, in nats.

    `role_grads` has for each role the gradient of the mean loss with respect to {name: table}, before any scale, of the
    rows that are followed; `parts` are those of the last update, `tables` what it made of them. m_A_B is <G_A, D_B>:
    through the use that role A makes of a table, of what role B wrote. The columns of that matrix are summed as
    `input_loss_change` and `output_loss_change`; beside them the change by decay, and that by each regulariser: of this
    loss, of which it is no part.
    """
    matrix = {(reader, writer): jnp.zeros(()) for reader in ROLES for writer in ROLES}
    decayed, by_others = jnp.zeros(()), dict[str, jax.Array]()
    for name, part in parts.items():
        followed = rows.sample if rows is not None and _of_both(part) else None
        G_SD = {reader: getattr(role_grads, reader)[name] for reader in ROLES}
        whole_SD = G_SD["input"] + G_SD["output"]
        before = jnp.sum(whole_SD * taken(tables[name], followed))
        for writer, scale, part_SD in zip(ROLES, part.scales, part.directions, strict=True):
            if part_SD is None:
                continue
            for reader in ROLES:
                effect = scale * jnp.sum(G_SD[reader] * part_SD)
                matrix[reader, writer] += effect
                before -= effect
        for kind, part_SD in (part.regulariser or {}).items():
            effect = jnp.sum(whole_SD * part_SD)
            by_others[kind] = by_others.get(kind, 0) + effect
            before -= effect
        # The table before the update is (table - what was written) / (1 - decay): only its product is needed.
        decayed -= part.decay / (1 - part.decay) * before
    short = {"input": "in", "output": "out"}
    return {
        **{f"m_{short[reader]}_{short[writer]}": value for (reader, writer), value in matrix.items()},
        "input_loss_change": matrix["input", "input"] + matrix["output", "input"],
        "output_loss_change": matrix["input", "output"] + matrix["output", "output"],
        "decay_loss_change": decayed,
        **{f"regulariser_{kind}_loss_change": value for kind, value in by_others.items()},
    }


def _of_both(part: Parts) -> bool:
    return all(part_SD is not None for part_SD in part.directions)
