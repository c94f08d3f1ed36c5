"""One training run, to be read from top to bottom."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tiedjax import sharding, tying
from tiedjax.beginning import begin, data_begun_with, refuse_another_anchor, refuse_another_model
from tiedjax.checkpoint import Checkpoints, failed_saves
from tiedjax.config import RunConfig
from tiedjax.config_files import to_tree
from tiedjax.continuing import (
    SAVED_STATE,
    as_begun,
    describe,
    forget,
    known_change,
    log_every_before,
    record,
    refuse_another_run,
    refuse_lost_states,
)
from tiedjax.counting import TOKEN_COUNTS, Counting
from tiedjax.data import counts
from tiedjax.data.batches import Batches
from tiedjax.data.folders import cache_folder
from tiedjax.data.prepare import prepare
from tiedjax.data.prepared import Prepared
from tiedjax.errors import NotFiniteError, UserError
from tiedjax.evaluation import Evaluation
from tiedjax.host import platform_flags, process, profiling, signals, storage
from tiedjax.host.storage import sole_writer
from tiedjax.host.watchdog import Watchdog
from tiedjax.left_out import NOT_FINITE, LeftOut
from tiedjax.metrics import frequency_deciles
from tiedjax.recording import Recorder
from tiedjax.run import CHANGED, OWED, owed
from tiedjax.saves import Kept, Saves, Sizes
from tiedjax.saving import RunSaver, refuse_what_cannot_fit, settle
from tiedjax.step import Steps, TrainState, decided, make_change, make_steps
from tiedjax.step_metrics import StepMetrics

_compiled: WeakSet[jax.stages.Wrapped] = WeakSet()  # train steps of which it was said that they are compiled


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended: updates done, whether that is all of them, and what asked it to stop before."""

    step: int
    finished: bool
    signal: signal.Signals | None = None
    time_is_up: bool = False

    @property
    def stopped(self) -> bool:
        """Whether a signal or the time has ended it, so that nothing else is to begin."""
        return self.signal is not None or self.time_is_up


def train(
    cfg: RunConfig,
    out: Path,
    *,
    label: str | None = None,
    profile: profiling.StepRange | None = None,
    until: float | None = None,
) -> Outcome:
    """Trains `cfg` in the run directory `out`, from its newest checkpoint if it has one.

    All processes of a cluster call it together, with one folder that all can write. The steps of `profile` are traced
    into `out`/profile. Where `time.monotonic()` has passed `until` after a step, it ends as after a signal. Raises
    UserError for what the caller can mend, NotFiniteError for more
    updates that are not finite than `train.skip_nonfinite`.
    """
    minutes = cfg.train.checkpoint_minutes
    stop = process.Requests(until, None if minutes is None else 60 * minutes)
    with ExitStack() as held:
        step = _train(cfg, out, label or out.name, profile, stop, held)
    finished = step >= cfg.train.steps and process.main_says(lambda: owed(out) is None)
    return Outcome(step, finished, stop.signal, stop.time_is_up)


def _train(
    cfg: RunConfig,
    out: Path,
    label: str,
    profile: profiling.StepRange | None,
    stop: process.Requests,
    held: ExitStack,
) -> int:
    """The steps that are done; what `held` closes afterwards saves them, and may wait until `stop`."""
    last = cfg.train.last
    trace = profiling.Trace(profile, out / "profile", process.say)
    if jax.default_backend() == "cpu":
        _refuse_other_threads(cfg)
        process.keep_freed_memory()
    else:
        process.keep_compiled(cache_folder(cfg.data.cache) / "xla")

    # ---- Refuse what cannot work, before anything slow ----
    process.refuse_unshared(out)
    trace.check(0, last)
    mesh = sharding.make_mesh(cfg.mesh)
    cfg = decided(as_begun(cfg, out), mesh)
    make_steps(cfg, mesh)
    if not storage.saved_steps(out / "checkpoints"):
        refuse_another_model(cfg, mesh)
        refuse_another_anchor(cfg)
    may_write: Callable[[], None] = lambda: None
    if process.is_main():
        may_write = held.enter_context(sole_writer(out)).check
        for name in ("checkpoints", "snapshots"):
            storage.clear_unfinished(out / name)
    refuse_another_run(cfg, out)
    refuse_lost_states(out)
    changed = process.from_main(lambda: {"after": known_change(cfg, out)})["after"]

    # ---- Data ----
    prepared = prepare(data_begun_with(cfg, out), cfg.model.vocab_size, report=process.say)
    second = _second(cfg, prepared)
    batches = _local_batches(cfg, mesh, prepared)
    at_once = counts.counted_at_once(prepared)
    count = prepared.token_counts if at_once else partial(counts.sampled_counts, prepared)
    counts_2V = count(cfg.model.seq_len, cfg.model.table_rows)

    # ---- State: new or restored ----
    held.enter_context(stop)  # left after the last save is complete
    counting = held.enter_context(Counting(cfg, out, label, prepared, stop))
    held.enter_context(failed_saves(partial(_save_failed, stop)))
    kept = Kept(cfg.train.keep_checkpoints, cfg.train.keep_every)
    checkpoints = held.enter_context(process.closing(Checkpoints(out / "checkpoints", keep=kept)))
    snapshots = held.enter_context(process.closing(Checkpoints(out / "snapshots")))
    about = {"data": batches.fingerprint, "tokenizer": prepared.tokenizer_hash, "config": to_tree(cfg)}
    state, body_update, start = begin(cfg, mesh, checkpoints, about, counts_2V, changed)
    trace.check(start, last)
    if start > 0:
        record(SAVED_STATE, out, start)  # the process may have been killed between the state's commit and its record
    elif storage.exists(out / "config.yaml"):
        process.say(f"{label}: ended before it had saved a state; it starts again from step 0")
    if changed is not None and cfg.tying.untie_when is not None and start < changed:
        changed = None  # found after this state: the steps that come find it again, or do not
        forget(CHANGED, out)
    owes = start > 0 and process.main_says(lambda: owed(out) == start)
    if not owes:
        forget(OWED, out)  # after a step whose state was not saved, or is damaged
    if start >= last and not owes:
        process.say(f"{label}: nothing to do, {start} of {cfg.train.steps} steps are done")
        if start >= cfg.train.steps and process.main_says(lambda: not storage.exists(out / TOKEN_COUNTS)):
            counting.begin()  # the process was ended while it waited for them
            counting.needed = True
            stop.listen()
        return start
    later = _sizes(make_steps(cfg, mesh, 1)) if tying.changes(cfg) else None
    saves = Saves.of(cfg.train, _sizes(make_steps(cfg, mesh)), tying.earliest_change(cfg), later)
    refuse_what_cannot_fit(out, saves, start, last)
    logged_every = log_every_before(cfg, out)
    describe(cfg, out, prepared, counts_2V if at_once else None)
    if not at_once:
        counting.begin()
    snapshots.delete_from(start + 1 if start else 0)
    forget(NOT_FINITE, out)
    saver = RunSaver(out, checkpoints, snapshots, about, recorded=start > 0)
    if start == 0:
        if cfg.train.init:
            process.say(f"{label}: begins with the parameters of {cfg.train.init}")
        process.say(f"{label}: {saves}")
        saver.save_snapshot(0, state)

    # ---- Steps ----
    begins = changed if changed is not None and start > changed else 0
    decile_V = frequency_deciles(counts_2V.sum(0))
    stage = _Stage(cfg, mesh, begins, decile_V)
    everywhere = partial(jax.device_put, device=stage.steps.replicated)
    deciles = everywhere(decile_V)
    gate = tying.rare_gate(cfg, counts_2V.sum(0))
    gates = [] if cfg.tying.rare_gate is None else [everywhere(gate)]
    if gates:
        process.say(f"{label}: {tying.gate_in_words(cfg, gate)}")
    evaluation = Evaluation(cfg, mesh, stage.steps, prepared, second)
    if start != changed:
        _say_if_it_compiles(stage.steps, label)
    recorder = Recorder(cfg, out, label, start, logged_every, may_write, int(state.skipped))
    held.callback(recorder.close)
    watchdog = held.enter_context(Watchdog(cfg.train.stall_seconds, process.end_all))
    held.enter_context(trace)
    stop.listen()
    if owes and not _evaluated_late(partial(evaluation, state, stop, watchdog), recorder, out, start):
        return start
    place = lambda tokens_BS: sharding.global_batch(tokens_BS, mesh, cfg.data.batch_size)
    on_devices = _one_ahead(map(place, batches.iterate(start)))
    observed, step = saves.snapshots if tying.anatomy_wanted(cfg) else {}, start
    for step, tokens_BS in zip(range(start + 1, last + 1), on_devices, strict=False):
        if changed is not None and step == changed + 1:
            with signals.brief():
                state = _changed(cfg, mesh, changed, state, tokens_BS, label)
            stage = _Stage(cfg, mesh, changed, decile_V)
            evaluation = Evaluation(cfg, mesh, stage.steps, prepared, second)
        about_step = _observed(stage.steps, state, tokens_BS, body_update, step) if step in observed else {}
        before = _copied(state.params["body"]) if step + 1 in observed else None
        last_update, body_update = body_update, None
        role_scale, first_call = stage.role_scale(step), process.first_call(stage.steps.train)
        # The guard makes an error of what would delay every step: an argument that is still on the host.
        with first_call as train_step, trace.step(step, state), jax.transfer_guard("disallow"):
            state, metrics = train_step(state, tokens_BS, role_scale, deciles, *gates)
        if before is not None:
            body_update = _difference(state.params["body"], before)
        counting.check()
        if changed is None and tying.unties_now(cfg, step, partial(_number, metrics, "untie_watched")):
            changed = step
            record(CHANGED, out, step)
        ends = stop.stops() or step == last
        evaluates = step == cfg.train.steps or bool(cfg.train.eval_every and step % cfg.train.eval_every == 0)
        checks = ends or stop.save or bool(cfg.train.checkpoint_every and step % cfg.train.checkpoint_every == 0)
        snaps = step in saves.snapshots
        recorder.record(step, metrics, about_step, deciles=snaps)
        watchdog.alive(step=True)  # the step before this one, whose metrics were read
        if evaluates or checks or snaps or step == changed:
            evaluated = recorder.flush(partial(evaluation, state, stop, watchdog) if evaluates else None)
            ends, checks = ends or not evaluated, checks or not evaluated
        if left_out := recorder.ended_by:
            may_write()
            recorder.sync()
            settle(snapshots)
            last_update = last_update if left_out.step == step else None
            raise _ended(left_out, state, last_update, saver, batches)
        if (checks or snaps) and not _all_finite(state):
            raise NotFiniteError(f"step {step}: the update is not finite; try a lower optimizer.learning_rate")
        if checks or snaps:
            may_write()
            recorder.sync()  # a state without the metrics of its steps would leave a hole in them
            if not evaluated:
                record(OWED, out, step)
        if snaps:
            saver.save_snapshot(step, state, rounded=saves.snapshots[step], wait=ends)
        if checks:
            stop.saved()
            saver.save_state(step, state, body_update, wait=ends)
        if ends:
            counting.needed = step == cfg.train.steps
            break
    return step


class _Stage:
    """What the steps before the scheme's change, or those after it, are made with.

    `begins` is the update that they come after, 0 for those before; `decile_V` is the frequency decile of each row.
    """

    def __init__(self, cfg: RunConfig, mesh: Mesh, begins: int, decile_V: np.ndarray):
        self.steps = make_steps(cfg, mesh, begins)
        options = tying.stage(cfg, begins > 0).tying
        self._constant = options.grad_scale_schedule == "constant"
        self._scale = partial(tying.role_scale, options, steps=cfg.train.steps, decile_V=decile_V)
        self._placed: tying.Tables | None = None

    def role_scale(self, step: int) -> tying.Tables:
        """The factors on the role gradients in this update, where the devices have them."""
        if self._placed is None or not self._constant:
            self._placed = jax.device_put(self._scale(step), self.steps.replicated)
        return self._placed


def _ended(left_out: LeftOut, state: TrainState, last_update: Any, saver: RunSaver, batches: Batches) -> NotFiniteError:
    """What to raise where a run ends with this step, once the state before it and the windows it saw are saved."""
    step = left_out.step - 1
    state = state._replace(skipped=_last_skipped(state.skipped))
    finite = bool(_all_finite(state))
    if finite and step > 0:
        settle(saver.checkpoints)
        there = saver.checkpoints.steps()
        if process.main_says(lambda: step not in there):
            saver.save_state(step, state, last_update, wait=True)
    last = step if finite else None
    if process.is_main():
        left_out.write(saver.out, last, batches.windows(step))
    process.main_says(lambda: True)  # another process that failed before would end the main one, which writes
    return NotFiniteError(left_out.ends(saver.out, last, int(state.skipped)))


def _save_failed(stop: process.Requests, error: BaseException) -> None:
    """Alone, the state in memory is saved after the step in progress; a cluster, whose processes wait, ends."""
    stop.save = jax.process_count() == 1
    process.end_cluster_soon_if_any(error)


def _evaluated_late(evaluate: Callable[[], dict[str, float] | None], recorder: Recorder, out: Path, step: int) -> bool:
    """Whether what a signal kept from being evaluated after this step now is."""
    losses = evaluate()
    if losses is None:
        return False
    recorder.complete(step, losses)
    if recorder.sync():
        forget(OWED, out)
    return True


def _second(cfg: RunConfig, prepared: Prepared) -> Prepared | None:
    """The text of data.second_source under the run's own tokenizer, if there is one."""
    if cfg.data.second_source is None:
        return None
    tokenizer = str(prepared.tokenizer_path) if prepared.tokenizer_path else cfg.data.tokenizer
    other = dataclasses.replace(cfg.data, source=cfg.data.second_source, tokenizer=tokenizer, max_documents=None)
    try:
        second = prepare(other, cfg.model.vocab_size, report=process.say)
        second.windows("eval", cfg.model.seq_len)  # fails now rather than at the first evaluation
    except UserError as error:
        raise UserError(re.sub("^data.source", "data.second_source", str(error))) from None
    return second


def _local_batches(cfg: RunConfig, mesh: Mesh, prepared: Prepared) -> Batches:
    """What this process reads of the batches; UserError unless all processes have prepared the same."""
    batches = Batches(
        prepared,
        seq_len=cfg.model.seq_len,
        batch_size=cfg.data.batch_size,
        seed=cfg.train.seed,
        rows=sharding.local_rows(mesh, cfg.data.batch_size),
        workers=cfg.data.workers,
    )
    if not process.same_everywhere(json.dumps(batches.fingerprint)):
        raise UserError(
            f"data.source: {cfg.data.source}: the processes have prepared different data (other files, another "
            "Python?); prepare it once and give all of them prepared:DIR"
        )
    return batches


def _one_ahead(batches: Iterator[jax.Array]) -> Iterator[jax.Array]:
    """The same batches, without end: each is on its way to the devices while they train on the one before it."""
    upcoming = next(batches)
    for following in batches:
        yield upcoming
        upcoming = following


@jax.jit
def _all_finite(state: TrainState) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state)]).all()


def _number(metrics: StepMetrics, name: str) -> float:
    number: float = metrics.fetched()[name]
    return number


_last_skipped = jax.jit(lambda skipped: -1 - skipped)  # what it was before the run ended
_copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
_difference = jax.jit(lambda after, before: jax.tree.map(jnp.subtract, after, before), donate_argnums=1)


def _observed(steps: Steps, state: TrainState, tokens_BS: jax.Array, body_update: Any, step: int) -> dict[str, Any]:
    """What is measured of a step before it is taken; the first has no update behind it."""
    if body_update is None:
        body_update = _difference(state.params["body"], _copied(state.params["body"]))
    with process.first_call(steps.observe) as observe:
        metrics = observe(state.params, tokens_BS, body_update)
    return {name: value for name, value in metrics.items() if step > 1 or name != "body_loss_change"}


def _sizes(steps: Steps) -> Sizes:
    """Of what is saved, every array counted once however many devices hold parts of it."""
    parts = steps.abstract.params["tables"], steps.abstract.account, steps.abstract
    return Sizes(*(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part)) for part in parts))


def _refuse_other_threads(cfg: RunConfig) -> None:
    """What a run records of its threads must be true; XLA has its threads since the backend started."""
    threads = cfg.train.threads
    if platform_flags.threads_in_force() != threads:
        raise UserError(
            f"train.threads: {threads} cannot be had in a process that runs JAX already; start it with NPROC={threads} "
            "in its environment"
        )


def _say_if_it_compiles(steps: Steps, label: str) -> None:
    if steps.train not in _compiled:
        process.say(f"{label}: compiling the train step ...")
        _compiled.add(steps.train)


def _changed(cfg: RunConfig, mesh: Mesh, step: int, state: TrainState, tokens_BS: jax.Array, label: str) -> TrainState:
    """The state after this step with the tables of the scheme to come; says what that does to the next batch's loss."""
    before, after = (make_steps(cfg, mesh, begins) for begins in (0, step))
    weights_B = jax.device_put(np.ones(cfg.data.batch_size, np.float32), after.batch)
    losses = [before.evaluate(state.params, tokens_BS, weights_B)]
    state = make_change(cfg, mesh, step)(state)
    losses.append(after.evaluate(state.params, tokens_BS, weights_B))
    was, now = (float(np.divide(*np.asarray(pair, np.float64))) for pair in jax.device_get(losses))
    what = f"after step {step} {tying.change_in_words(cfg)}"
    process.say(f"{label}: {what}; the next batch's loss goes from {was:.6f} to {now:.6f}")
    _say_if_it_compiles(after, label)
    return state
