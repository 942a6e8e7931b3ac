"""Whether a contender computes what it should: before its first timed call, always."""

import numpy as np

from benchmarks.contenders import Contender, Running
from benchmarks.workload import Rows, TimedBatch, Workload, valid

TOUCHED = 256  # rows that are compared, and the untouched ones beside them
UNTOUCHED = 32
EPSILON = {2: 2.0**-7, 4: 2.0**-22}  # four half units in the last place, by item size


class WrongResultError(Exception):
    """What was computed is not what the reference computes."""


def check(contender: Contender, running: Running, workload: Workload) -> None:
    """Makes the first update, of the full size, and compares a sample of its rows.

    The reference is for small arrays: it gets the sampled rows and their occurrences.
    A row depends on nothing else, so what it returns is what the rows should be.
    """
    if contender.expected is None:
        running.step(0)()
        return
    batch, case = workload.batches[0], workload.case
    sample = sampled_rows(batch, workload)
    before = _copied(running.rows(0, sample))
    running.step(0)()
    after = _copied(running.rows(0, sample))
    expected = contender.expected(before, restricted(batch, sample), case)
    names = ("table", "momenta", "velocities")
    for name, *arrays in zip(names, after, before, expected, strict=False):
        compare(name, *arrays)


def sampled_rows(batch: TimedBatch, workload: Workload) -> np.ndarray:
    """Rows to look at, ascending: the most frequent, some others, some untouched."""
    rng = np.random.default_rng(0)
    ids = batch.ids[valid(batch.ids, workload.case)]
    touched, counts = np.unique(ids, return_counts=True)
    untouched = np.setdiff1d(rng.integers(0, workload.case.num_rows, 1000), touched)
    parts = (
        touched[np.argmax(counts)][None] if touched.size else touched,
        rng.choice(touched, min(TOUCHED, touched.size), replace=False),
        untouched[:UNTOUCHED],
    )
    return np.unique(np.concatenate(parts))


def restricted(batch: TimedBatch, sample: np.ndarray) -> TimedBatch:
    """The occurrences of the sampled rows, by their place in the sample."""
    at = np.minimum(np.searchsorted(sample, batch.ids), len(sample) - 1)
    inside = sample[at] == batch.ids
    return TimedBatch(at[inside], batch.grads[inside])


def compare(name: str, got: np.ndarray, old: np.ndarray, want: np.ndarray) -> None:
    """Compares steps, not values: a wrong step hides in a large weight.

    Allowed are a thousandth of the largest step in the row, for sums made in another
    order, and some units in the last place. A row that should keep its bits must.
    """
    unit = EPSILON[got.dtype.itemsize]
    size, before = want.astype(np.float64), old.astype(np.float64)
    step = np.abs(size - before)
    if step.ndim == 1:
        step = step[:, None]
    largest = step.max(axis=1).reshape(-1, *[1] * (got.ndim - 1))
    allowed = 1e-3 * largest + unit * np.abs(size) * (largest > 0)
    wrong = ~(np.abs(got.astype(np.float64) - size) <= allowed)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise WrongResultError(
            f"{name}: {wrong.sum()} of {wrong.size} sampled numbers are wrong; the "
            f"first was {before[at]:.7g}, is {got[at]:.7g}, should be {size[at]:.7g}"
        )


def _copied(rows: Rows) -> Rows:
    """Not views: the update will be in place."""
    return tuple(np.array(x) for x in rows)
