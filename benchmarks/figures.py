"""`python -m benchmarks plot`: the figures of a folder of results."""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import click
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.colours import GREY, INK, OUR_COLOUR
from benchmarks.contenders import OURS
from benchmarks.lines import number
from benchmarks.options import RUNS
from benchmarks.results import Results, Row, read_records
from benchmarks.static.chips import CHIPS
from benchmarks.static.tables import records_of
from benchmarks.update import headline_cases
from benchmarks.weak_scaling import weak_scaling_figure

LABEL_HEIGHT = 0.055  # of a name at the end of a line, over the height of the axes
COLOURS = {
    "xla": "#b7791f",
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
# The programs of the figure of least times, from top to bottom; None leaves a gap.
PROGRAMS: tuple[tuple[str, str] | None, ...] = (
    ("sparsecore", "sparse_adam, SparseCore"),
    ("packed_tensorcore", "sparse_adam, TensorCore, packed"),
    ("tensorcore", "sparse_adam, TensorCore"),
    ("sweep", "sparse_adam, sweep of all rows"),
    None,
    ("xla_add_offloaded", "XLA, .add on SparseCore"),
    ("xla_sorted", "XLA, sorted ids"),
    ("xla_dense", "XLA, dense Adam on all rows"),
    ("xla_unsorted", "XLA, unsorted ids"),
)
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


class End(NamedTuple):
    """The right end of a line, and its name."""

    y: float
    x: float
    title: str
    colour: str
    first: bool  # of ours


@click.command()
@click.argument(
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=RUNS,
    required=False,
)
def plot(folder: Path) -> None:
    """Draw the figures of the results in FOLDER (default: runs/bench) beside them."""
    require_results(folder, [source for source, _ in FIGURES.values()])
    written = draw_all(folder, folder)
    if not written:
        raise click.ClickException(
            f"the results in {folder} have no times to draw: all their rows were "
            "skipped, or failed"
        )
    for path in written:
        click.echo(f"wrote {path}")


def require_results(folder: Path, names: Sequence[str]) -> None:
    """Ends a command with a sentence where a folder has none of these result files."""
    if not any((folder / name).exists() for name in names):
        raise click.ClickException(
            f"{folder} has no result file: none of {', '.join(sorted({*names}))} is "
            "there. "
            "`make bench` writes them, or `python -m benchmarks update --out "
            f"{folder / 'update.json'}`"
        )


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
        ends.append(End(rows[-1].p50_ms, xs[-1], rows[-1].title, colour, first))
    axes.set_xticks(sorted({getattr(row, size) for row in found}), minor=False)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.grid(axis="y")
    axes.set_title(TITLES[axis])
    _label_ends(axes, ends)
    return _with_note(figure, _shape(found[0], without=axis))


def _label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Names the lines at their right ends.

    Where names would overlap they move apart, as little as they must, and a thin line
    leads from each to its own end.
    """
    ends = sorted(ends)
    low, high = (math.log(y) for y in axes.get_ylim())
    places = spread_apart(
        [(math.log(end.y) - low) / (high - low) for end in ends], LABEL_HEIGHT
    )
    for end, place in zip(ends, places, strict=True):
        axes.annotate(
            end.title,
            xy=(end.x, end.y),
            xytext=(1.06, place),
            textcoords="axes fraction",
            color=end.colour,
            weight="bold" if end.first else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": end.colour,
                "lw": 0.8,
                "shrinkA": 2,
                "shrinkB": 5,
                "relpos": (0, 0.5),
            },
        )


def spread_apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Moves ascending places apart until each is `gap` from the next, or more.

    Places that are too near to each other become a block around their common middle;
    so the squares of all moves have the least sum.
    """
    blocks: list[list[float]] = []  # of each, where its first place would go
    for at, place in enumerate(wanted):
        blocks.append([place - gap * at])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    starts = [fmean(block) for block in blocks for _ in block]
    return [start + gap * at for at, start in enumerate(starts)]


def times_figure(path: Path) -> Figure | None:
    """Draws how long one update takes, a bar for each contender."""
    rows = [row for row in Results.read(path).rows if row.ms and row.ratio is not None]
    shown = headline_cases(rows)
    if not shown:
        return None
    titles = list(dict.fromkeys(row.title for row in rows if row.case in shown))
    times = {(row.case, row.title): row.p50_ms for row in rows}
    titles.sort(key=lambda title: times.get((shown[0], title), math.inf))
    ours = {row.title for row in rows if row.impl in (*OURS, "packed")}
    size = (8.6, 1.3 + 0.3 * len(titles))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, shown, strict=True):
        row = next(row for row in rows if row.case == name)
        bars = [times.get((name, title)) for title in titles]
        colours = [OUR_COLOUR if title in ours else GREY for title in titles]
        _bars(axes, bars, colours, "{} ms".format)
        axes.set_yticks(range(len(titles)), titles)
        axes.set_title(f"{row.distribution} ids", weight="normal", size=11)
    for label, title in zip(panels[0].get_yticklabels(), titles, strict=True):
        if title in ours:
            label.set(color=OUR_COLOUR, weight="bold")
    first = next(row for row in rows if row.case == shown[0])
    _title(
        figure, f"Milliseconds for one update of {first.ids:,} ids: shorter is better"
    )
    return _with_note(figure, _shape(first))


def _bars(
    axes: Axes,
    values: Sequence[float | None],
    colours: Sequence[str],
    label: Callable[[str], str],
) -> None:
    """Draws bars from top to bottom, each with its number at its end, and no axis."""
    most = max(value for value in values if value is not None)
    for at, (value, colour) in enumerate(zip(values, colours, strict=True)):
        if value is None:
            continue
        axes.barh(at, value, color=colour, height=0.72)
        axes.annotate(
            label(number(value)),
            xy=(value, at),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            size=9,
            weight="bold" if colour == OUR_COLOUR else "normal",
            color=colour if colour == OUR_COLOUR else INK,
        )
    axes.set_xlim(0, max(1.38 * most, axes.get_xlim()[1]))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def least_time_figure(path: Path) -> Figure | None:
    """Draws the least time of a row on each chip, ours above XLA's."""
    records = {
        key: record
        for key, record in records_of(read_records(path)).items()
        if not record["error"] and _differs(record)
    }
    chips = [name for name in CHIPS if any(chip == name for _, chip in records)]
    there = {program for program, _ in records}
    shown = [each for each in PROGRAMS if each is None or each[0] in there]
    while shown and shown[-1] is None:
        shown.pop()
    if not chips or not shown:
        return None
    size = (max(8, 2.9 + 1.55 * len(chips)), 1.2 + 0.27 * len(shown))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(chips), sharex=True, sharey=True, squeeze=False)[0]
    for axes, chip in zip(panels, chips, strict=True):
        found = [each and records.get((each[0], chip)) for each in shown]
        bars = [
            None if record is None else float(record["roofline"]["bound_ns"])
            for record in found
        ]
        colours = [_program_colour(each) for each in shown]
        _bars(axes, bars, colours, str)
        axes.set_title(chip, weight="normal", size=11, pad=2)
        for at, (each, bar) in enumerate(zip(shown, bars, strict=True)):
            if each is not None and bar is None:
                axes.text(0, at, " -", va="center", size=9, color=GREY)
    named = [(at, each[1]) for at, each in enumerate(shown) if each is not None]
    panels[0].set_yticks([at for at, _ in named], [title for _, title in named])
    for label, (at, _) in zip(panels[0].get_yticklabels(), named, strict=True):
        if _program_colour(shown[at]) == OUR_COLOUR:
            label.set(color=OUR_COLOUR, weight="bold")
    _title(figure, "Least nanoseconds to update one row on a TPU: shorter is better")
    record = next(iter(records.values()))
    sizes = {"V": record["rows"], "D": record["dim"], "N": record["ids"]}
    note = ", ".join(f"{name} = {size:,}" for name, size in sizes.items())
    return _with_note(
        figure,
        f"{note} distinct ids. Bounds read off compiled programs, not timings. "
        "A dash: no such program for this TPU.",
    )


def _program_colour(each: tuple[str, str] | None) -> str:
    return GREY if each is None or each[0].startswith("xla") else OUR_COLOUR


def _differs(record: dict[str, Any]) -> bool:
    """Where nothing runs on a SparseCore, offloading has changed nothing."""
    return "offloaded" not in record["program"] or "subcore" in record["engines"]


def _shape(row: Row, without: str = "") -> str:
    sizes = {"V": row.rows, "D": row.dim, "N": row.ids}
    said = [f"{name} = {size:,}" for name, size in sizes.items() if name != without]
    if without and without != "duplicates":
        said.append(f"{row.distribution} ids")
    return ", ".join([*said, row.dtypes[0]])


def _title(figure: Figure, title: str) -> None:
    figure.suptitle(title, weight="bold", x=0.01, ha="left", size=12)


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
    "times": ("update.json", times_figure),
    "least_times": ("static.json", least_time_figure),
    "weak_scaling": ("routing.json", weak_scaling_figure),
}
# What a figure shows, in words, for those who do not see it.
CAPTIONS = {
    "cost_by_rows": TITLES["V"],
    "cost_by_ids": TITLES["N"],
    "cost_by_dim": TITLES["D"],
    "cost_by_duplicates": TITLES["duplicates"],
    "times": "Milliseconds of one update",
    "least_times": "Least nanoseconds to update one row on each TPU",
    "weak_scaling": "Least nanoseconds of an id on 4 to 256 chips of each TPU",
}
