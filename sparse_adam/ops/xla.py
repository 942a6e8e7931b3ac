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
from jax import lax

from sparse_adam._types import Gains, Grads, Indices, Tile
from sparse_adam.kernels.spec import SortedBatch, State, StepScalars, UpdateSpec
from sparse_adam.ops.rows import row_noises, rows_of
from sparse_adam.rules import StepNumbers, Values

_BLOCK_ELEMENTS = 2**18  # of a table, in the sweep over all rows


def unsupported(spec: UpdateSpec) -> str | None:
    """Returns None: this path does every update."""
    del spec
    return None


def xla_update(
    state: State, batch: SortedBatch, scalars: StepScalars, spec: UpdateSpec
) -> State:
    """Updates the rows `batch.ids` (sorted; V for none)."""
    stored = rows_of(spec.layout)
    rows = batch.ids
    numbers = spec.numbers(lambda i: scalars.numbers[i])
    if spec.num_ids:
        gradients = _gradients(batch.grads, batch.sources, batch.gains)
        if spec.accumulate:
            rows, sums = _sum_runs(gradients, batch.ids, spec.num_rows)
            updated = spec.step(stored.gather(state, rows), sums, numbers)
        else:
            rows, updated = _step_each_occurrence(
                stored.gather(state, rows), gradients, rows, numbers, spec
            )
        noises = row_noises(rows, scalars.seeds, spec.layout)
        state = stored.scatter(state, rows, updated, noises, spec.accumulate)
    if not spec.lazy:
        state = _update_other_rows(state, rows, scalars, spec)
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
    stored: Values,
    gradients: Tile,
    ids: Indices,
    numbers: StepNumbers,
    spec: UpdateSpec,
) -> tuple[Indices, Values]:
    """Makes one step for each occurrence, in the order of the batch.

    Returns the last occurrence of each id with its row, between others out of range.
    """
    is_start = jnp.append(jnp.ones((1,), bool), ids[1:] != ids[:-1])
    is_end = jnp.append(ids[1:] != ids[:-1], jnp.ones((1,), bool))

    def advance(
        row: Values, occurrence: tuple[jax.Array, ...]
    ) -> tuple[Values, Values]:
        starts, gradient, *fresh = occurrence
        row = tuple(jnp.where(starts, f, r) for f, r in zip(fresh, row, strict=True))
        row = spec.step(row, gradient, numbers)
        return row, row

    def rowwise(x: Tile) -> jax.Array:
        return x[:, None]  # [N, 1, D]: a scan step sees a tile of one row

    none = tuple(jnp.zeros_like(x[:1]) for x in stored)
    occurrences = (is_start, rowwise(gradients), *map(rowwise, stored))
    _, stepped = lax.scan(advance, none, occurrences)
    last = is_end & (ids < spec.num_rows)
    rows = _distinct(ids, last, spec.num_rows)
    return rows, tuple(x[:, 0] for x in stepped)


def _update_other_rows(
    state: State, rows: Indices, scalars: StepScalars, spec: UpdateSpec
) -> State:
    """Steps every row but `rows` with a gradient of 0, block by block in place.

    In one piece, XLA would recompute the new moments where it updates the weights, and
    so would copy the old moments that it overwrites.
    """
    stored = rows_of(spec.layout)
    numbers = spec.numbers(lambda i: scalars.numbers[i])
    num_rows = stored.num_rows
    size = max(1, _BLOCK_ELEMENTS // spec.dim // stored.step) * stored.step
    size = min(num_rows, size)
    touched = jnp.zeros((num_rows,), bool).at[rows].set(True, mode="drop")

    def update_block(i: jax.Array, state: State) -> State:
        # The last block ends with the table, and so repeats rows of the one before.
        start = jnp.minimum(i * size, num_rows - size)
        here = start + lax.iota(jnp.int32, size)
        done = lax.dynamic_slice_in_dim(touched, start, size) | (here < i * size)

        old = stored.slice(state, start, size)

        def advance(old: Values) -> Values:
            new = spec.step(old, jnp.zeros_like(old[0]), numbers)
            return tuple(
                jnp.where(done[:, None], x, n) for x, n in zip(old, new, strict=True)
            )

        new = lax.cond(jnp.all(done), lambda old: old, advance, old)
        # Noise does not move what is done: it is in the dtypes of the storage already.
        noises = row_noises(here, scalars.seeds, spec.layout)
        return stored.update_slice(state, start, new, noises)

    state = lax.fori_loop(0, -(-num_rows // size), update_block, stored.opened(state))
    return stored.closed(state)


def _distinct(rows: Indices, keep: jax.Array, num_rows: int) -> Indices:
    return jnp.where(keep, rows, num_rows + lax.iota(jnp.int32, rows.size))
