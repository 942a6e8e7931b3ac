"""The distinct rows of a batch on one device, and the sums of their gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparse_adam.ops.sorting import sort_pairs


class UniqueRows(NamedTuple):
    """The distinct places that N occurrences of ids name, and who names which.

    Attributes:
        places: int32 `[N]`, the distinct places in ascending order, then the place of
            padding until the end.
        order: int32 `[N]`, the occurrences in ascending order of their places; equal
            places keep the order of the batch.
        runs: int32 `[N]`, for each of the occurrences in that order, the index of its
            place in `places`.
        inverse: int32 `[N]`, the same for the occurrences in the order of the batch.
            Padding has an index, too: that of the first unused entry of `places`.
    """

    places: jax.Array
    order: jax.Array
    runs: jax.Array
    inverse: jax.Array


def unique_rows(places: jax.Array, end: int) -> UniqueRows:
    """Returns the distinct ones of `places`, int32 `[N]` in `[0, end]`.

    Sorts replace every gather and scatter of N scalars: on a TPU a sort of 32-bit words
    costs a fraction of a bundle a word, and a gather about five.
    """
    size = places.size
    position = lax.iota(jnp.int32, size)
    ascending, order = sort_pairs(places, position, end + 1, size)
    starts = jnp.append(jnp.ones((1,), bool), ascending[1:] != ascending[:-1])[:size]
    runs = jnp.cumsum(starts, dtype=jnp.int32) - 1
    distinct = lax.sort(jnp.where(starts, ascending, jnp.int32(end)))
    _, inverse = sort_pairs(order, runs, size, size)
    return UniqueRows(distinct, order, runs, inverse)


def sum_runs(unique: UniqueRows, grads: jax.Array) -> jax.Array:
    """Sums the gradients `[N, D]` of equal places, in float32.

    Returns `[N, D]`, the sums in the order of `unique.places`. The terms of a sum are
    added in the order of the batch, where the backend adds in order (a GPU does not).
    """
    ordered = grads.at[unique.order].get(mode="promise_in_bounds")
    return jax.ops.segment_sum(
        ordered.astype(jnp.float32),
        unique.runs,
        num_segments=unique.runs.size,
        indices_are_sorted=True,
    )


def sum_equal(
    rows: jax.Array, grads: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array]:
    """Sums the gradients of equal rows, for an update that needs distinct rows.

    Args:
        rows: int32 `[N]`; those outside `[0, num_rows)` are padding.
        grads: `[N, D]`.
        num_rows: the rows of the table.

    Returns:
        The distinct rows, ascending, then `num_rows` until the end, `[N]`; and the sum
        of each one's gradients, `[N, D]`.
    """
    inside = (rows >= 0) & (rows < num_rows)
    unique = unique_rows(jnp.where(inside, rows, jnp.int32(num_rows)), num_rows)
    return unique.places, sum_runs(unique, grads)
