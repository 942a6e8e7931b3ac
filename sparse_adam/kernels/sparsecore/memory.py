"""What the program of a vector subcore works on: in HBM, and in its own memory."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Index, Operand
from sparse_adam.kernels.sparsecore.config import (
    MARGIN,
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
    rows_arrived: Operand
    rows_left: Operand

    @classmethod
    def types(
        cls, config: Config, records: RowRecords, accumulate: bool
    ) -> "SubcoreScratch":
        """Returns what to allocate.

        Of an open run the sum is kept, or else the rows that its steps advance.
        """
        shape = SLOTS * config.chunk, records.width
        words = WORD_SLOTS * WordOffsets(config.chunk).size
        row = records.blocks * records.width
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
            rows_arrived=pltpu.SemaphoreType.DMA((SLOTS,)),
            rows_left=pltpu.SemaphoreType.DMA((SLOTS,)),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class WordOffsets:
    """Where the int32 words of a chunk of C occurrences stand in their slot."""

    chunk: int

    ids = 0  # MARGIN earlier ids, C ids, MARGIN later ids

    @property
    def sources(self) -> int:
        """Returns where the numbers of the C records of gradients to fetch begin."""
        return self.chunk + 2 * MARGIN

    @property
    def fetched(self) -> int:
        """Returns where the numbers of the C records of the state to fetch begin."""
        return self.sources + self.chunk

    @property
    def second(self) -> int:
        """Returns where C more begin: one for each of those, as each pipeline says."""
        return self.fetched + self.chunk

    @property
    def count(self) -> int:
        """Returns where WINDOW equal words begin: how many records are listed."""
        return self.second + self.chunk

    @property
    def size(self) -> int:
        """Returns the words of a slot."""
        return self.count + WINDOW


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
