"""Looking up rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.typing import ArrayLike

from sparse_adam._types import Indices
from sparse_adam.kernels import lookup
from sparse_adam.kernels.layout import PackedLayout
from sparse_adam.ops import storage, validate
from sparse_adam.ops.integers import in_32_bits
from sparse_adam.ops.plan import indices_or
from sparse_adam.ops.shards import Shards, everywhere, like, vary_alike


def lookup_rows(lines: jax.Array, ids: ArrayLike, layout: PackedLayout) -> jax.Array:
    """The weights of rows, `ids.shape + (D,)`; zeros where an id is out of range."""
    shape = validate.integers("ids", ids)
    rows = indices_or(everywhere(ids), layout.num_rows, fill=-1)
    shards = Shards.of("packed.lines", lines)
    if shards is None:
        lines, rows = vary_alike((lines, rows))
        return _lookup(lines, rows, layout=layout).reshape(*shape, layout.dim)
    own = shards.own_layout(layout)
    found = _add_up(lines, rows.reshape(shape), shards=shards, layout=own)
    return like(ids, found)


def gather_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a plain table `[V, D]`: of any row where an id is below 0."""
    shards = Shards.of("table", table)
    if shards is None:
        return _gather(table, ids)
    return like(ids, _add_up(table, everywhere(ids), shards=shards, layout=None))


def _gather(table: jax.Array, rows: jax.Array) -> jax.Array:
    return table.at[jnp.maximum(rows, 0)].get(mode="promise_in_bounds")


@in_32_bits
@functools.partial(jax.jit, static_argnames=("shards", "layout"))
def _add_up(
    stored: jax.Array, rows: jax.Array, *, shards: Shards, layout: PackedLayout | None
) -> jax.Array:
    """Looks up on each device what it has, zeros for all else, and adds that up.

    layout: of one device's packed table; None where `stored` is a plain one.
    """

    def lookup_own(stored: jax.Array, rows: jax.Array) -> jax.Array:
        if layout is not None:
            mine = shards.own(rows.reshape(-1), layout.num_rows)
            found = _lookup(stored, mine, layout=layout)
            return found.reshape(*rows.shape, layout.dim)
        mine = shards.own(rows, stored.shape[0])
        return jnp.where((mine >= 0)[..., None], _gather(stored, mine), 0)

    return shards.sum_of_each(lookup_own, stored, rows)


@in_32_bits
@functools.partial(jax.jit, static_argnames="layout")
def _lookup(lines: jax.Array, rows: Indices, *, layout: PackedLayout) -> jax.Array:
    if rows.size == 0:
        return jnp.zeros((0, layout.dim), layout.table_dtype)
    return lax.platform_dependent(
        *(lines, rows),
        tpu=functools.partial(by_kernel, layout=layout),
        default=functools.partial(by_gather, layout=layout),
    )


def by_gather(lines: jax.Array, rows: Indices, *, layout: PackedLayout) -> jax.Array:
    """By XLA; a row of -1 gives zeros."""
    stored = storage.Packed(layout)
    plane = next(p for p, arrays in enumerate(layout.planes) if 0 in arrays)
    weights = layout.weights(stored.plane((lines,), rows, plane))
    return jnp.where((rows >= 0)[:, None], weights, 0)


def by_kernel(
    lines: jax.Array, rows: Indices, *, layout: PackedLayout, interpret: bool = False
) -> jax.Array:
    """By the TPU's kernel. Under `jax.vmap` too it runs once: T tables are a tall one.

    As in `vmap`, there is no batching rule for a kernel that moves rows by hand.
    """

    @custom_vmap
    @in_32_bits
    def one_table(lines: jax.Array, rows: Indices) -> jax.Array:
        return lookup.lookup(lines, rows, layout, interpret)

    @one_table.def_vmap
    @in_32_bits
    def many_tables(
        size: int, batched: list[bool], lines: jax.Array, rows: Indices
    ) -> tuple[jax.Array, bool]:
        is_tall, has_rows = batched
        if not has_rows:
            rows = jnp.broadcast_to(rows, (size, *rows.shape))
        tall = layout
        if is_tall:
            room = layout.num_groups * layout.rows_per_group
            tall = dataclasses.replace(layout, num_rows=size * room)
            number = lax.broadcasted_iota(jnp.int32, rows.shape, 0)
            rows = jnp.where(rows < 0, -1, rows + number * room)
            lines = lines.reshape(-1, lines.shape[-1])
        found = by_kernel(lines, rows.reshape(-1), layout=tall, interpret=interpret)
        return found.reshape(*rows.shape, layout.dim), True

    return one_table(lines, rows)
