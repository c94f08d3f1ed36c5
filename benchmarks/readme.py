"""Writes README.md's blocks of numbers from saved results, the quick study's and the costs: none is typed by hand.

python benchmarks/readme.py studies/quick --machine "2-core x86-64 virtual machine"   # after `tiedjax study`
python benchmarks/readme.py                                                           # again, from what was saved
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from tiedjax.analysis.study import words

ROOT = Path(__file__).parent.parent
SAVED = ROOT / "benchmarks" / "results" / "quick_study.json"
PICTURE = ROOT / "docs" / "quick_study.png"


def save(study: Path, machine: str) -> None:
    """Keeps of a study what README shows, and the picture."""
    results = json.loads((study / "results.json").read_text(encoding="utf-8"))
    kept = {name: results[name] for name in ("statements", "headline", "runs", "environment")}
    kept |= {"answer": words.answer(results), "columns": words.arm_columns(results), "arms": words.arm_rows(results)}
    kept["environment"]["machine"] = machine
    SAVED.parent.mkdir(parents=True, exist_ok=True)
    SAVED.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    PICTURE.parent.mkdir(exist_ok=True)
    shutil.copyfile(study / "figures" / "nearness.png", PICTURE)


def answer(results: dict[str, Any]) -> str:
    """The verdict in one sentence, and the picture."""
    caption = "Nearness of the shared tables to the input and the output table of their untied twins"
    return f"**{results['answer'][0]}**\n\n![{caption}]({PICTURE.relative_to(ROOT)})\n"


def findings(results: dict[str, Any]) -> str:
    """The table of arms, the other findings, how sure they are, and what the study was."""
    environment = results["environment"]
    packages = environment["packages"]
    made = (
        f"{len(results['runs'])} runs trained and analysed in {environment['study_seconds'] / 60:.1f} minutes on a "
        f"{environment['machine']} ({environment['date']}, Python {environment['python']}, jax {packages['jax']}, "
        f"flax {packages['flax']})"
    )
    row = lambda cells: f"| {' | '.join(cells)} |"
    lines = [
        row(results["columns"].values()),
        row("---" for _ in results["columns"]),
        *(row(cells.values()) for cells in results["arms"]),
        "",
        *(f"* {finding}" for finding in results["answer"][1:]),
        "",
        "Nearness has token frequency controlled: 0 is chance, 1 the same table up to a rotation. Output shares are "
        "taken before any scaling.",
        " ".join(filter(None, [words.certainty(results), words.near_edge(results)])),
        f"The quick study: {made}.",
    ]
    return "\n".join(lines) + "\n"


def costs() -> str:
    """What the benchmarks found, a line each."""
    read = lambda name: json.loads((SAVED.parent / f"{name}.json").read_text(encoding="utf-8"))
    steps, loss, data, compiled = (read(name) for name in ("step_cpu", "loss_cpu", "data", "compile"))
    span = lambda q, digits=2: f"{q['median']:.{digits}f} ({q['p10']:.{digits}f} to {q['p90']:.{digits}f})"
    lines = []
    for name, step in steps.items():
        sides = step["sides"]
        own = span({q: 1e3 * value for q, value in sides["tiedjax"]["step_seconds"].items()}, 1)
        others = ", ".join(
            f"{span(sides[side]['over_tiedjax'])} times that {words}"
            for side, words in [("torch_eager", "in PyTorch eager with hooks"), ("torch_compiled", "compiled")]
            if side in sides
        )
        roles = f"; without the role split and its metrics {span(sides['without_roles']['over_tiedjax'])}"
        lines.append(f"* A step of `{name}.yaml`, role metrics on: {own} ms; {others}{roles}.")
    memory = loss["memory"]
    lines.append(
        f"* The loss with its gradients at {memory['tokens']:,} tokens, V = {memory['rows']:,}, D = {memory['width']}: "
        f"{memory['ratio']:.1%} of the plain one's temporary memory."
    )
    for timing in loss["time"]:
        shape = f"{timing['tokens']:,} tokens, V = {timing['rows']:,}, D = {timing['width']}"
        lines.append(f"  At {shape} it takes {span(timing['ratio'])} of its time.")
    rate = lambda rates: f"{rates['tokens_per_second'] / 1e6:.2f}"
    prepared = ", ".join(f"{rate(each)} ({each['source']}, V = {each['vocab_size']:,})" for each in data["preparation"])
    batches = ", ".join(f"{rate(each)} (T = {each['seq_len']:,})" for each in data["batches"])
    lines.append(f"* Millions of tokens per second prepared: {prepared}; read in batches: {batches}.")
    lines.append(f"* Above: {steps['quick']['environment']['machine']}, medians with 10 % and 90 % quantiles.")
    for name, cost in compiled.items():
        gib = lambda count: f"{count / 2**30:.1f} GiB"
        mesh = " x ".join(f"{axis} {size}" for axis, size in cost["mesh"].items() if size > 1)
        lines.append(
            f"* Compiled for {name} ({cost['topology']}, {mesh}; static estimates, nothing was run): "
            f"{gib(cost['temp_bytes'])} temporary, {gib(cost['needed_bytes'])} in all of {gib(cost['hbm_bytes'])} "
            f"per chip; {cost['sent_over_count_by_hand']:.2f} of the bytes that a count by hand asks to be sent."
        )
    return "\n".join(lines) + "\n"


def gpu_costs() -> str:
    """What `gpu.py` found on each card, a line each; a part that was not run has none."""
    span = lambda q, digits: f"{q['median']:.{digits}f} ({q['p10']:.{digits}f} to {q['p90']:.{digits}f})"
    lines = []
    for path in sorted(SAVED.parent.glob("gpu_*.json")):
        parts = json.loads(path.read_text(encoding="utf-8"))
        environment = next(iter(parts.values()))["environment"]
        versions, card = environment["versions"], environment["device"]["kind"]
        made = f"{environment['date']}, Python {versions['python']}, jax {versions['jax']}, flax {versions['flax']}"
        lines.append(f"On one {card} ({made}):\n")
        right, roles, resumed = (parts.get(name) for name in ("correctness", "gradients", "resume"))
        if right:
            apart = " and ".join(
                f"{right[dtype]['largest_difference']:.1e} in {dtype}" for dtype in ("float32", "bfloat16")
            )
            lines.append(
                f"* {right['steps']} losses of `tiny.yaml` differ from the CPU's float32 by at most {apart}, in nats."
            )
        if roles:
            apart = " and ".join(
                f"{max(roles[dtype]['input'], roles[dtype]['output']):.1e} in {dtype}"
                for dtype in ("float32", "bfloat16")
            )
            lines.append(f"* Both role gradients of one batch differ from float64's by at most {apart} of their norms.")
        if resumed:
            lines.append(
                f"* A run of {resumed['steps']} steps, interrupted and continued with `--model.table_gradient "
                "deterministic`: "
                + ", ".join(
                    f"{resumed[dtype]['equal_steps']} of {resumed[dtype]['steps']} steps equal bit for bit in {dtype}"
                    for dtype in ("float32", "bfloat16")
                )
                + "."
            )
        for name, each in parts.items():
            kind, _, model = name.partition(":")
            model, _, label = model.partition(", ")
            model = f"`{model}.yaml`" + (f" ({label})" if label else "")
            if kind == "step":
                config, milliseconds = each["config"], {q: 1e3 * value for q, value in each["step_seconds"].items()}
                lines.append(
                    f"* A step of {model}, T = {config['model']['seq_len']:,}, batch {config['data']['batch_size']}: "
                    f"{span(milliseconds, 1)} ms, {each['tokens_per_second']:,.0f} tokens per second, MFU "
                    f"{each['mfu_causal']:.1%} ({each['mfu_full']:.1%} if all of attention is counted), "
                    f"{each['peak_memory_bytes'] / 1e9:.1f} GB; compiled in {each['compile_seconds']:.0f} s. "
                    + kernel_times(each["kernels"])
                )
            elif kind in ("torch", "roles"):
                for side, whose in (
                    (
                        "torch_compiled",
                        "In PyTorch {torch}, compiled (default mode; {loss}), both role gradients by hooks,",
                    ),
                    ("without_roles", "Without the role split and its metrics"),
                ):
                    if side in each["sides"]:
                        ratio, batch = each["sides"][side]["over_tiedjax"], each["config"]["data"]["batch_size"]
                        about = {"torch": each["environment"].get("pytorch", {}).get("torch")}
                        whose = whose.format(**about, loss=each["sides"][side].get("loss"))
                        lines.append(f"* {whose} a step of {model}, batch {batch}, takes {span(ratio, 2)} times ours.")
    return "\n".join(lines) + "\n"


def kernel_times(kernels: dict[str, Any]) -> str:
    """Where the time of a step goes, by kernels."""
    parts = ", ".join(f"{part} {value:.1f}" for part, value in kernels["by_part"].items() if value >= 0.05)
    return f"Of {kernels['step_milliseconds']:.1f} ms on the card: {parts}, no kernel {kernels['between_kernels']:.1f}."


def readme_with_blocks() -> str:
    """README.md as the saved results want it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    study = json.loads(SAVED.read_text(encoding="utf-8"))
    blocks = {"answer": answer(study), "quick study": findings(study), "costs": costs(), "GPU costs": gpu_costs()}
    for name, content in blocks.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, rest = text.split(begin)
        text = before + begin + content + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", type=Path, help="a finished quick study")
    parser.add_argument("--machine", help="what it ran on, in words")
    args = parser.parse_args()
    if args.study:
        if not args.machine:
            parser.error("--machine: say in words what the study ran on")
        save(args.study, args.machine)
    (ROOT / "README.md").write_text(readme_with_blocks(), encoding="utf-8")
