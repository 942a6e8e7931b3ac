"""Runs the cases of a command that times: shows rows, and keeps them in a file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from rich.console import Console
from tqdm import tqdm

from benchmarks import busy, lines, results
from benchmarks.options import WIDTH, wrapped
from benchmarks.results import Results, Row

Progress = Callable[[str], object]  # is told what is being done


class Named(Protocol):
    """A case of some command."""

    @property
    def name(self) -> str:
        """Returns the name by which it is chosen."""
        ...


C = TypeVar("C", bound=Named)


def run_cases(
    command: str,
    entered: Sequence[tuple[C, Sequence[str]]],
    rounds: int,
    out: Path,
    *,
    measure: Callable[[C, Sequence[str], Progress], list[Row]],
    show: Callable[[Console, C, Sequence[Row]], None],
    legend: str,
) -> None:
    """Times the cases one after the other, and writes the file after each of them.

    Where other programs load the machine, a warning is printed before and after. The
    process ends with status 1 if a contender failed.

    Args:
        command: that was called, for the file.
        entered: each case, and the names of its contenders.
        rounds: of timed calls, for the file.
        out: the result file.
        measure: times a case, and returns a row for each of the contenders.
        show: prints a case that is done, without the reasons of what was skipped.
        legend: what the columns are, to be printed in the end.
    """
    console = Console(highlight=False, soft_wrap=True)
    started, load = results.now(), results.load()
    _warn(console, busy.warning(busy.sample(), "before the run"))
    config = {
        "rounds": rounds,
        "cases": {case.name: list(impls) for case, impls in entered},
    }
    rows: list[Row] = []
    before, others = busy.read_clock(), None
    with tqdm(total=len(entered), leave=False, disable=None, ncols=WIDTH) as bar:
        for number, (case, impls) in enumerate(entered):
            found = measure(case, impls, bar.set_description)
            rows += found
            others = busy.cores_of_others(before, busy.read_clock())
            Results(
                command,
                config,
                tuple(rows),
                machine=results.describe_machine(load, others),
                versions=results.package_versions(),
                commit=results.commit(),
                started=started,
            ).write(out)
            bar.clear()
            if number:
                console.print()
            show(console, case, found)
            bar.update()
    console.print()
    if (reasons := lines.skipped_reasons(rows)) is not None:
        console.print(reasons)
    console.print(wrapped(legend, 0))
    _warn(console, busy.warning(others, "during the run"))
    console.print(f"Wrote {out}")
    if any(row.status == "failed" for row in rows):
        raise SystemExit(1)


def _warn(console: Console, words: str | None) -> None:
    if words is not None:
        console.print(wrapped(words), style="yellow")
