"""Which rows of two tables are of the same token.

A row number says nothing across tokenizers, so rows are matched by what their tokens stand for (`token_strings`). Where
both tables have one vocabulary, or a tokenizer is not known, rows stay as they are. Runs of one seed and scheme start
equal by row number, whatever their tokens: likeness of such rows is inherited, not learnt, so they are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tiedjax.analysis.basis.blocked import row_blocks
from tiedjax.analysis.basis.tables import Table
from tiedjax.analysis.basis.tokens import token_strings
from tiedjax.errors import UserError

ENOUGH = 1000  # matched tokens are enough, however large the vocabularies
SHARE = 0.2  # of the larger vocabulary is enough, however few tokens that is

Tokens = Sequence[str | None]


@dataclass(frozen=True)
class Matching:
    """How the rows of two tables correspond.

    Attributes:
      names: of the two tables.
      by: "token", "same tokenizer" or "row" (as they stand: one tokenizer or both are not known).
      rows: that correspond.
      tokens: of each vocabulary; None unless rows were matched by token.
      unknown: names of the tables whose tokenizer is not known; empty unless rows are taken as they stand.
      same_start: whether both tables started from the same initial array; None where that is not known.
      equal_at_start: boolean [rows], whether their two vectors were equal then, bit for bit; None likewise.
    """

    names: tuple[str, str]
    by: str
    rows: int
    tokens: tuple[int, int] | None = None
    unknown: tuple[str, ...] = ()
    same_start: bool | None = None
    equal_at_start: np.ndarray | None = field(default=None, compare=False)

    def describe(self, kept_V: np.ndarray | None) -> dict[str, Any]:
        """What a result says of it; `kept_V` is a boolean mask of the rows that are compared (None: all)."""
        equal = None if self.equal_at_start is None else int(_rows_of(self.equal_at_start, kept_V).sum())
        plain = {"by": self.by, "rows": self.rows, "tokens": self.tokens}
        return plain | {"same_start": self.same_start, "rows_equal_at_start": equal}

    def lines(self, kept_V: np.ndarray | None) -> list[str]:
        """What a person must know of it; nothing where both tables have one tokenizer and began apart."""
        lines = []
        a, b = self.names
        if self.tokens:
            lines.append(
                f"{self.rows:,} tokens match, of {self.tokens[0]:,} in {a} and {self.tokens[1]:,} in {b}: "
                "only their rows are compared"
            )
        if self.unknown:
            lines.append(f"rows are taken as they stand: the tokenizer of {' and of '.join(self.unknown)} is not known")
        if self.same_start and self.equal_at_start is not None:
            equal_V = _rows_of(self.equal_at_start, kept_V)
            inherited = ", and their likeness at identity is inherited, not learnt" if equal_V.any() else ""
            lines.append(
                f"{a} and {b} started from the same initial array: {equal_V.sum():,} of {len(equal_V):,} compared rows "
                f"were equal at step 0{inherited}"
            )
        return lines


def match(tokens_a: Tokens, tokens_b: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """The rows of A and of B that are of the same token, in the order of A: two index arrays of equal length.

    A row whose token is None has no match. Of several rows of one token the first has it.

    >>> match(["a", "b", None, "c"], ["c", None, "a", "a"])
    (array([0, 3]), array([2, 0]))
    """
    first_a, first_b = _first_rows(tokens_a), _first_rows(tokens_b)
    shared_tokens = [token for token in first_a if token in first_b]
    return (
        np.array([first_a[token] for token in shared_tokens], np.int64),
        np.array([first_b[token] for token in shared_tokens], np.int64),
    )


def matched(a: Table, b: Table) -> tuple[Table, Table, Matching]:
    """Both tables with corresponding rows, and how they correspond.

    UserError: too few tokens match, a tokenizer does not fit its table, or tables of different length whose tokenizers
    are not both known.
    """
    names, rows, tokens = (a.name, b.name), None, None
    unknown = () if _of_one_run(a, b) else tuple(table.name for table in (a, b) if table.tokenizer_path is None)
    if unknown and len(a.values) != len(b.values):
        raise UserError(
            f"{a.name} has {len(a.values)} rows but {b.name} has {len(b.values)}; rows must be the same tokens in the "
            f"same order, or both tokenizers known: that of {' and of '.join(unknown)} is not"
        )
    if not unknown and not _of_one_run(a, b):
        tokens_by_row = _tokens(a), _tokens(b)
        if tokens_by_row[0] != tokens_by_row[1]:
            rows, tokens = match(*tokens_by_row), (_named_tokens(tokens_by_row[0]), _named_tokens(tokens_by_row[1]))
            _check_enough(names, len(rows[0]), tokens)
    start = _start(a, b, rows)
    if rows is not None:
        a, b = a.take(rows[0]), b.take(rows[1])
    by = "row" if unknown else "same tokenizer" if tokens is None else "token"
    return a, b, Matching(names, by, len(a.values), tokens, unknown, *start)


def _first_rows(tokens: Tokens) -> dict[str, int]:
    rows: dict[str, int] = {}
    for row, token in enumerate(tokens):
        if token is not None:
            rows.setdefault(token, row)
    return rows


def _of_one_run(a: Table, b: Table) -> bool:
    return a.run_path is not None and (a.run_path, a.tokenizer_path) == (b.run_path, b.tokenizer_path)


def _tokens(table: Table) -> list[str | None]:
    """What each row stands for; None for padding. UserError for a tokenizer of more ids than the table has rows."""
    assert table.tokenizer_path is not None
    tokens = token_strings(table.tokenizer_path)
    padding = len(table.values) - len(tokens)
    if padding < 0:
        raise UserError(
            f"{table.name}: has {len(table.values)} rows but its tokenizer {table.tokenizer_path} has {len(tokens)} ids"
        )
    return [*tokens, *[None] * padding]


def _named_tokens(tokens: Tokens) -> int:
    return sum(token is not None for token in tokens)


def _check_enough(names: tuple[str, str], matches: int, tokens: tuple[int, int]) -> None:
    if matches < ENOUGH and matches < SHARE * max(tokens):
        raise UserError(
            f"{matches:,} tokens match, of {tokens[0]:,} in {names[0]} and {tokens[1]:,} in {names[1]}: too few to "
            f"compare; {ENOUGH:,} must match, or {100 * SHARE:.0f} % of the larger vocabulary"
        )


def _rows_of(equal_V: np.ndarray, kept_V: np.ndarray | None) -> np.ndarray:
    return equal_V if kept_V is None else equal_V[kept_V]


def _start(a: Table, b: Table, rows: tuple[np.ndarray, np.ndarray] | None) -> tuple[bool | None, np.ndarray | None]:
    """Whether any rows of one number were equal at step 0, and which of the rows that correspond; None if unknown."""
    x_VD, y_VD = (table.initial() if table.initial else None for table in (a, b))
    if x_VD is None or y_VD is None:
        return None, None
    V = max(len(x_VD), len(y_VD))
    equal_V = np.zeros(V, bool)
    if x_VD.shape[1] == y_VD.shape[1]:
        for block in row_blocks(min(len(x_VD), len(y_VD)), x_VD.shape[1]):
            equal_V[block] = (x_VD[block] == y_VD[block]).all(axis=1)
    if rows is None:
        return bool(equal_V.any()), equal_V
    return bool(equal_V.any()), (rows[0] == rows[1]) & equal_V[rows[0]]
