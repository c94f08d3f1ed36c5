"""What the commands share: arguments, reading tables, masks, and text."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tiedjax.errors import UserError
from tiedjax.files import local_path

if TYPE_CHECKING:
    import numpy as np

    from tiedjax.analysis.basis.model_on_text import ModelOnText
    from tiedjax.analysis.basis.tables import Table
    from tiedjax.data.prepared import Prepared

TABLE = (
    "RUN[@STEP][#input|#output], a Hugging Face DIR[#input|#output], FILE.npy, FILE.npz[#NAME] or "
    "FILE.safetensors[#NAME]"
)


def add_subject(parser: argparse.ArgumentParser, subject: str, *, tokenizers: str = "--tokens") -> None:
    """What a command measures, by its SUBJECT, and the options that come with it.

    `tokenizers` names the option that matches the rows of two tables from files.
    """
    if subject == "run":
        parser.add_argument("a", metavar="RUN", help="a run directory")
        return
    if subject == "model":
        parser.add_argument("a", metavar="RUN", help="a run directory, or a Hugging Face DIR")
        add_data(parser)
        return
    if subject == "table":
        parser.add_argument("a", metavar="TABLE", help=TABLE)
    else:
        parser.add_argument("a", metavar="A", help=f"the first table: {TABLE}")
        alone: dict[str, Any] = {"nargs": "?"} if subject == "tables" else {}
        parser.add_argument("b", metavar="B", help="the table it is compared with, named likewise", **alone)
        parser.add_argument(
            tokenizers,
            dest="tokenizers",
            nargs=2,
            metavar=("A.json", "B.json"),
            help="tokenizer.json of A and of B, for tables from files: rows are matched by token (runs know theirs)",
        )
    parser.add_argument(
        "--counts", metavar="FILE.npy", help="[V] or [2, V] token counts of the first table, for tables from a file"
    )
    add_all_rows(parser)


def add_paper(parser: argparse.ArgumentParser, meaning: str) -> None:
    """--paper; `meaning` says what the paper's form leaves out or does otherwise."""
    parser.add_argument("--paper", action="store_true", help=f"the form of arXiv 2603.26663: {meaning}")


def add_all_rows(parser: argparse.ArgumentParser) -> None:
    """--all-rows."""
    parser.add_argument(
        "--all-rows", action="store_true", help="keep padding rows and never-seen tokens (default: leave them out)"
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    """--data and --seq-len."""
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        help="where the run's text lies now (default: as in its config); of a Hugging Face DIR the text that it is "
        "measured on, as data.source names one (default: embedded)",
    )
    parser.add_argument(
        "--seq-len",
        type=int,
        metavar="T",
        help="positions of a window of the text of a Hugging Face DIR (default: all that it has, at most 512)",
    )


def add_count(
    parser: argparse.ArgumentParser, name: str, default: int | None, meaning: str, *, default_in_words: str = ""
) -> None:
    """A whole number that must be at least 1; where the default is None, `default_in_words` says what it stands for."""
    meaning = f"{meaning} (default: {default_in_words or default})"
    parser.add_argument(name, type=int, default=default, metavar="N", help=meaning)


def at_least(args: argparse.Namespace, name: str, least: int = 1) -> int:
    """The value of `--name`; UserError below `least`."""
    value = getattr(args, name.replace("-", "_"))
    if value < least:
        raise UserError(f"--{name}: must be at least {least}, got {value}")
    return int(value)


@dataclass(frozen=True)
class Inputs:
    """The tables of a command, with corresponding rows, and which of them count.

    `kept_V` is a boolean mask, None where all count; `description` is what a result says of the tables, `note` the
    lines that follow the heading.
    """

    tables: tuple[Table, ...]
    kept_V: np.ndarray | None
    description: dict[str, Any]
    note: str = ""

    @property
    def values(self) -> list[np.ndarray]:
        """[V, D] of each table."""
        return [table.values for table in self.tables]

    def result(self, args: argparse.Namespace, rows: int, left_out: int = 0) -> dict[str, Any]:
        """What every result begins with; `rows` were measured, `left_out` of those that count had no direction."""
        V, width = self.tables[0].values.shape
        masked_out = V - rows - left_out
        return {**self.description, "form": form_of(args), "rows": rows, "rows_masked_out": masked_out, "width": width}

    def heading(self, title: str, result: Mapping[str, Any]) -> str:
        """The first line of a command's text: what was measured, over how many rows."""
        return heading(title, result["rows"], result["rows_masked_out"], result["width"])


def form_of(args: argparse.Namespace) -> str:
    """paper, where the form of arXiv 2603.26663 was asked for, else corrected."""
    return "paper" if getattr(args, "paper", False) else "corrected"


def run_result(
    args: argparse.Namespace, run: Any, inputs: Sequence[Any], rows: int, width: int, masked_out: int = 0
) -> Any:
    """What the result of a command that takes a run or a model begins with; `inputs` describe its tables."""
    from tiedjax.analysis.basis.model_on_text import ModelOnText

    measured_on = {"measured_on": run.describe()} if isinstance(run, ModelOnText) else {}
    return {
        "inputs": list(inputs),
        **measured_on,
        "form": form_of(args),
        "rows": rows,
        "rows_masked_out": masked_out,
        "width": width,
    }


def open_subject(place: str, source: str | None, seq_len: int | None) -> Any:
    """The run in a directory, or the model in one, on the text that `source` names. UserError without either."""
    from tiedjax.analysis.basis.tables import names_model, open_run

    if names_model(place):
        from tiedjax.analysis.basis.model_on_text import ModelOnText

        return ModelOnText(place, source, seq_len)
    if seq_len is not None:
        raise UserError("--seq-len: a run is read in windows of its model.seq_len; leave it out")
    return open_run(place)


def open_trained(place: str, instrument: str, read: str) -> Any:
    """The run in a directory, for an `instrument` of what only training leaves, `read`. UserError for a model."""
    from tiedjax.analysis.basis.tables import names_model, open_run

    if names_model(place):
        raise UserError(
            f"{place}: {instrument} reads {read}, which a run keeps and a model directory does not; "
            f"to train on from it: tiedjax inspect {place} --config FILE"
        )
    return open_run(place)


def read_text(args: argparse.Namespace) -> tuple[Any, Prepared]:
    """The run, or the model, that a command takes, and its prepared text. UserError without either."""
    from tiedjax.analysis.basis.model_on_text import ModelOnText
    from tiedjax.analysis.basis.run_data import data_of

    subject = open_subject(args.a, args.data, args.seq_len)
    return subject, subject.prepared if isinstance(subject, ModelOnText) else data_of(subject, args.data)


def subject_in_words(args: argparse.Namespace, run: Any, step: int | None = None) -> str:
    """How a command's text begins: with the run, at a step, or with the model and the text that it was measured on."""
    from tiedjax.analysis.basis.model_on_text import ModelOnText

    if isinstance(run, ModelOnText):
        return f"{args.a} on {run.in_words()}"
    return args.a if step is None else f"{args.a} at step {step}"


def text_in_words(step: int | None) -> str:
    """Whose text was counted: of a run at a step, or of a model, which has none."""
    return "of the text, which is not what the model was trained on" if step is None else "that the run was shown"


def described_roles(name: str, tables: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A run's tables by role, as every result states its inputs."""
    from tiedjax.analysis.basis.tables import Table

    return [Table(name, values, role).describe() for role, values in tables.items()]


def read_tables(args: argparse.Namespace) -> Inputs:
    """The table A or, with B, both with corresponding rows. Counts from --counts are those of A's rows.

    UserError: tables that cannot be read or compared, counts that do not fit.
    """
    from tiedjax.analysis.basis.matching import matched
    from tiedjax.analysis.basis.tables import read_table

    names = [args.a] if getattr(args, "b", None) is None else [args.a, args.b]
    tables = _with_tokenizers(args, _with_counts(args, [read_table(name) for name in names]))
    description: dict[str, Any] = {"inputs": [table.describe() for table in tables]}
    if len(tables) == 1:
        table, counted_in = _counted(args, tables[0])
        note = f"\ncounts: {counted_in.in_words()}, {text_in_words(None)}" if counted_in else ""
        description |= {"measured_on": counted_in.describe()} if counted_in else {}
        return Inputs((table,), _counting_rows(args, [table]), description, note)
    a, b, matching = matched(*tables)
    kept_V = _counting_rows(args, [a, b])
    note = "".join(f"\n{line}" for line in matching.lines(kept_V))
    return Inputs((a, b), kept_V, description | {"matching": matching.describe(kept_V)}, note)


def _with_counts(args: argparse.Namespace, tables: list[Table]) -> list[Table]:
    """The tables with the counts of --counts, which stand for what any of them knows."""
    import numpy as np

    from tiedjax.analysis.basis.tables import read_counts

    if not getattr(args, "counts", None):
        return tables
    counts = np.atleast_2d(read_counts(args.counts))
    V = len(tables[0].values)
    if counts.shape[1] != V:
        raise UserError(f"{tables[0].name}: has {V} rows but there are counts for {counts.shape[1]} tokens")
    counts_of_each = [np.broadcast_to(counts, (2, V)), None]
    return [replace(table, counts=of) for table, of in zip(tables, counts_of_each, strict=False)]


def _counted(args: argparse.Namespace, table: Table) -> tuple[Table, ModelOnText | None]:
    """The table of a model with the counts of a text, for a command that takes --data; and that text."""
    if not hasattr(args, "data"):
        return table, None
    if table.counts is None and table.run_path is not None:
        from tiedjax.analysis.basis.model_on_text import ModelOnText

        text = ModelOnText(table.run_path, args.data, args.seq_len)
        return replace(table, counts=text.token_counts), text
    if args.data is not None or args.seq_len is not None:
        option = "--seq-len" if args.data is None else "--data"
        raise UserError(f"{option}: {table.name} has counts of its own, or takes --counts FILE.npy; leave it out")
    return table, None


def _with_tokenizers(args: argparse.Namespace, tables: list[Table]) -> list[Table]:
    paths = getattr(args, "tokenizers", None)
    if not paths:
        return tables
    if len(tables) == 1:
        raise UserError(f"{paths[0]}: tokenizers match the rows of two tables, but there is one")
    return [
        replace(table, tokenizer_path=local_path(path, "--tokens")) for table, path in zip(tables, paths, strict=True)
    ]


def counts_of(*tables: Table) -> np.ndarray | None:
    """Counts [2, V] from the first table that knows them; None where none does."""
    return next((table.counts for table in tables if table.counts is not None), None)


def _counting_rows(args: argparse.Namespace, tables: Sequence[Table]) -> np.ndarray | None:
    """Boolean [V]: rows of tokens that every table with known counts saw in training; None keeps all.

    All count with --all-rows and in the paper's form.
    """
    if getattr(args, "paper", False) or args.all_rows:
        return None
    seen_masks = [table.seen for table in tables if table.seen is not None]
    if not seen_masks:
        return None
    kept_V = seen_masks[0].copy()
    for seen_V in seen_masks[1:]:
        kept_V &= seen_V
    if not kept_V.any():
        names = ", ".join(t.name for t in tables)
        raise UserError(f"{names}: no token was seen in training by all; --all-rows keeps every row")
    return kept_V


def reporter(name: str) -> Callable[[str], None]:
    """Writes lines of progress to stderr, once the work has taken five seconds."""
    began = time.monotonic()

    def report(line: str) -> None:
        if time.monotonic() - began > 5:
            print(f"{name}: {line}", file=sys.stderr, flush=True)

    return report


def heading(title: str, rows: int, masked_out: int, width: int) -> str:
    """The first line of a command's text: what was measured, over how many rows."""
    masked = f" ({masked_out} padding or never-seen rows left out)" if masked_out else ""
    return f"{title}: {rows} rows{masked}, width {width}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned plain text: numbers to the right with 4 decimals, None as '-'."""
    cells = [[cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    left = [all(isinstance(row[i], str) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(line, widths, left, strict=True))
        for line in [list(header), *cells]
    ]
    return "\n".join(line.rstrip() for line in lines)


def cell(value: Any) -> str:
    """A value as the text shows it: 4 decimals, None as '-'."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def half_width(span: Mapping[str, Any]) -> float | None:
    """Half the width of an interval that has become JSON; None without one."""
    return None if span["low"] is None else (span["high"] - span["low"]) / 2
