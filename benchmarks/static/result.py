"""The result of one compile: what the program issues per updated row, and where."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.static.bundles import Loop


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
    loops: tuple[LoopReport, ...]

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
        """Bundles, and explicit delays, for each row: a lower bound on its cycles."""
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
    def temp_holds_a_table(self) -> bool:
        """Whether the temporaries are large enough for a copy of a table."""
        return self.memory is not None and 0 < self.table_bytes <= self.memory.temp

    def to_json(self) -> dict[str, Any]:
        """Every count, and the figures derived from them."""
        derived = (
            "engines",
            "phases",
            "cycles_per_row",
            "dmas_per_row",
            "checks",
            "unattributed",
            "largest_dma_bytes",
            "temp_holds_a_table",
        )
        return asdict(self) | {name: getattr(self, name) for name in derived}


def _sums(items: Iterable[tuple[str, float]]) -> dict[str, float]:
    result: dict[str, float] = {}
    for name, cycles in items:
        result[name] = result.get(name, 0.0) + cycles
    return {name: cycles for name, cycles in result.items() if cycles}
