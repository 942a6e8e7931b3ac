"""Occurrences cut into chunks, as the TensorCore's row kernel reads them.

Rows that are moved together are a *group* (`layout`); plain rows are groups of one. A
*run* is a sequence of occurrences of one group: ids come sorted, so a group has one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparse_adam._types import Index, Operand
from sparse_adam.kernels.spec import SortedBatch, UpdateSpec

# XLA unrolls a sort: one of 256 chunks compiles for minutes for 7x, and issues no fewer
# bundles an id than eight of 32.
_SORTED_AT_ONCE = 32


class Chunks(NamedTuple):
    """The occurrences, C to a chunk: [chunks, 1, C] unless said otherwise.

    Each chunk lists groups: where gradients are accumulated those whose runs end in it,
    which it fetches, updates and writes back; else those of all its runs, of which the
    first may have been fetched before, and the last be written back later.

    Where gradients are accumulated, a chunk is put in an order of its own: first the
    occurrences that end a run, so that each stands where its group is listed; then the
    others, in the order of the batch, which are to be added to them; then what is of
    no row. Of a run that goes on in the next chunk the last one is what the others of
    the run are added to, and stands behind them. All arrays follow that order.
    """

    bounds: jax.Array  # [cores + 1]: each core's first chunk, and its end
    counts: jax.Array  # [chunks]: groups listed
    continues: jax.Array  # [chunks + 1]: 1 if a run goes on from the chunk before
    groups: jax.Array  # the list, in the first `counts` places
    repeats: jax.Array  # [chunks]: occurrences to be added to others
    marks: jax.Array  # of each of those, behind the list, what it is added to; or
    #                   of each occurrence, the place of its group in the list, or -1
    sources: jax.Array  # gradient row of each occurrence
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


def split_into_chunks(
    batch: SortedBatch, spec: UpdateSpec, size: int, cores: int = 1
) -> Chunks:
    """Cuts occurrences into chunks of `size`, filled up with no group.

    Equal ids must stand side by side; an id V is passed over wherever it stands. Of two
    cores each gets about half of the occurrences, and none gets part of a run.
    """
    rows_per_group, cuts = spec.layout.rows_per_group, ()
    if cores > 1:
        batch, cut = _part(batch, spec, size)
        cuts = (cut,)
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
    counts_here = split(is_row, fill=False)
    first = lax.iota(jnp.int32, num_chunks) * size
    continues = jnp.append(~is_start[first] & is_row[first], False).astype(jnp.int32)
    if spec.accumulate:
        listed = split(is_end & is_row, fill=False)
    else:
        listed = (split(is_start, fill=False) | (lane == 0)) & counts_here
    counts = listed.sum(axis=(1, 2), dtype=jnp.int32)
    repeats = counts_here.sum(axis=(1, 2), dtype=jnp.int32) - counts - continues[1:]
    marks = jnp.cumsum(listed, axis=2, dtype=jnp.int32)
    if spec.accumulate:
        # An occurrence goes to the end of its run, which the next one listed is; if
        # none is, to the last one of the chunk.
        last_of_open = (counts + repeats)[:, None, None]
        marks = jnp.where(marks < counts[:, None, None], marks, last_of_open)
    else:
        marks = jnp.where(counts_here, marks - 1, -1)
    last = jnp.max(jnp.where(is_row, lax.iota(jnp.int32, ids.size), -1))
    sources, places, weights = _each(batch, rows_per_group, split)
    # A chunk is put in order by a sort of C keys, which a TPU does much faster than a
    # scatter.
    keys = jnp.where(listed, lane, jnp.where(counts_here, lane + size, lane + 2 * size))
    groups = split(owners, none)
    if spec.accumulate:
        keyed = (groups, marks, sources, places, weights)
        groups, marks, sources, places, weights = _sort(keys, keyed)
    else:
        groups = _sort(keys, groups)
    bounds = jnp.stack([jnp.int32(0), *cuts, pl.cdiv(last + 1, size)])
    return Chunks(
        *(bounds, counts, continues, groups, repeats, marks),
        *(sources, places, weights),
    )


def _each(
    batch: SortedBatch, rows_per_group: int, split: Callable[..., jax.Array]
) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Returns the sources, the places and the weights of occurrences, in chunks."""
    places, weights = (), ()
    if rows_per_group > 1:
        places = (split(lax.rem(batch.ids, jnp.int32(rows_per_group)), 0),)
    if batch.gains is not None:
        counted = (batch.sources >= 0).astype(jnp.int32)
        weights = (split(batch.gains, 0), split(counted, 0))
    return split(jnp.maximum(batch.sources, 0), 0), places, weights


def _part(
    batch: SortedBatch, spec: UpdateSpec, size: int
) -> tuple[SortedBatch, jax.Array]:
    """Parts a batch where the run nearest to its middle begins.

    Before it, ids of no row fill up a chunk. Returns the batch, one chunk longer, and
    the number of the chunk that the second part begins with.
    """
    num_ids, rows_per_group = batch.ids.size, jnp.int32(spec.layout.rows_per_group)
    is_row = batch.ids < spec.num_rows
    groups = jnp.where(is_row, lax.div(batch.ids, rows_per_group), -1)
    begins = jnp.append(True, groups[1:] != groups[:-1])
    place = lax.iota(jnp.int32, num_ids)
    middle = (jnp.max(jnp.where(is_row, place, -1)) + 1) // 2
    cut = jnp.argmin(jnp.where(begins, abs(place - middle), num_ids)).astype(jnp.int32)
    filled = lax.rem(size - lax.rem(cut, size), size)
    longer = size * (pl.cdiv(num_ids, size) + 1)
    place = lax.iota(jnp.int32, longer)

    def part(x: jax.Array, filling: int) -> jax.Array:
        x = jnp.pad(x, (size, longer - num_ids), constant_values=filling)
        before, after = x[size:], lax.dynamic_slice(x, (size - filled,), (longer,))
        gap = jnp.where(place < cut + filled, jnp.array(filling, x.dtype), after)
        return jnp.where(place < cut, before, gap)

    gains = None if batch.gains is None else part(batch.gains, 0)
    parted = batch._replace(
        ids=part(batch.ids, spec.num_rows), sources=part(batch.sources, 0), gains=gains
    )
    return parted, pl.cdiv(cut, size)


def _sort(keys: jax.Array, arrays: Any) -> Any:
    """Puts the arrays, whatever holds them, in the order of distinct keys."""
    leaves, tree = jax.tree.flatten(arrays)

    def sort_chunk(words: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(lax.sort(words, num_keys=1, is_stable=False))

    _, *leaves = lax.map(sort_chunk, (keys, *leaves), batch_size=_SORTED_AT_ONCE)
    return jax.tree.unflatten(tree, leaves)
