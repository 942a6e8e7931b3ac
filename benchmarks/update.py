"""`python -m benchmarks update`: wall clock of one update, every contender in turn."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import jax
from rich.console import Console
from tqdm import tqdm

from benchmarks import lines, results
from benchmarks.cases import BENCHMARKS, Case
from benchmarks.contenders import CONTENDERS, COPY
from benchmarks.device_time import device_clock, predicted_ms
from benchmarks.results import Results, Row
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
RUNS = Path("runs", "bench")  # ignored by git


@click.command()
@click.option(
    "--case",
    "cases",
    multiple=True,
    type=click.Choice(list(CASES)),
    help="A named case; again for more. Default: all.",
)
@click.option(
    "--impl",
    "impls",
    multiple=True,
    type=click.Choice(list(CONTENDERS)),
    help="A contender; again for more. Default: all in zipf, uniform and the quick "
    f"cases, elsewhere {', '.join(LEAN)}.",
)
@click.option("--quick", is_flag=True, help="Two small cases and few rounds.")
@click.option("--rounds", type=int, help="Timed calls of each contender in a case.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=RUNS / "update.json",
    show_default=True,
    help="The result file.",
)
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
    found = run_and_write("update", entered, rounds, out)
    if any(row.status == "failed" for row in found.rows):
        raise SystemExit(1)


def run_and_write(
    command: str,
    entered: Sequence[tuple[Case, Sequence[str]]],
    rounds: int,
    out: Path,
) -> Results:
    """Times, prints a line a row, and writes the file after every case."""
    console = Console(highlight=False, soft_wrap=True)
    started, load = results.now(), results.load()
    config = {
        "rounds": rounds,
        "cases": {case.name: list(impls) for case, impls in entered},
    }
    # Waiting for a TPU takes longer than an update: there the profiler tells.
    clock = device_clock if jax.default_backend() == "tpu" else wall_clock
    rows: list[Row] = []
    written = Results(command, config, ())
    console.print(lines.header())
    with tqdm(total=len(entered), leave=False, disable=None) as bar:
        for case, impls in entered:
            field = [CONTENDERS[name] for name in impls]
            found = measure(
                case, field, rounds, clock=clock, progress=bar.set_description
            )
            rows += (found := [_with_prediction(row, case) for row in found])
            written = Results(
                command,
                config,
                tuple(rows),
                machine=results.describe_machine(load),
                versions=results.package_versions(),
                commit=results.commit(),
                started=started,
            )
            written.write(out)
            bar.clear()
            for row in found:
                console.print(lines.line(row))
            bar.update()
    console.print(
        "Medians of interleaved calls; tables donated, compilation apart. GB/s counts "
        "the least bytes that an update must move, of copy compares it with this "
        f"machine's own copy, x ours is the time beside the first line. Wrote {out}."
    )
    return written


def _with_prediction(row: Row, case: Case) -> Row:
    """The row beside the static lower bound, where it was timed on a known TPU."""
    if not row.ms:
        return row
    kind = jax.devices()[0].device_kind
    return replace(row, predicted_ms=predicted_ms(row.impl, case, row.unique, kind))
