"""Tables of the static analysis: by chip, ours above XLA's."""

from collections.abc import Callable
from typing import Any

from benchmarks.static.chips import CHIPS

_ROWS = ("fetch rows", "write back")
_DISTINCT = (*_ROWS, "gradients", "update")
Record = dict[str, Any]
Records = dict[tuple[str, str], Record]  # by program and chip
Table = tuple[list[str], list[list[str]]]  # header, lines
_ALIKE = ("xla_add", "xla_unsorted_offloaded")  # nearly as xla_unsorted
TITLES = {
    "sparsecore": "sparse_adam, SparseCore",
    "tensorcore": "sparse_adam, TensorCore",
    "packed_sparsecore": "sparse_adam, SparseCore, packed",
    "packed_tensorcore": "sparse_adam, TensorCore, packed",
    "sweep": "sparse_adam, sweep of all rows",
    "packed_sweep": "sparse_adam, sweep of all rows, packed",
    "benchmarks.static.jte:PROGRAM": "jax-tpu-embedding, Adam",
    "xla_sorted": "XLA, sorted ids",
    "xla_unsorted": "XLA, unsorted ids",
    "xla_add": "XLA, unsorted, `.add`",
    "xla_unsorted_offloaded": "XLA, unsorted, offload flags",
    "xla_add_offloaded": "XLA, `.add`, offload flags",
    "xla_dense": "XLA, dense Adam",
}


def records_of(found: Record) -> Records:
    """The records of a result file."""
    return {(r["program"], r["chip"]): r for r in found["records"]}


def roofline_table(found: Record) -> Table:
    """Least nanoseconds of a row, and what sets them."""

    return _by_program(records_of(found), lambda record: _bound(record["roofline"]))


def bounds_table(found: Record) -> Table:
    """The same, without the forms that differ little."""
    brief = [r for r in found["records"] if r["program"] not in _ALIKE]
    header, lines = roofline_table({"records": brief})
    repeated = _repeated(records_of(found))
    return header, [
        row for line in lines for row in (line, repeated.get(line[0])) if row
    ]


def _repeated(records: Records) -> dict[str, list[str]]:
    """The lines, by title, of our kernels where ids repeat."""
    repeated = {}
    for (program, chip), record in records.items():
        if program in TITLES and record["repeats"] and not record["error"]:
            roofline, of = record["roofline"], CHIPS[chip]
            cores = record.get("cores", 1)
            shares = {"tensorcore": cores, "subcore": max(1, of.subcores)}
            cycles = sum(n / shares[at] for at, n in record["engines"].items())
            issue, hbm = cycles / of.clock, roofline["hbm_ns"]
            limit = "hbm" if hbm >= issue else "issue"
            bound = {"bound_ns": max(issue, hbm), "limit": limit}
            repeated[program, chip] = record | {"roofline": bound}
    _, lines = _by_program(repeated, lambda r: _bound(r["roofline"]))
    return {title: [f"{title}, ids repeat", *cells] for title, *cells in lines}


def _bound(roofline: Record) -> str:
    return f"{roofline['bound_ns']:.2f} {roofline['limit']}"


def sorts_table(found: Record) -> Table:
    """The bundles of each sort of `sorts.py`, for all of its ids.

    Where a compile took too long, or failed, the word says so.
    """
    records = records_of(found)
    chips = [name for name in CHIPS if any(chip == name for _, chip in records)]
    module = "benchmarks.static.sorts:"
    lines = []
    for program in dict.fromkeys(name for name, _ in records):
        by, _, words = program.removeprefix(module).partition("_")
        cells = []
        for chip in chips:
            record = records.get((program, chip))
            if record is None or record["error"]:
                cells.append("" if record is None else "not compiled")
                continue
            bundles = sum(record["engines"].values()) * record["ids"]
            cells.append(f"{bundles:,.0f}")
        title = f"{words.replace('_', ' ')}: {'XLA' if by == 'xla' else 'the kernel'}"
        lines.append([title, *cells])
    return ["", *chips], lines


def narrow_table(found: Record) -> Table:
    """The least time of a row and its bundles, one width after the other."""
    dims = sorted({record["dim"] for record in found["records"]})
    header, lines = [], []

    def cell(record: Record) -> str:
        roofline, copies = record["roofline"], len(record["table_copies"])
        bundles = sum(record["engines"].values())
        marks = f", copies {copies} tables" if copies else ""
        return f"{roofline['bound_ns']:.2f} {roofline['limit']}; {bundles:.0f}{marks}"

    for dim in dims:
        alike = [record for record in found["records"] if record["dim"] == dim]
        header, rows = _by_program(records_of({"records": alike}), cell)
        lines += [[f"{dim}", *row] for row in rows]
    return ["D", *header], lines


def programs_table(found: Record) -> Table:
    """Bundles a row on each engine, bytes a row and the largest temporary."""
    records = records_of(found)

    def cell(record: Record) -> str:
        engines = " + ".join(f"{n:.1f}" for n in record["engines"].values())
        streamed = record["streamed_tables"]
        marks = f", streams {streamed} tables" if streamed else ""
        return f"{engines}; {record['bytes_per_row']:,.0f} B{marks}"

    return _by_program(records, cell)


def _by_program(records: Records, cell: Callable[[Record], str]) -> Table:
    chips = [name for name in CHIPS if any(chip == name for _, chip in records)]
    lines = []
    for program in TITLES:
        cells = []
        for chip in chips:
            record = records.get((program, chip))
            cells.append("" if record is None or record["error"] else cell(record))
        if any(cells):
            lines.append([TITLES[program], *cells])
    return ["", *chips], lines


def phases_table(found: Record) -> Table:
    """What the bundles and DMAs of our kernels go to, beside XLA's."""
    records = records_of(found)
    chips = [name for name in CHIPS if ("tensorcore", name) in records]
    packed = "packed_tensorcore"

    def ours(phases: tuple[str, ...], program: str = "tensorcore") -> list[str]:
        # A phase that an older count has not is left empty.
        found = [records[program, chip]["phases"] for chip in chips]
        return [
            f"{sum(chip[phase] for phase in phases):.1f}"
            if chip.keys() >= set(phases)
            else ""
            for chip in found
        ]

    def subcore(phase: str, program: str = "sparsecore") -> list[str]:
        found = [records.get((program, chip)) for chip in chips]
        return [
            ""
            if record is None or record["error"]
            else f"{record['phases'][phase]:.1f}"
            for record in found
        ]

    def largest(program: str) -> list[str]:
        found = (records.get((program, chip)) for chip in chips)
        return [size(record["largest_dma_bytes"]) if record else "" for record in found]

    lines = [
        ["**bundles a row**, TensorCore: three rows in and out", *ours(_ROWS)],
        ["gradients and update too", *ours(_DISTINCT)],
        ["an id that repeats: its sum", *ours(("sums",))],
        ["TensorCore, packed: a row in and out", *ours(_ROWS, packed)],
        ["gradients and update too", *ours(_DISTINCT, packed)],
        ["SparseCore: update, on one subcore of 64 or 32", *subcore("update")],
        ["SparseCore, packed: the same", *subcore("update", "packed_sparsecore")],
        ["SparseCore: sums, where ids repeat", *subcore("run sums")],
        ["sweep: fetch and add a gradient", *ours(("gradients", "add"), "sweep")],
        ["**largest DMA**", *largest("tensorcore")],
        ["XLA, sorted ids: a window of the table", *largest("xla_sorted")],
    ]
    return ["", *chips], lines


def sweep_table(found: Record) -> Table:
    """Makes a table of the bundles of the sweep, of the file that the package reads."""
    figures = found["sweep"]
    chips = [chip for chip in CHIPS if chip in figures]

    def counts(name: str, at: int | None = None, digits: int = 1) -> list[str]:
        values = (figures[chip][name] for chip in chips)
        return [f"{v if at is None else v[at]:.{digits}f}" for v in values]

    def shares(name: str, num_bytes: int) -> list[str]:
        # The time of the bundles over that of the bytes, which go in and out.
        cells = []
        for chip in chips:
            of = CHIPS[chip]
            share = figures[chip][name] / of.clock / (2 * num_bytes / of.bandwidth)
            cells.append(f"**{share:.2f}**" if share > 1 else f"{share:.2f}")
        return cells

    lines = [
        ["fetch a gradient", *counts("fetched", 0)],
        ["add it", *counts("added", 0)],
        ["fetch a gradient of D = 256", *counts("fetched", 1)],
        ["add it", *counts("added", 1)],
        ["add one to a line that 8 rows share (D = 16)", *counts("added_shared")],
    ]
    updates = (
        ("plain float32", "updated_plain", 3 * 512),
        ("packed float32 (of D = 16, 8 rows)", "updated_packed", 3 * 512),
        ("packed bfloat16", "updated_packed_bfloat16", 2 * 512),
        ("plain bfloat16", "updated_plain_bfloat16", 3 * 256),
    )
    lines += [
        [f"update a row, {title}", *counts(name, digits=2)]
        for title, name, _ in updates
    ]
    for number, (title, name, num_bytes) in enumerate(updates):
        words = "that over the DMAs of the row: " if not number else ""
        lines.append([words + title.partition(" (")[0], *shares(name, num_bytes)])
    return ["", *chips], lines


def row_kernel_table(found: Record) -> Table:
    """Makes a table of the bundles of the row kernel, of the same file."""
    figures = found["row_kernel"]
    chips = [chip for chip in CHIPS if chip in figures]
    lines = []
    for at, dim in enumerate((128, 256)):
        for name, title in (
            ("plain", "fetch, update and write back a plain row"),
            ("packed", "the same of a packed one"),
            ("gradient", "fetch a gradient"),
            ("repeated", "add it, where its id repeats"),
        ):
            cells = [f"{figures[chip][name][at]:.1f}" for chip in chips]
            lines.append([f"D = {dim}: {title}", *cells])
    for name, title in (
        ("gradient_shared", "fetch a gradient and put it into its line"),
        ("repeated_shared", "add it, where its id or a neighbour's repeats"),
    ):
        cells = [f"{figures[chip][name]:.1f}" for chip in chips]
        lines.append([f"D = 16, packed: {title}", *cells])
    return ["", *chips], lines


def size(number: int) -> str:
    """Bytes, in the unit that suits."""
    if number >= 2**20:
        return f"{number / 2**20:.0f} MiB"
    return f"{number / 2**10:.3g} KiB"
