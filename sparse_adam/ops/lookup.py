"""Looking up rows of plain and of packed tables."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from sparse_adam._types import Indices
from sparse_adam.kernels import cpu
from sparse_adam.kernels import lookup as kernel
from sparse_adam.kernels.layout import Layout, PackedLayout, PlainLayout
from sparse_adam.ops.integers import in_32_bits, integers
from sparse_adam.ops.late import late_primitive
from sparse_adam.ops.plan import indices_or
from sparse_adam.ops.rows import PackedRows
from sparse_adam.ops.shards import Shards, everywhere, like, vary_alike


class HasLookup(Protocol):
    """A table that looks up its own rows, as a `PackedTable` does."""

    def lookup(self, ids: ArrayLike) -> jax.Array:
        """Returns the weights of rows: `ids.shape + (D,)`."""
        ...


def lookup(table: ArrayLike | HasLookup, ids: ArrayLike) -> jax.Array:
    """Looks up rows of an embedding table, plain or packed.

    Args:
        table: `[V, D]` weights, or a `PackedTable`.
        ids: `[...]`, any integer dtype.

    Returns:
        `ids.shape + (D,)` weights in the table's dtype; zeros for an id that is
        negative or >= V, which the update ignores too.

    Raises:
        TypeError: `ids` are not integers, or the table is a whole state.
        ValueError: the table is not `[V, D]`.

    Differentiate the loss by what this returns, not by the table: the gradient by a
    table has the table's size.

    Example:
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
        return cast(HasLookup, table).lookup(ids)
    table = jnp.asarray(table)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"table.shape={table.shape} must be (V, D), both at least 1")
    return lookup_plain(table, ids)


def lookup_packed(lines: jax.Array, ids: ArrayLike, layout: PackedLayout) -> jax.Array:
    """Returns the weights of rows of a packed table: `ids.shape + (D,)`.

    An id outside `[0, V)` gives zeros.
    """
    shape = integers("ids", ids)
    rows = indices_or(everywhere(ids), layout.num_rows, fill=-1).reshape(shape)
    shards = Shards.of("packed.lines", lines)
    if shards is None:
        return _rows_of_device(lines, rows, layout)
    own = layout.divided(shards.count)
    found = _add_up(lines, rows, shards=shards, layout=own)
    return like(ids, found)


def lookup_plain(table: jax.Array, ids: ArrayLike) -> jax.Array:
    """Returns rows of a plain table `[V, D]`: `ids.shape + (D,)`.

    An id outside `[0, V)` gives zeros.
    """
    shape = integers("ids", ids)
    rows = indices_or(everywhere(ids), table.shape[0], fill=-1).reshape(shape)
    shards = Shards.of("table", table)
    layout = PlainLayout.of_weights(table)
    if shards is None:
        return _rows_of_device(table, rows, layout)
    own = layout.divided(shards.count)
    return like(ids, _add_up(table, rows, shards=shards, layout=own))


def lookup_stored(stored: jax.Array, ids: ArrayLike, layout: Layout) -> jax.Array:
    """Returns rows of a table of either layout, as the two functions above."""
    if isinstance(layout, PackedLayout):
        return lookup_packed(stored, ids, layout)
    return lookup_plain(stored, ids)


def _gather(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Gathers rows; -1 gives zeros."""
    found = table.at[jnp.maximum(rows, 0)].get(mode="promise_in_bounds")
    # A select, since row 0 may hold a NaN.
    return jnp.where((rows >= 0)[..., None], found, jnp.zeros_like(found))


@in_32_bits
@functools.partial(jax.jit, static_argnames=("shards", "layout"))
def _add_up(
    stored: jax.Array, rows: jax.Array, *, shards: Shards, layout: Layout
) -> jax.Array:
    """Looks up on each device what it has, zeros for all else, and adds that up.

    Args:
        stored: lines or a plain table.
        rows: int32, -1 for none.
        shards: the devices that share the rows.
        layout: of one device's table.
    """

    def lookup_own(stored: jax.Array, rows: jax.Array) -> jax.Array:
        return _rows_of_device(stored, shards.own(rows, layout.num_rows), layout)

    return shards.sum_of_each(lookup_own, stored, rows)


def _rows_of_device(stored: jax.Array, rows: jax.Array, layout: Layout) -> jax.Array:
    """Returns `rows.shape + (D,)` weights of a table that this device has whole."""
    if isinstance(layout, PlainLayout) and cpu.lookup.unsupported(layout) is not None:
        return _gather(stored, rows)  # on every platform
    stored, flat = vary_alike((stored, rows.reshape(-1)))
    return _lookup(stored, flat, layout=layout).reshape(*rows.shape, layout.dim)


@in_32_bits
@functools.partial(jax.jit, static_argnames="layout")
def _lookup(stored: jax.Array, rows: Indices, *, layout: Layout) -> jax.Array:
    if rows.size == 0:
        return jnp.zeros((0, layout.dim), layout.dtypes[0])
    return _lookup_p.bind(stored, rows, layout=layout)[0]


def read_rows(
    platform: str | None, stored: jax.Array, rows: Indices, *, layout: Layout
) -> jax.Array:
    """Reads packed rows by a kernel on a TPU, any in C++ on a CPU, else by XLA."""
    if platform == "cpu" and cpu.lookup.unsupported(layout) is None:
        return cpu.lookup.lookup_rows(stored, rows, layout=layout)
    if not isinstance(layout, PackedLayout):
        return _gather(stored, rows)
    if platform == "tpu":
        return kernel.lookup(stored, rows, layout)
    return by_gather(stored, rows, layout=layout)


def by_gather(lines: jax.Array, rows: Indices, *, layout: PackedLayout) -> jax.Array:
    """Looks up rows by XLA's gather; a row of -1 gives zeros."""
    words = PackedRows(layout).plane((lines,), rows, layout.weight_plane)
    return jnp.where((rows >= 0)[:, None], layout.weights(words), 0)


def _run(
    platform: str | None, stored: jax.Array, rows: Indices, *, layout: Layout
) -> tuple[jax.Array]:
    return (read_rows(platform, stored, rows, layout=layout),)


def _results(stored: Any, rows: Any, *, layout: Layout) -> list[Any]:
    """Returns the type of `[N, D]` weights, which vary as the ids do."""
    del stored
    return [rows.update(shape=(rows.size, layout.dim), dtype=layout.dtypes[0])]


def over_tables(
    bind: Callable[[Sequence[jax.Array], Layout], jax.Array],
    arrays: Sequence[jax.Array],
    axes: Sequence[int | None],
    layout: Layout,
) -> tuple[list[jax.Array], list[int]]:
    """Looks up T batches under `jax.vmap` at once: T tables are one tall table.

    Args:
        bind: `bind(arrays, layout)` looks up in one table with T batches.
        arrays: the stored table, ids of rows, and more of a batch.
        axes: those of `jax.vmap`; None where T batches share an array.
        layout: of one table.
    """
    table_axis = axes[0]
    size = next(
        x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None
    )
    stored, rows, *others = (
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(arrays, axes, strict=True)
    )
    rows, *others = (
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else x
        for x, axis in zip((rows, *others), axes[1:], strict=True)
    )
    if table_axis is None:
        return [bind((stored, rows, *others), layout)], [0]
    if size * layout.room >= 2**31:

        def one(each: Sequence[jax.Array]) -> jax.Array:
            return bind((each[0], *(x[None] for x in each[1:])), layout)[0]

        return [lax.map(one, (stored, rows, *others))], [0]
    number = lax.broadcasted_iota(jnp.int32, rows.shape, 0)
    rows = jnp.where(rows < 0, -1, rows + number * layout.room)
    stored = stored.reshape(-1, stored.shape[-1])
    tall = layout.with_rows(size * layout.room)
    return [bind((stored, rows, *others), tall)], [0]


def _over_tables(
    arrays: Any, axes: Any, *, layout: Layout
) -> tuple[list[jax.Array], list[int]]:
    def bind(arrays: Sequence[jax.Array], layout: Layout) -> jax.Array:
        stored, rows = arrays
        (found,) = _lookup_p.bind(stored, rows.reshape(-1), layout=layout)
        return found.reshape(*rows.shape, layout.dim)

    return over_tables(bind, arrays, axes, layout)


def _jvp(primals: Any, tangents: Any, *, layout: Layout) -> tuple[list[Any], list[Any]]:
    """Differentiates by a plain table: its tangents are looked up as it is."""
    if isinstance(layout, PackedLayout):
        raise TypeError(
            "a lookup in a packed table cannot be differentiated by its lines, which "
            "are no numbers: differentiate the loss by the rows that it returns"
        )
    _, rows = primals
    return _lookup_p.bind(*primals, layout=layout), [_gather(tangents[0], rows)]


_lookup_p = late_primitive(
    "sparse_lookup", _run, _results, _over_tables, jvp=_jvp, cut_by_xla=("cpu",)
)
