"""One step of the rule for each occurrence of a chunk, in the order of the batch.

A group stays in VMEM from the chunk in which its run begins to the one in which it
ends: as float32 values, which are rounded once, and as the words that are written back,
where the lanes of rows that the batch does not touch stay as they came.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Operands, Ref
from sparse_adam.kernels.layout import PlaneWords
from sparse_adam.kernels.spec import UpdateSpec
from sparse_adam.kernels.tensorcore.runs import along_line, place_of_lane
from sparse_adam.kernels.vmem import Groups, Refs, group_noises, select
from sparse_adam.rules import StepNumbers


class ResidentGroup(NamedTuple):
    """VMEM refs: the group that is being stepped, block by block."""

    values: Operands  # [blocks, width] float32, one for each array of the state
    words: Operands  # [blocks, width], one for each plane

    @classmethod
    def scratch(cls, groups: Groups, arrays: int) -> "ResidentGroup":
        """Returns what to allocate for a state of so many arrays."""
        value = pltpu.VMEM((groups.blocks, groups.width), jnp.float32)
        return cls((value,) * arrays, groups.words_scratch())


class ChunkOccurrences(NamedTuple):
    """The occurrences of a chunk, as `Chunks` has them; refs but for the last."""

    grads: Ref  # VMEM [C, W]
    marks: Ref  # SMEM [C]
    groups: Ref  # SMEM [C]
    places: Refs  # SMEM [C] for rows that share lines
    continues: jax.Array  # whether the first run began before


def step_each(
    occurrences: ChunkOccurrences,
    buffers: Refs,
    resident: ResidentGroup,
    numbers: StepNumbers,
    seeds: Refs,
    spec: UpdateSpec,
    moved: Groups,
) -> None:
    """Steps the groups of a chunk, in the buffers of a slot."""
    grads, marks, groups, places, continues = occurrences
    width, stride = moved.width, spec.layout.stride
    lanes = place_of_lane(stride)

    def step(i: jax.Array, latest: jax.Array) -> jax.Array:
        order = marks[i]
        group = pl.Slice(order, 1)

        @pl.when(order > latest)
        def run_begins():
            for block in range(moved.blocks):
                words = moved.read(buffers, group, block)
                _store(resident.words, block, words)
                _store(resident.values, block, moved.values(words))

        @pl.when(order >= 0)
        def occurrence_counts():
            row = grads[pl.ds(i, 1)]
            for block in range(moved.blocks):
                old = _load(resident.values, block)
                gradient = row[:, block * width :][:, :width]
                if places:
                    gradient = along_line(gradient, stride)
                values = spec.step(old, gradient, numbers)
                noises = group_noises(seeds, groups[order], block, spec.layout)
                words = moved.words(values, noises)
                for place in places:
                    here = lanes == place[i]
                    values = select(here, values, old)
                    words = select(here, words, _load(resident.words, block))
                _store(resident.values, block, values)
                _store(resident.words, block, words)
                moved.write(buffers, group, block, words)

        return jnp.maximum(order, latest)

    latest = jnp.where(continues, 0, -1)
    lax.fori_loop(0, grads.shape[0], step, latest)


def _load(refs: Refs, block: int) -> PlaneWords:
    return tuple(ref[pl.ds(block, 1)] for ref in refs)


def _store(refs: Refs, block: int, arrays: PlaneWords) -> None:
    for ref, array in zip(refs, arrays, strict=True):
        ref[pl.ds(block, 1)] = array
