"""Reading rows on one device: by kernels on a TPU, in C++ on a CPU, by XLA elsewhere.

On a TPU SparseCores read the rows of every table that they can, plain or packed. Of the
others a TensorCore kernel reads packed ones, and XLA plain ones.

Plain rows are read by one primitive and packed ones by another, since XLA can gather
plain rows by itself, however they are spread, and knows nothing of packed lines.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from sparse_adam._types import Indices
from sparse_adam.kernels import cpu, sparsecore
from sparse_adam.kernels import lookup as kernel
from sparse_adam.kernels.layout import Layout, PackedLayout, PlainLayout
from sparse_adam.ops.automatic import Cut, Partition
from sparse_adam.ops.integers import in_32_bits
from sparse_adam.ops.late import late_primitive, no_gradient
from sparse_adam.ops.rows import PackedRows
from sparse_adam.ops.shards import Shards, vary_alike


def plain_rows(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns rows of a plain table that this device has whole; -1 gives zeros."""
    layout = PlainLayout.of_weights(table)
    if rows.size == 0 or not _has_kernel(layout):
        return gather(table, rows)  # on every platform
    table, flat = vary_alike((table, rows.reshape(-1)))
    return _read_plain(table, flat, layout=layout).reshape(*rows.shape, layout.dim)


@in_32_bits
@functools.partial(jax.jit, static_argnames="layout")
def packed_rows(lines: jax.Array, rows: Indices, *, layout: PackedLayout) -> jax.Array:
    """Returns `[N, D]` rows of a packed table that this device has whole."""
    if rows.size == 0:
        return jnp.zeros((0, layout.dim), layout.dtypes[0])
    return _lookup_rows(lines, rows, layout=layout)[0]


def read_rows(stored: jax.Array, rows: Indices, layout: Layout) -> jax.Array:
    """Reads rows `[N]` of a table of either layout: `[N, D]`; -1 gives zeros."""
    if rows.size == 0:
        return jnp.zeros((0, layout.dim), layout.dtypes[0])
    if isinstance(layout, PackedLayout):
        return _lookup_rows(stored, rows, layout=layout)[0]
    if _has_kernel(layout):
        return _gather_rows(stored, rows, layout=layout)[0]
    return gather(stored, rows)


def _has_kernel(layout: Layout) -> bool:
    """Tells whether there is a platform where XLA need not gather the rows."""
    return None in (
        cpu.lookup.unsupported(layout),
        sparsecore.lookup.unsupported(layout),
    )


@in_32_bits
@functools.partial(jax.jit, static_argnames="layout")
def _read_plain(table: jax.Array, rows: Indices, *, layout: PlainLayout) -> jax.Array:
    return _gather_rows(table, rows, layout=layout)[0]


def gather(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Gathers rows; -1 gives zeros."""
    found = table.at[jnp.maximum(rows, 0)].get(mode="promise_in_bounds")
    # A select, since row 0 may hold a NaN.
    return jnp.where((rows >= 0)[..., None], found, jnp.zeros_like(found))


def by_gather(lines: jax.Array, rows: Indices, *, layout: PackedLayout) -> jax.Array:
    """Looks up rows by XLA's gather; a row of -1 gives zeros."""
    words = PackedRows(layout).plane((lines,), rows, layout.weight_plane)
    return jnp.where((rows >= 0)[:, None], layout.weights(words), 0)


def _run(
    platform: str | None, lines: jax.Array, rows: Indices, *, layout: PackedLayout
) -> tuple[jax.Array]:
    """Looks up by a kernel on a TPU, in C++ on a CPU, by XLA elsewhere.

    Lines `[T, lines, 128]` and rows `[T, N]` are those of T tables, looked up as of one
    tall table.
    """
    shape = rows.shape
    if len(shape) == 2:
        number = lax.broadcasted_iota(jnp.int32, shape, 0)
        rows = jnp.where(rows < 0, -1, rows + number * layout.room).reshape(-1)
        layout = layout.with_rows(shape[0] * layout.room)
        lines = lines.reshape(layout.shape)
    if platform == "tpu" and sparsecore.lookup.is_compiled(layout):
        found = sparsecore.lookup.lookup_rows(lines, rows, layout)
    elif platform == "tpu":
        found = kernel.lookup(lines, rows, layout)
    elif platform == "cpu" and cpu.lookup.unsupported(layout) is None:
        found = cpu.lookup.lookup_rows(lines, rows, layout=layout)
    else:
        found = by_gather(lines, rows, layout=layout)
    return (found.reshape(*shape, layout.dim),)


def _results(lines: Any, rows: Any, *, layout: PackedLayout) -> list[Any]:
    """Returns the type of the weights, which vary as the ids do."""
    del lines
    return [rows.update(shape=(*rows.shape, layout.dim), dtype=layout.dtypes[0])]


def _over_tables(
    arrays: Any, axes: Any, *, layout: PackedLayout
) -> tuple[list[jax.Array], list[int]]:
    """Looks up T batches under `jax.vmap` at once, be it in one table or in T."""
    (lines, rows), (table_axis, batch_axis) = arrays, axes
    if table_axis is None:
        # Batches for one table, or for each of some: one longer batch.
        axis = lines.ndim - 2
        rows = jnp.moveaxis(rows, batch_axis, axis)
        shape = rows.shape
        rows = rows.reshape(*shape[:axis], -1)
    else:
        lines, axis = jnp.moveaxis(lines, table_axis, 0), 0
        if batch_axis is None:
            rows = jnp.broadcast_to(rows, (lines.shape[0], *rows.shape))
        else:
            rows = jnp.moveaxis(rows, batch_axis, 0)
        shape = rows.shape
        lines = lines.reshape(-1, *lines.shape[-2:])
        rows = rows.reshape(-1, rows.shape[-1])
    (found,) = _lookup_rows(lines, rows, layout=layout)
    return [found.reshape(*shape, layout.dim)], [axis]


def _rule(lines: Any, rows: Any, *, layout: PackedLayout) -> tuple[str, dict[str, int]]:
    """Says that what is looked up is spread as the ids are."""
    del rows, layout
    tables = "tables " * (lines.ndim - 2)
    return f"{tables}rows lane, {tables}ids -> {tables}ids dim", {}


def _cut(mesh: Any, specs: Sequence[PartitionSpec], *, layout: PackedLayout) -> Cut:
    """Looks up on each device what it has, zeros for all else, and adds that up.

    Ids that are spread along other axes than the rows stay so.
    """
    *tables, rows, lanes = specs[0]
    shards = Shards.by("packed.lines", mesh, PartitionSpec(rows, lanes))
    own = layout.divided(shards.count)

    def look_up_own(lines: jax.Array, rows: Indices) -> jax.Array:
        return shards.sum(
            packed_rows(lines, shards.own(rows, own.num_rows), layout=own)
        )

    look_up = jax.vmap(look_up_own) if tables else look_up_own
    used = {*shards.axes, *_axes(*tables)}
    ids = tuple(x for x in _axes(specs[1][-1]) if x not in used)
    batch = PartitionSpec(*tables, ids or None)
    operands = (PartitionSpec(*tables, *shards.rows), batch)
    return Cut(lambda *arrays: (look_up(*arrays),), operands, (batch,))


def _axes(*parts: Any) -> tuple[str, ...]:
    """Returns the axes of a mesh that parts of a `PartitionSpec` name."""
    return tuple(
        axis
        for part in parts
        for axis in (part if isinstance(part, tuple) else (part,))
        if axis is not None
    )


_lookup_rows = late_primitive(
    "sparse_lookup",
    _run,
    _results,
    _over_tables,
    jvp=no_gradient(
        "a lookup in a packed table cannot be differentiated by its lines, which are "
        "no numbers: differentiate the loss by the rows that it returns"
    ),
    over_devices=Partition(_rule, _cut),
)


def _run_plain(
    platform: str | None, table: jax.Array, rows: Indices, *, layout: PlainLayout
) -> tuple[jax.Array]:
    """Looks up on SparseCores, in C++ on a CPU, by XLA elsewhere."""
    if platform == "tpu" and sparsecore.lookup.is_compiled(layout):
        return (sparsecore.lookup.lookup_rows(table, rows, layout),)
    if platform == "cpu" and cpu.lookup.unsupported(layout) is None:
        return (cpu.lookup.lookup_rows(table, rows, layout=layout),)
    return (gather(table, rows),)


def over_tables(
    bind: Callable[..., jax.Array],
    of_each: Callable[..., jax.Array],
    arrays: Sequence[jax.Array],
    axes: Sequence[int | None],
) -> tuple[list[jax.Array], list[int]]:
    """Looks up T batches under `jax.vmap`: in one table, as one longer batch.

    T tables are not made one tall table: where XLA has spread the rows of each over
    devices, it would gather them for that.

    Args:
        bind: looks up in one table with T batches: `bind(stored, *batches)`.
        of_each: looks up in T tables, the first dimension of all arrays.
        arrays: the stored table, and the arrays of a batch.
        axes: those of `jax.vmap`; None where T batches share an array.
    """
    pairs = list(zip(arrays, axes, strict=True))
    size = next(x.shape[axis] for x, axis in pairs if axis is not None)

    def first(x: jax.Array, axis: int | None) -> jax.Array:
        if axis is None:
            return jnp.broadcast_to(x, (size, *x.shape))
        return jnp.moveaxis(x, axis, 0)

    batches = [first(x, axis) for x, axis in pairs[1:]]
    if axes[0] is None:
        return [bind(arrays[0], *batches)], [0]
    return [of_each(first(*pairs[0]), *batches)], [0]


def _over_plain_tables(
    arrays: Any, axes: Any, *, layout: PlainLayout
) -> tuple[list[jax.Array], list[int]]:
    def bind(table: jax.Array, rows: jax.Array) -> jax.Array:
        (found,) = _gather_rows(table, rows.reshape(-1), layout=layout)
        return found.reshape(*rows.shape, layout.dim)

    return over_tables(bind, jax.vmap(gather), arrays, axes)


def _plain_jvp(
    primals: Any, tangents: Any, *, layout: PlainLayout
) -> tuple[list[Any], list[Any]]:
    """Differentiates by the table: its tangents are looked up as it is."""
    _, rows = primals
    return _gather_rows(*primals, layout=layout), [gather(tangents[0], rows)]


_gather_rows = late_primitive(
    "sparse_gather", _run_plain, _results, _over_plain_tables, jvp=_plain_jvp
)
