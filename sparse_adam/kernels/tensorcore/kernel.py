"""The body of the TensorCore's row kernel. `tensorcore` says what it does and why."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Index, Operand, Operands, Ref
from sparse_adam.kernels.spec import (
    UpdateSpec,
    join_per_row,
    part_per_row,
)
from sparse_adam.kernels.tensorcore.chunks import Moved, moved
from sparse_adam.kernels.tensorcore.config import SLOTS, Config
from sparse_adam.kernels.tensorcore.runs import (
    ChunkRuns,
    Columns,
    mark_rows,
    spread,
    sum_runs,
    weigh,
)
from sparse_adam.kernels.tensorcore.steps import (
    ChunkOccurrences,
    ResidentGroup,
    step_each,
)
from sparse_adam.kernels.tiles import LANES, SUBLANES, for_each, for_each_tile
from sparse_adam.kernels.vmem import Groups, Refs, group_noises, select
from sparse_adam.rules import StepNumbers


class RowScalars(NamedTuple):
    """Refs in SMEM, whole."""

    counts: Operand  # [chunks]
    continues: Operand  # [chunks + 1]
    repeats: Operand  # [chunks]
    numbers: Operand  # [1], [3] or [4], as `UpdateSpec.counted` has them
    seeds: Operands  # (), or a seed for each array


class Arriving(NamedTuple):
    """Refs of a core's chunk k, whose DMAs a grid step starts: SMEM [C] each."""

    groups: Operand
    sources: Operand


class Finishing(NamedTuple):
    """Refs of chunk k-1, which the same step computes: [C] each.

    What is in a tuple is there only where it is needed.
    """

    groups: Operand  # SMEM
    marks: Operand  # SMEM
    places: Operands  # VMEM of sums, else SMEM; of rows that share lines
    listed: Operands  # VMEM: the groups once more, for the noise of sums
    weights: Operands  # VMEM: gains, and 1 where a gradient counts
    row_slots: Operands  # VMEM: of the groups listed, each slot that is per row


class RowScratch(NamedTuple):
    """Refs in VMEM, and DMA semaphores, one a slot."""

    grads: Operand  # [SLOTS, C, W]
    touched: (
        Operands  # [C, 128]: gradients for each lane; of sums of rows that share lines
    )
    state: Operands  # [SLOTS, ...]
    columns: Columns
    row_slots: Operands  # [C, 128]: a slot that is per row, spread over lanes
    # From chunk to chunk: sums of an open run, [1, W] each; or a ResidentGroup.
    carried: Any
    grads_arrived: Operand
    state_arrived: Operand
    state_left: Operand

    @classmethod
    def shapes(cls, spec: UpdateSpec, groups: Groups, size: int) -> "RowScratch":
        """Returns what to allocate for chunks of `size`."""
        width = groups.blocks * groups.width
        layout, widths = spec.layout, (width,)
        if spec.accumulate:
            widths = (width, LANES) if layout.rows_per_group > 1 else (width,)
            carried = tuple(pltpu.VMEM((1, w), jnp.float32) for w in widths)
        else:
            carried = ResidentGroup.scratch(groups, len(layout.dtypes))
        semaphores = pltpu.SemaphoreType.DMA((SLOTS,))
        column = pltpu.VMEM((size, LANES), jnp.float32)
        return cls(
            grads=pltpu.VMEM((SLOTS, size, width), jnp.float32),
            touched=tuple(pltpu.VMEM((size, w), jnp.float32) for w in widths[1:]),
            state=groups.buffers(SLOTS, size),
            columns=Columns.scratch(size),
            row_slots=(column,) * sum(layout.per_row),
            carried=carried,
            grads_arrived=semaphores,
            state_arrived=semaphores,
            state_left=semaphores,
        )


@dataclasses.dataclass(frozen=True)
class _ChunkWork:
    """What all parts of the kernel know."""

    spec: UpdateSpec
    groups: Groups
    config: Config
    scalars: RowScalars
    scratch: RowScratch

    def moved(self, chunk: jax.Array) -> Moved:
        counts, continues = self.scalars.counts, self.scalars.continues
        return moved(counts, continues, chunk, self.spec.accumulate)

    def buffers(self, slot: jax.Array) -> Refs:
        return tuple(buffer.at[slot] for buffer in self.scratch.state)

    def numbers(self) -> StepNumbers:
        return self.spec.numbers(lambda i: self.scalars.numbers[i])

    def for_each(self, count: Index, body: Callable[[jax.Array], None]) -> None:
        for_each(count, body, self.config.dma_unroll)


def kernel(
    bounds: Ref,  # SMEM [cores + 1]
    scalars: RowScalars,
    arriving: Arriving,
    finishing: Finishing,
    grads: Ref,  # HBM [B, W]
    state_in: Refs,  # HBM
    state_out: Refs,  # the same memory
    row_slots_out: Refs,  # VMEM [C, 128]: the new ones of chunk k-1
    scratch: RowScratch,
    *,
    spec: UpdateSpec,
    groups: Groups,
    config: Config,
) -> None:
    """Starts the DMAs of a core's chunk k and finishes its chunk k-1."""
    work = _ChunkWork(spec, groups, config, scalars, scratch)
    core = pl.program_id(0)
    first, end = bounds[core], bounds[core + 1]
    k = first + pl.program_id(1)

    def wait_until_left(chunk: jax.Array) -> None:
        slot = lax.rem(chunk, SLOTS)
        _wait(work, scratch.state_left, slot, work.moved(chunk).written)

    @pl.when(k < end)
    def start():
        @pl.when(k >= first + SLOTS)
        def slot_is_free():
            wait_until_left(k - SLOTS)

        _fetch(work, arriving, grads, state_in, lax.rem(k, SLOTS), work.moved(k))

    @pl.when((k > first) & (k <= end))
    def finish():
        slot, these = lax.rem(k - 1, SLOTS), work.moved(k - 1)
        _take_gradients(work, finishing, slot)
        if spec.accumulate:
            _sum(work, finishing, slot, k - 1)
            _wait(work, scratch.state_arrived, slot, these.count)
            _update(work, finishing, row_slots_out, slot, these.count)
        else:
            _wait(work, scratch.state_arrived, slot, these.count - these.first)
            _step(work, finishing, slot, k - 1)
        _write_back(work, finishing, state_out, slot, these.written)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def drain():
        def chunk_has_left(chunk: jax.Array, _: None) -> None:
            wait_until_left(chunk)

        lax.fori_loop(jnp.maximum(end - SLOTS, first), end, chunk_has_left, None)


def _fetch(
    work: _ChunkWork,
    arriving: Arriving,
    grads: Ref,
    state: Refs,
    slot: jax.Array,
    these: Moved,
) -> None:
    scratch, buffers = work.scratch, work.buffers(slot)
    arrived = scratch.state_arrived.at[slot]

    def fetch_gradient(i: jax.Array) -> None:
        pltpu.make_async_copy(
            grads.at[pl.ds(arriving.sources[i], 1)],
            scratch.grads.at[slot, pl.ds(i, 1)],
            scratch.grads_arrived.at[slot],
        ).start()

    def fetch_group(i: jax.Array) -> None:
        i = these.first + i
        group = arriving.groups[i]
        for there, here in work.groups.copies(state, buffers, group, i, 1):
            pltpu.make_async_copy(there, here, arrived).start()

    work.for_each(work.config.rows_per_chunk, fetch_gradient)
    work.for_each(these.count - these.first, fetch_group)


def _write_back(
    work: _ChunkWork, finishing: Finishing, state: Refs, slot: jax.Array, count: Index
) -> None:
    buffers, left = work.buffers(slot), work.scratch.state_left.at[slot]

    def write_group(i: jax.Array) -> None:
        group = finishing.groups[i]
        for there, here in work.groups.copies(state, buffers, group, i, 1):
            pltpu.make_async_copy(here, there, left).start()

    work.for_each(count, write_group)


def _wait(work: _ChunkWork, semaphores: Ref, slot: jax.Array, count: Index) -> None:
    """Waits for all DMAs of `count` groups: once for a full chunk.

    Equal DMAs on one semaphore add up, but the size of a wait is static: so one wait
    for each binary digit of `count`.
    """

    def wait(groups: int) -> None:
        for words in work.groups.moved(work.buffers(slot), groups):
            pltpu.make_async_copy(words, words, semaphores.at[slot]).wait()

    for digit in range(work.config.rows_per_chunk.bit_length()):
        pl.when((count >> digit) & 1 == 1)(functools.partial(wait, 1 << digit))


def _take_gradients(work: _ChunkWork, finishing: Finishing, slot: jax.Array) -> None:
    scratch = work.scratch
    arrived = scratch.grads.at[slot]
    pltpu.make_async_copy(arrived, arrived, scratch.grads_arrived.at[slot]).wait()
    if finishing.weights:
        gains, counted = finishing.weights
        weigh(arrived, gains, counted, scratch.columns)


def _sum(
    work: _ChunkWork, finishing: Finishing, slot: jax.Array, chunk: jax.Array
) -> None:
    """Sums the runs, and for rows that share lines finds those that are touched."""
    scratch, scalars = work.scratch, work.scalars
    grads, columns = scratch.grads.at[slot], scratch.columns
    for places, touched in zip(finishing.places, scratch.touched, strict=True):
        mark_rows(grads, touched, places, work.spec.layout.stride, columns)

    runs = ChunkRuns(
        ended=scalars.counts[chunk],
        repeats=scalars.repeats[chunk],
        continues=scalars.continues[chunk] != 0,
        goes_on=scalars.continues[chunk + 1] != 0,
    )
    sum_runs((grads, *scratch.touched), scratch.carried, finishing.marks, runs)


def _update(
    work: _ChunkWork,
    finishing: Finishing,
    row_slots_out: Refs,
    slot: jax.Array,
    count: Index,
) -> None:
    """Steps the groups listed, the i-th by the i-th row of sums."""
    groups, spec, scalars = work.groups, work.spec, work.scalars
    grads, buffers = work.scratch.grads.at[slot], work.buffers(slot)
    integers, numbers = work.scratch.columns.integers, work.numbers()
    for listed in finishing.listed:
        spread(listed, integers)
    for column, row_slot in zip(
        work.scratch.row_slots, finishing.row_slots, strict=True
    ):
        spread(row_slot, column)

    def update(rows: pl.Slice) -> None:
        listed = integers[rows] if finishing.listed else None
        for block in range(groups.blocks):
            old = groups.read(buffers, rows, block)
            gradient = grads[rows, pl.ds(block * groups.width, groups.width)]
            by_row = [column[rows][:, :1] for column in work.scratch.row_slots]
            values = join_per_row(spec.layout.per_row, groups.values(old), by_row)
            values = spec.step(values, gradient, numbers)
            elements, by_row = part_per_row(spec.layout.per_row, values)
            for out, value in zip(row_slots_out, by_row, strict=True):
                out[rows] = jnp.broadcast_to(value, (rows.size, LANES))
            noises = group_noises(scalars.seeds, listed, block, spec.layout)
            new = groups.words(elements, noises)
            for touched in work.scratch.touched:
                new = select(touched[rows] > 0, new, old)
            groups.write(buffers, rows, block, new)

    for_each_tile(count, update, min(2 * SUBLANES, grads.shape[0]))


def _step(
    work: _ChunkWork, finishing: Finishing, slot: jax.Array, chunk: jax.Array
) -> None:
    """Steps the groups listed, once for each occurrence."""
    scratch, scalars = work.scratch, work.scalars
    step_each(
        ChunkOccurrences(
            scratch.grads.at[slot],
            finishing.marks,
            finishing.groups,
            finishing.places,
            scalars.continues[chunk] != 0,
        ),
        work.buffers(slot),
        scratch.carried,
        work.numbers(),
        scalars.seeds,
        work.spec,
        work.groups,
    )
