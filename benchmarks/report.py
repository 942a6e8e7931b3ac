"""`python -m benchmarks report`: figures, tables and a page, from result files.

No figure in the docs is typed by hand: each table stands between two
markers and is made anew from `benchmarks/results/`, and so are the pictures. A test
compares.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from benchmarks import figures, routing_tables
from benchmarks.contenders import OURS
from benchmarks.lines import ratio_in_words
from benchmarks.results import (
    COMMITTED,
    ROOT,
    Results,
    Row,
    read_records,
    read_routing,
    read_steps,
)
from benchmarks.static import cost, tables
from benchmarks.statistics import interleaved_ratio
from benchmarks.steps import tables as steps
from benchmarks.update import headline_cases
from benchmarks.weak_scaling import weak_scaling_table

PAGES = tuple(
    ROOT / page
    for page in (
        "docs/benchmarks.md",
        "docs/cpu.md",
        "docs/how_fast.md",
        "docs/packed.md",
        "docs/routing.md",
        "docs/static_analysis.md",
        "docs/sweep.md",
    )
)
FIGURES = ROOT / "docs" / "figures"
_MARKED = re.compile(
    r"(<!-- table: (\w+) [^\n]*-->\n).*?(<!-- end of table -->)", re.DOTALL
)


@click.command()
@click.argument(
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=False,
)
def report(folder: Path | None) -> None:
    """Make figures and tables of the result files in FOLDER.

    They go beside them, with a page, report.md. Without FOLDER the committed results
    are taken, and the tables of the docs and their figures rewritten.
    """
    if folder is not None:
        shown = [TABLES[name][0] for _, names, _ in SECTIONS for name in names]
        figures.require_results(folder, shown)
        (folder / "report.md").write_text(page(folder))
        click.echo(f"wrote {folder / 'report.md'}")
        return
    for path in PAGES:
        path.write_text(with_tables(path.read_text()))
        click.echo(f"rewrote the tables of {path.relative_to(ROOT)}")
    for path in figures.draw_all(COMMITTED, FIGURES):
        click.echo(f"drew {path.relative_to(ROOT)}")


def with_tables(text: str) -> str:
    """The text with each of its tables made anew."""
    return _MARKED.sub(lambda m: f"{m[1]}{make(m[2], COMMITTED)}\n{m[3]}", text)


def make(name: str, folder: Path) -> str:
    """A table by name, of the results in a folder."""
    source, table = TABLES[name]
    return table(folder / source)


def headline_table(path: Path) -> str:
    """Everybody's time in the two first cases, as ratios within a round."""
    found = Results.read(path)
    timed = [row for row in found.rows if row.ms and row.ratio is not None]
    cases = headline_cases(timed)
    header = [""]
    for name in cases:
        (row, *_) = _rows(found, name)
        header += [f"{row.distribution}: ms", "times ours", "of copy"]
    titles = dict.fromkeys(row.title for name in cases for row in _rows(found, name))
    lines = []
    for title in titles:
        cells = [title]
        for name in cases:
            row = next((r for r in _rows(found, name) if r.title == title), None)
            cells += ["", "", ""] if row is None else _figures(row)
        lines.append(cells)
    return markdown(header, lines)


def _rows(found: Results, case: str) -> list[Row]:
    """The timed updates of a case; copies are no updates."""
    return [
        row
        for row in found.rows
        if row.case == case and row.ms and row.ratio is not None
    ]


def _figures(row: Row) -> list[str]:
    share = "" if row.share_of_copy is None else f"{row.share_of_copy:.0%}"
    bold = "**" if row.ratio == 1 else ""
    cells = [f"{row.p50_ms:.1f}", f"{row.ratio:.1f}", share]
    return [
        f"{bold}{cell}{bold}" if cell and at != 1 else cell
        for at, cell in enumerate(cells)
    ]


def cases_table(path: Path) -> str:
    """One line a case: our time, others as ratios to it."""
    found = Results.read(path)
    others = (
        "packed",
        "xla",
        "at_set",
        "torch",
        "torch_rows",
        "fbgemm",
        "fbgemm_rows",
        "optax",
    )
    titles = {row.impl: row.title for row in found.rows}
    others = [impl for impl in others if impl in titles]
    header = ["case", "V", "D", "N", "ms", "of copy", *(titles[i] for i in others)]
    lines = []
    for case in dict.fromkeys(row.case for row in found.rows):
        timed = {row.impl: row for row in _rows(found, case)}
        best = next((timed[impl] for impl in OURS if impl in timed), None)
        if best is None:
            continue
        lines.append(
            [
                f"`{case}`",
                *(f"{size:,}" for size in (best.rows, best.dim, best.ids)),
                f"{best.p50_ms:.2f}",
                "" if best.share_of_copy is None else f"{best.share_of_copy:.0%}",
                *(f"{timed[i].ratio:.1f}" if i in timed else "" for i in others),
            ]
        )
    return markdown(header, lines)


def bare_loop_table(path: Path) -> str:
    """Milliseconds of an update beside those of a loop over the same memory."""
    found, lines = Results.read(path), []
    for case in dict.fromkeys(row.case for row in found.rows):
        timed = {row.impl: row for row in found.rows if row.case == case}
        loop = timed["bare_loop"]
        cells = [f"`{case}`", f"{loop.p50_ms:.1f}"]
        for impl in ("cpu", "packed", "torch"):
            row = timed[impl]
            ratio = interleaved_ratio(row.ms, loop.ms)
            cells.append(f"{row.p50_ms:.1f} ({ratio:.1f} times)")
        share = timed["bare_loop"].share_of_copy
        lines.append([*cells, "" if share is None else f"{share:.0%}"])
    own = ["sparse_adam", "sparse_adam, packed", "torch.optim.SparseAdam"]
    return markdown(["ms", "bare loop", *own, "bare loop, of copy"], lines)


def huge_pages_table(path: Path) -> str:
    """Milliseconds of plain and packed tables, beside those of the usual pages."""
    huge, usual = Results.read(path), path.with_name("update.json")
    usual = Results.read(usual) if usual.exists() else replace(huge, rows=())
    lines = []
    for case in dict.fromkeys(row.case for row in huge.rows):
        cells = [f"`{case}`"]
        for impl in ("cpu", "packed"):
            times = []
            for found in (usual, huge):
                row = next((r for r in _rows(found, case) if r.impl == impl), None)
                times.append("" if row is None else f"{row.p50_ms:.2f}")
            cells += times
        lines.append(cells)
    pages = "huge pages"
    return markdown(
        ["ms", "plain", f"plain, {pages}", "packed", f"packed, {pages}"], lines
    )


def scale_table(path: Path) -> str:
    """One line a size: everybody's milliseconds."""
    found = Results.read(path)
    impls = {row.impl: row.title for row in found.rows if row.ratio is not None}
    lines = []
    for case in dict.fromkeys(row.case for row in found.rows):
        timed = {row.impl: row for row in _rows(found, case)}
        cells = [f"{timed[i].p50_ms:.2f}" if i in timed else "" for i in impls]
        lines.append([case.replace("=", " = "), *cells])
    return markdown(["ms", *impls.values()], lines)


def lookup_table(path: Path) -> str:
    """One line a case of bags of ids: our time, others as ratios to it."""
    found = Results.read(path)
    titles = {row.impl: row.title for row in found.rows}
    others = [impl for impl in titles if impl != "ours"]
    lines = []
    for case in dict.fromkeys(row.case for row in found.rows):
        timed = {row.impl: row for row in _rows(found, case)}
        if "ours" not in timed:
            continue
        ours = timed["ours"]
        bags = f"{ours.options['samples']:,} of {ours.options['places']}"
        cells = [f"`{case}`", f"{ours.rows:,}", f"{ours.dim}", bags]
        cells.append(f"{ours.p50_ms:.2f}")
        cells += [ratio_in_words(timed[i]) if i in timed else "" for i in others]
        lines.append(cells)
    header = ["case", "V", "D", "bags", "ms", *(titles[impl] for impl in others)]
    return markdown(header, lines)


def machine_table(path: Path) -> str:
    """On what, with what and when the results were taken."""
    found = Results.read(path)
    facts = {**found.machine, **found.versions}
    facts |= {"commit": found.commit, "started": found.started}
    return markdown(["", ""], [[name, f"{fact}"] for name, fact in facts.items()])


def missing_table(path: Path) -> str:
    """Who is not in the tables, and why."""
    found = [row for row in Results.read(path).rows if row.status != "ok"]
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in found:
        reasons.setdefault((row.title, row.status, row.reason), []).append(row.case)
    lines = [[*key, ", ".join(cases)] for key, cases in reasons.items()]
    return markdown(["update", "", "reason", "cases"], lines)


def page(folder: Path) -> str:
    """What was found in a folder, as Markdown; the figures are drawn beside it."""
    drawn = {path.stem for path in figures.draw_all(folder, folder)}
    parts = ["# Benchmark report", ""]
    for title, names, pictures in SECTIONS:
        made = [make(name, folder) for name in names if _has(folder, name)]
        body = [table for table in made if table.count("\n") > 1]  # a header alone: no
        body += [
            f"![{figures.CAPTIONS[name]}]({name}.png)"
            for name in pictures
            if name in drawn
        ]
        if body:
            parts += [f"## {title}", "", "\n\n".join(body), ""]
    return "\n".join(parts)


def _has(folder: Path, name: str) -> bool:
    return (folder / TABLES[name][0]).exists()


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _static(table: Callable[[dict[str, Any]], tables.Table]) -> Callable[[Path], str]:
    return lambda path: markdown(*table(read_records(path)))


def _bundles(table: Callable[[dict[str, Any]], tables.Table]) -> Callable[[Path], str]:
    return lambda path: markdown(*table(cost.read(path)))


def _timed_steps(path: Path) -> str:
    return markdown(*steps.timed_table(Results.read(path)))


def _compiled_steps(table: Callable[[dict[str, Any]], tables.Table]) -> Any:
    return lambda path: markdown(*table(read_steps(path)))


def _routing(table: Callable[[dict[str, Any]], tables.Table]) -> Callable[[Path], str]:
    return lambda path: markdown(*table(read_routing(path)))


# Name: the file that it is made of, in the folder of the results or anywhere.
TABLES: dict[str, tuple[str, Callable[[Path], str]]] = {
    "headline": ("update.json", headline_table),
    "cases": ("update.json", cases_table),
    "bare_loop": ("bare_loop.json", bare_loop_table),
    "huge_pages": ("huge_pages.json", huge_pages_table),
    "machine": ("update.json", machine_table),
    "missing": ("update.json", missing_table),
    "scale": ("scale.json", scale_table),
    "lookups": ("lookup.json", lookup_table),
    "lookups_machine": ("lookup.json", machine_table),
    "steps": ("step.json", _timed_steps),
    "steps_machine": ("step.json", machine_table),
    "sums": ("step_static.json", _compiled_steps(steps.sums_table)),
    "stages": ("step_static.json", _compiled_steps(steps.stages_table)),
    "jte": ("static_jte.json", _static(tables.roofline_table)),
    "bounds": ("static.json", _static(tables.bounds_table)),
    "roofline": ("static.json", _static(tables.roofline_table)),
    "sorts": ("static_sorts.json", _static(tables.sorts_table)),
    "narrow": ("static_narrow.json", _static(tables.narrow_table)),
    "programs": ("static.json", _static(tables.programs_table)),
    "phases": ("static.json", _static(tables.phases_table)),
    "sweep_bundles": (str(cost.BUNDLES), _bundles(tables.sweep_table)),
    "routed_programs": ("routing.json", _routing(routing_tables.programs_table)),
    "routed_traffic": ("routing.json", _routing(routing_tables.traffic_table)),
    "weak_scaling": (
        "routing.json",
        lambda path: markdown(*weak_scaling_table(path)),
    ),
    "row_kernel_bundles": (str(cost.BUNDLES), _bundles(tables.row_kernel_table)),
}
SECTIONS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("One update", ("headline",), ("times",)),
    ("Every case: ms, and others as ratios to it", ("cases",), ()),
    ("Beside a bare loop over the same rows", ("bare_loop",), ()),
    ("On huge pages", ("huge_pages",), ()),
    (
        "How cost grows",
        ("scale",),
        ("cost_by_rows", "cost_by_ids", "cost_by_dim", "cost_by_duplicates"),
    ),
    (
        "Compiled TPU programs: bounds, not timings",
        ("roofline", "programs"),
        ("least_times",),
    ),
    ("The same of narrow rows: least ns, limit; bundles", ("narrow",), ()),
    ("Bags of ids, looked up and combined", ("lookups", "lookups_machine"), ()),
    ("Whole training steps", ("steps", "steps_machine"), ()),
    ("Stages of compiled steps: ns an id, bounds", ("stages",), ()),
    ("Left out, and why", ("missing",), ()),
    ("The machine", ("machine",), ()),
)
