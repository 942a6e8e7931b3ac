"""How the sorted occurrences of a batch are shared out among vector subcores."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparse_adam._types import Gains, Indices
from sparse_adam.kernels.sparsecore_config import MARGIN, WINDOW


class Work(NamedTuple):
    """Sorted occurrences, filled up to whole chunks, and who takes which."""

    shares: jax.Array  # [WINDOW] int32: chunks of each worker; chunks with a valid id
    ids: jax.Array  # [MARGIN + chunks * C + MARGIN]; no id is -1, V is none
    sources: jax.Array  # [chunks * C]; -1 where there is no gradient
    gains: tuple[jax.Array, ...]  # () or [chunks * C]


def share_out(
    ids: Indices,
    sources: Indices,
    gains: Gains | None,
    num_rows: int,
    chunk: int,
    workers: int,
) -> Work:
    """Gives each worker equally many chunks, one after the other, of sorted ids.

    Grouped ids do as well, equal ones side by side; only trailing padding is left out.
    """
    filling = (0, pl.cdiv(ids.size, chunk) * chunk - ids.size)
    place = lax.iota(jnp.int32, ids.size)
    active = pl.cdiv(jnp.max(jnp.where(ids < num_rows, place + 1, 0)), chunk)
    share = pl.cdiv(active, workers)
    ids = jnp.pad(ids, filling, constant_values=num_rows)
    ids = jnp.pad(ids, (0, MARGIN), constant_values=num_rows)
    return Work(
        shares=jnp.pad(jnp.stack([share, active]), (0, WINDOW - 2)),
        ids=jnp.pad(ids, (MARGIN, 0), constant_values=-1),
        sources=jnp.pad(sources, filling, constant_values=-1),
        gains=() if gains is None else (jnp.pad(gains, filling),),
    )


def split_runs(work: Work, num_rows: int, chunk: int, workers: int) -> Indices:
    """The ids whose runs go from one worker's range into another's: [2 * workers].

    Place 2w is the id of worker w's head, the run that it begins in the middle of;
    2w + 1 is its tail, a run that it begins but does not end. V where there is none.
    """
    share, active = work.shares[0], work.shares[1]
    edges = jnp.minimum(lax.iota(jnp.int32, workers + 1) * share, active)
    before = work.ids[MARGIN + edges * chunk - 1]
    after = work.ids[MARGIN + edges * chunk]
    split = (before == after) & (after < num_rows)
    works = edges[:-1] < edges[1:]
    head = jnp.where(split[:-1] & works, after[:-1], num_rows)
    tail = jnp.where(split[1:] & works & (before[1:] != head), before[1:], num_rows)
    return jnp.stack([head, tail], axis=1).reshape(-1)
