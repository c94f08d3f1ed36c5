"""GPUs that are not there: what they can do, and devices to compile for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from tiedjax.cost.topology import Topology, sides
from tiedjax.errors import UserError
from tiedjax.flops import PEAK_BF16_FLOPS
from tiedjax.host import platform_flags

_MOST_GPUS = 8  # of a host
_PLANNED = 0.8  # of a card's memory: what XLA plans for where no allocator tells it how much there is


@dataclass(frozen=True)
class Card:
    """An NVIDIA card of compute capability 9.0 and what it can do at most.

    The memory's size and bandwidth, and what `target` says beside them, are those of XLA's description of the card
    (openxla/xla, xla/backends/gpu/target_config/specs); FLOP/s in bfloat16 are `flops.PEAK_BF16_FLOPS`, in float32 the
    data sheet's, outside the tensor cores.

    Attributes:
      device_kind: JAX's name of it.
      memory_bytes: what CUDA says it has.
      bytes_per_second: of its memory.
      float32_flops: FLOP/s.
    """

    device_kind: str
    memory_bytes: int
    bytes_per_second: float
    float32_flops: float = 66.9e12
    cores: int = 132
    clock_ghz: float = 1.98

    @property
    def bfloat16_flops(self) -> float:
        """FLOP/s of dense products."""
        return PEAK_BF16_FLOPS[self.device_kind]

    @property
    def exponentials_per_second(self) -> float:
        """16 a clock of each core (CUDA C++ programming guide, arithmetic instructions, compute capability 9.0)."""
        return 16 * self.cores * self.clock_ghz * 1e9

    @property
    def target(self) -> str:
        """The description that XLA compiles for, in which the pool of `platform_flags` is what it plans for."""
        pool = int(self.memory_bytes * float(platform_flags.CUDA_MEMORY_FRACTION) / _PLANNED)
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
              core_count: {self.cores} fpus_per_core: 128 clock_rate_ghz: {self.clock_ghz}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              memory_bandwidth: {self.bytes_per_second:.0f} l2_cache_size: 52428800 device_memory_size: {pool}
              cuda_compute_capability {{ major: 9 }}
            }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 minor: 0 }}
            device_description_str: "{self.device_kind}"
        """


CARDS: Mapping[str, Card] = {
    "h100": Card("NVIDIA H100 80GB HBM3", 84_929_347_584, 3.35232e12),
    "h200": Card("NVIDIA H200", 151_397_597_184, 4.8e12),
}


@dataclass(frozen=True)
class Hosts(Topology):
    """Hosts of equally many GPUs: KIND:GPUS is one, KIND:HOSTSxGPUS several."""

    @classmethod
    def of(cls, name: str, slices: int, kind: str, shape: tuple[int, ...]) -> Hosts:
        """These hosts; raises UserError for a shape that there is not."""
        if len(shape) > 2 or 0 in shape:
            raise UserError(
                f"--topology: a shape of {kind} is GPUS or HOSTSxGPUS, such as 8 or 2x8, got {sides(shape)!r}"
            )
        if shape[-1] > _MOST_GPUS:
            raise UserError(f"--topology: a host of {kind} has at most {_MOST_GPUS} GPUs, got {shape[-1]}")
        return cls(name, slices, kind, shape if len(shape) == 2 else (1, *shape))

    @property
    def card(self) -> Card:
        """What each of them is."""
        return CARDS[self.kind]

    @property
    def chips(self) -> int:
        """Number of GPUs, each one device."""
        return self.slices * math.prod(self.shape)

    @property
    def noun(self) -> str:
        """GPU."""
        return "GPU"

    @property
    def memory_bytes(self) -> int:
        """What CUDA says it has."""
        return self.card.memory_bytes

    @property
    def usable_bytes(self) -> int:
        """The part of it that JAX takes at its start."""
        return int(self.memory_bytes * float(platform_flags.CUDA_MEMORY_FRACTION))

    def devices(self) -> list[jax.Device]:
        """Devices to compile for, slice after slice; nothing runs on them. Raises UserError without JAX for CUDA."""
        from jax.experimental import topologies

        if not platform_flags.has_cuda_plugin():
            raise UserError('compiling for GPUs needs JAX for CUDA, which is not installed: pip install ".[cuda]"')
        shape = sides((self.slices, *self.shape))
        try:
            described = topologies.get_topology_desc("", "cuda", target_config=self.card.target, topology=shape)
        except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
            raise UserError(
                f"--topology {self.name}: JAX {jax.__version__} refuses: {str(error).splitlines()[0]}"
            ) from None
        return sorted(described.devices, key=lambda device: device.id)
