"""Looking up rows of a packed table, on one TPU TensorCore.

Why: XLA's gather of rows fetches a block of them, waits, copies and writes, one after
the other, and of rows that share lines it would have to shift each one into place
afterwards. This kernel reads of a row only the lines that hold its weights, by one DMA,
while it puts the rows fetched before into place (`bytes_moved`).

Data flow: ids come in chunks of C, in the order of the batch. Grid step k starts the
DMAs of chunk k, then finishes chunk k-1: waits, takes the weights out of the words,
rolls each row of a shared line to lane 0, and leaves the chunk to Pallas, which writes
it back while the next one is computed.

Order: none is needed, since nothing is written that is read. The TensorCores of a
device take chunks of their own, equally many, and each writes only its own chunks.

Limits: `lookup` says what must hold of the ids.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Indices, Operand, Ref
from sparse_adam.kernels import chips
from sparse_adam.kernels.chips import VMEM_BUDGET
from sparse_adam.kernels.layout import PackedLayout
from sparse_adam.kernels.tiles import LANES, SUBLANES, for_each, for_each_tile, spread

_SLOTS = 2  # of chunk buffers: one arrives, one is read
_UNROLL = 16  # DMAs per iteration of a loop
_TILE = 2 * SUBLANES  # rows; bfloat16 is stored 16 rows at a time


def bytes_moved(num_ids: int, layout: PackedLayout) -> int:
    """HBM bytes of one lookup: a plane in, the weights out, two indices."""
    width = layout.blocks * LANES
    return num_ids * (width * (4 + layout.dtypes[0].itemsize) + 8)


def rows_per_chunk(num_ids: int, layout: PackedLayout) -> int:
    """The largest chunk up to 256 rows that N fills and the budget holds."""
    line = 4 * LANES
    # Lines that arrive, weights that leave, and a place for each row.
    row = (2 * _SLOTS * layout.blocks + 1) * line
    rows = 256
    while rows > _TILE and (rows >= 2 * num_ids or rows * row > VMEM_BUDGET):
        rows //= 2
    return rows


class _LookupScratch(NamedTuple):
    lines: Operand  # VMEM [SLOTS, C * blocks, 128]
    places: Operand  # VMEM [C, 128]
    arrived: Operand  # DMA semaphores, one a slot

    @classmethod
    def types(cls, size: int, layout: PackedLayout) -> "_LookupScratch":
        """Returns what a core has for chunks of C=`size` rows."""
        return cls(
            lines=pltpu.VMEM((_SLOTS, size * layout.blocks, LANES), jnp.int32),
            places=pltpu.VMEM((size, LANES), jnp.int32),
            arrived=pltpu.SemaphoreType.DMA((_SLOTS,)),
        )


def lookup(
    lines: jax.Array,
    rows: Indices,
    layout: PackedLayout,
    *,
    cores: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns the weights of rows: `[N, D]`; zeros for a row of -1.

    Args:
        lines: of the table.
        rows: in `[0, V)`, or -1, as must be proven: bounds are not checked.
        layout: of the lines.
        cores: TensorCores that share the chunks; None for those of the TPU in scope.
        interpret: whether to run in Pallas' interpreter.
    """
    size = rows_per_chunk(rows.size, layout)
    cores = cores or chips.in_scope().cores
    chunks_each = pl.cdiv(rows.size, size * cores)
    num_chunks, width = cores * chunks_each, layout.blocks * LANES
    moved = bytes_moved(num_chunks * size, layout)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, (0, num_chunks * size - x.size))
        return x.reshape(num_chunks, 1, size)

    def chunk(core: jax.Array, k: jax.Array, lag: int) -> jax.Array:
        return core * chunks_each + jnp.clip(k - lag, 0, chunks_each - 1)

    def block(lag: int, memory_space: Any) -> pl.BlockSpec:
        def index(core: jax.Array, k: jax.Array) -> tuple[jax.Array, int, int]:
            return chunk(core, k, lag), 0, 0

        return pl.BlockSpec((None, None, size), index, memory_space=memory_space)

    # Without an id the first group is fetched, so that all chunks are alike.
    found, shared = jnp.maximum(rows, 0), jnp.int32(layout.rows_per_group)
    groups, places = lax.div(found, shared), lax.rem(found, shared)
    weights = pl.pallas_call(
        functools.partial(_kernel, layout=layout),
        name="sparse_adam_lookup",
        grid=(cores, chunks_each + 1),
        in_specs=(
            block(0, pltpu.SMEM),
            block(1, pltpu.VMEM),
            pl.BlockSpec(memory_space=pltpu.HBM),
        ),
        out_specs=pl.BlockSpec((size, width), lambda core, k: (chunk(core, k, 1), 0)),
        out_shape=jax.ShapeDtypeStruct((num_chunks * size, width), layout.dtypes[0]),
        scratch_shapes=(_LookupScratch.types(size, layout),),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,
            disable_semaphore_checks=True,
        ),
        interpret=interpret,
    )(split(groups), split(jnp.where(rows < 0, -1, places)), lines)
    return weights[: rows.size, : layout.dim]


def _kernel(
    groups: Ref,  # SMEM [C], of chunk k
    places: Ref,  # VMEM [C], of chunk k-1: which row of its group; -1 for none
    lines: Ref,  # HBM
    weights: Ref,  # VMEM [C, W], of chunk k-1
    scratch: _LookupScratch,
    *,
    layout: PackedLayout,
) -> None:
    k, size = pl.program_id(1), weights.shape[0]

    @pl.when(k < pl.num_programs(1) - 1)
    def start():
        slot = lax.rem(k, _SLOTS)

        def fetch(i: jax.Array) -> None:
            first = groups[i] * layout.lines_per_group
            pltpu.make_async_copy(
                lines.at[
                    pl.ds(first + layout.line(layout.weight_plane, 0), layout.blocks)
                ],
                scratch.lines.at[slot, pl.ds(i * layout.blocks, layout.blocks)],
                scratch.arrived.at[slot],
            ).start()

        for_each(size, fetch, _UNROLL)

    @pl.when(k > 0)
    def finish():
        slot = lax.rem(k - 1, _SLOTS)
        arrived = scratch.lines.at[slot]
        spread(places, scratch.places)
        pltpu.make_async_copy(arrived, arrived, scratch.arrived.at[slot]).wait()

        def put(rows: pl.Slice) -> None:
            place = scratch.places[rows]
            for block in range(layout.blocks):
                first = rows.start * layout.blocks + block
                words = arrived[pl.ds(first, rows.size, stride=layout.blocks)]
                words = jnp.where(place < 0, 0, _to_front(words, place, layout.stride))
                weights[rows, pl.ds(block * LANES, LANES)] = layout.weights(words)

        for_each_tile(size, put, _TILE)


def _to_front(words: jax.Array, place: jax.Array, stride: int) -> jax.Array:
    """Rolls each row to the left by its place times `stride`, bit by bit."""
    shift = stride
    while shift < LANES:
        rolled = pltpu.roll(words, LANES - shift, 1)
        words = jnp.where((place & np.int32(shift // stride)) != 0, rolled, words)
        shift *= 2
    return words
