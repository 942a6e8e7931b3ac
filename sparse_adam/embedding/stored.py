"""A table with its slots, as it is stored: three arrays, or one packed one.

Everything outside sees logical arrays `[V, D]`; here is the only place that knows both,
and the one that checks a state against its layout.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_adam.embedding.tables import Table
from sparse_adam.kernels.layout import PlainLayout
from sparse_adam.ops.combine import Samples, combine
from sparse_adam.ops.lookup import lookup_plain
from sparse_adam.ops.packed import PackedTable, check_lines
from sparse_adam.ops.validate import STORED_DTYPES


def checked(tables: Mapping[str, Any], table: Table) -> Any:
    """Returns a table of a state, checked against its layout by types and shapes alone.

    NumPy arrays will do: they are what a checkpoint may hold.

    Raises:
        TypeError: the table is of a wrong kind, or has arrays of a wrong dtype.
        ValueError: there is none of this name, it has another number of arrays or
            another shape, or its slots are not spread over devices as it is.
    """
    if table.name not in tables:
        raise ValueError(
            f"state.tables has no table {table.name!r}, only {list(tables)}: it must "
            "have all tables of its layout"
        )
    stored = tables[table.name]
    if isinstance(stored, PackedTable):
        _check_packed(table, stored)
    elif isinstance(stored, tuple):
        _check_plain(table, stored)
    else:
        raise TypeError(
            f"table {table.name!r} is a {type(stored).__name__}; it must be what init "
            f"makes, a PackedTable or a tuple of the arrays {table.array_names}: pass "
            "optimizer.state_of(arrays)"
        )
    return stored


def owned(stored: Mapping[str, Any], tables: Sequence[Table]) -> dict[str, Any]:
    """Returns the tables of a state that is handed over, checked: all can be donated.

    Raises:
        TypeError: see `checked`.
        ValueError: see `checked`; or one array stands in two places.
    """
    found = {table.name: checked(stored, table) for table in tables}
    leaves = jax.tree.leaves(found)
    if len(set(map(id, leaves))) < len(leaves):
        raise ValueError(
            "state has one array in two places, but the next update donates each: "
            "pass jax.tree.map(jnp.copy, state)"
        )
    # NumPy arrays become JAX's own; JAX may share the memory of one.
    return jax.tree.map(
        lambda x: x if isinstance(x, jax.Array) else jnp.array(x, copy=True), found
    )


def _check_plain(table: Table, stored: tuple[Any, ...]) -> None:
    names, shapes = table.array_names, table.shapes
    if len(stored) != len(names):
        raise ValueError(
            f"table {table.name!r} has {len(stored)} arrays, but its optimizer "
            f"{type(table.optimizer).__name__} has {len(names)}, {names}: make them by "
            "optimizer.init(table)"
        )
    for name, array, shape in zip(names, stored, shapes, strict=True):
        if not isinstance(array, jax.Array | np.ndarray):
            raise TypeError(
                f"{name} of table {table.name!r} is a {type(array).__name__}; it must "
                "be an array of JAX or NumPy"
            )
        if array.shape != shape:
            raise ValueError(
                f"{name} of table {table.name!r} has the shape {array.shape}; it must "
                f"be {shape}, as its layout says: {_way_to_whole_tables()}"
            )
        if array.dtype not in STORED_DTYPES:
            raise TypeError(
                f"{name} of table {table.name!r} has dtype={array.dtype}; it must be "
                "float32 or bfloat16: pass .astype(jnp.float32)"
            )
    rows = [_spread_over(array) for array in stored]
    if any(axes != rows[0] for axes in rows):
        raise ValueError(
            f"the rows of table {table.name!r} are spread over the axes "
            f"{dict(zip(names, rows, strict=True))}; the slots must be spread as the "
            "table is: jax.device_put the whole state with one sharding"
        )


def _check_packed(table: Table, packed: PackedTable) -> None:
    layout, whole = packed.layout, table.shapes[0]
    if (layout.num_rows, layout.dim) != whole:
        raise ValueError(
            f"table {table.name!r} is packed for the shape "
            f"{(layout.num_rows, layout.dim)}; it must be {whole}, as its layout says: "
            f"{_way_to_whole_tables()}"
        )
    if len(layout.dtypes) != len(table.array_names):
        raise ValueError(
            f"table {table.name!r} is packed with {len(layout.dtypes)} arrays, but its "
            f"optimizer {type(table.optimizer).__name__} has {len(table.array_names)}, "
            f"{table.array_names}: make it by optimizer.init(table, storage='packed')"
        )
    if np.shape(packed.lines) != layout.shape:
        raise ValueError(
            f"table {table.name!r} has packed lines of the shape "
            f"{np.shape(packed.lines)}; they must be {layout.shape} for {whole} "
            f"weights: {_way_to_whole_tables()}"
        )

    try:
        check_lines(packed)
    except TypeError as error:
        raise TypeError(f"table {table.name!r}: {error}") from error
    axes = _spread_over(packed.lines)
    if axes is not None:
        mesh = jax.typeof(packed.lines).sharding.mesh
        names = axes if isinstance(axes, tuple) else (axes,)
        try:
            layout.divided(math.prod(mesh.shape[axis] for axis in names))
        except ValueError as error:
            raise ValueError(f"table {table.name!r}: {error}") from error


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


def arrays(stored: Any) -> tuple[jax.Array, ...]:
    """Returns the table and its slots, `[V, D]` each."""
    return stored.unpack() if isinstance(stored, PackedTable) else tuple(stored)


def weights(stored: Any) -> jax.Array:
    """Returns the weights `[V, D]` of a stored table, without its slots."""
    return arrays(stored)[0]


def with_arrays(stored: Any, new: Sequence[jax.Array]) -> Any:
    """Returns the like of `stored` with these arrays, sharded as it is."""
    if isinstance(stored, PackedTable):
        packed = PackedTable.pack(*new)
        return PackedTable(
            jax.device_put(packed.lines, stored.lines.sharding), packed.layout
        )
    placed = [
        jax.device_put(x, old.sharding) for x, old in zip(new, stored, strict=True)
    ]
    make = getattr(stored, "_make", tuple)
    return make(placed)
