"""One training run, to be read from top to bottom."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
from collections.abc import Iterator
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
from tiedjax.checkpoint import ROUNDED_TO, Checkpoints, failed_saves
from tiedjax.config import RunConfig
from tiedjax.config_files import flatten, load_run_config, to_tree, to_yaml
from tiedjax.counting import TOKEN_COUNTS, Counting
from tiedjax.data import counts
from tiedjax.data.batches import Batches
from tiedjax.data.folders import cache_folder
from tiedjax.data.prepare import prepare
from tiedjax.data.prepared import Prepared, save_array
from tiedjax.errors import TrainingError, UserError
from tiedjax.evaluation import Evaluation
from tiedjax.files import sole_writer, write_atomically
from tiedjax.host import platform_flags, process, profiling
from tiedjax.lm import OUTPUT_BIAS
from tiedjax.metrics import frequency_deciles
from tiedjax.recording import Recorder
from tiedjax.rng import key_for
from tiedjax.saves import Saves
from tiedjax.step import Steps, TrainState, decided, make_steps

# What may differ between the command that began a run and the one that continues it: none of it changes the training.
MAY_CHANGE = {
    *("data.cache", "data.workers", "mesh.data", "mesh.fsdp", "mesh.tensor", "train.threads"),
    *("train.stop_at", "train.log_every", "train.eval_every", "train.eval_batches"),
    *("train.checkpoint_every", "train.keep_checkpoints"),
    *("train.snapshot_every", "train.snapshot_gib", "train.early_snapshots_dtype", "train.anatomy"),
}


BODY_UPDATE = "body_update"  # in a state: of the body by the last update, where the next step is observed
SAVED_STATE = "saved_state.json"  # says that a state was committed, and at which step
_compiled: WeakSet[jax.stages.Wrapped] = WeakSet()  # train steps that this process has called


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
    UserError for what the caller can mend, TrainingError if the loss stops being finite.
    """
    stop = process.StopRequest(until)
    with ExitStack() as held:
        step = _train(cfg, out, label or out.name, profile, stop, held)
    return Outcome(step, step >= cfg.train.steps, stop.signal, stop.time_is_up)


def _train(
    cfg: RunConfig,
    out: Path,
    label: str,
    profile: profiling.StepRange | None,
    stop: process.StopRequest,
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
    cfg = decided(_as_begun(cfg, out), mesh)
    steps = make_steps(cfg, mesh)
    if process.is_main():
        held.enter_context(sole_writer(out))
    _refuse_another_run(cfg, out)
    _refuse_lost_states(out)

    # ---- Data ----
    prepared = prepare(cfg.data, cfg.model.vocab_size, report=process.say)
    second = _second(cfg, prepared)
    batches = _local_batches(cfg, mesh, prepared)
    at_once = counts.counted_at_once(prepared)
    count = prepared.token_counts if at_once else partial(counts.sampled_counts, prepared)
    counts_2V = count(cfg.model.seq_len, cfg.model.table_rows)

    # ---- State: new or restored ----
    held.enter_context(stop)  # left after the last save is complete
    counting = held.enter_context(Counting(cfg, out, label, prepared, stop))
    held.enter_context(failed_saves(process.end_cluster_soon_if_any))
    keep = cfg.train.keep_checkpoints
    checkpoints = held.enter_context(process.closing(Checkpoints(out / "checkpoints", keep=keep)))
    snapshots = held.enter_context(process.closing(Checkpoints(out / "snapshots")))
    about = {"data": batches.fingerprint, "tokenizer": prepared.tokenizer_hash, "config": to_tree(cfg)}
    state, body_update, start = _begin(cfg, steps, checkpoints, about, counts_2V)
    trace.check(start, last)
    recorded = start > 0
    if recorded:
        _record_state(out, start)  # the process may have been killed between the state's commit and its record
    elif (out / "config.yaml").exists():
        process.say(f"{label}: ended before it had saved a state; it starts again from step 0")
    if start >= last:
        process.say(f"{label}: nothing to do, {start} of {cfg.train.steps} steps are done")
        if start >= cfg.train.steps and process.main_says(not (out / TOKEN_COUNTS).exists()):
            counting.begin()  # the process was ended while it waited for them
            counting.needed = True
            stop.listen()
        return start
    if process.is_main():
        _describe(cfg, out, prepared, counts_2V if at_once else None)
    if not at_once:
        counting.begin()
    snapshots.delete_from(start + 1 if start else 0)
    saves = Saves.of(cfg.train, _bytes(state.params["tables"]), _bytes(state.account), _bytes(state))
    if start == 0:
        process.say(f"{label}: {saves}")
        snapshots.save(0, _snapshot(state), about)

    # ---- Steps ----
    everywhere = partial(jax.device_put, device=steps.replicated)
    decile_V = frequency_deciles(counts_2V.sum(0))
    role_scales = partial(tying.role_scale, cfg.tying, steps=cfg.train.steps, decile_V=decile_V)
    decile_V, role_scale = everywhere(decile_V), everywhere(role_scales(start + 1))
    evaluation = Evaluation(cfg, mesh, steps, prepared, second)
    if steps.train not in _compiled:
        process.say(f"{label}: compiling the train step ...")
        _compiled.add(steps.train)
    recorder = Recorder(cfg, out, label, start)
    held.callback(recorder.close)
    held.enter_context(trace)
    stop.listen()
    place = lambda tokens_BS: sharding.global_batch(tokens_BS, mesh, cfg.data.batch_size)
    on_devices = _one_ahead(map(place, batches.iterate(start)))
    observed = saves.snapshots if tying.anatomy_wanted(cfg) else {}
    for step, tokens_BS in zip(range(start + 1, last + 1), on_devices, strict=False):
        about_step = _observed(steps, state, tokens_BS, body_update, step) if step in observed else {}
        before, body_update = _copied(state.params["body"]) if step + 1 in observed else None, None
        if cfg.tying.grad_scale_schedule != "constant":
            role_scale = everywhere(role_scales(step))
        # The guard makes an error of what would delay every step: an argument that is still on the host.
        with trace.step(step, state), jax.transfer_guard("disallow"):
            state, metrics = steps.train(state, tokens_BS, role_scale, decile_V)
        if before is not None:
            body_update = _difference(state.params["body"], before)
        counting.check()
        ends = stop.requested_at(step) or step == last
        evaluates = step == cfg.train.steps or bool(cfg.train.eval_every and step % cfg.train.eval_every == 0)
        checks = ends or bool(cfg.train.checkpoint_every and step % cfg.train.checkpoint_every == 0)
        snaps = step in saves.snapshots
        recorder.record(step, metrics | about_step, deciles=snaps)
        if evaluates or checks or snaps:
            recorder.flush(partial(evaluation, state) if evaluates else None)
        if (checks or snaps) and not _all_finite(state):
            raise TrainingError(f"step {step}: the update is not finite; try a lower optimizer.learning_rate")
        if snaps:
            if saves.snapshots[step]:
                tables = _rounded(state.params["tables"])
                snapshots.save(step, _snapshot(state) | {"tables": tables}, {**about, ROUNDED_TO: "bfloat16"})
            else:
                snapshots.save(step, _snapshot(state), about)
        if checks:
            snapshots.wait()  # or a crash could leave a checkpoint from which an older snapshot is never made again
            checkpoints.save(step, state._asdict() | ({BODY_UPDATE: body_update} if body_update else {}), about)
            if not recorded:
                checkpoints.wait()  # for the first one only: what is recorded must be there
                _record_state(out, step)
                recorded = True
        if ends:
            counting.needed = step == cfg.train.steps
            break
    return step


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


_copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
_difference = jax.jit(lambda after, before: jax.tree.map(jnp.subtract, after, before), donate_argnums=1)


def _observed(steps: Steps, state: TrainState, tokens_BS: jax.Array, body_update: Any, step: int) -> dict[str, Any]:
    """What is measured of a step before it is taken; the first has no update behind it."""
    if body_update is None:
        body_update = _difference(state.params["body"], _copied(state.params["body"]))
    metrics = steps.observe(state.params, tokens_BS, body_update)
    return {name: value for name, value in metrics.items() if step > 1 or name != "body_loss_change"}


@jax.jit
def _rounded(tables: Any) -> Any:
    return jax.tree.map(lambda table: table.astype(jnp.bfloat16), tables)


def _snapshot(state: TrainState) -> dict[str, Any]:
    """What is saved for analysis alone: the tables and, where they have one, their account."""
    return {"tables": state.params["tables"]} | ({"account": state.account} if state.account else {})


def _bytes(tree: Any) -> int:
    """Of all arrays, each counted once however many devices hold parts of it."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _refuse_other_threads(cfg: RunConfig) -> None:
    """What a run records of its threads must be true; XLA has its threads since the backend started."""
    threads = cfg.train.threads
    if platform_flags.threads_in_force() != threads:
        raise UserError(
            f"train.threads: {threads} cannot be had in a process that runs JAX already; start it with NPROC={threads} "
            "in its environment"
        )


def _as_begun(cfg: RunConfig, out: Path) -> RunConfig:
    """The config with `model.scan_layers`, where it is left open, as the run in `out` has it, whatever its platform."""
    path = out / "config.yaml"
    if cfg.model.scan_layers is not None or not path.exists():
        return cfg
    scan = load_run_config(path).model.scan_layers
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, scan_layers=scan))


def _refuse_another_run(cfg: RunConfig, out: Path) -> None:
    path = out / "config.yaml"
    if not path.exists() or not any(out.glob("snapshots/[0-9]*")):  # a run that saved nothing has nothing to lose
        return
    old, new = (dict(flatten(to_tree(config))) for config in (load_run_config(path), cfg))
    for key in sorted(old.keys() - MAY_CHANGE):
        if old[key] != new[key]:
            raise UserError(
                f"{out}: holds a run with {key} = {old[key]!r}, not {new[key]!r}; choose another --out or go back to it"
            )


def _refuse_lost_states(out: Path) -> None:
    """A run whose states are gone must not begin again unasked: it would remove its metrics and snapshots."""
    record = out / SAVED_STATE
    if record.exists() and not any(path.name.isdigit() for path in out.glob("checkpoints/*")):
        step = json.loads(record.read_text(encoding="utf-8"))["step"]
        raise UserError(
            f"{out}: a state was saved at step {step}, but checkpoints/ holds none; bring it back, or choose another "
            "--out to begin anew"
        )


def _record_state(out: Path, step: int) -> None:
    if process.is_main():
        write_atomically(out / SAVED_STATE, json.dumps({"step": step}) + "\n")


def _describe(cfg: RunConfig, out: Path, prepared: Prepared, counts_2V: np.ndarray | None) -> None:
    if counts_2V is None:
        (out / TOKEN_COUNTS).unlink(missing_ok=True)  # until these are counted
    else:
        save_array(out / TOKEN_COUNTS, counts_2V)
    if prepared.tokenizer_path:
        write_atomically(out / "tokenizer.json", prepared.tokenizer_path.read_bytes())
    write_atomically(out / "config.yaml", to_yaml(cfg))


def _begin(
    cfg: RunConfig, steps: Steps, checkpoints: Checkpoints, about: dict[str, Any], counts_2V: np.ndarray
) -> tuple[TrainState, Any, int]:
    """The newest checkpoint's state, or a new one; the body's last update, if the next step is to measure what it did;
    and how many steps it has behind it."""
    saved = checkpoints.steps()
    if not saved:
        key = key_for(jax.random.key(cfg.train.seed), "params")
        state = steps.init(key, steps.sampled and tying.sampled_rows(counts_2V.sum(0), steps.sampled))
        if cfg.model.output_bias == "unigram":
            place = steps.abstract.params[OUTPUT_BIAS].sharding
            bias_V = jax.device_put(counts.log_unigram(counts_2V[1]), place)
            state = state._replace(params={**state.params, OUTPUT_BIAS: bias_V})
        return state, None, 0
    record = checkpoints.about(saved[-1])
    for part, trained in {"data": "on other data", "tokenizer": "with another tokenizer"}.items():
        if record[part] != about[part]:
            place = checkpoints.directory / str(saved[-1])
            raise UserError(f"{place}: was trained {trained}; bring that back or choose another --out")
    wanted = steps.abstract._asdict()
    if any(name.startswith(f"{BODY_UPDATE}/") for name in record["fingerprints"]):
        wanted[BODY_UPDATE] = steps.abstract.params["body"]
    restored = checkpoints.restore(saved[-1], wanted)
    body_update = restored.pop(BODY_UPDATE, None)
    return TrainState(**restored), body_update, saved[-1]
