"""`tiedjax analyze map A [B]`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tiedjax.analysis.commands import shared

if TYPE_CHECKING:
    import numpy as np

    from tiedjax.analysis.map import Map
    from tiedjax.analysis.tables import Table

HELP = "a table in the plane, how far that picture can be trusted, and the nearest rows of single tokens"
SUBJECT = "tables"
_TOKENS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A, perhaps B, and the options."""
    parser.add_argument("a", metavar="A", help=f"a table: {shared.TABLE}")
    parser.add_argument("b", metavar="B", nargs="?", help="another, of the same tokens in the same order")
    parser.add_argument("--method", default="pca", help="pca, or tsne where openTSNE is installed (default: pca)")
    parser.add_argument(
        "--tokens",
        metavar="TEXT,TEXT,...",
        help='whose nearest rows are shown: texts of single tokens, or ids as "[12]" (default: the most frequent)',
    )
    shared.add_count(parser, "--neighbours", 5, "nearest rows of each of those tokens")
    shared.add_counts(parser)
    shared.add_all_rows(parser)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    import numpy as np

    from tiedjax.analysis import words
    from tiedjax.analysis.map import draw_map, nearest
    from tiedjax.analysis.records import to_plain
    from tiedjax.analysis.tables import read_table

    k = shared.at_least(args, "neighbours")
    tables = [read_table(args.a)] if args.b is None else list(shared.read_pair(args))
    mask = shared.counting_rows(args, *tables)
    kept = np.arange(len(tables[0].values)) if mask is None else np.flatnonzero(mask)
    tokens, texts_of = _chosen(args, tables, kept)
    maps = [draw_map(t.values[kept], args.method, report=shared.reporter("map")) for t in tables]
    near = [nearest(t.values, tokens, k, mask) for t in tables]
    ids = sorted({i for of in near for n in of for i in (n.token, *n.neighbours)})
    texts = {i: words.visible(text) for i, text in zip(ids, texts_of(ids), strict=True)}
    result = {
        "inputs": [t.describe() for t in tables],
        "form": "corrected",
        "rows": len(kept),
        "rows_masked_out": len(tables[0].values) - len(kept),
        "width": tables[0].values.shape[1],
        "tokens": kept,
        "maps": to_plain(maps),
        "nearest": to_plain(near),
        "texts": texts,
    }
    lines = [
        [texts[of[0].token], *(", ".join(f"{texts[i]} {c:.2f}" for i, c in _listed(n)) or "-" for n in of)]
        for of in zip(*near, strict=True)
    ]
    beside = shared.text_table(["token", *(t.name for t in tables)], lines)
    head = shared.heading(
        f"{' and '.join(t.name for t in tables)} in the plane", len(kept), result["rows_masked_out"], result["width"]
    )
    return result, f"{head}\n{_trust(tables, maps)}\nnearest rows by cosine\n{beside}"


def _chosen(args: argparse.Namespace, tables: list[Table], kept: np.ndarray) -> tuple[list[int], Any]:
    """The tokens whose neighbours are asked for, and what gives ids their texts."""
    from functools import partial

    from tiedjax.analysis.tokens import most_frequent, token_ids, token_texts

    path = next((t.tokenizer_path for t in tables if t.tokenizer_path), None)
    counts = shared.counts_of(args, *tables)
    if args.tokens is not None:
        tokens = token_ids(path, [text for text in args.tokens.split(",") if text])
    elif counts is not None:
        tokens = most_frequent(counts, _TOKENS)
    else:
        tokens = kept[:_TOKENS].tolist()
    return tokens, partial(token_texts, path)


def _listed(near: Any) -> Any:
    return zip(near.neighbours, near.cosines, strict=True)


def _trust(tables: list[Table], maps: list[Map]) -> str:
    rows = [
        [
            table.name,
            m.method,
            None if m.explained is None else sum(m.explained),
            *([None] * 4 if m.trust is None else [m.trust.score, m.trust.floor, m.trust.corrected, m.trust.queries]),
        ]
        for table, m in zip(tables, maps, strict=True)
    ]
    header = ["table", "map", "variance shown", "trustworthiness", "floor", "corrected", "rows asked"]
    return shared.text_table(header, rows)
