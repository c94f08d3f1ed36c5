"""The held-out loss of a run while it trains."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from tiedjax import sharding
from tiedjax.config import RunConfig
from tiedjax.data.batches import eval_batches
from tiedjax.data.prepared import Prepared
from tiedjax.host import process
from tiedjax.host.watchdog import Watchdog
from tiedjax.step import Steps, TrainState

AHEAD = 4  # batches under way: what a signal waits for


class Evaluation:
    """Mean cross-entropy in nats, without z-loss, by the name that metrics.jsonl has for it.

    Of the held-out windows, of those with even and with odd numbers, and of those of a second text, if there is one.
    """

    def __init__(self, cfg: RunConfig, mesh: Mesh, steps: Steps, prepared: Prepared, second: Prepared | None):
        self._cfg, self._mesh, self._steps, self._prepared, self._second = cfg, mesh, steps, prepared, second

    def __call__(self, state: TrainState, stop: process.Requests, watchdog: Watchdog) -> dict[str, float] | None:
        """The losses of this state; None if a signal came before all were found."""
        losses = self._of(state, self._prepared, "eval_loss", stop, watchdog)
        if losses and self._second:
            second = self._of(state, self._second, "loss", stop, watchdog)
            return second and losses | {"second_eval_loss": second["loss"]}
        return losses

    def _of(
        self, state: TrainState, prepared: Prepared, name: str, stop: process.Requests, watchdog: Watchdog
    ) -> dict[str, float] | None:
        size, limit = self._cfg.data.batch_size, self._cfg.train.eval_batches
        rows = sharding.local_rows(self._mesh, size)
        halves, sums = [], []
        for half, *batch in eval_batches(prepared, self._cfg.model.seq_len, size, rows, limit):
            tokens_BS, weights_B = (sharding.global_batch(local, self._mesh, size) for local in batch)
            halves.append(half)
            with process.first_call(self._steps.evaluate) as evaluate:
                sums.append(evaluate(state.params, tokens_BS, weights_B))
            if len(sums) > AHEAD:
                jax.block_until_ready(sums[-1 - AHEAD])
            watchdog.alive()
            if stop.stops() and stop.signal:
                return None
        loss_and_weight = np.asarray(jax.device_get(sums), np.float64)
        parts = {name: loss_and_weight}
        parts |= {f"{name}_{half}": loss_and_weight[np.array(halves) == half] for half in dict.fromkeys(halves)}
        return {part: float(np.divide(*each.sum(axis=0))) for part, each in parts.items()}
