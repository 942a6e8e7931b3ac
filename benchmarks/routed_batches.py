"""Batches of ids for many chips, and what each chip would send and receive of them.

Nothing is compiled here. The counts are those that a chip gives to the ragged exchange:
the distinct ids of each chip, by owner, in the rounds that `ops.routing` makes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.steps import dlrm
from sparse_adam.ops.routing import Placement
from sparse_adam.ops.routing.rounds import Quota

ROWS = 100_000_000  # of the table of "uniform" and "zipf"
EXPONENT = 1.05  # of the power law
DISTRIBUTIONS = ("uniform", "zipf", "dlrm", "one owner")


@dataclass(frozen=True)
class Traffic:
    """What a chip sends and receives of one batch; the mean of all, and the most."""

    unique: float  # distinct ids of a chip
    received: float  # rows that others name to an owner
    most_received: int
    rounds: int


def table_rows(distribution: str) -> int:
    """Returns V of the table, or stack of tables, that the ids are for."""
    return sum(dlrm.ROWS) if distribution == "dlrm" else ROWS


def ids(
    distribution: str, size: int, placement: Placement, rng: np.random.Generator
) -> np.ndarray:
    """Draws the ids of one chip.

    "uniform" and "zipf" (a power law of exponent 1.05 over all rows, the first the most
    frequent) are for one table. "one owner" is uniform over the rows of shard 0. "dlrm"
    has the 26 tables of DLRM-v2 stacked, and `size // 214` samples of 214 ids: the
    first id of a feature follows the power law over its table, and the others of that
    feature are rows that a hash of the first one names, as in the benchmark's own
    synthetic data, where each id stands for a fixed set.
    """
    if distribution == "uniform":
        return rng.integers(0, placement.num_rows, size)
    if distribution == "zipf":
        return power_law(placement.num_rows, size, rng)
    if distribution == "one owner":
        local = rng.integers(0, placement.num_rows // placement.num_shards, size)
        return local * placement.num_shards if placement.interleaved else local
    drawn, offset = [], 0
    for rows, count in zip(dlrm.ROWS, dlrm.MULTI_HOT, strict=True):
        first = power_law(rows, max(1, size // sum(dlrm.MULTI_HOT)), rng)
        mixed = (first[:, None] * 2_654_435_761 + np.arange(count) * 40_503) % 2**31
        others = (mixed ^ mixed >> 15) * 2_246_822_519 % 2**31 % rows
        drawn.append(np.where(np.arange(count) == 0, first[:, None], others) + offset)
        offset += rows
    return np.concatenate([each.reshape(-1) for each in drawn])


def power_law(rows: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draws row k of `rows` with a probability about as `(k + 1) ** -EXPONENT`."""
    last = float(rows + 1) ** (1 - EXPONENT)
    drawn = (1 + rng.random(size) * (last - 1)) ** (1 / (1 - EXPONENT))
    return np.minimum(drawn.astype(np.int64) - 1, rows - 1)


def traffic(
    distribution: str, size: int, placement: Placement, quota: Quota, seed: int = 0
) -> Traffic:
    """Counts what the chips send each other of one batch of `size` ids on each."""
    chips, rows = placement.num_shards, placement.rows_per_shard
    bounds = np.arange(chips + 1) * rows

    def cuts(places: np.ndarray) -> np.ndarray:
        return np.searchsorted(places, bounds)

    sent = np.array(
        [np.diff(cuts(x)) for x in _places(distribution, size, placement, seed)]
    )
    received = sent.sum(0)
    late = np.flatnonzero((received > quota.total) | (sent.max(0) > quota.part))
    rounds = 1
    if late.size:
        asked: dict[int, list[np.ndarray]] = {int(owner): [] for owner in late}
        for places in _places(distribution, size, placement, seed):
            at = cuts(places)
            for owner, parts in asked.items():
                parts.append(places[at[owner] : at[owner + 1]])
        rounds = max(rounds_of(parts, quota) for parts in asked.values())
    return Traffic(
        unique=float(sent.sum(1).mean()),
        received=float(received.mean()),
        most_received=int(received.max()),
        rounds=rounds,
    )


def rounds_of(parts: list[np.ndarray], quota: Quota) -> int:
    """Counts the rounds in which an owner gets `parts`, one of each sender, ascending.

    A round ends at the largest row at which all fits, as in `ops.routing.rounds`.
    """
    together = np.sort(np.concatenate(parts))
    begin = [0] * len(parts)
    rounds = done = 0
    while done < together.size:
        ends = [
            part[b + quota.part]
            for part, b in zip(parts, begin, strict=True)
            if b + quota.part < part.size
        ]
        if done + quota.total < together.size:
            ends.append(together[done + quota.total])
        if ends:
            cut = min(ends)
            begin = [int(np.searchsorted(part, cut)) for part in parts]
            done = int(np.searchsorted(together, cut))
        else:
            done = together.size
        rounds += 1
    return rounds


def _places(
    distribution: str, size: int, placement: Placement, seed: int
) -> Iterator[np.ndarray]:
    """Yields for each chip the distinct places that it names, ascending."""
    n, rows = placement.num_shards, placement.rows_per_shard
    for chip in range(n):
        drawn = ids(distribution, size, placement, np.random.default_rng((seed, chip)))
        yield np.unique(
            drawn % n * rows + drawn // n if placement.interleaved else drawn
        )
