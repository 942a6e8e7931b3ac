"""`python -m benchmarks update`: wall clock of one update, every contender in turn."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import jax
from rich.console import Console

from benchmarks import lines
from benchmarks.cases import BENCHMARKS, Case
from benchmarks.contenders import CONTENDERS, COPY
from benchmarks.device_time import device_clock, predicted_ms
from benchmarks.options import choices_option, out_option, rounds_option
from benchmarks.results import Row
from benchmarks.run import Progress, run_cases
from benchmarks.timing import measure, wall_clock

CASES = {case.name: case for case in BENCHMARKS}
QUICK = tuple(name for name in CASES if name.startswith("quick"))
FULL = tuple(name for name in CASES if name not in QUICK)
ROUNDS, QUICK_ROUNDS = 12, 5
EVERYBODY = tuple(CONTENDERS)
HEADLINE = ("zipf", "uniform")  # the cases with everybody; the others have these:
LEAN = (
    "sparsecore",
    "tensorcore",
    "cpu",
    "packed",
    "xla",
    "at_set",
    "torch",
    "fbgemm_rows",
    COPY,
)


def headline_cases(rows: Sequence[Row]) -> list[str]:
    """Names the cases to be shown to everybody: the headline's, or the first two."""
    names = list(dict.fromkeys(row.case for row in rows))
    return [name for name in HEADLINE if name in names] or names[:2]


@click.command()
@choices_option("--case", "cases", CASES, "A named case")
@choices_option(
    *("--impl", "impls", CONTENDERS, "A contender"),
    otherwise=f"all in zipf, uniform and the quick cases, else {', '.join(LEAN)}",
)
@click.option("--quick", is_flag=True, help="Two small cases and few rounds.")
@rounds_option("Timed calls of each contender in a case.")
@out_option("update.json")
def update(
    cases: tuple[str, ...],
    impls: tuple[str, ...],
    quick: bool,
    rounds: int | None,
    out: Path,
) -> None:
    """Time one update on this machine: ours, and what people use without us.

    Before it is timed, each contender must give the reference's numbers. What is not
    installed or cannot do a case is skipped with the reason; what fails is a row too.
    """
    chosen = [CASES[name] for name in cases or (QUICK if quick else FULL)]
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    entered = [
        (case, impls or (EVERYBODY if case.name in HEADLINE + QUICK else LEAN))
        for case in chosen
    ]
    run_and_write("update", entered, rounds, out)


def run_and_write(
    command: str,
    entered: Sequence[tuple[Case, Sequence[str]]],
    rounds: int,
    out: Path,
) -> None:
    """Times updates, as `run_cases` does."""
    # Waiting for a TPU takes longer than an update: there the profiler tells.
    clock = device_clock if jax.default_backend() == "tpu" else wall_clock

    def timed(case: Case, impls: Sequence[str], progress: Progress) -> list[Row]:
        field = [CONTENDERS[name] for name in impls]
        found = measure(case, field, rounds, clock=clock, progress=progress)
        return [_with_prediction(row, case) for row in found]

    run_cases(
        *(command, entered, rounds, out),
        measure=timed,
        show=_print_case,
        legend=lines.LEGEND,
    )


def _print_case(console: Console, case: Case, found: Sequence[Row]) -> None:
    """Prints a case: what was timed, what failed, and the names of the others."""
    del case  # a row has all of it
    console.print(lines.case_line(found[0]))
    console.print(lines.header())
    for row in found:
        if row.status != "skipped":
            console.print(lines.line(row))
    if (skipped := lines.skipped_line(found)) is not None:
        console.print(skipped)


def _with_prediction(row: Row, case: Case) -> Row:
    """Adds the static lower bound to a row that was timed on a known TPU."""
    if not row.ms:
        return row
    kind = jax.devices()[0].device_kind
    return replace(row, predicted_ms=predicted_ms(row.impl, case, row.unique, kind))
