"""The command line: `python -m sparse_adam.check`."""

import argparse
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from sparse_adam.check import batches
from sparse_adam.check.case import Case
from sparse_adam.check.cases import all_cases, left_out
from sparse_adam.check.report import Failure, Report
from sparse_adam.check.run import Outcome, run
from sparse_adam.check.shrink import shrink, ways_around
from sparse_adam.check.times import timings
from sparse_adam.ops import dispatch

SHRINK_SECONDS = {True: 20.0, False: 60.0}  # by --quick
MOST_IDS = 16  # that are printed


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    made = argparse.ArgumentParser(
        "python -m sparse_adam.check",
        description="Compares every implementation that runs here with the reference, "
        "times them, and writes a report to send along with an issue. The exit status "
        "is 1 if anything is wrong.",
    )
    made.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    made.add_argument(
        "--report",
        type=Path,
        default=Path("sparse_adam_check.txt"),
        metavar="PATH",
        help="the file to write, JSON if its name ends in .json [%(default)s]",
    )
    for name, what in (("only", "run"), ("skip", "leave out")):
        made.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="TEXT",
            help=f"{what} the cases whose line has this text; again for more",
        )
    made.add_argument("--no-times", action="store_true", help="time nothing")
    made.add_argument(
        "--wait",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="end the process if one case takes longer [%(default).0f]",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the check; returns the exit status."""
    given = parser().parse_args(arguments)
    start, report = time.monotonic(), Report(given.report, given.quick)
    try:
        report.begin()
    except (RuntimeError, OSError) as error:
        print(f"FAILED: JAX finds no device, or the report cannot be written: {error}")
        return 1
    platform = jax.default_backend()
    for case in all_cases(platform, jax.device_count(), given.quick):
        line = f"{case.way} {case}"
        if any(text in line for text in given.skip):
            continue
        if given.only and not any(text in line for text in given.only):
            continue
        with watched(report, line, given.wait):
            report.add(run(case))
    for line in not_run(platform, given.quick):
        report.say(line)
    for outcome in first_of_each_way(report.outcomes):
        with watched(report, f"shrinking {outcome.case.way}", given.wait):
            report.say(explained(outcome, SHRINK_SECONDS[given.quick]))
    if not given.no_times:
        with watched(report, "times", 3 * given.wait):
            for timing in timings(platform, given.quick):
                report.say(timing)
    report.starts("")
    report.end(time.monotonic() - start)
    return int(not report.verdict.startswith("PASSED"))


def not_run(platform: str, quick: bool) -> Iterator[str]:
    """Yields what is left out here, and why."""
    for one in dispatch.IMPLEMENTATIONS:
        reason = left_out(one, platform)
        if reason is not None:
            yield f"{one.name}: {reason}"
        elif not one.compiled_on(platform):
            some = "one case" if quick else "a few cases"
            yield f"{one.name}: interpreted off a TPU, slowly, so only {some} of it"
    if jax.device_count() == 1:
        yield "tables over several devices: there is one device"


def first_of_each_way(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Returns the first failure of each implementation, storage and kind."""
    first: dict[str, Outcome] = {}
    for outcome in outcomes:
        if outcome.failed:
            first.setdefault(f"{outcome.case.way} {outcome.case.kind}", outcome)
    return list(first.values())


def explained(outcome: Outcome, seconds: float) -> Failure:
    """Makes a failing case small, and looks for a way around it."""
    smallest = shrink(outcome, seconds)
    return Failure(
        outcome, smallest, ids_of(smallest.case), tuple(ways_around(outcome.case))
    )


def ids_of(case: Case) -> str:
    """Returns the ids of a small case."""
    if case.num_ids > MOST_IDS or case.kind == "mean":
        return ""
    return str(batches.batch(case, 0).ids.tolist())


@contextlib.contextmanager
def watched(report: Report, what: str, seconds: float) -> Iterator[None]:
    """Ends the process, with a report, if what it surrounds takes too long.

    A kernel that waits for ever cannot be interrupted from within.
    """

    def give_up() -> None:
        report.hung(what, seconds)
        os._exit(1)

    report.starts(what)
    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


if __name__ == "__main__":
    sys.exit(main())
