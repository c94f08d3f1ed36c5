"""How fast a compiled step could run on a card at best: a bound, from the work of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tiedjax.cost.gpus import Card
from tiedjax.cost.kernels import Kernel

# Seconds from one kernel to the next. Measured, of steps on one H100 under CUDA graphs, 0.74 to 0.90 microseconds:
# between_kernels / launches in benchmarks/results/gpu_nvidia_h100_80gb_hbm3.json.
LAUNCH_SECONDS = 0.7e-6


@dataclass(frozen=True)
class Work:
    """What kernels launch, move and compute in a step, and the seconds that the card needs for it at least."""

    launches: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.launches + other.launches,
            self.bytes + other.bytes,
            self.flops + other.flops,
            self.seconds + other.seconds,
        )


def work_of(kernel: Kernel, card: Card) -> Work:
    """One kernel after the other, each as fast as the slowest of memory, products and exponentials allows."""
    flops_per_second = card.float32_flops if "f32" in kernel.operands else card.bfloat16_flops
    seconds = max(
        kernel.bytes / card.bytes_per_second,
        kernel.flops / flops_per_second,
        kernel.exponentials / card.exponentials_per_second,
    )
    times = kernel.times
    return Work(times, times * kernel.bytes, times * kernel.flops, times * (seconds + LAUNCH_SECONDS))


def by_part(kernels: Sequence[Kernel], card: Card) -> dict[str, Work]:
    """The work of each part of the step, what takes longest first."""
    parts: dict[str, Work] = {}
    for kernel in kernels:
        parts[kernel.part] = parts.get(kernel.part, Work()) + work_of(kernel, card)
    return dict(sorted(parts.items(), key=lambda part: -part[1].seconds))
