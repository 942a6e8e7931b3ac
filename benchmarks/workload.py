"""What is to be done in a case: batches, first states, and the bytes that it takes."""

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from benchmarks import cases
from benchmarks.cases import Case, dtype

BATCHES = 4  # different ones, in turn
ROTATED = 2**28  # bytes that the states in rotation have at least: more than a cache
RATE = 1e-3
Rows = tuple[np.ndarray, ...]  # some rows of the table and of its slots


class TimedBatch(NamedTuple):
    """The arguments of one update."""

    ids: np.ndarray  # [N]
    grads: np.ndarray  # [N, D]


@dataclass(frozen=True, eq=False)
class Workload:
    """A case with its arrays, on the host."""

    case: Case
    batches: tuple[TimedBatch, ...]
    shared: dict[str, Any] = field(default_factory=dict)  # tables, by framework

    @classmethod
    def of(cls, case: Case) -> "Workload":
        """The workload of a case, the same one every time."""
        if case.weighted:
            raise ValueError(f"{case.name}: weighted cases are not timed")
        return cls(case, tuple(_batch(case, seed) for seed in range(BATCHES)))

    @functools.cached_property
    def unique(self) -> float:
        """The rows that a batch touches, on average."""
        touched = (np.unique(ids[valid(ids, self.case)]) for ids, _ in self.batches)
        return float(np.mean([rows.size for rows in touched]))

    @functools.cached_property
    def copies(self) -> int:
        """How many states take turns, so that none of them stays in a cache."""
        state = self.case.num_rows * row_bytes(self.case)
        return max(1, -(-ROTATED // state))

    def first_state(self) -> Rows:
        """Table, momenta and velocities: a block of random rows, again and again."""
        rng = np.random.default_rng(self.case.num_rows)
        block = (min(4099, self.case.num_rows), self.case.dim)
        made = (
            rng.standard_normal(block, np.float32),
            rng.standard_normal(block, np.float32),
            rng.uniform(0.25, 1, block),
        )
        shape = (self.case.num_rows, self.case.dim)
        return tuple(
            np.resize(x.astype(dtype(name)), shape)
            for x, name in zip(made, self.case.dtypes, strict=False)
        )

    def least_bytes(self, slots: float = 2) -> float:
        """Bytes that any implementation moves at least.

        Ids and gradients are read once, and each row to be updated is read and written
        once: a weight with its two slots (or so many as another optimizer has). That is
        every row for `lazy_adam=False`, otherwise those that occur in the batch.
        """
        case = self.case
        rows = self.unique if case.options.get("lazy_adam", True) else case.num_rows
        grads = case.num_ids * case.dim * dtype(case.dtypes[3]).itemsize
        weight, slot, *_ = (case.dim * dtype(name).itemsize for name in case.dtypes)
        return 4 * case.num_ids + grads + 2 * rows * (weight + slots * slot)


def row_bytes(case: Case) -> int:
    """Of a weight row and its slots together."""
    return case.dim * sum(dtype(name).itemsize for name in case.dtypes[:3])


def valid(ids: np.ndarray, case: Case) -> np.ndarray:
    """Which ids name a row."""
    return (ids >= 0) & (ids < case.num_rows)


def _batch(case: Case, seed: int) -> TimedBatch:
    rng = np.random.default_rng(seed)
    size = (case.num_rows, case.num_ids, case.repeats)
    ids = cases.ids(rng, case.distribution, *size)
    grads = rng.standard_normal((case.num_ids, case.dim), np.float32)
    return TimedBatch(ids, grads.astype(dtype(case.dtypes[3])))
