"""Lazy, accumulated Adam on the rows of plain tables, on one TPU TensorCore.

Why: XLA's compiled scatter streams the whole table through the core. This kernel
touches what the batch touched: each gradient row is read once, straight through the
sort's permutation, and each updated row of the three tables is read once and written
once, in place. Nothing is materialised in between (`bytes_moved`).

Data flow: sorted occurrences come in chunks of C. Grid step k starts the DMAs of
chunk k (C gradient rows, and the three table rows of each distinct id that *ends* in
the chunk), then finishes chunk k-1: wait, sum runs of equal ids, update, start the
write-backs. Three buffer slots, so that while a chunk is computed the next one
arrives and the previous one leaves. Row DMAs are limited by issue, about 3.2
instruction bundles each, hence the flat, unrolled loops without bounds checks.

Order: a row is fetched and written by the one chunk in which its run of equal ids
ends, so no two DMAs of a call ever touch the same table row and chunks need no order
among themselves but this: a slot's write-backs are waited for before its next fetch,
and the sum of an unfinished run passes from chunk to chunk in `open_run`.

Numerics: float32. A run is summed by a segmented scan with selects, 8 rows at a time,
so a NaN stays in the row it belongs to (a one-hot matmul would spread it: 0 * NaN).
The order of additions depends on the sorted positions only: same call, same bits.

Needs: what `unsupported` says. Ids must be proven to lie in [0, V) or be the sentinel
V, sorted: a wild id would be a wild DMA, and the checks are off.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Gains, Grads, Indices, Rate, Table
from sparse_adam.kernels.adam_tile import adam_tile
from sparse_adam.kernels.chunks import Chunks, split_into_chunks
from sparse_adam.kernels.config import LANES, SLOTS, SUBLANES, VMEM_BUDGET, Config
from sparse_adam.kernels.loops import Rows, for_each, for_each_tile
from sparse_adam.kernels.problem import Hyperparams, Problem
from sparse_adam.kernels.runs import Columns, OpenRun, close_run, sum_runs, weigh


def unsupported(problem: Problem) -> str | None:
    """Says why this kernel cannot do `problem`, or None when it can."""
    if not problem.lazy:
        return "lazy_adam=False updates every row; this kernel visits looked-up rows"
    if not problem.accumulate:
        return "use_gradient_accumulation=False needs a step for each occurrence"
    if problem.dim % LANES:
        return (
            f"D={problem.dim} is not a multiple of {LANES}: a TPU does not store such "
            "a table row by row"
        )
    if Config(SUBLANES).vmem_bytes(problem.dim) > VMEM_BUDGET:
        return f"D={problem.dim} is too large: {SUBLANES} rows must fit in VMEM"
    for name in ("table", "momenta", "velocities"):
        dtype = getattr(problem, f"{name}_dtype")
        if dtype != np.float32:
            return (
                f"{name} is {dtype}; rows move one by one, and only float32 rows are "
                "words of their own (two bfloat16 rows share each 32-bit word)"
            )
    return None


def bytes_moved(num_ids: int, num_unique: int, dim: int) -> int:
    """HBM bytes of one update: gradients once, three rows in and out, five indices."""
    return 4 * (num_ids * dim + 6 * num_unique * dim + 5 * num_ids)


class _Scalars(NamedTuple):
    """Refs in SMEM, whole."""

    active: Any  # [1]
    counts: Any  # [chunks]
    has_runs: Any  # [chunks]
    learning_rate: Any  # [1]


class _Arriving(NamedTuple):
    """Refs of chunk k, whose DMAs a grid step starts: SMEM [C] each."""

    rows: Any
    sources: Any


class _Finishing(NamedTuple):
    """Refs of chunk k-1, which the same step computes: [C] each."""

    rows: Any  # SMEM
    ends: Any  # SMEM
    ids: Any  # VMEM
    weights: Any  # VMEM: (), or gains and 1 where a gradient counts


class _Scratch(NamedTuple):
    grads: Any  # VMEM [SLOTS, C, D]
    state: Any  # VMEM [SLOTS, 3, C, D]: w, m, v
    columns: Columns
    open_run: OpenRun
    grads_arrived: Any  # DMA semaphores, one a slot
    state_arrived: Any
    state_left: Any


def tensorcore_update(
    table: Table,
    momenta: Table,
    velocities: Table,
    grads: Grads,
    ids: Indices,
    sources: Indices,
    gains: Gains | None,
    learning_rate: Rate,
    problem: Problem,
    config: Config | None = None,
) -> tuple[Table, ...]:
    """Updates the rows `ids` (sorted; V for none) of the three tables in place.

    Occurrence i adds `gains[i] * grads[sources[i]]`; a source of -1 adds zero.
    """
    chosen = config or Config.choose(problem.num_ids, problem.dim)
    # Unrolling buys an interpreter nothing and triples the time to compile.
    plain = config or dataclasses.replace(chosen, dma_unroll=1)
    size = chosen.rows_per_chunk
    chunks = split_into_chunks(ids, sources, gains, problem.num_rows, size)
    call = functools.partial(_call, hyper=problem.hyper)
    return lax.platform_dependent(
        chunks,
        learning_rate[None],
        grads.astype(jnp.float32),
        (table, momenta, velocities),
        tpu=functools.partial(call, config=chosen),
        default=functools.partial(call, config=plain, interpret=True),
    )


def _call(
    chunks: Chunks,
    learning_rate: jax.Array,
    grads: Grads,
    state: tuple[Table, ...],
    *,
    hyper: Hyperparams,
    config: Config,
    interpret: bool = False,
) -> tuple[Table, ...]:
    num_chunks, _, size = chunks.rows.shape
    dim = grads.shape[1]

    def block(lag: int, memory_space: Any) -> pl.BlockSpec:
        def index(k: jax.Array) -> tuple[jax.Array, int, int]:
            return jnp.clip(k - lag, 0, num_chunks - 1), 0, 0

        return pl.BlockSpec((None, None, size), index, memory_space=memory_space)

    smem, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)
    arriving, finishing = block(0, pltpu.SMEM), block(1, pltpu.SMEM)
    column = block(1, pltpu.VMEM)
    operands = (
        _Scalars(chunks.active, chunks.counts, chunks.has_runs, learning_rate),
        _Arriving(chunks.rows, chunks.sources),
        _Finishing(chunks.rows, chunks.ends, chunks.ids, chunks.weights),
        grads,
        state,
    )
    specs = (
        _Scalars(smem, smem, smem, smem),
        _Arriving(arriving, arriving),
        _Finishing(finishing, finishing, column, (column,) * len(chunks.weights)),
        hbm,
        (hbm, hbm, hbm),
    )
    first_table = len(jax.tree.leaves(operands)) - 3
    semaphores = pltpu.SemaphoreType.DMA((SLOTS,))
    (updated,) = pl.pallas_call(
        functools.partial(_kernel, hyper=hyper, config=config),
        name="sparse_adam_tensorcore",
        grid=(num_chunks + 1,),
        in_specs=specs,
        out_specs=((hbm, hbm, hbm),),
        out_shape=(jax.eval_shape(lambda *x: x, *state),),
        input_output_aliases={first_table + i: i for i in range(3)},
        scratch_shapes=(
            _Scratch(
                grads=pltpu.VMEM((SLOTS, size, dim), jnp.float32),
                state=pltpu.VMEM((SLOTS, 3, size, dim), jnp.float32),
                columns=Columns.scratch(size),
                open_run=OpenRun.scratch(dim),
                grads_arrived=semaphores,
                state_arrived=semaphores,
                state_left=semaphores,
            ),
        ),
        cost_estimate=pl.CostEstimate(
            flops=24 * num_chunks * size * dim,
            transcendentals=num_chunks * size * dim,
            bytes_accessed=bytes_moved(num_chunks * size, num_chunks * size, dim),
        ),
        # The ids are proven in range before the call; the checks would cost ten
        # instruction bundles a DMA.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            disable_bounds_checks=True,
            disable_semaphore_checks=True,
        ),
        interpret=interpret,
    )(*operands)
    return updated


def _kernel(
    scalars: _Scalars,
    arriving: _Arriving,
    finishing: _Finishing,
    grads: jax.Ref,  # ANY [B, D]
    state_in: tuple[jax.Ref, ...],  # ANY, three of [V, D]
    state_out: tuple[jax.Ref, ...],  # the same memory
    scratch: _Scratch,
    *,
    hyper: Hyperparams,
    config: Config,
) -> None:
    k = pl.program_id(0)
    active = scalars.active[0]

    @pl.when(k == 0)
    def no_run_is_open():
        close_run(scratch.open_run)

    @pl.when(k < active)
    def start():
        slot, count = lax.rem(k, SLOTS), scalars.counts[k]

        @pl.when(k >= SLOTS)
        def slot_is_free():
            _wait(scratch.state_left, scratch, slot, scalars.counts[k - SLOTS])

        _fetch(arriving, grads, state_in, scratch, slot, count, config)

    @pl.when((k > 0) & (k <= active))
    def finish():
        slot, count = lax.rem(k - 1, SLOTS), scalars.counts[k - 1]
        summed = scratch.grads.at[slot]
        pltpu.make_async_copy(summed, summed, scratch.grads_arrived.at[slot]).wait()
        if finishing.weights:
            gains, counted = finishing.weights
            weigh(summed, gains, counted, scratch.columns)

        @pl.when(scalars.has_runs[k - 1] != 0)
        def chunk_has_runs():
            ids, ends = finishing.ids, finishing.ends
            sum_runs(summed, ids, ends, count, scratch.columns, scratch.open_run)

        _wait(scratch.state_arrived, scratch, slot, count)
        _update(scratch, slot, count, scalars.learning_rate[0], hyper)
        _write_back(finishing, state_out, scratch, slot, count, config)

    @pl.when(k == pl.num_programs(0) - 1)
    def drain():
        def chunk_has_left(chunk: jax.Array, _: None) -> None:
            slot = lax.rem(chunk, SLOTS)
            _wait(scratch.state_left, scratch, slot, scalars.counts[chunk])

        lax.fori_loop(jnp.maximum(active - SLOTS, 0), active, chunk_has_left, None)


def _fetch(
    arriving: _Arriving,
    grads: jax.Ref,
    state: tuple[jax.Ref, ...],
    scratch: _Scratch,
    slot: jax.Array,
    count: jax.Array,
    config: Config,
) -> None:
    def fetch_gradient(i: jax.Array) -> None:
        pltpu.make_async_copy(
            grads.at[pl.ds(arriving.sources[i], 1)],
            scratch.grads.at[slot, pl.ds(i, 1)],
            scratch.grads_arrived.at[slot],
        ).start()

    def fetch_row(i: jax.Array) -> None:
        row = arriving.rows[i]
        for t, table in enumerate(state):
            pltpu.make_async_copy(
                table.at[pl.ds(row, 1)],
                scratch.state.at[slot, t, pl.ds(i, 1)],
                scratch.state_arrived.at[slot],
            ).start()

    for_each(config.rows_per_chunk, fetch_gradient, config.dma_unroll)
    for_each(count, fetch_row, config.dma_unroll)


def _write_back(
    finishing: _Finishing,
    state: tuple[jax.Ref, ...],
    scratch: _Scratch,
    slot: jax.Array,
    count: jax.Array,
    config: Config,
) -> None:
    def write_row(i: jax.Array) -> None:
        row = finishing.rows[i]
        for t, table in enumerate(state):
            pltpu.make_async_copy(
                scratch.state.at[slot, t, pl.ds(i, 1)],
                table.at[pl.ds(row, 1)],
                scratch.state_left.at[slot],
            ).start()

    for_each(count, write_row, config.dma_unroll)


def _wait(
    semaphores: jax.Ref, scratch: _Scratch, slot: jax.Array, count: jax.Array
) -> None:
    """Waits for `count` rows of all three tables: once for a full chunk.

    Equal DMAs on one semaphore add up, but the size of a wait is static: so one wait
    for each binary digit of `count`.
    """

    def wait(rows: int) -> None:
        moved = scratch.state.at[slot, :, pl.ds(0, rows)]
        pltpu.make_async_copy(moved, moved, semaphores.at[slot]).wait()

    size = scratch.state.shape[2]
    for digit in range(size.bit_length()):
        pl.when((count >> digit) & 1 == 1)(functools.partial(wait, 1 << digit))


def _update(
    scratch: _Scratch,
    slot: jax.Array,
    count: jax.Array,
    learning_rate: jax.Array,
    hyper: Hyperparams,
) -> None:
    rows_per_tile = min(2 * SUBLANES, scratch.grads.shape[1])

    def update(rows: Rows) -> None:
        w, m, v = (scratch.state[slot, t, rows] for t in range(3))
        new = adam_tile(w, m, v, scratch.grads[slot, rows], learning_rate, hyper)
        for t, value in enumerate(new):
            scratch.state[slot, t, rows] = value

    for_each_tile(count, update, rows_per_tile)
