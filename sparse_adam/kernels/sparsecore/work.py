"""How the sorted occurrences of a batch are shared out among vector subcores."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparse_adam._types import Gains, Indices
from sparse_adam.kernels.sparsecore.config import MARGIN, Config


class SubcoreWork(NamedTuple):
    """Sorted occurrences, filled up to whole chunks, and who takes which."""

    # [3 * share_words] int32: of each worker the first occurrence, which ends the share
    # of the one before; the first chunk; the number of chunks.
    shares: jax.Array
    ids: jax.Array  # [MARGIN + chunks * C + MARGIN]; no id is -1, V is none
    sources: jax.Array  # [chunks * C]; -1 where there is no gradient
    gains: tuple[jax.Array, ...]  # () or [chunks * C]


def share_out(
    ids: Indices,
    sources: Indices,
    gains: Gains | None,
    num_rows: int,
    config: Config,
    workers: int,
    *,
    whole_runs: bool = False,
    run_length: int | None = None,
) -> SubcoreWork:
    """Gives each worker equally many chunks, one after the other, of sorted ids.

    Workers from number `workers` on get none. With `whole_runs` a worker leaves the run
    that it begins in the middle of to the one before, and goes on to the end of its
    last one. Grouped ids do as well as sorted ones, equal ones side by side; only
    trailing padding is left out. Where all runs have one `run_length`, and there is no
    padding, shares of whole runs are found by arithmetic.
    """
    chunk = config.chunk
    filling = (0, pl.cdiv(ids.size, chunk) * chunk - ids.size)
    place = lax.iota(jnp.int32, ids.size)
    used = jnp.max(jnp.where(ids < num_rows, place + 1, 0))
    if run_length is not None:
        used = jnp.int32(ids.size)
    active = pl.cdiv(used, chunk)
    share = pl.cdiv(active, workers)
    worker = lax.iota(jnp.int32, config.share_words)
    begin = jnp.minimum(worker * share, active) * chunk
    if run_length is not None:
        begin = jnp.minimum(pl.cdiv(begin, run_length) * run_length, active * chunk)
    elif whole_runs:
        before = ids[jnp.maximum(begin - 1, 0)]
        after = jnp.where(ids[None] == before[:, None], place[None] + 1, 0).max(axis=1)
        inside = (begin > 0) & (before < num_rows)
        begin = jnp.where(inside, jnp.maximum(begin, after), begin)
    end = jnp.append(begin[1:], begin[-1:])
    # Here, since divisions in the kernel cost its loops registers.
    first = begin // chunk
    chunks = jnp.where(begin < end, pl.cdiv(end, chunk) - first, 0)
    ids = jnp.pad(ids, filling, constant_values=num_rows)
    ids = jnp.pad(ids, (0, MARGIN), constant_values=num_rows)
    return SubcoreWork(
        shares=jnp.concatenate([begin, first, chunks]),
        ids=jnp.pad(ids, (MARGIN, 0), constant_values=-1),
        sources=jnp.pad(sources, filling, constant_values=-1),
        gains=() if gains is None else (jnp.pad(gains, filling),),
    )


def split_runs(work: SubcoreWork, num_rows: int, workers: int) -> Indices:
    """The ids whose runs go from one worker's range into another's: [2 * workers].

    Place 2w is the id of worker w's head, the run that it begins in the middle of;
    2w + 1 is its tail, a run that it begins but does not end. V where there is none.
    """
    edges = work.shares[: workers + 1]
    before = work.ids[MARGIN + edges - 1]
    after = work.ids[MARGIN + edges]
    split = (before == after) & (after < num_rows)
    works = edges[:-1] < edges[1:]
    head = jnp.where(split[:-1] & works, after[:-1], num_rows)
    tail = jnp.where(split[1:] & works & (before[1:] != head), before[1:], num_rows)
    return jnp.stack([head, tail], axis=1).reshape(-1)
