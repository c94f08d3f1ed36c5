"""What a run begins with: its newest state, or parameters drawn anew, or those of another run or another's model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from tiedjax import tying
from tiedjax.checkpoint import Checkpoints, DamagedError
from tiedjax.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig, TyingConfig
from tiedjax.data import counts
from tiedjax.data.tokenizer import tokenizer_hash
from tiedjax.errors import NoCheckpointError, UserError
from tiedjax.files import place_and_step, read_text
from tiedjax.host import process, storage
from tiedjax.interop import is_model_folder
from tiedjax.lm import OUTPUT_BIAS
from tiedjax.rng import key_for
from tiedjax.run import Run, load_run
from tiedjax.step import TrainState, decided, make_steps

BODY_UPDATE = "body_update"  # in a state: of the body by the last update, where the next step is observed
# What may differ between a model and the one that it starts from: how it computes, and how far it sees.
MAY_DIFFER = {"seq_len", "dtype", "attention", "table_gradient", "body_gradient", "remat"}


def begin(
    cfg: RunConfig,
    mesh: Mesh,
    checkpoints: Checkpoints,
    about: dict[str, Any],
    counts_2V: np.ndarray,
    begins: int | None = None,
) -> tuple[TrainState, Any, int]:
    """The newest state that can be used, or a new one; the body's last update, if the next step is to measure what it
    did; and how many steps it has behind it. `begins` is the step after which the scheme changes, where that is known.

    Newer ones that are damaged are set aside. NoCheckpointError if all are; then nothing is touched.
    """
    saved, damaged = checkpoints.steps(), []
    for step in reversed(saved):
        try:
            state, body_update = _restored(cfg, mesh, checkpoints, about, step, begins)
        except DamagedError as error:
            damaged.append(error)
            process.say(f"{error}; the state before it is tried")
        else:
            checkpoints.set_aside(saved[len(saved) - len(damaged) :])
            return state, body_update, step
    if damaged:
        raise NoCheckpointError(f"{damaged[0]}; no other state of this run can be used")
    return _new(cfg, mesh, about, counts_2V), None, 0


def _restored(
    cfg: RunConfig, mesh: Mesh, checkpoints: Checkpoints, about: dict[str, Any], step: int, begins: int | None
) -> tuple[TrainState, Any]:
    """The state of this step, and the body's last update if it is with it."""
    steps = make_steps(cfg, mesh, begins if begins and step > begins else 0)
    record = checkpoints.about(step)
    for part, trained in {"data": "on other data", "tokenizer": "with another tokenizer"}.items():
        if record[part] != about[part]:
            place = checkpoints.directory / str(step)
            raise UserError(f"{place}: was trained {trained}; bring that back or choose another --out")
    wanted = steps.abstract._asdict()
    if any(name.startswith(f"{BODY_UPDATE}/") for name in record["fingerprints"]):
        wanted[BODY_UPDATE] = steps.abstract.params["body"]
    restored = checkpoints.restore(step, wanted)
    body_update = restored.pop(BODY_UPDATE, None)
    return TrainState(**restored), body_update


def _new(cfg: RunConfig, mesh: Mesh, about: dict[str, Any], counts_2V: np.ndarray) -> TrainState:
    steps, counts_V = make_steps(cfg, mesh), counts_2V.sum(0)
    sample = steps.sampled and tying.sampled_rows(counts_V, steps.sampled)
    root = key_for(jax.random.key(cfg.train.seed), "params")
    state = steps.init(root, sample, tying.unshared_rows(cfg.tying, cfg.model, counts_V))
    if cfg.model.output_bias == "unigram":
        place = steps.abstract.params[OUTPUT_BIAS].sharding
        bias_V = jax.device_put(counts.log_unigram(counts_2V[1]), place)
        state = state._replace(params={**state.params, OUTPUT_BIAS: bias_V})
    if cfg.train.init is None:
        if cfg.regularisers.anchor_to is None:
            return state
        return state._replace(anchor=_anchor(cfg, mesh, {}, about))
    origin = source(cfg.train.init)
    if origin.tokenizer() not in (None, about["tokenizer"]):
        raise UserError(f"data.tokenizer: is not that of train.init {cfg.train.init}; leave it out to take that")
    params = {**state.params, **_begun(cfg, mesh, origin)}
    account = state.account and state.account.reopened(params["tables"], cfg.optimizer.tables.centered)
    state = state._replace(params=params, account=account)
    return state if state.anchor is None else state._replace(anchor=_anchor(cfg, mesh, params["tables"], about))


class Source(Protocol):
    """What `train.init` names: whose parameters a run begins with."""

    @property
    def tying(self) -> TyingConfig:
        """How its tables come from arrays."""

    @property
    def tokenizer_path(self) -> Path | None:
        """Its tokenizer.json, if it has one."""

    def model(self, cfg: RunConfig, mesh: Mesh) -> ModelConfig:
        """Its shape and arithmetic, computed as `cfg` computes."""

    def tokenizer(self) -> str | None:
        """The hash of its tokenizer; None where it has none."""

    def params(self, abstract: dict[str, Any]) -> dict[str, Any]:
        """Its {"tables", "body"} where `abstract` says that they lie."""


class _OfRun:
    """A run as it was when it saved this step."""

    def __init__(self, run: Run, step: int):
        self._run, self._step = run, step
        self._saves = Checkpoints(run.path / "checkpoints", create=False)
        self.tying, self.tokenizer_path = run.config_at(step).tying, run.tokenizer_path

    def model(self, cfg: RunConfig, mesh: Mesh) -> ModelConfig:
        return decided(self._run.config, mesh).model

    def tokenizer(self) -> str | None:
        tokenizer: str | None = self._saves.about(self._step)["tokenizer"]
        return tokenizer

    def params(self, abstract: dict[str, Any]) -> dict[str, Any]:
        """As `Source` says, from the state of the step."""
        return dict(self._saves.restore(self._step, {"params": abstract})["params"])


class _OfModel:
    """A Hugging Face directory, whose numbers are read when they are asked for."""

    def __init__(self, path: Path):
        from tiedjax.interop.model import checked_folder

        folder, self._config = checked_folder(path)
        self.path, self.tokenizer_path = path, folder.tokenizer_path
        self.tying = TyingConfig(scheme=folder.tie.scheme)

    def model(self, cfg: RunConfig, mesh: Mesh) -> ModelConfig:
        run = decided(cfg, mesh).model
        return dataclasses.replace(self._config, scan_layers=run.scan_layers, vocab_multiple=run.vocab_multiple)

    def tokenizer(self) -> str | None:
        return None if self.tokenizer_path is None else tokenizer_hash(read_text(self.tokenizer_path))

    def params(self, abstract: dict[str, Any]) -> dict[str, Any]:
        from tiedjax.interop.model import load_model

        model = load_model(self.path)

        def placed(leaf: jax.ShapeDtypeStruct, values: np.ndarray) -> jax.Array:
            rows = [(0, leaf.shape[0] - values.shape[0])] + [(0, 0)] * (values.ndim - 1)  # padding of the vocabulary
            whole = np.pad(values, rows).astype(leaf.dtype)
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: whole[index])

        body: dict[str, Any] = {"params": model.layers_as(scanned="layers" in abstract["body"]["params"])}
        tables = tying.as_roles(model.tables, abstract["tables"])
        return {
            "tables": jax.tree.map(placed, abstract["tables"], tables),
            "body": jax.tree.map(placed, abstract["body"], body),
        }


def source(init: str) -> Source:
    """What `train.init` names: a run's state, or a Hugging Face directory. UserError where there is none."""
    if not storage.is_remote(init) and is_model_folder(Path(init)):
        try:
            return _OfModel(Path(init))
        except UserError as error:
            raise UserError(f"train.init: {error}") from None
    return _OfRun(*_named("train.init", init, "checkpoint"))


def _named(option: str, text: str, kind: Literal["checkpoint", "snapshot"]) -> tuple[Run, int]:
    """The run, and the step of what it saved, that an option names, the newest by default. UserError without one."""
    place, step = place_and_step(text)
    try:
        run = load_run(place)
    except UserError as error:
        raise UserError(f"{option}: {error}") from None
    saved = run.checkpoint_steps if kind == "checkpoint" else run.snapshot_steps
    if not saved or (step is not None and step not in saved):
        which = f"no {kind}" if step is None else f"no {kind} of step {step}"
        raise UserError(f"{option}: {place}: holds {which}; there are {', '.join(map(str, saved)) or 'none'}")
    return run, saved[-1] if step is None else step


def data_begun_with(cfg: RunConfig, out: Path) -> DataConfig:
    """The options of the data, with the tokenizer of `train.init` where none is named."""
    if cfg.train.init is None or cfg.data.tokenizer != DataConfig().tokenizer:
        return cfg.data
    kept = out / "tokenizer.json"  # a run that is continued does not need the other one any more
    path = storage.cached(kept) if storage.saved_steps(out / "checkpoints") else source(cfg.train.init).tokenizer_path
    return cfg.data if path is None else dataclasses.replace(cfg.data, tokenizer=str(path))


def refuse_another_model(cfg: RunConfig, mesh: Mesh) -> None:
    """UserError where `train.init` is another model, or its scheme cannot become that of `cfg`."""
    if cfg.train.init is None:
        return
    origin = source(cfg.train.init)
    before, after = origin.model(cfg, mesh), decided(cfg, mesh).model
    may_differ = MAY_DIFFER - ({"seq_len"} if after.position == "learned" else set())
    for field in dataclasses.fields(ModelConfig):
        was, now = getattr(before, field.name), getattr(after, field.name)
        if field.name not in may_differ and was != now:
            raise UserError(
                f"model.{field.name}: is {now!r}, that of train.init {cfg.train.init} is {was!r}; give that"
            )
    tying.refuse_another_scheme(origin.tying, cfg.tying, cfg.train.init)


def refuse_another_anchor(cfg: RunConfig) -> None:
    """UserError where the run of `regularisers.anchor_to` has no tables that those of `cfg` can be held near."""
    text = cfg.regularisers.anchor_to
    if text is None:
        return
    run, step = _named("regularisers.anchor_to", text, "snapshot")
    anchor, trained = ([model.table_rows, model.d_model] for model in (run.config.model, cfg.model))
    if anchor != trained:
        raise UserError(
            f"regularisers.anchor_to: {text}: its tables are {anchor}, those of this run {trained}; name one of this "
            f"shape"
        )
    tying.refuse_two_anchors(run.config_at(step).tying, cfg.tying, text)


def _anchor(cfg: RunConfig, mesh: Mesh, arrays: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """The tables that the run is not to leave far behind, where they lie on the mesh: those of these arrays, or of the
    run that `regularisers.anchor_to` names, whose one table is that of both roles."""
    places = jax.tree.map(lambda leaf: leaf.sharding, make_steps(cfg, mesh).abstract.anchor)
    text = cfg.regularisers.anchor_to
    if text is not None:
        run, step = _named("regularisers.anchor_to", text, "snapshot")
        if Checkpoints(run.path / "snapshots", create=False).about(step)["tokenizer"] != about["tokenizer"]:
            raise UserError(f"regularisers.anchor_to: {text}: has another tokenizer; give that as data.tokenizer")
        held: dict[str, Any] = jax.device_put(tying.as_roles(run.tables(step), places), places)
        return held
    scheme = tying.scheme_of(cfg.tying)
    copied: dict[str, Any] = jax.jit(lambda arrays: tying.anchored(scheme, arrays), out_shardings=places)(arrays)
    return copied


def _begun(cfg: RunConfig, mesh: Mesh, origin: Source) -> dict[str, Any]:
    """{"tables", "body"} of what `train.init` names, the tables in the arrays of this run's scheme, where they lie."""
    before = origin.tying
    plain = dataclasses.replace(cfg, tying=tying.plain(before), optimizer=OptimizerConfig(), train=TrainConfig())
    abstract = make_steps(plain, mesh).abstract.params
    restored = origin.params({name: abstract[name] for name in ("tables", "body")})
    places = jax.tree.map(lambda leaf: leaf.sharding, make_steps(cfg, mesh).abstract.params["tables"])
    arrays = jax.jit(lambda tables: tying.begun_from(before, cfg.tying, tables), out_shardings=places)
    return {"tables": arrays(restored["tables"]), "body": restored["body"]}
