"""Read a SparseCore dump: the program that each vector subcore runs.

Unlike the TensorCore's, this text is assembly: labels, physical registers, delays that
stand as instructions of their own. The program of the scalar sequencer, which only
starts the subcores, is left out.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil

from benchmarks.static.bundles import Bundle, BundledKernel, Operation, Span, assemble

# The kernel ends where the code begins that would replace it by the next one.
_PROGRAM = re.compile(
    r"^tec$(.*?)(?=^(?:scs|tec|tac|_tile_overlayer\w*:)$|\Z)", re.M | re.S
)
_BUNDLE = re.compile(r"^0x([0-9a-f]+): \{(.*?)\}", re.M | re.S)
_LABEL = re.compile(r"^(\.\w+):$", re.M)
_OPERATION = re.compile(r"\s*(\S.*?)\s*=\s+([a-z][\w.]*)\s*(.*)", re.S)
_BRANCH = re.compile(r"(?:@(!?)(p\d+)\s+)?(\.\w+)-\.\w+(?:, \$(\d+))?")
_DELAY = re.compile(r"\$0x([0-9a-f]+)")
_TILE_ADDRESS = re.compile(r"\[tilespmem:\$0x([0-9A-Fa-f]+)\]")
_IMMEDIATE = re.compile(r"\$0x([0-9A-Fa-f]+)$")


def parse_subcore(
    text: str, *, name: str, delay_slots: int | None
) -> BundledKernel | None:
    """The kernel in a `*_bundles.txt` file; None if it has no subcore program.

    `delay_slots` stands in where the branches do not print theirs.
    """
    section = _PROGRAM.search(text)
    if section is None:
        return None
    bundles, labels = _bundles(section[1])
    if not bundles:
        raise ValueError(f"{name}: no bundles found; has the format changed?")
    last = len(bundles) - 1
    loops: dict[int, Span] = {}
    skipped: list[Span] = []
    for position, bundle in enumerate(bundles):
        for op in bundle.operations:
            branch = _BRANCH.search(op.text) if op.name == "sbr.rel" else None
            if branch is None:
                continue
            slots = int(branch[4]) if branch[4] else delay_slots
            if slots is None:
                raise ValueError(f"{name}: a branch does not print its delay slots")
            to, leaves = labels[branch[3]], min(position + slots, last)
            if to > position:
                skipped.append(Span(leaves + 1, to - 1))
            elif to not in loops or loops[to].last < leaves:
                trips = (
                    None if branch[1] else _trip_count(bundles, to, leaves, branch[2])
                )
                loops[to] = Span(to, leaves, trips)
    addresses = [int(word, 16) for word in _TILE_ADDRESS.findall(section[1])]
    kernel = assemble(name, "subcore", bundles, list(loops.values()), skipped)
    return replace(kernel, tile_memory=4 * max(addresses, default=0))


def _bundles(section: str) -> tuple[list[Bundle], dict[str, int]]:
    """The bundles up to the next overlay, and the position that each label names."""
    bundles: list[Bundle] = []
    starts: list[int] = []
    for match in _BUNDLE.finditer(section):
        address = int(match[1], 16)
        if bundles and address <= bundles[-1].address:
            break
        operations = tuple(_operations(match[2]))
        stalls = sum(
            int(found[1], 16)
            for op in operations
            if op.name == "sdelay" and (found := _DELAY.search(op.text))
        )
        real = tuple(op for op in operations if op.name not in ("sdelay", "snop"))
        bundles.append(Bundle(address, real, stalls=stalls))
        starts.append(match.start())
    labels = {
        match[1]: sum(start < match.start() for start in starts)
        for match in _LABEL.finditer(section)
    }
    return bundles, labels


def _operations(body: str) -> Iterator[Operation]:
    for part in body.split(";"):
        found = _OPERATION.match(part)
        if found is None:
            continue
        result, name, text = found[1], found[2], " ".join(found[3].split())
        if name == "vst" and text == "v63":
            continue  # accompanies a stream and stores nothing
        if name == "vpop" and text == "(erf)":
            name = "vpop.eup"
        yield Operation(result, name, text)


def _trip_count(
    bundles: Sequence[Bundle], first: int, last: int, predicate: str | None
) -> int | None:
    """How often a counted loop runs: `while counter != limit: counter += step`."""
    test = _last_write(bundles, predicate or "", first, last)
    if test is None or test[1].name != "sne.s32":
        return None
    counter, _, limit_text = test[1].text.partition(", ")
    adds = _last_write(bundles, counter, first, last)
    start = _last_write(bundles, counter, 0, first - 1)
    if adds is None or start is None or not adds[1].text.endswith(f", {counter}"):
        return None
    step = _immediate(adds[1].text.partition(", ")[0])
    begin, limit = _immediate(start[1].text), _immediate(limit_text)
    constants = adds[1].name == "sadd.s32" and start[1].name == "simm.s32"
    if not constants or step is None or begin is None or limit is None or step <= 0:
        return None
    # A bundle reads before it writes: a test not after the step sees the old counter.
    trips = ceil((limit - begin) / step) + (test[0] <= adds[0])
    return trips if trips > 0 else None


def _last_write(
    bundles: Sequence[Bundle], register: str, first: int, last: int
) -> tuple[int, Operation] | None:
    for position in range(last, first - 1, -1):
        for op in bundles[position].operations:
            if op.result == register:
                return position, op
    return None


def _immediate(text: str) -> int | None:
    found = _IMMEDIATE.match(text)
    value = int(found[1], 16) if found else None
    return value - (1 << 32) if value is not None and value >= 1 << 31 else value
