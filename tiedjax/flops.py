"""What a train step must compute, and what devices can compute at most: the two sides of FLOP utilisation (MFU)."""

from __future__ import annotations

from tiedjax.config import ModelConfig, RunConfig
from tiedjax.tying import scheme_of

# Dense bfloat16 matrix products, FLOP/s of one JAX device, from the makers' data sheets (NVIDIA's figures with sparsity
# halved; a TPU7x chip is two devices). Names are `jax.Device.device_kind`, whole: a slice of a GPU has another one.
PEAK_BF16_FLOPS: dict[str, float] = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
}


def layer_matrices(cfg: ModelConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of every matrix of one layer."""
    D, F, heads, groups = cfg.d_model, cfg.d_ff, cfg.heads * cfg.key_width, cfg.groups * cfg.key_width
    wide = 2 if cfg.gated else 1
    return [(D, heads), (D, groups), (D, groups), (heads, D), *[(D, F)] * wide, (F, D)]


def matmul_parameters(cfg: ModelConfig) -> int:
    """Parameters that every token is multiplied by: the body's matrices and one table (a lookup multiplies nothing)."""
    layer = sum(inputs * outputs for inputs, outputs in layer_matrices(cfg))
    return cfg.layers * layer + cfg.table_rows * cfg.d_model


def flops_per_token(cfg: ModelConfig, *, causal: bool) -> int:
    """Floating-point operations of forward and backward per token, recomputation left out.

    6 per matmul parameter, and 12 L T D for attention's two products over all T positions (PaLM, arXiv 2204.02311,
    appendix B), or over the positions that a causal model can see: T / 2, or W - W^2 / 2T in layers with a window W.
    """
    T, width = cfg.seq_len, cfg.heads * cfg.key_width
    if not causal:
        return 6 * matmul_parameters(cfg) + 12 * cfg.layers * T * width
    pairs_2 = sum(T**2 if window is None else T**2 - max(0, T - window) ** 2 for window in cfg.windows)
    return 6 * matmul_parameters(cfg) + 6 * width * pairs_2 // T


def model_flops(cfg: RunConfig) -> int:
    """Floating-point operations of the model in a step on all devices, attention causal; the optimizer's apart.

    Those by which a scheme makes its tables come once a step, forward and backward.
    """
    tokens = cfg.data.batch_size * cfg.model.seq_len
    tables = 3 * scheme_of(cfg.tying).flops(cfg.model.table_rows, cfg.model.d_model)
    return tokens * flops_per_token(cfg.model, causal=True) + tables
