"""Reading a compiled program's HLO text: what runs how often, and the bytes that its collectives move."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast")

_HEADER = re.compile(r"(ENTRY )?%(\S+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = (.*)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|body|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%\S+)")
_NAME = re.compile(r"%([^\s,(){}]+)")
ENDS = ("-done", "-update")  # they name again what their start runs
_UNCHANGED = ("copy", "bitcast", "convert", "copy-start", "copy-done", "reshape", "opt-barrier", "optimization-barrier")


@dataclass(frozen=True)
class Instruction:
    """One line of HLO: what it computes, its shape as text, the names it reads, and what stands after them."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    text: str
    root: bool


Computation = dict[str, Instruction]


@dataclass
class Traffic:
    """What one kind of collective does in a step, on one device: how many run, and their bytes.

    Of those bytes, `asynchronous_bytes` move while the device computes and `between_slices_bytes` among devices of
    several slices.
    """

    count: int = 0
    bytes: int = 0
    asynchronous_bytes: int = 0
    between_slices_bytes: int = 0


@dataclass
class Collectives:
    """The collectives of a program by kind, and the loops of unknown length, whose bodies were counted once."""

    kinds: dict[str, Traffic] = field(default_factory=dict)
    unknown_loops: list[str] = field(default_factory=list)


def array_bytes(shape: str) -> int:
    """Bytes of the arrays in a shape's text, layouts and their padding left out: 'bf16[8,128]{1,0}' is 2048."""
    return sum(
        math.ceil(_bits(dtype) * math.prod(int(n) for n in sizes.split(",") if n) / 8)
        for dtype, sizes in _ARRAY.findall(shape)
    )


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0


@dataclass(frozen=True)
class Executed:
    """An instruction, the computation that holds it, and how often one run of the program executes it.

    `unknown_loops` are those of unknown length around it, whose bodies count once; `asynchronous` says whether other
    instructions run at the same time.
    """

    instruction: Instruction
    computation: Computation
    times: int = 1
    unknown_loops: tuple[str, ...] = ()
    asynchronous: bool = False


@dataclass(frozen=True)
class Program:
    """Every computation of an HLO module by name, and the name of the entry."""

    computations: dict[str, Computation]
    entry: str

    @classmethod
    def parse(cls, text: str) -> Program:
        """The program of this text; raises ValueError if it has no entry."""
        computations: dict[str, Computation] = {}
        entry, current = None, Computation()
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = computations[header[2]] = {}
                entry = header[2] if header[1] else entry
            elif match := _INSTRUCTION.match(line):
                instruction = _instruction(match[2], match[3], bool(match[1]))
                current[instruction.name] = instruction
        if entry is None:
            raise ValueError("the HLO text has no ENTRY computation")
        return cls(computations, entry)

    def called(self, instruction: Instruction) -> list[Computation]:
        """The computations that an instruction runs."""
        if instruction.opcode.endswith(ENDS):
            return []
        names = (name for _, listed in _CALLED.findall(instruction.attributes) for name in _NAME.findall(listed))
        return [self.computations[name] for name in names if name in self.computations]

    def executed(self, enters: Callable[[Instruction, Computation], bool]) -> Iterator[Executed]:
        """The instructions that run; what those call in their place, where `enters` says so.

        A body of a loop counts as often as the loop runs, each branch of a conditional as if it were taken.
        """
        for instruction in self.computations[self.entry].values():
            yield from self._executed(Executed(instruction, self.computations[self.entry]), enters)

    def _executed(self, whole: Executed, enters: Callable[[Instruction, Computation], bool]) -> Iterator[Executed]:
        instruction, computation = whole.instruction, whole.computation
        asynchronous = whole.asynchronous or _is_start(instruction)
        inner = self.called(instruction) if enters(instruction, computation) else []
        if not inner:
            yield dataclasses.replace(whole, asynchronous=asynchronous)
            return
        times, unknown = whole.times, whole.unknown_loops
        if instruction.opcode == "while":
            rounds = trip_count(instruction, computation, self.computations)
            times *= 1 if rounds is None else rounds
            unknown += (instruction.name,) if rounds is None else ()
        for body in inner:
            for each in body.values():
                yield from self._executed(Executed(each, body, times, unknown, asynchronous), enters)


def _is_start(instruction: Instruction) -> bool:
    """Whether what it begins runs beside others; XLA:GPU marks the starts that do not."""
    return instruction.opcode.endswith("-start") and '"is_sync":true' not in instruction.attributes


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    shape = rest[: _closing(rest, 0)] if rest.startswith("(") else rest.split(" ", 1)[0]
    opcode, _, _ = rest[len(shape) + 1 :].partition("(")
    begin = len(shape) + 1 + len(opcode)
    end = _closing(rest, begin)
    operands = rest[begin + 1 : end - 1]
    return Instruction(name, shape, opcode, tuple(_NAME.findall(operands)), rest[end:], operands, root)


def _closing(text: str, begin: int) -> int:
    """The place after the parenthesis that closes the one at `begin`."""
    depth = 0
    for place in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    return len(text)


def collectives(text: str, slice_size: int | None = None) -> Collectives:
    """The collectives that one run of an HLO module executes on each device.

    A body of a loop counts as often as the loop runs, each branch of a conditional as if it were taken, an asynchronous
    collective once, at its start. Bytes are what a device of a long ring sends: the result of an all-gather, twice the
    operands of an all-reduce (it is a reduce-scatter and an all-gather), the operands of the others; n devices send
    (n - 1)/n of it. A TPU's reduce-scatter is an all-reduce fused with the slice that keeps a device's own part, and
    what crosses its slices is sent by the host. `slice_size` is the devices of a slice, where there are several.
    """
    total = Collectives()
    for each in Program.parse(text).executed(lambda *found: _kind(*found) is None):
        kind = _kind(each.instruction, each.computation)
        if kind is None:
            continue
        traffic = total.kinds.setdefault(kind, Traffic())
        sent = each.times * _moved(kind, each.instruction, each.computation)
        by_host = each.instruction.opcode == "send"
        traffic.count += each.times
        traffic.bytes += sent
        traffic.asynchronous_bytes += sent * (each.asynchronous or by_host)
        traffic.between_slices_bytes += sent * (by_host or _crosses(each.instruction, slice_size))
        total.unknown_loops += [loop for loop in each.unknown_loops if loop not in total.unknown_loops]
    return total


def _crosses(instruction: Instruction, slice_size: int | None) -> bool:
    """Whether some of the devices that a collective joins are of several slices."""
    if slice_size is None:
        return False
    groups = device_groups(instruction.attributes)
    return any(len({device // slice_size for device in group}) > 1 for group in groups)


def device_groups(attributes: str) -> list[list[int]]:
    """The groups of devices that a collective joins; empty where they are not told, or are all devices."""
    # mesh['a'=2,'b'=4] {'a'}: along these axes of a mesh of numbers in order.
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        along = [list(sizes).index(axis) for axis in re.findall(r"'(\w+)'", named[2])]
        numbered = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        last = np.moveaxis(numbered, along, range(-len(along), 0))
        joined: list[list[int]] = last.reshape(-1, math.prod(last.shape[-len(along) :])).tolist()
        return joined
    # {{0,1},{2,3}}, or [2,2]<=[4], or [2,2]<=[2,2]T(1,0): numbers in order, laid out and turned.
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", attributes):
        return [[int(device) for device in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    regular = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if regular is None:
        return []
    shape, laid_out, turned = ([int(n) for n in part.split(",")] if part else None for part in regular.groups())
    devices = np.arange(math.prod(laid_out or [])).reshape(laid_out or [])
    grouped: list[list[int]] = (devices.transpose(turned) if turned else devices).reshape(shape or []).tolist()
    return grouped


def is_collective(instruction: Instruction) -> bool:
    """Whether it sends something to other devices."""
    return _plain_kind(instruction) in KINDS


def _plain_kind(instruction: Instruction) -> str:
    if instruction.opcode == "send" and (sent := re.search(r'megascale_transfer_type="(\w+)"', instruction.attributes)):
        return sent[1].lower().replace("_", "-")
    return instruction.opcode.removesuffix("-start").removeprefix("ragged-")


def _kind(instruction: Instruction, computation: Computation) -> str | None:
    kind = _plain_kind(instruction)
    if kind not in KINDS:
        return None
    if kind == "all-reduce":
        root = next(instruction for instruction in computation.values() if instruction.root)
        if root.opcode == "dynamic-slice" and instruction.name in root.operands:
            return "reduce-scatter"
    return kind


def _moved(kind: str, instruction: Instruction, computation: Computation) -> int:
    operands = sum(array_bytes(computation[name].shape) for name in instruction.operands if name in computation)
    if kind != "all-gather":
        return 2 * operands if kind == "all-reduce" else operands
    # A start has the shape (operands, results, more).
    return array_bytes(elements(instruction.shape)[1] if instruction.opcode.endswith("-start") else instruction.shape)


def elements(shape: str) -> list[str]:
    """The elements of a tuple's shape, which may be tuples themselves."""
    elements, depth = [""], 0
    for char in shape[1:-1]:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(char, 0)
        if char == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += char
    return elements


def trip_count(loop: Instruction, around: Computation, computations: dict[str, Computation]) -> int | None:
    """How often a `while` runs: as XLA annotated it, else from its counter; None if neither tells.

    A counter is an element of the loop's tuple that starts at a constant, to which the body adds a constant, and which
    the condition compares with a constant.
    """
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(noted[1])
    part = {key: computations[name] for key, name in re.findall(r"\b(condition|body)=%([^\s,]+)", loop.attributes)}
    test = _root(part["condition"])
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter = part["condition"][test.operands[0]]
    index = _tuple_index(counter)
    limit = _constant(test.operands[1], part["condition"])
    if index is None or limit is None:
        return None
    start = _constant(around[loop.operands[0]].operands[index], around)
    step = _increment(_root(part["body"]).operands[index], index, part["body"])
    if start is None or not step:
        return None
    return max(0, math.ceil((limit - start) / step))


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.root)


def _origin(name: str, computation: Computation) -> Instruction:
    """The instruction behind copies and conversions."""
    instruction = computation[name]
    while instruction.opcode in _UNCHANGED:
        instruction = computation[instruction.operands[0]]
    return instruction


def _constant(name: str, computation: Computation) -> int | None:
    origin = _origin(name, computation)
    return int(origin.text) if origin.opcode == "constant" and re.fullmatch(r"-?\d+", origin.text) else None


def _tuple_index(instruction: Instruction) -> int | None:
    index = re.search(r"\bindex=(\d+)", instruction.attributes)
    return int(index[1]) if instruction.opcode == "get-tuple-element" and index else None


def _increment(name: str, index: int, body: Computation) -> int | None:
    """The constant that the body adds to element `index` of its tuple."""
    addition = _origin(name, body)
    if addition.opcode != "add" or len(addition.operands) != 2:
        return None
    first, second = addition.operands
    for counter, by in ((first, second), (second, first)):
        if _tuple_index(_origin(counter, body)) == index:
            return _constant(by, body)
    return None
