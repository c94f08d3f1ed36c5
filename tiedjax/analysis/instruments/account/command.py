"""`tiedjax analyze account RUN`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tiedjax.analysis.basis import arguments
from tiedjax.errors import UserError

if TYPE_CHECKING:
    from tiedjax.analysis.instruments.account.account import RunAccount

HELP = "who wrote a shared table, when, and what each role's updates did to the next batch's loss"
SUBJECT = "run"
READS = "what each update wrote into the table"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and the options."""
    arguments.add_subject(parser, SUBJECT)
    parser.add_argument(
        "--twin", metavar="RUN", help="an untied run: beside its tables stands what each role wrote (default: none)"
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    from tiedjax.analysis.basis.plain_json import to_plain
    from tiedjax.analysis.instruments.account.account import measure
    from tiedjax.tying import distinct

    subject, twin = arguments.open_trained(args.a, "account", READS), None
    if args.twin:
        twin = arguments.open_trained(args.twin, "account", READS).tables()
        shapes = [list(tables.input.shape) for tables in (subject.tables(), twin)]
        if shapes[0] != shapes[1]:
            raise UserError(f"--twin: {args.twin}: its tables are {shapes[1]}, those of {args.a} {shapes[0]}")
    account = measure(subject, twin=twin)
    roles = arguments.described_roles(args.a, distinct(subject.tables()))
    result = arguments.run_result(args, subject, roles, account.rows, account.width, account.table_rows - account.rows)
    return result | to_plain(account), _text(args, account)


def _text(args: argparse.Namespace, account: RunAccount) -> str:
    from tiedjax.analysis.instruments.account.reading import parts_of

    others = list(account.shares.regularisers)
    of = "" if account.rows == account.table_rows else f" (a sample of the {account.table_rows})"
    lines = [
        f"{args.a} at step {account.step}: who wrote its table, shares of the squared norm of {account.rows} rows{of}",
        arguments.text_table(
            ["tokens", "rows", "initial", "input", "output", *others],
            [
                [name, shares.rows, *parts_of(shares).values()]
                for name, shares in {"all": account.shares, **account.strata}.items()
            ],
        ),
        "initial: what is left of the first table; input, output: of what that role's updates wrote; "
        + (f"{', '.join(others)}: of what that regulariser wrote; " if others else "")
        + "they sum to 1",
        "",
        "when it was written: shares of the last table",
        arguments.text_table(
            ["steps", "of all rates", "input", "output", *others, "all" if others else "both"],
            [
                [f"{span.first + 1}-{span.last}", span.rate, *parts_of(span).values(), span.written]
                for span in account.spans
            ],
        ),
        "of all rates: the span's share of the summed learning rate",
        "",
        "change of the next batch's loss by an update, to first order, in thousandths of a nat a token",
        arguments.text_table(
            ["steps", "in<-in", "in<-out", "out<-in", "out<-out", "decay", *others, "body"],
            [
                [f"{change.first + 1}-{change.last}", *map(_thousandths, _of(change, others))]
                for change in account.changes
                if change.last > change.first
            ],
        ),
        "in<-out: through the lookup, of what the output role wrote; body: at the steps where it was measured",
    ]
    if account.tables:
        lines += [
            "",
            "who wrote what each role reads: the account carried through the scheme from snapshot to snapshot",
            arguments.text_table(
                ["table", "initial", "input", "output", *others, "remainder"],
                [
                    [table, *parts_of(each.whole).values(), each.whole.remainder]
                    for table, each in zip(("lookup", "output"), account.tables.values(), strict=True)
                ],
            ),
            "remainder: the norm, over the table's, of what a scheme that is not linear leaves between snapshots",
        ]
    if account.nearness:
        lines += [
            "",
            f"what each role wrote beside the tables of {args.twin}: orthogonal map, chance: equally frequent rows",
            arguments.text_table(
                ["wrote", "beside", "score", "chance", "corrected"],
                [
                    [*name.split("_to_"), score.score, score.floor, score.corrected]
                    for name, score in account.nearness.items()
                ],
            ),
        ]
    return "\n".join(lines)


def _of(change: Any, others: list[str]) -> list[float | None]:
    by_regularisers = [change.regularisers.get(name) for name in others]
    return [change.in_in, change.in_out, change.out_in, change.out_out, change.decay, *by_regularisers, change.body]


def _thousandths(value: float | None) -> float | None:
    return None if value is None else 1000 * value
