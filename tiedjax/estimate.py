"""What a study will take, said before its first step: bytes on the disk, and very roughly the time."""

from __future__ import annotations

import time
from collections.abc import Collection

import jax
import jax.numpy as jnp

from tiedjax import tying
from tiedjax.config import ROLES, RunConfig
from tiedjax.flops import flops_per_token, matmul_parameters
from tiedjax.saves import Saves
from tiedjax.text import binary, duration

# Arrays beside a parameter; by_role keeps those of each role.
_MOMENTS = {"adamw": 2, "muon": 1, "sgd": 1, "coupled": 1, "lion": 1}
_MOMENTS |= {"by_role": 4, "by_role_matched": 5, "by_role_lazy": 4}
_UTILISATION = 0.5  # of the rate of one large product, that a step reaches: some 0.5 on CPUs, 0.4 on GPUs
_OVERHEAD = {True: 0.01, False: 0.001}  # seconds of a step of the smallest model, on a CPU and elsewhere
_PRODUCT = {"cpu": 1024}  # rows of the square matrices that are timed; elsewhere 8192


def foreseen(runs: Collection[RunConfig], at_once: int) -> str:
    """The line that says what these runs will write and roughly how long this machine trains them, so many at once."""
    written = sum(saves(cfg).bytes for cfg in runs)
    flops = sum(
        flops_per_token(cfg.model, causal=True) * cfg.model.seq_len * cfg.data.batch_size * cfg.train.steps
        for cfg in runs
    )
    overhead = sum(cfg.train.steps for cfg in runs) * _OVERHEAD[jax.default_backend() == "cpu"] / at_once
    seconds = overhead + flops / (_UTILISATION * jax.device_count() * product_rate())
    return (
        f"{len(runs)} runs, {binary(written)} to write; training all of them takes very roughly {duration(seconds)} "
        "on this machine"
    )


def saves(cfg: RunConfig) -> Saves:
    """What a run leaves on the disk, norm scales left out."""
    table = cfg.model.table_rows * cfg.model.d_model
    body = matmul_parameters(cfg.model) - table
    names = [parameter.name for parameter in tying.scheme_of(cfg.tying).parameters]
    options = cfg.optimizer
    moments = _MOMENTS[options.body.kind] * body
    moments += sum(_MOMENTS[options.tables.of(name).kind] for name in names) * table
    tables = 4 * len(names) * table
    width = 2 if options.moments_dtype == "bfloat16" else 4
    form, both = tying.follow(cfg), [name for name in names if name not in ROLES]
    rows = {"off": 0, "rows": tying.SAMPLE_ROWS}.get(form, cfg.model.table_rows)
    followed = len(both) * min(rows, cfg.model.table_rows) * cfg.model.d_model
    account = 4 * followed * (2 if form == "checked" else 1)
    moments += followed if not options.tables.kind.startswith("by_role") else 0
    return Saves.of(cfg.train, tables, account, tables + 4 * body + width * moments + account)


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
