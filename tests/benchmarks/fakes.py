"""Contenders for the tests: right, wrong and broken, in NumPy and in no time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.contenders import Contender
from benchmarks.results import Results, Row
from benchmarks.workload import RATE, Workload
from sparse_adam.reference import sparse_adam_update

SMALL = Case("small", 60, 8, 40, "zipf")
ROW = Row("small", 60, 8, 40, "zipf", ("float32",) * 4, {}, "cpu", "ours")


class Reference:
    """The reference as a contender, its step scaled by `factor`."""

    compile_seconds = 0.5

    def __init__(
        self, workload: Workload, factor: float = 1.0, breaks_at: int = 99
    ) -> None:
        self._case = workload.case
        table, momenta, velocities = workload.first_state()
        self._state = (table, momenta, velocities)
        self._batches = workload.batches
        self._factor, self._breaks_at = factor, breaks_at

    def step(self, turn: int) -> Callable[[], Any]:
        def run() -> None:
            if turn >= self._breaks_at:
                raise RuntimeError("out of\n  order")
            batch = self._batches[turn % len(self._batches)]
            rate = RATE * self._factor
            self._state = sparse_adam_update(
                *self._state, *batch, learning_rate=rate, **self._case.options
            )

        return run

    def rows(self, turn: int, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(x[rows] for x in self._state)


def contender(name: str = "cpu", **changes: Any) -> Contender:
    return replace(Contender(name, f"the {name}", Reference), **changes)


def results(*rows: Row, **changes: Any) -> Results:
    return Results("update", {"rounds": 3}, rows, **changes)
