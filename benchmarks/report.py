"""`python -m benchmarks report`: tables of the README and docs, from committed results.

No figure in them is typed by hand: each table stands between two markers and is
rewritten from `benchmarks/results/`. A test compares.
"""

import json
import re
from pathlib import Path
from typing import Any

import click

from benchmarks.static.chips import CHIPS
from sparse_adam.kernels.tensorcore import bytes_moved

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_ROWS = ("fetch rows", "write back")
_DISTINCT = (*_ROWS, "gradients", "update")
_SPARSECORE = ("v5p", "v6e", "7x")

Reports = dict[tuple[str, str], dict[str, Any]]  # by program and chip


@click.command()
def report() -> None:
    """Rewrite the tables of the README and the docs from `benchmarks/results/`."""
    for path in TABLES:
        path.write_text(with_table(path))
        click.echo(f"rewrote the table of {path.relative_to(ROOT)}")


def with_table(path: Path) -> str:
    """The text of a file, with its table made anew."""
    results, make = TABLES[path]
    table = make(json.loads((RESULTS / results).read_text()))
    pattern = r"(<!-- table from[^\n]*-->\n).*?(\n<!-- end of table -->)"
    text, made = re.subn(
        pattern, lambda m: m[1] + table + m[2], path.read_text(), flags=re.DOTALL
    )
    assert made == 1, f"{path} has lost the markers of its table"
    return text


def static_table(results: list[dict[str, Any]]) -> str:
    """Bundles and bytes of one row by chip, ours above XLA's."""
    reports: Reports = {(r["program"], r["chip"]): r for r in results}
    rows = {
        "**bundles a row**, TensorCore: three rows in and out": _bundles(
            reports, _ROWS
        ),
        "gradients and update too": _bundles(reports, _DISTINCT),
        "and sums, where ids repeat": _bundles(reports, (*_DISTINCT, "math", "chunk")),
        "SparseCore: update, on one of its subcores": _subcore(reports, "update"),
        "SparseCore: sums, where ids repeat": _subcore(reports, "run sums"),
        "SparseCore: update, over all subcores": _subcore(
            reports, "update", shared=True
        ),
        "XLA: gathers and scatters": [
            f"{reports['xla_scatter_set', chip]['cycles_per_row']:.1f}"
            for chip in CHIPS
        ],
        "**bytes a row**": [f"{_our_bytes(reports, chip):,.0f}" for chip in CHIPS],
        "XLA: whole tables, in and out": [
            f"{_xla_bytes(reports, chip):,.0f}" for chip in CHIPS
        ],
        "**largest DMA**": _largest_dma(reports, "tensorcore"),
        "XLA: a window of the table": _largest_dma(reports, "xla_scatter_set"),
    }
    return _markdown(["", *CHIPS], [[name, *cells] for name, cells in rows.items()])


def peers_table(results: dict[str, Any]) -> str:
    """Medians of one update on a CPU, one line a shape, others as ratios to ours."""
    header = ["V", "D", "N", "ids", "ms", "torch / ours", "portable / ours", "of copy"]
    lines = [
        [
            *(f"{line[key]:,}" for key in ("rows", "dim", "ids")),
            line["distribution"],
            f"{line['ms']['sparse_adam, cpu'][0]:.2f}",
            f"{line['ratio']['torch.optim.SparseAdam']:.1f}",
            f"{line['ratio']['sparse_adam, xla']:.1f}",
            f"{line['share_of_copy']:.0%}",
        ]
        for line in results["lines"]
    ]
    return _markdown(header, lines)


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _bundles(reports: Reports, phases: tuple[str, ...]) -> list[str]:
    ours = [reports["tensorcore", chip]["phases"] for chip in CHIPS]
    return [f"{sum(chip[phase] for phase in phases):.1f}" for chip in ours]


def _subcore(reports: Reports, phase: str, shared: bool = False) -> list[str]:
    """Of one row on the subcore that has it, or `shared` among all of the device."""
    cells = []
    for name, chip in CHIPS.items():
        if name in _SPARSECORE:
            bundles = reports["sparsecore", name]["phases"][phase]
            cells.append(f"{bundles / (chip.subcores if shared else 1):.1f}")
        else:
            cells.append("")
    return cells


def _our_bytes(reports: Reports, chip: str) -> float:
    case = reports["tensorcore", chip]
    return bytes_moved(case["ids"], case["ids"], case["dim"]) / case["ids"]


def _xla_bytes(reports: Reports, chip: str) -> float:
    """Six passes over whole tables: each of three is read and written by windows."""
    case = reports["xla_scatter_set", chip]
    return 6 * 4 * case["dim"] * case["rows"] / case["ids"]


def _largest_dma(reports: Reports, program: str) -> list[str]:
    sizes = [reports[program, chip]["largest_dma_bytes"] for chip in CHIPS]
    return [_size(size) for size in sizes]


def _size(size: int) -> str:
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


TABLES = {
    ROOT / "README.md": ("static.json", static_table),
    ROOT / "docs" / "cpu.md": ("peers.json", peers_table),
}
