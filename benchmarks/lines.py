"""Prints the rows of a case as lines of at most 80 columns."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from benchmarks.options import WIDTH, wrapped
from benchmarks.results import Row

# Header and width of each column; negative widths are aligned to the left.
_COLUMNS = {
    "": -28,
    "ms": 7,
    "p20-p80": 12,
    "compile": 7,
    "GB/s": 6,
    "of copy": 7,
    "x ours": 6,
}
LEGEND = (
    "ms is the median of calls that took turns with those of all others; p20-p80 are "
    "the quantiles around it. Tables are donated. compile is in seconds, and in no "
    "time. GB/s counts the least bytes that an update must move, of copy compares it "
    "with this machine's own copy, x ours is the time beside the first line."
)


def case_line(row: Row) -> Text:
    """Says what the rows below it have timed: a case with its sizes."""
    sizes = {"V": row.rows, "D": row.dim, "N": row.ids}
    facts = [f"{name} = {size:,}" for name, size in sizes.items()]
    dtypes = row.dtypes[0] if len(set(row.dtypes)) == 1 else "/".join(row.dtypes)
    facts += [f"{row.distribution} ids", dtypes]
    return Text(wrapped(f"{row.case}: {', '.join(facts)}"), style="bold")


def header() -> Text:
    """Names the columns."""
    return Text(_line(list(_COLUMNS)), style="bold")


def line(row: Row) -> Text:
    """Shows a row: its times, or the error in their place."""
    if row.status != "ok":
        words = wrapped(f"{row.title} {row.status}: {row.reason}")
        return Text(words, style="red" if row.status == "failed" else "dim")
    share, ratio = row.share_of_copy, row.ratio
    cells = [
        row.title,
        number(row.p50_ms),
        f"{number(row.p20_ms)}-{number(row.p80_ms)}",
        f"{row.compile_s:.2f}",
        number(row.gb_per_s),
        "" if share is None else f"{share:.0%}",
        "" if ratio is None else number(ratio),
    ]
    text = _line(cells)
    if row.predicted_ms is not None:
        text += f"\n    at least {number(row.predicted_ms)} ms by its compiled program"
    return Text(text, style="cyan" if row.ratio == 1 else "")


def ratios(console: Console, title: str, rows: Sequence[Row]) -> None:
    """Prints a case in which no bytes are counted: times, and ratios to ours."""
    console.print(wrapped(title), style="bold")
    columns = ("", "ms", "p20-p80", "compile", "x ours", "bounds")
    table = Table(*(Column(name, no_wrap=True) for name in columns), box=None)
    for row in rows:
        if row.status == "failed":
            console.print(line(row))
        elif row.status == "ok":
            table.add_row(*_ratio_cells(row))
    console.print(table)
    if (skipped := skipped_line(rows)) is not None:
        console.print(skipped)


def _ratio_cells(row: Row) -> list[str]:
    spread = f"{number(row.p20_ms)}-{number(row.p80_ms)}"
    cells = [row.title, number(row.p50_ms), spread, f"{row.compile_s:.1f}"]
    if row.ratio is not None and row.ratio_bounds is not None:
        low, high = row.ratio_bounds
        cells += [f"{row.ratio:.2f}", f"{low:.2f}-{high:.2f}"]
    return cells


def ratio_in_words(row: Row) -> str:
    """Returns the ratio to ours with its bounds in brackets; "" without a ratio."""
    if row.ratio is None:
        return ""
    if row.ratio_bounds is None or row.ratio == 1:
        return f"{row.ratio:.1f}"
    low, high = row.ratio_bounds
    return f"{row.ratio:.1f} ({low:.1f} to {high:.1f})"


def skipped_line(rows: Sequence[Row]) -> Text | None:
    """Names those of the rows that were skipped, in one line; None if there are none.

    The reasons are the same in many cases; `skipped_reasons` gives them in the end.
    """
    names = [row.impl for row in rows if row.status == "skipped"]
    if not names:
        return None
    shown = len(names)
    while len(_names(names, shown)) > WIDTH:
        shown -= 1
    return Text(_names(names, shown), style="dim")


def _names(names: Sequence[str], shown: int) -> str:
    rest = [f"{len(names) - shown} more"] if shown < len(names) else []
    return f"skipped: {', '.join([*names[:shown], *rest])}"


def skipped_reasons(rows: Sequence[Row]) -> Text | None:
    """Lists the reasons of all skipped rows, with the cases if not all are meant."""
    cases = dict.fromkeys(row.case for row in rows)
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row.status == "skipped":
            found.setdefault(row.reason, {}).setdefault(row.impl, []).append(row.case)
    if not found:
        return None
    lines = ["Skipped, and why:"]
    for reason, impls in found.items():
        by_cases: dict[tuple[str, ...], list[str]] = {}
        for impl, names in impls.items():
            by_cases.setdefault(tuple(names), []).append(impl)
        for names, alike in by_cases.items():
            entered = {row.case for row in rows if row.impl in alike}
            where = "" if set(names) == entered else f" in {', '.join(names)}"
            if len(names) == len(cases):
                where = ""
            lines.append(wrapped(f"{', '.join(alike)}{where}: {reason}", 4, 2))
    if any(reason.endswith("is not installed") for reason in found):
        lines.append("  pip install '.[peers]' installs those that are not installed")
    return Text("\n".join(lines), style="dim")


def number(value: float) -> str:
    """Shows a number in three digits or so, without an exponent."""
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}"


def _line(cells: Sequence[str]) -> str:
    return " ".join(
        f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}"
        for width, cell in zip(_COLUMNS.values(), cells, strict=True)
    ).rstrip()
