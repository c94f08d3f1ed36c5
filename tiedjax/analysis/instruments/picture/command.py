"""`tiedjax analyze map A [B]`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tiedjax.analysis.basis import arguments
from tiedjax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from tiedjax.analysis.basis.tables import Table
    from tiedjax.analysis.instruments.picture.projection import Nearest, Projection

HELP = "a table in the plane, how far that picture can be trusted, and the nearest rows of single tokens"
SUBJECT = "tables"
_TOKENS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A, perhaps B, and the options."""
    arguments.add_subject(parser, SUBJECT, tokenizers="--tokenizers")
    parser.add_argument("--method", default="pca", help="pca, or tsne where openTSNE is installed (default: pca)")
    parser.add_argument(
        "--tokens",
        metavar="TEXT,TEXT,...",
        help='whose nearest rows are shown: texts of single tokens, or ids as "[12]" (default: the most frequent)',
    )
    arguments.add_count(parser, "--neighbours", 5, "nearest rows of each of those tokens")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    import numpy as np

    from tiedjax.analysis.basis import numbers
    from tiedjax.analysis.basis.plain_json import to_plain
    from tiedjax.analysis.instruments.picture.projection import measure

    k = arguments.at_least(args, "neighbours")
    inputs = arguments.read_tables(args)
    tables, kept_V = inputs.tables, inputs.kept_V
    row_N = np.arange(len(tables[0].values)) if kept_V is None else np.flatnonzero(kept_V)
    token_rows, texts_of = _token_rows(args, tables, row_N)
    report = arguments.reporter("map")
    pictures = [
        measure(values, token_rows, kept_V=kept_V, neighbours=k, method=args.method, report=report)
        for values in inputs.values
    ]
    maps = [picture.projection for picture in pictures]
    ids_V = _ids(tables[0])
    near = [[_with_ids(n, ids_V) for n in picture.nearest] for picture in pictures]
    ids = sorted({i for table_near in near for n in table_near for i in (n.token, *n.neighbours)})
    texts = {i: numbers.visible(text) for i, text in zip(ids, texts_of(ids), strict=True)}
    result = inputs.result(args, len(row_N)) | {
        "tokens": ids_V[row_N],
        "maps": to_plain(maps),
        "nearest": to_plain(near),
        "texts": texts,
    }
    lines = [
        [
            texts[token_near[0].token],
            *(", ".join(f"{texts[i]} {c:.2f}" for i, c in _neighbours_with_cosines(n)) or "-" for n in token_near),
        ]
        for token_near in zip(*near, strict=True)
    ]
    nearest_table = arguments.text_table(["token", *(t.name for t in tables)], lines)
    head = inputs.heading(f"{' and '.join(t.name for t in tables)} in the plane", result)
    return result, f"{head}{inputs.note}\n{_trust(tables, maps)}\nnearest rows by cosine\n{nearest_table}"


def _token_rows(args: argparse.Namespace, tables: tuple[Table, ...], row_N: np.ndarray) -> tuple[list[int], Any]:
    """The rows of the tokens whose neighbours are asked for, and what gives ids their texts."""
    from functools import partial

    from tiedjax.analysis.basis.tokens import most_frequent, token_ids, token_texts

    path = next((t.tokenizer_path for t in tables if t.tokenizer_path), None)
    counts = arguments.counts_of(*tables)
    if args.tokens is not None:
        rows = _rows(tables[0], token_ids(path, [text for text in args.tokens.split(",") if text]))
    elif counts is not None:
        rows = most_frequent(counts, _TOKENS)
    else:
        rows = row_N[:_TOKENS].tolist()
    return rows, partial(token_texts, path)


def _ids(table: Table) -> np.ndarray:
    """The rows' token ids, int [V]."""
    import numpy as np

    return np.arange(len(table.values)) if table.ids is None else table.ids


def _rows(table: Table, ids: list[int]) -> list[int]:
    """The rows of those ids. UserError for one that matched no token of the other table."""
    if table.ids is None:
        return ids
    row_of = {int(i): row for row, i in enumerate(table.ids)}
    missing = [i for i in ids if i not in row_of]
    if missing:
        raise UserError(f"map: token {missing[0]} of {table.name} matches no token of the other table")
    return [row_of[i] for i in ids]


def _with_ids(near: Nearest, ids_V: np.ndarray) -> Nearest:
    """The same with token ids in the place of rows."""
    return replace(near, token=int(ids_V[near.token]), neighbours=ids_V[near.neighbours].tolist())


def _neighbours_with_cosines(near: Any) -> Any:
    return zip(near.neighbours, near.cosines, strict=True)


def _trust(tables: tuple[Table, ...], maps: list[Projection]) -> str:
    rows = [
        [
            table.name,
            m.method,
            None if m.explained is None else sum(m.explained),
            *([None] * 4 if m.trust is None else [m.trust.score, m.trust.floor, m.trust.corrected, m.trust.rows]),
        ]
        for table, m in zip(tables, maps, strict=True)
    ]
    header = ["table", "map", "variance shown", "trustworthiness", "floor", "corrected", "rows asked"]
    return arguments.text_table(header, rows)
