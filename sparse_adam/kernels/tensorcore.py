"""Lazy Adam on rows, plain or packed, on one TPU TensorCore.

Why: XLA's compiled scatter streams the whole table through the core. This kernel
touches what the batch touched: each gradient row is read once, straight through the
sort's permutation, and each updated group of rows is read once and written once, in
place. Nothing is materialised in between (`bytes_moved`).

What is moved at once is a *group*: a row of three plain arrays, by three DMAs, or the
lines of a packed group, by one. Neighbours that share lines are one group, so that an
update of one never undoes that of another.

Data flow: sorted occurrences come in chunks of C. Grid step k starts the DMAs of
chunk k (C gradient rows, and each group whose run of occurrences *ends* in the chunk),
then finishes chunk k-1: wait, sum the runs, update, start the write-backs. Three buffer
slots, so that while a chunk is computed the next one arrives and the previous one
leaves. Row DMAs are limited by issue, about 3.2 to 4.1 instruction bundles each, hence
the flat, unrolled loops without bounds checks.

Without accumulation a group is fetched by the chunk in which its run begins, is stepped
once for each occurrence, in the order of the batch, and stays in VMEM until its run
ends (`tensorcore_steps`).

Order: a group is fetched once and written once, later, in a call, and no two DMAs of a
call touch the same group but those two. So chunks need no order among themselves but
this: a slot's write-backs are waited for before its next fetch, and an unfinished run
passes from chunk to chunk in VMEM.

Numerics: float32 between one read and one rounding per row and call. A run is summed by
a segmented scan with selects, 8 rows at a time, so a NaN stays in the row it belongs to
(a one-hot matmul would spread it: 0 * NaN). Of a line that rows share, only the lanes
of rows in the batch change. The order of additions depends on the sorted positions
only: same call, same bits.

Needs: what `unsupported` says. Ids must be proven to lie in [0, V) or be the sentinel
V, sorted: a wild id would be a wild DMA, and the checks are off.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Tile
from sparse_adam.kernels.chunks import Chunks, split_into_chunks
from sparse_adam.kernels.config import LANES, SUBLANES, VMEM_BUDGET, Config
from sparse_adam.kernels.layout import PackedLayout
from sparse_adam.kernels.problem import Batch, Problem, State, Step
from sparse_adam.kernels.tensorcore_kernel import (
    Arriving,
    Finishing,
    Scalars,
    Scratch,
    kernel,
)
from sparse_adam.kernels.tensorcore_storage import in_lines, storage_of


def unsupported(problem: Problem) -> str | None:
    """Says why this kernel cannot do `problem`, or None when it can."""
    if not problem.lazy:
        return "lazy_adam=False updates every row; this kernel visits looked-up rows"
    if not problem.packed:
        if problem.dim % LANES:
            return (
                f"D={problem.dim} is not a multiple of {LANES}: a TPU does not store "
                "such a table row by row"
            )
        for name in ("table", "momenta", "velocities"):
            dtype = getattr(problem, f"{name}_dtype")
            if dtype != np.float32:
                return (
                    f"{name} is {dtype}; rows move one by one, and only float32 rows "
                    "are words of their own (two bfloat16 rows share each 32-bit word)"
                )
    if Config(SUBLANES).vmem_bytes(problem) > VMEM_BUDGET:
        return f"D={problem.dim} is too large: {SUBLANES} rows must fit in VMEM"
    return None


def bytes_moved(
    num_ids: int, num_groups: int, dim: int, layout: PackedLayout | None = None
) -> int:
    """HBM bytes of one update: gradients once, groups in and out, five indices.

    A group is a row of three plain arrays, or the lines of a packed one.
    """
    gradient, group = dim, 3 * dim
    if layout is not None:
        gradient = layout.blocks * LANES
        group = layout.lines_per_group * LANES
    return 4 * (num_ids * gradient + 2 * num_groups * group + 5 * num_ids)


def tensorcore_update(
    state: State,
    batch: Batch,
    step: Step,
    problem: Problem,
    config: Config | None = None,
) -> State:
    """Updates the rows `batch.ids` (sorted; V for none) in place."""
    if config is not None:
        config.check(problem)
    chosen = config or Config.choose(problem)
    # Unrolling buys an interpreter nothing and triples the time to compile.
    plain = config or dataclasses.replace(chosen, dma_unroll=1)
    stored = storage_of(problem)
    size = chosen.rows_per_chunk
    chunks = split_into_chunks(batch, problem, stored.rows_per_group, size)
    call = functools.partial(_call, problem=problem)
    return lax.platform_dependent(
        chunks,
        step,
        in_lines(batch.grads, stored),
        state,
        tpu=functools.partial(call, config=chosen),
        default=functools.partial(call, config=plain, interpret=True),
    )


def _call(
    chunks: Chunks,
    step: Step,
    grads: Tile,
    state: State,
    *,
    problem: Problem,
    config: Config,
    interpret: bool = False,
) -> State:
    num_chunks, _, size = chunks.groups.shape
    sums, tables = problem.accumulate, len(state)
    if not interpret:
        # XLA would keep a few in VMEM, where the DMA of a row becomes loads and stores.
        grads = pltpu.with_memory_space_constraint(grads, pltpu.HBM)

    def block(lag: int, memory_space: Any) -> pl.BlockSpec:
        def index(k: jax.Array) -> tuple[jax.Array, int, int]:
            return jnp.clip(k - lag, 0, num_chunks - 1), 0, 0

        return pl.BlockSpec((None, None, size), index, memory_space=memory_space)

    smem, hbm = (
        pl.BlockSpec(memory_space=pltpu.SMEM),
        pl.BlockSpec(memory_space=pltpu.HBM),
    )
    arriving, finishing = block(0, pltpu.SMEM), block(1, pltpu.SMEM)
    column = block(1, pltpu.VMEM)
    seeds = () if step.seeds is None else (step.seeds,)
    listed = (chunks.groups,) if seeds and sums else ()
    operands = (
        Scalars(
            chunks.active,
            chunks.counts,
            chunks.continues,
            step.learning_rate[None],
            seeds,
        ),
        Arriving(chunks.groups, chunks.sources),
        Finishing(
            chunks.groups,
            chunks.marks,
            (chunks.owners,) if sums else (),
            chunks.places,
            listed,
            chunks.weights,
        ),
        grads,
        state,
    )
    specs = (
        Scalars(smem, smem, smem, smem, (smem,) * len(seeds)),
        Arriving(arriving, arriving),
        Finishing(
            finishing,
            finishing,
            (column,) if sums else (),
            (column if sums else finishing,) * len(chunks.places),
            (column,) * len(listed),
            (column,) * len(chunks.weights),
        ),
        hbm,
        (hbm,) * tables,
    )
    first_table = len(jax.tree.leaves(operands)) - tables
    most = num_chunks * size
    (updated,) = pl.pallas_call(
        functools.partial(kernel, problem=problem, config=config),
        name="sparse_adam_tensorcore",
        grid=(num_chunks + 1,),
        in_specs=specs,
        out_specs=((hbm,) * tables,),
        out_shape=(jax.eval_shape(lambda *x: x, *state),),
        input_output_aliases={first_table + i: i for i in range(tables)},
        scratch_shapes=(Scratch.shapes(problem, size),),
        cost_estimate=pl.CostEstimate(
            flops=24 * most * problem.dim,
            transcendentals=most * problem.dim,
            bytes_accessed=bytes_moved(
                *(most, most, problem.dim),
                layout=problem.layout if problem.packed else None,
            ),
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
