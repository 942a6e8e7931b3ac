"""Lookups and updates of a table and a batch that are both spread over devices.

`route_batch` makes the way of a batch, once; `lookup_batch` and `update_batch` take it.
They map themselves to the devices (`Spread.map`), and cut each feature's batch into
equal parts: an uneven one is filled up with padding.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from sparse_adam._types import Indices
from sparse_adam.kernels.layout import Layout, PackedLayout
from sparse_adam.ops.combine import Samples
from sparse_adam.ops.integers import in_32_bits
from sparse_adam.ops.options import UpdateInputs, UpdateOptions
from sparse_adam.ops.packed import PackedTable
from sparse_adam.ops.reading import packed_rows, plain_rows
from sparse_adam.ops.samples import (
    Part,
    SampleRoute,
    add,
    combine_samples,
    deal,
    join,
    joined_gains,
    route_samples,
    scaled,
    sources_of,
    update_samples,
)
from sparse_adam.ops.sparse_update import update_state
from sparse_adam.ops.spread import Spread, everywhere
from sparse_adam.rules import UpdateRule


def lookup_batch(
    stored: jax.Array,
    batch: Sequence[Samples],
    *,
    spread: Spread,
    layout: Layout,
    sizes: tuple[int, ...],
    route: SampleRoute | None = None,
    change: Callable[[jax.Array], jax.Array] | None = None,
) -> list[jax.Array]:
    """Looks up and combines the rows of each sample, wherever they are.

    Args:
        stored: what `spread.place` made of a plain table `[V, D]`, or the packed lines
            of such rows.
        batch: of each feature that shares the table. Without `owners` each sample has
            as many ids, one behind the other; with them ids are in any order. An id
            outside `[0, V)` is padding. Inside a `jax.shard_map` over `spread.axes` a
            batch is that of the device's own samples.
        spread: the devices.
        layout: of the table, V its rows, as if it were on one device.
        sizes: S of each feature.
        route: `route_batch` of this very batch, made earlier; None makes it here.
        change: of rows `[C, D]`, before they are combined, to rows of any float dtype.

    Returns:
        For each feature `[S, D]`, in the dtype of the rows; spread as the table is, if
        S divides by the number of devices.
    """
    if route is None:
        route = route_batch(batch, spread=spread, num_rows=layout.num_rows, sizes=sizes)
    how: Any = {"spread": spread, "layout": layout, "sizes": sizes}
    return _lookup(stored, route, change=change, **how)


def update_batch(
    state: tuple[jax.Array, ...],
    batch: Sequence[Samples],
    grads: Sequence[jax.Array | None],
    rule: UpdateRule,
    options: UpdateOptions,
    *,
    spread: Spread,
    layout: Layout,
    sizes: tuple[int, ...],
    route: SampleRoute | None = None,
) -> tuple[jax.Array, ...]:
    """Updates the rows that `lookup_batch` read: one step a row for all devices.

    With `use_gradient_accumulation=False` every device gets the whole batch, since each
    occurrence is a step, in the order of the batch.

    Args:
        state: the arrays of the layout, spread as `lookup_batch` takes them.
        batch: as in `lookup_batch`.
        grads: for each feature `[S, D]`, the loss's gradient by what was looked up;
            None for zeros.
        rule: what a step of a row computes.
        options: of the update.
        spread: as in `lookup_batch`, like the rest.
        layout: of the table.
        sizes: S of each feature.
        route: made earlier, or None.

    Returns:
        The new arrays.
    """
    traced = {"learning_rate": options.learning_rate}
    for name in ("weight_decay_factor", "gradient_scale", "key"):
        if isinstance(getattr(options, name), jax.Array):
            traced[name] = getattr(options, name)
    if options.step is not None:  # a new number must not compile anew
        traced["step"] = options.step
    static = tuple(
        (field.name, getattr(options, field.name))
        for field in dataclasses.fields(options)
        if field.name not in traced
    )
    how: Any = {"spread": spread, "layout": layout, "rule": rule, "options": static}
    if not options.use_gradient_accumulation:
        given = _given(grads, sizes, layout.dim)
        return _update_whole(state, list(batch), given, traced, sizes=sizes, **how)
    if route is None:
        route = route_batch(batch, spread=spread, num_rows=layout.num_rows, sizes=sizes)
    given = fill_gradients(grads, sizes, layout.dim, spread)
    return _update(state, route, given, traced, **how)


def fill_gradients(
    grads: Sequence[jax.Array | None], sizes: Sequence[int], dim: int, spread: Spread
) -> list[jax.Array]:
    """Returns gradients `[S, D]` filled up to equal parts; zeros for None."""
    given = _given(grads, sizes, dim)
    return [_fill_to(x, _size(x.shape[0], spread)) for x in given]


def _given(
    grads: Sequence[jax.Array | None], sizes: Sequence[int], dim: int
) -> list[jax.Array]:
    return [
        jnp.zeros((size, dim), jnp.float32) if x is None else x
        for x, size in zip(grads, sizes, strict=True)
    ]


@in_32_bits
@functools.partial(jax.jit, static_argnames=("spread", "num_rows", "sizes"))
def route_batch(
    batch: Sequence[Samples],
    *,
    spread: Spread,
    num_rows: int,
    sizes: tuple[int, ...],
) -> SampleRoute:
    """Sends the ids of a batch to the owners of their rows.

    It needs the ids only, so it may be called before the forward pass, as `plan_update`
    may. The arguments are those of `lookup_batch`.

    Returns:
        The route, spread over the devices.
    """
    placement, inside = spread.placement(num_rows), spread.is_inside
    own_sizes = [_own_size(size, spread) for size in sizes]

    def route_own(batch: list[Samples]) -> SampleRoute:
        parts = [
            Part(x, size, False) if inside else _dealt(x, size, spread)
            for x, size in zip(batch, own_sizes, strict=True)
        ]
        return route_samples(parts, placement, spread.axes)

    filled = [_filled(x, s, spread) for x, s in zip(batch, sizes, strict=True)]
    return spread.map(route_own, (spread.spec,), spread.spec)(filled)


@in_32_bits
@functools.partial(jax.jit, static_argnames=("spread", "layout", "sizes", "change"))
def _lookup(
    stored: jax.Array,
    route: SampleRoute,
    *,
    spread: Spread,
    layout: Layout,
    sizes: tuple[int, ...],
    change: Callable[[jax.Array], jax.Array] | None,
) -> list[jax.Array]:
    own = spread.part(layout)

    def look_up_own(stored: jax.Array, route: SampleRoute) -> list[jax.Array]:
        def read(rows: Indices) -> jax.Array:
            if isinstance(own, PackedLayout):
                found = packed_rows(stored, rows, layout=own)
            else:
                found = plain_rows(stored, rows)
            return found if change is None else change(found)

        return combine_samples(route, read)

    found = spread.map(look_up_own, (spread.spec, spread.spec), spread.spec)(
        stored, route
    )
    return [spread.cut(x, size) for x, size in zip(found, sizes, strict=True)]


@in_32_bits
@functools.partial(jax.jit, static_argnames=("spread", "layout", "rule", "options"))
def _update(
    state: tuple[jax.Array, ...],
    route: SampleRoute,
    grads: list[jax.Array],
    traced: dict[str, Any],
    *,
    spread: Spread,
    layout: Layout,
    rule: UpdateRule,
    options: tuple[tuple[str, Any], ...],
) -> tuple[jax.Array, ...]:
    own = spread.part(layout)

    def update_own(state: Any, route: Any, grads: Any, traced: Any) -> Any:
        said = _options(options, traced, spread)

        def step(state: Any, rows: Indices, grads: jax.Array) -> Any:
            return _step(state, UpdateInputs(rows, grads), rule, said, own)

        if said.lazy:
            return update_samples(route, grads, state, step)
        # A step for every row can be made once only, when all sums have arrived.
        zeros = jnp.zeros((own.num_rows, own.dim), jnp.float32)
        sums = update_samples(route, grads, zeros, add)
        return step(state, lax.iota(jnp.int32, own.num_rows), sums)

    rows, whole = spread.spec, PartitionSpec()
    mapped = spread.map(update_own, (rows, rows, rows, whole), rows)
    return mapped(state, route, grads, traced)


@in_32_bits
@functools.partial(
    jax.jit, static_argnames=("spread", "layout", "sizes", "rule", "options")
)
def _update_whole(
    state: tuple[jax.Array, ...],
    batch: list[Samples],
    grads: list[jax.Array],
    traced: dict[str, Any],
    *,
    spread: Spread,
    layout: Layout,
    sizes: tuple[int, ...],
    rule: UpdateRule,
    options: tuple[tuple[str, Any], ...],
) -> tuple[jax.Array, ...]:
    """Updates by the whole batch on each device, one step for each occurrence."""
    own, placement = spread.part(layout), spread.placement(layout.num_rows)
    inside = spread.is_inside

    def update_own(state: Any, batch: Any, grads: Any, traced: Any) -> Any:
        if inside:
            batch = [
                _of_all(x, size, spread) for x, size in zip(batch, sizes, strict=True)
            ]
            grads = [lax.all_gather(x, spread.axes, tiled=True) for x in grads]
        counts = [x.shape[0] for x in grads]
        parts = [Part(x, n, False) for x, n in zip(batch, counts, strict=True)]
        places = placement.places(join([x.ids for x in batch]))
        first = lax.axis_index(spread.axes) * jnp.int32(placement.rows_per_shard)
        rows = places - first
        mine = (rows >= 0) & (rows < placement.rows_per_shard)
        inputs = UpdateInputs(
            jnp.where(mine, rows, jnp.int32(-1)),
            join([scaled(g, x.scales) for g, x in zip(grads, batch, strict=True)]),
            sources_of(parts, None),
            joined_gains(parts),
        )
        return _step(state, inputs, rule, _options(options, traced, spread), own)

    rows, whole = spread.spec, PartitionSpec()
    given = spread.spec if inside else whole
    mapped = spread.map(update_own, (rows, given, given, whole), rows)
    return mapped(state, batch, grads, traced)


def _step(
    state: tuple[jax.Array, ...],
    inputs: UpdateInputs,
    rule: UpdateRule,
    options: UpdateOptions,
    layout: Layout,
) -> tuple[jax.Array, ...]:
    """Updates what one device has."""
    if isinstance(layout, PackedLayout):
        packed = PackedTable(state[0], layout)
        return (update_state(packed, inputs, rule, options).lines,)
    return tuple(update_state(state, inputs, rule, options))


def _options(
    static: tuple[tuple[str, Any], ...], traced: dict[str, Any], spread: Spread
) -> UpdateOptions:
    """Returns the options as a device sees them: with noise of its own."""
    if "key" in traced:
        device = lax.axis_index(spread.axes)
        traced = traced | {"key": jax.random.fold_in(traced["key"], device)}
    return UpdateOptions(**dict(static), **traced)


def _size(size: int, spread: Spread) -> int:
    """Returns S, filled up to a multiple of the devices, and at least one on each."""
    if spread.is_inside:
        return size
    return spread.count * max(1, -(-size // spread.count))


def _own_size(size: int, spread: Spread) -> int:
    """Returns how many samples one device has of S."""
    return size if spread.is_inside else _size(size, spread) // spread.count


def _filled(samples: Samples, size: int, spread: Spread) -> Samples:
    """Fills a feature's batch up to equal parts of an id at least, by ids of no row."""
    if spread.is_inside:
        return samples
    ids, owners, gains, scales = samples
    if owners is None:
        places = max(1, ids.size // max(size, 1))
        num_ids = places * _size(size, spread)
    else:
        num_ids = spread.count**2 * max(1, -(-ids.size // spread.count**2))
        owners = _fill_to(owners, num_ids, -1)
    gains = None if gains is None else _fill_to(gains, num_ids)
    scales = None if scales is None else _fill_to(scales, _size(size, spread))
    return Samples(_fill_to(ids, num_ids, -1), owners, gains, scales)


def _fill_to(x: jax.Array, size: int, value: int = 0) -> jax.Array:
    """Fills an array with a number, to so many elements or rows."""
    missing = size - x.shape[0]
    if not missing:
        return x
    x = everywhere(jnp.asarray(x))
    fill = np.dtype(x.dtype).type(value)
    return jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)), constant_values=fill)


def _dealt(samples: Samples, size: int, spread: Spread) -> Part:
    """Returns a device's part of a feature; ids that name their samples are dealt."""
    if samples.owners is None:
        return Part(samples, size, dealt=False)
    return Part(deal(samples, spread.axes), size, dealt=True)


def _of_all(samples: Samples, size: int, spread: Spread) -> Samples:
    """Gathers the samples of all devices, where each has its own."""
    if samples.owners is not None:
        first = lax.axis_index(spread.axes) * jnp.int32(size)
        there = (samples.owners >= 0) & (samples.owners < size)
        owners = jnp.where(there, samples.owners + first, jnp.int32(-1))
        samples = samples._replace(owners=owners)
    gather = functools.partial(lax.all_gather, axis_name=spread.axes, tiled=True)
    return jax.tree.map(gather, samples)
