"""What a batch holds, by table: counted inside a jitted step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_adam.embedding.combine import Part, parts_of
from sparse_adam.embedding.inputs import Ragged, Sparse, as_array, is_bcoo
from sparse_adam.embedding.occurrences import Occurrences, occurrences
from sparse_adam.embedding.stacks import Stack
from sparse_adam.embedding.state import EmbeddingState
from sparse_adam.ops.shards import everywhere
from sparse_adam.ops.spread_sums import Counts, count_rows


class BatchStats(NamedTuple):
    """Counts of the ids of one table, scalars.

    Attributes:
        ids: int32, how many there are; -1, which fills up, is none.
        valid: int32, how many of these are in `[0, V)`.
        ignored: int32, how many are not: `ids - valid`.
        unique: int32, how many different rows are looked up.
        hottest: float32, the share that the most frequent row has of the valid ids; 0
            if there are none.
    """

    ids: jax.Array
    valid: jax.Array
    ignored: jax.Array
    unique: jax.Array
    hottest: jax.Array


def batch_stats(state: EmbeddingState, features: Any) -> dict[str, BatchStats]:
    """Counts the ids of a batch: for logs, to find ids that are wrong or rows too hot.

    Ids that no sample owns, and those behind the end of a sequence, are not counted:
    nobody looks them up. Return it from a jitted step, of every step or of some:
    `unique` and `hottest` take a sort of the ids of each stack, and of tables that are
    spread over a mesh an exchange of ids; a step that returns others alone does without
    them. Within `jax.shard_map` each device passes its own samples.

    Args:
        state: from `init` or from an update, of which only the layout is read.
        features: as in `lookup`.

    Returns:
        By table name, over all features of a table.

    Raises:
        TypeError: ids are not integers.
        ValueError: another structure, or shapes that do not fit.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig, init
        >>> config = FeatureConfig(TableConfig(10, 2, name="user"))
        >>> state = init(config, Adam(), jax.random.key(0))
        >>> stats = jax.jit(batch_stats)(state, jnp.array([[7, 7, 3], [7, 10, -1]]))
        >>> {name: x.item() for name, x in stats["user"]._asdict().items()}
        {'ids': 5, 'valid': 4, 'ignored': 1, 'unique': 2, 'hottest': 0.75}
    """
    layout = state.layout
    parts = parts_of(layout, features, None)
    leaves = layout.leaves("features", features)
    places = [
        occurrences(feature, _places(ids), None)
        for feature, ids in zip(layout.features, leaves, strict=True)
    ]
    found: dict[str, BatchStats] = {}
    for number, stack in enumerate(layout.stacks):
        own = [i for i, part in enumerate(parts) if part.stack == number]
        of_stack = _counted(stack, [parts[i] for i in own])
        for place, table in enumerate(stack.tables):
            mine = [i for i in own if layout.tables[parts[i].feature.table] is table]
            given = sum(_count(places[i], stack) for i in mine)
            valid = sum(_count(parts[i].occurrences, stack) for i in mine)
            found[table.name] = _stats(given, valid, *(x[place] for x in of_stack))
    return {table.name: found[table.name] for table in layout.tables}


def _count(found: Occurrences, stack: Stack) -> jax.Array:
    """Returns how many ids of a feature are none of -1."""
    count = jnp.sum(everywhere(found.ids) >= 0, dtype=jnp.int32)
    if stack.spread is not None and stack.spread.is_inside:
        return lax.psum(count, stack.spread.axes)
    return count


def _counted(stack: Stack, parts: Sequence[Part]) -> Counts:
    """Counts the ids of the tables of one stack, given its features."""
    if stack.spread is None:
        return _counted_here(stack, [everywhere(part.samples.ids) for part in parts])
    sizes = (table.num_rows for table in stack.tables)
    return count_rows(
        [part.samples for part in parts],
        spread=stack.spread,
        num_rows=stack.num_rows,
        sizes=tuple(part.occurrences.num_samples for part in parts),
        ranges=tuple(zip(stack.offsets, sizes, strict=True)),
    )


def _counted_here(stack: Stack, parts: Sequence[jax.Array]) -> Counts:
    """Counts by one sort of all ids, rows of the stack or -1 for none."""
    ids = lax.sort(jnp.concatenate(parts))
    position = lax.iota(jnp.int32, ids.size)
    starts = jnp.append(jnp.ones((1,), bool), ids[1:] != ids[:-1])[: ids.size]
    length = position - lax.cummax(jnp.where(starts, position, 0)) + 1
    first = np.array(stack.offsets, np.int32)[:, None]
    rows = np.array([table.num_rows for table in stack.tables], np.int32)[:, None]
    mine = (ids[None] >= first) & (ids[None] < first + rows)  # [T, N], fused
    unique = jnp.sum(mine & starts[None], 1, dtype=jnp.int32)
    return Counts(unique, jnp.max(jnp.where(mine, length[None], 0), 1, initial=0))


def _stats(given: Any, valid: Any, unique: jax.Array, most: jax.Array) -> BatchStats:
    """Returns the statistics of a table."""
    hottest = most.astype(jnp.float32) / jnp.maximum(valid, 1).astype(jnp.float32)
    return BatchStats(given, valid, given - valid, unique, hottest)


def _places(ids: Any) -> Any:
    """Returns ids in their form with 0 for each that is given, and -1 for those of -1.

    0 is a row of every table, so what is counted are all that a sample owns.
    """
    if isinstance(ids, Ragged):
        return Ragged(_given(ids.values), ids.row_splits)
    if isinstance(ids, Sparse):
        return Sparse(ids.indices, _given(ids.values), ids.dense_shape)
    if is_bcoo(ids):
        return Sparse(ids.indices, _given(ids.data), ids.shape)
    return _given(ids)


def _given(ids: Any) -> Any:
    ids = as_array("ids", ids)
    if ids.dtype.kind != "i":  # nothing is below 0, or it is refused with the ids
        return np.zeros(ids.shape, np.int32)
    xp = jnp if isinstance(ids, jax.Array) else np
    return xp.where(ids == -1, xp.int32(-1), xp.int32(0))
