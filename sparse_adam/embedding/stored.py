"""Stacks of tables with their slots, as they are stored: plain arrays, or packed.

Everything outside sees logical arrays `[V, D]` of each table; here is the only place
that knows how they are stored, and the one that checks a state against its layout.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_adam.embedding import placed
from sparse_adam.embedding.stacks import Stack
from sparse_adam.kernels.layout import PlainLayout
from sparse_adam.ops.combine import Samples, combine
from sparse_adam.ops.lookup import lookup_plain
from sparse_adam.ops.packed import PackedTable, check_lines
from sparse_adam.ops.shards import Shards, everywhere
from sparse_adam.ops.validate import STORED_DTYPES


def checked(stored: Any, stacks: Sequence[Stack]) -> tuple[Any, ...]:
    """Returns the stacks of a state, checked against its layout by types and shapes.

    NumPy arrays will do: they are what a checkpoint may hold.

    Raises:
        TypeError: a stack is of a wrong kind, or has arrays of a wrong dtype.
        ValueError: there is another number of stacks, or one has another number of
            arrays or another shape, or its slots are not spread over devices as it is.
    """
    if not isinstance(stored, tuple | list) or len(stored) != len(stacks):
        raise ValueError(
            f"state.stacks is a {type(stored).__name__} of {len(stored)}; it must have "
            f"the {len(stacks)} stacks of its layout"
        )
    for one, stack in zip(stored, stacks, strict=True):
        if isinstance(one, PackedTable):
            _check_packed(stack, one)
        elif isinstance(one, tuple):
            _check_plain(stack, one)
        else:
            raise TypeError(
                f"{stack.title} is a {type(one).__name__}; it must be what init makes, "
                f"a PackedTable or a tuple of the arrays {stack.array_names}: pass "
                "optimizer.state_of(arrays)"
            )
    return tuple(stored)


def _check_plain(stack: Stack, stored: tuple[Any, ...]) -> None:
    names, shapes = stack.array_names, stack.shapes
    if len(stored) != len(names):
        raise ValueError(
            f"{stack.title} has {len(stored)} arrays, but its optimizer "
            f"{type(stack.optimizer).__name__} has {len(names)}, {names}: make them by "
            "optimizer.init(table)"
        )
    for name, array, shape in zip(names, stored, shapes, strict=True):
        if not isinstance(array, jax.Array | np.ndarray):
            raise TypeError(
                f"{name} of {stack.title} is a {type(array).__name__}; it must "
                "be an array of JAX or NumPy"
            )
        if array.shape != shape:
            raise ValueError(
                f"{name} of {stack.title} has the shape {array.shape}; it must "
                f"be {shape}, as its layout says: {_way_to_whole_tables()}"
            )
        if array.dtype not in STORED_DTYPES:
            raise TypeError(
                f"{name} of {stack.title} has dtype={array.dtype}; it must be "
                "float32 or bfloat16: pass .astype(jnp.float32)"
            )
    rows = [_spread_over(array) for array in stored]
    if any(axes != rows[0] for axes in rows):
        raise ValueError(
            f"the rows of {stack.title} are spread over the axes "
            f"{dict(zip(names, rows, strict=True))}; the slots must be spread as the "
            "table is: jax.device_put the whole state with one sharding"
        )


def _check_packed(stack: Stack, packed: PackedTable) -> None:
    layout, whole = packed.layout, (stack.stored_rows, stack.dim)
    if (layout.num_rows, layout.dim) != whole:
        raise ValueError(
            f"{stack.title} is packed for the shape "
            f"{(layout.num_rows, layout.dim)}; it must be {whole}, as its layout says: "
            f"{_way_to_whole_tables()}"
        )
    if len(layout.dtypes) != len(stack.array_names):
        raise ValueError(
            f"{stack.title} is packed with {len(layout.dtypes)} arrays, but its "
            f"optimizer {type(stack.optimizer).__name__} has {len(stack.array_names)}, "
            f"{stack.array_names}: make it by optimizer.init(table, storage='packed')"
        )
    if stack.rows_here != stack.stored_rows:
        layout = layout.with_rows(stack.rows_here)
        packed = PackedTable(packed.lines, layout)
    if np.shape(packed.lines) != layout.shape:
        raise ValueError(
            f"{stack.title} has packed lines of the shape "
            f"{np.shape(packed.lines)}; they must be {layout.shape} for {whole} "
            f"weights: {_way_to_whole_tables()}"
        )

    try:
        check_lines(packed)
    except TypeError as error:
        raise TypeError(f"{stack.title}: {error}") from error
    axes = _spread_over(packed.lines)
    if axes is not None and stack.spread is None:
        mesh = jax.typeof(packed.lines).sharding.mesh
        names = axes if isinstance(axes, tuple) else (axes,)
        try:
            layout.divided(math.prod(mesh.shape[axis] for axis in names))
        except ValueError as error:
            raise ValueError(f"{stack.title}: {error}") from error


def _way_to_whole_tables() -> str:
    if jax.sharding.get_abstract_mesh().manual_axes:
        return (
            "inside jax.shard_map there is only this device's part of it, and lookup "
            "and apply_gradients take whole tables. Call them outside of shard_map, "
            "with tables spread over a mesh of explicit axes; or inside call "
            "sparse_adam.lookup and sparse_adam.sparse_update on the device's own rows "
            "(docs/sharding.md)"
        )
    return (
        "pass a state that init made of this feature_config, or a checkpoint of one; "
        "to change the size of a table, change its TableConfig and load the new arrays"
    )


def _spread_over(array: Any) -> Any:
    """Returns the axes that the rows are spread over, as far as the type tells."""
    if not isinstance(array, jax.Array):
        return None
    return jax.typeof(array).sharding.spec[0]


def rows(stored: Any, ids: jax.Array) -> jax.Array:
    """Returns the weights of rows: `[N, D]`, zeros where an id is below 0."""
    if isinstance(stored, PackedTable):
        return stored.lookup(ids)
    return lookup_plain(jnp.asarray(stored[0]), ids)


def combined_rows(
    stored: Any, samples: Samples, num_samples: int, *, ascending: bool
) -> jax.Array:
    """Returns the combined rows of each sample: `[S, D]`; see `Samples`."""
    if isinstance(stored, PackedTable):
        array, layout = stored.lines, stored.layout
    else:
        array = jnp.asarray(stored[0])
        layout = PlainLayout.of_weights(array)
    return combine(array, samples, num_samples, layout=layout, ascending=ascending)


def table_arrays(stored: Any, stack: Stack, place: int) -> tuple[jax.Array, ...]:
    """Returns the weights and slots of one table of a stack, `[V, D]` each.

    Those of a plain table that stands alone are the state's own arrays. To read all
    tables of a stack, call `arrays_by_table`.
    """
    if stack.spread is not None:
        return placed.read(stored, stack, [place])[0]
    return _cut_out(stored, stack, place)


def table_weights(stored: Any, stack: Stack, place: int) -> jax.Array:
    """Returns the weights of one table of a stack, `[V, D]`.

    Slots that are stored apart from the weights are not read.
    """
    weights = stored if isinstance(stored, PackedTable) else stored[:1]
    return table_arrays(weights, stack, place)[0]


def arrays_by_table(stored: Any, stack: Stack) -> list[tuple[jax.Array, ...]]:
    """Returns what `table_arrays` does for each table, in one program if it is spread.

    Lines that are spread are unpacked once, not once for each table.
    """
    places = range(len(stack.tables))
    if stack.spread is not None:
        return placed.read(stored, stack, places)
    return [_cut_out(stored, stack, place) for place in places]


def _cut_out(stored: Any, stack: Stack, place: int) -> tuple[jax.Array, ...]:
    """Returns the arrays of one table of a stack that no mesh was named for."""
    start, num_rows = stack.offsets[place], stack.tables[place].num_rows
    if not isinstance(stored, PackedTable):
        return tuple(_cut(array, start, num_rows) for array in stored)
    layout = stored.layout
    own = layout.with_rows(num_rows)
    first = start // layout.rows_per_group * layout.lines_per_group
    lines = _cut(stored.lines, first, own.shape[0], own.with_rows(1).shape[0])
    return PackedTable(lines, own).unpack()


def without_slots(stored: Any, stack: Stack, served: Stack, name: str) -> Any:
    """Returns one array of a whole stack as its weights, stored alike.

    Args:
        stored: with its slots.
        stack: as it is laid out.
        served: the same of frozen tables.
        name: of the array that becomes the weights, in their dtype.
    """
    place = stack.array_names.index(name)
    packed = isinstance(stored, PackedTable)
    arrays = stored.unpack() if packed else stored
    dtype = arrays[0].dtype
    array = arrays[place]
    return as_stored(
        served, [array if array.dtype == dtype else array.astype(dtype)], packed=packed
    )


def _cut(array: Any, start: int, size: int, step: int = 1) -> Any:
    """Returns rows of an array, spread as it is where `step` rows are the least."""
    if size == array.shape[0]:
        return array
    shards = Shards.of("table", array)
    if shards is not None and size % (shards.count * step):
        array = everywhere(array)
    return lax.slice_in_dim(jnp.asarray(array), start, start + size)


def stacked(stack: Stack, parts: Sequence[Any]) -> Any:
    """Returns tables, each stored with its slots, as the one array of their stack.

    Raises:
        ValueError: they are stored in different dtypes, or spread differently.
    """
    if len(parts) == 1:
        return parts[0]
    kinds = [
        [(x.dtype.name, _spread_over(x)) for x in jax.tree.leaves(part)]
        for part in parts
    ]
    for table, kind in zip(stack.tables, kinds, strict=True):
        if kind != kinds[0]:
            raise ValueError(
                f"tables {stack.tables[0].name!r} and {table.name!r} would share one "
                "array, but the dtypes of their arrays and the axes that rows are "
                f"spread over are {kinds[0]} and {kind}: make them alike, or call "
                "init(..., stack=False)"
            )
    if not isinstance(parts[0], PackedTable):
        columns = zip(*parts, strict=True)
        return stack.optimizer.state_of(
            [_end_to_end(own, stack.offsets) for own in columns]
        )
    layout = parts[0].layout.with_rows(stack.num_rows)
    starts = [
        offset // layout.rows_per_group * layout.lines_per_group
        for offset in stack.offsets
    ]
    return PackedTable(_end_to_end([part.lines for part in parts], starts), layout)


def _end_to_end(parts: Sequence[jax.Array], starts: Sequence[int]) -> jax.Array:
    """Returns arrays one behind the other, zeros where one begins behind the last."""
    ends = (*starts[1:], starts[-1] + parts[-1].shape[0])
    filled = []
    for part, start, end in zip(parts, starts, ends, strict=True):
        missing = end - start - part.shape[0]
        widths = [(0, missing), *[(0, 0)] * (part.ndim - 1)]
        filled.append(jnp.pad(part, widths) if missing else part)
    return jnp.concatenate(filled)


def as_stored(stack: Stack, arrays: Sequence[jax.Array], *, packed: bool) -> Any:
    """Returns the weights and slots of one table as they are stored."""
    return PackedTable.pack(*arrays) if packed else stack.optimizer.state_of(arrays)


def placed_as(old: Any, new: Any) -> Any:
    """Returns `new` on the devices where `old`, which is stored alike, is."""

    def place(old: Any, new: Any) -> Any:
        if not isinstance(old, jax.Array) or isinstance(old, jax.core.Tracer):
            return new
        return jax.device_put(new, old.sharding)

    return jax.tree.map(place, old, new)
