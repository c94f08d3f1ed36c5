"""Role regret: what a tie costs each role of the table, in nats a token, the body frozen as it was trained.

First the run's own tables are re-fitted on text that the run was shown, one array for both roles where they share one:
nothing that training has merely left undone may count as a cost of the tie. From there the table of one role, or both
tables apart, are re-fitted too (`refit` says how). A regret is what that saves on held-out text:

    input, output   the table of that role alone, the other one as it is
    both            both apart: for a shared table, the tension between its roles
    own             the first re-fit, over the trained tables: what training has left undone

The same of a run with two tables is a control, for it has no tie to lose; what the tie costs is the difference between
the two. Beside each saving stands that on the fitting text, from which it falls short by what does not carry over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiedjax.analysis.basis.held_out import FrozenModel, held_out_windows, over_windows, training_windows
from tiedjax.analysis.basis.statistics import Interval, bootstrap_mean
from tiedjax.analysis.basis.strata import THIRDS, strata
from tiedjax.analysis.basis.tables import ROLES
from tiedjax.analysis.instruments.regret.refit import (
    MOST_ITERATIONS,
    ONE_ARRAY,
    TWO_ARRAYS,
    Arrays,
    Fit,
    HeldLoss,
    refit,
)
from tiedjax.data.prepared import Prepared

FITTING_TOKENS = 65_536
HELD_OUT_TOKENS = 16_384
ROWS_HELD = 16  # occurrences for each of a row's numbers
REGRETS: dict[str, Arrays] = {**{role: ((role,),) for role in ROLES}, "both": TWO_ARRAYS}


@dataclass(frozen=True)
class Saving:
    """What a re-fit saves, in nats a token: on held-out text, there by stratum of the target, on the fitting text.

    Intervals over windows.
    """

    held_out: Interval
    strata: dict[str, Interval]
    fitting: float
    iterations: int
    converged: bool


@dataclass(frozen=True)
class Regret:
    """What re-fitting saves one model; `loss` is that of the trained model, nats a held-out token.

    `trained_balance` and `balance` are the cosine of the two role gradients on the fitting text before and after the
    first re-fit, of a table that both roles share. `regrets` are by name of REGRETS, none where the first re-fit has
    not converged.
    """

    shared: bool
    loss: Interval
    own: Saving
    trained_balance: float | None
    balance: float | None
    regrets: dict[str, Saving]
    hold: int
    fitting_tokens: int
    held_out_tokens: int
    held_out_windows: int

    @property
    def converged(self) -> bool:
        """Whether every re-fit has converged."""
        return self.own.converged and all(saving.converged for saving in self.regrets.values())


@dataclass(frozen=True)
class RunRegret(Regret):
    """The regret of a run's model at its last full checkpoint."""

    step: int | None
    rows: int
    width: int


def measure(
    model: FrozenModel,
    run: Any,
    prepared: Prepared,
    *,
    fitting_tokens: int = FITTING_TOKENS,
    held_out_tokens: int = HELD_OUT_TOKENS,
    iterations: int = MOST_ITERATIONS,
    hold: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> RunRegret:
    """The regret of a run's model: re-fits on the first `fitting_tokens` that the run was shown, scored on about
    `held_out_tokens` that it was not.

    Every row is held with the weight of `hold` occurrences, by default ROWS_HELD for each of its numbers.
    """
    rows, width = model.U_VD.shape
    groups = {name: mask_V for name, mask_V in strata(run.token_counts[1]).items() if name in THIRDS}
    found = regret(
        model,
        np.concatenate(list(training_windows(run, prepared, fitting_tokens))),
        held_out_windows(prepared, run.seq_len, held_out_tokens),
        groups,
        hold=ROWS_HELD * width if hold is None else hold,
        iterations=iterations,
        report=report,
    )
    return RunRegret(**vars(found), step=model.step, rows=rows, width=width)


def regret(
    model: FrozenModel,
    fitting_WS: np.ndarray,
    held_out_WS: np.ndarray,
    groups: Mapping[str, np.ndarray],
    *,
    hold: int,
    iterations: int = MOST_ITERATIONS,
    report: Callable[[str], None] = lambda line: None,
) -> Regret:
    """Re-fits on windows int [W, T + 1] and scores on others; `groups` are boolean [V] masks over targets.

    `report` is told of each re-fit.
    """
    held_loss, score = HeldLoss(model, fitting_WS, hold), _Score(model, held_out_WS, groups)
    shared = model.tables.tied
    trained = held_loss.slopes(held_loss.trained)
    before = Fit(held_loss.trained, trained.loss, trained.balance if shared else None, 0, converged=True)

    def saving(name: str, arrays: Arrays, start: Fit) -> tuple[Fit, Saving]:
        fit = refit(held_loss, start.tables, arrays, most=iterations)
        ended = "converged" if fit.converged else "not converged"
        report(f"{name}: {fit.loss:.4f} nats on the fitting text after {fit.iterations} iterations, {ended}")
        return fit, score.saving(start, fit)

    own, own_saving = saving("own tables", ONE_ARRAY if shared else TWO_ARRAYS, before)
    regrets = {name: saving(name, arrays, own)[1] for name, arrays in REGRETS.items()} if own.converged else {}
    return Regret(
        shared=shared,
        loss=score.loss(before),
        own=own_saving,
        trained_balance=before.balance,
        balance=own.balance,
        regrets=regrets,
        hold=hold,
        fitting_tokens=fitting_WS[:, 1:].size,
        held_out_tokens=held_out_WS[:, 1:].size,
        held_out_windows=len(held_out_WS),
    )


class _Score:
    """Held-out losses of a body between other tables."""

    def __init__(self, model: FrozenModel, tokens_WS: np.ndarray, groups: Mapping[str, np.ndarray]) -> None:
        self._model, self._tokens_WS = model, tokens_WS
        self._in_group_WT = {name: mask_V[tokens_WS[:, 1:]] for name, mask_V in groups.items()}

    def loss(self, fit: Fit) -> Interval:
        """Nats a token."""
        return over_windows(self._nats(fit), len(self._tokens_WS))

    def saving(self, before: Fit, after: Fit) -> Saving:
        """What a re-fit saves over where it began."""
        saved_WT = self._nats(before) - self._nats(after)
        return Saving(
            held_out=over_windows(saved_WT, len(saved_WT)),
            strata={name: _mean(saved_WT, mask_WT) for name, mask_WT in self._in_group_WT.items()},
            fitting=before.loss - after.loss,
            iterations=after.iterations,
            converged=after.converged,
        )

    def _nats(self, fit: Fit) -> np.ndarray:
        return self._model.with_tables(fit.tables).bits(self._tokens_WS) * math.log(2)


def _mean(values_WT: np.ndarray, mask_WT: np.ndarray) -> Interval:
    """The mean over some positions, its interval over windows."""
    windows_WT = np.broadcast_to(np.arange(len(values_WT))[:, None], values_WT.shape)
    return bootstrap_mean(values_WT[mask_WT], groups=windows_WT[mask_WT])
