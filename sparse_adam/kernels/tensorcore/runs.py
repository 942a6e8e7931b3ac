"""Sums of runs of occurrences, for gradients that lie in VMEM in the order of `Chunks`.

A gradient is added to the one that ends its run, one after the other: a NaN stays in
the run it belongs to, and distinct ids cost nothing. The order of the additions depends
on positions only, so the same call gives the same bits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Operand, Ref
from sparse_adam.kernels.tiles import (
    LANES,
    SUBLANES,
    for_each,
    for_each_tile,
    spread,
)


class Columns(NamedTuple):
    """VMEM [C, 128] refs: one value a row, spread over its lanes."""

    integers: Operand
    floats: Operand

    @classmethod
    def scratch(cls, size: int) -> "Columns":
        shape = (size, LANES)
        return cls(pltpu.VMEM(shape, jnp.int32), pltpu.VMEM(shape, jnp.float32))


class ChunkRuns(NamedTuple):
    """Of a chunk: the runs that end in it, and those that it shares with others."""

    ended: jax.Array  # how many
    repeats: jax.Array  # occurrences to be added to others
    continues: jax.Array  # whether its first run began in an earlier chunk
    goes_on: jax.Array  # whether its last run ends in a later one


def weigh(grads: Ref, gains: Ref, counted: Ref, columns: Columns) -> None:
    """Multiplies each gradient by its gain; one that is not counted becomes zero.

    grads: [C, W]; gains: [C] float32; counted: [C] int32, 0 or 1.
    """
    size, width = grads.shape
    spread(gains, columns.floats)
    spread(counted, columns.integers)

    def weigh_tile(rows: pl.Slice) -> None:
        gain = _across(columns.floats[rows], width)
        counts = _across(columns.integers[rows], width) != 0
        grads[rows] = jnp.where(counts, gain * grads[rows], 0.0)

    for_each_tile(size, weigh_tile, SUBLANES)


def place_of_lane(stride: int) -> jax.Array:
    """Which row of a line each lane belongs to: `[1, 128]`."""
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return lax.div(lane, jnp.int32(stride))


def along_line(gradients: jax.Array, stride: int) -> jax.Array:
    """Repeats what stands in the first `stride` lanes, as often as 128 lanes hold it.

    So that it stands wherever a row of the line may stand.
    """
    lane = lax.broadcasted_iota(jnp.int32, gradients.shape, 1)
    while stride < LANES:
        further = pltpu.roll(gradients, stride, 1)
        gradients = jnp.where(lane < stride, gradients, further)
        stride *= 2
    return gradients


def mark_rows(
    grads: Ref, counts: Ref, places: Ref, stride: int, columns: Columns
) -> None:
    """Puts each gradient where in its line its row stands, and counts it there.

    For rows that share lines. grads: [C, 128], in the first lanes; counts: [C, 128],
    made here, to be summed along: what the batch touched cannot be told by a sum of
    gradients, which may be 0. places: [C].
    """
    place = place_of_lane(stride)
    spread(places, columns.integers)

    def mark_tile(rows: pl.Slice) -> None:
        here = columns.integers[rows] == place
        grads[rows] = jnp.where(here, along_line(grads[rows], stride), 0.0)
        counts[rows] = jnp.where(here, 1.0, 0.0)

    for_each_tile(grads.shape[0], mark_tile, SUBLANES)


def sum_runs(
    arrays: tuple[Ref, ...], open_sums: tuple[Ref, ...], marks: Ref, runs: ChunkRuns
) -> None:
    """Adds each occurrence that ends no run to the one that does, in their order.

    arrays: [C, W] each, in the order of `Chunks`; open_sums: [1, W] each, what earlier
    chunks hold of the first run, then what this one holds of the last; marks: [C] in
    SMEM, what each occurrence behind those listed is added to.
    """
    last_of_open = runs.ended + runs.repeats

    def add(i: jax.Array) -> None:
        i = runs.ended + i
        into = pl.ds(marks[i], 1)
        for array in arrays:
            array[into] = array[into] + array[pl.ds(i, 1)]

    @pl.when(runs.continues)
    def first_run_began_before():
        into = pl.ds(jnp.where(runs.ended > 0, 0, last_of_open), 1)
        for array, open_sum in zip(arrays, open_sums, strict=True):
            array[into] = array[into] + open_sum[...]

    for_each(runs.repeats, add, SUBLANES)

    @pl.when(runs.goes_on)
    def last_run_ends_later():
        for array, open_sum in zip(arrays, open_sums, strict=True):
            open_sum[...] = array[pl.ds(last_of_open, 1)]


def _across(column: jax.Array, width: int) -> jax.Array:
    """Repeats a column that fills 128 lanes over all `width` of them."""
    return jnp.tile(column, (1, width // LANES))
