"""What the program of a vector subcore works on: in HBM, and in its own memory."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Index, Operand
from sparse_adam.kernels.sparsecore.config import (
    SLOTS,
    WINDOW,
    WORD_SLOTS,
    Config,
)
from sparse_adam.kernels.sparsecore.records import RowRecords
from sparse_adam.kernels.sparsecore.work import SubcoreWork


class Operands(NamedTuple):
    """Arrays in HBM, as refs: all subcores read them, and each updates its own rows."""

    work: SubcoreWork
    numbers: Operand  # [WINDOW]: `StepScalars.numbers` to the front
    seeds: tuple[Operand, ...]  # () or [WINDOW] int32: of each array
    grads: Operand  # records of gradients
    state: tuple[Operand, ...]  # records of the state, updated in place
    sums: Operand  # flat: records of each worker's head and tail


class SubcoreScratch(NamedTuple):
    """Refs in the subcore's own memory; `WordOffsets` says where a slot's words lie.

    Rows are as wide as a record: a wider row is handled in blocks.
    """

    words: Operand  # [WORD_SLOTS * words] int32
    gains: Operand  # [WORD_SLOTS * C + WINDOW] float32
    shares: Operand  # [3 * share_words] int32
    edge: Operand  # [2 * WINDOW] int32: ids around this worker's first one
    numbers: Operand  # [WINDOW] float32
    seeds: Operand  # [WINDOW] int32
    opened: Operand  # float32, of the run with which the last chunk ended: see `types`
    grads: Operand  # [SLOTS * C, width] float32
    state: tuple[Operand, ...]  # [SLOTS * C, width] for each plane
    words_arrived: Operand  # DMA semaphores, one a slot
    rows_arrived: Operand  # [SLOTS, semaphores]
    rows_left: Operand  # the same; one less where there are some

    @classmethod
    def types(
        cls, config: Config, records: RowRecords, accumulate: bool
    ) -> "SubcoreScratch":
        """Returns what to allocate.

        Of an open run the sum is kept, or else the rows that its steps advance.
        """
        shape = SLOTS * config.chunk, records.width
        words = WORD_SLOTS * config.offsets(len(records.shifts)).size
        row, some = records.blocks * records.width, config.semaphores
        kept = 1 if accumulate else len(records.layout.dtypes)
        return cls(
            words=pltpu.VMEM((words,), jnp.int32),
            gains=pltpu.VMEM((WORD_SLOTS * config.chunk + WINDOW,), jnp.float32),
            shares=pltpu.VMEM((3 * config.share_words,), jnp.int32),
            edge=pltpu.VMEM((2 * WINDOW,), jnp.int32),
            numbers=pltpu.VMEM((WINDOW,), jnp.float32),
            seeds=pltpu.VMEM((WINDOW,), jnp.int32),
            opened=pltpu.VMEM((kept * row,), jnp.float32),
            grads=pltpu.VMEM(shape, jnp.float32),
            state=(pltpu.VMEM(shape, records.dtype),) * records.planes,
            words_arrived=pltpu.SemaphoreType.DMA((WORD_SLOTS,)),
            rows_arrived=pltpu.SemaphoreType.DMA((SLOTS, some)),
            rows_left=pltpu.SemaphoreType.DMA((SLOTS, max(1, some - 1))),
        )


class Share(NamedTuple):
    """The range of sorted occurrences that one worker handles, and its chunks of it."""

    worker: jax.Array
    begin: jax.Array  # its first occurrence
    end: jax.Array  # the one after its last
    first: jax.Array  # its first chunk
    chunks: jax.Array  # how many
    head: Index  # id of a run that began in an earlier range; NO_ID: none


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
    """One block of the rows of one chunk: what a subcore does at a time."""

    chunk: jax.Array  # number in the worker's range
    block: Index  # which part of the row
    words: jax.Array  # where its slot of words begins
    word_slot: jax.Array
    row: jax.Array  # first row of its slot of rows
    row_slot: jax.Array
