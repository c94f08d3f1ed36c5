"""The pair of tables, one for each role."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

SHARED = "shared"  # the name of a table that serves both roles


class Tables(NamedTuple):
    """One thing for each role of the table, in this order: arrays E_VD and U_VD, their gradients, or scalars."""

    input: Any
    output: Any


def distinct(tables: Any) -> dict[str, Any]:
    """The distinct ones of a pair of tables: {"shared": ...} if both roles have one array, else {"input", "output"}."""
    if tables.input is tables.output:
        return {SHARED: tables.input}
    return {"input": tables.input, "output": tables.output}


def as_roles(tables: Any, names: Iterable[str]) -> dict[str, Any]:
    """A pair of tables by names that `distinct` gave at another step, where the scheme may have been another.

    One table is that of each role; of two none is shared, and that name is left out.
    """
    by_role = {"input": tables.input, "output": tables.output}
    if tables.input is tables.output:
        by_role[SHARED] = tables.input
    return {name: by_role[name] for name in names if name in by_role}
