"""What a spread batch has for each row, summed by the owners of the rows.

Nothing but ids and one sum for each distinct row of a device travels, by the route that
a lookup and an update of the same batch take.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from sparse_adam._types import Indices
from sparse_adam.ops import routing
from sparse_adam.ops.combine import Samples
from sparse_adam.ops.integers import in_32_bits
from sparse_adam.ops.samples import SampleRoute, update_samples
from sparse_adam.ops.spread import Spread
from sparse_adam.ops.spread_samples import fill_gradients, route_batch


class Counts(NamedTuple):
    """Of ranges of rows: how many are named, and how often one alone.

    Attributes:
        unique: int32 `[T]`, how many different rows of each range are named.
        most: int32 `[T]`, how many ids name the row that most name.
    """

    unique: jax.Array
    most: jax.Array


def sum_of_squares(
    batch: Sequence[Samples],
    grads: Sequence[jax.Array | None],
    *,
    spread: Spread,
    num_rows: int,
    dim: int,
    sizes: tuple[int, ...],
) -> jax.Array:
    """Returns the sum over rows of the squares of their summed gradients.

    Args:
        batch: as in `lookup_batch`, like the rest.
        grads: as in `update_batch`.
        spread: the devices.
        num_rows: V.
        dim: D.
        sizes: S of each feature.

    Returns:
        A float32 scalar, the same on each device.
    """
    route = route_batch(batch, spread=spread, num_rows=num_rows, sizes=sizes)
    given = fill_gradients(grads, sizes, dim, spread)
    return _sum_of_squares(route, given, spread=spread)


@in_32_bits
@functools.partial(jax.jit, static_argnames="spread")
def _sum_of_squares(
    route: SampleRoute, grads: list[jax.Array], *, spread: Spread
) -> jax.Array:
    def sum_own(route: SampleRoute, grads: list[jax.Array]) -> jax.Array:
        num_rows = route.rows.placement.rows_per_shard

        def add(total: jax.Array, rows: Indices, terms: jax.Array) -> jax.Array:
            terms = jnp.where((rows >= 0)[:, None], terms, 0)
            _, sums = routing.sum_equal(rows, terms, num_rows)
            return total + jnp.sum(sums**2)

        own = update_samples(route, grads, jnp.float32(0), add)
        return lax.psum(own, spread.axes)

    rows, whole = spread.spec, PartitionSpec()
    return spread.map(sum_own, (rows, rows), whole)(route, grads)


def count_rows(
    batch: Sequence[Samples],
    *,
    spread: Spread,
    num_rows: int,
    sizes: tuple[int, ...],
    ranges: tuple[tuple[int, int], ...],
) -> Counts:
    """Counts how often the rows of each range are named.

    Args:
        batch: as in `lookup_batch`, like the rest.
        spread: the devices.
        num_rows: V.
        sizes: S of each feature.
        ranges: T first rows, and how many rows follow.
    """
    route = route_batch(batch, spread=spread, num_rows=num_rows, sizes=sizes)
    return _count_rows(route, spread=spread, ranges=ranges)


@in_32_bits
@functools.partial(jax.jit, static_argnames=("spread", "ranges"))
def _count_rows(
    route: SampleRoute, *, spread: Spread, ranges: tuple[tuple[int, int], ...]
) -> Counts:
    first = jnp.array([start for start, _ in ranges], jnp.int32)[:, None]
    size = jnp.array([size for _, size in ranges], jnp.int32)[:, None]

    def count_own(route: SampleRoute) -> Counts:
        unique, placement = route.rows.unique, route.rows.placement
        me = lax.axis_index(spread.axes)

        def add(found: Counts, rows: Indices, times: jax.Array) -> Counts:
            local, times = routing.sum_equal(rows, times, placement.rows_per_shard)
            row = local * spread.count + me
            if not placement.interleaved:
                row = local + me * placement.rows_per_shard
            there = (local < placement.rows_per_shard)[None]
            mine = there & (row[None] >= first) & (row[None] < first + size)
            often = jnp.where(mine, times[None, :, 0].astype(jnp.int32), 0)
            return Counts(
                found.unique + jnp.sum(mine, 1, dtype=jnp.int32),
                jnp.maximum(found.most, jnp.max(often, 1)),
            )

        ones = jnp.ones((unique.runs.size, 1), jnp.float32)
        times = routing.sum_runs(unique, ones)
        none = Counts(*(jnp.zeros((len(ranges),), jnp.int32),) * 2)
        found = routing.update_unique(route.rows, times, none, add)
        return Counts(
            lax.psum(found.unique, spread.axes),
            lax.pmax(found.most, spread.axes),
        )

    return spread.map(count_own, (spread.spec,), PartitionSpec())(route)
