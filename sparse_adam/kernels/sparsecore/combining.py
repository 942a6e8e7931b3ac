"""The lookup's part of a subcore's program: rows come in, are added up, sums go out."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Index, Operand
from sparse_adam.kernels.sparsecore.config import (
    MARGIN,
    SLOTS,
    WINDOW,
    WORD_SLOTS,
    Config,
)
from sparse_adam.kernels.sparsecore.memory import Share, Unit
from sparse_adam.kernels.sparsecore.pipeline import Pipeline
from sparse_adam.kernels.sparsecore.records import RowRecords
from sparse_adam.kernels.sparsecore.shim import NONE
from sparse_adam.kernels.sparsecore.work import SubcoreWork

# What is known of an occurrence, as bits of a word.
_GOES_ON, _MISSING = 1, 2


class LookupOperands(NamedTuple):
    """Arrays in HBM, as refs. `work.ids` are samples, and `work.sources` are rows."""

    work: SubcoreWork
    table: tuple[Operand, ...]  # records of the table: its weights are read
    combined: Operand  # records of the samples: each is written once


class LookupScratch(NamedTuple):
    """Refs in the subcore's own memory, as in `SubcoreScratch`."""

    words: Operand  # [WORD_SLOTS * words] int32
    gains: Operand  # [WORD_SLOTS * C + WINDOW] float32
    shares: Operand  # [3 * share_words] int32
    opened: Operand  # [blocks * width] float32: the sum with which the last chunk ended
    rows: Operand  # [SLOTS * C, width]: rows arrive, and leave as sums
    words_arrived: Operand  # DMA semaphores, one a slot
    rows_arrived: Operand
    rows_left: Operand

    @classmethod
    def types(cls, config: Config, records: RowRecords) -> "LookupScratch":
        """Returns the shape and the kind of memory of each ref, for the kernel's call.

        The sizes follow from the chunk of the config and the width of a record.
        """
        words = WORD_SLOTS * config.offsets(1).size
        rows = SLOTS * config.chunk, records.width
        return cls(
            words=pltpu.VMEM((words,), jnp.int32),
            gains=pltpu.VMEM((WORD_SLOTS * config.chunk + WINDOW,), jnp.float32),
            shares=pltpu.VMEM((3 * config.share_words,), jnp.int32),
            opened=pltpu.VMEM((records.blocks * records.width,), jnp.float32),
            rows=pltpu.VMEM(rows, records.looked_up),
            words_arrived=pltpu.SemaphoreType.DMA((WORD_SLOTS,)),
            rows_arrived=pltpu.SemaphoreType.DMA((SLOTS,)),
            rows_left=pltpu.SemaphoreType.DMA((SLOTS,)),
        )


@dataclasses.dataclass(frozen=True)
class Combine(Pipeline):
    """Adds up the rows of the samples of the worker's range, which holds whole ones.

    Each occurrence gets the sum of its sample so far, in place of its row, and the
    last one's is written.

    Attributes:
        num_samples: samples from this number on are none.
        copies: whether a row that arrives is what is written, unless it is missing.
    """

    operands: LookupOperands
    scratch: LookupScratch
    num_samples: int
    copies: bool

    def lists(self) -> tuple[int, int]:
        """Rows are fetched to each place, and sums written from some."""
        return self.at.fetched, self.at.second

    def list_rows(self, unit: Unit, share: Share) -> None:
        """Lists rows and sums, and says of each occurrence what the sums depend on."""
        words, window, at = self.scratch.words, self.window, self.at
        first = (share.first + unit.chunk) * self.config.chunk
        ids, rows = unit.words + at.ids + MARGIN, unit.words + at.sources
        state, sums = self.records.state, self.records.grads
        weights = self.records.shifts[self.records.layout.weight_plane]

        def put(begin: int, place: Index, values: jax.Array) -> None:
            words[pl.ds(unit.words + begin + place, window)] = values

        def of_vector(i: jax.Array, missing: jax.Array) -> jax.Array:
            place = i * window
            before, sample, after = (
                self.vector(words, ids + place + step) for step in (-1, 0, 1)
            )
            row = self.vector(words, rows + place)
            number = lax.iota(jnp.int32, window) + (first + place)
            mine = (number >= share.begin) & (number < share.end)
            mine = mine & (sample < self.num_samples)
            there = mine & (row != NONE)
            record = state.index(row, unit.block) + weights
            put(at.fetched, place, jnp.where(there, record, NONE))
            record = sums.index(sample, unit.block)
            put(at.second, place, jnp.where(mine & (sample != after), record, NONE))
            known = jnp.where(there, 0, _MISSING) | jnp.where(
                sample == before, _GOES_ON, 0
            )
            put(at.sources, place, known)
            return missing + self.on.count(mine & (row == NONE))

        missing = jnp.zeros((window,), jnp.int32)
        vectors = self.config.chunk // window
        missing = self.on.parallel_loop(vectors, of_vector, missing)
        put(at.count, 0, missing)

    def arriving(self, unit: Unit) -> list[Any]:
        """Returns the copies that bring a chunk's rows from the table to its slot."""
        scratch, copies = self.scratch, []
        arrived = scratch.rows_arrived.at[unit.row_slot]
        for here, fetched, _, _ in self.streams(unit):
            tile = self.on.seen_as(scratch.rows.at[here], self.records.dtype)
            copies += self.on.gather(self.operands.table, fetched, [tile], [arrived])
        return copies

    def leaving(self, unit: Unit) -> list[Any]:
        """Returns the copies that take a chunk's sums from its slot to the result."""
        scratch, copies = self.scratch, []
        left = scratch.rows_left.at[unit.row_slot]
        for here, _, written, _ in self.streams(unit):
            tiles, sums = [scratch.rows.at[here]], [self.operands.combined]
            copies += self.on.scatter(tiles, sums, written, [left])
        return copies

    def compute(self, unit: Unit, share: Share) -> None:
        """Adds up the rows of each sample, unless they are copied and all there."""
        del share
        add_up = functools.partial(self._add_up, unit)
        if not self.copies:
            add_up()
            return
        missing = self.vector(self.scratch.words, unit.words + self.at.count)[0]
        pl.when(missing > 0)(add_up)

    def _add_up(self, unit: Unit) -> None:
        scratch = self.scratch
        gains = unit.word_slot * self.config.chunk

        def add(i: jax.Array, sums: tuple) -> tuple:
            known = self.vector(scratch.words, unit.words + self.at.sources + i)[0]
            goes_on, there = (known & _GOES_ON) != 0, (known & _MISSING) == 0
            gain, new = None, []
            if self.operands.work.gains:
                gain = self.vector(scratch.gains, gains + i)[0]
            for lanes, total in zip(self.slices, sums, strict=True):
                value = self.records.weights(scratch.rows[unit.row + i, lanes])
                if gain is not None:
                    value = gain * value
                # Selects: what was not fetched may be NaN, and so may other samples.
                value = jnp.where(there, value, 0.0)
                total = jnp.where(goes_on, total + value, value)
                scratch.rows[unit.row + i, lanes] = self.records.words_of_sums(total)
                new.append(total)
            return tuple(new)

        opened = self.opened(unit, self.slices)
        sums = tuple(scratch.opened[lanes] for lanes in opened)
        sums = self.on.parallel_loop(self.config.chunk, add, sums)
        for lanes, total in zip(opened, sums, strict=True):
            scratch.opened[lanes] = total
