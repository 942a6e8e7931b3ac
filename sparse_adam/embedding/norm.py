"""The norm of what the tables of a state would get."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparse_adam.embedding.combine import Part, UpdateBatch
from sparse_adam.embedding.gradients import gradients_of_stacks, whole_batch
from sparse_adam.embedding.stacks import Stack
from sparse_adam.embedding.state import EmbeddingState
from sparse_adam.ops.routing.unique import sort_pairs
from sparse_adam.ops.spread_sums import sum_of_squares

_CHUNK = 8192  # ids whose gradients are expanded at a time


def gradient_norm(
    state: EmbeddingState,
    features: Any,
    activation_gradients: Any,
    weights: Any = None,
) -> jax.Array:
    r"""Returns the norm of the gradient by all tables, as one long vector.

    With :math:`G_r` the gradient of row :math:`r`, summed over all its occurrences as
    `apply_gradients` does it,

    .. math::

        \Big(\sum_{\text{tables}} \sum_r |G_r|^2\Big)^{1/2}.

    This is exactly the norm of the gradients `[V, D]` that automatic differentiation
    by the tables would give. The norm of the activations' gradients is another number:
    where ids repeat or combiners scale, it is wrong. `clipvalue` is not applied, and a
    table that is not trainable adds nothing.

    It takes one sort of the ids of each stack, and expands the gradients of 8192 ids
    at a time, so that nothing of the size `[ids, D]` is made. Of tables that are spread
    over a mesh, the owner of each row sums what devices have for it, as in
    `apply_gradients`; within `jax.shard_map` each passes its own samples.

    Args:
        state: from `init` or from an update.
        features: as in `lookup`.
        activation_gradients: as in `apply_gradients`; None counts as zeros.
        weights: as in `lookup`.

    Returns:
        A float32 scalar.

    Raises:
        TypeError: ids or gradients are of a wrong kind.
        ValueError: another structure, or shapes that do not fit.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig, init
        >>> state = init(FeatureConfig(TableConfig(4, 2)), Adam(), jax.random.key(0))
        >>> gradients = jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 4.0]])
        >>> print(gradient_norm(state, jnp.array([1, 1, 3]), gradients))
        5.0
    """
    given = gradients_of_stacks(state.layout, features, activation_gradients, weights)
    squares = [_of_stack(*own) for own in given]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def _of_stack(
    stack: Stack, parts: Sequence[Part], gradients: Sequence[jax.Array | None]
) -> jax.Array:
    """Returns the sum over the rows of a stack of the squares of their gradients."""
    if stack.spread is None:
        return _sum_of_squares(whole_batch(parts, gradients), stack.num_rows)
    return sum_of_squares(
        [part.samples for part in parts],
        [None if x is None else x.reshape(-1, stack.dim) for x in gradients],
        spread=stack.spread,
        num_rows=stack.num_rows,
        dim=stack.dim,
        sizes=tuple(part.occurrences.num_samples for part in parts),
    )


def _sum_of_squares(batch: UpdateBatch, num_rows: int) -> jax.Array:
    """Returns the sum over rows of the squares of their summed gradients.

    Sorted ids are taken in chunks. The row that a chunk ends in may go on in the next
    one, so its sum is handed on, and all rows that ended are added to the result.
    """
    size = batch.ids.shape[0]
    if not size:
        return jnp.float32(0)
    chunk = min(size, _CHUNK)
    missing = -size % chunk
    ids, order = sort_pairs(
        jnp.where(batch.ids < 0, num_rows, batch.ids),
        lax.iota(jnp.int32, size),
        num_rows + 1,
        size,
    )
    ids = jnp.pad(ids, (0, missing), constant_values=num_rows)
    order = jnp.pad(order, (0, missing), constant_values=size)

    def add_chunk(carry: Any, chunk_of: Any) -> tuple[Any, None]:
        total, last, open_sum = carry
        ids, order = chunk_of
        grads = jnp.where(ids[:, None] < num_rows, batch.gradients_of(order), 0)
        starts = ids != jnp.append(last, ids[:-1])
        runs = jnp.cumsum(starts, dtype=jnp.int32)
        sums = jax.ops.segment_sum(
            grads, runs, num_segments=chunk + 1, indices_are_sorted=True
        )
        sums = sums.at[0].add(open_sum)
        ended = lax.iota(jnp.int32, chunk + 1) < runs[-1]
        total += jnp.sum(jnp.where(ended[:, None], sums, 0) ** 2)
        return (total, ids[-1:], sums[runs[-1]]), None

    zeros = jnp.zeros(batch.grads.shape[1:], jnp.float32)
    first = jnp.float32(0), jnp.full((1,), -1, jnp.int32), zeros
    by_chunk = ids.reshape(-1, chunk), order.reshape(-1, chunk)
    (total, _, open_sum), _ = lax.scan(add_chunk, first, by_chunk)
    return total + jnp.sum(open_sum**2)
