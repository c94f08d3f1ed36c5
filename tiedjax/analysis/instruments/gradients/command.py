"""`tiedjax analyze gradients RUN`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tiedjax.analysis.basis import arguments
from tiedjax.errors import UserError

if TYPE_CHECKING:
    from tiedjax.analysis.instruments.gradients.gradients import GradientFlow, Window

HELP = "share of the table's gradient from each role over the steps"
SUBJECT = "run"
READS = "the role gradients of every step"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and the options."""
    arguments.add_subject(parser, SUBJECT)
    arguments.add_paper(parser, "the input norm is that of the gradient of the looked-up vectors, [B, T, D]")
    arguments.add_count(
        parser, "--half-life", 10, "steps after which a value weighs half in the smoothed curves of --json"
    )


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input, and for --paper on a run that did not log what it needs."""
    import numpy as np

    from tiedjax.analysis.basis.plain_json import to_plain
    from tiedjax.analysis.basis.tables import ROLES
    from tiedjax.analysis.instruments.gradients.gradients import PAPER_NEEDS, measure, output_share, smooth
    from tiedjax.tying import distinct

    half_life = arguments.at_least(args, "half-life")
    run = arguments.open_trained(args.a, "gradients", READS)
    flow = measure(run.metrics)
    if args.paper and flow.activation_norm is None:
        raise UserError(f"{args.a}: its metrics have no {PAPER_NEEDS!r}, which --paper needs; train it again to log it")
    tables = run.tables()
    rows, width = tables.input.shape
    curves = {"output_share": flow.output_share, "cosine": flow.cosine}
    curves |= {f"{role}_norm": getattr(flow, f"{role}_norm") for role in ROLES}
    if flow.activation_norm is not None:
        curves["activation_norm"] = flow.activation_norm
        shares = output_share(np.array(flow.activation_norm), np.array(flow.output_norm))
        curves["paper_output_share"] = shares.tolist()
    result = arguments.run_result(args, run, arguments.described_roles(args.a, distinct(tables)), rows, width) | {
        **to_plain(flow),
        "smoothed": {
            "half_life_steps": half_life,
            **{name: smooth(np.array(flow.steps), np.array(values), half_life) for name, values in curves.items()},
        },
        "output_share_balance": 0.5,
        "cosine_floor": 0.0,
        "paper": _paper(flow),
    }
    return result, _text(args, flow, rows, width)


def _paper(flow: GradientFlow) -> dict[str, Any]:
    """The paper's form per window, beside the value it published."""
    from tiedjax.analysis.basis import published
    from tiedjax.analysis.instruments.gradients.gradients import PAPER_NEEDS

    if flow.activation_norm is None:
        return {"not_measured": f"the run did not log {PAPER_NEEDS}"}
    windows = [
        {"first": w.first, "last": w.last, "output_share": w.paper_output_share, "published": _published(w)}
        for w in flow.windows
    ]
    return {"source": published.SOURCE, "windows": windows}


def _published(window: Window) -> float | None:
    from tiedjax.analysis.basis import published

    return published.OUTPUT_SHARE.get((window.first, window.last))


def _text(args: argparse.Namespace, flow: GradientFlow, rows: int, width: int) -> str:
    exact = [] if args.paper else [("output share", "output_share"), ("cosine", "cosine")]
    activations = [("paper's form", "paper_output_share"), ("activation/exact", "activation_ratio")]
    columns = [*exact, *(activations if flow.activation_norm is not None else [])]
    windows = [*flow.windows, flow.overall]
    published = [*(_published(w) for w in flow.windows), None]
    table = arguments.text_table(
        ["steps", "logged", *(head for head, _ in columns), "published"],
        [
            [f"{w.first}-{w.last}", w.logged_steps, *(getattr(w, name) for _, name in columns), value]
            for w, value in zip(windows, published, strict=True)
        ],
    )
    lines = [
        f"{args.a}: role gradients of the [{rows}, {width}] table, share of L2 norms output / (input + output)",
        table,
        "a share of 0.5 is balance; the cosine between unrelated gradients is 0; "
        "published: arXiv 2603.26663, tied OLMo-1B, in the paper's form",
    ]
    if flow.activation_norm is None:
        lines.append("the paper's form is not measured: this run did not log activation_grad_norm")
    else:
        lines.append(
            "paper's form: the input norm is of the gradient of the looked-up vectors [B, T, D]; "
            "activation/exact: that norm over the [V, D] one"
        )
    return "\n".join(lines + _decile_lines(flow))


def _decile_lines(flow: GradientFlow) -> list[str]:
    if not flow.deciles:
        return []
    last = flow.deciles[-1]
    columns = zip(range(1, 11), last.input_norm, last.output_norm, last.output_share, strict=True)
    table = arguments.text_table(
        ["decile", "input norm", "output norm", "output share"], [list(row) for row in columns]
    )
    return [f"by token frequency at step {last.step} (decile 10: the most frequent tokens)", table]
