"""Telling how a batch of the embedding API would travel between devices."""

from collections.abc import Iterator
from typing import Any

import jax

from sparse_adam.embedding.combine import Part, parts_of
from sparse_adam.embedding.placed import layout_of
from sparse_adam.embedding.stacks import Stack
from sparse_adam.embedding.state import EmbeddingState
from sparse_adam.embedding.stored import checked
from sparse_adam.ops.samples import SampleRoute
from sparse_adam.ops.spread_samples import route_batch
from sparse_adam.ops.travel import EXCHANGE, Travel


def explain(state: EmbeddingState, features: Any, weights: Any = None) -> str:
    """Tells what a device receives of a batch: by which collectives, and how much.

    It traces the routes of the batch and runs nothing. It counts the bytes of rows and
    gradients without the padding of layouts, and what a round holds at most: ids that
    several samples of a device name travel once.

    Args:
        state: from `init`, also as `jax.ShapeDtypeStruct`s.
        features: ids, as in `lookup`; or `jax.ShapeDtypeStruct`s of them.
        weights: as in `lookup`.

    Raises:
        TypeError: as `lookup` would.
        ValueError: as `lookup` would.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig, init
        >>> config = FeatureConfig(TableConfig(1000, 32, name="item"))
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> state = init(config, Adam(), jax.random.key(0), mesh=mesh)
        >>> print(explain(state, jnp.zeros((64, 10), jnp.int32)))
        item: 640 ids on each of 1 devices, routed (docs/routing.md)
          route: one all-to-all of 2,568 bytes and one of 4 bytes
          lookup: up to 640 rows, 81,920 bytes
          update: up to 640 summed gradients, 81,920 bytes, in a round
          one round, if no device is asked for more than 640 rows, by one for 640
          ragged-all-to-all on TPUs, all-to-all of equal parts elsewhere
    """
    layout = state.layout

    def traced(state: EmbeddingState, features: Any, weights: Any) -> list[Any]:
        checked(state.stacks, layout.stacks)
        parts = parts_of(layout, features, weights)
        return [
            _route(stack, [part for part in parts if part.stack == number])
            for number, stack in enumerate(layout.stacks)
        ]

    routes = jax.eval_shape(traced, state, features, weights)
    lines = [
        line
        for stack, stored, route in zip(
            layout.stacks, state.stacks, routes, strict=True
        )
        for line in _lines(stack, stored, route)
    ]
    return "\n".join(lines)


def _route(stack: Stack, parts: list[Part]) -> SampleRoute | None:
    """Returns the route of all features of a stack; None where there is none."""
    if stack.spread is None or not parts:
        return None
    return route_batch(
        [part.samples for part in parts],
        spread=stack.spread,
        num_rows=stack.num_rows,
        sizes=tuple(part.occurrences.num_samples for part in parts),
    )


def _lines(stack: Stack, stored: Any, route: SampleRoute | None) -> Iterator[str]:
    names = ", ".join(table.name for table in stack.tables)
    if route is None:
        yield f"{names}: not routed; a device that has rows gets the whole batch"
        return
    assert stack.spread is not None
    count, row = stack.spread.count, stack.dim * 4
    travel = Travel(route.rows.unique.places.size // count, count, stack.dim)
    weights = stack.dim * layout_of(stack, stored).dtypes[0].itemsize
    yield f"{names}: {travel.ids}, routed (docs/routing.md)"
    yield f"  route: {travel.route}"
    yield f"  lookup: up to {travel.num_ids:,} rows, {travel.num_ids * weights:,} bytes"
    if not stack.trainable:
        yield "  update: none, since the tables are not trainable"
    elif stack.optimizer.options(learning_rate=0.0).use_gradient_accumulation:
        yield travel.update
    else:
        yield "  update: the whole batch on each device, a step for each occurrence"
    if route.owners is not None:
        most = route.owners.unique.places.size // count
        owners = Travel(most, count, stack.dim)
        yield (
            f"  ids that name their samples: {owners.route}; up to "
            f"{owners.quota.total:,} sums of samples in a lookup, "
            f"{owners.quota.total * row:,} bytes, and {most:,} gradients of "
            f"samples in an update, {most * row:,} bytes"
        )
    yield travel.rounds
    yield EXCHANGE
