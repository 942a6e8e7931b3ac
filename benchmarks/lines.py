"""One aligned line a row, printed as it finishes."""

from rich.text import Text

from benchmarks.results import Row

_COLUMNS = {
    "case": -17,
    "V": 10,
    "D": 4,
    "N": 8,
    "update": -29,
    "ms p50": 9,
    "p20": 9,
    "p80": 9,
    "compile s": 9,
    "GB/s": 7,
    "of copy": 7,
    "x ours": 7,
}


def header() -> Text:
    """The names of the columns."""
    return Text(_line(list(_COLUMNS)), style="bold")


def line(row: Row) -> Text:
    """A row: its times, or in their place the reason that there are none."""
    cells = [row.case, f"{row.rows:,}", f"{row.dim}", f"{row.ids:,}", row.title]
    if row.status != "ok":
        style = "red" if row.status == "failed" else "dim"
        return Text(f"{_line(cells)} {row.status}: {row.reason}", style=style)
    share, ratio = row.share_of_copy, row.ratio
    cells += [f"{ms:.2f}" for ms in (row.p50_ms, row.p20_ms, row.p80_ms)]
    cells += [
        f"{row.compile_s:.2f}",
        f"{row.gb_per_s:.1f}",
        "" if share is None else f"{share:.0%}",
        "" if ratio is None else f"{ratio:.2f}",
    ]
    if row.predicted_ms is not None:
        cells[-1] += f"  predicted at least {row.predicted_ms:.2f} ms"
    return Text(_line(cells), style="cyan" if row.ratio == 1 else "")


def _line(cells: list[str]) -> str:
    return " ".join(
        f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}"
        for width, cell in zip(_COLUMNS.values(), cells, strict=False)
    )
