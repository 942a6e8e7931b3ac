"""`python -m benchmarks plot`: the figures of a folder of results."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.contenders import OURS
from benchmarks.results import Results, Row
from benchmarks.static.chips import CHIPS
from benchmarks.static.tables import records_of
from benchmarks.update import HEADLINE, RUNS

OUR_COLOUR, GREY, INK = "#d1495b", "#8d99ae", "#2b2d42"
COLOURS = {
    "xla": "#edae49",
    "at_set": "#00798c",
    "torch": "#52489c",
    "torch_rows": "#9a8fd6",
    "optax": "#6b705c",
}
AXES = {
    "V": ("rows", "rows of the table, V"),
    "N": ("ids", "ids in a batch, N"),
    "D": ("dim", "numbers in a row, D"),
    "duplicates": ("repeats", "how often each id occurs in the batch"),
}
TITLES = {
    "V": "Cost of an update as the table grows",
    "N": "Cost of an update as the batch grows",
    "D": "Cost of an update as rows grow wider",
    "duplicates": "Cost of an update as ids repeat",
}
PROGRAM_STYLES = {
    "sparsecore": ("sparse_adam, SparseCore", OUR_COLOUR, "o"),
    "tensorcore": ("sparse_adam, TensorCore", OUR_COLOUR, "s"),
    "packed_tensorcore": ("sparse_adam, TensorCore, packed", OUR_COLOUR, "P"),
    "sweep": ("sparse_adam, sweep of all rows", OUR_COLOUR, "D"),
    "xla_sorted": ("XLA, sorted ids", COLOURS["at_set"], "o"),
    "xla_unsorted": ("XLA, unsorted ids", COLOURS["at_set"], "s"),
    "xla_add_offloaded": ("XLA, unsorted, on SparseCore", COLOURS["at_set"], "^"),
    "xla_dense": ("XLA, dense Adam", COLOURS["optax"], "D"),
}
STYLE: Any = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#e5e7eb",
    "figure.dpi": 150,
}


@click.command()
@click.argument(
    "folder", type=click.Path(exists=True, path_type=Path), default=RUNS, required=False
)
def plot(folder: Path) -> None:
    """Draw the figures of the results in FOLDER (default: runs/bench) beside them."""
    for path in draw_all(folder, folder):
        click.echo(f"wrote {path}")


def draw_all(results: Path, into: Path) -> list[Path]:
    """Draws every figure that the result files of a folder have the numbers for."""
    written = []
    for name, (source, draw) in FIGURES.items():
        if not (results / source).exists():
            continue
        with mpl.rc_context(STYLE):
            figure = draw(results / source)
        if figure is None:
            continue
        into.mkdir(parents=True, exist_ok=True)
        path = into / f"{name}.png"
        # What it was drawn from: a test compares it with the committed results.
        figure.savefig(path, metadata={"Source": digest(results / source)})
        written.append(path)
    return written


def digest(path: Path) -> str:
    """A short name for the contents of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def cost_figure(axis: str, path: Path) -> Figure | None:
    """Milliseconds of an update against one size, a line for each contender."""
    size, label = AXES[axis]
    found = [
        row
        for row in Results.read(path).rows
        if row.ms and row.ratio is not None and row.case.startswith(f"{axis}=")
    ]
    if not found:
        return None
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ms for one update")
    ends = []
    for impl in dict.fromkeys(row.impl for row in found):
        line = sorted((getattr(r, size), r) for r in found if r.impl == impl)
        first = impl == next(r.impl for r in found if r.impl in OURS)
        colour = OUR_COLOUR if first else COLOURS.get(impl, GREY)
        xs, rows = [x for x, _ in line], [row for _, row in line]
        width = 3 if first else 1.6
        axes.plot(xs, [r.p50_ms for r in rows], "o-", color=colour, lw=width, ms=4)
        axes.fill_between(
            xs,
            [r.p20_ms for r in rows],
            [r.p80_ms for r in rows],
            color=colour,
            alpha=0.12,
            lw=0,
        )
        ends.append((rows[-1].p50_ms, xs[-1], rows[-1].title, colour, first))
    _label_ends(axes, ends)
    axes.set_xticks(sorted({getattr(row, size) for row in found}), minor=False)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.grid(axis="y")
    axes.set_title(TITLES[axis])
    return _with_note(figure, _shape(found[0], without=axis))


def _label_ends(axes: Axes, ends: Sequence[tuple[Any, ...]]) -> None:
    """Names the lines at their right ends, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = (high / low) ** 0.07
    at = 0.0
    for y, x, title, colour, first in sorted(ends):
        at = max(y, at * gap)
        axes.annotate(
            title,
            xy=(x, at),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            weight="bold" if first else "normal",
            va="center",
            annotation_clip=False,
        )
    axes.set_ylim(low, max(high, at * gap))


def bandwidth_figure(path: Path) -> Figure | None:
    """The share of the copy bandwidth that each contender makes use of."""
    rows = [
        row
        for row in Results.read(path).rows
        if row.share_of_copy is not None and row.ratio is not None
    ]
    names = {row.case for row in rows}
    shown = [name for name in HEADLINE if name in names] or sorted(names)[:2]
    if not shown:
        return None
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    order: list[str] = []
    for axes, name in zip(panels, shown, strict=True):
        case = {row.title: row for row in rows if row.case == name}
        order = order or sorted(case, key=lambda t: case[t].share_of_copy or 0)
        for at, title in enumerate(order):
            row = case.get(title)
            if row is None or row.share_of_copy is None:
                continue
            ours = row.impl in (*OURS, "packed")
            axes.barh(at, 100 * row.share_of_copy, color=OUR_COLOUR if ours else GREY)
            axes.text(
                100 * row.share_of_copy + 0.6,
                at,
                f"{row.share_of_copy:.0%}  {row.p50_ms:.0f} ms",
                va="center",
                size=9,
            )
        axes.set_yticks(range(len(order)), order)
        axes.tick_params(axis="y", length=0)
        axes.set_title(f"{name} ids", weight="normal")
        axes.set_xlabel("% of copy bandwidth")
        axes.margins(x=0.35)
    figure.suptitle(
        "How much of the machine's copy bandwidth an update makes use of",
        weight="bold",
        x=0.01,
        ha="left",
    )
    return _with_note(figure, _shape(next(r for r in rows if r.case == shown[0])))


def bundles_figure(path: Path) -> Figure | None:
    """What a row takes on each chip, ours beside XLA: bundles, and least time."""
    found = json.loads(path.read_text())
    records = {
        key: record
        for key, record in records_of(found).items()
        if not record["error"] and _differs(record)
    }
    chips = [name for name in CHIPS if any(chip == name for _, chip in records)]
    if not chips:
        return None
    figure = Figure(figsize=(9, 1.2 + 0.62 * len(chips)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    measures = (
        ("bundles issued for a row", _bundles),
        (
            "least ns for a row, its bytes counted too",
            lambda r: r["roofline"]["bound_ns"],
        ),
    )
    for axes, (label, value) in zip(panels, measures, strict=True):
        for program, (title, colour, marker) in PROGRAM_STYLES.items():
            points = [
                (value(records[program, chip]), at)
                for at, chip in enumerate(chips)
                if (program, chip) in records
            ]
            if points:
                xs, ys = zip(*points, strict=True)
                axes.scatter(xs, ys, s=70, color=colour, marker=marker, label=title)
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.set_yticks(range(len(chips)), chips)
        axes.set_ylim(len(chips) - 0.5, -0.5)
        axes.grid(axis="both")
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        title="What one updated row takes on each TPU: further left is better",
        title_fontproperties={"weight": "bold", "size": 12},
        alignment="left",
        loc="outside upper left",
        ncols=3,
        frameon=False,
        columnspacing=1.2,
        handletextpad=0.2,
    )
    record = next(iter(records.values()))
    sizes = {"V": record["rows"], "D": record["dim"], "N": record["ids"]}
    note = ", ".join(f"{name} = {size:,}" for name, size in sizes.items())
    return _with_note(
        figure, f"{note} distinct ids; read off compiled programs: bounds, not timings"
    )


def _bundles(record: dict[str, Any]) -> float:
    """Of all engines; a SparseCore's subcores share the rows."""
    return record["roofline"]["issue_ns"] * CHIPS[record["chip"]].clock


def _differs(record: dict[str, Any]) -> bool:
    """Where nothing runs on a SparseCore, offloading has changed nothing."""
    return "offloaded" not in record["program"] or "subcore" in record["engines"]


def _shape(row: Row, without: str = "") -> str:
    sizes = {"V": row.rows, "D": row.dim, "N": row.ids}
    said = [f"{name} = {size:,}" for name, size in sizes.items() if name != without]
    if without and without != "duplicates":
        said.append(f"{row.distribution} ids")
    return ", ".join([*said, row.dtypes[0]])


def _with_note(figure: Figure, note: str) -> Figure:
    """Small print under the figure."""
    figure.supxlabel(note, x=0.01, ha="left", size=8, color=GREY)
    return figure


def _thousands(value: float, _: int) -> str:
    if value >= 1_000_000:
        return f"{value / 1e6:.3g} M"
    return f"{value / 1e3:.0f} k" if value >= 10_000 else f"{value:,.0f}"


def _cost(axis: str) -> Callable[[Path], Figure | None]:
    return lambda path: cost_figure(axis, path)


FIGURES: dict[str, tuple[str, Callable[[Path], Figure | None]]] = {
    "cost_by_rows": ("scale.json", _cost("V")),
    "cost_by_ids": ("scale.json", _cost("N")),
    "cost_by_dim": ("scale.json", _cost("D")),
    "cost_by_duplicates": ("scale.json", _cost("duplicates")),
    "bandwidth": ("update.json", bandwidth_figure),
    "bundles": ("static.json", bundles_figure),
}
