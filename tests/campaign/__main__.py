"""The command line: `python -m tests.campaign --hours 2`."""

import os

# Before jax is imported. LLVM's passes take time and change no value.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import contextlib
import faulthandler
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import jax
from tqdm import tqdm

from sparse_adam._types import ImplementationName
from sparse_adam.check import run as check
from sparse_adam.check.shrink import shrink
from sparse_adam.ops import dispatch
from tests.campaign import draws, sanitize, wrong_calls
from tests.campaign.record import Progress, Record

SHRINK_SECONDS = 60.0
MOST_OF_A_GROUP = 3  # failures that are shrunk and saved
GROUPS_BETWEEN_CLEARING = 20  # of the programs that JAX keeps

Run = Callable[[Record, Progress, int], list[str]]  # of a seed


@click.command()
@click.option("--hours", default=1.0, show_default=True, help="How long to go on.")
@click.option("--groups", type=int, help="End after so many groups of cases.")
@click.option("--seed", type=int, help="Run this group only, and count nothing.")
@click.option(
    "--out",
    default=Path("runs/campaign"),
    type=click.Path(path_type=Path),
    show_default=True,
    help="The folder of the progress and of the failures.",
)
@click.option("--wait", default=600.0, help="Seconds after which a case hangs.")
@click.option(
    "--only", type=click.Choice(dispatch.NAMES), help="One implementation, and lookups."
)
@click.option("--calls", is_flag=True, help="Wrong calls of the C++ library instead.")
@click.option(
    "--sanitize",
    "sanitizer",
    type=click.Choice(list(sanitize.CHECKS)),
    help="With --only cpu, under a sanitizer; its files are in a folder in --out.",
)
def main(
    hours: float,
    groups: int | None,
    seed: int | None,
    out: Path,
    wait: float,
    only: ImplementationName | None,
    calls: bool,
    sanitizer: str | None,
) -> None:
    """Compares random cases with the reference, until the time is up.

    With --calls the C++ library must refuse wrong calls of it, or do what they say.
    Goes on where the last campaign in the folder ended. The exit status is 1 if any
    case in it failed; `failures.jsonl` has each of them, and the smallest that fails.
    """
    if sanitizer is not None:
        given = {"hours": hours, "groups": groups, "seed": seed, "wait": wait}
        given |= {"out": out.resolve() / sanitizer, "only": "cpu"}
        arguments = [f"--{x}={y}" for x, y in given.items() if y is not None]
        command = ["-m", "tests.campaign", *arguments, *["--calls"] * calls]
        sys.exit(sanitize.run(sanitizer, command))
    run: Run = functools.partial(run_group, wait=wait, only=only)
    if calls:
        out, run = out / "calls", functools.partial(run_calls, wait=wait)
    record, progress = Record(out), Progress(next=seed or 0)
    if seed is None:
        progress, groups = record.load(), groups or sys.maxsize
        run_groups(record, progress, 3600 * hours, groups, run)
    else:
        failures = run(record, progress, seed)
        click.echo("\n".join(failures) or "nothing is wrong")
    click.echo(str(progress))
    for way, cases in sorted(progress.ways.items()):
        click.echo(f"  {way}: {cases:,}")
    if progress.failures:
        click.echo(f"FAILED: see {record.failures}")
    sys.exit(int(progress.failures > 0))


def run_groups(
    record: Record, progress: Progress, seconds: float, groups: int, run: Run
) -> None:
    """Runs group after group, and saves the progress after each."""
    start = last = time.monotonic()
    form = "{percentage:3.0f}% of the time, {elapsed} of it: {desc}"
    patience = 0.1 if sys.stderr.isatty() else 60.0  # seconds
    with tqdm(total=round(seconds), bar_format=form, mininterval=patience) as bar:
        for done in range(groups):
            if time.monotonic() - start > seconds:
                break
            record.begin(progress)
            for line in run(record, progress, progress.next):
                bar.write(line)
            now = time.monotonic()
            progress.seconds += now - last
            bar.set_description_str(str(progress), refresh=False)
            bar.update(min(round(now - start), bar.total) - bar.n)
            last = now
            record.end(progress)
            if done % GROUPS_BETWEEN_CLEARING == 0:
                check._program.cache_clear()
                jax.clear_caches()


def run_calls(record: Record, progress: Progress, seed: int, wait: float) -> list[str]:
    """Makes the calls of a seed; returns a line for each that failed."""
    with ended_after(wait):
        return wrong_calls.run_group(record, progress, seed)


def run_group(
    record: Record,
    progress: Progress,
    seed: int,
    wait: float,
    only: ImplementationName | None,
) -> list[str]:
    """Runs the cases of a seed; returns a line for each failure that was saved."""
    lines = []
    for case in draws.group(seed, only).cases():
        with ended_after(wait):
            outcome = check.run(case)
        progress.count(outcome)
        if outcome.failed and len(lines) < MOST_OF_A_GROUP:
            with ended_after(wait + SHRINK_SECONDS):
                smallest = shrink(outcome, SHRINK_SECONDS)
            saved = record.failed(seed, outcome, smallest)
            lines.append(f"seed {seed}: {saved['case']}: {saved['text']}")
    return lines


@contextlib.contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Ends the process, and says where it was, if the block takes longer."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
