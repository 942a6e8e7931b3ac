"""The update row by row: what it cannot do, what it moves, and the call."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Tile
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
    reason = unsupported_rows(spec)
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
    chunks = split_into_chunks(batch, spec, chosen.rows_per_chunk)
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
        slot.at[rows].set(new[:, 0], mode="drop")
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
    first_table = len(jax.tree.leaves(operands)) - tables
    fresh = jax.ShapeDtypeStruct((most, LANES), jnp.float32)
    block = pl.BlockSpec((size, LANES), lambda k: (_chunk(k, 1, num_chunks), 0))
    return pl.pallas_call(
        functools.partial(kernel, spec=spec, groups=groups, config=config),
        name="sparse_adam_tensorcore",
        grid=(num_chunks + 1,),
        in_specs=specs,
        out_specs=(specs[-1], (block,) * len(row_slots)),
        out_shape=(
            jax.eval_shape(lambda *x: x, *state),
            (fresh,) * len(row_slots),
        ),
        input_output_aliases={first_table + i: i for i in range(tables)},
        scratch_shapes=(RowScratch.shapes(spec, groups, size),),
        cost_estimate=cost_estimate(spec, most, bytes_moved(most, most, spec)),
        # The ids are proven in range before the call; the checks would cost ten
        # instruction bundles a DMA.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            disable_bounds_checks=True,
            disable_semaphore_checks=True,
        ),
        interpret=interpret,
    )(*operands)


def _operands(
    chunks: Chunks, scalars: StepScalars, row_slots: State, spec: UpdateSpec
) -> tuple[RowScalars, Arriving, Finishing]:
    """Returns what the kernel reads of a batch, beside its gradients."""
    seeds = () if scalars.seeds is None else (scalars.seeds,)
    return (
        RowScalars(
            chunks.active,
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

    Of these grid step k starts chunk k and finishes chunk k - 1. All else stays in HBM.
    """

    def block(lag: int, memory_space: Any) -> pl.BlockSpec:
        def index(k: jax.Array) -> tuple[jax.Array, int, int]:
            return _chunk(k, lag, num_chunks), 0, 0

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


def _chunk(k: jax.Array, lag: int, num_chunks: int) -> jax.Array:
    """Returns the chunk that is handled `lag` grid steps after it was started."""
    return jnp.clip(k - lag, 0, num_chunks - 1)
