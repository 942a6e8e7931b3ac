"""One Adam step for each occurrence of a chunk, in the order of the batch.

A group stays in VMEM from the chunk in which its run begins to the one in which it
ends: as float32 values, which are rounded once, and as the words that are written back,
where the lanes of rows that the batch does not touch stay as they came.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam.kernels.adam_tile import adam_tile
from sparse_adam.kernels.lines import Refs, noises_of, select
from sparse_adam.kernels.problem import Problem
from sparse_adam.kernels.tensorcore.runs import along_line, place_of_lane
from sparse_adam.kernels.tensorcore.storage import Storage


class Resident(NamedTuple):
    """VMEM refs: the group that is being stepped, block by block."""

    values: Any  # [3 * blocks, width] float32: w, m, v
    words: Any  # [planes * blocks, width]

    @classmethod
    def scratch(cls, stored: Storage) -> "Resident":
        """For groups of this storage."""
        return cls(
            pltpu.VMEM((3 * stored.blocks, stored.width), jnp.float32),
            pltpu.VMEM((stored.planes * stored.blocks, stored.width), stored.dtype),
        )


def _load(lines: Any, block: int, blocks: int) -> tuple[jax.Array, ...]:
    """A block of each of the arrays, or planes, that `lines` holds."""
    count = lines.shape[0] // blocks
    return tuple(lines[pl.ds(t * blocks + block, 1)] for t in range(count))


def _store(lines: Any, block: int, blocks: int, arrays: tuple[jax.Array, ...]) -> None:
    for t, array in enumerate(arrays):
        lines[pl.ds(t * blocks + block, 1)] = array


class Occurrences(NamedTuple):
    """Of a chunk, as `Chunks` has them; Refs but for the last."""

    grads: Any  # VMEM [C, W]
    marks: Any  # SMEM [C]
    groups: Any  # SMEM [C]
    places: Refs  # SMEM [C] for rows that share lines
    continues: jax.Array  # whether the first run began before


def step_each(
    occurrences: Occurrences,
    buffer: Any,
    resident: Resident,
    learning_rate: jax.Array,
    seeds: Refs,
    problem: Problem,
    stored: Storage,
) -> None:
    """Steps the groups of a chunk, in the buffer of a slot."""
    grads, marks, groups, places, continues = occurrences
    blocks, lanes = stored.blocks, place_of_lane(stored.stride)

    def step(i: jax.Array, latest: jax.Array) -> jax.Array:
        order = marks[i]
        group = pl.Slice(order, 1)

        @pl.when(order > latest)
        def run_begins():
            for block in range(blocks):
                words = stored.read(buffer, group, block)
                _store(resident.words, block, blocks, words)
                _store(resident.values, block, blocks, stored.values(words))

        @pl.when(order >= 0)
        def occurrence_counts():
            row = grads[pl.ds(i, 1)]
            for block in range(blocks):
                old = _load(resident.values, block, blocks)
                gradient = row[:, block * stored.width :][:, : stored.width]
                if places:
                    gradient = along_line(gradient, stored.stride)
                w, m, v = old
                values = adam_tile(w, m, v, gradient, learning_rate, problem.hyper)
                noises = noises_of(seeds, groups[order], block, problem)
                words = stored.words(values, noises)
                for place in places:
                    here = lanes == place[i]
                    values = select(here, values, old)
                    words = select(here, words, _load(resident.words, block, blocks))
                _store(resident.values, block, blocks, values)
                _store(resident.words, block, blocks, words)
                stored.write(buffer, group, block, words)

        return jnp.maximum(order, latest)

    latest = jnp.where(continues, 0, -1)
    lax.fori_loop(0, grads.shape[0], step, latest)
