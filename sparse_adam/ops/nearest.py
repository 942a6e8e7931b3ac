"""The rows of a table that are nearest to queries, block by block and part by part.

A block of rows is read, scored against all queries, and only the k best of it are kept.
So there are never more scores than `[B, rows of a block]`. Of a table that is spread
over devices each one searches its own rows, and only the k best of each are sent.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.export
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from sparse_adam.kernels.layout import Layout, PlainLayout
from sparse_adam.kernels.tiles import SUBLANES
from sparse_adam.ops.integers import in_32_bits
from sparse_adam.ops.packed import PackedTable, check_lines
from sparse_adam.ops.rows import rows_of
from sparse_adam.ops.shards import Shards, everywhere
from sparse_adam.ops.spread import Spread

Metric: TypeAlias = Literal["dot", "cosine"]
_BLOCK_SCORES = 2**22  # at a time, of float32: 16 MiB


class Nearest(NamedTuple):
    """The rows nearest to each query, the nearest first.

    Attributes:
        scores: float32 `[..., k]`, descending.
        ids: int32 `[..., k]`, which rows they are of.
    """

    scores: jax.Array
    ids: jax.Array


class Search(NamedTuple):
    """What is searched for, and in which rows of an array. Static.

    Attributes:
        k: how many rows.
        metric: "dot" or "cosine".
        recall_target: as of `nearest`.
        block_rows: as of `nearest`; None is chosen by the number of queries.
        first: the row of the array that is row 0 of the table.
        num_rows: V, of the table.
    """

    k: int
    metric: Metric
    recall_target: float
    block_rows: int | None
    first: int
    num_rows: int


def nearest(
    table: ArrayLike | PackedTable,
    queries: ArrayLike,
    k: int,
    *,
    metric: Metric = "dot",
    recall_target: float = 0.95,
    block_rows: int | None = None,
    sharding: NamedSharding | PartitionSpec | None = None,
) -> Nearest:
    r"""Finds the k rows of a table that are nearest to each query.

    The score of row w for the query q is :math:`q \cdot w` ("dot"), or the cosine
    :math:`q \cdot w / (|q| |w|)`, which is 0 where a length is 0. It is computed in
    float32.

    Args:
        table: `[V, D]` weights, or a `PackedTable`. Devices may share its rows.
        queries: `[..., D]`, floating.
        k: how many rows, 1 to V.
        metric: "dot" or "cosine".
        recall_target: of a TPU, which share of the k best to find at least, on average
            (`jax.lax.approx_max_k`). On other platforms, and with 1, all are found.
        block_rows: how many rows to score at a time; None is about 2**22 scores.
        sharding: as of `lookup`.

    Returns:
        `Nearest(scores, ids)`, `[..., k]` each.

    Raises:
        TypeError: the queries are not floating, or the table is a whole state.
        ValueError: shapes that do not fit, k that is not in `[1, V]`, or an unknown
            metric.

    Examples:
        >>> import jax.numpy as jnp
        >>> table = jnp.array([[1.0, 0.0], [0.0, 3.0], [2.0, 2.0]])
        >>> found = nearest(table, jnp.array([[0.0, 1.0]]), k=2)
        >>> found.ids.tolist(), found.scores.tolist()
        ([[1, 2]], [[3.0, 2.0]])
    """
    if isinstance(table, tuple | list | dict):
        raise TypeError(
            f"table is a {type(table).__name__}; it must be the weights [V, D] or a "
            "PackedTable: pass state[0], or state.table"
        )
    if isinstance(table, PackedTable):
        check_lines(table)
        stored, layout = table.lines, table.layout
    else:
        stored = jnp.asarray(table)
        if stored.ndim != 2 or 0 in stored.shape:
            raise ValueError(
                f"table.shape={stored.shape} must be (V, D), both at least 1"
            )
        layout = PlainLayout.of_weights(stored)
    search = Search(k, metric, recall_target, block_rows, 0, layout.num_rows)
    return search_rows(
        stored, queries, layout, search, Shards.of("table", stored, sharding)
    )


def search_rows(
    stored: jax.Array,
    queries: ArrayLike,
    layout: Layout,
    search: Search,
    over: Shards | Spread | None,
) -> Nearest:
    """Searches the rows of a table in an array that may hold others before and behind.

    Args:
        stored: plain weights, or packed lines.
        queries: `[..., D]`.
        layout: of the whole array; of a spread one, as if it were on one device.
        search: what to find.
        over: the devices that share the rows.

    Raises:
        TypeError: see `nearest`.
        ValueError: see `nearest`.
    """
    queries = everywhere(jnp.asarray(queries))
    if not jnp.issubdtype(queries.dtype, jnp.floating):
        raise TypeError(
            f"queries.dtype={queries.dtype} must be floating: pass "
            "queries.astype(jnp.float32)"
        )
    if queries.ndim < 1 or queries.shape[-1] != layout.dim:
        raise ValueError(
            f"{queries.shape=} must be (..., {layout.dim}): one number for each column "
            "of the table"
        )
    if search.metric not in get_args(Metric):
        raise ValueError(f"metric={search.metric!r} must be one of {get_args(Metric)}")
    if not 1 <= search.k <= search.num_rows:
        raise ValueError(
            f"k={search.k} must be at least 1 and at most {search.num_rows}, the rows "
            "of the table"
        )
    if not 0 < search.recall_target <= 1:
        raise ValueError(
            f"recall_target={search.recall_target} must be above 0 and at most 1"
        )
    if search.block_rows is not None and search.block_rows < 1:
        raise ValueError(f"block_rows={search.block_rows} must be at least 1, or None")
    flat = queries.reshape(-1, layout.dim).astype(jnp.float32)
    found = _search(stored, flat, layout=layout, search=search, over=over)
    return Nearest(*(x.reshape(*queries.shape[:-1], search.k) for x in found))


@in_32_bits
@functools.partial(jax.jit, static_argnames=("layout", "search", "over"))
def _search(
    stored: jax.Array,
    queries: jax.Array,
    *,
    layout: Layout,
    search: Search,
    over: Shards | Spread | None,
) -> Nearest:
    if search.metric == "cosine":
        queries = queries * _inverse_lengths(queries)[:, None]
    if over is None:
        rows = range(search.first, search.first + search.num_rows)
        return _best(stored, queries, layout, search, rows, lambda place: place)
    return _on_each(stored, queries, layout, search, over)


def _on_each(
    stored: jax.Array,
    queries: jax.Array,
    layout: Layout,
    search: Search,
    over: Shards | Spread,
) -> Nearest:
    """Lets each device search its own rows, and takes the best of what all found."""
    count, interleaved = over.count, False
    width = -(-layout.num_rows // count)
    first, end = search.first, search.first + search.num_rows
    if isinstance(over, Spread):
        own, spec, interleaved = over.part(layout), over.spec, over.interleaved
    else:
        own, spec = layout.divided(count), over.rows
    rows = range(first // count, -(-end // count)) if interleaved else range(width)

    def search_own(stored: jax.Array, queries: jax.Array) -> Nearest:
        device = lax.axis_index(over.axes) if over.axes else jnp.int32(0)

        def row_of(place: jax.Array) -> jax.Array:
            return place * count + device if interleaved else place + device * width

        found = _best(stored, queries, own, search, rows, row_of)
        if not over.axes:  # every device has all rows
            return found
        parts = lax.all_gather(found, over.axes, axis=1, tiled=True)  # [B, n * k]
        return _best_of(parts, search.k)

    return over.map(search_own, (spec, PartitionSpec()), PartitionSpec())(
        stored, queries
    )


def _best(
    stored: jax.Array,
    queries: jax.Array,
    layout: Layout,
    search: Search,
    rows: range,
    row_of: Callable[[jax.Array], jax.Array],
) -> Nearest:
    """Returns the k best of the rows that one device has, `[B, k]`.

    Where there are fewer than k, scores of -inf follow, and ids of -1.

    Args:
        stored: the array.
        queries: float32 `[B, D]`.
        layout: of the array.
        search: what to find.
        rows: of the array, those to be read.
        row_of: returns which row of the whole array each one of this array is.
    """
    reader = rows_of(layout)
    state = reader.opened((stored,))
    room = layout.room
    size = _block_rows(search.block_rows, queries.shape[0], layout, len(rows))
    begin = rows.start // layout.rows_per_group * layout.rows_per_group
    shape = (queries.shape[0], search.k)

    def step(i: jax.Array, best: Nearest) -> Nearest:
        wanted = begin + i * size
        start = jnp.minimum(wanted, room - size)  # the last block lies within, too
        place = start + lax.iota(jnp.int32, size)
        ids = row_of(place) - search.first
        valid = (place >= wanted) & (place < rows.stop)
        valid &= (ids >= 0) & (ids < search.num_rows)
        weights = reader.slice(state, start, size)[0]
        scores = _scores(queries, weights, search.metric)
        scores = jnp.where(valid[None], scores, -jnp.inf)
        ids = jnp.where(valid, ids, -1)
        own = _top_k(scores, min(search.k, size), search.recall_target)
        found = Nearest(own[0], ids[own[1]])
        joined = jax.tree.map(lambda *x: jnp.concatenate(x, 1), best, found)
        return _best_of(joined, search.k)

    nothing = Nearest(jnp.full(shape, -jnp.inf), jnp.full(shape, -1, jnp.int32))
    blocks = -(-(rows.stop - begin) // size)
    return lax.fori_loop(0, blocks, step, nothing)


def _block_rows(
    asked: int | None, num_queries: Any, layout: Layout, num_rows: int
) -> int:
    """Returns how many rows to score at a time: whole groups, in whole tiles."""
    step = SUBLANES * layout.rows_per_group
    queries = SUBLANES if jax.export.is_symbolic_dim(num_queries) else num_queries
    wanted = _BLOCK_SCORES // max(queries, 1) if asked is None else asked
    size = step * math.ceil(max(min(wanted, num_rows), 1) / step)
    return min(size, layout.room)


def _scores(queries: jax.Array, weights: jax.Array, metric: Metric) -> jax.Array:
    scores = lax.dot_general(
        queries,
        weights,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    if metric == "cosine":
        scores = scores * _inverse_lengths(weights)[None]
    return scores


def _inverse_lengths(x: jax.Array) -> jax.Array:
    squares = jnp.sum(x * x, axis=1)
    return jnp.where(squares > 0, lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)


def _top_k(
    scores: jax.Array, k: int, recall_target: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the k best scores of each query and their places, best first."""

    def exact(scores: jax.Array) -> Any:
        return tuple(lax.top_k(scores, k))

    def approximate(scores: jax.Array) -> Any:
        return tuple(lax.approx_max_k(scores, k, recall_target=recall_target))

    if recall_target == 1:
        return exact(scores)
    return lax.platform_dependent(scores, tpu=approximate, default=exact)


def _best_of(found: Nearest, k: int) -> Nearest:
    """Returns the k best of several, those first where scores are equal that are."""
    scores, places = lax.top_k(found.scores, k)
    return Nearest(scores, jnp.take_along_axis(found.ids, places, axis=1))
