"""The result of one compile: what the program issues per updated row, and where."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.static.bundles import Loop
from benchmarks.static.chips import CHIPS, SLOTS
from benchmarks.static.roofline import Roofline, estimate

WINDOW_BYTES = 2**20  # a DMA this large moves no row
WINDOW_GRANULES = 2048  # where a table is streamed, nor does one of this many


@dataclass(frozen=True, slots=True)
class LoopReport:
    """A loop and its share of the cost of one row."""

    loop: Loop
    phase: str
    rows: float | None  # updated by one iteration; None where it cannot be told
    remainder: bool = False  # runs only for what an unrolled loop leaves over

    @property
    def cycles_per_row(self) -> float | None:
        """Bundles and explicit delays, inner loops left out."""
        return None if self.rows is None else self.loop.cycles / self.rows

    @property
    def dmas_per_row(self) -> float | None:
        """DMAs and streams issued, inner loops left out."""
        return None if self.rows is None else self.loop.counts.dmas / self.rows


@dataclass(frozen=True, slots=True)
class KernelReport:
    """A kernel; `counted` where it belongs to what the program is measured by."""

    name: str
    engine: str
    counted: bool
    bundles: int
    largest_dma_bytes: int
    granule: int  # bytes
    loops: tuple[LoopReport, ...]
    vmem_bytes: int = 0  # of a TensorCore's vector memory that it has for itself
    tile_memory: int = 0  # bytes of a subcore's memory
    block_bytes: int = 0  # of a DMA that moves rows to be counted as a pass; 0: no such

    def without(self, phases: Sequence[str]) -> "KernelReport":
        """This kernel where it has no work for some of its phases."""
        return replace(
            self, loops=tuple(e for e in self.loops if e.phase not in phases)
        )

    @property
    def slots(self) -> dict[str, float]:
        """Operations for each row, by the slot of the bundle that they take."""
        return {
            slot: sum(
                getattr(entry.loop.counts, slot) / entry.rows
                for entry in self.loops
                if entry.rows
            )
            for slot in ("sld", "sst", "salu", *SLOTS[self.engine])
        }

    @property
    def spills(self) -> int:
        """Loads and stores of spilled values inside innermost loops."""
        inner = (entry.loop for entry in self.loops if entry.loop.depth)
        return sum(loop.counts.spills for loop in inner if loop.innermost)

    @property
    def streams_a_table(self) -> bool:
        """Whether a loop moves large windows in and out, however many there are."""
        tails = (entry.loop.counts.dma for entry in self.loops if entry.rows is None)
        both_ways = any({"hbm_to_vmem", "vmem_to_hbm"} <= dma.keys() for dma in tails)
        return both_ways and self.largest_dma_bytes >= WINDOW_BYTES

    @property
    def dma_bytes_per_row(self) -> float:
        """What DMAs move between HBM and VMEM, as far as their sizes are static.

        Where blocks or windows of a table are streamed, they are left out, for `passes`
        to count: which of two DMAs runs, that of a whole block or that of the last one,
        no dump tells, nor how often a window is fetched.
        """
        total, most = 0.0, self.block_bytes
        if self.streams_a_table:
            most = WINDOW_GRANULES * self.granule
        for entry in self.loops:
            counts = entry.loop.counts
            moved = sum(n for to, n in counts.dma_granules.items() if "hbm" in to)
            if most:
                sizes = counts.dma_sizes.items()
                blocks = sum(n * m for n, m in sizes if n * self.granule >= most)
                moved = max(0, moved - blocks)
            total += moved * self.granule / entry.rows if entry.rows else 0.0
        return total

    @property
    def phases(self) -> dict[str, float]:
        """Cycles per row of each phase; loops whose rows are unknown are left out."""
        return _sums((entry.phase, entry.cycles_per_row or 0.0) for entry in self.loops)

    @property
    def cycles_per_row(self) -> float:
        """The sum of the phases; a subcore's rows are its own, not the chip's."""
        return sum(self.phases.values())

    @property
    def dmas_per_row(self) -> float:
        """DMAs and streams issued for each row."""
        return sum(entry.dmas_per_row or 0.0 for entry in self.loops)

    @property
    def checks(self) -> int:
        """Bounds and semaphore checks inside loops."""
        return sum(entry.loop.counts.checks for entry in self.loops if entry.loop.depth)

    @property
    def unattributed(self) -> int:
        """Loops that the figures per row leave out: they are then lower still."""
        return sum(entry.rows is None and not entry.remainder for entry in self.loops)


@dataclass(frozen=True, slots=True)
class Memory:
    """`Compiled.memory_analysis()`, in bytes."""

    argument: int
    output: int
    alias: int
    temp: int


@dataclass(frozen=True, slots=True)
class StaticReport:
    """What compiling one program for one chip at one shape showed."""

    program: str
    chip: str
    rows: int
    dim: int
    ids: int
    error: str | None = None
    memory: Memory | None = None
    table_bytes: int = 0  # of the smallest array that is updated in place
    table_copies: tuple[str, ...] = ()
    kernels: tuple[KernelReport, ...] = ()
    streamed_rows: float = 0  # that SparseCore streams move for each row; no dump tells
    passes: int = 0  # over arrays of the table's size, by pipelines; no dump tells
    repeats: tuple[str, ...] = ()  # phases that are for ids that occur again
    cores: int = 1  # TensorCores that share the rows
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def counted(self) -> tuple[KernelReport, ...]:
        """The kernels that make up the cost of a row."""
        return tuple(kernel for kernel in self.kernels if kernel.counted)

    @property
    def engines(self) -> dict[str, float]:
        """Cycles per row on each engine; a subcore has a share of the rows only."""
        return _sums((kernel.engine, kernel.cycles_per_row) for kernel in self.counted)

    @property
    def cycles_per_row(self) -> float:
        """Bundles, and explicit delays, for each row: a lower bound on its cycles.

        On its own core: where `cores` share the rows, the chip takes that many at once.
        """
        return sum(self.engines.values())

    @property
    def phases(self) -> dict[str, float]:
        """`cycles_per_row`, by phase."""
        return _sums(item for kernel in self.counted for item in kernel.phases.items())

    @property
    def dmas_per_row(self) -> float:
        """DMAs and streams issued for each row."""
        return sum(kernel.dmas_per_row for kernel in self.counted)

    @property
    def checks(self) -> int:
        """Bounds and semaphore checks inside loops."""
        return sum(kernel.checks for kernel in self.counted)

    @property
    def unattributed(self) -> int:
        """Loops that the figures per row leave out: they are then lower still."""
        return sum(kernel.unattributed for kernel in self.counted)

    @property
    def largest_dma_bytes(self) -> int:
        """The largest single DMA whose size is static: a window of the table?"""
        return max((kernel.largest_dma_bytes for kernel in self.counted), default=0)

    @property
    def streamed_tables(self) -> int:
        """Tables of which every window is read and written, however few rows change."""
        return sum(kernel.streams_a_table for kernel in self.counted)

    @property
    def bytes_per_row(self) -> float:
        """HBM traffic for each row, at least."""
        moved = sum(kernel.dma_bytes_per_row for kernel in self.counted)
        passes = self.passes + 2 * self.streamed_tables
        moved += passes * self.table_bytes / self.ids
        if any(kernel.engine == "subcore" for kernel in self.counted):
            moved += 4 * self.dim * self.streamed_rows
        return moved

    @property
    def roofline(self) -> Roofline | None:
        """Least times of a row of distinct ids, and what sets them."""
        if self.error is not None:
            return None
        kernels = [kernel.without(self.repeats) for kernel in self.counted]
        return estimate(
            [
                (kernel.engine, kernel.cycles_per_row, kernel.slots)
                for kernel in kernels
            ],
            self.bytes_per_row,
            CHIPS[self.chip],
            self.cores,
        )

    @property
    def temp_holds_a_table(self) -> bool:
        """Whether the temporaries are large enough for a copy of a table."""
        return self.memory is not None and 0 < self.table_bytes <= self.memory.temp

    def to_json(self, loops: bool) -> dict[str, Any]:
        """The figures, and with `loops` every count that they are derived from."""
        derived = (
            "engines",
            "phases",
            "cycles_per_row",
            "dmas_per_row",
            "checks",
            "unattributed",
            "largest_dma_bytes",
            "streamed_tables",
            "bytes_per_row",
            "temp_holds_a_table",
        )
        record = asdict(self) | {name: getattr(self, name) for name in derived}
        record["roofline"] = self.roofline and self.roofline.to_json()
        if not loops:
            del record["kernels"]
            return record
        for kernel, own in zip(record["kernels"], self.kernels, strict=True):
            kernel["spills"] = own.spills
            if not own.counted:
                kernel["loops"] = ()
            for entry in kernel["loops"]:  # a count that is not there is 0
                counts = entry["loop"]["counts"]
                entry["loop"]["counts"] = {k: n for k, n in counts.items() if n}
        return record


def _sums(items: Iterable[tuple[str, float]]) -> dict[str, float]:
    result: dict[str, float] = {}
    for name, cycles in items:
        result[name] = result.get(name, 0.0) + cycles
    return {name: cycles for name, cycles in result.items() if cycles}
