"""Reading a program compiled for a GPU: its kernels, the work of each, and the part of the step that it belongs to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tiedjax.cost import hlo
from tiedjax.cost.hlo import Computation, Instruction

_ATTENTION = ("fmha", "sdpa", "cudnn::fusion", "dot_product_attention")  # in the names of cuDNN's
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "opt-barrier")
_ENTERED = ("while", "conditional", "call", "async-start")
_SLICES = ("dynamic-slice", "slice", "gather")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_DIMENSIONS = re.compile(r"\[([\d,]*)\]")


@dataclass(frozen=True)
class Kernel:
    """What one instruction of the program launches, and what it has to do each time.

    Attributes:
      name: of the instruction.
      part: one of those of `part_of`.
      times: how often it runs in a step.
      bytes: what it reads and writes, each array once; of an array that it cuts or updates in place, that part.
      flops: of its matrix products, in all.
      operands: the dtypes of its products' operands, such as ("bf16", "bf16"); empty without products.
      exponentials: of attention's softmax.
    """

    name: str
    part: str
    times: int
    bytes: int
    flops: int = 0
    operands: tuple[str, ...] = ()
    exponentials: int = 0


def kernels(text: str) -> list[Kernel]:
    """The kernels that one run of an HLO module launches on each device, collectives left out.

    A body of a loop counts as often as the loop runs (once where nobody says how often), each branch of a conditional
    as if it were taken.
    """
    program = hlo.Program.parse(text)
    return [
        _kernel(each, program)
        for each in program.executed(lambda instruction, _: instruction.opcode in _ENTERED)
        if each.instruction.opcode not in _FREE
        and not each.instruction.opcode.endswith(hlo.ENDS)
        and not hlo.is_collective(each.instruction)
    ]


def scope(instruction: Instruction | None) -> str:
    """Where in the program an instruction comes from: JAX's name of it; empty where it has none."""
    match = _SCOPE.search(instruction.attributes) if instruction else None
    return match[1] if match else ""


def part_of(where: str, name: str, product: bool) -> str:
    """The part of the step that a kernel belongs to: by its scope, its name, and whether it is a matrix product."""
    if any(word in f"{where} {name}" for word in _ATTENTION):
        return "attention"
    scopes = set(re.findall(r"\w+", where))
    if "loss" in scopes:
        return "products of the loss" if product else "elementwise of the loss"
    if "regularisers" in scopes:
        return "regularisers"
    if product:
        return "products of the body"
    if scopes & {"optimizer", "roles"}:
        return "optimizer and roles"
    if "lookup" in scopes:
        return "lookup"
    if "norm" in where:
        return "norms"
    if "mlp" in scopes:
        return "elementwise of the MLP"
    if "attention" in scopes:
        return "elementwise around attention"
    # A loop over layers cuts each layer's parameters out of stacks and puts what the backward pass needs into others.
    return "layer stacking" if {"Transformer", "while"} <= scopes else "other"


def _kernel(executed: hlo.Executed, program: hlo.Program) -> Kernel:
    instruction, around = executed.instruction, executed.computation
    products = list(_products(instruction, around, program))
    work = {
        "flops": sum(flops for flops, _ in products),
        "operands": products[0][1] if products else (),
    }
    where = scope(instruction) or next(_scopes_inside(instruction, program), "")
    target = _target(instruction, program)
    if "__cudnn$fmha" in target:
        flops, exponentials = _attention(instruction, around, backward="Backward" in target)
        operand = around[instruction.operands[0]].shape.partition("[")[0]
        work = {"flops": flops, "operands": (operand, operand), "exponentials": exponentials}
    part = part_of(where, target, bool(products))
    return Kernel(instruction.name, part, executed.times, _bytes(instruction, around, program), **work)  # type: ignore[arg-type]


def _inside(instruction: Instruction, program: hlo.Program) -> Iterator[tuple[Instruction, Computation]]:
    """Every instruction of a fusion, of the fusions in it too."""
    for inner in program.called(instruction):
        for each in inner.values():
            yield each, inner
            if each.opcode == "fusion":
                yield from _inside(each, program)


def _scopes_inside(instruction: Instruction, program: hlo.Program) -> Iterator[str]:
    return filter(None, (scope(each) for each, _ in _inside(instruction, program)))


def _custom_call(instruction: Instruction, program: hlo.Program) -> tuple[Instruction, str] | None:
    """The call of a library or of a kernel of our own that an instruction is or holds, and whom it calls."""
    for each in (instruction, *(each for each, _ in _inside(instruction, program))):
        if each.opcode == "custom-call" and (target := re.search(r'custom_call_target="([^"]*)"', each.attributes)):
            return each, target[1]
    return None


def _target(instruction: Instruction, program: hlo.Program) -> str:
    call = _custom_call(instruction, program)
    return call[1] if call else ""


def _products(
    instruction: Instruction, around: Computation, program: hlo.Program
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(FLOPs, dtypes of the operands) of the matrix products of an instruction."""
    for each, computation in ((instruction, around), *_inside(instruction, program)):
        operands = [computation[name].shape for name in each.operands]
        call = re.search(r'custom_call_target="(\S+?)"', each.attributes) if each.opcode == "custom-call" else None
        if each.opcode == "dot" or (call and call[1].startswith("__cublas")):
            contracted = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:]\s*[{\[]([\d",\s]*)', each.attributes)
            sizes = _sizes(operands[0])
            inner = math.prod(sizes[int(axis)] for axis in re.findall(r"\d+", contracted[1])) if contracted else 1
            yield 2 * math.prod(_sizes(each.shape)) * inner, _dtypes(operands[:2])
        elif call and call[1].startswith("mosaic_gpu") and not _all_in_place(each):
            # tiedjax.exp_product, the only one: states [C, D] and a table [V, D] to powers [C, V].
            (tokens, width), (rows, _) = _sizes(operands[0]), _sizes(operands[1])
            yield 2 * tokens * rows * width, _dtypes(operands[:2])


def _all_in_place(call: Instruction) -> bool:
    """Whether all results are operands: exp_product's second run, which ends at once where it has nothing to mend."""
    return "output_to_operand_aliasing=" in call.attributes


def _attention(instruction: Instruction, around: Computation, *, backward: bool) -> tuple[int, int]:
    """FLOPs and exponentials of cuDNN's attention: two products forward and five backward, over visible positions."""
    dimensions = re.search(r'"intermediate_tensor_shape".*?"dimensions":\s*\[([^\]]*)\]', instruction.attributes)
    scores = math.prod(map(int, re.findall(r"\d+", dimensions[1]))) if dimensions else 0
    if "CAUSAL" in instruction.attributes:
        scores //= 2
    head_width = _sizes(around[instruction.operands[0]].shape)[-1]
    return 2 * (5 if backward else 2) * scores * head_width, scores


def _bytes(instruction: Instruction, around: Computation, program: hlo.Program) -> int:
    """What the kernel reads and writes at least."""
    call = _custom_call(instruction, program)
    if call and call[1].startswith("mosaic_gpu") and _all_in_place(call[0]):
        return 0
    inner = program.called(instruction)
    if instruction.opcode.removesuffix("-start") != "fusion" or call or not inner:
        shape = _result_of_start(instruction)
        return hlo.array_bytes(shape) + sum(hlo.array_bytes(around[name].shape) for name in instruction.operands)
    body = inner[0]
    written = sum(_written(each, body) for each in _results(body))
    return written + sum(_read(each, body) for each in body.values() if each.opcode == "parameter")


def _result_of_start(instruction: Instruction) -> str:
    """The shape of the result; a start's is (operands, results, more)."""
    return hlo.elements(instruction.shape)[1] if instruction.opcode.endswith("-start") else instruction.shape


def _results(body: Computation) -> list[Instruction]:
    root = next(each for each in body.values() if each.root)
    return [body[name] for name in root.operands] if root.opcode == "tuple" else [root]


def _written(result: Instruction, body: Computation) -> int:
    """Bytes of a result, or of the part that an update in place changes."""
    while result.opcode == "bitcast":
        result = body[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return hlo.array_bytes(body[result.operands[1]].shape)
    if result.opcode == "scatter":
        return 2 * hlo.array_bytes(body[result.operands[-1]].shape)  # what is there is read before it is added to
    return 0 if result.opcode == "parameter" else hlo.array_bytes(result.shape)


def _read(parameter: Instruction, body: Computation) -> int:
    """Bytes of a fusion's operand, or of the parts that it cuts out of it; 0 for one that it updates in place."""
    parts, names = 0, {parameter.name}
    for each in body.values():
        places = [place for place, name in enumerate(each.operands) if name in names]
        if not places:
            continue
        if each.opcode == "bitcast":
            names.add(each.name)
        elif each.opcode in _SLICES and places == [0]:
            parts += hlo.array_bytes(each.shape)
        elif each.opcode not in ("dynamic-update-slice", "scatter") or places != [0]:
            return hlo.array_bytes(parameter.shape)
    return parts


def _sizes(shape: str) -> list[int]:
    """The sizes of the first array in a shape's text."""
    match = _DIMENSIONS.search(shape)
    return [int(size) for size in match[1].split(",") if size] if match else []


def _dtypes(shapes: list[str]) -> tuple[str, ...]:
    return tuple(shape.lstrip("(").partition("[")[0] for shape in shapes)
