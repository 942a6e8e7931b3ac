"""`python -m benchmarks step --static`: compiled steps, summed by stage."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from benchmarks.options import wrapped
from benchmarks.results import SCHEMA, commit, now, write
from benchmarks.static.chips import CHIPS
from benchmarks.static.compiler import (
    StaticCase,
    compile_all,
    kernels_in,
    require_libtpu,
)
from benchmarks.static.hlo import FILE, parse
from benchmarks.static.programs import PROGRAMS
from benchmarks.static.stages import EMBEDDING, STAGES, Rules, Stage, sum_stages
from benchmarks.steps.cases import StepCase
from benchmarks.steps.tables import ns_an_id

LEGEND = (
    "ns is for one id of the batch: of each operation the larger of bundles over the "
    "clock and bytes over the peak bandwidth, added up as if nothing overlaps. Waits "
    "and launches take time that is not in it; loops that nobody can count are taken "
    "to run once."
)


def run(
    chosen: Sequence[StepCase], chips: Sequence[str], timeout: float, out: Path
) -> None:
    """Compiles the cases for the chips, prints their stages, and writes the file."""
    require_libtpu("step --static")
    console, started = Console(highlight=False, soft_wrap=True), now()
    records: list[dict[str, Any]] = []
    for record in sum_all(chosen, chips, timeout):
        records.append(record)
        _print(console, record)
        head = {
            "schema": SCHEMA,
            "command": "step --static",
            "commit": commit(),
            "started": started,
        }
        write(out, head, "records", records)
    console.print(wrapped(LEGEND, 0))
    console.print(f"Wrote {out}")


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
    stages = sum_stages(module, kernels, CHIPS[chip], rules)
    times = ("trace_seconds", "compile_seconds", "compile_processor_seconds")
    return (
        known
        | {name: found[name] for name in times}
        | {"stages": {name: _rounded(stage) for name, stage in stages.items()}}
    )


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
    unknown = sum(stage["unknown_loops"] for stage in record["stages"].values())
    uncounted = sum(stage["uncounted"] for stage in record["stages"].values())
    console.print(
        wrapped(
            f"embedding {ns_an_id(record, EMBEDDING):.2f} ns an id, "
            f"{ns_an_id(record, EMBEDDING, 'distinct_ns'):.2f} if ids were distinct; "
            f"traced in {record['trace_seconds']:.1f} s, compiled in "
            f"{record['compile_processor_seconds']:.0f} processor seconds; {unknown} "
            f"loops unknown, {uncounted} operations without a dump",
            2,
            2,
        )
    )
