"""Who wrote a table of both roles: the running sums of what each role's updates wrote, and what those did to the loss.

At every snapshot the table is A E_0 + C_input + C_output, exactly: what is left of the initial table and of what each
role wrote, and of each regulariser that is on. A part's share of the table E is <part, E> / ||E||^2, so that the
shares sum to 1 (shares of norms would not); the same over the rows of a stratum. What role r wrote from step s to step
t, and is left in the last table, is A_T / A_t (C_r,t - A_t / A_s C_r,s). An account, not a cause: gradients and the
size of steps depend on both roles.

M is the change of the next batch's loss, to first order, by an update: through the use that one role makes of the
table, of what one role wrote into it. The run logged it at every step, in nats a token.

Axes: N followed rows, D width, S logged steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tiedjax.analysis.basis.chance import Score
from tiedjax.analysis.basis.statistics import over_steps
from tiedjax.analysis.basis.strata import strata
from tiedjax.analysis.instruments.account.reading import PARTS, TableReading, grouped, parts_of, readings
from tiedjax.analysis.instruments.alignment.align import measure as alignment
from tiedjax.config import REGULARISERS

FIT = "orthogonal"  # of the alignment with the twin's tables
EARLY = 0.1  # share of the steps
CHANGES = ("in_in", "in_out", "out_in", "out_out")  # of the loss: the reader, then the writer


@dataclass(frozen=True)
class Shares:
    """Shares of a squared norm that sum to 1: what is left of the initial table, and of what each role wrote.

    `regularisers` are the shares of what each regulariser wrote, by its name.
    """

    rows: int
    initial: float
    input: float
    output: float
    regularisers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """What was written after step `first` up to step `last` and is left in the last table, as shares of that.

    `rate` is the span's share of all learning rates: what it would have written, were all steps alike.
    """

    first: int
    last: int
    rate: float
    input: float
    output: float
    regularisers: dict[str, float] = field(default_factory=dict)

    @property
    def written(self) -> float:
        """The share of all that was written in it."""
        return self.input + self.output + sum(self.regularisers.values())


@dataclass(frozen=True)
class LossChange:
    """Means over the steps after `first` up to `last`, by `over_steps`, in nats a token and update.

    `in_in`, `in_out`, `out_in` and `out_out` are M, the reader before the writer. `body` is over the steps at which it
    was measured, None where there are none; `output_update_share` is of both norms, and `cosine` of both updates;
    `clipped` is the share of these steps whose gradient was clipped, None without a limit; `regularisers` are the
    changes by what each regulariser wrote, of the loss without them, by its name.
    """

    first: int
    last: int
    in_in: float | None
    in_out: float | None
    out_in: float | None
    out_out: float | None
    decay: float | None
    body: float | None
    output_update_share: float | None
    cosine: float | None
    input_step_share: float | None
    clipped: float | None
    regularisers: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """M at every logged step."""

    steps: list[int]
    in_in: list[float | None]
    in_out: list[float | None]
    out_in: list[float | None]
    out_out: list[float | None]


@dataclass(frozen=True)
class RunAccount:
    """The account of one run at one snapshot.

    Attributes:
      rows: that are followed, of a table with `table_rows` rows.
      shares: of the whole table (of the rows that are followed), then by stratum of token frequency.
      spans: what each stretch between snapshots wrote; the first tenth of the steps ends `early`.
      error: what the account misses of its check rows, relative to their norm; None where it was not logged.
      changes: of the loss in the first tenth, after it, and over all steps.
      nearness: where a twin was given, for each role that wrote and each table of the twin ("input_to_output": what the
        input role wrote beside the twin's output table) the alignment score above the floor of equally frequent rows.
      tables: by the role that reads it, who wrote its table; empty where both read the one that the account is of, and
        where not all rows are followed.
    """

    step: int
    rows: int
    table_rows: int
    width: int
    shares: Shares
    strata: dict[str, Shares]
    early: Span
    spans: list[Span]
    error: float | None
    changes: list[LossChange]
    curve: Curve
    nearness: dict[str, Score]
    tables: dict[str, TableReading] = field(default_factory=dict)


def measure(run: Any, step: int | None = None, *, twin: Any = None) -> RunAccount:
    """Who wrote the run's shared table up to a snapshot (None: the last), and what the updates did to the loss.

    `run` is a `tiedjax.Run`; `twin` has the tables that what each role wrote is compared with (`RunTables`). UserError
    where the run has no account.
    """
    step = run.snapshot_steps[-1] if step is None else step
    last, counts = run.account(step), run.token_counts
    first, *others = parts_of(last).values()
    table_ND = sum(others, first)
    steps = [at for at in run.snapshot_steps if at <= step]
    written = {at: run.account(at) for at in steps[:-1]} | {step: last}
    split = early_end(steps)
    metrics = run.metrics
    masks = {name: mask_V[last.rows] for name, mask_V in strata(counts).items()}
    return RunAccount(
        step=step,
        rows=len(last.rows),
        table_rows=run.config.model.table_rows,
        width=table_ND.shape[1],
        shares=_shares(last, table_ND, np.ones(len(table_ND), bool)),
        strata={name: _shares(last, table_ND, mask_N) for name, mask_N in masks.items() if mask_N.any()},
        early=_span(written, table_ND, steps[0], split, metrics),
        spans=[_span(written, table_ND, *pair, metrics) for pair in itertools.pairwise(steps)],
        error=_last(metrics, "account_error", step),
        changes=[_changes(metrics, *span) for span in [(0, split), (split, step), (0, step)]],
        curve=Curve(
            [int(at) for at in metrics["step"]],
            *([_plain(value) for value in _column(metrics, f"m_{name}")] for name in CHANGES),
        ),
        nearness={} if twin is None else _nearness(last, twin, counts),
        tables={} if run.tables(step).tied else readings(run, step),
    )


def early_end(steps: Sequence[int]) -> int:
    """The snapshot that ends the first tenth of the steps: the last one within it, or the first after step 0.

    >>> early_end([0, 1, 2, 4, 8, 16, 32, 50, 100, 300])
    16
    """
    within = [step for step in steps if 0 < step <= EARLY * steps[-1]]
    return within[-1] if within else steps[min(1, len(steps) - 1)]


def _shares(account: Any, table_ND: np.ndarray, kept_N: np.ndarray) -> Shares:
    """Of the rows of a mask; over their whole squared norm."""
    rows_MD = np.asarray(table_ND[kept_N], np.float64)
    size = np.sum(np.square(rows_MD))
    along = {part: float(np.sum(part_ND[kept_N] * rows_MD) / size) for part, part_ND in parts_of(account).items()}
    return Shares(int(kept_N.sum()), **grouped(along))


def _span(
    written: Mapping[int, Any], table_ND: np.ndarray, first: int, last: int, metrics: Mapping[str, np.ndarray]
) -> Span:
    size, final = np.sum(np.square(table_ND, dtype=np.float64)), max(written)
    log_kept = {at: written[at].log_kept for at in (first, last, final)}
    before, after = (parts_of(written[at]) for at in (first, last))
    left = {
        part: np.exp(log_kept[final] - log_kept[last]) * after[part]
        - np.exp(log_kept[final] - log_kept[first]) * before[part]
        for part in after
        if part != "initial"
    }
    shares = {part: float(np.sum(part_ND * table_ND, dtype=np.float64) / size) for part, part_ND in left.items()}
    return Span(first, last, _rate_share(metrics, first, last, final), **grouped(shares))


def _rate_share(metrics: Mapping[str, np.ndarray], first: int, last: int, final: int) -> float:
    """Of the learning rates of the updates up to `final`; where not every step was logged, between those that were."""
    rates = np.interp(np.arange(1, final + 1), metrics["step"], metrics["learning_rate"])
    return float(rates[first:last].sum() / rates.sum())


def _changes(metrics: Mapping[str, np.ndarray], first: int, last: int) -> LossChange:
    def mean(name: str) -> float | None:
        return over_steps(metrics["step"], _column(metrics, name), first + 1, last)

    logged_as = {name: f"m_{name}" for name in CHANGES} | {"decay": "decay_loss_change", "body": "body_loss_change"}
    logged_as |= {"output_update_share": "output_update_share", "cosine": "role_update_cosine"}
    logged_as |= {"input_step_share": "input_step_share"}
    changed_by = {name: f"regulariser_{name}_loss_change" for name in REGULARISERS}
    factor_S = _column(metrics, "clip_factor")
    clipped_S = np.where(np.isfinite(factor_S), factor_S < 1, np.nan)
    return LossChange(
        first,
        last,
        **{field: mean(name) for field, name in logged_as.items()},
        clipped=over_steps(metrics["step"], clipped_S, first + 1, last),
        regularisers={kind: mean(name) for kind, name in changed_by.items() if name in metrics},
    )


def _nearness(account: Any, twin: Any, counts: np.ndarray) -> dict[str, Score]:
    scores = {}
    seen_N = counts.sum(axis=0)[account.rows] > 0
    for writer, reader in itertools.product(PARTS[1:], PARTS[1:]):
        fitted = alignment(
            getattr(account, writer), getattr(twin, reader)[account.rows], fits=[FIT], kept_V=seen_N,
            counts=counts[:, account.rows], held_out_floors=False,
        )  # fmt: skip
        scores[f"{writer}_to_{reader}"] = fitted.beyond_frequency[FIT]
    return scores


def _column(metrics: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    return metrics.get(name, np.full(len(metrics["step"]), np.nan))


def _last(metrics: Mapping[str, np.ndarray], name: str, step: int) -> float | None:
    values = _column(metrics, name)[metrics["step"] <= step]
    return _plain(values[-1]) if len(values) else None


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
