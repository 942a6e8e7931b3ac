"""What each loop of a kernel is for, and how many rows one iteration of it covers."""

from collections.abc import Callable, Mapping

from benchmarks.static.bundles import Kernel, Loop
from benchmarks.static.result import KernelReport, LoopReport

# The rows that one iteration of a loop updates, given those of the whole kernel; None
# where the rule does not claim the loop.
RowRule = Callable[[Loop, float], float | None]


def dmas_per_row(**per_row: int) -> RowRule:
    """Loops that issue exactly these DMAs for each row, as `hbm_to_vmem=3`."""

    def rule(loop: Loop, total: float) -> float | None:
        if loop.counts.dma.keys() != per_row.keys():
            return None
        rows = {loop.counts.dma[route] / each for route, each in per_row.items()}
        return next(iter(rows)) if len(rows) == 1 and all(map(_whole, rows)) else None

    return rule


def mesh_loop(loop: Loop, total: float) -> float | None:
    """Pallas wraps a subcore's kernel in a loop that runs once: its mesh positions."""
    return total if loop.depth == 1 and loop.trip_count is None else None


def attribute(
    kernel: Kernel,
    *,
    rows: float,
    phases: Mapping[str, RowRule],
    tables: int,
    granule: int,
    counted: bool,
) -> KernelReport:
    """Name the loops, and say how many of the kernel's `rows` an iteration covers.

    The program's own rules come first. Then trip counts tell: the loops around a loop,
    or inside it, share its rows. Last, a loop that only fetches or only writes is taken
    to move its row of each of the `tables` by one DMA.
    """
    names: dict[int, str] = {}
    covers: dict[int, float] = {0: rows}
    for loop in kernel.loops[1:]:
        for phase, rule in phases.items():
            covered = rule(loop, rows)
            if covered is not None:
                names[loop.index], covers[loop.index] = phase, covered
                break
    for loop in kernel.loops[1:]:
        if loop.index in covers:
            continue
        moved = loop.counts.dmas / tables
        if loop.parent in covers and loop.trip_count:
            covers[loop.index] = covers[loop.parent] / loop.trip_count
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
        loops=tuple(
            LoopReport(
                loop, names.get(loop.index) or _phase(loop), covers.get(loop.index)
            )
            for loop in kernel.loops
        ),
    )


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
