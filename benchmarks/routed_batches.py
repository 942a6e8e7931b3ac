"""Batches of ids for many chips, and what each chip would send and receive of them.

Nothing is compiled here. The counts are those that a chip gives to the ragged exchange:
the distinct ids of each chip, by owner, in the rounds that `ops.routing` makes.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jax.sharding import AbstractMesh

from benchmarks.steps import dlrm
from sparse_adam.embedding import Adam, FeatureConfig, TableConfig
from sparse_adam.embedding.stacks import Stack
from sparse_adam.embedding.tables import make_layout
from sparse_adam.ops.routing import Placement
from sparse_adam.ops.routing.exchange import LANES
from sparse_adam.ops.routing.rounds import Quota, message_words
from sparse_adam.ops.spread import Spread

ROWS = 100_000_000  # of the table of "uniform" and "zipf"
EXPONENT = 1.05  # of the power law
IDS_OF_SAMPLE = sum(dlrm.MULTI_HOT)
DISTRIBUTIONS = ("uniform", "zipf", "dlrm", "one owner")
CONTIGUOUS = ("zipf",)  # to be placed contiguously, too, which tells why not


@dataclass(frozen=True)
class Traffic:
    """What a chip sends and receives of one batch; the mean of all, and the most."""

    unique: float  # distinct ids of a chip
    received: float  # rows that others name to an owner
    most_received: int
    rounds: int


def table_rows(distribution: str, chips: int) -> int:
    """Returns V of the table, or stack of tables, that the ids are for."""
    return dlrm_stack(chips).num_rows if distribution == "dlrm" else ROWS


@functools.cache
def dlrm_stack(chips: int) -> Stack:
    """Returns the stack that the embedding API makes of the tables of DLRM-v2."""
    tables = [
        TableConfig(rows, 128, name=f"table_{number}")
        for number, rows in enumerate(dlrm.ROWS)
    ]
    spread = Spread(AbstractMesh((chips,), ("chip",)), ("chip",))
    features = [FeatureConfig(table) for table in tables]
    (stack,) = make_layout(features, Adam(), stack=True, spread=spread).stacks
    return stack


def ids(
    distribution: str, size: int, placement: Placement, rng: np.random.Generator
) -> np.ndarray:
    """Draws the ids of one chip.

    "uniform" and "zipf" (a power law of exponent 1.05 over all rows, the first the most
    frequent) are for one table. "one owner" is uniform over the rows of shard 0. "dlrm"
    has the stack of the 26 tables of DLRM-v2, and `size // 214` samples of 214 ids. As
    in the data that MLPerf trains on (github.com/facebookresearch/dlrm,
    torchrec_dlrm/multi_hot.py, "uniform"), the first id of a feature is that of the
    click log, and stands for a fixed set of others that are uniform over the table:
    here a hash of the first names them. The click log is not at hand, so first ids
    follow the power law over their table.
    """
    if distribution == "uniform":
        return rng.integers(0, placement.num_rows, size)
    if distribution == "zipf":
        return power_law(placement.num_rows, size, rng)
    if distribution == "one owner":
        local = rng.integers(0, placement.num_rows // placement.num_shards, size)
        return local * placement.num_shards if placement.interleaved else local
    drawn, offsets = [], dlrm_stack(placement.num_shards).offsets
    for offset, rows, count in zip(offsets, dlrm.ROWS, dlrm.MULTI_HOT, strict=True):
        first = power_law(rows, max(1, size // IDS_OF_SAMPLE), rng)
        mixed = (first[:, None] * 2_654_435_761 + np.arange(count) * 40_503) % 2**31
        others = (mixed ^ mixed >> 15) * 2_246_822_519 % 2**31 % rows
        drawn.append(np.where(np.arange(count) == 0, first[:, None], others) + offset)
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


def message_bytes(quota: Quota, shards: int) -> int:
    """Returns what a device receives besides rows and gradients, in one round on a TPU.

    One message of ids and one count from each device; a count takes a line of lanes.
    """
    return 4 * shards * (message_words(quota) + LANES)


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
