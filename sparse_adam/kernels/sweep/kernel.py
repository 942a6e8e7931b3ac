"""The body of the sweep kernel; `sweep` says what it does and why."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Operand, Operands, Ref
from sparse_adam.kernels.spec import UpdateSpec
from sparse_adam.kernels.sweep.config import (
    BATCH,
    GRADIENT_SLOTS,
    INDEX_SLOTS,
    STATE_SLOTS,
    TILE,
    Config,
)
from sparse_adam.kernels.tiles import LANES, for_each
from sparse_adam.kernels.vmem import Groups, Refs, group_noises, select

# The sum of no gradients at all. No sum is ever left at -0, so this both marks what the
# batch did not touch and is a gradient of zero.
_NOTHING = np.float32(-0.0)
_NOTHING_BITS = np.int32(-(2**31))


@dataclasses.dataclass(frozen=True, slots=True)
class Sweep:
    """What the kernel knows when it is compiled."""

    spec: UpdateSpec
    groups: Groups
    config: Config
    tiles: int  # updated in one iteration
    cores: int  # that share the blocks

    @property
    def num_blocks(self) -> int:
        """Returns the blocks of the table, the last one perhaps not full."""
        return pl.cdiv(self.spec.layout.num_groups, self.config.groups_per_block)

    @property
    def blocks_each(self) -> int:
        """Returns the blocks of a core; of the last one there may be fewer."""
        return pl.cdiv(self.num_blocks, self.cores)

    @property
    def groups_each(self) -> int:
        """Returns the groups in the blocks of a core."""
        return self.blocks_each * self.config.groups_per_block


class SweepScalars(NamedTuple):
    """Refs in SMEM, whole."""

    firsts: Operand  # [cores]: the batch of occurrences that a core begins with
    ends: Operand  # [cores]: the chunk that it ends before
    numbers: Operand  # [1] or [3], as `UpdateSpec.counted` has them
    seeds: Operands  # () or a seed for each array


class Indices(NamedTuple):
    """The occurrences, C to a chunk: HBM [chunks, 1, C]; in SMEM chunk by chunk."""

    groups: Operand  # of the table, ascending; complements of such are passed over
    sources: Operand  # gradient row of each; -1 adds nothing, where there are gains
    lanes: Operands  # (), or the first one of each row in its group's lines
    gains: Operands  # () or float32


class Share(NamedTuple):
    """The occurrences that a core reads: from a batch on, up to the end of a chunk."""

    batch: jax.Array
    chunk: jax.Array  # in which the batch is
    end: jax.Array


class SweepScratch(NamedTuple):
    """What is kept from one grid step to the next."""

    state: Operands  # VMEM, blocks of the table
    sums: Operand  # VMEM [groups + 8, W]: of a block; one more row for those of others
    grads: Operand  # VMEM [GRADIENT_SLOTS, C, W]
    indices: Indices  # SMEM [INDEX_SLOTS * C]
    place: Operand  # SMEM [2]: the batch to be added next, chunks fetched so far
    state_arrived: Operand  # DMA semaphores, one a slot
    state_left: Operand
    grads_arrived: Operand
    indices_arrived: Operand


def kernel(
    scalars: SweepScalars,
    indices: Indices,
    grads: Ref,  # ANY [B, W]
    state_in: Refs,  # ANY, the arrays of the table
    state_out: Refs,  # the same memory
    scratch: SweepScratch,
    *,
    sweep: Sweep,
) -> None:
    """A core's step k starts the arrival of its block k, then finishes its block k - 1.

    Its blocks stand together, and no other core moves them.
    """
    core, k = pl.program_id(0), pl.program_id(1)
    fetch = functools.partial(_move, sweep, state_in, scratch, arrives=True)
    write_back = functools.partial(_move, sweep, state_out, scratch, arrives=False)
    first_block = core * sweep.blocks_each
    block = first_block + k
    end_block = jnp.minimum(first_block + sweep.blocks_each, sweep.num_blocks)
    batch = scalars.firsts[core]
    chunk = lax.div(batch, sweep.config.occurrences_per_chunk // BATCH)
    share = Share(batch, chunk, scalars.ends[core])

    @pl.when(k == 0)
    def begin():
        _forget(scratch.sums)
        scratch.place[0], scratch.place[1] = share.batch, share.chunk
        pl.when(share.chunk < share.end)(
            lambda: _fetch_indices(indices, scratch, share.chunk)
        )

    @pl.when(block < end_block)
    def start():
        pl.when(k >= STATE_SLOTS)(lambda: write_back(block - STATE_SLOTS, _wait))
        fetch(block, _start)

    @pl.when((k > 0) & (block <= end_block))
    def finish():
        arrived = block - 1
        _add_gradients(arrived, share, indices, grads, scratch, sweep)
        fetch(arrived, _wait)
        _update(arrived, scalars, scratch, sweep)
        write_back(arrived, _start)

    @pl.when(k == sweep.blocks_each)
    def drain():
        def block_has_left(block: jax.Array, _: None) -> None:
            write_back(block, _wait)

        leaving = jnp.maximum(end_block - STATE_SLOTS, first_block)
        lax.fori_loop(leaving, end_block, block_has_left, None)


def _start(copy: Any) -> None:
    copy.start()


def _wait(copy: Any) -> None:
    copy.wait()


def _move(
    sweep: Sweep,
    state: Refs,
    scratch: SweepScratch,
    block: jax.Array,
    do: Callable[[Any], None],
    *,
    arrives: bool,
) -> None:
    """Starts the DMAs of a block, or waits for them: one for each array."""
    slot, last = lax.rem(block, STATE_SLOTS), sweep.num_blocks - 1
    size = sweep.config.groups_per_block
    rest = sweep.spec.layout.num_groups - last * size
    semaphores = scratch.state_arrived if arrives else scratch.state_left
    buffers = tuple(buffer.at[slot] for buffer in scratch.state)
    first = pl.multiple_of(block * size, size)

    def move(count: int) -> None:
        for there, here in sweep.groups.copies(state, buffers, first, 0, count):
            ends = (there, here) if arrives else (here, there)
            do(pltpu.make_async_copy(*ends, semaphores.at[slot]))

    if last == 0 or rest == size:
        move(rest)
    else:
        pl.when(block < last)(functools.partial(move, size))
        pl.when(block == last)(functools.partial(move, rest))


def _add_gradients(
    block: jax.Array,
    share: Share,
    indices: Indices,
    grads: Ref,
    scratch: SweepScratch,
    sweep: Sweep,
) -> None:
    """Adds all gradients of a block, batch after batch, to `scratch.sums`.

    1. `place` says which batch comes next, over all chunks; what is before it is added.
    2. A batch is added whole: what it holds for other blocks goes to a row that nobody
       reads. If it holds any for a later block, that block begins with it again.
    3. A chunk is waited for when its first batch comes, and the one after it is then
       started: so each is fetched once, and all have arrived in the end.
    """
    size = sweep.config.occurrences_per_chunk
    per_chunk = size // BATCH
    batches = share.end * per_chunk
    base = block * sweep.config.groups_per_block
    end = base + sweep.config.groups_per_block

    def more(state: tuple[jax.Array, ...]) -> jax.Array:
        batch, _, following = state
        return (batch < batches) & (following < end)

    def add_chunk(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        batch, fetched, following = state
        chunk = lax.div(batch, per_chunk)

        def fetch_next(i: jax.Array, _: None) -> None:
            _fetch_gradients(i, share, indices, grads, scratch, sweep)

        lax.fori_loop(fetched, chunk + 2, fetch_next, None)

        ids = lax.rem(chunk, INDEX_SLOTS) * sweep.config.index_line
        into = lax.rem(chunk, GRADIENT_SLOTS)

        def more_here(state: tuple[jax.Array, jax.Array]) -> jax.Array:
            batch, following = state
            return (batch < (chunk + 1) * per_chunk) & (following < end)

        def add(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            batch, _ = state
            first = (batch - chunk * per_chunk) * BATCH
            following = _add_batch(ids + first, into, first, base, scratch, sweep)
            return batch + (following < end).astype(jnp.int32), following

        batch, following = lax.while_loop(more_here, add, (batch, following))
        return batch, chunk + 2, following

    begin = scratch.place[0], scratch.place[1], jnp.int32(0)
    batch, fetched, _ = lax.while_loop(more, add_chunk, begin)
    scratch.place[0], scratch.place[1] = batch, fetched


def _fetch_gradients(
    chunk: jax.Array,
    share: Share,
    indices: Indices,
    grads: Ref,
    scratch: SweepScratch,
    sweep: Sweep,
) -> None:
    """Starts the gradients of a chunk and the indices of the next one; waits for those
    of the chunk before.
    """
    size = scratch.grads.shape[1]

    @pl.when(chunk < share.end)
    def start():
        slot, into = lax.rem(chunk, INDEX_SLOTS), lax.rem(chunk, GRADIENT_SLOTS)
        for index in jax.tree.leaves(scratch.indices):
            there = index.at[_chunk_of(index, slot)]
            arrived = scratch.indices_arrived.at[slot]
            pltpu.make_async_copy(there, there, arrived).wait()
        pl.when(chunk + 1 < share.end)(
            lambda: _fetch_indices(indices, scratch, chunk + 1)
        )

        sources = scratch.indices.sources
        line = sources.shape[0] // INDEX_SLOTS

        def fetch(i: jax.Array) -> None:
            source = sources[slot * line + i]
            if indices.gains:
                source = jnp.maximum(source, 0)
            pltpu.make_async_copy(
                grads.at[pl.ds(source, 1)],
                scratch.grads.at[into, pl.ds(i, 1)],
                scratch.grads_arrived.at[into],
            ).start()

        for_each(size, fetch, sweep.config.unroll)

    @pl.when(chunk > share.chunk)
    def wait():
        slot = lax.rem(chunk - 1, GRADIENT_SLOTS)
        there = scratch.grads.at[slot]
        pltpu.make_async_copy(there, there, scratch.grads_arrived.at[slot]).wait()


def _fetch_indices(indices: Indices, scratch: SweepScratch, chunk: jax.Array) -> None:
    slot = lax.rem(chunk, INDEX_SLOTS)
    pairs = zip(jax.tree.leaves(indices), jax.tree.leaves(scratch.indices), strict=True)
    for array, index in pairs:
        there = index.at[_chunk_of(index, slot)]
        arrived = scratch.indices_arrived.at[slot]
        pltpu.make_async_copy(array.at[chunk, 0], there, arrived).start()


def _chunk_of(index: Ref, slot: jax.Array) -> pl.Slice:
    size = index.shape[0] // INDEX_SLOTS
    return pl.Slice(pl.multiple_of(slot * size, size), size)


def _add_batch(
    at: jax.Array,
    into: jax.Array,
    first: jax.Array,
    base: jax.Array,
    scratch: SweepScratch,
    sweep: Sweep,
) -> jax.Array:
    """Adds `BATCH` gradients in their order; returns the group of the last one."""
    ids, others = scratch.indices, jnp.uint32(sweep.config.groups_per_block)

    def add(j: jax.Array) -> None:
        # Of an earlier block it is negative, of a later one too large, and of none a
        # complement: as an unsigned number all the same.
        row = jnp.minimum((ids.groups[at + j] - base).astype(jnp.uint32), others)
        here = pl.ds(row.astype(jnp.int32), 1)
        gradient = scratch.grads[into, pl.ds(first + j, 1)]
        if ids.gains:
            weighed = ids.gains[0][at + j] * gradient
            gradient = jnp.where(ids.sources[at + j] < 0, np.float32(0), weighed)
        before = scratch.sums[here]
        total = before + gradient
        total = jnp.where(_is_nothing(total), np.float32(0), total)
        if ids.lanes:
            lane = lax.broadcasted_iota(jnp.int32, total.shape, 1)
            lane = (lane - ids.lanes[0][at + j]).astype(jnp.uint32)
            total = jnp.where(
                lane < jnp.uint32(sweep.spec.layout.stride), total, before
            )
        scratch.sums[here] = total

    for_each(BATCH, add, sweep.config.unroll)
    last = ids.groups[at + (BATCH - 1)]
    return jnp.where(last < 0, ~last, last)


def _is_nothing(sums: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(sums, jnp.int32) == _NOTHING_BITS


def _forget(sums: Ref) -> None:
    """Makes sums the sums of nothing."""
    sums[...] = jnp.full(sums.shape, _NOTHING)


def _update(
    block: jax.Array, scalars: SweepScalars, scratch: SweepScratch, sweep: Sweep
) -> None:
    """Steps a block in VMEM; leaves the sums of nothing for the next one."""
    spec, moved = sweep.spec, sweep.groups
    slot = lax.rem(block, STATE_SLOTS)
    step_numbers = spec.numbers(lambda i: scalars.numbers[i])
    state = tuple(buffer.at[slot] for buffer in scratch.state)
    size = sweep.config.groups_per_block
    tile = min(TILE, size)

    def update_tile(line: jax.Array, j: jax.Array) -> None:
        groups = pl.Slice(pl.multiple_of(j * tile, tile), tile)
        here = groups, pl.ds(pl.multiple_of(line * LANES, LANES), LANES)
        sums = scratch.sums[here]
        _forget(scratch.sums.at[here])
        old = moved.read(state, groups, line)
        new = spec.step(moved.values(old), sums, step_numbers)
        first = block * size + groups.start
        numbers = first + lax.broadcasted_iota(jnp.int32, sums.shape, 0)
        noises = group_noises(scalars.seeds, numbers, line, spec.layout)
        words = moved.words(new, noises)
        if spec.lazy:
            words = select(_is_nothing(sums), old, words)
        moved.write(state, groups, line, words)

    def update_line(line: jax.Array) -> None:
        update = functools.partial(update_tile, line)
        for_each(tiles, update, min(tiles, sweep.tiles))

    tiles, lines = size // tile, spec.layout.blocks
    # One line of many tiles after the other; of few, several lines in one iteration.
    together = min(lines, sweep.tiles // (4 * tiles))
    for_each(lines, update_line, max(1, together))
