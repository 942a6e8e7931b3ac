"""Read a compiled program in XLA's text: what runs, on what, and where it came from."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

FILE = "program.hlo"  # in the folder of a case's dumps
_ARRAY = re.compile(
    r"\b(?P<dtype>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<shape>[\d,]*)\]"
    r"(?:\{(?P<layout>[^}]*)\})?"
)
_COMPUTATION = re.compile(r"^(ENTRY )?%([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][a-z0-9-]*)\(")
_OPERAND = re.compile(r"%([^\s,()]+)")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%([^\s,}]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BYTES = re.compile(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_DONATED = re.compile(r"input_output_alias=\{(.*?)\}, [a-z_]+=")
# They issue nothing of their own: names, views, and the ends of what was begun.
_IDLE = frozenset(
    (
        *("parameter", "constant", "bitcast", "tuple", "get-tuple-element"),
        *("after-all", "opt-barrier"),
    )
)
# Custom calls of the same kind: the memory of an array that is not filled.
_IDLE_TARGETS = ("PrepareAsync", "AllocateBuffer")


@dataclass(frozen=True, slots=True)
class Array:
    """An array of the program."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int  # with the padding of its layout
    in_hbm: bool

    @property
    def size(self) -> int:
        """Returns the number of its elements."""
        return prod(self.shape)

    def like(self, other: "Array") -> bool:
        """Says whether it has the elements of another one, wherever they are."""
        return (self.dtype, self.size) == (other.dtype, other.size)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One operation."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    scope: str  # where it was traced: names with slashes between them
    called: tuple[str, ...]  # computations
    target: str  # of a custom call
    trips: int  # of a loop; 1 where nobody knows
    estimate: int | None  # bytes that a custom call says it moves
    on_sparsecore: bool
    text: str

    @property
    def is_kernel(self) -> bool:
        """Says whether it is a Pallas kernel, or begins a call on the SparseCores."""
        starts = self.opcode.endswith("-start") and self.on_sparsecore
        return starts or (self.opcode, self.target) == (
            "custom-call",
            "tpu_custom_call",
        )


@dataclass(frozen=True)
class Module:
    """A compiled program: its computations, each a list of instructions by name."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str
    donated: tuple[int, ...] = field(default=())  # numbers of parameters

    def executed(self, computation: str | None = None) -> Iterator[tuple[str, Any]]:
        """Yields `(computation, instruction)` of all that is issued, loops unrolled.

        Of a conditional, the longest branch.
        """
        name = computation or self.entry
        for each in self.computations[name].values():
            if each.opcode.endswith("-done") or each.opcode in _IDLE:
                continue
            if each.target.startswith(_IDLE_TARGETS):
                continue
            if each.opcode in ("while", "call"):
                for called in each.called * each.trips:
                    yield from self.executed(called)
            elif each.opcode == "conditional":
                longest = max(each.called, key=lambda c: len(self.computations[c]))
                yield from self.executed(longest)
            else:
                yield name, each

    @cached_property
    def tables(self) -> frozenset[tuple[str, int]]:
        """Returns dtype and size of each donated array: it is updated in place."""
        of_entry = self.computations[self.entry].values()
        found = set()
        for each in of_entry:
            number = re.search(r" parameter\((\d+)\)", each.text)
            if number and int(number[1]) in self.donated:
                found |= {(array.dtype, array.size) for array in each.results}
        return frozenset(found)

    def arrays(self, computation: str, names: tuple[str, ...]) -> Iterator[Array]:
        """Yields the arrays of those instructions of a computation."""
        for name in names:
            if name in self.computations[computation]:
                yield from self.computations[computation][name].results

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """Yields the instruction and those of what it calls."""
        yield instruction
        for name in instruction.called:
            for each in self.computations.get(name, {}).values():
                yield from self.inside(each)

    def bytes_moved(self, computation: str, instruction: Instruction) -> int:
        """Returns the bytes that an operation moves between HBM and the chip, at least.

        What a kernel says of itself; otherwise its operands and results in HBM, each
        once. A gather reads of each operand no more than it returns. Of an array that
        is updated in place, only what is put into it counts.
        """
        for each in self.inside(instruction):
            if each.estimate is not None:
                return each.estimate
        if instruction.opcode in ("copy-start", "slice-start"):
            # Source and target, in some order; only as much as the smaller one moves.
            ends = instruction.results[:2]
            least = min(array.bytes for array in ends)
            return least * sum(array.in_hbm for array in ends)
        operands = list(self.arrays(computation, instruction.operands))
        out = list(instruction.results)
        for updated, part in self.updates(computation, instruction):
            out = [part if array.like(updated) else array for array in out]
            kept = next((array for array in operands if array.like(updated)), None)
            if kept is not None:
                operands.remove(kept)
        written = sum(array.bytes for array in out if array.in_hbm)
        most = None
        parts = {each.opcode for each in self.inside(instruction)}
        if parts & {"gather", "dynamic-slice", "slice"}:
            most = sum(array.bytes for array in out)
        read = sum(
            array.bytes if most is None else min(array.bytes, most)
            for array in operands
            if array.in_hbm
        )
        return read + written

    def updates(
        self, computation: str, instruction: Instruction
    ) -> Iterator[tuple[Array, Array]]:
        """Yields `(array, part)`: what it updates in place, and what is put there.

        The place of the part is that of the array.
        """
        if instruction.opcode == "dynamic-update-slice":
            (updated,) = instruction.results
            _, part, *_ = instruction.operands
            (array,) = self.computations[computation][part].results
            yield updated, replace(array, in_hbm=updated.in_hbm)
        for name in instruction.called:
            for each in self.computations.get(name, {}).values():
                yield from self.updates(name, each)

    def gathered_scalars(self, instruction: Instruction) -> int:
        """Returns how many single elements it gathers from arrays."""
        return sum(
            each.results[0].size
            for each in self.inside(instruction)
            if each.opcode == "gather"
            and re.search(r"slice_sizes=\{1(,1)*\}", each.text)
        )

    def occurrences(self, computation: str, instruction: Instruction) -> int:
        """Returns how many ids a kernel is given: the most integers in one operand.

        Tables are left out: packed ones are integers, too.
        """
        return max(
            (
                array.size
                for array in self.arrays(computation, instruction.operands)
                if array.dtype in ("s32", "u32")
                and (array.dtype, array.size) not in self.tables
            ),
            default=0,
        )

    def scope(self, computation: str, instruction: Instruction) -> str:
        """Returns where an operation came from; of a copy, where its readers did."""
        if instruction.scope:
            return instruction.scope
        own = self.computations[computation]
        return self._near(instruction, self._readers[computation]) or self._near(
            instruction,
            {
                name: [own[operand] for operand in each.operands if operand in own]
                for name, each in own.items()
            },
        )

    @staticmethod
    def _near(
        instruction: Instruction, next_to: Mapping[str, list[Instruction]]
    ) -> str:
        """Returns the first scope that is found, going from neighbour to neighbour."""
        seen, waiting = {instruction.name}, [instruction]
        while waiting:
            for each in next_to.get(waiting.pop(0).name, ()):
                if each.scope:
                    return each.scope
                if each.name not in seen:
                    seen.add(each.name)
                    waiting.append(each)
        return ""

    @cached_property
    def _readers(self) -> dict[str, dict[str, list[Instruction]]]:
        found: dict[str, dict[str, list[Instruction]]] = {}
        for name, instructions in self.computations.items():
            readers: dict[str, list[Instruction]] = {}
            for each in instructions.values():
                for operand in each.operands:
                    readers.setdefault(operand, []).append(each)
            found[name] = readers
        return found


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
        ValueError: it has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            current = computations.setdefault(begins[2], {})
            entry = begins[2] if begins[1] else entry
        elif found := _INSTRUCTION.match(line):
            current[found[1]] = _instruction(found[1], found[2])
    if not entry:
        raise ValueError("the program has no entry computation; is it XLA's text?")
    alias = _DONATED.search(text.partition("\n")[0])
    donated = re.findall(r": \((\d+),", alias[1]) if alias else []
    return Module(computations, entry, tuple(int(number) for number in donated))


def _instruction(name: str, text: str) -> Instruction:
    opcode = _OPCODE.search(text)
    if opcode is None:
        return Instruction(name, "", (), (), "", (), "", 1, None, False, text)
    inside, rest = _parenthesized(text, opcode.end())
    scope, trips = _SCOPE.search(rest), _TRIPS.search(rest)
    bytes_moved, target = _BYTES.search(rest), _TARGET.search(rest)
    branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
    called = _CALLED.findall(rest) + (_OPERAND.findall(branches[1]) if branches else [])
    return Instruction(
        name=name,
        opcode=opcode[1],
        results=arrays_of(text[: opcode.start()]),
        operands=tuple(_OPERAND.findall(inside)),
        scope=scope[1] if scope else "",
        called=tuple(called),
        target=target[1] if target else "",
        trips=int(trips[1]) if trips else 1,
        estimate=int(bytes_moved[1]) if bytes_moved else None,
        on_sparsecore='async_execution_thread="sparsecore"' in rest,
        text=text[: opcode.end()] + inside + ")" + rest[:400],
    )


def _parenthesized(text: str, start: int) -> tuple[str, str]:
    """Returns what stands before the parenthesis that closes, and what after it."""
    depth = 1
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return text[start:at], text[at + 1 :]
    return text[start:], ""


def arrays_of(types: str) -> tuple[Array, ...]:
    """Reads the arrays of a type: one, or those of a tuple."""
    found = []
    for match in _ARRAY.finditer(types):
        shape = tuple(int(size) for size in match["shape"].split(",") if size)
        layout = match["layout"] or ""
        bits = int(match["bits"] or 8)
        size = max(1, _padded(shape, layout) * bits // 8)
        found.append(Array(match["dtype"], shape, size, "S(" not in layout))
    return tuple(found)


def _padded(shape: tuple[int, ...], layout: str) -> int:
    """Returns how many elements an array has with the padding to its tiles."""
    order, _, rest = layout.partition(":")
    minor = [int(axis) for axis in order.split(",") if axis]
    tile = re.match(r"T\(([\d,]+)\)", rest)
    sizes = [shape[axis] for axis in minor]  # from minor to major
    if not minor:
        return prod(shape)
    for i, size in enumerate(reversed(tile[1].split(",") if tile else [])):
        if i < len(sizes):
            sizes[i] = -(-sizes[i] // int(size)) * int(size)
    return prod(sizes)
