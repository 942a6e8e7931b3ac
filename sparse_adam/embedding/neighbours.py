"""The rows of a table of an embedding that are nearest to queries."""

import jax.numpy as jnp
from jax.typing import ArrayLike

from sparse_adam.embedding import on_mesh
from sparse_adam.embedding.state import EmbeddingState
from sparse_adam.embedding.stored import checked
from sparse_adam.kernels.layout import Layout, PlainLayout
from sparse_adam.ops.nearest import Metric, Nearest, Search, search_rows
from sparse_adam.ops.packed import PackedTable
from sparse_adam.ops.shards import Shards


def nearest(
    state: EmbeddingState,
    table: str,
    queries: ArrayLike,
    k: int,
    *,
    metric: Metric = "dot",
    recall_target: float = 0.95,
    block_rows: int | None = None,
) -> Nearest:
    """Finds the k rows of a table that are nearest to each query.

    It reads the table where it stands in its stack, plain or packed, on one device or
    several, and no other one. `sparse_adam.nearest` does the same for a plain array or
    a `PackedTable`, and says how scores are computed.

    Args:
        state: from `init`, from an update or from `weights_only`.
        table: its name.
        queries: `[..., D]`, floating; each device gets all of them.
        k: how many rows, 1 to V.
        metric: "dot" or "cosine".
        recall_target: of a TPU, which share of the k best to find at least, on average;
            on other platforms, and with 1, all are found.
        block_rows: how many rows to score at a time; None is about 2**22 scores.

    Returns:
        `Nearest(scores, ids)`, `[..., k]` each; ids are rows of the table.

    Raises:
        KeyError: there is no table of this name.
        TypeError: the queries are not floating.
        ValueError: shapes that do not fit, k that is not in `[1, V]`, or an unknown
            metric; within `jax.shard_map` over the devices of the state.

    Examples:
        >>> import jax
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig, init
        >>> user, item = TableConfig(5, 4, name="user"), TableConfig(7, 4, name="item")
        >>> config = {"user": FeatureConfig(user), "item": FeatureConfig(item)}
        >>> state = init(config, Adam(), jax.random.key(0))
        >>> nearest(state, "item", state.table("item")[3], k=1, metric="cosine").ids
        Array([3], dtype=int32)
    """
    number, place = state.layout.place(table)
    stack = state.layout.stacks[number]
    on_mesh.check_whole_batch((stack,), "nearest")
    stored = checked(state.stacks, state.layout.stacks)[number]
    layout: Layout
    if isinstance(stored, PackedTable):
        array, layout = stored.lines, stored.layout.with_rows(stack.num_rows)
    else:
        array = jnp.asarray(stored[0])
        layout = PlainLayout.of_weights(array).with_rows(stack.num_rows)
    search = Search(
        k,
        metric,
        recall_target,
        block_rows,
        first=stack.offsets[place],
        num_rows=stack.tables[place].num_rows,
    )
    over = stack.spread or Shards.of(f"table {table!r}", array)
    return search_rows(array, queries, layout, search, over)
