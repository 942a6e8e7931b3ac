"""`python -m benchmarks static`: one line a case as it finishes, and JSON."""

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from benchmarks.options import choices_option, out_option, timeout_option, wrapped
from benchmarks.results import now, write_records
from benchmarks.static.chips import CHIPS
from benchmarks.static.compiler import StaticCase, count_all, require_libtpu
from benchmarks.static.programs import PROGRAMS, find
from benchmarks.static.result import KernelReport, LoopReport, StaticReport
from benchmarks.static.tables import TITLES

DEFAULT = tuple(name for name in TITLES if name in PROGRAMS)
QUICK = ("xla_sorted", "tensorcore", "sparsecore")
QUICK_CHIPS = ("v6e",)
# Header and width; negative widths are aligned to the left.
_CASE = {
    "program": -22,
    "chip": -4,
    "dim": 4,
    "bundles/row": 13,
    "dmas/row": 8,
    "bytes/row": 9,
    "ns/row": 7,
    "limit": -7,
}
_LOOP = {
    "loop": -16,
    "phase": -12,
    "bundles": 7,
    "stalls": 6,
    "skip": 5,
    "trips": 6,
    "rows": 6,
    "/row": 7,
}
_SLOTS = (
    *("waits", "sld", "sst", "vld", "vst", "valu", "xlu", "eup", "mxu"),
    *("spills", "checks"),
)


@click.command("static")
@click.option(
    "--program",
    "programs",
    multiple=True,
    help=f"{', '.join(PROGRAMS)}, or module:attribute; again for more. "
    f"Default: {', '.join(DEFAULT)}.",
)
@choices_option("--chip", "chips", CHIPS, "A TPU")
@click.option(
    "--rows",
    type=click.IntRange(1),
    default=1_000_000,
    show_default=True,
    help="Rows of the table.",
)
@click.option(
    "--dim",
    "dims",
    multiple=True,
    type=click.IntRange(1),
    default=(128,),
    show_default=True,
    help="Width of a row; again for more.",
)
@click.option(
    "--ids",
    type=click.IntRange(1),
    default=2**16,
    show_default=True,
    help="Ids of one update.",
)
@out_option("static.json")
@click.option("--quick", is_flag=True, help="Three programs on v6e only.")
@click.option(
    "--keep-dumps",
    type=click.Path(path_type=Path),
    help="Leave the compiler's dumps in this new folder.",
)
@timeout_option(300.0, "Seconds for one case.")
@click.option(
    "--loops/--no-loops",
    default=None,
    help="Print and write the loops of the kernels. Default: if --program is given.",
)
@click.option("--verbose", is_flag=True, help="Print every loop of every kernel.")
def main(
    programs: tuple[str, ...],
    chips: tuple[str, ...],
    rows: int,
    dims: tuple[int, ...],
    ids: int,
    out: Path,
    quick: bool,
    keep_dumps: Path | None,
    timeout: float,
    loops: bool | None,
    verbose: bool,
) -> None:
    """Count what compiled programs issue for each updated row, and bound its time.

    The programs are compiled for TPUs that need not be there. A bundle is one
    instruction and takes a cycle at best, so bundles/row is a lower bound on cycles;
    waits for memory come on top. ns/row is the largest of three bounds, for distinct
    ids: bundles (issue), arithmetic (compute), bytes (hbm). Bounds, not timings.
    """
    if keep_dumps is not None and keep_dumps.exists():
        raise click.BadParameter(
            f"{keep_dumps} exists already; dumps of two runs do not mix",
            param_hint="--keep-dumps",
        )
    require_libtpu("static")
    for program in programs:
        try:
            find(program)
        except (ValueError, ImportError, AttributeError) as error:
            raise click.BadParameter(f"{error}", param_hint="--program") from error
    cases = [
        StaticCase(program, chip, rows, dim, ids)
        for dim, program, chip in product(
            dims,
            programs or (QUICK if quick else DEFAULT),
            chips or (QUICK_CHIPS if quick else CHIPS),
        )
    ]
    loops = bool(programs) if loops is None else loops
    started = now()
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"V = {rows:,}, N = {ids:,}")
    console.print(_line(_CASE, list(_CASE)), style="bold")
    reports = []
    for report in count_all(cases, timeout=timeout, keep_dumps=keep_dumps):
        reports.append(report)
        _print(console, report, loops or verbose, verbose)
    write_records(out, "static", started, [each.to_json(loops) for each in reports])
    # A chip that lacks the engine of a program is no failure of the whole.
    sys.exit(bool(programs) and any(report.error for report in reports))


def _print(console: Console, report: StaticReport, loops: bool, verbose: bool) -> None:
    case = [report.program, report.chip, f"{report.dim}"]
    if report.error is not None or report.memory is None:
        cells = dict(list(_CASE.items())[: len(case)])
        words = wrapped(f"{_line(cells, case)} {report.error}")
        console.print(Text(words), style="red")
        if not verbose:
            return
    else:
        # Loops whose rows are unknown are not in the figures per row.
        bound = "≥" if report.unattributed else ""
        figures = [
            bound + "+".join(f"{cycles:.1f}" for cycles in report.engines.values()),
            f"{bound}{report.dmas_per_row:.2f}",
            f"{report.bytes_per_row:,.0f}",
            *_limit(report),
        ]
        console.print(Text(_line(_CASE, case + figures)), style="cyan")
        if loops:
            memory = report.memory
            console.print(
                f"    largest DMA {_size(report.largest_dma_bytes)}, "
                f"aliased {_size(memory.alias)}, temporaries {_size(memory.temp)}"
            )
    if report.temp_holds_a_table:
        console.print(Text("    the temporaries could hold a table"), style="red")
    for copy in report.table_copies:
        words = wrapped(f"copies a table: {copy}", 6, 4)
        console.print(Text(words), style="red")
    for kernel in report.kernels:
        if verbose or (loops and kernel.counted):
            _print_kernel(console, kernel, verbose)


def _limit(report: StaticReport) -> tuple[str, str]:
    roofline = report.roofline
    return (f"≥{roofline.bound_ns:.2f}", roofline.limit) if roofline else ("", "")


def _print_kernel(console: Console, kernel: KernelReport, verbose: bool) -> None:
    phases = ", ".join(
        f"{phase} {cycles:.2f}"
        for phase, cycles in kernel.phases.items()
        if cycles >= 0.01
    )
    memory = kernel.vmem_bytes or kernel.tile_memory
    where = "VMEM" if kernel.vmem_bytes else "tile memory"
    facts = [kernel.engine, f"{kernel.bundles} bundles"]
    facts += [f"{_size(memory)} of {where}"] if memory else []
    facts += [f"{kernel.spills} spills in loops"] if kernel.spills else []
    facts += ["streams a table"] if kernel.streams_a_table else []
    words = wrapped(f"{kernel.name} ({', '.join(facts)}) {phases}", 4, 2)
    console.print(Text(words), style="bold" if kernel.counted else "dim")
    shown = [entry for entry in kernel.loops if verbose or entry.loop.depth]
    if shown:
        console.print(Text("  " + _line(_LOOP, list(_LOOP))), style="dim")
    for entry in shown:
        console.print(Text("  " + _line(_LOOP, _loop_cells(entry))))
        if counts := _loop_counts(entry):
            console.print(Text(wrapped(counts, 6, 6)), style="dim")


def _loop_cells(entry: LoopReport) -> list[str]:
    loop = entry.loop
    per_row = entry.cycles_per_row
    return [
        " " * (loop.depth - 1) + f"{loop.start:#x}-{loop.end:#x}",
        entry.phase,
        f"{loop.bundles}",
        f"{loop.stalls}",
        f"{loop.skippable}",
        "?" if loop.trip_count is None else f"{loop.trip_count}",
        "?" if entry.rows is None else f"{entry.rows:g}",
        "?" if per_row is None else f"{per_row:.2f}",
    ]


def _loop_counts(entry: LoopReport) -> str:
    """Lists what an iteration issues, and the lines of source that it comes from."""
    counts = entry.loop.counts
    issued = [(name, getattr(counts, name)) for name in _SLOTS]
    issued += counts.dma.items()
    words = [f"{name} {number}" for name, number in issued if number]
    return "; ".join(filter(None, [", ".join(words), entry.loop.source]))


def _line(columns: dict[str, int], cells: Sequence[str]) -> str:
    return " ".join(
        f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}"
        for width, cell in zip(columns.values(), cells, strict=True)
    ).rstrip()


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
