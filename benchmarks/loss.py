"""The fused loss against the plain one, with their gradients: memory from the compiled programs, times interleaved.

    python benchmarks/loss.py --machine "2-core x86-64 virtual machine"

Writes benchmarks/results/loss_DEVICE.json. The plain loss is the same products, softmax and gradient left to automatic
differentiation over all tokens at once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tiedjax.loss import cross_entropy

RESULTS = Path(__file__).parent / "results"
# tokens, rows of the table, width
MEMORY = (32_768, 50_304, 1024)
TIMED = {
    "cpu": [(1024, 2048, 64), (4096, 4096, 128), (2048, 50_304, 256)],
    "gpu": [(32_768, 50_304, width) for width in (384, 1024, 2048)],
}
REPEATS = 15


def plain(h_BTD: jax.Array, U_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """The summed cross-entropy, logits of all tokens at once."""
    logits_BTV = jnp.einsum("btd,vd->btv", h_BTD, U_VD.astype(h_BTD.dtype), preferred_element_type=jnp.float32)
    log_sum_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.sum(weights_BT * (log_sum_BT - target_BT))


def fused(*arrays: jax.Array) -> jax.Array:
    """The same by tiedjax."""
    return cross_entropy(*arrays)[0]


LOSSES: dict[str, Callable[..., jax.Array]] = {"plain": plain, "fused": fused}


def compiled(name: str, shapes: tuple[int, int, int], dtype: Any) -> Any:
    """Loss and both gradients of one of LOSSES."""
    tokens, rows, width = shapes
    struct = lambda shape, of: jax.ShapeDtypeStruct(shape, of)
    about = [struct((4, tokens // 4), of) for of in (jnp.int32, jnp.float32)]
    arguments = (struct((4, tokens // 4, width), dtype), struct((rows, width), jnp.float32), *about)
    return jax.jit(jax.value_and_grad(LOSSES[name], argnums=(0, 1))).lower(*arguments).compile()


def memory(shapes: tuple[int, int, int], dtype: Any) -> dict[str, Any]:
    """Temporary bytes of both programs, beside what both return."""
    temp_bytes = {name: compiled(name, shapes, dtype).memory_analysis().temp_size_in_bytes for name in LOSSES}
    tokens, rows, width = shapes
    shape = {"tokens": tokens, "rows": rows, "width": width, "dtype": jnp.dtype(dtype).name}
    return {**shape, "temp_bytes": temp_bytes, "ratio": temp_bytes["fused"] / temp_bytes["plain"]}


def seconds(shapes: tuple[int, int, int], dtype: Any) -> dict[str, Any]:
    """Medians of both, taken in turn, and the ratio's spread; how far their losses and table gradients differ."""
    tokens, rows, width = shapes
    rng = np.random.default_rng(0)
    arrays = (
        jnp.asarray(rng.standard_normal((4, tokens // 4, width)), dtype),
        jnp.asarray(rng.standard_normal((rows, width)) * width**-0.5, jnp.float32),
        jnp.asarray(rng.integers(0, rows, (4, tokens // 4)), jnp.int32),
        jnp.ones((4, tokens // 4), jnp.float32),
    )
    programs = {name: compiled(name, shapes, dtype) for name in LOSSES}
    (plain_loss, (_, plain_dU)), (fused_loss, (_, fused_dU)) = (program(*arrays) for program in programs.values())
    spent: dict[str, list[float]] = {name: [] for name in LOSSES}
    for _ in range(REPEATS):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            spent[name].append(time.perf_counter() - began)
    ratios = np.array(spent["fused"]) / np.array(spent["plain"])
    return {
        "tokens": tokens,
        "rows": rows,
        "width": width,
        "dtype": jnp.dtype(dtype).name,
        "seconds": {name: float(np.median(times)) for name, times in spent.items()},
        "ratio": dict(zip(("p10", "median", "p90"), map(float, np.quantile(ratios, [0.1, 0.5, 0.9])), strict=True)),
        "relative_difference_of_losses": float(abs(fused_loss / plain_loss - 1)),
        "relative_difference_of_table_gradients": float(
            jnp.linalg.norm(fused_dU - plain_dU) / jnp.linalg.norm(plain_dU)
        ),
    }


def main() -> None:
    """Measures and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="what it runs on, in words")
    args = parser.parse_args()
    platform = jax.default_backend()
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    results = {
        "machine": args.machine,
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "numpy")},
        "memory": memory(MEMORY, dtype),
        "time": [seconds(shapes, dtype) for shapes in TIMED[platform]],
    }
    text = json.dumps(results, indent=1)
    (RESULTS / f"loss_{platform}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
