"""`tiedjax data prepare SOURCE --out DIR`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial

from tiedjax.errors import UserError

PREPARE = "turn text into token shards with their tokenizer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `prepare` with the arguments that `run` reads."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_prepare(commands.add_parser("prepare", help=PREPARE, description=PREPARE))


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="embedded | tfds:NAME[/CONFIG] | text:GLOB (.jsonl line by line, every other file as text, also .gz and "
        ".zst) | tokens:GLOB (.npy, raw uint16 or uint32)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        required=True,
        help="new folder for the result; train on it with data.source prepared:DIR",
    )
    parser.add_argument("--vocab-size", type=int, default=4096, help="token ids that may occur (default: %(default)s)")
    parser.add_argument(
        "--tokenizer",
        default="bpe",
        metavar="PATH",
        help="bpe: train a byte-level BPE of --vocab-size entries; or a tokenizer.json (default: %(default)s)",
    )
    parser.add_argument(
        "--holdout", type=float, default=0.02, help="share of the documents kept for evaluation (default: %(default)s)"
    )
    parser.add_argument("--max-documents", type=int, help="read at most this many documents (default: all)")
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="field of the text in .jsonl lines and TFDS examples (default: %(default)s)",
    )
    parser.add_argument(
        "--seq-len",
        action="append",
        type=int,
        default=[],
        metavar="T",
        help="count the tokens of training windows of this length (model.seq_len) now; repeatable (default: when a run "
        "asks for them)",
    )
    parser.add_argument("--workers", type=int, help="threads that tokenize (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Prepares args.source into args.out, with progress on standard error; prints the folder's summary. UserError."""
    try:
        return _run(args)
    except UserError as error:
        if type(error) is not UserError:
            raise
        raise UserError(_by_option(str(error))) from None


def _by_option(message: str) -> str:
    """What is wrong by the name of this command's option, instead of by that of the config's."""
    named = {"data.source": "SOURCE", "model.vocab_size": "--vocab-size", "model.seq_len": "--seq-len"}
    message = re.sub(r"\b(?:data|model)\.[a-z_]+(?!:DIR)", lambda key: named.get(key[0], _option(key[0])), message)
    return re.sub(r"^(?:tokenizer|text_field|max_documents|holdout|workers)(?=:)", lambda key: _option(key[0]), message)


def _option(key: str) -> str:
    return f"--{key.rpartition('.')[2].replace('_', '-')}"


def _run(args: argparse.Namespace) -> int:
    from tiedjax.config import DataConfig
    from tiedjax.data.prepare import prepare

    if args.source.startswith("prepared:"):
        raise UserError(
            f"SOURCE: {args.source} is prepared already; give the text that it was made of: embedded, tfds:, text: or "
            "tokens:"
        )
    data = DataConfig(
        source=args.source,
        tokenizer=args.tokenizer,
        text_field=args.text_field,
        max_documents=args.max_documents,
        holdout=args.holdout,
        workers=args.workers,
    )
    for seq_len in args.seq_len:
        if seq_len < 1:
            raise UserError(f"--seq-len: must be at least 1, got {seq_len}")
    report: Callable[[str], None] = partial(print, file=sys.stderr, flush=True)
    prepared = prepare(data, args.vocab_size, report=report, out=args.out)
    for seq_len in args.seq_len:
        report(f"count tokens of windows of {seq_len:,}")
        prepared.token_counts(seq_len, prepared.vocab_size)
    print(f"data.source: prepared:{args.out}")
    return 0
