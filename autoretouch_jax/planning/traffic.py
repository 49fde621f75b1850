"""What the text of a compiled TPU program says of its cost: the bytes through memory, and XLA's estimate of its cycles.

XLA's own `bytes accessed` counts every operand and result of every operation. On a TPU most of them never leave the chip: XLA
keeps them in a fast memory of its own (VMEM, 128 MiB on v5e), and counts a transfer into it, and the operation that reads it
there, as if each went through the slow one. A step of `configs/retouch.py` on two images of 256² moves a tenth of that sum.

The text says where an array is: a layout with `S(1)` is on the chip.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple, TypeVar

# Bytes of an element, by XLA's name of its type.
BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2} | dict.fromkeys(
    ("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1
)
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
CONTROL = {"while", "conditional", "call"}  # these run other computations
NAMES_ONLY = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}  # nothing moves
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
PARTIAL = {"slice", "dynamic-slice"}  # these read as much as they return
TRANSFERS = {"copy-start": (1, 0), "slice-start": (0, 1)}  # the places of the source and of its copy in the result

Number = TypeVar("Number", int, float)


class Instruction(NamedTuple):
    """A line of a program: `name = type operation(operands), attributes`."""

    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    rest: str

    def sizes(self, whole: bool = False) -> list[int]:
        """The bytes of each array of the result that are in the slow memory; `whole`: wherever they are."""
        arrays = [found for found in ARRAY.findall(self.type) if found[0] in BYTES]
        return [array_bytes(dtype, sides) if whole or "S(1)" not in layout else 0 for dtype, sides, layout in arrays]

    def called(self, attribute: str) -> str:
        """The name of the computation that an attribute names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        assert found, f"{self.name}: no {attribute}"
        return found[1]


def array_bytes(dtype: str, sides: str) -> int:
    """The bytes of an array from XLA's names: `bf16` and `2,256,256,3`."""
    return BYTES[dtype] * math.prod(int(side) for side in sides.split(",") if side)


def bytes_through_memory(text: str) -> float:
    """Returns the bytes that a compiled module reads from the slow memory and writes to it. A loop's body counts per pass.

    What a fusion reads through slices alone counts as these slices. Padding to the hardware's tiles is not counted.
    """
    computations, entry = _computations(text)

    def moved(name: str) -> float:
        sizes: dict[str, int] = {}
        total = 0.0
        for line in computations[name]:
            sizes[line.name] = sum(line.sizes())
            if line.operation not in NAMES_ONLY and not line.operation.endswith("-done"):  # the start of it was counted
                total += _moved_by(line, sizes, moved, computations)
        return total

    return moved(entry)


def estimated_cycles(text: str) -> int:
    """Returns the sum of the cycles that XLA expects of a compiled module's operations; 0 where it says nothing.

    XLA places and fuses operations by this estimate. It has none of transfers beside the operations, and none of collectives.
    """
    computations, entry = _computations(text)

    def expected(name: str) -> int:
        total = 0
        for line in computations[name]:
            if found := CYCLES.search(line.rest):
                total += int(found[1])
            elif line.operation in CONTROL:
                total += _by_control(line, expected)
        return total

    return expected(entry)


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the instructions of every computation by its name, and the name of the one that the program starts with."""
    found: dict[str, list[Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            current = head[2]
            found[current] = []
            entry = current if head[1] else entry
        elif current and (parts := INSTRUCTION.match(line)):
            name, kind, operation, rest = parts.groups()
            found[current].append(Instruction(name, kind, operation, tuple(re.findall(r"%([\w.\-]+)", _inside(rest))), rest))
    return found, entry


def _inside(rest: str) -> str:
    """What stands before the parenthesis that ends the operands."""
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return rest[:place]
    return rest


def _moved_by(
    line: Instruction, sizes: dict[str, int], moved: Callable[[str], float], computations: dict[str, list[Instruction]]
) -> float:
    """The bytes that one instruction moves. `sizes` has those of the arrays before it."""
    if line.operation in CONTROL:
        return _by_control(line, moved)
    if line.operation in TRANSFERS:
        source, copy = TRANSFERS[line.operation]
        slow = line.sizes()
        # A slice of the source is as large as its copy.
        return slow[copy] + min(slow[source], line.sizes(whole=True)[copy])
    own = sum(line.sizes())
    most = _read_by_slices(computations[line.called("calls")]) if line.operation == "fusion" else {}
    if line.operation in PARTIAL:
        most = {0: sum(line.sizes(whole=True))}
    return own + sum(min(sizes.get(name, 0), most.get(place, sizes.get(name, 0))) for place, name in enumerate(line.operands))


def _by_control(line: Instruction, cost: Callable[[str], Number]) -> Number:
    """What a loop, a condition or a call costs, from the cost of a computation by its name."""
    if line.operation == "while":
        passes = re.search(r'"known_trip_count":\{"n":"(\d+)"', line.rest)
        return (int(passes[1]) if passes else 1) * (cost(line.called("body")) + cost(line.called("condition")))
    if line.operation == "conditional":
        branches = re.search(r"branch_computations=\{(.*?)\}", line.rest)
        names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
        return max(cost(name) for name in names or [line.called("true_computation"), line.called("false_computation")])
    return cost(line.called("to_apply"))


def _read_by_slices(body: list[Instruction]) -> dict[int, int]:
    """The bytes that a fusion reads of each of those operands that it reads through slices alone, by their place."""
    most = {}
    for line in body:
        if line.operation == "parameter":
            readers = [other for other in body if line.name in other.operands]
            if readers and all(reader.operation in PARTIAL and reader.operands[0] == line.name for reader in readers):
                most[int(line.rest.split(")")[0])] = sum(sum(reader.sizes(whole=True)) for reader in readers)
    return most
