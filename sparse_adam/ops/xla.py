"""The update in plain `jax.numpy`: every mode, any backend, any D, any dtype pair.

It is the last resort of the dispatch and the baseline of the benchmarks. In the lazy
modes its work and its temporaries grow with N, never with V; `lazy_adam=False` visits
all V rows in place. (Except for bfloat16 tables on a CPU: XLA widens such a table to
float32 and back around each scatter.)

Numerics: float32 between one read and one rounding per row and call. A run of equal
ids is summed in the order of the batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_adam._types import Gains, Grads, Indices, Rate, Table, Tile
from sparse_adam.kernels.adam_tile import adam_tile
from sparse_adam.kernels.problem import Problem

_State = tuple[Table, ...]  # w, m, v
_BLOCK_ELEMENTS = 2**18  # of a table, in the sweep over all rows
_Words = tuple[jax.Array, ...]  # w, m, v; bfloat16 as uint16
_Rows = tuple[Tile, ...]  # float32 rows of them


def unsupported(problem: Problem) -> str | None:
    """None: this path does every `problem`."""
    del problem
    return None


def xla_update(
    table: Table,
    momenta: Table,
    velocities: Table,
    grads: Grads,
    ids: Indices,
    sources: Indices,
    gains: Gains | None,
    learning_rate: Rate,
    problem: Problem,
) -> _State:
    """Updates the rows `ids` (sorted; V for none) of the three tables.

    Occurrence i adds `gains[i] * grads[sources[i]]`; a source of -1 adds zero.
    """
    state = (table, momenta, velocities)
    rows = ids
    if problem.num_ids:
        gradients = _gradients(grads, sources, gains)
        if not problem.accumulate:
            return _step_each_occurrence(state, gradients, ids, learning_rate, problem)
        rows, sums = _sum_runs(gradients, ids, problem.num_rows)
        w, m, v = _gather(state, rows)
        updated = adam_tile(w, m, v, sums, learning_rate, problem.hyper)
        state = _scatter(state, rows, updated)
    if not problem.lazy:
        state = _update_other_rows(state, rows, learning_rate, problem)
    return state


def _gradients(grads: Grads, sources: Indices, gains: Gains | None) -> Tile:
    if gains is None:
        return grads[sources].astype(jnp.float32)
    gradients = grads[jnp.maximum(sources, 0)].astype(jnp.float32)
    # A select, since 0 * NaN is NaN.
    return jnp.where(sources[:, None] >= 0, gains[:, None] * gradients, 0)


def _sum_runs(gradients: Tile, ids: Indices, num_rows: int) -> tuple[Indices, Tile]:
    """Returns the distinct ids, ascending, and the sum of each one's gradients.

    Both have N places; those left over hold indices >= V, still ascending and
    distinct, which gathers clip and scatters drop.
    """
    is_start = jnp.append(jnp.ones((1,), bool), ids[1:] != ids[:-1])
    run = jnp.cumsum(is_start, dtype=jnp.int32) - 1
    # On a GPU a scatter adds in the order in which its threads happen to come.
    sums = lax.platform_dependent(
        *(gradients, is_start, run),
        cuda=_sums_by_scan,
        rocm=_sums_by_scan,
        default=_sums_by_scatter,
    )
    rows = jnp.full_like(ids, num_rows).at[run].set(ids, indices_are_sorted=True)
    return _distinct(rows, rows < num_rows, num_rows), sums


def _sums_by_scatter(gradients: Tile, is_start: jax.Array, run: Indices) -> Tile:
    del is_start
    return jax.ops.segment_sum(
        gradients, run, num_segments=run.size, indices_are_sorted=True
    )


def _sums_by_scan(gradients: Tile, is_start: jax.Array, run: Indices) -> Tile:
    """The same sums, added in an order that depends on positions only."""

    def add(
        earlier: tuple[jax.Array, Tile], later: tuple[jax.Array, Tile]
    ) -> tuple[jax.Array, Tile]:
        starts = earlier[0] | later[0]
        return starts, jnp.where(later[0], later[1], earlier[1] + later[1])

    _, totals = lax.associative_scan(add, (is_start[:, None], gradients))
    is_end = jnp.append(is_start[1:], jnp.ones((1,), bool))
    last = jnp.where(is_end, run, run.size)  # only the last one of a run has it all
    return jnp.zeros_like(totals).at[last].set(totals, mode="drop")


def _step_each_occurrence(
    state: _State, gradients: Tile, ids: Indices, learning_rate: Rate, problem: Problem
) -> _State:
    """One Adam step for each occurrence, in the order of the batch."""
    is_start = jnp.append(jnp.ones((1,), bool), ids[1:] != ids[:-1])
    is_end = jnp.append(ids[1:] != ids[:-1], jnp.ones((1,), bool))
    stored = _gather(state, ids)

    def step(row: _Rows, occurrence: tuple[jax.Array, ...]) -> tuple[_Rows, _Rows]:
        starts, gradient, *fresh = occurrence
        row = tuple(jnp.where(starts, f, r) for f, r in zip(fresh, row, strict=True))
        w, m, v = row
        row = adam_tile(w, m, v, gradient, learning_rate, problem.hyper)
        return row, row

    def rowwise(x: Tile) -> jax.Array:
        return x[:, None]  # [N, 1, D]: a scan step sees a tile of one row

    nothing = tuple(jnp.zeros_like(x[:1]) for x in stored)
    occurrences = (is_start, rowwise(gradients), *map(rowwise, stored))
    _, after = lax.scan(step, nothing, occurrences)
    last = is_end & (ids < problem.num_rows)
    rows = _distinct(ids, last, problem.num_rows)
    return _scatter(state, rows, tuple(x[:, 0] for x in after), ascending=False)


def _update_other_rows(
    state: _State, rows: Indices, learning_rate: Rate, problem: Problem
) -> _State:
    """Steps every row but `rows` with a gradient of 0, block by block in place.

    In one piece, XLA would recompute the new moments where it updates the weights, and
    so would copy the old moments that it overwrites.
    """
    num_rows, dtypes = problem.num_rows, [x.dtype for x in state]
    size = min(num_rows, max(1, _BLOCK_ELEMENTS // problem.dim))
    touched = jnp.zeros((num_rows,), bool).at[rows].set(True, mode="drop")

    def update_block(i: jax.Array, state: _Words) -> _Words:
        # The last block ends with the table, and so repeats rows of the one before.
        start = jnp.minimum(i * size, num_rows - size)
        repeated = start + lax.iota(jnp.int32, size) < i * size
        done = lax.dynamic_slice_in_dim(touched, start, size) | repeated

        def step(old: _Words) -> _Words:
            w, m, v = (_from_words(x, d) for x, d in zip(old, dtypes, strict=True))
            new = adam_tile(w, m, v, jnp.zeros_like(w), learning_rate, problem.hyper)
            return tuple(
                jnp.where(done[:, None], x, _to_words(n.astype(d)))
                for x, n, d in zip(old, new, dtypes, strict=True)
            )

        old = tuple(lax.dynamic_slice_in_dim(x, start, size) for x in state)
        new = lax.cond(jnp.all(done), lambda old: old, step, old)
        return tuple(
            lax.dynamic_update_slice_in_dim(x, n, start, 0)
            for x, n in zip(state, new, strict=True)
        )

    # As words, since on a CPU a write into a bfloat16 table converts all of it.
    words = tuple(_to_words(x) for x in state)
    words = lax.fori_loop(0, -(-num_rows // size), update_block, words)
    return tuple(
        lax.bitcast_convert_type(x, d) for x, d in zip(words, dtypes, strict=True)
    )


def _to_words(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _from_words(x: jax.Array, dtype: np.dtype) -> Tile:
    return lax.bitcast_convert_type(x, dtype).astype(jnp.float32)


def _distinct(rows: Indices, keep: jax.Array, num_rows: int) -> Indices:
    return jnp.where(keep, rows, num_rows + lax.iota(jnp.int32, rows.size))


def _gather(state: _State, rows: Indices) -> _Rows:
    return tuple(x.at[rows].get(mode="clip").astype(jnp.float32) for x in state)


def _scatter(
    state: _State, rows: Indices, values: _Rows, ascending: bool = True
) -> _State:
    return tuple(
        x.at[rows].set(
            value.astype(x.dtype),
            mode="drop",
            unique_indices=True,
            indices_are_sorted=ascending,
        )
        for x, value in zip(state, values, strict=True)
    )
