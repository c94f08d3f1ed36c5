"""Every option of a run and of a study: frozen dataclasses that hold the defaults and check themselves.

A value outside its limits and an impossible combination raise `UserError` with one line that names the key.
`config_files` reads them from YAML. Nothing here imports JAX.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tiedjax.errors import UserError

ROLES = ("input", "output")  # of a table
TRACKERS = ("wandb", "trackio", "mlflow")  # services that a run can tell its numbers
REGULARISERS = ("cosine", "orthogonality", "mean", "anchor")
WIDEST_HEAD = 2**14  # columns: angles of rotary embedding are made for them before anyone asks whether arrays fit

_STRICT = {"extra": "forbid", "strict": True}


def _option(
    default: Any,
    meaning: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A field with its default, its meaning (shown by --help) and its limits (None is exempt from them)."""
    limits = {">=": at_least, ">": above, "<": below, "<=": at_most}
    metadata = {"meaning": meaning, "limits": {k: v for k, v in limits.items() if v is not None}}
    return field(default=default, metadata=metadata)


def role_of(parameter: str) -> str | None:
    """The role that alone writes the parameter of the tables with this name, which then begins with it; None: both."""
    first = parameter.partition("_")[0]
    return first if first in ROLES else None


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is what the hint of an option says; a whole number is a number, and a truth value is none."""
    kind, given = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_is_of(value, each) for each in given)
    if kind is Literal:
        return value in given and type(value) in map(type, given)
    if kind is tuple:
        of = given[:1] * len(value) if isinstance(value, tuple) and given[1:] == (...,) else given
        return isinstance(value, tuple) and len(value) == len(of) and all(map(_is_of, value, of))
    if kind is list:
        return isinstance(value, list) and all(_is_of(each, given[0]) for each in value)
    if kind is not None:
        return isinstance(value, Mapping)
    if hint in (int, float):
        number = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return hint is Any or value is hint or isinstance(value, type(None) if hint is None else hint)


def _in_words(hint: Any) -> str:
    """What a value must be."""
    kind, given = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(map(_in_words, given))
    if kind is Literal:
        return " or ".join(map(repr, given))
    names = {int: "a whole number", float: "a number", str: "text", bool: "True or False", type(None): "None"}
    return names.get(hint) or (str(hint) if kind else f"a {hint.__name__}")


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


class _Checked:
    """Checks every field's type and limits; a subclass adds what involves several fields in `_check`."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        holds = {">=": lambda v, b: v >= b, ">": lambda v, b: v > b, "<": lambda v, b: v < b, "<=": lambda v, b: v <= b}
        kind: Any = type(self)
        hints = _hints(kind)
        for f in dataclasses.fields(kind):
            value, hint = getattr(self, f.name), hints[f.name]
            if not _is_of(value, hint):
                raise UserError(f"{f.name}: must be {_in_words(hint)}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{f.name}: must be finite, got {value}")
            for sign, bound in f.metadata.get("limits", {}).items():
                if value is not None and not holds[sign](value, bound):
                    raise UserError(f"{f.name}: must be {sign} {bound}, got {value}")
        self._check()

    def _check(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Checked):
    """The transformer's shape and arithmetic."""

    layers: int = _option(4, "decoder layers", at_least=1, at_most=10_000)
    d_model: int = _option(128, "model width D", at_least=1)
    heads: int = _option(4, "query heads H", at_least=1)
    kv_heads: int | None = _option(None, "key/value heads G; null: as many as query heads", at_least=1)
    head_width: int | None = _option(None, "width K of one head; null: D / H", at_least=1)
    d_ff: int = _option(512, "MLP hidden width F (of each of gate and up where there are gates)", at_least=1)
    seq_len: int = _option(128, "positions T", at_least=1)
    vocab_size: int = _option(4096, "token ids that can occur", at_least=2)
    vocab_multiple: int = _option(1, "the tables' rows V are vocab_size rounded up to a multiple of this", at_least=1)
    norm: Literal["nonparametric_layernorm", "layernorm", "rmsnorm"] = _option(
        "nonparametric_layernorm", "normalisation before each block and at the end"
    )
    norm_eps: float = _option(1e-5, "added to the variance before its square root", above=0)
    norm_bias: bool = _option(False, "layernorm: a bias beside the scale")
    norm_place: Literal["pre", "post", "both"] = _option(
        "pre", "what attention and MLP norm: what enters them, what they add to the residual stream, or both"
    )
    parallel: bool = _option(False, "attention and MLP of a layer both see what enters the layer")
    qk_norm: Literal["none", "head", "whole"] = _option(
        "none",
        "RMSNorm with a scale of queries and keys: of each head, or of all heads' together before they are split",
    )
    clip_qkv: float | None = _option(None, "queries, keys and values are cut to at most this, both ways", above=0)
    attention_scale: float | None = _option(
        None, "what products of queries and keys are multiplied by; null: 1 / sqrt(K)", above=0
    )
    attention_cap: float | None = _option(
        None, "attention scores s become cap tanh(s / cap), at most this both ways; null: no cap", above=0
    )
    biases: str = _option("", "linear maps that have a bias, separated by commas: qkv, out (both of attention), mlp")
    position: Literal["rope", "learned", "none"] = _option(
        "rope", "how positions are seen: rotated queries and keys, a learned vector added to each, not at all"
    )
    rope_theta: float = _option(10_000.0, "base of the rotary frequencies", above=0)
    rotary_fraction: float = _option(
        1.0, "share of a head's columns, the first, that rope rotates, rounded down", above=0, at_most=1
    )
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = _option(
        "none",
        "which rotary frequencies are divided by rope_factor, for more positions than a model was first trained on: "
        "all, or the low ones as Llama 3.1 or YaRN (arXiv 2309.00071) choose them; never in layers with a window",
    )
    rope_factor: float | None = _option(None, "rope_scaling: by how much", at_least=1)
    rope_positions: int | None = _option(
        None, "llama3, yarn: positions that the model was first trained on", at_least=1
    )
    rope_turns: tuple[float, ...] | None = _option(
        None,
        "llama3, yarn: two numbers of turns in rope_positions; frequencies below the first are divided, those above "
        "the second left alone, those between them blended; null: 1 and 4 (llama3), 1 and 32 (yarn)",
    )
    rope_magnitude: float | None = _option(
        None, "yarn: what rotated columns are multiplied by; null: 1 + ln(rope_factor) / 10", above=0
    )
    window: int | None = _option(
        None, "positions that a position sees, itself and those before it, in some layers; null: all", at_least=1
    )
    window_layers: str = _option(
        "window", "which layers those are: window or full for each, separated by commas, over and over"
    )
    window_theta: float | None = _option(None, "rope_theta of layers with a window; null: as of the others", above=0)
    input_multiplier: Literal["one", "sqrt_d", "inverse_sqrt_d"] = _option(
        "one", "what looked-up vectors are multiplied by: 1, sqrt(D) or 1 / sqrt(D)"
    )
    output_multiplier: Literal["one", "sqrt_d", "inverse_sqrt_d"] = _option(
        "one", "what the last state is multiplied by before the output table: 1, sqrt(D) or 1 / sqrt(D)"
    )
    norm_after_lookup: bool = _option(
        False, "normalise looked-up vectors, after their multiplier, as before each block"
    )
    mlp: Literal["swiglu", "geglu", "geglu_exact", "gelu", "gelu_exact"] = _option(
        "swiglu",
        "the MLP's form: gates in SiLU or GELU, or GELU without gates; geglu and gelu take its approximation by tanh, "
        "geglu_exact and gelu_exact the function itself",
    )
    output_bias: Literal["none", "unigram"] = _option(
        "none",
        "what is added to the logits, never trained; unigram: log((n + 1/2) / (N + V/2)), n how often a token is a "
        "target in the training text, N all of them",
    )
    logit_cap: float | None = _option(
        None, "logits z become cap tanh(z / cap), before the output bias; null: no cap", above=0
    )
    dtype: Literal["auto", "float32", "bfloat16"] = _option(
        "auto", "compute dtype; auto: bfloat16 on accelerators, float32 on CPU; parameters are always float32"
    )
    attention: Literal["auto", "xla", "cudnn", "splash"] = _option(
        "auto", "attention backend; auto: cuDNN's on NVIDIA GPUs, splash attention on TPUs, plain XLA on CPU"
    )
    table_gradient: Literal["auto", "scatter", "sorted", "deterministic"] = _option(
        "auto",
        "how gradients of single tokens are summed into the table's; auto: scatter on CPU and GPU, sorted on TPU; "
        "deterministic: the same bits every time on a GPU too",
    )
    body_gradient: Literal["compute", "float32"] = _option(
        "compute",
        "dtype that gradients of the body's matrices are rounded to and added over devices in: that of activations, or "
        "float32, as those of the tables always are, which sends twice the bytes",
    )
    scan_layers: bool | None = _option(
        None,
        "one compiled layer in a loop: compiles faster, parameters stacked over layers; null: from 12 layers on "
        "TPUs, from 32 on GPUs and CPUs, unless some have a window and others not",
    )
    remat: Literal["none", "dots", "attention", "full"] = _option(
        "none",
        "what the backward pass recomputes per layer: nothing; all but matrix products and attention; all but "
        "attention; everything",
    )

    @property
    def key_width(self) -> int:
        """Width K of one head."""
        return self.head_width or self.d_model // self.heads

    @property
    def rotary_width(self) -> int:
        """How many of a head's columns rope rotates."""
        return int(self.key_width * self.rotary_fraction)

    @property
    def gated(self) -> bool:
        """Whether the MLP has gates."""
        return self.mlp in ("swiglu", "geglu", "geglu_exact")

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many positions a position sees in each layer; None: all."""
        kinds = [kind.strip() for kind in self.window_layers.split(",")]
        return tuple(self.window if kinds[i % len(kinds)] == "window" else None for i in range(self.layers))

    @property
    def bias_names(self) -> tuple[str, ...]:
        """The names in `biases`."""
        return tuple(name.strip() for name in self.biases.split(",")) if self.biases.strip() else ()

    @property
    def groups(self) -> int:
        """Number G of key/value heads."""
        return self.kv_heads or self.heads

    @property
    def table_rows(self) -> int:
        """Rows V of the tables: vocab_size rounded up to vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def multipliers(self) -> dict[str, float]:
        """The numbers that `input_multiplier` and `output_multiplier` name, by role."""
        numbers = {"one": 1.0, "sqrt_d": math.sqrt(self.d_model), "inverse_sqrt_d": 1 / math.sqrt(self.d_model)}
        return {"input": numbers[self.input_multiplier], "output": numbers[self.output_multiplier]}

    def _check(self) -> None:
        if self.head_width is None and self.d_model % self.heads:
            raise UserError(f"heads: {self.heads} does not divide d_model {self.d_model}")
        if self.key_width > WIDEST_HEAD:
            given = "head_width" if self.head_width else "d_model / heads"
            raise UserError(f"heads: must have at most {WIDEST_HEAD:,} columns each, got {given} = {self.key_width:,}")
        if self.heads % self.groups:
            raise UserError(f"kv_heads: {self.groups} does not divide heads {self.heads}")
        if self.position == "rope" and (self.rotary_width % 2 or not self.rotary_width):
            if self.rotary_fraction < 1:
                raise UserError(f"rotary_fraction: rope needs an even number of columns, got {self.rotary_width}")
            given = "head_width" if self.head_width else "d_model / heads"
            raise UserError(f"heads: rope needs an even head width, got {given} = {self.key_width}")
        if self.rotary_fraction < 1 and self.position != "rope":
            raise UserError(f"rotary_fraction: goes with position rope, got {self.position}")
        self._check_rope_scaling()
        self._check_windows()
        if self.norm_bias and self.norm != "layernorm":
            raise UserError(f"norm_bias: goes with norm layernorm, got {self.norm}")
        if len(set(self.bias_names)) < len(self.bias_names) or set(self.bias_names) - {"qkv", "out", "mlp"}:
            raise UserError(
                f"biases: must name some of qkv, out, mlp, each once, separated by commas, got {self.biases!r}"
            )

    def _check_rope_scaling(self) -> None:
        kind = self.rope_scaling
        if kind != "none" and self.position != "rope":
            raise UserError(f"rope_scaling: goes with position rope, got {self.position}")
        takes = {
            "rope_factor": ("linear", "llama3", "yarn"),
            "rope_positions": ("llama3", "yarn"),
            "rope_turns": ("llama3", "yarn"),
            "rope_magnitude": ("yarn",),
        }
        for name, kinds in takes.items():
            if getattr(self, name) is not None and kind not in kinds:
                raise UserError(f"{name}: goes with rope_scaling {' or '.join(kinds)}, got {kind}")
            if name in ("rope_factor", "rope_positions") and getattr(self, name) is None and kind in kinds:
                raise UserError(f"{name}: rope_scaling {kind} needs one")
        if kind == "yarn" and self.rope_theta <= 1:
            raise UserError(f"rope_theta: must be > 1 with rope_scaling yarn, got {self.rope_theta}")
        turns = self.rope_turns
        if turns is not None and not (len(turns) == 2 and 0 < turns[0] < turns[1] < math.inf):
            raise UserError(f"rope_turns: must be two numbers above 0, the smaller one first, got {list(turns)}")

    def _check_windows(self) -> None:
        kinds = {kind.strip() for kind in self.window_layers.split(",")}
        if not kinds <= {"window", "full"}:
            raise UserError(
                f"window_layers: must be window or full for each layer, separated by commas, got {self.window_layers!r}"
            )
        given = {"window_layers": self.window_layers != "window", "window_theta": self.window_theta is not None}
        for name, has in given.items():
            if has and self.window is None:
                raise UserError(f"{name}: goes with a window, got window null")
        if self.window is not None and not any(self.windows):
            raise UserError(f"window_layers: leaves no layer with the window, got {self.window_layers!r}")
        if self.window_theta is not None and self.position != "rope":
            raise UserError(f"window_theta: goes with position rope, got {self.position}")
        if self.rope_scaling != "none" and all(self.windows):
            raise UserError("rope_scaling: is of layers without a window, and all have one")
        if self.scan_layers and len(set(self.windows)) > 1:
            raise UserError(
                "scan_layers: must be false or null where some layers have a window and others not: a loop has one "
                "compiled layer for all"
            )


@dataclass(frozen=True, kw_only=True)
class TyingConfig(_Checked):
    """How the two tables share parameters, how much each role's gradient counts, and what is kept of their updates."""

    scheme: Literal[
        "tied",
        "untied",
        "untied_equal",
        "partial_dims",
        "partial_tokens",
        "low_rank",
        "transform",
        "interpolated",
        "pseudo_inverse",
    ] = _option(
        "tied",
        "how two tables come from parameters. tied: one table; untied: two, independent; untied_equal: two that start "
        "equal. The others start with one table E in both roles: partial_dims: its first tying.dims dimensions are "
        "shared; partial_tokens: tying.rows rows have a copy for the output role; low_rank: output = E + A B'; "
        "transform: output = E M; interpolated: output = g E + (1 - g) U; pseudo_inverse: E'U = V / D times the "
        "identity (arXiv 2602.04556)",
    )
    dims: int | None = _option(None, "partial_dims: dimensions that the roles share; null: D / 2", at_least=1)
    rows: int | None = _option(
        None, "partial_tokens: tokens whose rows the roles do not share; null: half of the table's", at_least=1
    )
    rows_from: Literal["rarest", "frequent"] = _option(
        "rarest", "partial_tokens: which tokens those are, by count in the training text"
    )
    rank: int | None = _option(None, "low_rank: columns of A and B; null: D / 8", at_least=1)
    transform: Literal["full", "diagonal", "orthogonal"] = _option(
        "full",
        "transform: what M is: I + R, R any matrix; I + diag(r); or a rotation, the Cayley transform of R - R'; each "
        "is I at the start, and weight decay draws it there",
    )
    gate: Literal["global", "dimension", "token"] = _option(
        "global", "interpolated: one learned g for all, for each dimension or for each token, each 1/2 at the start"
    )
    untie_at: int | float | None = _option(
        None,
        "tied: the update after which each role has a table of its own, a copy; a whole number, or a share of "
        "train.steps below 1; role scales end there; null: never",
        above=0,
    )
    untie_when: Literal["output_update_share", "harm"] | None = _option(
        None,
        "tied: untie once this is above untie_above, averaged over some 20 updates and looked at every 10, from 20 "
        "updates and the end of warmup on. output_update_share: as metrics.jsonl has it; harm: (m_in_out + m_out_in) / "
        "|m_in_in + m_out_out|, what the roles' updates cost each other of what they gain; null: never",
    )
    untie_above: float | None = _option(None, "the value of untie_when above which the run unties")
    untie_moments: Literal["copy", "split"] = _option(
        "copy",
        "what AdamW's moments are after untying: those of the one table in both, or those of each role's gradients, "
        "for which two more arrays of its size are kept until then",
    )
    tie_at: int | float | None = _option(
        None, "untied: the update after which the roles have one table, given as untie_at; null: never", above=0
    )
    tie_by: Literal["input", "output", "transform"] = _option(
        "input",
        "tie_at: the table that stays, or transform: the input table E, and output = E M with the M of least squares",
    )
    input_grad_scale: float = _option(1.0, "factor on the table's gradient from its input role", at_least=0)
    output_grad_scale: float = _option(1.0, "factor on the table's gradient from its output role", at_least=0)
    grad_scale_schedule: Literal["constant", "linear", "cosine", "window"] = _option(
        "constant",
        "how the two factors run over the updates: constant; to 1 between grad_scale_from and grad_scale_until, "
        "linearly or as half a cosine; window: 1 outside of these two",
    )
    grad_scale_from: int = _option(
        1, "the update at which the factors begin to change, or the window's first", at_least=1
    )
    grad_scale_until: int | None = _option(
        None, "the update at which the factors are 1, or the window's last; null: the run's last", at_least=1
    )
    input_grad_scale_deciles: tuple[float, ...] | None = _option(
        None, "ten more factors on the input role's gradient, by token frequency, rarest tenth first; null: none"
    )
    output_grad_scale_deciles: tuple[float, ...] | None = _option(
        None, "ten further factors on the output role's gradient, by token frequency, rarest tenth first; null: none"
    )
    output_update_share: float | None = _option(
        None,
        "share of the output role in the role updates (of both norms) that a controller holds by a further factor on "
        "the input role's gradient; null: no controller",
        above=0,
        below=1,
    )
    rare_gate: float | None = _option(
        None,
        "appearances per update, by the training text, below which a token is rare, some 0.03: what pushes its output "
        "row while the target is not rare is multiplied by that number of its own (arXiv 2109.03127); null: no gate",
        above=0,
        at_most=1,
    )
    account: Literal["auto", "whole", "checked", "rows", "off"] = _option(
        "auto",
        "running sums of what each role wrote into a table of both: whole, whole with the output role's kept beside "
        "the input's, of 2,048 rows, or none; auto: whole below 2^26 numbers, rows above",
    )

    def _check(self) -> None:
        for name in ("input_grad_scale_deciles", "output_grad_scale_deciles"):
            factors = getattr(self, name)
            if factors is not None and (len(factors) != 10 or any(not 0 <= x < math.inf for x in factors)):
                raise UserError(f"{name}: must be ten factors of at least 0, got {list(factors)}")
        if self.grad_scale_until is not None and self.grad_scale_until < self.grad_scale_from:
            raise UserError(
                f"grad_scale_until: must be >= grad_scale_from = {self.grad_scale_from}, got {self.grad_scale_until}"
            )


@dataclass(frozen=True, kw_only=True)
class RegularisersConfig(_Checked):
    """Weights of what is added to the training loss for each table itself; it is of neither role."""

    cosine: float = _option(
        0.0, "weight of the mean cosine of two different tokens' rows (arXiv 1907.12009); 0: off", at_least=0
    )
    orthogonality: float = _option(
        0.0, "weight of ||E'E / V - c I||^2, c = trace(E'E) / (V D): columns orthogonal and equally long", at_least=0
    )
    mean: float = _option(0.0, "weight of the squared length of the mean row", at_least=0)
    anchor: float = _option(
        0.0,
        "weight of the mean squared distance of a row to where the run began, for which a copy of the table is kept; "
        "these four are of the one table, or of both added, and leave rows above vocab_size out",
        at_least=0,
    )
    anchor_to: str | None = _option(
        None, "a run, or RUN@STEP, whose tables anchor is of; null: those that this run begins with"
    )

    def _check(self) -> None:
        if self.anchor_to is not None and not self.anchor:
            raise UserError("anchor_to: is void without a weight of anchor; give it one, or leave this out")

    @property
    def weights(self) -> dict[str, float]:
        """Those that are on, by name."""
        weights = (self.cosine, self.orthogonality, self.mean, self.anchor)
        return {name: weight for name, weight in zip(REGULARISERS, weights, strict=True) if weight}


@dataclass(frozen=True, kw_only=True)
class BodyOptimizerConfig(_Checked):
    """What updates the body's matrices; its norm scales take AdamW at optimizer.learning_rate, without decay."""

    kind: Literal["adamw", "muon"] = _option(
        "adamw", "muon: momentum made orthogonal (arXiv 2502.16982), its learning rate some 0.02; adamw: as all else"
    )
    learning_rate: float | None = _option(None, "peak learning rate; null: optimizer.learning_rate", at_least=0)
    weight_decay: float | None = _option(None, "decoupled weight decay; null: optimizer.weight_decay", at_least=0)


@dataclass(frozen=True, kw_only=True)
class RoleOptimizerConfig(_Checked):
    """What updates the table of one role; where both have one table, its learning rate is that of its part."""

    kind: Literal["adamw", "sgd", "coupled", "by_role", "by_role_matched", "by_role_lazy", "lion"] | None = _option(
        None, "null: optimizer.tables.kind"
    )
    learning_rate: float | None = _option(
        None,
        "peak; on a shared table, of this role's part of the update; null: optimizer.tables.learning_rate",
        at_least=0,
    )
    b2: float | None = _option(None, "null: optimizer.tables.b2", at_least=0, below=1)
    weight_decay: float | None = _option(None, "null: optimizer.tables.weight_decay", at_least=0)
    init_std: float | None = _option(None, "null: optimizer.tables.init_std", above=0)


@dataclass(frozen=True, kw_only=True)
class TableOptimizerConfig(_Checked):
    """What updates the tables and what they start from: both roles alike, unless one is given its own."""

    kind: Literal["adamw", "sgd", "coupled", "by_role", "by_role_matched", "by_role_lazy", "lion"] = _option(
        "adamw",
        "adamw: one second moment for both roles; coupled: and for all rows (arXiv 2502.08441); by_role: moments of "
        "each role; by_role_matched: by_role with updates as large as adamw's; by_role_lazy: by_role with the input "
        "role's rows at rest where the batch lacks them; sgd: the gradient averaged over updates with decay b1; lion: "
        "sign of such an average (arXiv 2302.06675), without an account",
    )
    learning_rate: float | None = _option(None, "peak learning rate; null: optimizer.learning_rate", at_least=0)
    b2: float | None = _option(None, "decay of AdamW's second moment; null: optimizer.b2", at_least=0, below=1)
    weight_decay: float | None = _option(None, "decoupled weight decay; null: optimizer.weight_decay", at_least=0)
    init_std: float | None = _option(
        None, "standard deviation of the initial numbers; null: 1 / sqrt(model.d_model)", above=0
    )
    centered: bool = _option(False, "subtract the mean row after every update (arXiv 2601.02031)")
    input: RoleOptimizerConfig = RoleOptimizerConfig()
    output: RoleOptimizerConfig = RoleOptimizerConfig()

    def of(self, name: str) -> TableOptimizerConfig:
        """These options for the parameter of this name, with a role's own in their place where it alone writes it."""
        role = role_of(name)
        own = vars(getattr(self, role)) if role else {}
        return dataclasses.replace(self, **{option: value for option, value in own.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(_Checked):
    """AdamW with linear warmup and cosine decay, unless `body` or `tables` say otherwise."""

    learning_rate: float = _option(3e-4, "peak learning rate of all that is given none of its own", at_least=0)
    warmup_steps: int = _option(100, "updates of linear warmup, the last at the peak", at_least=0)
    final_fraction: float = _option(
        0.1, "learning rate at the last step, as a fraction of the peak", at_least=0, at_most=1
    )
    b1: float = _option(0.9, "decay of the first moment", at_least=0, below=1)
    b2: float = _option(0.95, "decay of the second moment", at_least=0, below=1)
    eps: float = _option(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = _option(
        0.1, "decoupled weight decay of matrices and tables (never of norm scales)", at_least=0
    )
    clip_norm: float | None = _option(1.0, "largest global L2 norm of the gradient; null: no clipping", above=0)
    clip_by: Literal["raw", "scaled"] = _option(
        "raw",
        "whose norm clip_norm limits: the gradient's before role scales, which then leave the body's update alone, or "
        "with them in it, as in arXiv 2603.26663",
    )
    moments_dtype: Literal["float32", "bfloat16"] = _option(
        "float32",
        "dtype in which the moments are kept between updates (computed in float32); bfloat16 halves them, "
        "and keeps the second to about 2^-8 / (1 - b2) of its value",
    )
    body: BodyOptimizerConfig = BodyOptimizerConfig()
    tables: TableOptimizerConfig = TableOptimizerConfig()

    def _check(self) -> None:
        # A moment moves by (1 - b) of its distance to the new value. Rounding undoes moves below half the spacing of
        # the dtype's numbers: a second moment would never fall again, and its parameter would all but stand still.
        spacing = 2**-7  # of bfloat16, relative to the number, at most
        tables = self.tables
        decays = {"b1": self.b1, "b2": self.b2, "tables.b2": tables.b2}
        decays |= {"tables.input.b2": tables.input.b2, "tables.output.b2": tables.output.b2}
        for name, decay in decays.items():
            if self.moments_dtype == "bfloat16" and decay is not None and 1 - decay < spacing:
                raise UserError(
                    f"{name}: must be <= {1 - spacing} with moments_dtype bfloat16, got {decay}: it changes a moment "
                    "by less than bfloat16 can hold; lower it or use moments_dtype float32"
                )


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Checked):
    """Where the text comes from and how it becomes batches."""

    source: str = _option("embedded", "embedded | tfds:NAME[/CONFIG] | text:GLOB | tokens:GLOB | prepared:DIR")
    second_source: str | None = _option(
        None, "another source, of the same kinds, on whose held-out part the run is evaluated too, by its own tokenizer"
    )
    tokenizer: str = _option(
        "bpe",
        "bpe: train a byte-level BPE of model.vocab_size entries; or the path of a tokenizer.json; "
        "tokens: sources may leave it at bpe and have none",
    )
    text_field: str = _option("text", "the field that holds the text, in TFDS examples and .jsonl lines")
    max_documents: int | None = _option(None, "read at most this many documents; null: all", at_least=2)
    holdout: float = _option(
        0.02, "share of the documents (tokens: of each file) kept for evaluation", above=0, below=1
    )
    batch_size: int = _option(16, "sequences per step, over all devices", at_least=1)
    microbatches: int = _option(1, "gradient accumulation: parts that a batch is cut into", at_least=1)
    workers: int | None = _option(
        None, "threads that tokenize and threads that read; null: one per core", at_least=1, at_most=256
    )
    cache: str | None = _option(None, "folder of prepared data; null: $TIEDJAX_CACHE or ~/.cache/tiedjax")

    def _check(self) -> None:
        if self.batch_size % self.microbatches:
            raise UserError(f"microbatches: {self.microbatches} does not divide batch_size {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class MeshConfig(_Checked):
    """Devices per mesh axis; their product is the number of devices."""

    data: int = _option(-1, "devices that split the batch only; -1: all that fsdp and tensor leave", at_least=-1)
    fsdp: int = _option(1, "devices that split the batch and the parameters", at_least=1)
    tensor: int = _option(1, "devices that split heads, MLP and vocabulary", at_least=1)

    def _check(self) -> None:
        if self.data == 0:
            raise UserError("data: must be -1 or at least 1, got 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Checked):
    """How long, how often, from which seed."""

    steps: int = _option(
        1000, "optimizer steps; also the length of the learning-rate schedule", at_least=1, below=2**31
    )
    stop_at: int | None = _option(
        None, "end at this step as an interruption would; the schedule is that of `steps`", at_least=1
    )
    threads: int = _option(
        2,
        "CPU threads that compute the run on a CPU; never taken from the machine, since another number changes the "
        "last bits of every result",
        at_least=1,
        at_most=1024,
    )
    seed: int = _option(0, "seeds parameters and data order", at_least=0, below=2**32)
    init: str | None = _option(
        None,
        "a run, RUN@STEP or a Hugging Face directory, whose parameters and tokenizer this one begins with, its "
        "optimizer anew; an untied run that begins with a tied one has its table in both roles; null: parameters are "
        "drawn",
    )
    z_loss: float = _option(0.0, "coefficient of mean(logsumexp^2) in the training loss", at_least=0)
    log_every: int = _option(1, "steps between lines of metrics.jsonl", at_least=1)
    sinks: str = _option(
        "",
        f"services that get every line of metrics.jsonl too, of {', '.join(TRACKERS)}, separated by commas; each has "
        "an extra of its name to be installed",
    )
    eval_every: int | None = _option(None, "steps between evaluations; null: only at the end", at_least=1)
    eval_batches: int | None = _option(None, "batches per evaluation; null: all held-out windows", at_least=1)
    checkpoint_every: int | None = _option(1000, "steps between full checkpoints; null: only at the end", at_least=1)
    checkpoint_minutes: float | None = _option(
        None, "minutes after which a full checkpoint is saved too; null: by steps alone", above=0
    )
    keep_checkpoints: int = _option(2, "full checkpoints kept, newest first", at_least=1)
    keep_every: int | None = _option(
        None, "of the others those whose step is a multiple of this are kept too; null: none", at_least=1
    )
    skip_nonfinite: int = _option(
        0,
        "how many updates of the run may be left out because the loss or the gradient is not finite; one more ends it, "
        "with status 77",
        at_least=0,
        below=2**31,
    )
    stall_seconds: float | None = _option(
        600.0,
        "end the process, with status 76, when no step has ended for so long, or for ten times the median step if that "
        "is longer; null: never",
        above=0,
    )
    anatomy: bool | None = _option(
        None,
        "at snapshots, measure what the output role's gradient is made of and what the body's update did to the loss; "
        "needs room for another copy of the body; null: where tables are below 2^26 numbers and logits have no cap",
    )
    snapshot_every: int = _option(100, "steps between table snapshots, after 0, 1, 2, 4, 8, ...", at_least=1)
    snapshot_gib: float | None = _option(
        None,
        "most GiB that the run's snapshots take: where they would take more, those from snapshot_every on lie twice, "
        "three times, ... as far apart; null: no limit",
        above=0,
    )
    early_snapshots_dtype: Literal["float32", "bfloat16"] = _option(
        "float32",
        "dtype in which the snapshots of steps 1, 2, 4, 8, ... below snapshot_every are saved; bfloat16 halves them, "
        "and hides movements of less than 2^-9 of a value",
    )

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in `sinks`."""
        return tuple(name.strip() for name in self.sinks.split(",")) if self.sinks.strip() else ()

    def _check(self) -> None:
        names = self.trackers
        if not set(names) <= set(TRACKERS) or len(set(names)) < len(names):
            allowed = ", ".join(TRACKERS)
            raise UserError(f"sinks: must name some of {allowed}, each once, separated by commas, got {self.sinks!r}")

    @property
    def last(self) -> int:
        """The step after which training ends: `stop_at` if that comes before all `steps`."""
        return min(self.steps, self.stop_at or self.steps)


@dataclass(frozen=True, kw_only=True)
class RunConfig(_Checked):
    """One training run."""

    model: ModelConfig = ModelConfig()
    tying: TyingConfig = TyingConfig()
    regularisers: RegularisersConfig = RegularisersConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()

    def _check(self) -> None:
        model, mesh, tensor = self.model, self.mesh, self.mesh.tensor
        if self.train.anatomy and model.logit_cap is not None:
            raise UserError("train.anatomy: takes logits apart that have no cap; leave it out with a model.logit_cap")
        for name, size in [
            ("heads", model.heads),
            ("kv_heads", model.groups),
            ("d_ff", model.d_ff),
            ("vocab_size (padded)", model.table_rows),
        ]:
            if size % tensor:
                raise UserError(f"mesh.tensor: {tensor} does not divide model.{name} = {size}")
        if model.d_model % mesh.fsdp:
            raise UserError(f"mesh.fsdp: {mesh.fsdp} does not divide model.d_model = {model.d_model}")
        devices = max(mesh.data, 1) * mesh.fsdp  # at least: data -1 is decided on the machine
        rows = self.data.batch_size // self.data.microbatches
        if rows % devices:
            raise UserError(
                f"mesh: data x fsdp = {devices} does not divide the {rows} sequences of a microbatch "
                f"(data.batch_size {self.data.batch_size} / data.microbatches {self.data.microbatches})"
            )


@dataclass(frozen=True, kw_only=True)
class StudyConfig(_Checked):
    """Twin runs: every arm is `base` with its own overrides, trained from every seed."""

    base: str = _option("", "the run config that all arms share, relative to the study file")
    overrides: dict[str, Any] = field(default_factory=dict, metadata={"meaning": "changes to base for every arm"})
    arms: dict[str, dict[str, Any]] = field(default_factory=dict, metadata={"meaning": "name: changes to base"})
    reference: str = _option("untied", "the arm whose two tables the others are compared with")
    baseline: str = _option("tied", "the arm that the interventions are compared with")
    seeds: tuple[int, ...] = _option((0, 1), "every arm is trained once from each")
    sweep: dict[str, list[Any]] = field(
        default_factory=dict,
        metadata={"meaning": "dotted option: values; every arm is trained with the combination that is best for it"},
    )
    arm_sweeps: dict[str, dict[str, list[Any]]] = field(
        default_factory=dict, metadata={"meaning": "arm: what it sweeps in place of `sweep`"}
    )
    sweep_seeds: tuple[int, ...] = _option((1000, 1001), "seeds of the sweeps' runs, none of them in `seeds`")
    equal_parameters: dict[str, Literal["mlp", "layers"]] = field(
        default_factory=dict,
        metadata={"meaning": "arm: where it gets parameters until it has as many as the reference, mlp or layers"},
    )
    equal_flops: tuple[str, ...] = _option(
        (), "arms that train for as many steps as give their models the reference's FLOPs in all"
    )
    slow_instruments: tuple[str, ...] = _option(
        (), "what takes minutes a run and is analysed beside the others: regret"
    )
    slow_arms: tuple[str, ...] = _option((), "the arms that slow instruments are about; none: all")

    def _check(self) -> None:
        names = ", ".join(map(repr, self.arms)) or "none"
        for key, arms in [
            ("reference", [self.reference]),
            ("baseline", [self.baseline]),
            ("arm_sweeps", self.arm_sweeps),
            ("equal_parameters", self.equal_parameters),
            ("equal_flops", self.equal_flops),
            ("slow_arms", self.slow_arms),
        ]:
            for name in arms:
                if name not in self.arms:
                    raise UserError(f"{key}: no arm is named {name!r}; the arms are {names}")
        for name in self.arms:
            if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
                raise UserError(f"arms: {name!r} cannot name a folder; use letters, digits, '-', '_' and '.'")
        for key, made in [("equal_parameters", self.equal_parameters), ("equal_flops", self.equal_flops)]:
            if self.reference in made:
                raise UserError(f"{key}: {self.reference!r} is the reference that the others are made equal to")
        for key, seeds in [("seeds", self.seeds), ("sweep_seeds", self.sweep_seeds)]:
            if not seeds or len(set(seeds)) != len(seeds):
                raise UserError(f"{key}: must be distinct and at least one, got {list(seeds)}")


@dataclass(frozen=True)
class FieldInfo:
    """One leaf of a config: its dotted key, type, default and meaning."""

    key: str
    type: str
    default: Any
    meaning: str


def leaf_fields(cls: type, prefix: str = "") -> Iterator[FieldInfo]:
    """Every leaf field of a config class, in order, with dotted keys."""
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from leaf_fields(hints[f.name], f"{prefix}{f.name}.")
        else:
            default = f.default_factory() if callable(f.default_factory) else f.default
            yield FieldInfo(prefix + f.name, str(f.type), default, f.metadata["meaning"])
