"""Batches of several ids a sample, as one device routes them.

A device has its part of each feature's batch. Rows travel once for each distinct id and
are combined where they arrive; the gradients of samples are summed over equal ids where
they are, so that one sum a row travels back. Both are done by the operations that do it
on one device: by `combine` of a small table, and by an update of one.

Where each sample has as many ids as the next one, a device has the ids of its samples.
Where each id names its sample (ragged and sparse batches) it has any ids: those of a
device are an n-th of all, whoever owns their samples. Then a second route leads from
ids to the owners of the samples: partial sums travel to them, and gradients back.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_adam._types import Gains, Indices
from sparse_adam.kernels.layout import PlainLayout
from sparse_adam.ops import routing
from sparse_adam.ops.combine import Samples, combine
from sparse_adam.ops.options import UpdateInputs, UpdateOptions
from sparse_adam.ops.plan import UpdatePlan
from sparse_adam.ops.routing import Placement, Route
from sparse_adam.ops.update import update_arrays
from sparse_adam.rules import SGDRule


class Part(NamedTuple):
    """What one device has of the batch of one feature.

    Attributes:
        samples: its ids with their owners and gains, and the scales of its samples.
        num_samples: S, that it has itself.
        dealt: the ids are an n-th of all, whoever owns their samples: `owners` count
            the samples of all devices. If False they are those of its own samples.
    """

    samples: Samples
    num_samples: int
    dealt: bool


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("rows", "owners", "ids", "sources", "gains", "scales"),
    meta_fields=("sizes", "dealt", "places", "ascending"),
)
@dataclasses.dataclass(frozen=True, slots=True)
class SampleRoute:
    """How the batch of one table travels: made once, for both directions.

    A pytree. Its leaves are arrays of one device, with a leading dimension each, so it
    may leave one `jax.shard_map` and enter another one by `PartitionSpec(axes)`.

    Attributes:
        rows: of the ids, to the owners of the rows.
        owners: from dealt ids to the owners of their samples; or None.
        ids: int32 `[N]`, which of the distinct rows each occurrence names; -1 for none.
        sources: int32 `[N]`, which of the device's sums it belongs to: one for each of
            its own samples, then one for each sample that dealt ids name; -1 for none.
        gains: float32 `[N]`, or None for 1.
        scales: of the samples of each feature, float32 `[S]` or None.
        sizes: S of each feature.
        dealt: of each feature, whether its ids are.
        places: how many ids each sample has, one behind the other; 0 where that differs
            or ids name their samples.
        ascending: whether the sources are.
    """

    rows: Route
    owners: Route | None
    ids: Indices
    sources: Indices
    gains: Gains | None
    scales: tuple[jax.Array | None, ...]
    sizes: tuple[int, ...]
    dealt: tuple[bool, ...]
    places: int
    ascending: bool

    @property
    def num_own(self) -> int:
        """Returns how many samples of the device have ids that are not dealt."""
        return _total(self.sizes, self.dealt, False)

    @property
    def num_dealt(self) -> int:
        """Returns how many samples of the device have dealt ids."""
        return _total(self.sizes, self.dealt, True)

    def join(self, arrays: Sequence[jax.Array], dealt: bool) -> list[jax.Array]:
        """Joins the `[S, D]` of the features of one kind; nothing of none."""
        kinds = zip(arrays, self.dealt, strict=True)
        chosen = [x for x, kind in kinds if kind == dealt]
        return [join(chosen)] if chosen else []

    def split(self, own: jax.Array, dealt: jax.Array | None) -> list[jax.Array]:
        """Returns an array `[S, D]` for each feature of those of the two kinds."""
        left, found = {False: own, True: dealt}, []
        for size, kind in zip(self.sizes, self.dealt, strict=True):
            rest = left[kind]
            assert rest is not None
            found.append(rest[:size])
            left[kind] = rest[size:]
        return found


def _total(sizes: Sequence[int], dealt: Sequence[bool], kind: bool) -> int:
    return sum(size for size, own in zip(sizes, dealt, strict=True) if own == kind)


def route_samples(
    parts: Sequence[Part], placement: Placement, axes: tuple[str, ...]
) -> SampleRoute:
    """Sends the ids of a batch to the owners of their rows.

    Call it inside `jax.shard_map`, on all devices along `axes`.

    Args:
        parts: of the features that share the table. Ids are rows of the table; -1 and
            all others outside of it are padding.
        placement: of the table's rows.
        axes: of the mesh, over which rows and samples are spread.
    """
    ids = join([part.samples.ids for part in parts])
    rows = routing.route(ids, placement, axes)
    owners = _route_owners(parts, placement.num_shards, axes)
    dealt = tuple(part.dealt for part in parts)
    in_order = all(part.samples.owners is None for part in parts)
    places = {part.samples.ids.size // max(part.num_samples, 1) for part in parts}
    inside = (ids >= 0) & (ids < placement.num_rows)
    return SampleRoute(
        rows,
        owners,
        jnp.where(inside, rows.unique.inverse[: ids.size], jnp.int32(-1)),
        sources_of(parts, owners),
        joined_gains(parts),
        scales=tuple(part.samples.scales for part in parts),
        sizes=tuple(part.num_samples for part in parts),
        dealt=dealt,
        places=places.pop() if in_order and len(places) == 1 else 0,
        ascending=in_order,
    )


def sources_of(parts: Sequence[Part], owners: Route | None) -> Indices:
    """Returns which of the device's sums each id belongs to, int32 `[N]`."""
    sources, own, dealt = [], 0, 0
    num_own = sum(part.num_samples for part in parts if not part.dealt)
    for part in parts:
        (ids, owner, _, _), count = part.samples, part.num_samples
        if part.dealt:
            assert owners is not None
            found = owners.unique.inverse[dealt : dealt + ids.size]
            sources.append(found + jnp.int32(num_own))
            dealt += ids.size
            continue
        if owner is None:
            sample = lax.iota(jnp.int32, count) + jnp.int32(own)
            each = ids.size // max(count, 1)
            sources.append(jnp.repeat(sample, each, total_repeat_length=ids.size))
        else:
            there = (owner >= 0) & (owner < count)
            sources.append(jnp.where(there, owner + jnp.int32(own), jnp.int32(-1)))
        own += count
    return join(sources)


def _route_owners(
    parts: Sequence[Part], count: int, axes: tuple[str, ...]
) -> Route | None:
    """Returns the way from dealt ids to their samples, all features' in one table."""
    parts = [part for part in parts if part.dealt]
    each = sum(part.num_samples for part in parts)
    if not each:
        return None
    places, start = [], 0
    for part in parts:
        owner, size = part.samples.owners, jnp.int32(part.num_samples)
        assert owner is not None
        there = (owner >= 0) & (owner < size * count) & (part.samples.ids >= 0)
        place = lax.div(owner, size) * each + lax.rem(owner, size) + start
        places.append(jnp.where(there, place, jnp.int32(-1)))
        start += part.num_samples
    return routing.route(join(places), Placement(count * each, count), axes)


def deal(samples: Samples, axes: tuple[str, ...]) -> Samples:
    """Deals a device's ids, which name their samples, out to all, like cards.

    Neighbours mostly have one owner, and would fill one message of many.
    """
    count = lax.axis_size(axes)

    def hands(x: jax.Array, value: Any) -> jax.Array:
        missing = -x.size % count
        x = jnp.pad(x, (0, missing), constant_values=value) if missing else x
        return lax.all_to_all(x.reshape(-1, count), axes, 1, 0).reshape(-1)

    ids, owners, gains, scales = samples
    assert owners is not None
    none = np.int32(-1)
    if gains is not None:
        gains = hands(gains, np.float32(0))
    return Samples(hands(ids, none), hands(owners, none), gains, scales)


def combine_samples(
    route: SampleRoute, read: Callable[[Indices], jax.Array]
) -> list[jax.Array]:
    """Looks up rows, wherever they are, and combines those of each sample.

    Args:
        route: of the batch.
        read: given int32 rows `[C]` of this device, -1 for none, returns `[C, D]`.

    Returns:
        For each feature `[S, D]`, in the dtype that `read` returns.
    """
    found = routing.lookup_unique(route.rows, read)
    dtype = found.dtype
    if route.owners is not None or any(scale is not None for scale in route.scales):
        found = found.astype(jnp.float32)
    count = route.num_own
    if route.owners is not None:
        count += route.owners.unique.places.size
    sums = combine(
        found,
        Samples(route.ids, None if route.places else route.sources, route.gains, None),
        count,
        layout=PlainLayout.of_weights(found),
        ascending=route.ascending,
    )
    dealt = None
    if route.owners is not None:
        zeros = jnp.zeros((route.num_dealt, found.shape[1]), jnp.float32)
        partial = sums[route.num_own :]
        dealt = routing.update_unique(route.owners, partial, zeros, add)
    parts = route.split(sums[: route.num_own], dealt)
    return [
        scaled(part, scale).astype(dtype)
        for part, scale in zip(parts, route.scales, strict=True)
    ]


def update_samples(
    route: SampleRoute,
    grads: Sequence[jax.Array],
    local_state: Any,
    local_update: Callable[[Any, Indices, jax.Array], Any],
) -> Any:
    """Brings each row's summed gradient to its owner, which steps the row once.

    The gradient of a row is the sum over its occurrences of gain times scale times the
    gradient of the occurrence's sample.

    Args:
        route: of the batch.
        grads: for each feature `[S, D]`, by the combined rows.
        local_state: what this device has of the table and its slots.
        local_update: as for `routing.update`.
    """
    grads = [scaled(g, s) for g, s in zip(grads, route.scales, strict=True)]
    if len({g.dtype for g in grads}) > 1:
        grads = [g.astype(jnp.float32) for g in grads]
    joined = route.join(grads, dealt=False)
    if route.owners is not None:
        (dealt,) = route.join(grads, dealt=True)
        read = functools.partial(_rows_of, dealt)
        joined.append(routing.lookup_unique(route.owners, read))
    sums = sum_samples(route, join(joined))
    return routing.update_unique(route.rows, sums, local_state, local_update)


def sum_samples(route: SampleRoute, grads: jax.Array) -> jax.Array:
    """Returns float32 `[N, D]`: for each distinct row of the device its gradient.

    That is one update of a table of zeros, so nothing of the size of all occurrences is
    made where the update makes nothing of it.
    """
    unique = route.rows.unique
    plan = None
    if route.ids.size == unique.places.size:
        plan = UpdatePlan(unique.runs, unique.order, unique.places.size)
    rows = unique.inverse[: route.ids.size]
    sources = None if route.places == 1 else route.sources
    inputs = UpdateInputs(rows, grads, sources, route.gains, plan)
    zeros = jnp.zeros((unique.places.size, grads.shape[1]), jnp.float32)
    return _add_by(zeros, inputs)


def add(sums: jax.Array, rows: Indices, terms: jax.Array) -> jax.Array:
    """Adds float32 terms `[C, D]` to rows of sums; rows of -1 are none."""
    return _add_by(sums, UpdateInputs(rows, terms))


def _add_by(sums: jax.Array, inputs: UpdateInputs) -> jax.Array:
    """Adds up what a batch has for each row: a descent by a rate of -1."""
    layout = PlainLayout.of_weights(sums)
    return update_arrays((sums,), inputs, SGDRule(), UpdateOptions(-1.0), layout)[0]


def _rows_of(array: jax.Array, rows: Indices) -> jax.Array:
    return array.at[rows].get(mode="clip")


def scaled(x: jax.Array, scales: jax.Array | None) -> jax.Array:
    """Multiplies `[S, D]` by the scales of samples, in float32."""
    return x if scales is None else x.astype(jnp.float32) * scales[:, None]


def joined_gains(parts: Sequence[Part]) -> Gains | None:
    """Returns the gains of the ids of all features, None where all are 1."""
    gains = [part.samples.gains for part in parts]
    if all(x is None for x in gains):
        return None
    return join(
        [
            jnp.ones(part.samples.ids.shape, jnp.float32) if x is None else x
            for part, x in zip(parts, gains, strict=True)
        ]
    )


def join(arrays: Sequence[jax.Array]) -> jax.Array:
    """Puts arrays one behind the other."""
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)
