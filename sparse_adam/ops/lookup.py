"""Looking up rows of plain and of packed tables."""

import functools
from typing import Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from sparse_adam.kernels.layout import Layout, PackedLayout
from sparse_adam.ops.integers import check_rows, in_32_bits, integers, to_array
from sparse_adam.ops.plan import indices_or, inside_or
from sparse_adam.ops.reading import packed_rows, plain_rows
from sparse_adam.ops.routed import Routed
from sparse_adam.ops.shards import Shards, everywhere, like, vary_alike


class HasLookup(Protocol):
    """A table that looks up its own rows, as a `PackedTable` does."""

    def lookup(
        self,
        ids: ArrayLike,
        *,
        sharding: NamedSharding | PartitionSpec | None = None,
    ) -> jax.Array:
        """Returns the weights of rows: `ids.shape + (D,)`."""
        ...


def lookup(
    table: ArrayLike | HasLookup,
    ids: ArrayLike,
    *,
    sharding: NamedSharding | PartitionSpec | None = None,
) -> jax.Array:
    """Looks up rows of an embedding table, plain or packed.

    Args:
        table: `[V, D]` weights, or a `PackedTable`.
        ids: `[...]`, any integer dtype.
        sharding: how the rows of the table are spread, a `NamedSharding`, or a
            `PartitionSpec` of the mesh in scope. Under `jax.jit` over automatic axes,
            those of `jax.sharding.Mesh`, TPUs need it, and with it the batch is routed.
            In a `jax.shard_map` the table is then what the device has of it, and ids
            are rows of the whole table, of the device's own batch (docs/sharding.md).

    Returns:
        `ids.shape + (D,)` weights in the table's dtype; zeros for an id that is
        negative or >= V, which the update ignores too.

    Raises:
        TypeError: `ids` are not integers, or the table is a whole state.
        ValueError: the table is not `[V, D]`.

    Differentiate the loss by what this returns, not by the table: the gradient by a
    table has the table's size.

    Examples:
        >>> import jax.numpy as jnp
        >>> print(lookup(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1, -1])))
        [[3. 4.]
         [0. 0.]]
    """
    if isinstance(table, tuple | list | dict):
        raise TypeError(
            f"table is a {type(table).__name__}; it must be the weights [V, D] or a "
            "PackedTable: pass state[0], or state.table"
        )
    if not isinstance(table, jax.Array | np.ndarray) and hasattr(table, "lookup"):
        told = {} if sharding is None else {"sharding": sharding}
        return cast(HasLookup, table).lookup(ids, **told)
    table = jnp.asarray(table)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"table.shape={table.shape} must be (V, D), both at least 1")
    return lookup_plain(table, ids, sharding)


def lookup_packed(
    lines: jax.Array,
    ids: ArrayLike,
    layout: PackedLayout,
    sharding: NamedSharding | PartitionSpec | None = None,
) -> jax.Array:
    """Returns the weights of rows of a packed table: `ids.shape + (D,)`.

    An id outside `[0, V)` gives zeros.
    """
    check_rows(layout.num_rows)
    ids = to_array("ids", ids)
    shape = integers("ids", ids)
    shards = Shards.of("packed.lines", lines, sharding)
    routed = Routed.of(shards, ids, layout.num_rows)
    if routed is not None:
        rows = jnp.asarray(inside_or(ids, routed.num_rows, fill=-1))
        own = routed.own(layout)
        return _from_owners(lines, rows, routed=routed, layout=own)
    rows = indices_or(everywhere(ids), layout.num_rows, fill=-1)
    if shards is None:
        lines, rows = vary_alike((lines, rows))
        return packed_rows(lines, rows, layout=layout).reshape(*shape, layout.dim)
    own = layout.divided(shards.count)
    found = _add_up(lines, rows.reshape(shape), shards=shards, layout=own)
    return like(ids, found)


def lookup_plain(
    table: jax.Array,
    ids: ArrayLike,
    sharding: NamedSharding | PartitionSpec | None = None,
) -> jax.Array:
    """Returns rows of a plain table `[V, D]`: `ids.shape + (D,)`.

    An id outside `[0, V)` gives zeros.
    """
    check_rows(table.shape[0])
    ids = to_array("ids", ids)
    shape = integers("ids", ids)
    shards = Shards.of("table", table, sharding)
    routed = Routed.of(shards, ids, table.shape[0])
    if routed is not None:
        rows = jnp.asarray(inside_or(ids, routed.num_rows, fill=-1))
        return _from_owners(table, rows, routed=routed, layout=None)
    rows = indices_or(everywhere(ids), table.shape[0], fill=-1).reshape(shape)
    if shards is None:
        return plain_rows(table, rows)
    return like(ids, _add_up(table, rows, shards=shards, layout=None))


def lookup_stored(stored: jax.Array, ids: ArrayLike, layout: Layout) -> jax.Array:
    """Returns rows of a table of either layout, as the two functions above."""
    if isinstance(layout, PackedLayout):
        return lookup_packed(stored, ids, layout)
    return lookup_plain(stored, ids)


@in_32_bits
@functools.partial(jax.jit, static_argnames=("shards", "layout"))
def _add_up(
    stored: jax.Array, rows: jax.Array, *, shards: Shards, layout: PackedLayout | None
) -> jax.Array:
    """Looks up on each device what it has, zeros for all else, and adds that up.

    Args:
        stored: lines or a plain table.
        rows: int32, -1 for none.
        shards: the devices that share the rows.
        layout: of one device's packed table; None where `stored` is a plain one.
    """

    def lookup_own(stored: jax.Array, rows: jax.Array) -> jax.Array:
        if layout is not None:
            mine = shards.own(rows.reshape(-1), layout.num_rows)
            found = packed_rows(stored, mine, layout=layout)
            return found.reshape(*rows.shape, layout.dim)
        return plain_rows(stored, shards.own(rows, stored.shape[0]))

    return shards.sum_of_each(lookup_own, stored, rows)


@in_32_bits
@functools.partial(jax.jit, static_argnames=("routed", "layout"))
def _from_owners(
    stored: jax.Array, rows: jax.Array, *, routed: Routed, layout: PackedLayout | None
) -> jax.Array:
    """Looks up each row on the device that has it, for the one that asks.

    The arguments are those of `_add_up`, but that the rows stay where they are.
    """
    if layout is None:
        return _plain_from_owners(routed, stored, rows)
    return routed.look_up(functools.partial(packed_rows, layout=layout), stored, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _plain_from_owners(routed: Routed, table: jax.Array, rows: jax.Array) -> jax.Array:
    """Looks up rows of a plain table. A loop makes the rounds: JAX has no way back."""
    return routed.look_up(plain_rows, table, rows)


def _forward(
    routed: Routed, table: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _plain_from_owners(routed, table, rows), rows


def _backward(
    routed: Routed, rows: jax.Array, grads: jax.Array
) -> tuple[jax.Array, None]:
    """Adds up the gradient of each row at its owner, in float32."""
    return routed.add_up(rows, grads).astype(grads.dtype), None


_plain_from_owners.defvjp(_forward, _backward)
