"""The report of a check: versions, the chip and results, and nothing of the user's."""

import dataclasses
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import sparse_adam
from sparse_adam.check.run import Outcome
from sparse_adam.check.times import Timing
from sparse_adam.kernels import chips
from sparse_adam.kernels.cpu import library
from sparse_adam.ops.explain import explain

_PACKAGES = ("jax", "jaxlib", "libtpu", "numpy", "ml_dtypes")
_LONGEST = 4000  # characters of an exception in the file
_WIDTH = 19  # of the name of a way to run an update


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """A case that failed, made small.

    Attributes:
        found: the case as it was listed.
        smallest: the smallest one that still fails.
        ids: of its first batch, as text.
        around: the arguments that avoid it; empty where nothing tried does.
    """

    found: Outcome
    smallest: Outcome
    ids: str
    around: tuple[str, ...]

    def lines(self) -> list[str]:
        """Returns the failure as lines of text.

        The case, the smallest one that still fails with its ids and its fault, and the
        arguments that avoid it.
        """
        small = self.smallest.case
        lines = [f"{self.found.case.way}: {self.found.case}"]
        lines += [f"  smallest case that fails: {small}"]
        lines += [f"    ids={self.ids}"] if self.ids else []
        lines += [f"    {self.smallest.text}"]
        helps = " or ".join(self.around)
        lines += [f"  avoided by {helps}" if helps else "  nothing tried avoids it"]
        return lines


@dataclasses.dataclass(slots=True)
class Report:
    """What was found so far; each new line is printed, and the file written anew.

    So the file is of use also where a case never ends, or ends the process.
    """

    path: Path
    quick: bool
    head: dict[str, str] = dataclasses.field(default_factory=dict)
    chosen: str = ""
    outcomes: list[Outcome] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    failures: list[Failure] = dataclasses.field(default_factory=list)
    timings: list[Timing] = dataclasses.field(default_factory=list)
    running: str = ""
    verdict: str = ""

    def begin(self) -> None:
        """Looks at the machine, and says what it is."""
        self.head = describe()
        self.chosen = choice()
        for line in self._head_lines():
            print(line)
        self.save()

    def starts(self, what: str) -> None:
        """Puts down what is about to run."""
        self.running = what
        self.save()

    def add(self, outcome: Outcome) -> None:
        """Prints the line of a case and keeps its outcome for the file.

        The file itself is written when the next case starts: `starts` saves it.
        """
        self.outcomes.append(outcome)
        print(line_of(outcome), flush=True)
        self.running = ""

    def say(self, record: Failure | Timing | str) -> None:
        """Adds a failure, a time, or what was left out."""
        if isinstance(record, Failure):
            self.failures.append(record)
            print("\n".join(map(own_text, record.lines())), flush=True)
        elif isinstance(record, Timing):
            self.timings.append(record)
            print(own_text(f"time     {record}"), flush=True)
        else:
            self.left_out.append(record)
            print(own_text(f"not run  {record}"), flush=True)
        self.save()

    @property
    def failed(self) -> bool:
        """Whether anything went wrong so far."""
        return any(one.failed for one in self.outcomes) or any(
            one.error for one in self.timings
        )

    def end(self, seconds: float) -> None:
        """Gives the verdict, prints it, and writes the file for the last time.

        A check has passed if at least one case ran, none failed, and every update could
        be timed.

        Args:
            seconds: that the whole check took.
        """
        wrong = sum(one.failed for one in self.outcomes)
        right = sum(one.status == "ok" for one in self.outcomes)
        untimed = sum(bool(one.error) for one in self.timings)
        took = f"in {seconds:.0f} s"
        if self.failed:
            parts = [f"{wrong} of {wrong + right} cases failed"] if wrong else []
            parts += [f"{untimed} updates could not be timed"] if untimed else []
            self.verdict = f"FAILED: {' and '.join(parts)}, {took}."
        elif not right:
            self.verdict = f"FAILED: no case ran, {took}."
        else:
            self.verdict = f"PASSED: all {right} cases are right, {took}."
        print(f"\n{self.verdict}")
        self.save()
        print(f"The report is in {self.path}; send it along with an issue.")

    def hung(self, what: str, seconds: float) -> None:
        """Gives the verdict that a case does not end."""
        self.verdict = (
            f"FAILED: no answer after {seconds:.0f} s from {what}. The process was "
            f"ended. Run again with --skip {what!r} to check the rest."
        )
        print(f"\n{self.verdict}", flush=True)
        self.save()

    def save(self) -> None:
        """Writes the file: JSON if its name ends so, else text."""
        if self.path.suffix == ".json":
            text = json.dumps(self._record(), indent=1)
        else:
            text = "\n".join(self._lines())
        self.path.write_text(f"{text}\n", encoding="utf-8")

    def _head_lines(self) -> list[str]:
        lines = [f"{name}: {value}" for name, value in self.head.items()]
        return [*lines, "", *self.chosen.splitlines(), ""]

    def _lines(self) -> list[str]:
        lines = self._head_lines()
        lines += map(line_of, self.outcomes)
        lines += [own_text(f"not run  {reason}") for reason in self.left_out]
        lines += ["", *(own_text(f"time     {one}") for one in self.timings)]
        for failure in self.failures:
            lines += ["", *map(own_text, failure.lines())]
        lines += [f"running  {self.running}"] if self.running else []
        return [*lines, "", self.verdict or "not at its end"]

    def _record(self) -> dict[str, Any]:
        return {
            "machine": self.head,
            "chosen": self.chosen,
            "cases": [
                {
                    "way": one.case.way,
                    "case": str(one.case),
                    "status": one.status,
                    "error": str(one.comparison.error),
                    "bound": str(one.comparison.bound),
                    "text": own_text(one.text),
                    "seconds": round(one.seconds, 3),
                }
                for one in self.outcomes
            ],
            "left_out": [own_text(line) for line in self.left_out],
            "failures": [list(map(own_text, one.lines())) for one in self.failures],
            "times": [dataclasses.asdict(one) for one in self.timings],
            "running": self.running,
            "verdict": self.verdict,
        }


def line_of(outcome: Outcome) -> str:
    """Returns the line of a case: status, what ran, the case, and what came of it.

    That is "exact", the largest error beside its bound, or the text of what is wrong.
    """
    case, found = outcome.case, outcome.comparison
    line = f"{outcome.status:<8} {case.way:<{_WIDTH}} {case}"
    if outcome.status != "ok":
        return own_text(f"{line}: {outcome.text}")
    if found.bound == 0:
        return f"{line}: exact"
    return f"{line}: error {found.error:.1e}, bound {found.bound:.1e}"


def own_text(text: str) -> str:
    """Returns a text in one line of bounded length, without paths and host names."""
    for private, instead in ((str(Path.home()), "~"), (platform.node(), "host")):
        if len(private) > 1:
            text = text.replace(private, instead)
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return "\n    ".join(text.splitlines())


def describe() -> dict[str, str]:
    """Returns the versions and the kind of the machine."""
    versions = {"sparse_adam": sparse_adam.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    devices = jax.devices()
    chip = chips.in_scope()
    return {
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items()),
        "python": f"{platform.python_version()} on {sys.platform} "
        f"{platform.machine()}, {os.cpu_count()} cores",
        "devices": f"{len(devices)} of kind {devices[0].device_kind}, platform "
        f"{jax.default_backend()}"
        + (f", chip {chip.name}" if chip is not chips.UNKNOWN else ""),
        "C++ kernel": own_text(library.missing() or "there"),
    }


def choice() -> str:
    """Returns what an update of a table of a usual size would run here, and why."""
    table = jax.ShapeDtypeStruct((1_000_000, 128), jnp.float32)
    ids = jax.ShapeDtypeStruct((65_536,), jnp.int32)
    grads = jax.ShapeDtypeStruct((65_536, 128), jnp.float32)
    said = own_text(explain(table, table, table, ids, grads))
    return f"By default, for V=1,000,000 D=128 N=65,536:\n    {said}"
