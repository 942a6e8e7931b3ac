"""What each loop of a kernel is for, and how many rows one iteration of it covers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from benchmarks.static.bundles import BundledKernel, Counts, Loop
from benchmarks.static.result import KernelReport, LoopReport


@dataclass(frozen=True, slots=True)
class KernelTotals:
    """What a kernel has to do in all."""

    rows: float  # to be updated
    dim: int
    table_rows: int  # V


# The rows that one iteration of a loop updates; None where the rule does not claim it.
RowRule = Callable[[Loop, KernelTotals], float | None]


def dmas_per_row(**per_row: int) -> RowRule:
    """Loops that issue exactly these DMAs for each row, as `hbm_to_vmem=3`."""

    def rule(loop: Loop, work: KernelTotals) -> float | None:
        if loop.counts.dma.keys() != per_row.keys():
            return None
        rows = {loop.counts.dma[route] / each for route, each in per_row.items()}
        return next(iter(rows)) if len(rows) == 1 and all(map(_whole, rows)) else None

    return rule


def mesh_loop(loop: Loop, work: KernelTotals) -> float | None:
    """Pallas wraps a subcore's kernel in a loop that runs once: its mesh positions."""
    return work.rows if loop.depth == 1 and loop.trip_count is None else None


def attribute(
    kernel: BundledKernel,
    *,
    work: KernelTotals,
    phases: Mapping[str, RowRule],
    tables: int,
    granule: int,
    counted: bool,
    block_bytes: int = 0,
) -> KernelReport:
    """Name the loops, and say how many rows an iteration covers.

    The program's own rules come first. Then trip counts tell: the loops around a loop,
    or inside it, share its rows. Then remainder loops: what the loop before it does for
    many rows, a remainder does for one. Last, a loop that only fetches or only writes
    is taken to move its row of each of the `tables` by one DMA; of none, nothing is
    taken for granted. Remainders themselves run for a few rows of a chunk only, and
    count for nothing.
    """
    names: dict[int, str] = {}
    covers: dict[int, float] = {0: work.rows}
    unrolled = _remainders(kernel)
    remainders = {index for index, _ in unrolled.values()}
    names |= dict.fromkeys(remainders, "remainder")
    for loop in kernel.loops[1:]:
        for phase, rule in phases.items():
            covered = None if loop.index in remainders else rule(loop, work)
            if covered is not None:
                names[loop.index], covers[loop.index] = phase, covered
                break
    for loop in kernel.loops[1:]:
        if loop.index in covers or loop.index in remainders:
            continue
        moved = loop.counts.dmas / tables if tables else 0.5
        if loop.parent in covers and loop.trip_count:
            covers[loop.index] = covers[loop.parent] / loop.trip_count
        elif loop.index in unrolled:
            covers[loop.index] = unrolled[loop.index][1]
        elif _direction(loop) in ("fetch", "write back") and _whole(moved):
            covers[loop.index] = moved
    for loop in reversed(kernel.loops[1:]):
        if loop.index in covers and loop.trip_count and loop.parent is not None:
            covers.setdefault(loop.parent, covers[loop.index] * loop.trip_count)
    return KernelReport(
        name=kernel.name,
        engine=kernel.engine,
        counted=counted,
        bundles=kernel.bundles,
        largest_dma_bytes=kernel.largest_dma * granule,
        granule=granule,
        block_bytes=block_bytes,
        tile_memory=kernel.tile_memory,
        loops=tuple(
            LoopReport(
                loop,
                phase=names.get(loop.index) or _phase(loop),
                rows=covers.get(loop.index),
                remainder=loop.index in remainders,
            )
            for loop in kernel.loops
        ),
    )


def _remainders(kernel: BundledKernel) -> dict[int, tuple[int, int]]:
    """For each unrolled loop, its remainder loop, and how many times that it does."""
    found: dict[int, tuple[int, int]] = {}
    for loop, following in pairwise(kernel.loops[1:]):
        siblings = loop.parent == following.parent
        counted = loop.trip_count or following.trip_count
        times = _times(loop.counts, following.counts)
        if (
            siblings
            and not counted
            and loop.innermost
            and following.innermost
            and times
        ):
            found[loop.index] = following.index, times
    return found


def _times(many: Counts, one: Counts) -> int | None:
    """How many times over `many` does what `one` does, if that it does."""
    if many.dma.keys() != one.dma.keys():
        return None
    pairs = [(many.vld, one.vld), (many.vst, one.vst)]
    pairs += [(many.dma[route], one.dma[route]) for route in one.dma]
    ratios = {each / single if single else inf for each, single in pairs if each}
    idle = any(single and not each for each, single in pairs)
    ratio = next(iter(ratios), inf)
    # Work on a row reads its index; a plain copy, however unrolled, is no row's work.
    idle = idle or many.sld < ratio
    return int(ratio) if len(ratios) == 1 and not idle and 1 < ratio < inf else None


def _whole(number: float) -> bool:
    return float(number).is_integer()


def _phase(loop: Loop) -> str:
    """A name for a loop that no rule names."""
    if loop.depth == 0:
        return "once"
    if not loop.innermost:
        return "chunk"
    math = "math" if loop.counts.eup or loop.counts.vst else "scalar"
    return _direction(loop) or math


def _direction(loop: Loop) -> str | None:
    """Where the DMAs of an innermost loop go, if there are any."""
    routes = loop.counts.dma
    if not routes or not loop.innermost:
        return None
    if all(route.startswith("hbm_to_") or "gather" in route for route in routes):
        return "fetch"
    if all(route.endswith("_to_hbm") or "scatter" in route for route in routes):
        return "write back"
    return "both ways"
