"""Tables of whole steps: what was timed, and what stages of compiled ones sum to."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.lines import ratio_in_words
from benchmarks.results import Results
from benchmarks.static.chips import CHIPS
from benchmarks.static.stages import EMBEDDING, STAGES, tensorcore_share
from benchmarks.static.tables import Table

ONE_TABLE = "one_table"  # the case beside the bounds of one kernel
_STAGES = {
    "plan": "plan: the sort",
    "lookup": "lookup of the rows",
    "combine": "combining them by sample",
    "prepare": "operations around the update",
    "update": "the update's kernels",
}
_UPDATE = ("plan", "prepare", "update")
Record = dict[str, Any]


def timed_table(found: Results) -> Table:
    """One line for each contender of a case: its time, and as ratio to ours."""
    lines = []
    for row in found.rows:
        options = row.options
        sizes = f"{options['tables']} tables, V = {row.rows:,}, D = {row.dim}"
        lines.append(
            [
                f"`{row.case}`: {options['title']}",
                f"{sizes}, {row.ids:,} ids",
                row.title,
                f"{row.p50_ms:.1f}" if row.ms else row.status,
                ratio_in_words(row),
            ]
        )
    return ["step", "sizes", "by", "ms", "times ours"], lines


def sums_table(found: Record) -> Table:
    """The stages of a step of one table, on each chip, and their sum."""
    records = {
        record["chip"]: record
        for record in found["records"]
        if record["case"] == ONE_TABLE and record["error"] is None
    }
    chips = [chip for chip in CHIPS if chip in records]

    def line(title: str, value: Callable[[Record], float], digits: int) -> list[str]:
        return [title, *(f"{value(records[chip]):.{digits}f}" for chip in chips)]

    lines = [
        line(title, lambda record, name=name: ns_an_id(record, [name]), 2)
        for name, title in _STAGES.items()
    ]
    around = "the update with all around it"
    lines.append(line(around, lambda record: ns_an_id(record, _UPDATE), 2))
    bold = line("sum", lambda record: ns_an_id(record, EMBEDDING), 2)
    lines.append([f"**{cell}**" for cell in bold])
    lines.append(
        line("if ids were distinct", lambda r: ns_an_id(r, EMBEDDING, "distinct_ns"), 2)
    )
    lines.append(line("launches", lambda record: _count(record, "launches"), 0))
    return ["", *chips], lines


def stages_table(found: Record) -> Table:
    """One line for each compiled step: its stages in ns an id, and what it counts."""
    header = ["step", "chip", "ids", *STAGES[:5], "the update in all", "**sum**"]
    header += [
        "TensorCore beside SparseCore",
        "dense",
        "launches of the update",
        "launches",
        "sorts",
        "scalar gathers",
        "operations",
        "trace, CPU s",
        "compile, CPU s",
    ]
    lines = []
    for record in found["records"]:
        head = [f"`{record['case']}`", record["chip"], f"{record['ids']:,}"]
        if record["error"] is not None:
            words = record["error"].partition(":")[0]
            lines.append([*head, words, *[""] * (len(header) - len(head) - 1)])
            continue
        stages = [[name] for name in STAGES[:5]]
        cells = [f"{ns_an_id(record, names):.2f}" for names in (*stages, _UPDATE)]
        cells.append(f"**{ns_an_id(record, EMBEDDING):.2f}**")
        share = tensorcore_share(record["stages"])
        cells.append("" if share is None else f"{share:.2f}")
        cells.append(f"{ns_an_id(record, ['dense']):.2f}")
        cells.append(f"{_count(record, 'launches', _UPDATE):.0f}")
        kinds = ("launches", "sorts", "scalar_gathers", "operations")
        cells += [f"{_count(record, kind):,.0f}" for kind in kinds]
        cells.append(f"{record['trace_processor_seconds']:.1f}")
        cells.append(f"{record['compile_processor_seconds']:.0f}")
        lines.append([*head, *cells])
    return header, lines


def ns_an_id(record: Record, names: Sequence[str], kind: str = "ns") -> float:
    """Returns the nanoseconds of some stages, for one id of the batch."""
    return sum(record["stages"][name][kind] for name in names) / record["ids"]


def _count(record: Record, kind: str, names: Sequence[str] = EMBEDDING) -> float:
    return sum(record["stages"][name][kind] for name in names)
