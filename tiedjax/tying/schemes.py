"""The schemes: what arrays the tables come from, and how.

To add one: a function from `TyingConfig` to `Scheme`, an entry in `SCHEMES`, and its name and options in `TyingConfig`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tiedjax.config import ROLES, RunConfig, TyingConfig
from tiedjax.errors import UserError
from tiedjax.rng import key_for
from tiedjax.tying.tables import SHARED, Tables

Law = Callable[[jax.Array, tuple[int, ...]], jax.Array]


@dataclass(frozen=True)
class Parameter:
    """One array that a scheme owns.

    Attributes:
      name: its key in the parameters, and the end of its random key's name, "tables/NAME". "input" and "output" are
        for tables of one role, which that role's options of the optimizer are about.
      shape: from the tables' (V, D) to its own.
      axes: the logical axis of each dimension, None where it is never sharded.
      law: from (key, shape) to its initial value; None: the law of the tables.
    """

    name: str
    shape: Callable[[int, int], tuple[int, ...]] = lambda V, D: (V, D)
    axes: tuple[str | None, ...] = ("vocab", "embed")
    law: Law | None = None


@dataclass(frozen=True)
class Scheme:
    """How two tables come from parameters.

    Attributes:
      parameters: the arrays it owns; each starts from its own random key.
      tables: from {name: array} to `Tables` of [V, D]; differentiable, so that its transpose merges the role gradients.
    """

    parameters: tuple[Parameter, ...]
    tables: Callable[[Mapping[str, jax.Array]], Tables]

    def by_role(self, params: Mapping[str, jax.Array], role_grads: Tables) -> Tables:
        """For each role {name: gradient}: what its gradient of the tables [V, D] is to the parameters."""
        transposed = jax.vjp(self.tables, dict(params))[1]
        zeros = jax.tree.map(jnp.zeros_like, role_grads)
        alone = Tables(role_grads._replace(output=zeros.output), role_grads._replace(input=zeros.input))
        return Tables(*(transposed(each)[0] for each in alone))

    @property
    def shares_one_table(self) -> bool:
        """Whether both roles are one and the same array."""
        # Of NumPy: a study asks before it joins a cluster, which JAX refuses once it has made an array.
        arrays: Any = {parameter.name: np.zeros(parameter.shape(1, 1)) for parameter in self.parameters}
        tables = self.tables(arrays)
        return tables.input is tables.output


def _tied(cfg: TyingConfig) -> Scheme:
    # The tied table has a name of its own: were it called "output", it would start equal to the untied output table,
    # and every later similarity between the two would be part inheritance.
    return Scheme((Parameter(SHARED),), lambda params: Tables(params[SHARED], params[SHARED]))


def _untied(cfg: TyingConfig) -> Scheme:
    return Scheme(
        (Parameter("input"), Parameter("output")),
        lambda params: Tables(params["input"], params["output"]),
    )


SCHEMES: dict[str, Callable[[TyingConfig], Scheme]] = {"tied": _tied, "untied": _untied}


def scheme_of(cfg: TyingConfig) -> Scheme:
    """The scheme of a config, with its options."""
    return SCHEMES[cfg.scheme](cfg)


# What a compiled step is given as an argument.
SCALES = tuple(f.name for f in dataclasses.fields(TyingConfig) if "grad_scale" in f.name)


def without_scales(cfg: TyingConfig) -> TyingConfig:
    """What a compiled step depends on: all but the role scales, which it is given as arguments."""
    plain = TyingConfig()
    return dataclasses.replace(cfg, **{name: getattr(plain, name) for name in SCALES})


def refuse_options_of_roles(cfg: RunConfig) -> None:
    """UserError for options of one role, or of both roles' updates, that the scheme or another option leaves void."""
    own = {parameter.name for parameter in scheme_of(cfg.tying).parameters}
    both, tables, options = bool(own - set(ROLES)), cfg.optimizer.tables, cfg.tying
    for role in ROLES:
        for option, value in vars(getattr(tables, role)).items():
            if value is not None and role not in own and option != "learning_rate":
                raise UserError(
                    f"optimizer.tables.{role}.{option}: the {options.scheme} scheme has no table for the {role} role "
                    f"alone; give optimizer.tables.{option} instead"
                )
        scale, by_decile = (getattr(options, f"{role}_grad_scale{end}") for end in ("", "_deciles"))
        kind = tables.of(role).kind
        if role in own and kind != "sgd" and (scale not in (0, 1) or by_decile):
            name, given = (
                (f"{role}_grad_scale", f"{scale:g}") if scale not in (0, 1) else (f"{role}_grad_scale_deciles", "it")
            )
            raise UserError(
                f"tying.{name}: {given} changes nothing under the {options.scheme} scheme, where {kind} divides each "
                f"role's gradient by its own size; give optimizer.tables.{role}.learning_rate, or a scale of 0 to "
                "freeze it"
            )
    if options.output_update_share is not None and (not both or options.account == "off"):
        reason = "tying.account is off" if both else f"the {options.scheme} scheme shares none"
        raise UserError(f"tying.output_update_share: needs the account of a table of both roles, and {reason}")
    if both and tables.kind == "lion":
        rates = [role for role in ROLES if getattr(tables, role).learning_rate is not None]
        if options.account != "off" or rates:
            raise UserError(
                "optimizer.tables.kind: lion's update is the sign of a sum, of which no role has a bounded part; set "
                "tying.account off and give the roles no learning rates, or take another kind"
            )


def init_tables(scheme: Scheme, root: jax.Array, shape: tuple[int, int], law: Callable[[str], Law]) -> dict[str, Any]:
    """The scheme's parameters for tables of `shape` [V, D], boxed with their logical axes.

    `law` gives the initial law of the table of a name. Each array has the key "tables/NAME" under `root`.
    """
    return {
        parameter.name: nn.LogicallyPartitioned(
            (parameter.law or law(parameter.name))(key_for(root, f"tables/{parameter.name}"), parameter.shape(*shape)),
            names=parameter.axes,
        )
        for parameter in scheme.parameters
    }
