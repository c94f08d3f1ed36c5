"""The schemes: what arrays the tables come from, and how.

To add one: a function from `TyingConfig` to `Scheme`, an entry in `SCHEMES`, and its name and options in `TyingConfig`.

Axes: V rows of a table, D its width, S rows of which each role has its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tiedjax.config import ROLES, ModelConfig, RunConfig, TyingConfig, role_of
from tiedjax.errors import UserError
from tiedjax.rng import key_for
from tiedjax.tying.tables import SHARED, Tables

Law = Callable[[jax.Array, tuple[int, ...]], jax.Array]
Shape = Callable[[int, int], tuple[int, ...]]

ROWS = "output_rows"  # int32 [S]: the tokens whose rows the roles do not share


@dataclass(frozen=True)
class Start:
    """What arrays of a scheme may start from.

    Attributes:
      root: the random key of a run's parameters.
      shape: (V, D) of the tables.
      law: the initial law of the table of a name.
      rows: int32 [S], the tokens whose rows the roles do not share; None: the first S.
    """

    root: jax.Array
    shape: tuple[int, int]
    law: Callable[[str], Law]
    rows: Any = None

    def table(self, name: str, shape: tuple[int, ...] | None = None) -> jax.Array:
        """The table of this name, [V, D], or an array of this shape by its law; its random key is "tables/NAME"."""
        return self.law(name)(key_for(self.root, f"tables/{name}"), shape or self.shape)


@dataclass(frozen=True)
class Parameter:
    """One array that a scheme owns; one of integers is never trained.

    Attributes:
      name: its key in the parameters. One that begins with a role's name is written by that role alone, whose options
        of the optimizer are about it.
      shape: from the tables' (V, D) to its own.
      axes: the logical axis of each dimension, None where it is never sharded.
      start: its initial value; None: drawn by the law of the tables, with a key of its name.
      trained: False for indices, int32, which a run sets once.
      has_rows: whether it has a row for each of all tokens or some, of which the options of the tables' optimizer are.
    """

    name: str
    shape: Shape = lambda V, D: (V, D)
    axes: tuple[str | None, ...] = ("vocab", "embed")
    start: Callable[[Start], jax.Array] | None = None
    trained: bool = True
    has_rows: bool = True

    def size(self, V: int, D: int) -> int:
        """How many numbers it holds for tables [V, D]."""
        return math.prod(self.shape(V, D))


@dataclass(frozen=True)
class Scheme:
    """How two tables come from parameters.

    Attributes:
      parameters: the arrays it owns.
      tables: from {name: array} to `Tables` of [V, D]; differentiable, so that its transpose merges the role gradients.
      account: what an account of an array that both roles write is worth: "linear" where both tables are linear in
        the arrays; "input" where only the lookup table is; "none" where neither is.
      flops: from (V, D) to the floating-point operations of the matrix products by which the tables are made.
    """

    parameters: tuple[Parameter, ...]
    tables: Callable[[Mapping[str, Any]], Tables]
    account: Literal["linear", "input", "none"] = "linear"
    flops: Callable[[int, int], int] = lambda V, D: 0

    @property
    def trained(self) -> tuple[str, ...]:
        """The names of the arrays that training updates."""
        return tuple(parameter.name for parameter in self.parameters if parameter.trained)

    @property
    def followed(self) -> tuple[str, ...]:
        """The names of the tables that both roles write and whose account can be kept."""
        both = [p.name for p in self.parameters if p.has_rows and role_of(p.name) is None]
        return tuple(both) if self.account != "none" else ()

    def transposed(self, params: Mapping[str, Any], role_grads: Tables) -> dict[str, jax.Array]:
        """{name: gradient} of what is trained, for gradients of the tables [V, D]: both roles' merged."""
        fixed = {name: params[name] for name in params if name not in self.trained}
        of_trained = lambda arrays: self.tables({**fixed, **arrays})
        merged: dict[str, jax.Array] = jax.vjp(of_trained, {name: params[name] for name in self.trained})[1](
            role_grads
        )[0]
        return merged

    def by_role(self, params: Mapping[str, Any], role_grads: Tables) -> Tables:
        """For each role {name: gradient}: what its gradient of the tables [V, D] is to the parameters."""
        zeros = jax.tree.map(jnp.zeros_like, role_grads)
        alone = Tables(role_grads._replace(output=zeros.output), role_grads._replace(input=zeros.input))
        return Tables(*(self.transposed(params, grads) for grads in alone))

    def size(self, V: int, D: int) -> int:
        """How many numbers are trained for tables [V, D]."""
        return sum(parameter.size(V, D) for parameter in self.parameters if parameter.trained)

    @property
    def shares_one_table(self) -> bool:
        """Whether both roles are one and the same array."""
        return [parameter.name for parameter in self.parameters] == [SHARED]

    @property
    def independent(self) -> bool:
        """Whether each role has a table of its own, drawn by itself."""
        return self.shares_nothing and all(parameter.start is None for parameter in self.parameters)

    @property
    def shares_nothing(self) -> bool:
        """Whether no array is written by both roles."""
        return all(role_of(parameter.name) for parameter in self.parameters)


def _tied(cfg: TyingConfig) -> Scheme:
    # The tied table has a name of its own: were it called "output", it would start equal to the untied output table,
    # and every later similarity between the two would be part inheritance.
    return Scheme((Parameter(SHARED),), lambda params: Tables(params[SHARED], params[SHARED]))


def _of_each_role(params: Mapping[str, Any]) -> Tables:
    return Tables(params["input"], params["output"])


def _untied(cfg: TyingConfig) -> Scheme:
    return Scheme((Parameter("input"), Parameter("output")), _of_each_role)


def _untied_equal(cfg: TyingConfig) -> Scheme:
    start = lambda start: start.table(SHARED)
    return Scheme((Parameter("input", start=start), Parameter("output", start=start)), _of_each_role)


def _partial_dims(cfg: TyingConfig) -> Scheme:
    def shared(D: int) -> int:
        return cfg.dims or max(D // 2, 1)

    def rest(start: Start) -> jax.Array:
        return start.table(SHARED)[:, shared(start.shape[1]) :]

    def own(role: str) -> Parameter:
        return Parameter(role, lambda V, D: (V, D - shared(D)), start=rest)

    def tables(params: Mapping[str, Any]) -> Tables:
        return Tables(*(jnp.concatenate([params[SHARED], params[role]], axis=1) for role in ROLES))

    first = lambda start: start.table(SHARED)[:, : shared(start.shape[1])]
    return Scheme((Parameter(SHARED, lambda V, D: (V, shared(D)), start=first), *map(own, ROLES)), tables)


def _partial_tokens(cfg: TyingConfig) -> Scheme:
    # The lookup table is whole, so that both tables of a shared row are one; of the others the output role has copies.
    def rows(V: int) -> int:
        return cfg.rows or max(V // 2, 1)

    def tables(params: Mapping[str, Any]) -> Tables:
        E_VD = jnp.asarray(params[SHARED])
        return Tables(E_VD, E_VD.at[params[ROWS]].set(params["output"], unique_indices=True))

    def chosen(start: Start) -> jax.Array:
        return jnp.arange(rows(start.shape[0]), dtype=jnp.int32) if start.rows is None else start.rows

    indices = Parameter(ROWS, lambda V, D: (rows(V),), (None,), chosen, trained=False)
    copied = lambda start: start.table(SHARED)[chosen(start)]
    output = Parameter("output", lambda V, D: (rows(V), D), (None, "embed"), copied)
    return Scheme((Parameter(SHARED), output, indices), tables)


def _low_rank(cfg: TyingConfig) -> Scheme:
    def rank(D: int) -> int:
        return cfg.rank or max(D // 8, 1)

    def tables(params: Mapping[str, Any]) -> Tables:
        E_VD = params[SHARED]
        return Tables(E_VD, E_VD + _product(params["output_left"], params["output_right"].T))

    left = Parameter("output_left", lambda V, D: (V, rank(D)), ("vocab", None))
    right = _rowless("output_right", lambda V, D: (D, rank(D)), ("embed", None))
    return Scheme((Parameter(SHARED), left, right), tables, "input", lambda V, D: 2 * V * D * rank(D))


def _transform(cfg: TyingConfig) -> Scheme:
    shape: Shape = (lambda V, D: (D,)) if cfg.transform == "diagonal" else (lambda V, D: (D, D))
    axes = ("embed",) if cfg.transform == "diagonal" else ("embed", None)

    def tables(params: Mapping[str, Any]) -> Tables:
        E_VD, R = params[SHARED], params["output_transform"]
        if cfg.transform == "diagonal":
            return Tables(E_VD, E_VD * (1 + R)[None])
        if cfg.transform == "full":
            return Tables(E_VD, E_VD + _product(E_VD, R))
        half = (R - R.T) / 2
        # (I - half)^-1 (I + half): a rotation for every R, whose first order is I + R - R'.
        identity = jnp.eye(len(R), dtype=R.dtype)
        return Tables(E_VD, _product(E_VD, jnp.linalg.solve(identity - half, identity + half)))

    transform = _rowless("output_transform", shape, axes)
    products = {"diagonal": 0, "full": 1, "orthogonal": 1}[cfg.transform]
    return Scheme((Parameter(SHARED), transform), tables, "input", lambda V, D: 2 * products * V * D * D)


def _interpolated(cfg: TyingConfig) -> Scheme:
    shapes: dict[str, tuple[Shape, tuple[str | None, ...]]] = {
        "global": (lambda V, D: (1, 1), (None, None)),
        "dimension": (lambda V, D: (1, D), (None, "embed")),
        "token": (lambda V, D: (V, 1), ("vocab", None)),
    }
    shape, axes = shapes[cfg.gate]

    def tables(params: Mapping[str, Any]) -> Tables:
        E_VD, U_VD, gate = params[SHARED], params["output"], jax.nn.sigmoid(params["output_gate"])
        return Tables(E_VD, U_VD + gate * (E_VD - U_VD))

    own = Parameter("output", start=lambda start: start.table(SHARED))
    gate = dataclasses.replace(_rowless("output_gate", shape, axes), has_rows=cfg.gate == "token")
    return Scheme((Parameter(SHARED), own, gate), tables, "input")


def _pseudo_inverse(cfg: TyingConfig) -> Scheme:
    # The paper keeps the columns of a memory Z orthonormal, and looks up in Z T^-1 what it predicts with Z T. Here Z is
    # made orthonormal from an array that nothing binds, and has the size of a table: at 1 / sqrt(V) its logits would be
    # sqrt(V / D) times too small.
    def tables(params: Mapping[str, Any]) -> Tables:
        W_VD, F_DD = params[SHARED], params["transform"]
        V, D = W_VD.shape
        upper_DD = jnp.linalg.cholesky(_product(W_VD.T, W_VD)).T
        factor_DD = jnp.tril(F_DD, -1) + jnp.diag(jnp.exp(jnp.diag(F_DD)))
        T_DD = _product(factor_DD, factor_DD.T)
        identity = jnp.eye(D, dtype=W_VD.dtype)
        solved = partial(jax.scipy.linalg.solve_triangular, b=identity)
        inverse_DD = solved(factor_DD, lower=True)
        inverse_T_DD = _product(inverse_DD.T, inverse_DD)
        orthonormal_DD = (V / D) ** 0.5 * solved(upper_DD, lower=False)
        return Tables(*(_product(W_VD, _product(orthonormal_DD, each)) for each in (inverse_T_DD, T_DD)))

    transform = _rowless("transform", lambda V, D: (D, D), ("embed", None))
    return Scheme((Parameter(SHARED), transform), tables, "none", lambda V, D: 2 * 3 * V * D * D)


def _rowless(name: str, shape: Shape, axes: tuple[str | None, ...]) -> Parameter:
    """An array without a row for each token, of zeros at the start."""
    return Parameter(name, shape, axes, lambda start: jnp.zeros(shape(*start.shape)), has_rows=False)


_product = partial(jnp.matmul, precision="highest")


SCHEMES: dict[str, Callable[[TyingConfig], Scheme]] = {
    "tied": _tied,
    "untied": _untied,
    "untied_equal": _untied_equal,
    "partial_dims": _partial_dims,
    "partial_tokens": _partial_tokens,
    "low_rank": _low_rank,
    "transform": _transform,
    "interpolated": _interpolated,
    "pseudo_inverse": _pseudo_inverse,
}

# Which scheme each option of one is for.
OPTIONS = {
    "dims": "partial_dims",
    "rows": "partial_tokens",
    "rows_from": "partial_tokens",
    "rank": "low_rank",
    "transform": "transform",
    "gate": "interpolated",
}


def scheme_of(cfg: TyingConfig) -> Scheme:
    """The scheme of a config, with its options."""
    return SCHEMES[cfg.scheme](cfg)


# What a compiled step is given as an argument.
SCALES = tuple(f.name for f in dataclasses.fields(TyingConfig) if "grad_scale" in f.name)


def without_scales(cfg: TyingConfig) -> TyingConfig:
    """What a compiled step depends on: all but the role scales, which it is given as arguments."""
    plain = TyingConfig()
    return dataclasses.replace(cfg, **{name: getattr(plain, name) for name in SCALES})


def unshared_rows(cfg: TyingConfig, model: ModelConfig, counts_V: np.ndarray) -> np.ndarray | None:
    """int32 [S], ascending: the tokens whose rows the roles do not share; None where a scheme shares all rows or none.

    `counts_V` is how often each token occurs; of equally frequent ones those of the lowest ids are taken, and rows that
    no token has come last.
    """
    wanted = {p.name: p.size(model.table_rows, model.d_model) for p in scheme_of(cfg).parameters}.get(ROWS)
    if wanted is None:
        return None
    counts = np.asarray(counts_V, np.int64)[: model.vocab_size]
    order = np.argsort(counts if cfg.rows_from == "rarest" else -counts, kind="stable")
    order = np.concatenate([order, np.arange(model.vocab_size, model.table_rows)])
    return np.sort(order[:wanted]).astype(np.int32)


def refuse_options_of_roles(cfg: RunConfig) -> None:
    """UserError for options of one role, or of both roles' updates, that the scheme or another option leaves void."""
    scheme = scheme_of(cfg.tying)
    own = {role_of(parameter.name) for parameter in scheme.parameters if parameter.trained and parameter.has_rows}
    unties = cfg.tying.untie_at is not None or cfg.tying.untie_when is not None
    later = set(ROLES) if unties else set()  # have tables of their own then
    drawn = {role_of(parameter.name) for parameter in scheme.parameters if parameter.start is None}
    both, tables, options = None in own, cfg.optimizer.tables, cfg.tying
    for role in ROLES:
        for option, value in vars(getattr(tables, role)).items():
            where = f"optimizer.tables.{role}.{option}"
            if value is not None and role not in own | later and option != "learning_rate":
                raise UserError(
                    f"{where}: the {options.scheme} scheme has no table for the {role} role alone; give "
                    f"optimizer.tables.{option} instead"
                )
            if value is not None and option == "init_std" and role not in drawn:
                raise UserError(
                    f"{where}: what the {role} role has for itself starts as a copy under the {options.scheme} scheme; "
                    "give optimizer.tables.init_std instead"
                )
        scale, by_decile = (getattr(options, f"{role}_grad_scale{end}") for end in ("", "_deciles"))
        kind = tables.of(role).kind
        if not both and kind != "sgd" and (scale not in (0, 1) or by_decile):
            name, given = (
                (f"{role}_grad_scale", f"{scale:g}") if scale not in (0, 1) else (f"{role}_grad_scale_deciles", "it")
            )
            raise UserError(
                f"tying.{name}: {given} changes nothing under the {options.scheme} scheme, where {kind} divides each "
                f"role's gradient by its own size; give optimizer.tables.{role}.learning_rate, or a scale of 0 to "
                "freeze it"
            )
    if options.output_update_share is not None and (not scheme.followed or options.account == "off"):
        reason = "tying.account is off" if scheme.followed else f"the {options.scheme} scheme has none"
        raise UserError(f"tying.output_update_share: needs the account of a table of both roles, and {reason}")
    if both and tables.kind == "lion":
        rates = [role for role in ROLES if getattr(tables, role).learning_rate is not None]
        if options.account != "off" or rates:
            raise UserError(
                "optimizer.tables.kind: lion's update is the sign of a sum, of which no role has a bounded part; set "
                "tying.account off and give the roles no learning rates, or take another kind"
            )
    for role in ROLES:
        told = role in own and options.account != "off" and scheme.account != "none"
        if told and tables.of(role).kind == "lion":
            where = "optimizer.tables.kind" if getattr(tables, role).kind is None else f"optimizer.tables.{role}.kind"
            raise UserError(
                f"{where}: lion's update is a sign that no state keeps, so that what is told of an update would be of "
                "another; set tying.account off, or take another kind"
            )
    _refuse_options_of_schemes(cfg)
    _refuse_regularisers(cfg)


def _refuse_regularisers(cfg: RunConfig) -> None:
    """UserError for regularisers whose part the tables' update has no room for, or in a run that changes its scheme."""
    options, tables = cfg.tying, cfg.optimizer.tables
    for name in list(cfg.regularisers.weights)[:1]:
        for change in ("untie_at", "untie_when", "tie_at"):
            if getattr(options, change) is not None:
                raise UserError(
                    f"regularisers.{name}: cannot be given with tying.{change}: it is added over the tables, of which "
                    "there is another number after the change; leave one of the two out"
                )
        written = [(p.name, role_of(p.name)) for p in scheme_of(options).parameters if p.trained and p.has_rows]
        for array, role in written:
            kind = tables.of(array).kind
            where = "optimizer.tables.kind" if role is None else f"optimizer.tables.{role}.kind"
            if (role is None and kind.startswith("by_role")) or (role == "input" and kind == "by_role_lazy"):
                raise UserError(
                    f"regularisers.{name}: {kind} has moments of the roles alone, and this is of neither; set {where} "
                    "to adamw, coupled or sgd"
                )


def _refuse_options_of_schemes(cfg: RunConfig) -> None:
    """UserError for options that the scheme does not have, that its tables have no room for, or that it makes void."""
    options, plain, model, tables = cfg.tying, TyingConfig(), cfg.model, cfg.optimizer.tables
    for option, wanted in OPTIONS.items():
        given = getattr(options, option)
        if given != getattr(plain, option) and options.scheme != wanted:
            raise UserError(
                f"tying.{option}: is an option of the {wanted} scheme, tying.scheme is {options.scheme!r}; leave it out"
            )
    limits = {"dims": model.d_model - 1, "rank": model.d_model, "rows": model.vocab_size}
    names = {"dims": "model.d_model - 1", "rank": "model.d_model", "rows": "model.vocab_size"}
    for option, limit in limits.items():
        given = getattr(options, option)
        if given is not None and given > limit:
            raise UserError(f"tying.{option}: must be <= {names[option]} = {limit}, got {given}")
    scheme = scheme_of(options)
    if scheme.account == "none" and options.account not in ("auto", "off"):
        raise UserError(
            f"tying.account: {options.account} cannot be kept under the {options.scheme} scheme, whose tables are no "
            "sums of what the roles wrote; set it to auto or off"
        )
    if scheme.account == "none" and model.table_rows < model.d_model:
        raise UserError(
            f"tying.scheme: {options.scheme} needs tables with at least as many rows as columns, got "
            f"{model.table_rows} of model.d_model = {model.d_model}"
        )
    if scheme.account == "none" and tables.init_std is not None:
        raise UserError(
            f"optimizer.tables.init_std: changes nothing under the {options.scheme} scheme, which gives its tables "
            "the size 1 / sqrt(D); leave it out"
        )
    whole = scheme.shares_one_table or scheme.shares_nothing  # each table is an array of its own
    for option, given in [("kind", tables.kind in ("coupled", "by_role_lazy")), ("centered", tables.centered)]:
        if given and not whole:
            raise UserError(
                f"optimizer.tables.{option}: {getattr(tables, option)} is about the rows of a whole table, which the "
                f"{options.scheme} scheme puts together of several arrays; take another, or tied, untied or "
                "untied_equal"
            )


def init_tables(scheme: Scheme, start: Start) -> dict[str, Any]:
    """The scheme's parameters, boxed with their logical axes."""

    def value(parameter: Parameter) -> jax.Array:
        return parameter.start(start) if parameter.start else start.table(parameter.name, parameter.shape(*start.shape))

    return {
        parameter.name: nn.LogicallyPartitioned(value(parameter), names=parameter.axes)
        for parameter in scheme.parameters
    }
