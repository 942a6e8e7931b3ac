"""Rounds: how a batch of any skew travels through buffers of a fixed size.

The owner of popular rows may be asked for more rows than its buffer holds. Then every
device sends it the rows below a *cut*, a local row of that owner, and the others in
later rounds. All devices use the same cut, so a row's gradients arrive in one round,
whoever sends them, and the owner steps the row once.

The cut is the largest one at which the round still fits. It is found by bisection, with
one sum of n counts over the devices a step, and only where a buffer would overflow. A
single row always fits, since each of n devices sends it at most once and a buffer has n
rows at least: each round makes progress.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparse_adam.ops.routing import exchange
from sparse_adam.ops.routing.exchange import LANES, Axes, Window
from sparse_adam.ops.routing.placement import Placement
from sparse_adam.ops.sorting import sort_pairs

_HEADER = 2  # words of a message that are not ids


class Quota(NamedTuple):
    """What can travel in one round. It bounds memory, not what a batch may hold.

    Attributes:
        total: C, the rows that one owner can receive, from n devices together.
        part: the rows that one device can send to one owner.
    """

    total: int
    part: int


def default_quota(num_ids: int, num_shards: int) -> Quota:
    """Returns the quota for N ids on each of n devices.

    `total` is N and an eighth, or N and six standard deviations of what uniform ids
    bring to an owner, whichever is more. `part` is the mean and six standard deviations
    of what one device has for an owner, rounded up to fill the lines of a message.
    """
    mean = -(-num_ids // num_shards)
    words = mean + math.ceil(6 * math.sqrt(mean)) + _HEADER
    part = min(num_ids, -(-words // LANES) * LANES - _HEADER)
    total = num_ids + max(num_ids // 8, math.ceil(6 * math.sqrt(num_ids)))
    return Quota(max(num_shards, min(total, num_shards * part)), part)


def message_words(quota: Quota) -> int:
    """Returns the words of a message by which a device asks an owner for rows."""
    return quota.part + _HEADER


class Round(NamedTuple):
    """What travels in one round, as one device sees it.

    Attributes:
        window: the slices of the unique rows that travel to the owners.
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


def next_round(
    places: jax.Array,
    begin: jax.Array,
    cut: jax.Array,
    placement: Placement,
    quota: Quota,
    axes: Axes,
) -> Round:
    """Makes the round that follows the one that ended at `cut`, and sends its ids.

    Args:
        places: int32 `[N]`, this device's unique places, ascending.
        begin: int32 `[n]`, where in them the first place at or after each cut is.
        cut: int32 `[n]`, the local row of each owner from which on rows have not
            travelled yet. The same on every device.
        placement: of the table's rows.
        quota: of a round.
        axes: of the mesh, over which the rows are spread.
    """
    shards, rows = placement.num_shards, placement.rows_per_shard
    firsts = lax.iota(jnp.int32, shards) * jnp.int32(rows)

    def counts(cut: jax.Array) -> jax.Array:
        """Returns how many rows go to each owner if the round ends at `cut`."""
        return count_below(places, firsts + cut) - begin

    cut = _largest_that_fits(counts, cut, rows, quota, axes)
    window, named = _tell(places, begin, counts(cut), quota, axes)
    local = named - lax.axis_index(axes) * jnp.int32(rows)
    more = jnp.any(cut < rows)[None]
    return Round(window, _compact(local, window.received, rows, quota), cut, more)


def count_below(places: jax.Array, bounds: jax.Array) -> jax.Array:
    """Returns for each bound how many places are below it.

    Comparing all with all is what a vector unit does best: a bisection would gather
    scalars.
    """
    return jnp.sum(places[None] < bounds[:, None], axis=1, dtype=jnp.int32)


def _largest_that_fits(
    counts: Callable[[jax.Array], jax.Array],
    cut: jax.Array,
    rows: int,
    quota: Quota,
    axes: Axes,
) -> jax.Array:
    """Returns the largest cut up to `rows` of each owner at which a round fits."""

    def fits(cut: jax.Array) -> jax.Array:
        sent = counts(cut)
        # One sum tells both: a part that is too large makes the total too large.
        load = jnp.where(sent > quota.part, jnp.int32(quota.total + 1), sent)
        return lax.psum(load, axes) <= quota.total

    @jax.named_scope("search_of_cut")
    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        good = fits(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    whole = jnp.full_like(cut, rows)
    fit = fits(whole)
    # Where all fits there is nothing between `whole` and the row behind it.
    bounds = jnp.where(fit, whole, cut), jnp.where(fit, whole + 1, whole)
    return lax.while_loop(lambda b: jnp.any(b[1] - b[0] > 1), halve, bounds)[0]


def _tell(
    places: jax.Array, begin: jax.Array, sent: jax.Array, quota: Quota, axes: Axes
) -> tuple[Window, jax.Array]:
    """Sends each owner the places that it is asked for, in one message.

    Returns the window, and the places that the others name to this device, `[n, part]`,
    those of each sender in a line, with arbitrary ones behind them.
    """
    header = jnp.stack((sent, begin), axis=1)
    ids = exchange.slices(places, begin, quota.part)
    told = exchange.swap(jnp.concatenate((header, ids), axis=1), axes)
    received, origins = told[:, 0], told[:, 1]
    starts = jnp.cumsum(received, dtype=jnp.int32) - received
    offsets = exchange.swap(starts, axes)
    window = Window(begin, sent, offsets, starts, received, origins)
    return window, told[:, _HEADER:]


def _compact(
    local: jax.Array, received: jax.Array, rows: int, quota: Quota
) -> jax.Array:
    """Returns the first `received` of each line of `[n, part]`, then -1, as `[C]`."""
    part = lax.iota(jnp.int32, quota.part)[None]
    named = (part < received[:, None]).reshape(-1)
    position = lax.iota(jnp.int32, named.size)
    keys = jnp.where(named, position, jnp.int32(named.size))
    values = jnp.where(named, local.reshape(-1), 0)
    _, ordered = sort_pairs(keys, values, named.size + 1, rows)
    some = position < jnp.sum(received, dtype=jnp.int32)
    return jnp.where(some, ordered, jnp.int32(-1))[: quota.total]
