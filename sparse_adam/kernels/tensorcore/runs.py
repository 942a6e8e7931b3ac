"""Sums of runs of occurrences, for gradients that lie in VMEM in the order of the ids.

A segmented scan with selects, 8 rows at a time: a NaN stays in the run it belongs to.
(A one-hot matmul would be shorter, but 0 * NaN is NaN.) The order of the additions
depends on positions only, so the same call gives the same bits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Operand, Operands, Ref
from sparse_adam.kernels.tiles import (
    LANES,
    SUBLANES,
    for_each,
    for_each_tile,
    spread,
)

_DISTANCES = (1, 2, 4)  # of a scan over 8 rows


class Columns(NamedTuple):
    """VMEM [C, 128] refs: one value a row, spread over its lanes."""

    integers: Operand
    floats: Operand

    @classmethod
    def scratch(cls, size: int) -> "Columns":
        shape = (size, LANES)
        return cls(pltpu.VMEM(shape, jnp.int32), pltpu.VMEM(shape, jnp.float32))


class OpenRun(NamedTuple):
    """VMEM refs: the run with which the last chunk summed ended, perhaps unfinished."""

    owner: Operand  # [1, 128]
    sums: Operands  # [1, W] each

    @classmethod
    def scratch(cls, *widths: int) -> "OpenRun":
        return cls(
            pltpu.VMEM((1, LANES), jnp.int32),
            tuple(pltpu.VMEM((1, width), jnp.float32) for width in widths),
        )


def close_run(run: OpenRun) -> None:
    """No run is open: none is -1."""
    run.owner[...] = jnp.full_like(run.owner, -1)
    for sum_ in run.sums:
        sum_[...] = jnp.zeros_like(sum_)


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
    arrays: tuple[Ref, ...],
    owners: Ref,
    ends: Ref,
    count: jax.Array,
    columns: Columns,
    open_run: OpenRun,
) -> None:
    """Puts the sum of the i-th run that ends in this chunk into row i of each array.

    arrays: [C, W] each; owners: [C], the same for the rows of a run, which stand side
    by side; ends: [C] in SMEM, the last row of each of the `count` runs. The run of
    the last row is left open for the next chunk.
    """
    size = arrays[0].shape[0]
    spread(owners, columns.integers)
    sublane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)

    # 1. Inclusive scan, segmented by owner: after it the last row of a run holds its
    #    sum.
    def scan(rows: pl.Slice) -> None:
        owner = columns.integers[rows]
        follows = [
            (owner == pltpu.roll(owner, distance, 0)) & (sublane >= distance)
            for distance in _DISTANCES
        ]
        goes_on = owner == open_run.owner[...]
        for array, open_sum in zip(arrays, open_run.sums, strict=True):
            total = array[rows]
            for distance, same in zip(_DISTANCES, follows, strict=True):
                total = total + _where(same, pltpu.roll(total, distance, 0))
            total = total + _where(goes_on, open_sum[...])
            array[rows] = total
            open_sum[...] = total[SUBLANES - 1 :]
        open_run.owner[...] = owner[SUBLANES - 1 :]

    for_each_tile(size, scan, SUBLANES)

    # 2. Those last rows move to the front. ends[i] >= i, so in ascending order no row
    #    is overwritten before it has moved.
    def move(i: jax.Array) -> None:
        for array in arrays:
            array[pl.ds(i, 1)] = array[pl.ds(ends[i], 1)]

    for_each(count, move, SUBLANES)


def _where(column: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.where(_across(column, rows.shape[1]), rows, 0.0)


def _across(column: jax.Array, width: int) -> jax.Array:
    """Repeats a column that fills 128 lanes over all `width` of them."""
    return jnp.tile(column, (1, width // LANES))
