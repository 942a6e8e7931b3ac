"""What every contender is asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from benchmarks.cases import Case
from benchmarks.workload import RATE, Rows, TimedBatch, Workload
from sparse_adam.reference import sparse_adam_update as reference_update


class Running(Protocol):
    """A contender at work: compiled, with states of its own or shared ones."""

    compile_seconds: float

    def step(self, turn: int) -> Callable[[], Any]:
        """Gets ready for the turn; what it returns is timed, and waits for the result.

        Turn t is for batch t and state t, each modulo how many there are.
        """
        ...

    def rows(self, turn: int, rows: np.ndarray) -> Rows:
        """The present values of some rows of the state of that turn."""
        ...


# The rows after a first update, from the rows before and a batch of their ids and
# gradients.
Expected = Callable[[Rows, TimedBatch, Case], Rows]


def adam(rows: Rows, batch: TimedBatch, case: Case) -> Rows:
    """What one update should do, by the reference."""
    w, m, v = rows
    return reference_update(w, m, v, *batch, learning_rate=RATE, **case.options)


def anything(case: Case) -> str | None:
    """Objects to no case."""
    del case


def plain_only(case: Case) -> str | None:
    """What those object to that know lazy float32 Adam and nothing else."""
    if case.options:
        return f"written without {', '.join(case.options)}"
    if set(case.dtypes) != {"float32"}:
        return "written for float32"
    return None


@dataclass(frozen=True)
class Contender:
    """An update to be timed."""

    name: str  # for `--impl`
    title: str  # for tables and figures
    start: Callable[[Workload], Running]
    unsupported: Callable[[Case], str | None] = plain_only  # a reason to leave it out
    expected: Expected | None = adam  # None: no update, nothing to be checked
    slots: float = 2  # rows beside the weight, for `least_bytes`
    moves: float | None = None  # bytes, where it is no update
    host_only: bool = False  # runs on the CPU, whatever accelerator there is
