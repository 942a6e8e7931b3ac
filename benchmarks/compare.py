"""`python -m benchmarks compare A B`: two result files, or two commits."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import CONTENDERS
from benchmarks.options import choices_option, rounds_option
from benchmarks.results import ROOT, Results, Row
from benchmarks.statistics import Interval, ratio_of_medians
from benchmarks.update import CASES, QUICK

NOISE = 0.05  # a change below it is none, however sure


@dataclass(frozen=True)
class Change:
    """One contender in one case, before and after."""

    old: Row
    new: Row
    interval: Interval

    @property
    def verdict(self) -> str:
        """What is sure nine times in ten, and large enough to matter."""
        if self.interval.high < 1 - NOISE:
            return "faster"
        return "slower" if self.interval.low > 1 + NOISE else "same"


def changes(old: Results, new: Results) -> Iterator[Change]:
    """What both have timed."""
    before = {(row.case, row.impl): row for row in old.rows if row.ms}
    for row in new.rows:
        other = before.get((row.case, row.impl))
        if row.ms and other is not None:
            yield Change(other, row, ratio_of_medians(row.ms, other.ms))


def merged(runs: Sequence[Results]) -> Results:
    """Runs of the same cases as one: all their times together."""
    times: dict[tuple[str, str], tuple[float, ...]] = {}
    for row in (row for run in runs for row in run.rows):
        times[row.case, row.impl] = times.get((row.case, row.impl), ()) + row.ms
    first = runs[0]
    rows = []
    for row in first.rows:
        together = times[row.case, row.impl]
        middle = float(np.median(together)) if together else 0.0
        rows.append(replace(row, ms=together, p50_ms=middle))
    return replace(first, rows=tuple(rows))


@click.command()
@click.argument("a")
@click.argument("b")
@choices_option("--case", "cases", CASES, "A case of two commits", default=QUICK)
@choices_option(
    *("--impl", "impls", CONTENDERS, "A contender of two commits"),
    default=("cpu", "xla", "copy"),
)
@click.option(
    "--times",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Runs of each commit, in turn.",
)
@rounds_option("Timed calls in each run.", 9)
def compare(
    a: str,
    b: str,
    cases: tuple[str, ...],
    impls: tuple[str, ...],
    times: int,
    rounds: int,
) -> None:
    """Compare A with B: result files of `update` or `scale`, or commits.

    Commits are taken out of git into a temporary folder, their CPU kernel is compiled
    there, and today's benchmarks time them in turn; nothing in the working tree
    changes. The ratio of medians stands between the bounds of its 90 % interval.
    """
    files = [name for name in (a, b) if Path(name).is_file()]
    if len(files) == 1:
        raise click.ClickException(
            f"{files[0]} is a file and {b if files[0] == a else a} is none: compare "
            "two result files, or two commits"
        )
    if files:
        old, new = Results.read(Path(a)), Results.read(Path(b))
    else:
        options = [x for c in cases for x in ("--case", c)]
        options += [x for i in impls for x in ("--impl", i)]
        old, new = time_commits(a, b, [*options, "--rounds", f"{rounds}"], times)
    console = Console(highlight=False)
    found = list(changes(old, new))
    if not found:
        raise click.ClickException("they have no timed row in common")
    console.print(table(found, f"{a} and {b}"))
    if machine(old) != machine(new):
        console.print("They were not taken on the same machine.", style="red")


def machine(found: Results) -> tuple[object, ...]:
    """What has to be equal for times to be compared."""
    return tuple(found.machine.get(key) for key in ("device", "processor", "cores"))


def table(found: Sequence[Change], title: str) -> Table:
    """One line a contender and case."""
    columns = ("case", "update", "A, ms", "B, ms", "B / A", "90 %", "")
    result = Table(*columns, title=title)
    for column in result.columns[2:]:
        column.justify = "right"
    styles = {"faster": "green", "slower": "red", "same": ""}
    for change in found:
        low, ratio, high = change.interval
        result.add_row(
            change.new.case,
            change.new.title,
            f"{change.old.p50_ms:.2f}",
            f"{change.new.p50_ms:.2f}",
            f"{ratio:.2f}",
            f"{low:.2f} to {high:.2f}",
            change.verdict,
            style=styles[change.verdict],
        )
    return result


def time_commits(
    a: str, b: str, options: Sequence[str], times: int
) -> tuple[Results, Results]:
    """Times both in turn, so that a slow hour of the machine hits both."""
    with tempfile.TemporaryDirectory() as folder:
        trees = [
            _tree(commit, Path(folder, name)) for commit, name in ((a, "a"), (b, "b"))
        ]
        runs: tuple[list[Results], list[Results]] = ([], [])
        for turn in range(times):
            for commit, tree, own in zip((a, b), trees, runs, strict=True):
                out = tree / f"{turn}.json"
                command = [sys.executable, "-m", "benchmarks", "update", *options]
                # It reports failures by its status too; here they are rows.
                subprocess.run([*command, "--out", str(out)], cwd=tree, check=False)
                if not out.exists():
                    raise click.ClickException(
                        f"the benchmarks could not time commit {commit}; what they "
                        "said stands above"
                    )
                own.append(Results.read(out))
        return merged(runs[0]), merged(runs[1])


def _tree(commit: str, into: Path) -> Path:
    """The package of a commit, with the benchmarks of today."""
    command = [
        "git",
        "-C",
        str(ROOT),
        "archive",
        commit,
        "sparse_adam",
        "hatch_build.py",
    ]
    try:
        done = subprocess.run(command, capture_output=True)
    except FileNotFoundError as error:
        raise click.ClickException("two commits are compared by git") from error
    if done.returncode:
        words = done.stderr.decode().strip()
        raise click.ClickException(f"{commit} is no result file and no commit: {words}")
    with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        archive.extractall(into, filter="data")
    shutil.copytree(ROOT / "benchmarks", into / "benchmarks")
    # Without a compiler, or without hatchling, its rows will say that it is missing.
    subprocess.run([sys.executable, "hatch_build.py"], cwd=into, check=False)
    return into
