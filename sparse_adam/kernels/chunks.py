"""Occurrences cut into chunks, as row kernels read them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparse_adam._types import Gains, Indices


class Chunks(NamedTuple):
    """The occurrences, C to a chunk: [chunks, 1, C] unless said otherwise."""

    active: jax.Array  # [1]: chunks up to the last one that holds a valid id
    counts: jax.Array  # [chunks]: rows to update, that is, runs that end in the chunk
    has_runs: jax.Array  # [chunks]: 1 if some row has more than one gradient
    rows: jax.Array  # the table rows to update, in the first `counts` places
    ends: jax.Array  # where in the chunk the run of each of those rows ends
    sources: jax.Array  # gradient row of each occurrence
    ids: jax.Array  # id of each occurrence
    weights: tuple[jax.Array, ...]  # (), or gains and 1 where a gradient counts


def split_into_chunks(
    ids: Indices, sources: Indices, gains: Gains | None, num_rows: int, size: int
) -> Chunks:
    """Cuts occurrences into chunks of `size`, the last one filled with the id V.

    Equal ids must stand side by side; an id V is passed over wherever it stands.
    """
    num_chunks = pl.cdiv(ids.size, size)

    def split(x: jax.Array, fill: int) -> jax.Array:
        x = jnp.pad(x, (0, num_chunks * size - x.size), constant_values=fill)
        return x.reshape(num_chunks, 1, size)

    # A run of equal ids ends where the next id differs. The rows of a chunk are moved
    # to its front by a sort of C keys, which a TPU does much faster than a scatter.
    following = jnp.append(ids[1:], jnp.int32(num_rows))
    is_end = split((ids != following) & (ids < num_rows), fill=False)
    lane = lax.broadcasted_iota(jnp.int32, is_end.shape, 2)
    ends, rows = lax.sort(
        (jnp.where(is_end, lane, lane + size), split(ids, num_rows)),
        num_keys=1,
        is_stable=False,
    )
    position = lax.iota(jnp.int32, ids.size)
    counts = is_end.sum(axis=(1, 2), dtype=jnp.int32)
    first = lax.iota(jnp.int32, num_chunks) * size
    continues = (first > 0) & (ids[first] == ids[first - 1])
    weights = ()
    if gains is not None:
        weights = (split(gains, 0), split((sources >= 0).astype(jnp.int32), 0))
    return Chunks(
        active=pl.cdiv(jnp.max(jnp.where(ids < num_rows, position + 1, 0)), size)[None],
        counts=counts,
        has_runs=((counts < size) | continues).astype(jnp.int32),
        rows=rows,
        ends=ends,
        sources=split(jnp.maximum(sources, 0), 0),
        ids=split(ids, num_rows),
        weights=weights,
    )
