"""Packing the rows of a table and its slots into lines, and unpacking them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from sparse_adam.kernels.layout import PackedLayout, PlainLayout
from sparse_adam.kernels.spec import State
from sparse_adam.ops.automatic import Cut, Partition
from sparse_adam.ops.integers import in_32_bits
from sparse_adam.ops.late import late_primitive, no_gradient
from sparse_adam.ops.rows import PackedRows, PlainRows
from sparse_adam.ops.shards import Shards, vary_alike

_BLOCK_WORDS = 2**20  # of a table, packed or unpacked at a time


@in_32_bits
@functools.partial(jax.jit, static_argnames=("layout", "shards"))
def pack_rows(
    arrays: State, *, layout: PackedLayout, shards: Shards | None
) -> jax.Array:
    """Packs `[V, D]` weights and slots into lines; where they are spread, each part."""
    if shards is None:
        return _pack_p(*arrays, layout=layout)[0]
    own = layout.divided(shards.count)
    return shards.on_each(functools.partial(_pack, layout=own), arrays)


@in_32_bits
@functools.partial(jax.jit, static_argnames=("layout", "shards"))
def unpack_rows(
    lines: jax.Array, *, layout: PackedLayout, shards: Shards | None
) -> State:
    """Returns the weights and slots that lines hold; where they are spread, as they."""
    if shards is None:
        return tuple(_unpack_p(lines, layout=layout))
    own = layout.divided(shards.count)
    return shards.on_each(functools.partial(_unpack, layout=own), lines)


def _pack(arrays: State, *, layout: PackedLayout) -> jax.Array:
    plain, packed, size = _both_rows(layout)
    opened = plain.opened(arrays)

    def pack(start: jax.Array, rows: int, lines: State) -> State:
        missing = -rows % packed.step
        values = tuple(
            jnp.pad(x, ((0, missing), (0, 0))) for x in plain.slice(opened, start, rows)
        )
        return packed.update_slice(lines, start, values, None)

    lines = vary_alike(jnp.zeros(layout.shape, jnp.int32), arrays[0])
    return _in_blocks(pack, layout.num_rows, size, (lines,))[0]


def _unpack(lines: jax.Array, *, layout: PackedLayout) -> State:
    plain, packed, size = _both_rows(layout)
    shape = (layout.num_rows, layout.dim)
    zeros = tuple(jnp.zeros(shape, dtype) for dtype in layout.dtypes)
    arrays = plain.opened(vary_alike(zeros, lines))

    def unpack(start: jax.Array, rows: int, arrays: State) -> State:
        missing = -rows % packed.step
        values = packed.slice((lines,), start, rows + missing)
        return plain.update_slice(arrays, start, tuple(x[:rows] for x in values), None)

    return plain.closed(_in_blocks(unpack, layout.num_rows, size, arrays))


def _both_rows(layout: PackedLayout) -> tuple[PlainRows, PackedRows, int]:
    """Returns the rows of both storages, and how many of them to move at a time."""
    packed = PackedRows(layout)
    size = max(1, _BLOCK_WORDS // layout.dim // packed.step) * packed.step
    arrays = PlainLayout(layout.num_rows, layout.dim, layout.dtypes, layout.per_row)
    return PlainRows(arrays), packed, size


def _in_blocks(
    body: Callable[[jax.Array, int, State], State], rows: int, size: int, state: State
) -> State:
    """Calls `state = body(start, size, state)` for all rows, the last ones apart.

    In one piece XLA would make every plane of the whole table on the way.
    """
    blocks = rows // size
    if blocks:
        state = lax.fori_loop(
            0, blocks, lambda i, state: body(i * size, size, state), state
        )
    done = blocks * size
    return state if done == rows else body(jnp.int32(done), rows - done, state)


def _of_tables(run: Callable[..., Any], lead: int) -> Callable[..., Any]:
    """Returns the function for arrays of tables, `[T, ...]`, where `lead` is 1."""
    return jax.vmap(run) if lead else run


def _run_pack(platform: Any, *arrays: jax.Array, layout: PackedLayout) -> State:
    del platform

    def run(*arrays: jax.Array) -> jax.Array:
        return _pack(arrays, layout=layout)

    return (_of_tables(run, arrays[0].ndim - 2)(*arrays),)


def _run_unpack(platform: Any, lines: jax.Array, *, layout: PackedLayout) -> State:
    del platform
    return _of_tables(functools.partial(_unpack, layout=layout), lines.ndim - 2)(lines)


def _lines_type(*arrays: Any, layout: PackedLayout) -> list[Any]:
    lead = arrays[0].shape[:-2]
    return [arrays[0].update(shape=(*lead, *layout.shape), dtype=jnp.dtype(jnp.int32))]


def _array_types(lines: Any, *, layout: PackedLayout) -> list[Any]:
    shape = (*lines.shape[:-2], layout.num_rows, layout.dim)
    return [lines.update(shape=shape, dtype=dtype) for dtype in layout.dtypes]


def _over_tables(
    bind: Callable[..., Sequence[jax.Array]],
    arrays: Sequence[jax.Array],
    axes: Sequence[int | None],
    *,
    layout: PackedLayout,
) -> tuple[list[jax.Array], list[int]]:
    """Packs or unpacks T tables under `jax.vmap` at once."""
    size = next(x.shape[a] for x, a in zip(arrays, axes, strict=True) if a is not None)
    stacked = [
        jnp.broadcast_to(x, (size, *x.shape)) if a is None else jnp.moveaxis(x, a, 0)
        for x, a in zip(arrays, axes, strict=True)
    ]
    lead = stacked[0].shape[:-2]
    found = bind(*(x.reshape(-1, *x.shape[-2:]) for x in stacked), layout=layout)
    return [x.reshape(*lead, *x.shape[-2:]) for x in found], [0] * len(found)


def _spread_alike(
    to_lines: bool, *types: Any, layout: PackedLayout
) -> tuple[str, dict[str, int]]:
    """Says that rows and lines are cut into the same parts, where they can be cut."""
    unit = layout.with_rows(1)
    parts, rest = divmod(layout.num_rows, unit.room)
    rows, lines, sizes = "(parts rows)", "(parts lines)", {}
    if rest:
        rows, lines = "rows", "lines"
    else:
        sizes = {"parts": parts, "rows": unit.room, "lines": unit.shape[0]}
    tables = "tables " * (types[0].ndim - 2)
    names = (f"{tables}{rows} lane{i}" for i in range(len(layout.dtypes)))
    sides = (", ".join(names), f"{tables}{lines} lane")
    return " -> ".join(sides if to_lines else sides[::-1]), sizes


def _cut(
    run: Callable[..., State],
    mesh: Any,
    specs: Sequence[PartitionSpec],
    *,
    layout: PackedLayout,
) -> Cut:
    """Packs or unpacks on each device the rows that it has."""
    *tables, rows, lanes = specs[0]
    shards = Shards.by("table", mesh, PartitionSpec(rows, lanes))
    own = functools.partial(run, None, layout=layout.divided(shards.count))
    spread = PartitionSpec(*tables, *shards.rows)
    others = 1 if len(specs) > 1 else len(layout.dtypes)
    return Cut(own, (spread,) * len(specs), (spread,) * others)


_pack_p = late_primitive(
    "sparse_pack",
    _run_pack,
    _lines_type,
    lambda *args, **static: _over_tables(_pack_p, *args, **static),
    over_devices=Partition(
        functools.partial(_spread_alike, True), functools.partial(_cut, _run_pack)
    ),
    jvp=no_gradient(
        "packing a table cannot be differentiated, since its lines are no numbers: "
        "differentiate the loss by the rows that `lookup` returns"
    ),
)

_unpack_p = late_primitive(
    "sparse_unpack",
    _run_unpack,
    _array_types,
    lambda *args, **static: _over_tables(_unpack_p, *args, **static),
    over_devices=Partition(
        functools.partial(_spread_alike, False), functools.partial(_cut, _run_unpack)
    ),
    jvp=no_gradient(
        "unpacking a table cannot be differentiated by its lines, which are no "
        "numbers: differentiate the loss by the rows that `lookup` returns"
    ),
)
