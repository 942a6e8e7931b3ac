"""The update row by row: what it cannot do, what it moves, and the call."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Index, Ref, Tile
from sparse_adam.kernels import chips
from sparse_adam.kernels.chips import VMEM_BUDGET
from sparse_adam.kernels.costs import cost_estimate, unsupported_rows
from sparse_adam.kernels.spec import (
    SortedBatch,
    State,
    StepScalars,
    UpdateSpec,
    join_per_row,
    part_per_row,
)
from sparse_adam.kernels.tensorcore.chunks import Chunks, split_into_chunks
from sparse_adam.kernels.tensorcore.config import Config
from sparse_adam.kernels.tensorcore.kernel import (
    Arriving,
    Finishing,
    RowScalars,
    RowScratch,
    kernel,
)
from sparse_adam.kernels.tiles import LANES, SUBLANES
from sparse_adam.kernels.vmem import groups_of, pad_to_lines
from sparse_adam.rules import check_rule


def unsupported(spec: UpdateSpec) -> str | None:
    """Says why this kernel cannot do an update, or returns None when it can."""
    if not spec.lazy:
        return "lazy=False steps every row; this kernel visits looked-up rows"
    facts, packed = check_rule(spec.rule), spec.layout.storage == "packed"
    if facts.whole_rows and packed:
        return "its rule reads whole rows; of packed rows this kernel sees 128 lanes"
    if facts.per_row and not spec.accumulate:
        return (
            "its rule has a slot per row, which this kernel steps once a row; "
            "use_gradient_accumulation=False steps each occurrence"
        )
    reason = unsupported_rows(spec.layout, spec.array_names)
    if reason is not None:
        return reason
    if Config(SUBLANES).vmem_bytes(spec) > VMEM_BUDGET:
        return f"D={spec.dim} is too large: {SUBLANES} rows must fit in VMEM"
    return None


def bytes_moved(num_ids: int, num_groups: int, spec: UpdateSpec) -> int:
    """Returns the HBM bytes of one update.

    That is gradients once, groups in and out, and five indices an occurrence. A group
    is a row of the plain arrays, or the lines of a packed one.
    """
    layout = spec.layout
    gradient = 4 * LANES * layout.blocks
    return num_ids * (gradient + 4 * 5) + 2 * num_groups * layout.group_bytes


def tensorcore_update(
    state: State,
    batch: SortedBatch,
    scalars: StepScalars,
    spec: UpdateSpec,
    config: Config | None = None,
    *,
    interpret: bool = False,
) -> State:
    """Updates the rows `batch.ids` (sorted; V for none) in place."""
    chosen = config or Config.choose(spec)
    if interpret and config is None:
        # Unrolling buys an interpreter nothing and triples the time to compile.
        chosen = dataclasses.replace(chosen, dma_unroll=1)
    layout = spec.layout
    cores = chosen.cores or chips.in_scope().cores
    chunks = split_into_chunks(batch, spec, chosen.rows_per_chunk, cores)
    # A slot that is per row is one word a row, which no DMA moves alone: XLA gathers
    # those of the groups that each chunk lists, and scatters the new ones.
    moved, by_row = part_per_row(layout.per_row, state)
    gathered = tuple(slot.at[chunks.groups].get(mode="clip") for slot in by_row)
    grads = pad_to_lines(batch.grads, layout)
    moved, fresh = _call(
        chunks, scalars, grads, moved, gathered, spec, chosen, interpret
    )
    listed = lax.broadcasted_iota(jnp.int32, chunks.groups.shape, 2)
    listed = listed < chunks.counts[:, None, None]
    rows = jnp.where(listed, chunks.groups, spec.num_rows).reshape(-1)
    by_row = [
        slot.at[rows].set(new[: rows.size, 0], mode="drop")
        for slot, new in zip(by_row, fresh, strict=True)
    ]
    return join_per_row(layout.per_row, moved, by_row)


def _call(
    chunks: Chunks,
    scalars: StepScalars,
    grads: Tile,
    state: State,
    row_slots: State,
    spec: UpdateSpec,
    config: Config,
    interpret: bool,
) -> tuple[State, State]:
    num_chunks, _, size = chunks.groups.shape
    tables, most = len(state), num_chunks * size
    groups = groups_of(spec.layout, whole_rows=True, compiled=not interpret)
    if not interpret:
        # XLA would keep a few in VMEM, where the DMA of a row becomes loads and stores.
        grads = pltpu.with_memory_space_constraint(grads, pltpu.HBM)
    operands = (*_operands(chunks, scalars, row_slots, spec), grads, state)
    specs = _specs(operands, num_chunks, size, spec)
    first_table = 1 + len(jax.tree.leaves(operands)) - tables
    # And a chunk for what a core without any would write.
    fresh = jax.ShapeDtypeStruct((most + size, LANES), jnp.float32)

    def written(core: jax.Array, k: jax.Array, bounds: Ref) -> tuple[jax.Array, int]:
        has_any = bounds[core] < bounds[core + 1]
        return jnp.where(has_any, _chunk(core, k, bounds, 1), num_chunks), 0

    block = pl.BlockSpec((size, LANES), written)
    return pl.pallas_call(
        functools.partial(kernel, spec=spec, groups=groups, config=config),
        name="sparse_adam_tensorcore",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(chunks.bounds.size - 1, _steps(chunks)),
            in_specs=specs,
            out_specs=(specs[-1], (block,) * len(row_slots)),
            scratch_shapes=(RowScratch.shapes(spec, groups, size),),
        ),
        out_shape=(
            jax.eval_shape(lambda *x: x, *state),
            (fresh,) * len(row_slots),
        ),
        input_output_aliases={first_table + i: i for i in range(tables)},
        cost_estimate=cost_estimate(spec, most, bytes_moved(most, most, spec)),
        # The ids are proven in range before the call; the checks would cost more than
        # ten instruction bundles a DMA.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=not config.checks,
            disable_semaphore_checks=not config.checks,
        ),
        interpret=interpret,
    )(chunks.bounds, *operands)


def _operands(
    chunks: Chunks, scalars: StepScalars, row_slots: State, spec: UpdateSpec
) -> tuple[RowScalars, Arriving, Finishing]:
    """Returns what the kernel reads of a batch, beside its gradients."""
    seeds = () if scalars.seeds is None else (scalars.seeds,)
    return (
        RowScalars(
            chunks.counts,
            chunks.continues,
            chunks.repeats,
            spec.counted(scalars.numbers),
            seeds,
        ),
        Arriving(chunks.groups, chunks.sources),
        Finishing(
            chunks.groups,
            chunks.marks,
            chunks.places,
            (chunks.groups,) if seeds and spec.accumulate else (),
            chunks.weights,
            row_slots,
        ),
    )


def _specs(
    operands: tuple[Any, ...], num_chunks: int, size: int, spec: UpdateSpec
) -> tuple[Any, ...]:
    """Returns where the operands are: scalars whole, the indices of a chunk at a time.

    Of these a core's step k starts chunk k and finishes chunk k - 1. All else stays in
    HBM.
    """

    def block(lag: int, memory_space: Any) -> pl.BlockSpec:
        def index(core: jax.Array, k: jax.Array, bounds: Ref) -> tuple[Index, int, int]:
            return jnp.minimum(_chunk(core, k, bounds, lag), num_chunks - 1), 0, 0

        return pl.BlockSpec((None, None, size), index, memory_space=memory_space)

    def each(place: pl.BlockSpec, operand: Any) -> Any:
        return jax.tree.map(lambda _: place, operand)

    scalars, arriving, finishing, grads, state = operands
    line, column = block(1, pltpu.SMEM), block(1, pltpu.VMEM)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return (
        each(pl.BlockSpec(memory_space=pltpu.SMEM), scalars),
        each(block(0, pltpu.SMEM), arriving),
        each(column, finishing)._replace(
            groups=line,
            marks=line,
            places=each(column if spec.accumulate else line, finishing.places),
        ),
        each(hbm, grads),
        each(hbm, state),
    )


def _steps(chunks: Chunks) -> Index:
    """Returns the grid steps of each core: one more than chunks, of the core with most.

    Where one core has all chunks, their number is known to the compiler.
    """
    bounds = chunks.bounds
    if bounds.size == 2:
        return chunks.counts.size + 1
    return jnp.max(bounds[1:] - bounds[:-1]) + 1


def _chunk(core: jax.Array, k: jax.Array, bounds: Ref, lag: int) -> jax.Array:
    """Returns the chunk that a core handles `lag` grid steps after it was started."""
    if bounds.shape[0] == 2:
        return jnp.maximum(k - lag, 0)
    first, end = bounds[core], bounds[core + 1]
    return jnp.maximum(jnp.minimum(first + k - lag, end - 1), first)
