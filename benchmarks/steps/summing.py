"""`python -m benchmarks step --static`: compiled steps, summed by stage."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from benchmarks.options import wrapped
from benchmarks.results import commit, now, read_steps, write_records
from benchmarks.static.chips import CHIPS
from benchmarks.static.compiler import (
    StaticCase,
    compile_all,
    kernels_in,
    require_libtpu,
)
from benchmarks.static.hlo import FILE, parse
from benchmarks.static.programs import PROGRAMS
from benchmarks.static.stages import (
    EMBEDDING,
    STAGES,
    Operation,
    Rules,
    Stage,
    operations,
    sum_stages,
    tensorcore_share,
)
from benchmarks.steps.cases import COMPILED, COMPILED_QUICK, StepCase
from benchmarks.steps.tables import Record, ns_an_id

LARGEST = 12  # operations of a step that are listed
LEGEND = (
    "ns is for one id of the batch: of each operation the larger of bundles over the "
    "clock and bytes over the peak bandwidth, added up as if nothing overlaps. Waits "
    "and launches take time that is not in it; loops that nobody can count are taken "
    "to run once."
)


def run(
    chosen: Sequence[StepCase],
    chips: Sequence[str],
    timeout: float,
    out: Path,
    *,
    keep: bool,
) -> None:
    """Compiles the cases for the chips, prints their stages, and writes the file.

    With `keep`, records of other cases and chips that the file has stay in it. Each
    says of which commit it is.
    """
    require_libtpu("step --static")
    console, started = Console(highlight=False, soft_wrap=True), now()
    records = read_steps(out)["records"] if keep and out.exists() else []
    for record in sum_all(chosen, chips, timeout):
        records = merged(records, record | {"commit": commit()})
        _print(console, record)
        write_records(out, "step --static", started, records)
    console.print(wrapped(LEGEND, 0))
    console.print(f"Wrote {out}")


def merged(records: Sequence[Record], new: Record) -> list[Record]:
    """Returns the records with a new one in its place: by case, then by chip."""
    cases = [case.name for case in (*COMPILED, *COMPILED_QUICK)]

    def place(record: Record) -> tuple[int, int]:
        return cases.index(record["case"]), list(CHIPS).index(record["chip"])

    others = (each for each in records if place(each) != place(new))
    return sorted([*others, new], key=place)


def sum_all(
    chosen: Sequence[StepCase], chips: Sequence[str], timeout: float
) -> Iterator[dict[str, Any]]:
    """Yields a record for each case and chip, as soon as it is there."""
    pairs = list(product(chosen, chips))
    compiled = compile_all(
        [
            StaticCase(
                f"benchmarks.steps.program:{case.name}",
                *(chip, case.cap, case.dim, case.batch),
            )
            for case, chip in pairs
        ],
        timeout=timeout,
    )
    for (case, chip), (_, found, dumps) in zip(pairs, compiled, strict=True):
        yield _record(case, chip, found, dumps)


def _record(
    case: StepCase, chip: str, found: dict[str, Any], dumps: Path
) -> dict[str, Any]:
    model = case.model()
    known: dict[str, Any] = {
        "case": case.name,
        "title": case.title,
        "chip": chip,
        "tables": len(model.tables),
        "rows": model.num_rows,
        "dim": case.dim,
        "batch": case.batch,
        "ids": model.num_ids,
        "versions": found.get("versions", {}),
        "error": found.get("error"),
    }
    if known["error"] is not None:
        return known
    rules = Rules(
        programs=[p for p in PROGRAMS.values() if p.kernels.startswith("^sparse_adam")],
        dim=case.dim,
        table_rows=max(table.rows for table in model.tables.values()),
        many=case.batch,
    )
    module = parse((dumps / FILE).read_text())
    kernels = tuple(kernels_in(dumps, CHIPS[chip]))
    found_operations = list(operations(module, kernels, CHIPS[chip], rules))
    stages = sum_stages(found_operations, CHIPS[chip])
    steps, clocks = ("trace", "compile"), ("seconds", "processor_seconds")
    times = [f"{step}_{clock}" for step in steps for clock in clocks]
    return (
        known
        | {name: found[name] for name in times}
        | {"stages": {name: _rounded(stage) for name, stage in stages.items()}}
        | {"largest": _largest(found_operations)}
    )


def _largest(found: Sequence[Operation]) -> list[tuple[str, str, str, float]]:
    """Returns the operations of the embedding that take longest, the longest first.

    Of each its stage, its name, where it runs, and its nanoseconds.
    """
    ours = [each for each in found if each.stage in EMBEDDING]
    ours.sort(key=lambda each: -each.ns)
    return [
        (
            each.stage,
            each.name,
            "TensorCore" if each.on_tensorcore else "elsewhere",
            round(each.ns, 1),
        )
        for each in ours[:LARGEST]
    ]


def _rounded(stage: Stage) -> dict[str, float]:
    return {name: round(value, 1) for name, value in asdict(stage).items()}


def _print(console: Console, record: dict[str, Any]) -> None:
    title = (
        f"{record['case']} on {record['chip']}: {record['tables']} tables, D = "
        f"{record['dim']}, B = {record['batch']:,}, {record['ids']:,} ids"
    )
    console.print(title, style="bold")
    if record["error"] is not None:
        console.print(wrapped(record["error"], 2, 2), style="red")
        return
    names = ("stage", "ns", "bundles", "bytes", "ops", "launches", "sorts", "gathers")
    table = Table(*(Column(name, justify="right") for name in names), box=None)
    for name in STAGES:
        stage = record["stages"][name]
        times = (stage[kind] / record["ids"] for kind in ("ns", "issue_ns", "hbm_ns"))
        counts = ("operations", "launches", "sorts", "scalar_gathers")
        cells = [f"{value:.3f}" for value in times]
        table.add_row(name, *cells, *(f"{stage[kind]}" for kind in counts))
    console.print(table)
    for stage, name, where, ns in record["largest"]:
        console.print(f"  {stage:>8} {ns / record['ids']:6.3f} {where:<10} {name}"[:80])
    share = tensorcore_share(record["stages"])
    beside = (
        ""
        if share is None
        else f"its TensorCore time {share:.2f} of the update on SparseCores; "
    )
    unknown = sum(stage["unknown_loops"] for stage in record["stages"].values())
    uncounted = sum(stage["uncounted"] for stage in record["stages"].values())
    console.print(
        wrapped(
            f"embedding {ns_an_id(record, EMBEDDING):.2f} ns an id, "
            f"{ns_an_id(record, EMBEDDING, 'distinct_ns'):.2f} if ids were distinct; "
            f"{beside}"
            f"traced in {record['trace_processor_seconds']:.1f} and compiled in "
            f"{record['compile_processor_seconds']:.0f} processor seconds; {unknown} "
            f"loops unknown, {uncounted} operations without a dump",
            2,
            2,
        )
    )
