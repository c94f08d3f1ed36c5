"""What a study will take, said before its first step, bytes on the disk and very roughly the time; and what is left."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp

from tiedjax import muon, tying
from tiedjax.config import RunConfig
from tiedjax.flops import matmul_parameters, model_flops
from tiedjax.saves import Saves, Sizes
from tiedjax.text import binary, duration

# Arrays beside a parameter; by_role keeps those of each role.
_MOMENTS = {"adamw": 2, "muon": 1, "sgd": 1, "coupled": 1, "lion": 1}
_MOMENTS |= {"by_role": 4, "by_role_matched": 5, "by_role_lazy": 4}
_UTILISATION = 0.5  # of the rate of one large product, that a step reaches: some 0.5 on CPUs, 0.4 on GPUs
_OVERHEAD = {True: 0.01, False: 0.001}  # seconds of a step of the smallest model, on a CPU and elsewhere
_PRODUCT = {"cpu": 1024}  # rows of the square matrices that are timed; elsewhere 8192


def foreseen(runs: Collection[tuple[RunConfig, int]], at_once: int) -> str | None:
    """The line that says what is left of these runs, each beside the steps that it has before it, so many at once.

    That is what they will write and roughly how long this machine trains them. None where nothing is left.
    """
    left = [(cfg, steps) for cfg, steps in runs if steps]
    if not left:
        return None
    written = sum(saves(cfg).bytes(cfg.train.last - steps, cfg.train.last) for cfg, steps in left)
    flops = sum(step_flops(cfg) * steps for cfg, steps in left)
    overhead = sum(steps for _, steps in left) * _OVERHEAD[jax.default_backend() == "cpu"] / at_once
    seconds = overhead + flops / (_UTILISATION * jax.device_count() * product_rate())
    return (
        f"{len(left)} of {len(runs)} runs are left, {binary(written)} to write; training them takes very roughly "
        f"{duration(seconds)} on this machine"
    )


class Progress:
    """What is said as each of the `kind` of run begins: which it is, and about how long training will still take.

    `left` has by name the steps that each has before it; `at_once` train side by side. How long a step takes is known
    from those that have ended; those that had nothing left say nothing about it.
    """

    def __init__(self, kind: str, left: Mapping[str, int], at_once: int):
        self._kind, self._left, self._at_once = kind, left, at_once
        self._began: dict[str, float] = {}
        self._took: dict[str, float] = {}

    def begins(self, name: str) -> str:
        """The line for the run that begins."""
        self._began[name] = time.monotonic()
        line = f"{self._kind} {len(self._began)} of {len(self._left)}: {name}"
        trained = sum(self._left[ended] for ended in self._took)
        if not trained:
            return line
        seconds = sum(self._took.values()) / trained * (sum(self._left.values()) - trained) / self._at_once
        return f"{line}; about {duration(seconds)} of training left"

    def ended(self, name: str) -> None:
        """Hears that the run has done all its steps."""
        if self._left[name]:
            self._took[name] = time.monotonic() - self._began[name]


def step_flops(cfg: RunConfig) -> int:
    """Floating-point operations of a step: those of the model over its batch, and of Muon's iterations."""
    return model_flops(cfg) + (muon.step_flops(cfg.model) if cfg.optimizer.body.kind == "muon" else 0)


def saves(cfg: RunConfig) -> Saves:
    """What a run leaves on the disk, norm scales left out."""
    first, later = (_sizes(tying.stage(cfg, changed)) for changed in (False, True))
    return Saves.of(cfg.train, first, tying.earliest_change(cfg), later)


def _sizes(cfg: RunConfig) -> Sizes:
    table = cfg.model.table_rows * cfg.model.d_model
    body = matmul_parameters(cfg.model) - table
    scheme, options, V = tying.scheme_of(cfg.tying), cfg.optimizer, cfg.model.table_rows
    size = {p.name: p.size(V, cfg.model.d_model) for p in scheme.parameters}
    moments = _MOMENTS[options.body.kind] * body
    moments += sum(
        (_MOMENTS[options.tables.of(p.name).kind] if p.has_rows else _MOMENTS["adamw"]) * size[p.name]
        for p in scheme.parameters
        if p.trained
    )
    tables = 4 * sum(size.values())
    width = 2 if options.moments_dtype == "bfloat16" else 4
    form = tying.follow(cfg)
    rows = {"off": 0, "rows": tying.SAMPLE_ROWS}.get(form, V)
    followed = sum(size[name] // V * min(rows, V) for name in scheme.followed)
    account = 4 * followed * (2 if form == "checked" else 1)
    moments += followed if not options.tables.kind.startswith("by_role") else 0
    if weights := cfg.regularisers.weights:
        account += 4 * followed * len(weights)
        own = sum(size[p.name] for p in scheme.parameters if p.trained and p.name not in scheme.followed)
        moments += (followed + own) * len(weights) if form != "off" else 0
    anchors = 4 * table * (1 if scheme.shares_one_table else 2) if "anchor" in weights else 0
    if tying.keeps_squares(cfg):
        moments += 2 * table + (table if form == "off" else 0)
    return Sizes(tables, account, tables + 4 * body + width * moments + account + anchors)


def product_rate() -> float:
    """FLOP/s of a large product on one device of this machine, in the dtype that models compute in there."""
    platform = jax.default_backend()
    size = _PRODUCT.get(platform, 8192)
    x_NN = jnp.ones((size, size), jnp.float32 if platform == "cpu" else jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(6):  # the first compiles
        began = time.monotonic()
        product(x_NN, x_NN).block_until_ready()
        seconds.append(time.monotonic() - began)
    return 2 * size**3 / min(seconds)
