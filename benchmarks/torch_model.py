"""The same model and train step in PyTorch: transformers' OLMo, tied, with both role gradients measured by hooks.

What a user would run instead: SDPA, fused AdamW, gradient clipping, float32 parameters; on a GPU under bfloat16
autocast, with whichever is faster of a compiled cross-entropy and Liger's fused linear cross-entropy (liger-kernel, if
it is installed). The hooks measure what arXiv 2603.26663 measures: the input role on the gradient of the embedding's
output [B, T, D], the output role on the unembedding's weight gradient [V, D]. The norms stay on the device until they
are asked for, where the paper's code waits for each.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import OlmoConfig, OlmoForCausalLM

from tiedjax.config import RunConfig
from tiedjax.optimizer import learning_rate

NAMES = {
    "self_attn.q_proj": ("attention", "query"),
    "self_attn.k_proj": ("attention", "key"),
    "self_attn.v_proj": ("attention", "value"),
    "self_attn.o_proj": ("attention", "out"),
    "mlp.gate_proj": ("mlp", "gate"),
    "mlp.up_proj": ("mlp", "up"),
    "mlp.down_proj": ("mlp", "down"),
}


def make_model(cfg: RunConfig, params: Any, device: str) -> OlmoForCausalLM:
    """OLMo of the config's shape with these parameters of ours (NumPy, tied); raises if it is another model."""
    m = cfg.model
    if (m.norm, m.mlp, m.position, m.qk_norm, cfg.tying.scheme) != (
        *("nonparametric_layernorm", "swiglu", "rope", "none"),
        "tied",
    ):
        raise ValueError("OLMo has nonparametric LayerNorm, SwiGLU, RoPE and no QK-norm; tied")
    if m.norm_eps != 1e-5:
        raise ValueError(f"OLMo's norm_eps is 1e-5, not {m.norm_eps}")
    model = OlmoForCausalLM(
        OlmoConfig(
            vocab_size=m.table_rows,
            hidden_size=m.d_model,
            intermediate_size=m.d_ff,
            num_hidden_layers=m.layers,
            num_attention_heads=m.heads,
            num_key_value_heads=m.groups,
            max_position_embeddings=m.seq_len,
            rope_parameters={"rope_type": "default", "rope_theta": m.rope_theta},
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
            pad_token_id=None,
            eos_token_id=None,
        )
    )
    state = {f"model.{name}": torch.tensor(value) for name, value in renamed(m.layers, params)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if set(missing) != {"lm_head.weight"} or unexpected:  # the head is the embedding itself
        raise ValueError(f"parameters do not correspond: {missing} missing, {unexpected} unexpected")
    model.tie_weights()
    return model.to(device)


def renamed(layers: int, params: Any) -> Any:
    """(transformers' name, array) of every parameter of a tied model of ours."""
    (table_VD,) = params["tables"].values()
    yield "embed_tokens.weight", table_VD
    body = params["body"]["params"]
    for i in range(layers):
        for name, (part, matrix) in NAMES.items():
            kernel = body["layers"][part][matrix]["kernel"][i] if "layers" in body else None
            kernel = body[f"layer_{i}"][part][matrix]["kernel"] if kernel is None else kernel
            yield f"layers.{i}.{name}.weight", kernel.T


def mean_loss(h_BTD: torch.Tensor, U_VD: torch.Tensor, targets_BT: torch.Tensor, z_loss: float) -> torch.Tensor:
    """Cross-entropy with float32 logits, as transformers' own loss has it."""
    logits_NV = F.linear(h_BTD, U_VD).float().flatten(0, 1)
    loss = F.cross_entropy(logits_NV, targets_BT.flatten())
    return loss + z_loss * logits_NV.logsumexp(-1).square().mean() if z_loss else loss


def liger_loss(h_BTD: torch.Tensor, U_VD: torch.Tensor, targets_BT: torch.Tensor, z_loss: float) -> torch.Tensor:
    """The same without logits in memory: Liger's fused linear cross-entropy, in chunks."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    h_ND, U_VD = h_BTD.flatten(0, 1), U_VD.to(h_BTD.dtype)
    loss = liger_fused_linear_cross_entropy(h_ND, U_VD, targets_BT.flatten(), lse_square_scale=z_loss)
    return loss[0] if isinstance(loss, tuple) else loss


class TorchStepper:
    """A train step with its state and its batches on the device, run as `tiedjax.cost.bench.Stepper` is.

    Attributes:
      about: how many parameters there are, the shared table once; and on a GPU the loss that was chosen, with the
        seconds of a gradient under each.
      roles: per step the norms of the two role gradients, as measured by the hooks of its last microbatch.
    """

    def __init__(self, cfg: RunConfig, params: Any, tokens_NBS: np.ndarray, *, device: str, compiled: bool):
        self._model = make_model(cfg, params, device)
        self.about: dict[str, Any] = {"parameters": sum(p.numel() for p in self._model.parameters())}
        self._cfg, self._device = cfg, device
        self._batches = [torch.tensor(each, dtype=torch.long, device=device) for each in tokens_NBS]
        opt = cfg.optimizer
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),  # all of them matrices, to which our weight decay applies as well
            betas=(opt.b1, opt.b2),
            eps=opt.eps,
            weight_decay=opt.weight_decay,
            fused=True,
        )
        schedule = learning_rate(opt, cfg.train.steps)
        self._rate: Callable[[int], float] = lambda step: float(schedule(np.float32(step)))
        self._rates: list[float] = []
        compile_ = torch.compile if compiled else lambda f: f
        self._body: Any = compile_(self._model.model)
        self._loss: Any = compile_(mean_loss)
        self._losses: list[torch.Tensor] = []
        self.roles: list[tuple[torch.Tensor, torch.Tensor]] = []
        if compiled and device == "cuda":
            self._choose_loss()

    def _choose_loss(self) -> None:
        seconds: dict[str, float | str] = {}
        losses = {"compiled cross-entropy": self._loss, "Liger's fused linear cross-entropy": liger_loss}
        for name, self._loss in losses.items():
            try:
                each = []
                for _ in range(5):
                    self._wait()
                    began = time.perf_counter()
                    self._gradients(self._batches[0][: len(self._batches[0]) // self._cfg.data.microbatches])
                    self._wait()
                    each.append(time.perf_counter() - began)
                    self._optimizer.zero_grad(set_to_none=True)
                seconds[name] = min(each)
            except (RuntimeError, ImportError) as error:  # out of memory, or not installed: the other one then
                self._optimizer.zero_grad(set_to_none=True)
                seconds[name] = f"{type(error).__name__}: {str(error)[:200]}"
        measured = {name: value for name, value in seconds.items() if isinstance(value, float)}
        if not measured:
            raise RuntimeError(f"neither loss runs: {seconds}")
        chosen = min(measured, key=lambda name: measured[name])
        self._loss = losses[chosen]
        self.about |= {"loss": chosen, "gradient_seconds": seconds}

    def _autocast(self) -> Any:
        cuda = self._device == "cuda"
        return torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext()

    def _gradients(self, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        inputs_BT, targets_BT = tokens_BS[:, :-1], tokens_BS[:, 1:]
        parts, norms = self._cfg.data.microbatches, {}

        def observe(role: str) -> Callable[[torch.Tensor], None]:
            def hook(gradient: torch.Tensor) -> None:
                norms[role] = gradient.float().norm()

            return hook

        with self._autocast():
            x_BTD = self._model.model.embed_tokens(inputs_BT)
            x_BTD = x_BTD.to(torch.bfloat16) if self._device == "cuda" else x_BTD
            # A view of the shared matrix, so that a hook sees the gradient of this use alone.
            U_VD = self._model.lm_head.weight.view_as(self._model.lm_head.weight)
            x_BTD.register_hook(observe("input"))
            U_VD.register_hook(observe("output"))
            h_BTD = self._body(inputs_embeds=x_BTD).last_hidden_state
            loss = self._loss(h_BTD, U_VD, targets_BT, self._cfg.train.z_loss) / parts
        loss.backward()
        return loss.detach(), norms

    def _step(self, tokens_BS: torch.Tensor, rate: float) -> None:
        parts = [self._gradients(part) for part in tokens_BS.chunk(self._cfg.data.microbatches)]
        if self._cfg.optimizer.clip_norm:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._cfg.optimizer.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._losses.append(torch.stack([loss for loss, _ in parts]).sum())
        self.roles.append((parts[-1][1]["input"], parts[-1][1]["output"]))

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def run(self, steps: int) -> float:
        """Runs this many steps, waits for the last, and returns the seconds of all."""
        done = len(self._losses)
        rates = [self._rate(done + i) for i in range(steps)]
        self._wait()
        began = time.perf_counter()
        for i, rate in enumerate(rates):
            self._step(self._batches[(done + i) % len(self._batches)], rate)
        self._wait()
        return time.perf_counter() - began

    @property
    def losses(self) -> list[float]:
        """The loss of every step so far, each before its update, in nats."""
        return [float(loss) for loss in self._losses]


def about(device: str) -> dict[str, Any]:
    """Versions and threads, for the JSON of a measurement."""
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "attention": "sdpa",
        "optimizer": "AdamW(fused=True)",
        "compute_dtype": "bfloat16 autocast" if device == "cuda" else "float32",
    }
