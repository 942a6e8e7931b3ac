"""Rounds: how a batch of any skew travels through buffers of a fixed size.

The owner of popular rows may be asked for more rows than its buffer holds. Then every
device sends it the rows below a *cut*, a local row of that owner, and the others in
later rounds. All devices use the same cut, so a row's gradients arrive in one round,
whoever sends them, and the owner steps the row once.

The cut is the largest one at which the round still fits. It is found by bisection, with
one sum of n counts over the devices a step, and only where a buffer would overflow. One
row is sent at most once by each of n devices, and a buffer has n rows at least: so each
round makes progress, and all but the last fill the fullest buffer but for n rows.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparse_adam.ops.routing import exchange
from sparse_adam.ops.routing.exchange import Axes, Window
from sparse_adam.ops.routing.placement import Placement


class Round(NamedTuple):
    """What travels in one round, as one device sees it.

    Attributes:
        window: the slices of the unique rows that travel.
        rows: int32 `[C]`, the local rows that the devices name to this owner; -1 where
            there is none. A device names a row once, several may name the same one.
        cut: int32 `[n]`, for each owner, the local row below which all has travelled
            after this round.
        more: bool `[1]`, whether a round must follow.
    """

    window: Window
    rows: jax.Array
    cut: jax.Array
    more: jax.Array


def rows_per_round(num_ids: int, num_shards: int) -> int:
    """Returns C, the rows of a receive buffer, for N ids a device.

    It is N and an eighth, or N and six standard deviations of what uniform ids bring to
    one owner, whichever is more; rounded up to a multiple of the devices. An owner of
    uniform ids gets at most about N of them, since duplicates have been removed.
    """
    slack = max(num_ids // 8, math.ceil(6 * math.sqrt(num_ids)))
    return -(-(num_ids + slack) // num_shards) * num_shards


def next_round(
    places: jax.Array,
    begin: jax.Array,
    cut: jax.Array,
    placement: Placement,
    size: int,
    axes: Axes,
) -> Round:
    """Makes the round that follows the one that ended at `cut`, and sends its rows.

    Args:
        places: int32 `[N]`, this device's unique places, ascending.
        begin: int32 `[n]`, where in them the first place at or after each cut is.
        cut: int32 `[n]`, the local row of each owner from which on rows have not
            travelled yet.
        placement: of the table's rows.
        size: C, the rows of a buffer.
        axes: of the mesh, over which the rows are spread.
    """
    shards, rows = placement.num_shards, placement.rows_per_shard
    firsts = lax.iota(jnp.int32, shards) * jnp.int32(rows)

    def slices(cut: jax.Array) -> jax.Array:
        """Returns how many rows go to each owner if the round ends at `cut`."""
        return count_below(places, firsts + cut) - begin

    def fits(cut: jax.Array) -> jax.Array:
        return exchange.load(slices(cut), axes) <= size

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        good = fits(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    whole = jnp.full_like(cut, rows)
    fit = fits(whole)
    # Where all fits there is nothing to search between `whole` and the row behind it.
    low, high = jnp.where(fit, whole, cut), jnp.where(fit, whole + 1, whole)
    cut, _ = lax.while_loop(lambda b: jnp.any(b[1] - b[0] > 1), halve, (low, high))
    window = exchange.window(begin, slices(cut), size, axes)
    named = exchange.to_owners(window, places, size, axes)
    local = named - lax.axis_index(axes) * jnp.int32(rows)
    written = exchange.covered(window.starts, window.received, size)
    more = jnp.any(cut < rows)[None]
    return Round(window, jnp.where(written, local, jnp.int32(-1)), cut, more)


def count_below(places: jax.Array, bounds: jax.Array) -> jax.Array:
    """Returns for each bound how many places are below it.

    Comparing all with all is what a vector unit does best: a bisection would gather
    scalars.
    """
    return jnp.sum(places[None] < bounds[:, None], axis=1, dtype=jnp.int32)
