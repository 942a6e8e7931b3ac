"""Tables as checkpoints hold them: by name and in logical order, spread where they are.

`to_logical` gives arrays of V rows. Here a table whose rows are spread over n devices
is in parts: its arrays `[R, D]` end in rows of zeros, R being V rounded up to a
multiple of n, so that no device ever has all of it, whatever V is.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from sparse_adam.embedding.placed import filled, read_parts, rows_in_parts
from sparse_adam.embedding.stacks import Stack, Table
from sparse_adam.embedding.state import EmbeddingState
from sparse_adam.embedding.step import step_at
from sparse_adam.embedding.stored import (
    arrays_by_table,
    as_stored,
    checked,
    placed_as,
    stacked,
)
from sparse_adam.ops.packed import PackedTable

Arrays = Mapping[str, Mapping[str, Any]]  # by table name, and by that of the array


def to_saved(state: EmbeddingState) -> dict[str, dict[str, jax.Array]]:
    """Returns the weights and slots of each table, `[R, D]` or `[R]`.

    Those of plain tables that stand alone are the state's own arrays.
    """
    found = {}
    stacks = checked(state.stacks, state.layout.stacks)
    for stored, stack in zip(stacks, state.layout.stacks, strict=True):
        for table, arrays in zip(stack.tables, _cut(stored, stack), strict=True):
            found[table.name] = dict(zip(table.array_names, arrays, strict=True))
    return {table.name: found[table.name] for table in state.layout.tables}


def targets(like: EmbeddingState) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Returns the shapes `[R, D]`, dtypes and shardings that `from_saved` takes.

    Args:
        like: a state of arrays, or of the shapes of `jax.eval_shape`.
    """
    found = {}
    for stored, stack in zip(like.stacks, like.layout.stacks, strict=True):
        dtypes = _dtypes(stored)
        sharding = _sharding(stored, stack)
        for table in stack.tables:
            shapes = (_saved_shape(stack, shape) for shape in table.shapes)
            found[table.name] = {
                name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
                for name, shape, dtype in zip(
                    table.array_names, shapes, dtypes, strict=True
                )
            }
    return found


def from_saved(like: EmbeddingState, arrays: Arrays, step: int) -> EmbeddingState:
    """Returns a state stored as `like` is, of arrays that are as `targets` says.

    They belong to the state from now on.

    Args:
        like: as of `targets`.
        arrays: all of its tables.
        step: of the state, if it counts steps.
    """
    stacks = []
    for old, stack in zip(like.stacks, like.layout.stacks, strict=True):
        parts = [
            [arrays[table.name][name] for name in table.array_names]
            for table in stack.tables
        ]
        new = _joined(parts, stack, packed=isinstance(old, PackedTable))
        kept = stack.spread is None and _is_placed(old)
        stacks.append(placed_as(old, new) if kept else new)
    layout = like.layout
    steps = step_at(step, layout.stacks[0].spread) if layout.by_step else None
    return EmbeddingState(tuple(stacks), layout, steps)


def new_arrays(table: Table, key: jax.Array) -> dict[str, jax.Array]:
    """Returns first weights and slots `[V, D]` of a table, as `init` makes them."""
    weights = jnp.asarray(table.config.initialize(key, table.name))
    slots = table.optimizer.init_slots(weights, table.config.slot_dtype)
    return {"parameters": weights, **slots}


def on_device(array: np.ndarray | jax.Array, like: Any) -> jax.Array:
    """Returns what was read of an array of `like`'s kind, with zeros where it is short.

    What was read to no certain device comes as a NumPy array, maybe with rows of zeros
    behind those of the table.
    """
    if isinstance(array, jax.Array):
        return array.astype(like.dtype)
    return _resized(jnp.asarray(array[: like.shape[0]]), like.shape, like.dtype)


def grown(
    restored: jax.Array | None, num_rows: int, new: jax.Array, like: Any
) -> jax.Array:
    """Returns an array of `like`'s kind: the first rows restored, the others new.

    Args:
        restored: `[R, ...]`, spread as `like`; or None.
        num_rows: how many rows of it count.
        new: `[V, ...]`.
        like: the shape, dtype and sharding, as of `targets`.
    """
    sized = jax.device_put(_resized(new, like.shape, like.dtype), like.sharding)
    if restored is None:
        return sized
    return jax.device_put(_overlaid(restored, sized, num_rows), like.sharding)


def checksums(arrays: Any) -> Any:
    """Returns the sum of the words of each array of a tree, modulo 2**32.

    Rows of zeros add nothing, and neither the devices nor their number matter.
    """
    return jax.tree.map(int, jax.device_get(_checksums(jax.tree.map(_exact, arrays))))


def _exact(array: Any) -> Any:
    """Returns a NumPy array as bytes in words, of which JAX takes no float64 away."""
    if not isinstance(array, np.ndarray):
        return array
    return np.ascontiguousarray(array).reshape(-1).view(_word(array.dtype))


@jax.jit
def _checksums(arrays: Any) -> Any:
    def checksum(array: jax.Array) -> jax.Array:
        if array.dtype == bool:
            array = array.astype(jnp.uint8)
        if jnp.iscomplexobj(array):
            array = jnp.stack([array.real, array.imag])
        words = jax.lax.bitcast_convert_type(array, _word(array.dtype))
        return jnp.sum(words, dtype=jnp.uint32)

    return jax.tree.map(checksum, arrays)


def _word(dtype: np.dtype) -> Any:
    return {1: np.uint8, 2: np.uint16}.get(dtype.itemsize, np.uint32)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _resized(array: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    missing = shape[0] - array.shape[0]
    padded = jnp.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1)))
    return padded.astype(dtype)


@functools.partial(jax.jit, static_argnames="num_rows")
def _overlaid(restored: jax.Array, new: jax.Array, num_rows: int) -> jax.Array:
    rows = jnp.arange(len(new)).reshape(-1, *[1] * (new.ndim - 1))
    return jnp.where(rows < num_rows, restored, new)


def _cut(stored: Any, stack: Stack) -> list[tuple[jax.Array, ...]]:
    """Returns the arrays of each table of a stack."""
    if stack.spread is None:
        return _cut_whole(stored, stack=stack)
    return read_parts(stored, stack, range(len(stack.tables)))


@functools.partial(jax.jit, static_argnames="stack")
def _cut_whole(stored: Any, *, stack: Stack) -> list[tuple[jax.Array, ...]]:
    return arrays_by_table(stored, stack)


def _joined(parts: Sequence[Sequence[jax.Array]], stack: Stack, *, packed: bool) -> Any:
    """Returns the arrays of each table as the one array of their stack."""
    if stack.spread is None:
        return _joined_whole(parts, stack=stack, packed=packed)
    return filled(stack, parts, packed=packed)


@functools.partial(jax.jit, static_argnames=("stack", "packed"))
def _joined_whole(
    parts: Sequence[Sequence[jax.Array]], *, stack: Stack, packed: bool
) -> Any:
    return stacked(stack, [as_stored(stack, own, packed=packed) for own in parts])


def _saved_shape(stack: Stack, shape: tuple[int, ...]) -> tuple[int, ...]:
    if stack.spread is None:
        return shape
    return (rows_in_parts(stack.spread, shape[0]), *shape[1:])


def _dtypes(stored: Any) -> Sequence[np.dtype]:
    if isinstance(stored, PackedTable):
        return stored.layout.dtypes
    return [np.dtype(array.dtype) for array in stored]


def _sharding(stored: Any, stack: Stack) -> Sharding | None:
    """Returns where the rows of each table of a stack are to be; None is anywhere."""
    if stack.spread is not None:
        return stack.spread.sharding
    if not _is_placed(stored):
        return None
    sharding = jax.tree.leaves(stored)[0].sharding
    if isinstance(sharding, NamedSharding):
        # Tables of one array can be joined where each device has all of them.
        alone = len(stack.tables) == 1 and len(sharding.spec) > 0
        spec = PartitionSpec(sharding.spec[0]) if alone else PartitionSpec()
        return NamedSharding(sharding.mesh, spec)
    return sharding


def _is_placed(stored: Any) -> bool:
    """Tells whether someone has put arrays on a device: what init makes may move."""
    array = jax.tree.leaves(stored)[0]
    return isinstance(array, jax.Array) and array.committed
