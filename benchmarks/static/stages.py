"""Sum what a whole compiled program issues and moves, stage by stage.

Nothing is known of the program but names: each operation is given to the stage whose
scope (`jax.named_scope`) it was traced in, and its bundles are those of the compiler's
dump of the same name. So a program of another structure is read as well.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.static.attribution import KernelTotals, attribute
from benchmarks.static.bundles import BundledKernel
from benchmarks.static.chips import AnalyzedChip
from benchmarks.static.hlo import Instruction, Module
from benchmarks.static.program import Program
from benchmarks.static.result import KernelReport

# In the order of a step. "prepare" is what XLA does around the update's kernels, and
# "other" what was traced outside of all scopes.
STAGES = ("plan", "lookup", "combine", "prepare", "update", "dense", "other")
EMBEDDING = STAGES[:5]
# The innermost of these scopes decides.
_SCOPES = ("plan", "combine", "lookup", "update", "dense")
_TOP_LEVEL = "TLP"  # the program that starts all others


@dataclass
class Stage:
    """What a stage issues and moves, and how often it starts something."""

    issue_ns: float = 0.0  # bundles over the clock
    hbm_ns: float = 0.0  # bytes over the peak bandwidth
    ns: float = 0.0  # the larger of the two of each operation, one after the other
    distinct_ns: float = 0.0  # the same, without the phases for ids that repeat
    tensorcore_ns: float = 0.0  # the part of `ns` that the TensorCores are busy
    operations: int = 0
    launches: int = 0  # of Pallas kernels, and of calls on the SparseCores
    sorts: int = 0
    scalar_gathers: int = 0  # operations that gather single elements, of many ids
    uncounted: int = 0  # operations of which no dump was found
    unknown_loops: int = 0  # counted as if they ran once


@dataclass(frozen=True)
class Rules:
    """How the loops of known kernels are read, and what their sizes are."""

    programs: Sequence[Program]
    dim: int
    table_rows: int
    many: int  # a gather of so many single elements is one of the ids
    cache: dict[tuple[str, int], "Cycles"] = field(default_factory=dict)


@dataclass(frozen=True)
class Cycles:
    """The least cycles of an operation."""

    every: float
    distinct: float  # without the phases for ids that repeat
    unknown_loops: int


@dataclass(frozen=True)
class Operation:
    """An operation of a program, and what it issues and moves at least."""

    name: str
    stage: str
    opcode: str
    is_kernel: bool
    scalar_gather: bool  # it gathers single elements, of many ids
    on_tensorcore: bool
    uncounted: bool  # it has no dump and should have one
    cycles: Cycles
    issue_ns: float
    hbm_ns: float

    @property
    def ns(self) -> float:
        """Returns the larger of the two."""
        return max(self.issue_ns, self.hbm_ns)


def sum_stages(operations: Iterable[Operation], chip: AnalyzedChip) -> dict[str, Stage]:
    """Returns the stages of a program by name, all of them."""
    stages = {name: Stage() for name in STAGES}
    for each in operations:
        stage = stages[each.stage]
        stage.operations += each.opcode != _TOP_LEVEL
        stage.launches += each.is_kernel
        stage.sorts += each.opcode == "sort"
        stage.scalar_gathers += each.scalar_gather
        stage.uncounted += each.uncounted
        stage.unknown_loops += each.cycles.unknown_loops
        stage.issue_ns += each.issue_ns
        stage.hbm_ns += each.hbm_ns
        stage.ns += each.ns
        stage.distinct_ns += max(each.cycles.distinct / chip.clock, each.hbm_ns)
        stage.tensorcore_ns += each.ns * each.on_tensorcore
    return stages


def operations(
    module: Module, kernels: Sequence[BundledKernel], chip: AnalyzedChip, rules: Rules
) -> Iterator[Operation]:
    """Yields what a program executes, each operation in its stage."""
    dumped = {kernel.name: kernel for kernel in kernels}
    alike = _alike(module, dumped)
    for computation, each in module.executed():
        kernel = dumped.get(each.name) or alike.get(_signature(each))
        ids = module.occurrences(computation, each) if each.is_kernel else 0
        cycles = _cycles(kernel, ids, chip, rules)
        # Scalar arithmetic and the starts of copies have no program of their own.
        uncounted = kernel is None and _has_program(each)
        yield Operation(
            name=each.name,
            stage=stage_of(module.scope(computation, each), each.is_kernel),
            opcode=each.opcode,
            is_kernel=each.is_kernel,
            scalar_gather=module.gathered_scalars(each) >= rules.many,
            on_tensorcore=kernel.engine == "tensorcore" if kernel else uncounted,
            uncounted=uncounted,
            cycles=cycles,
            issue_ns=cycles.every / chip.clock,
            hbm_ns=module.bytes_moved(computation, each) / chip.bandwidth,
        )
    if _TOP_LEVEL in dumped:
        once = float(dumped[_TOP_LEVEL].loops[0].cycles)
        yield Operation(
            *(_TOP_LEVEL, "other", _TOP_LEVEL, False, False, True, False),
            *(Cycles(once, once, 0), once / chip.clock, 0.0),
        )


def tensorcore_share(stages: Mapping[str, Mapping[str, float]]) -> float | None:
    """Returns how long the embedding keeps TensorCores busy, beside its update.

    The time of the operations on TensorCores in all stages of the embedding, over the
    bound of the update's kernels on SparseCores for distinct ids; None where the update
    runs elsewhere.
    """
    update = stages["update"]
    if update["tensorcore_ns"] or not update["ns"]:
        return None
    busy = sum(stages[name]["tensorcore_ns"] for name in EMBEDDING)
    return busy / update["distinct_ns"]


def stage_of(scope: str, is_kernel: bool) -> str:
    """Returns the stage of an operation, by the innermost scope that is one.

    What derivatives make of a scope, as in `transpose(jvp(dense))`, is the same scope.
    """
    for part in reversed(scope.split("/")):
        name = re.sub(r"^(?:\w+\()*|\)*$", "", part)
        if name in _SCOPES:
            around = name == "update" and not is_kernel
            return "prepare" if around else name
    return "other"


def _has_program(instruction: Instruction) -> bool:
    sizes = [array.size for array in instruction.results]
    return max(sizes, default=0) > 1 and instruction.opcode not in (
        *("copy-start", "async-start", "slice-start", "custom-call"),
    )


def _signature(instruction: Instruction) -> tuple[Any, ...]:
    """What operations have in common that the compiler compiles once.

    Their names differ in a number, and so do those of what they call.
    """
    base = re.sub(r"[.\d]+(?:cloned[.\d]+)?", ".", instruction.name)
    return base, instruction.opcode, instruction.results


def _alike(
    module: Module, dumped: Mapping[str, BundledKernel]
) -> dict[tuple[Any, ...], BundledKernel]:
    """Returns a kernel for each signature that has a dump; the shortest one."""
    found: dict[tuple[Any, ...], BundledKernel] = {}
    for _, each in module.executed():
        kernel = dumped.get(each.name)
        if kernel is None:
            continue
        known = found.setdefault(_signature(each), kernel)
        if kernel.bundles < known.bundles:
            found[_signature(each)] = kernel
    return found


def _cycles(
    kernel: BundledKernel | None, ids: int, chip: AnalyzedChip, rules: Rules
) -> Cycles:
    if kernel is None:
        return Cycles(0, 0, 0)
    key = kernel.name, ids
    if key not in rules.cache:
        rules.cache[key] = _count(kernel, ids, chip, rules)
    return rules.cache[key]


def _count(kernel: BundledKernel, ids: int, chip: AnalyzedChip, rules: Rules) -> Cycles:
    """Counts a kernel by the rules that know most of its loops."""
    best: tuple[int, Cycles] | None = None
    for program in [*_programs_of(kernel, rules), None]:
        work = KernelTotals(1.0, rules.dim, rules.table_rows)
        if program and ids:
            work = program.share(kernel, chip, ids, rules.dim, rules.table_rows)
        report = attribute(
            kernel,
            work=work,
            phases=program.phases if program else {},
            tables=program.tables if program else 0,
            granule=chip.granule,
            counted=True,
        )
        repeats = program.repeats if program else ()
        every, unknown = _runs(report, work.rows, ())
        found = Cycles(every, _runs(report, work.rows, repeats)[0], unknown)
        if best is None or unknown < best[0]:
            best = unknown, found
    assert best is not None
    return best[1]


def _programs_of(kernel: BundledKernel, rules: Rules) -> Iterator[Program]:
    for program in rules.programs:
        if program.phases and re.search(program.kernels, kernel.name):
            yield program


def _runs(
    report: KernelReport, rows: float, without: Sequence[str]
) -> tuple[float, int]:
    """Returns the cycles of all runs of all loops, and how many loops are unknown.

    An unknown loop runs once for each run of the loop around it, or as often as its
    trip count says.
    """
    runs: dict[int, float] = {}
    total, unknown = 0.0, 0
    for entry in report.loops:
        loop = entry.loop
        if entry.rows:
            runs[loop.index] = rows / entry.rows
        else:
            around = runs[loop.parent] if loop.parent is not None else 1.0
            runs[loop.index] = around * (loop.trip_count or 1)
            unknown += not entry.remainder and not loop.trip_count
        if entry.phase not in without and not entry.remainder:
            total += runs[loop.index] * loop.cycles
    return total, unknown
