"""A route: made once of a batch's ids, it serves the lookup and the update."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from sparse_adam.ops.routing import exchange, rounds
from sparse_adam.ops.routing.exchange import Axes
from sparse_adam.ops.routing.placement import Placement
from sparse_adam.ops.routing.rounds import Quota, Round, default_quota
from sparse_adam.ops.routing.unique import UniqueRows, sum_runs, unique_rows
from sparse_adam.ops.routing.varying import vary, varying

_Tree = TypeVar("_Tree")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("unique", "first"),
    meta_fields=("placement", "axes", "shape", "quota"),
)
@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """How the ids of a batch travel. A pytree whose leaves are arrays of one device.

    Every leaf has a leading dimension and varies over `axes`, so a route may leave one
    `shard_map` by `out_specs=PartitionSpec(axes)` and enter another one likewise.

    Attributes:
        unique: the distinct rows that this device's ids name.
        first: the first round, whose ids the owners have already.
        placement: of the table's rows.
        axes: of the mesh, over which rows and ids are spread.
        shape: of this device's ids.
        quota: of a round.
    """

    unique: UniqueRows
    first: Round
    placement: Placement
    axes: Axes
    shape: tuple[int, ...]
    quota: Quota


def route(
    ids: jax.Array,
    placement: Placement,
    axes: str | Axes,
    *,
    quota: Quota | None = None,
) -> Route:
    """Removes the duplicates of this device's ids and sends the others to their owners.

    Call it inside `jax.shard_map`, on all devices along `axes`. It needs the ids only,
    so it may be called before the forward pass.

    Args:
        ids: int32, any shape; the same shape on every device. An id outside `[0, V)` is
            padding.
        placement: where the rows are.
        axes: the mesh axis, or axes, over which the rows are spread. Along others,
            devices are replicas: they have the same rows and must get the same ids.
        quota: what travels in one round; by default a little more than uniform ids
            need (`rounds.default_quota`). Results do not depend on it: a batch that
            does not fit takes further rounds.

    Raises:
        TypeError: `ids` are not int32.
        ValueError: `placement` is for another number of devices.
    """
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    if ids.dtype != jnp.int32:
        raise TypeError(f"{ids.dtype=} must be int32: make strays -1 and cast")
    shards = placement.num_shards
    if (devices := lax.axis_size(axes)) != shards:
        raise ValueError(
            f"{placement.num_shards=} must be {devices}, the devices along {axes=}"
        )
    flat = jnp.append(ids.reshape(-1), jnp.int32(-1)) if not ids.size else ids
    quota = _checked(quota or default_quota(flat.size, shards), shards)
    unique = unique_rows(placement.places(flat.reshape(-1)), placement.end)
    unique = vary(unique, axes=axes)
    firsts = lax.iota(jnp.int32, shards) * jnp.int32(placement.rows_per_shard)
    begin = rounds.count_below(unique.places, firsts)
    cut = vary(jnp.zeros((shards,), jnp.int32), begin)
    first = rounds.next_round(unique.places, begin, cut, placement, quota, axes)
    return Route(unique, vary(first), placement, axes, ids.shape, quota)


def lookup(route: Route, local_lookup: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Looks up the rows of every occurrence, wherever they are.

    Args:
        route: of the ids.
        local_lookup: given int32 rows `[C]` of this device's shard, returns `[C, D]`.
            Rows of -1 are padding; what it returns for them does not matter.

    Returns:
        `ids.shape + (D,)`; zeros for padding.
    """
    rows = lookup_unique(route, local_lookup)
    found = rows.at[route.unique.inverse].get(mode="promise_in_bounds")
    found = found[: math.prod(route.shape)]
    return found.reshape(*route.shape, *found.shape[1:])


def lookup_unique(
    route: Route, local_lookup: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Looks up each distinct row once: `[N, D]`, in the order of `unique.places`.

    `route.unique.inverse` says which of them each occurrence is. What is left over, and
    with it what the inverse of padding points at, is zeros.
    """
    size = route.unique.places.size
    like = jax.eval_shape(local_lookup, route.first.rows)

    def step(current: Round, found: jax.Array) -> jax.Array:
        answers = local_lookup(current.rows)
        back = current.window.reversed()
        rows = exchange.send(back, answers, size, route.quota.part, route.axes)
        written = exchange.covered(back.starts, back.received, size)
        return jnp.where(written[:, None], rows, found)

    return _in_rounds(route, step, jnp.zeros((size, *like.shape[1:]), like.dtype))


def update(
    route: Route,
    grads: jax.Array,
    local_state: _Tree,
    local_update: Callable[[_Tree, jax.Array, jax.Array], _Tree],
) -> _Tree:
    """Brings the sum of each row's gradients to its owner, which steps the row once.

    Args:
        route: of the ids.
        grads: `ids.shape + (D,)`, a gradient for each occurrence.
        local_state: this device's shard of table and slots, any pytree.
        local_update: given state, int32 rows `[C]` and float32 gradients `[C, D]`,
            returns the new state. It sums the gradients of equal rows, as every update
            of this package does (or as `sum_equal` does), steps each row once, and
            ignores rows of -1. A row comes once from each device that has it, and in
            one call only.

    Returns:
        The new state of this device's shard.
    """
    if grads.shape[:-1] != route.shape:
        raise ValueError(f"{grads.shape=} must be {(*route.shape, 'D')}")
    return update_unique(
        route, sum_occurrences(route, grads), local_state, local_update
    )


def sum_occurrences(route: Route, grads: jax.Array) -> jax.Array:
    """Sums the gradients of equal ids on this device, in float32.

    Returns `[N, D]`, in the order of `unique.places`: what `update_unique` takes.
    """
    flat = grads.reshape(-1, grads.shape[-1])
    return sum_runs(route.unique, jnp.pad(flat, ((0, not flat.shape[0]), (0, 0))))


def update_unique(
    route: Route,
    sums: jax.Array,
    local_state: _Tree,
    local_update: Callable[[_Tree, jax.Array, jax.Array], _Tree],
) -> _Tree:
    """Does what `update` does, given one gradient for each distinct row of the batch.

    Args:
        route: of the ids.
        sums: `[N, D]`, in the order of `unique.places`.
        local_state: as for `update`.
        local_update: as for `update`.
    """

    def step(current: Round, state: _Tree) -> _Tree:
        total, part = route.quota
        arrived = exchange.send(current.window, sums, total, part, route.axes)
        return local_update(state, current.rows, arrived)

    return _in_rounds(route, step, local_state, sums)


def _in_rounds(
    route: Route, step: Callable[[Round, Any], Any], value: Any, *others: Any
) -> Any:
    """Calls `step(round, value)` for each round, one after the other.

    It is traced and compiled once. `others` are arrays that `step` uses.
    """
    axes = tuple(varying((route, value, others)))
    places = route.unique.places
    first = vary(route.first, axes=axes)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        starting, begin, cut, _, value = carry

        @jax.named_scope("further_round")
        def follow() -> Round:
            found = rounds.next_round(
                places, begin, cut, route.placement, route.quota, route.axes
            )
            return vary(found, axes=axes)

        current = lax.cond(starting, lambda: first, follow)
        end = current.window.begin + current.window.sent
        value = vary(step(current, value), axes=axes)
        return starting & False, end, current.cut, current.more, value

    def unfinished(carry: tuple[Any, ...]) -> jax.Array:
        return carry[0] | carry[3][0]

    begin = first.window.begin
    start = (jnp.bool_(True), begin, first.cut, first.more, vary(value, axes=axes))
    return lax.while_loop(unfinished, body, start)[-1]


def _checked(quota: Quota, shards: int) -> Quota:
    """Returns the quota, made valid for n devices.

    Raises:
        ValueError: the devices together cannot be counted in int32.
    """
    part = max(quota.part, 1)
    total = max(min(quota.total, shards * part), shards)
    if shards * (total + 1) >= 2**31:
        raise ValueError(
            f"{total=} rows a round on {shards} devices cannot be counted in int32: "
            "route the ids in several batches"
        )
    return Quota(total, part)
