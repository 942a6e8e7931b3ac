"""Occurrences cut into chunks, as the TensorCore's row kernel reads them.

Rows that are moved together are a *group* (`layout`); plain rows are groups of one. A
*run* is a sequence of occurrences of one group: ids come sorted, so a group has one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparse_adam._types import Index, Operand
from sparse_adam.kernels.spec import SortedBatch, UpdateSpec


class Chunks(NamedTuple):
    """The occurrences, C to a chunk: [chunks, 1, C] unless said otherwise.

    Each chunk lists groups: where gradients are accumulated those whose runs end in it,
    which it fetches, updates and writes back; else those of all its runs, of which the
    first may have been fetched before, and the last be written back later.
    """

    active: jax.Array  # [1]: chunks up to the last one that holds a valid id
    counts: jax.Array  # [chunks]: groups listed
    continues: jax.Array  # [chunks + 1]: 1 if a run goes on from the chunk before
    groups: jax.Array  # the list, in the first `counts` places
    marks: jax.Array  # of each of them, where in the chunk its run ends; or
    #                   of each occurrence, the place of its group in the list, or -1
    sources: jax.Array  # gradient row of each occurrence
    owners: jax.Array  # group of each occurrence
    places: tuple[jax.Array, ...]  # (), or which row of its group each occurrence is of
    weights: tuple[jax.Array, ...]  # (), or gains and 1 where a gradient counts


class Moved(NamedTuple):
    """Which of the groups that a chunk lists it fetches, and writes back."""

    first: Any  # that it fetches; the one before came with an earlier chunk
    count: Any  # of those listed
    written: Any  # by this chunk; the one behind is written by a later chunk


def moved(counts: Operand, continues: Operand, chunk: Index, accumulate: bool) -> Moved:
    """What a chunk moves; in all of them, each group is moved in and out once."""
    count = counts[chunk]
    if accumulate:
        return Moved(0, count, count)
    return Moved(continues[chunk], count, count - continues[chunk + 1])


def split_into_chunks(batch: SortedBatch, spec: UpdateSpec, size: int) -> Chunks:
    """Cuts occurrences into chunks of `size`, the last one filled up with no group.

    Equal ids must stand side by side; an id V is passed over wherever it stands.
    """
    rows_per_group = spec.layout.rows_per_group
    num_chunks = pl.cdiv(batch.ids.size, size)
    none = pl.cdiv(spec.num_rows, rows_per_group)

    def split(x: jax.Array, fill: int) -> jax.Array:
        x = jnp.pad(x, (0, num_chunks * size - x.size), constant_values=fill)
        return x.reshape(num_chunks, 1, size)

    ids = batch.ids
    is_row = ids < spec.num_rows
    owners = jnp.where(is_row, lax.div(ids, jnp.int32(rows_per_group)), none)
    differs = owners[1:] != owners[:-1]
    is_start, is_end = jnp.append(True, differs), jnp.append(differs, True)
    lane = lax.broadcasted_iota(jnp.int32, (num_chunks, 1, size), 2)
    if spec.accumulate:
        listed = split(is_end & is_row, fill=False)
    else:
        listed = (split(is_start, fill=False) | (lane == 0)) & split(is_row, fill=False)
    # The list of a chunk is moved to its front by a sort of C keys, which a TPU does
    # much faster than a scatter.
    marks, groups = lax.sort(
        (jnp.where(listed, lane, lane + size), split(owners, none)),
        num_keys=1,
        is_stable=False,
    )
    if not spec.accumulate:
        order = jnp.cumsum(listed, axis=2, dtype=jnp.int32) - 1
        marks = jnp.where(split(is_row, fill=False), order, -1)
    first = lax.iota(jnp.int32, num_chunks) * size
    continues = ~is_start[first] & is_row[first]
    last = jnp.max(jnp.where(is_row, lax.iota(jnp.int32, ids.size), -1))
    places, weights = (), ()
    if rows_per_group > 1:
        places = (split(lax.rem(ids, jnp.int32(rows_per_group)), 0),)
    if batch.gains is not None:
        counted = (batch.sources >= 0).astype(jnp.int32)
        weights = (split(batch.gains, 0), split(counted, 0))
    return Chunks(
        active=pl.cdiv(last + 1, size)[None],
        counts=listed.sum(axis=(1, 2), dtype=jnp.int32),
        continues=jnp.append(continues, False).astype(jnp.int32),
        groups=groups,
        marks=marks,
        sources=split(jnp.maximum(batch.sources, 0), 0),
        owners=split(owners, none),
        places=places,
        weights=weights,
    )
