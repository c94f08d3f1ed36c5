"""The pair of tables, one for each role."""

from __future__ import annotations

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
