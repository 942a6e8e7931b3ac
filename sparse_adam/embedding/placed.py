"""Stacks whose rows are spread over devices: filled and read, no table ever whole.

On its way a table is in *parts*: an array `[n * ceil(V / n), ...]` in logical order, a
range of rows on each of n devices, that ends in zeros where n does not divide V.
"""

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sparse_adam.embedding.stacks import Stack
from sparse_adam.kernels.layout import Layout, PackedLayout, PlainLayout
from sparse_adam.ops import placing
from sparse_adam.ops.integers import in_32_bits
from sparse_adam.ops.packed import PackedTable
from sparse_adam.ops.packing import pack_rows, unpack_rows
from sparse_adam.ops.spread import Spread, everywhere

Parts: TypeAlias = Sequence[jax.Array | None]  # of the weights and slots of a table


def parts_of(x: ArrayLike, spread: Spread, dtype: Any = None) -> jax.Array:
    """Returns the rows of an array `[V, ...]` in parts.

    Args:
        x: an array of NumPy, or one that is on other devices: each device is sent its
            part from the host. One of JAX on the devices of the mesh stays there.
        spread: the devices.
        dtype: of the result; None is that of `x`.
    """
    count, num_rows = spread.count, np.shape(x)[0]
    size = -(-num_rows // count)
    if _is_there(x, spread):
        x = jnp.asarray(x, dtype)
        if not count * size - num_rows:
            return x
        return jnp.pad(
            everywhere(x), ((0, count * size - num_rows), *((0, 0),) * (x.ndim - 1))
        )
    host = np.asarray(x)
    shape = (count * size, *host.shape[1:])
    dtype = host.dtype if dtype is None else dtype

    def part(index: Any) -> np.ndarray:
        start = index[0].start or 0
        own = np.zeros((size, *host.shape[1:]), dtype)
        found = host[start : start + size]
        own[: len(found)] = found
        return own

    return jax.make_array_from_callback(shape, spread.sharding, part)


def _is_there(x: Any, spread: Spread) -> bool:
    """Returns whether an array is one of JAX on the devices of the mesh."""
    if isinstance(x, jax.core.Tracer):
        return True
    devices = set(spread.mesh.devices.flat)
    return isinstance(x, jax.Array) and x.sharding.device_set == devices


def filled(
    stack: Stack, tables: Sequence[Parts | None], *, stored: Any = None, packed: bool
) -> Any:
    """Returns a stack as it is stored, with the rows of some tables written into it.

    Args:
        stack: of the tables.
        tables: of each table the parts of its weights and slots, None for those that
            are new or stay; None for a table that stays.
        stored: what to write into; None is a new stack, whose slots are new where they
            are not given.
        packed: how the stack is stored.
    """
    assert stack.spread is not None
    if stored is None:
        dtypes = _dtypes(stack, tables)
        whole: Layout = PlainLayout(stack.num_rows, stack.dim, dtypes, _per_row(stack))
        if packed:
            whole = PackedLayout(stack.num_rows, stack.dim, dtypes)
            # Refuses what cannot be packed.
            shapes = stack.whole_shapes
            jax.eval_shape(PackedTable.pack, *map(jax.ShapeDtypeStruct, shapes, dtypes))
        arrays = None
    else:
        whole, arrays = layout_of(stack, stored), _arrays(stored)
    new = _fill(
        arrays,
        [None if parts is None else list(parts) for parts in tables],
        spread=stack.spread,
        layout=stack.spread.part(whole),
        places=_places(stack),
        initial=tuple(slot.initial for slot in stack.optimizer.rule.slots),
    )
    if packed:
        return PackedTable(new[0], stack.spread.whole(whole))  # type: ignore[arg-type]
    return stack.optimizer.state_of(new)


def read(
    stored: Any, stack: Stack, tables: Sequence[int]
) -> list[tuple[jax.Array, ...]]:
    """Returns the weights and slots of some tables of a stack, `[V, ...]` each.

    They are spread by ranges of rows where V divides by the number of devices; JAX has
    no array of other ranges, so all others are whole on each device.

    Args:
        stored: the stack; or its weights alone.
        stack: of the tables.
        tables: their places in the stack.
    """
    return _read(_arrays(stored), cut=True, **_how(stored, stack, tables))


def read_parts(
    stored: Any, stack: Stack, tables: Sequence[int]
) -> list[tuple[jax.Array, ...]]:
    """Returns what `read` does, in parts: spread, however many rows a table has."""
    return _read(_arrays(stored), cut=False, **_how(stored, stack, tables))


def rows_in_parts(spread: Spread, num_rows: int) -> int:
    """Returns how many rows a table of V has in parts: those of zeros too."""
    return spread.count * -(-num_rows // spread.count)


def _how(stored: Any, stack: Stack, tables: Sequence[int]) -> dict[str, Any]:
    assert stack.spread is not None
    places = tuple(_places(stack)[place] for place in tables)
    layout = stack.spread.part(layout_of(stack, stored))
    return {"spread": stack.spread, "layout": layout, "places": places}


def layout_of(stack: Stack, stored: Any) -> Layout:
    """Returns the layout of a stack as if it were on one device."""
    if isinstance(stored, PackedTable):
        return stored.layout.with_rows(stack.num_rows)
    dtypes = tuple(np.dtype(x.dtype) for x in stored)
    per_row = _per_row(stack)[: len(dtypes)]
    return PlainLayout(stack.num_rows, stack.dim, dtypes, per_row)


def _per_row(stack: Stack) -> tuple[bool, ...]:
    return (False, *(slot.per == "row" for slot in stack.optimizer.rule.slots))


def _places(stack: Stack) -> tuple[tuple[int, int], ...]:
    """Returns the first row and the number of rows of each table."""
    sizes = (table.num_rows for table in stack.tables)
    return tuple(zip(stack.offsets, sizes, strict=True))


def _arrays(stored: Any) -> tuple[jax.Array, ...]:
    if isinstance(stored, PackedTable):
        return (stored.lines,)
    return tuple(map(jnp.asarray, stored))


def _dtypes(stack: Stack, tables: Sequence[Parts | None]) -> tuple[np.dtype, ...]:
    """Returns the dtypes of a new stack.

    Raises:
        ValueError: those of its tables differ.
    """
    kinds = []
    for table, parts in zip(stack.tables, tables, strict=True):
        dtypes = [table.config.dtype]
        for slot in table.optimizer.rule.slots:
            of_slot = np.dtype(np.float32) if slot.per == "row" else None
            dtypes.append(of_slot or table.config.slot_dtype)
        given = parts or ()
        for i, x in enumerate(given):
            if x is not None:
                dtypes[i] = np.dtype(x.dtype)
        kinds.append(tuple(dtypes))
    for table, kind in zip(stack.tables, kinds, strict=True):
        if kind != kinds[0]:
            raise ValueError(
                f"tables {stack.tables[0].name!r} and {table.name!r} would share one "
                "array, but the dtypes of their arrays are "
                f"{[x.name for x in kinds[0]]} and {[x.name for x in kind]}: make them "
                "alike, or call init(..., stack=False)"
            )
    return kinds[0]


@in_32_bits
@functools.partial(jax.jit, static_argnames=("spread", "layout", "places", "initial"))
def _fill(
    stored: tuple[jax.Array, ...] | None,
    tables: list[list[jax.Array | None] | None],
    *,
    spread: Spread,
    layout: Layout,
    places: tuple[tuple[int, int], ...],
    initial: tuple[Any, ...],
) -> tuple[jax.Array, ...]:
    """Writes tables into a stack; see `filled`.

    Args:
        stored: the arrays of the layout; None is zeros.
        tables: their parts.
        spread: the devices.
        layout: of what one of them has.
        places: of all tables.
        initial: of each slot, a number or "weights".
    """
    shapes = [
        (layout.num_rows,) if per_row else (layout.num_rows, layout.dim)
        for per_row in layout.per_row
    ]

    def fill_own(stored: Any, tables: Any) -> tuple[jax.Array, ...]:
        new = stored is None
        if new:
            arrays = [
                jnp.zeros(shape, dtype)
                for shape, dtype in zip(shapes, layout.dtypes, strict=True)
            ]
        else:
            arrays = list(_opened(stored, layout))
        for (start, num_rows), parts in zip(places, tables, strict=True):
            given = parts or [None] * len(arrays)
            given = [*given, *[None] * (len(arrays) - len(given))]
            for i, part in enumerate(given):
                if part is not None:
                    arrays[i] = placing.write(
                        arrays[i], part, spread.axes, start, num_rows
                    )
                elif new and i and initial[i - 1] == "weights":
                    assert given[0] is not None
                    arrays[i] = placing.write(
                        arrays[i],
                        given[0].astype(arrays[i].dtype),
                        spread.axes,
                        start,
                        num_rows,
                    )
                elif new and i:
                    arrays[i] = placing.write_constant(
                        arrays[i], initial[i - 1], spread.axes, start, num_rows
                    )
        return _closed(tuple(arrays), layout)

    return spread.map(fill_own, (spread.spec, spread.spec), spread.spec)(stored, tables)


@in_32_bits
@functools.partial(jax.jit, static_argnames=("cut", "spread", "layout", "places"))
def _read(
    stored: tuple[jax.Array, ...],
    *,
    cut: bool,
    spread: Spread,
    layout: Layout,
    places: tuple[tuple[int, int], ...],
) -> list[tuple[jax.Array, ...]]:
    def read_own(stored: tuple[jax.Array, ...]) -> list[tuple[jax.Array, ...]]:
        arrays = _opened(stored, layout)
        return [
            tuple(placing.read(x, spread.axes, *place) for x in arrays)
            for place in places
        ]

    found = spread.map(read_own, (spread.spec,), spread.spec)(stored)
    if not cut:
        return found
    return [
        tuple(spread.cut(x, num_rows) for x in arrays)
        for arrays, (_, num_rows) in zip(found, places, strict=True)
    ]


def _opened(stored: tuple[jax.Array, ...], layout: Layout) -> tuple[jax.Array, ...]:
    """Returns the weights and slots that one device has."""
    if isinstance(layout, PackedLayout):
        return unpack_rows(stored[0], layout=layout, shards=None)
    return stored


def _closed(arrays: tuple[jax.Array, ...], layout: Layout) -> tuple[jax.Array, ...]:
    """Returns weights and slots as one device stores them."""
    if isinstance(layout, PackedLayout):
        return (pack_rows(arrays, layout=layout, shards=None),)
    return arrays
