"""Counts of the SparseCore kernel's loops, as a compiled program shows them."""

import dataclasses
from collections.abc import Sequence
from importlib.metadata import version

from benchmarks.static.bundles import Loop
from benchmarks.static.result import LoopReport, StaticReport

COUNTED_WITH = "0.0.42.1"  # libtpu; another one must stay within the limits
LANES = {"v5p": 8, "v6e": 8, "7x": 16}


@dataclasses.dataclass(frozen=True)
class Loops:
    """Of the kernel in one report: bundles of one subcore, waits for memory at 0."""

    report: StaticReport

    @property
    def all(self) -> tuple[LoopReport, ...]:
        return self.report.counted[0].loops

    def named(self, phase: str) -> list[Loop]:
        return [entry.loop for entry in self.all if entry.phase == phase]

    @property
    def update(self) -> int:
        """Bundles of a row's update, or of an occurrence's step."""
        return sum(loop.cycles for loop in self.named("update"))

    @property
    def streams(self) -> dict[str, int]:
        """Indirect streams of a chunk. None of them must move its rows one by one."""
        issued: dict[str, int] = {}
        for entry in self.all:
            for route, number in entry.loop.counts.dma.items():
                if route.startswith("indirect"):
                    issued[route] = issued.get(route, 0) + number
        return issued

    def counts(self, chunk: int) -> tuple[int, int, float]:
        """Update of a row, sum of an occurrence, a chunk of distinct ids for each row.

        A chunk is what happens once, and its loops; the first and the last rows of each
        of these stand outside of it, in what happens once.
        """
        inner = [*map(self.named, ("update", "run sums", "list"))]
        (update,), (total,), listings = inner
        window = LANES[self.report.chip]
        outer = [e.loop for e in self.all if e.loop.depth > 1 and [e.loop] not in inner]
        cycles = chunk // window * sum(loop.cycles for loop in listings)
        for loop in outer:  # but for copies of rows, one by one, there are no trips
            cycles += loop.cycles * (loop.trip_count or 1 if loop.innermost else 1)
        for loop in (update, total):
            around = sum(o.counts.vst for o in outer if o.index == loop.parent)
            trips = chunk - around // loop.counts.vst
            cycles += loop.cycles * ((update.trip_count and loop.trip_count) or trips)
        return update.cycles, total.cycles, round(cycles / chunk, 1)

    def lookup(self, chunk: int, *, sums: bool = True) -> float:
        """Bundles of a chunk of a lookup, for each occurrence."""
        (add,), (listing,) = self.named("add"), self.named("list")
        window = LANES[self.report.chip]
        inner = ("add", "list")
        outer = [e.loop for e in self.all if e.loop.depth > 1 and e.phase not in inner]
        cycles = sum(loop.cycles for loop in outer) + chunk // window * listing.cycles
        if sums:
            around = sum(o.counts.vst for o in outer if o.index == add.parent)
            cycles += add.cycles * (chunk - around // add.counts.vst)
        return round(cycles / chunk, 1)


def check_counts(
    counts: Sequence[float],
    limits: Sequence[float],
    pinned: Sequence[float],
    name: object,
) -> None:
    for count, limit in zip(counts, limits, strict=True):
        assert count <= limit
    if version("libtpu") == COUNTED_WITH:
        assert counts == pinned, name
    else:
        print(f"{name}: {counts} with libtpu {version('libtpu')}")


def check_no_spills(loops: Loops, width: int, planes: int) -> None:
    """Only what the formula loads and stores, and the number of the row."""
    vectors = width // LANES[loops.report.chip]
    (update,), (total,) = loops.named("update"), loops.named("run sums")
    assert (update.counts.vst, total.counts.vst) == (planes * vectors, vectors)
    assert update.counts.vld == (planes + 1) * vectors + 1
    assert total.counts.vld == vectors + 2


def assert_in_place(report: StaticReport, tables: int = 1, width: int = 128) -> None:
    """No copy of a table, and no memory that grows with it."""
    assert report.error is None, f"{report.chip}: {report.error}"
    assert report.memory is not None
    assert report.memory.alias == tables * report.table_bytes
    assert report.table_copies == ()
    # Narrow gradients are laid out anew; and there are two sums for each subcore.
    copies = 0 if width == 128 else 8 * width
    fixed = (tables + 1) * 2**20 + 1024 * report.dim
    assert report.memory.temp < (64 + copies) * report.ids + fixed
