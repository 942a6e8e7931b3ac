"""The command line: `python -m tests.mutants`."""

import dataclasses
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import click
from tqdm import tqdm

from tests.mutants import results
from tests.mutants.lists import AREAS, mutants
from tests.mutants.mutant import Mutant
from tests.mutants.results import Result, Results
from tests.mutants.tree import Tree

FAILED = 1  # pytest's status where tests failed; others are errors of another kind


@click.command()
@click.option("--area", type=click.Choice([*AREAS]), multiple=True)
@click.option("--only", default="", help="Run those whose line has this text.")
@click.option("--again", is_flag=True, help="Run those that have a result, too.")
@click.option("--seconds", default=120.0, help="After which a test is ended.")
@click.option("--minutes", default=1e9, help="Begin none after so long.")
@click.option("--table", is_flag=True, help="Only write the table in docs/testing.md.")
def main(
    area: tuple[str, ...],
    only: str,
    again: bool,
    seconds: float,
    minutes: float,
    table: bool,
) -> None:
    """Makes each fault of the lists in a copy of the repository, and runs its test.

    Results are kept in tests/mutants/results.json, and what has one is not run again.
    The exit status is 1 if any that was run survived.
    """
    found = Results.load()
    chosen = [
        (name, mutant)
        for name, mutant in mixed(area or AREAS)
        if only in f"{mutant} {mutant.test}" and (again or mutant.key not in found)
    ]
    bad = 0
    if chosen and not table:
        with tempfile.TemporaryDirectory() as folder:
            bad = run_all(chosen, found, Tree(Path(folder, "tree")), seconds, minutes)
    results.write_table(found)
    click.echo(results.table(found))
    sys.exit(int(bad > 0))


def mixed(areas: Iterable[str]) -> list[tuple[str, Mutant]]:
    """Returns the mutants with areas mixed, so that a part is a sample of each."""
    placed = [
        (place / len(mutants()[area]), area, mutant)
        for area in areas
        for place, mutant in enumerate(mutants()[area])
    ]
    placed.sort(key=lambda each: each[:2])
    return [(area, mutant) for _, area, mutant in placed]


def run_all(
    chosen: list[tuple[str, Mutant]],
    found: Results,
    tree: Tree,
    seconds: float,
    minutes: float,
) -> int:
    """Runs mutants, keeps each result, and returns how many were not killed."""
    start = time.monotonic()
    tqdm.monitor_interval = 0  # no thread, for what is forked
    for area, mutant in (bar := tqdm(chosen, unit="mutant")):
        if time.monotonic() - start > 60 * minutes:
            break
        result = run_one(area, mutant, tree, seconds)
        found.add(mutant.key, result)
        if result.status != "failed":
            bar.write(f"{result.status}: {mutant}\n  {mutant.test}\n  {result.text}")
    confirm(found, tree, seconds)
    ours = [found.by_key[m.key] for _, m in chosen if m.key in found]
    return sum(result.status != "killed" for result in ours)


def run_one(area: str, mutant: Mutant, tree: Tree, seconds: float) -> Result:
    """Makes a fault and runs its test."""
    begin = time.monotonic()
    try:
        with tree.mutated(mutant):
            status, text = tree.test(mutant.test, seconds=seconds)
        outcome = outcome_of(status, mutant)
    except ValueError as error:
        outcome, text = "broken", str(error)
    first = (*failed_in(text), mutant.test)[0]
    took = round(time.monotonic() - begin, 1)
    text = "" if outcome == "failed" else text[-800:]
    return Result(area, str(mutant), first, outcome, took, text)


def confirm(found: Results, tree: Tree, seconds: float) -> None:
    """Runs the tests that failed once more, without a fault: they must pass."""
    waiting = {key: x for key, x in found.by_key.items() if x.status == "failed"}
    for file in {x.test.partition("::")[0] for x in waiting.values()}:
        own = {key: x for key, x in waiting.items() if x.test.startswith(f"{file}::")}
        tests = sorted({x.test for x in own.values()})
        status, text = tree.test(*tests, seconds=seconds * len(tests), all_of_them=True)
        failing = [] if status == 0 else failed_in(text) or tests
        for key, result in own.items():
            sound = result.test not in failing
            status_now = "killed" if sound else "unsound"
            found.add(key, dataclasses.replace(result, status=status_now))


def failed_in(text: str) -> list[str]:
    """Returns the tests that pytest says have failed."""
    return re.findall(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - .*)?$", text, re.MULTILINE)


def outcome_of(status: int | None, mutant: Mutant) -> str:
    """Returns what a test says of a fault by its status; None is a timeout."""
    if status is None:
        return "failed" if mutant.hangs else "hung"
    if status == 0:
        return "survived"
    crashed = status < 0  # by a signal
    return "failed" if status == FAILED or crashed else "broken"


if __name__ == "__main__":
    # So that a copy, and a test that runs in it, do not outlive this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
