"""Gradients by rows: the sums that tables would get, and updates by them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from sparse_adam._types import ImplementationName, Rounding
from sparse_adam.embedding import on_mesh
from sparse_adam.embedding.combine import UpdateBatch
from sparse_adam.embedding.gradients import gradients_of_stacks, whole_batch
from sparse_adam.embedding.on_mesh import check_whole_batch
from sparse_adam.embedding.rates import rates_of_update
from sparse_adam.embedding.stacks import Stack, Table
from sparse_adam.embedding.state import EmbeddingState
from sparse_adam.embedding.updating import update_stacks
from sparse_adam.ops.combine import Samples
from sparse_adam.ops.integers import integers
from sparse_adam.ops.plan import indices_or
from sparse_adam.ops.routing.unique import sum_equal, unique_rows
from sparse_adam.ops.shards import everywhere

_TableState = TypeVar("_TableState", bound=tuple[jax.Array, ...])


class RowGradients(NamedTuple):
    """The gradients of the rows of one table that a batch looked up, summed.

    Attributes:
        ids: int32 `[N]`, the distinct rows in ascending order; behind the last one V,
            which is no row, until the end. N is how many ids the batch may have.
        rows: float32 `[N, D]`, their gradients; zeros behind the last one.
    """

    ids: jax.Array
    rows: jax.Array


def row_gradients(
    state: EmbeddingState,
    features: Any,
    activation_gradients: Any,
    weights: Any = None,
) -> dict[str, RowGradients]:
    """Returns the gradients of the rows that `lookup` read: to look at, or transform.

    `apply_row_gradients(state, row_gradients(state, features, gradients))` is
    `apply_gradients(state, features, gradients)`, but takes more memory and time: each
    id gets a row, `[ids, D]` of a stack, twice. So use it where rows are transformed
    one by one or summed over several batches (`join_row_gradients`), and
    `gradient_scale` to scale all. Of tables that are spread over a mesh every device
    gets the whole batch, and all that is returned: `gradient_norm` and
    `apply_gradients` send each device its part.

    Args:
        state: from `init` or from an update.
        features: as in `lookup`.
        activation_gradients: as in `apply_gradients`; None counts as zeros.
        weights: as in `lookup`.

    Returns:
        By the name of each trainable table. All rows that were looked up are there,
        also where their gradient is 0.

    Raises:
        TypeError: ids or gradients are of a wrong kind.
        ValueError: another structure, or shapes that do not fit; within `jax.shard_map`
            over the devices of the state.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig, init
        >>> config = FeatureConfig(TableConfig(4, 2, name="user"))
        >>> state = init(config, Adam(), jax.random.key(0))
        >>> gradients = jnp.array([[1.0, 0.0], [2.0, 5.0], [4.0, 0.0]])
        >>> found = row_gradients(state, jnp.array([3, 1, 3]), gradients)
        >>> print(found["user"].ids, found["user"].rows, sep="; ")
        [1 3 4]; [[2. 5.]
         [5. 0.]
         [0. 0.]]
    """
    layout = state.layout
    found: dict[str, RowGradients] = {}
    check_whole_batch(layout.stacks, "row_gradients")
    for stack, parts, gradients in gradients_of_stacks(
        layout, features, activation_gradients, weights
    ):
        sizes = dict.fromkeys(layout.places, 0)
        for part in parts:
            name = layout.tables[part.feature.table].name
            sizes[name] += part.samples.ids.shape[0]
        found |= _by_table(stack, whole_batch(parts, gradients), sizes)
    return {t.name: found[t.name] for t in layout.tables if t.trainable}


def _by_table(
    stack: Stack, batch: UpdateBatch, sizes: Mapping[str, int]
) -> dict[str, RowGradients]:
    """Sums the gradients of a stack, and cuts out those of each table.

    Distinct rows stand in the order of the tables. So those of a table begin where the
    tables before it have had at most all their ids: nothing is cut beyond the end.
    """
    size = batch.ids.shape[0]
    end = stack.num_rows
    unique = unique_rows(jnp.where(batch.ids < 0, end, batch.ids), end)
    sums = jax.ops.segment_sum(
        batch.gradients_of(unique.order),
        unique.runs,
        num_segments=size,
        indices_are_sorted=True,
    )
    found = {}
    for table, offset in zip(stack.tables, stack.offsets, strict=True):
        start = jnp.sum(unique.places < offset, dtype=jnp.int32)
        own = sizes[table.name]
        places = lax.dynamic_slice_in_dim(unique.places, start, own)
        rows = lax.dynamic_slice_in_dim(sums, start, own)
        found[table.name] = _ending(places - offset, rows, table.num_rows)
    return found


def _ending(ids: jax.Array, rows: jax.Array, num_rows: int) -> RowGradients:
    """Returns ascending ids with V, and rows with zeros, behind those of a table."""
    there = ids < num_rows
    return RowGradients(
        jnp.where(there, ids, jnp.int32(num_rows)), jnp.where(there[:, None], rows, 0)
    )


def join_row_gradients(
    state: EmbeddingState, *parts: Mapping[str, RowGradients]
) -> dict[str, RowGradients]:
    """Sums gradients of rows over batches: one update of the sum is that of all.

    Args:
        state: whose tables they are of.
        *parts: what `row_gradients` returned, of one batch each; or of several, with
            one axis more in front, as `jax.lax.scan` stacks them.

    Returns:
        By table name, of as many ids as all parts have together.

    Raises:
        TypeError: a part is no dict of `RowGradients`.
        ValueError: an unknown table, or one that is not trainable; shapes that do not
            fit.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig, init
        >>> config = FeatureConfig(TableConfig(4, 1, name="user"))
        >>> state = init(config, Adam(), jax.random.key(0))
        >>> halves = (row_gradients(state, jnp.array(ids), jnp.ones((2, 1)))
        ...           for ids in ([3, 1], [2, 3]))
        >>> joined = join_row_gradients(state, *halves)["user"]
        >>> print(joined.ids, joined.rows.ravel())
        [1 2 3 4] [1. 1. 2. 0.]
    """
    given = [_checked(state, part) for part in parts]
    found = {}
    for table in state.layout.tables:
        own = [part[table.name] for part in given if table.name in part]
        if own:
            ids, rows = (jnp.concatenate(arrays) for arrays in zip(*own, strict=True))
            found[table.name] = _ending(
                *sum_equal(ids, rows, table.num_rows), table.num_rows
            )
    return found


def apply_row_gradients(
    state: EmbeddingState[_TableState],
    row_gradients: Mapping[str, RowGradients],
    *,
    learning_rates: Mapping[str, ArrayLike] | None = None,
    gradient_scale: ArrayLike | None = None,
    rounding: Rounding = "nearest",
    key: jax.Array | None = None,
    implementation: ImplementationName | None = None,
) -> EmbeddingState[_TableState]:
    """Updates rows by their gradients, as `apply_gradients` does it.

    Each call is one step for rates that are functions of it and for rows that catch
    up, however many batches the gradients are of.

    Args:
        state: from `init` or from the update before.
        row_gradients: by table name, as `row_gradients` returns them, transformed or
            not. Those of equal ids are summed; an id outside `[0, V)` is ignored. A
            table that is left out stays as it is.
        learning_rates: as in `apply_gradients`, like all that follow.
        gradient_scale: a scalar that the gradients are multiplied by.
        rounding: of bfloat16 tables and slots.
        key: of `jax.random`, for stochastic rounding.
        implementation: of the update, as in `sparse_adam_update`.

    Returns:
        The state after the update.

    Raises:
        TypeError: see `apply_gradients`; or there is no dict of `RowGradients`.
        ValueError: an unknown table, or one that is not trainable, or whose optimizer
            makes a step for each occurrence; shapes that do not fit.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from sparse_adam.embedding import SGD, FeatureConfig, TableConfig, init
        >>> table = TableConfig(4, 1, jax.nn.initializers.ones, name="user")
        >>> state = init(FeatureConfig(table), SGD(1.0), jax.random.key(0))
        >>> found = row_gradients(state, jnp.array([3, 1, 3]), jnp.full((3, 1), 0.5))
        >>> signs = {name: own._replace(rows=jnp.sign(own.rows))
        ...          for name, own in found.items()}
        >>> print(apply_row_gradients(state, signs).table("user").ravel())
        [1. 0. 1. 0.]
    """
    layout = state.layout
    rates = rates_of_update(state, learning_rates)
    given = _checked(state, row_gradients)
    for name in given:
        number, _ = layout.place(name)
        if not layout.stacks[number].optimizer.use_gradient_accumulation:
            raise ValueError(
                f"the optimizer of table {name!r} has use_gradient_accumulation=False, "
                "a step for each occurrence, but these gradients are sums: call "
                "apply_gradients"
            )

    def change(stack: Stack, stored: Any, tables: Sequence[Table], how: Any) -> Any:
        ids, rows = [], []
        for table in tables:
            if table.name in given:
                own = given[table.name]
                offset = stack.offsets[layout.place(table.name)[1]]
                ids.append(jnp.where(own.ids < table.num_rows, own.ids + offset, -1))
                rows.append(own.rows)
        if not ids:
            return stored
        batch = jnp.concatenate(ids), jnp.concatenate(rows)
        if stack.spread is not None:
            samples = Samples(batch[0], None, None, None)
            options = stack.optimizer.options(**how)
            size = batch[0].shape[0]
            return on_mesh.update(stack, stored, [samples], [batch[1]], [size], options)
        return stack.optimizer.update(stored, *batch, **how)

    return update_stacks(
        state,
        rates,
        change,
        gradient_scale=gradient_scale,
        rounding=rounding,
        key=key,
        implementation=implementation,
    )


def _checked(
    state: EmbeddingState, gradients: Mapping[str, RowGradients]
) -> dict[str, RowGradients]:
    """Returns gradients of rows as int32 `[N]` and float32 `[N, D]`, checked."""
    if not isinstance(gradients, Mapping):
        raise TypeError(
            f"row_gradients is a {type(gradients).__name__}; it must be a dict by "
            "table name, as row_gradients(state, features, gradients) returns"
        )
    trainable = {t.name: t for t in state.layout.tables if t.trainable}
    found = {}
    for name, own in gradients.items():
        if name not in trainable:
            raise ValueError(
                f"row_gradients has {name!r}, which is none of the trainable tables "
                f"{list(trainable)}"
            )
        if not isinstance(own, RowGradients):
            raise TypeError(
                f"row_gradients[{name!r}] is a {type(own).__name__}; it must be "
                "RowGradients(ids, rows)"
            )
        table = trainable[name]
        shape = (*integers(f"row_gradients[{name!r}].ids", own.ids), table.config.dim)
        rows = jnp.asarray(own.rows)
        if rows.shape != shape or not jnp.issubdtype(rows.dtype, jnp.floating):
            raise ValueError(
                f"row_gradients[{name!r}].rows is {rows.dtype}{list(rows.shape)}; it "
                f"must be floats of the shape ids.shape + (D,) = {shape}"
            )
        ids = indices_or(own.ids, table.num_rows, fill=table.num_rows)
        rows = rows.reshape(-1, table.config.dim).astype(jnp.float32)
        found[name] = RowGradients(*everywhere((ids, rows)))
    return found
