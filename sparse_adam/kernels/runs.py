"""Sums of runs of equal ids, for gradients that lie in VMEM in the order of the ids.

A segmented scan with selects, 8 rows at a time: a NaN stays in the run it belongs to.
(A one-hot matmul would be shorter, but 0 * NaN is NaN.) The order of the additions
depends on positions only, so the same call gives the same bits.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam.kernels.config import LANES, SUBLANES
from sparse_adam.kernels.loops import Rows, for_each, for_each_tile


class Columns(NamedTuple):
    """VMEM [C, 128] refs: one value a row, spread over its lanes."""

    integers: Any
    floats: Any

    @classmethod
    def scratch(cls, size: int) -> "Columns":
        shape = (size, LANES)
        return cls(pltpu.VMEM(shape, jnp.int32), pltpu.VMEM(shape, jnp.float32))


class OpenRun(NamedTuple):
    """VMEM refs: the run with which the last chunk summed ended, perhaps unfinished."""

    id: Any  # [1, 128]
    sum: Any  # [1, D]

    @classmethod
    def scratch(cls, dim: int) -> "OpenRun":
        return cls(pltpu.VMEM((1, LANES), jnp.int32), pltpu.VMEM((1, dim), jnp.float32))


def close_run(run: OpenRun) -> None:
    """No run is open: no id is -1."""
    run.id[...] = jnp.full_like(run.id, -1)
    run.sum[...] = jnp.zeros_like(run.sum)


def weigh(grads: Any, gains: Any, counted: Any, columns: Columns) -> None:
    """Multiplies each gradient by its gain; one that is not counted becomes zero.

    grads: [C, D]; gains: [C] float32; counted: [C] int32, 0 or 1.
    """
    size, dim = grads.shape
    columns.floats[...] = lax.broadcast_in_dim(gains[...], (size, LANES), (0,))
    columns.integers[...] = lax.broadcast_in_dim(counted[...], (size, LANES), (0,))

    def weigh_tile(rows: Rows) -> None:
        gain = _across(columns.floats[rows], dim)
        counts = _across(columns.integers[rows], dim) != 0
        grads[rows] = jnp.where(counts, gain * grads[rows], 0.0)

    for_each_tile(size, weigh_tile, SUBLANES)


def sum_runs(
    grads: Any,
    ids: Any,
    ends: Any,
    count: jax.Array,
    columns: Columns,
    open_run: OpenRun,
) -> None:
    """Puts the sum of the i-th run that ends in this chunk into row i of `grads`.

    grads: [C, D]; ids: [C], ascending; ends: [C] in SMEM, the last row of each of the
    `count` runs. The run of the last row is left open for the next chunk.
    """
    size = grads.shape[0]
    columns.integers[...] = lax.broadcast_in_dim(ids[...], (size, LANES), (0,))
    sublane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)

    # 1. Inclusive scan, segmented by id: after it the last row of a run holds its sum.
    def scan(rows: Rows) -> None:
        id_, total = columns.integers[rows], grads[rows]
        for distance in (1, 2, 4):
            same = (id_ == pltpu.roll(id_, distance, 0)) & (sublane >= distance)
            earlier = pltpu.roll(total, distance, 0)
            total = total + _where(same, earlier)
        total = total + _where(id_ == open_run.id[...], open_run.sum[...])
        grads[rows] = total
        open_run.id[...] = id_[SUBLANES - 1 :]
        open_run.sum[...] = total[SUBLANES - 1 :]

    for_each_tile(size, scan, SUBLANES)

    # 2. Those last rows move to the front. ends[i] >= i, so in ascending order no row
    #    is overwritten before it has moved.
    def move(i: jax.Array) -> None:
        grads[pl.ds(i, 1)] = grads[pl.ds(ends[i], 1)]

    for_each(count, move, SUBLANES)


def _where(column: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.where(_across(column, rows.shape[1]), rows, 0.0)


def _across(column: jax.Array, dim: int) -> jax.Array:
    """Repeats a column that fills 128 lanes over all `dim` of them."""
    return jnp.tile(column, (1, dim // LANES))
