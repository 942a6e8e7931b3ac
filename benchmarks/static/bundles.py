"""Read the TensorCore's final bundles: which loops a kernel has, and what each issues.

A bundle is one VLIW instruction, at best one a cycle, so bundles are a lower bound on
cycles that needs no TPU. Everything is counted where it is issued: a loop's bundles and
counts leave out its inner loops, as a profiler's self time does, so that the sum over
the loops of a kernel is the kernel.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*((?:>\s*)*)\{", re.M)
_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_REGION = re.compile(r"(?:Start|Start/End empty) region (\d+)\b")
_SLOT = re.compile(r"\s*\{?\s*(%\w+)\s*=\s*([a-z][\w.]*)(.*)", re.S)
_TARGET = re.compile(r"target = \$region(\d+)")
_PREDICATE = re.compile(r"\((!?)(%\w+)\)")
_SPILL = re.compile(r"\[smem:\[(#\w+_spill)\]\]\s*(%\w+)?")
_GRANULES = re.compile(r"size_in_granules=\*/(\d+)")
_LOCATION = re.compile(r'loc\("([^"]+)":(\d+):')
_OPERAND = re.compile(r"%\w+|-?\b\d+\b")
# Slots by the beginning of an operation's name; the first that fits.
_SLOTS = (
    ("vld", "vld"),
    ("vst", "vst"),
    ("vpop.eup", "eup"),
    ("vmat", "mxu"),
    ("vpop.f32.mr", "mxu"),
    ("vrot", "xlu"),
    ("vxpose", "xlu"),
    ("vbcast.lane", "xlu"),
    ("vperm", "xlu"),
    ("vpop", ""),  # the other end of what has been counted
    ("vsync", ""),
    ("vpush", ""),
    ("vrsqrt", ""),
    ("vrcp", ""),
    ("vpow2", ""),
    ("vlog2", ""),
    ("vtanh", ""),
    ("v", "valu"),
    ("sld", "sld"),
    ("sst", "sst"),
    ("sync", ""),
    ("sbarrier", ""),
    ("shalt", ""),
    ("s", "salu"),
    ("p", "salu"),
)


@dataclass(frozen=True, slots=True)
class Counts:
    """What the bundles of one iteration issue."""

    dma: Mapping[str, int] = field(default_factory=dict)
    dma_granules: Mapping[str, int] = field(default_factory=dict)
    largest_dma: int = 0  # granules; only sizes that are known statically
    dma_sizes: Mapping[int, int] = field(default_factory=dict)  # DMAs by granules
    waits: int = 0
    sld: int = 0
    sst: int = 0
    salu: int = 0
    vld: int = 0
    vst: int = 0
    valu: int = 0
    xlu: int = 0  # across lanes
    eup: int = 0  # roots, reciprocals, exponentials
    mxu: int = 0
    spills: int = 0  # loads and stores of what found no register
    checks: int = 0  # shalt.err: bounds and semaphore checks

    @property
    def dmas(self) -> int:
        """In all directions."""
        return sum(self.dma.values())


@dataclass(frozen=True, slots=True)
class Loop:
    """One loop, without its inner loops; at depth 0, the code around them."""

    index: int
    parent: int | None
    depth: int
    start: int
    end: int
    bundles: int
    empty: int
    skippable: int  # bundles that a forward branch may jump over
    stalls: int  # cycles of explicit delay, besides the bundles
    trip_count: int | None
    innermost: bool
    counts: Counts
    source: str

    @property
    def cycles(self) -> int:
        """At least, for one iteration."""
        return self.bundles + self.stalls


@dataclass(frozen=True, slots=True)
class BundledKernel:
    """The program of one operation, on one engine."""

    name: str
    engine: str  # tensorcore or subcore
    loops: tuple[Loop, ...]
    tile_memory: int = 0  # bytes of a subcore's memory, up to the last known address

    @property
    def bundles(self) -> int:
        """The length of the program."""
        return sum(loop.bundles for loop in self.loops)

    @property
    def largest_dma(self) -> int:
        """In granules, of the DMAs whose size is static."""
        return max(loop.counts.largest_dma for loop in self.loops)


@dataclass(frozen=True, slots=True)
class Operation:
    """One slot of a bundle."""

    result: str
    name: str
    text: str  # operands, with the comments


@dataclass(frozen=True, slots=True)
class Bundle:
    """One instruction: where it stands, what it does, which regions it opens."""

    address: int
    operations: tuple[Operation, ...]
    regions: tuple[str, ...] = ()
    locations: tuple[tuple[str, int], ...] = ()
    labelled: bool = False
    depth: int = 0  # of loops, as printed: 0 where nothing is issued
    stalls: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """Bundles `first` to `last`, by position, that repeat or that a branch skips."""

    first: int
    last: int
    trip_count: int | None = None

    def __contains__(self, position: int) -> bool:
        return self.first <= position <= self.last


def parse_tensorcore(text: str, *, name: str, delay_slots: int | None) -> BundledKernel:
    """The kernel in a `*-final_bundles.txt` file.

    `delay_slots` bundles after a branch still run, on every iteration, although the
    file may print them outside the loop: counting by the `>` marks misses them. None
    where a branch chooses their number itself.
    """
    bundles = tuple(_bundles(text))
    if not bundles:
        raise ValueError(f"{name}: no bundles found; has the format changed?")
    loops, skipped = _branches(bundles, delay_slots)
    return assemble(name, "tensorcore", bundles, loops, skipped)


def assemble(
    name: str,
    engine: str,
    bundles: Sequence[Bundle],
    loops: Sequence[Span],
    skipped: Sequence[Span],
) -> BundledKernel:
    """Give each bundle to the innermost loop that holds it, and count."""
    whole = Span(0, len(bundles) - 1, trip_count=1)
    spans = [whole, *sorted(loops, key=lambda span: (span.first, -span.last))]
    owner = [0] * len(bundles)
    parents: list[int | None] = [None]
    for index, span in enumerate(spans[1:], start=1):
        parents.append(owner[span.first])
        owner[span.first : span.last + 1] = [index] * (span.last - span.first + 1)
    skippable = {at for span in skipped for at in range(span.first, span.last + 1)}

    depths: list[int] = []
    result: list[Loop] = []
    for index, (span, parent) in enumerate(zip(spans, parents, strict=True)):
        depths.append(0 if parent is None else depths[parent] + 1)
        own = [at for at in range(span.first, span.last + 1) if owner[at] == index]
        mine = [bundles[at] for at in own]
        result.append(
            Loop(
                index=index,
                parent=parent,
                depth=depths[index],
                start=bundles[span.first].address,
                end=bundles[span.last].address,
                bundles=len(mine),
                empty=sum(not bundle.operations for bundle in mine),
                # A skip that swallows a whole loop says nothing about its iterations.
                skippable=sum(at in skippable for at in own)
                if any(at not in skippable for at in own)
                else 0,
                stalls=sum(bundle.stalls for bundle in mine),
                trip_count=span.trip_count,
                innermost=index not in parents,
                counts=_count(mine),
                source=_source(mine),
            )
        )
    return BundledKernel(name, engine, tuple(result))


def _bundles(text: str) -> Iterator[Bundle]:
    starts = list(_BUNDLE.finditer(text))
    ends = [*(match.start() for match in starts[1:]), len(text)][: len(starts)]
    for match, end in zip(starts, ends, strict=True):
        body = text[match.end() : end]
        operations = []
        for slot in body.split(";;"):
            if found := _SLOT.match(slot):
                operations.append(Operation(*found.groups()))
        yield Bundle(
            address=int(match[1], 16),
            operations=tuple(operations),
            regions=tuple(_REGION.findall(body)),
            labelled=match[2] is not None,
            depth=match[3].count(">"),
            locations=tuple((file, int(at)) for file, at in _LOCATION.findall(body)),
        )


def _branches(
    bundles: Sequence[Bundle], delay_slots: int | None
) -> tuple[list[Span], list[Span]]:
    """The loops, and what forward branches skip."""
    opened: dict[str, int] = {}
    for position, bundle in enumerate(bundles):
        for region in bundle.regions:
            opened.setdefault(region, position)
    values = {op.result: op for bundle in bundles for op in bundle.operations}

    loops: dict[int, Span] = {}
    skipped: list[Span] = []
    last = len(bundles) - 1
    for position, bundle in enumerate(bundles):
        for branch in bundle.operations:
            target = _TARGET.search(branch.text)
            if not branch.name.startswith("sbr") or target is None:
                continue
            # A region that opens nowhere has no bundle of its own: the end.
            to = opened.get(target[1], last)
            leaves = _leaves(bundles, position, to, delay_slots)
            if to > position:
                skipped.append(Span(leaves + 1, to - 1))
            elif to not in loops or loops[to].last < leaves:
                loops[to] = Span(to, leaves, _trip_count(branch, values))
    return list(loops.values()), skipped


def _leaves(
    bundles: Sequence[Bundle], branch: int, target: int, delay_slots: int | None
) -> int:
    """The position of the last bundle that a taken branch still runs."""
    last = len(bundles) - 1
    if delay_slots is not None:
        return min(branch + delay_slots, last)
    if target > branch:
        return branch
    # What follows a loop is less deep, or has a label; its delay slots may be empty.
    at, depth = branch, bundles[target].depth
    while at < last and not bundles[at + 1].labelled:
        following = bundles[at + 1]
        if following.operations and following.depth < depth:
            break
        at += 1
    return at


def _trip_count(branch: Operation, values: Mapping[str, Operation]) -> int | None:
    """How often `for i in range(start, stop, step)` runs, where all three are known."""
    predicate = _PREDICATE.search(branch.text)
    if predicate is None:
        return None
    test = values.get(predicate[2])
    if test is None or not test.name.startswith(("scmp.ge.s32", "scmp.lt.s32")):
        return None
    following, stop = _operands(test)
    counters = (op for op in values.values() if op.name == "sphi")
    phi = next((op for op in counters if _operands(op)[1] == following), None)
    step_by = values.get(_unspilled(following, values))
    stays_below = (predicate[1] == "!") == test.name.startswith("scmp.ge")
    if not stays_below or phi is None or step_by is None or step_by.name != "sadd.s32":
        return None
    start = _constant(_operands(phi)[0], values)
    step = _constant(_operands(step_by)[0], values)
    limit = _constant(stop, values)
    if start is None or step is None or limit is None or step <= 0:
        return None
    return max(1, ceil((limit - start) / step))


def _operands(op: Operation) -> tuple[str, str]:
    text = _PREDICATE.sub("", _COMMENT.sub("", op.text))
    first, second, *_ = [*_OPERAND.findall(text), "", ""]
    return first, second


def _unspilled(name: str, values: Mapping[str, Operation]) -> str:
    """The value that a reload brings back, where one store alone fills its place."""
    load = values.get(name)
    place = _SPILL.search(load.text) if load and load.name == "sld" else None
    if place is None:
        return name
    stores = (_SPILL.search(op.text) for op in values.values() if op.name == "sst")
    stored = {found[2] for found in stores if found and found[1] == place[1]}
    return next(iter(stored)) or name if len(stored) == 1 else name


def _constant(operand: str, values: Mapping[str, Operation]) -> int | None:
    if operand.startswith("%"):
        op = values.get(operand)
        return _constant(_operands(op)[0], {}) if op and op.name == "smov" else None
    return int(operand) if operand else None


def _count(bundles: Sequence[Bundle]) -> Counts:
    kinds: Counter[str] = Counter()
    dma: Counter[str] = Counter()
    granules: Counter[str] = Counter()
    sizes: list[int] = []
    for op in (op for bundle in bundles for op in bundle.operations):
        if op.name.startswith("dma.done") or op.name == "swait.ge":
            kinds["waits"] += 1
        elif op.name.startswith(("dma.", "stream.")):
            route = op.name.removeprefix("dma.").removeprefix("stream.")
            dma[route] += 1
            if size := _GRANULES.search(op.text):
                granules[route] += int(size[1])
                sizes.append(int(size[1]))
        else:
            kinds["checks"] += op.name == "shalt.err"
            kinds["spills"] += "_spill]" in op.text
            kinds[_slot(op.name)] += 1
    slots = {slot for _, slot in _SLOTS if slot}
    return Counts(
        dma=dict(sorted(dma.items())),
        dma_granules=dict(sorted(granules.items())),
        largest_dma=max(sizes, default=0),
        dma_sizes=dict(sorted(Counter(sizes).items())),
        **{kind: kinds[kind] for kind in ("waits", "spills", "checks", *slots)},
    )


def _slot(name: str) -> str:
    return next((slot for start, slot in _SLOTS if name.startswith(start)), "")


def _source(bundles: Sequence[Bundle]) -> str:
    """The lines the loop came from, in the file that most of its operations name."""
    lines: dict[str, list[int]] = {}
    for bundle in bundles:
        for file, line in bundle.locations:
            lines.setdefault(file, []).append(line)
    if not lines:
        return ""
    file, found = max(lines.items(), key=lambda item: len(item[1]))
    first, last = min(found), max(found)
    span = f"{first}" if first == last else f"{first}-{last}"
    return f"{file.rpartition('/')[2]}:{span}"
