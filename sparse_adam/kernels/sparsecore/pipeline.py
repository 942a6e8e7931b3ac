"""The program of one vector subcore: its share, chunk by chunk, through four stages.

Which rows of a chunk are moved, and what is done with them once they are there, is left
to the updates (`updating`) and to the lookup (`combining`).
"""

import abc
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Index, Ref
from sparse_adam.kernels.sparsecore.config import (
    MARGIN,
    SLOTS,
    WINDOW,
    WORD_SLOTS,
    Config,
    WordOffsets,
)
from sparse_adam.kernels.sparsecore.memory import Share, Unit
from sparse_adam.kernels.sparsecore.records import RowRecords
from sparse_adam.kernels.sparsecore.shim import Interpreted, Native, Refs

NO_ID = -1


@dataclasses.dataclass(frozen=True)
class Pipeline(abc.ABC):
    """One worker, and all that its steps share."""

    on: Native | Interpreted
    operands: Any  # `Operands`, or those of a lookup; as the scratch
    scratch: Any
    records: RowRecords
    config: Config

    @abc.abstractmethod
    def list_rows(self, unit: Unit, share: Share) -> None:
        """Lists the records to fetch and to write, from words that have arrived."""

    @abc.abstractmethod
    def compute(self, unit: Unit, share: Share) -> None:
        """Makes what is written of the rows of a unit, which have arrived, in place."""

    @abc.abstractmethod
    def arriving(self, unit: Unit) -> list[Any]:
        """Returns the copies of a unit's records into the subcore's memory."""

    @abc.abstractmethod
    def leaving(self, unit: Unit) -> list[Any]:
        """Returns the copies of what is written."""

    @abc.abstractmethod
    def lists(self) -> tuple[int, int]:
        """Returns where in a slot lists begin: first those to fetch, then to write."""

    @property
    def at(self) -> WordOffsets:
        """Returns where each kind of word stands in a slot."""
        return self.config.offsets(1)

    @property
    def fills(self) -> bool:
        """Tells whether the list of what is written has no index to be passed over."""
        return False

    @property
    def window(self) -> int:
        """Returns the length of the vectors by which scalars are read."""
        return min(self.config.lanes, self.config.chunk, WINDOW)

    @property
    def slices(self) -> list[pl.Slice]:
        """Returns the vectors of a record, but for what lies behind a narrow row."""
        lanes = min(self.config.lanes, self.records.width)
        used = min(self.records.layout.dim, self.records.width)
        return [pl.Slice(lane, lanes) for lane in range(0, used, lanes)]

    def run(self) -> None:
        """Takes every unit through four stages, each a step apart.

        In a step the stores of an old unit are waited for, which frees its slots; the
        words of a new one and the rows of the one before it begin to arrive; and the
        one before that is computed and its rows begin to leave.
        """
        share = self._share()
        units = share.chunks * self.records.blocks
        lanes = min(self.config.lanes, self.records.width)
        for lane in range(0, self.scratch.opened.shape[0], lanes):
            self.scratch.opened[pl.ds(lane, lanes)] = jnp.zeros((lanes,), jnp.float32)

        def step(s: jax.Array, _: None) -> None:
            def stage(age: int, body: Callable[[Unit, Share], None]) -> None:
                @pl.when((s >= age) & (s - age < units))
                def _():
                    body(self._unit(s - age), share)

            stage(4, self.leave)
            stage(0, self.announce)
            stage(1, self.fetch)
            stage(2, self.finish)

        lax.fori_loop(0, jnp.where(units > 0, units + 4, 0), step, None)

    def announce(self, unit: Unit, share: Share) -> None:
        """Starts the copies of a unit's words: ids, sources and gains."""
        for copy in self._words(unit, share):
            copy.start()

    def fetch(self, unit: Unit, share: Share) -> None:
        """Waits for the words, lists the rows they name, and starts to fetch these."""
        for copy in self._words(unit, share):
            copy.wait()
        self.list_rows(unit, share)
        for copy in self.arriving(unit):
            copy.start()

    def finish(self, unit: Unit, share: Share) -> None:
        """Waits for the rows, computes, and starts to write."""
        for copy in self.arriving(unit):
            copy.wait()
        self.compute(unit, share)
        for copy in self.leaving(unit):
            copy.start()

    def leave(self, unit: Unit, share: Share) -> None:
        """Waits until the rows are written, so that their slot can be filled again."""
        del share
        for copy in self.leaving(unit):
            copy.wait()

    def constants(self) -> list[tuple[Ref, Ref]]:
        """Returns what is copied once, and where to."""
        return [(self.operands.work.shares, self.scratch.shares)]

    def head(self, first: jax.Array) -> Index:
        """Returns `Share.head` of the worker whose first chunk this is."""
        del first
        return NO_ID

    def _share(self) -> Share:
        scratch = self.scratch
        for source, target in self.constants():
            pltpu.sync_copy(source, target)
        worker = self.on.worker()
        bounds, first, chunks = (
            self.vector(scratch.shares, at * self.config.share_words + worker)
            for at in range(3)
        )
        begin, end, first, chunks = bounds[0], bounds[1], first[0], chunks[0]
        return Share(worker, begin, end, first, chunks, self.head(first))

    def _unit(self, number: jax.Array) -> Unit:
        chunk, block, blocks = number, 0, self.records.blocks
        if blocks > 1:
            chunk = lax.div(number, blocks)
            block = number - chunk * blocks
        word_slot, row_slot = lax.rem(number, WORD_SLOTS), lax.rem(number, SLOTS)
        return Unit(
            chunk=chunk,
            block=block,
            words=pl.multiple_of(word_slot * self.at.size, self.config.alignment),
            word_slot=word_slot,
            row=pl.multiple_of(row_slot * self.config.chunk, MARGIN),
            row_slot=row_slot,
        )

    def _words(self, unit: Unit, share: Share) -> list[Any]:
        work, chunk = self.operands.work, self.config.chunk
        begin = pl.multiple_of((share.first + unit.chunk) * chunk, MARGIN)
        gains = pl.ds(pl.multiple_of(unit.word_slot * chunk, MARGIN), chunk)
        ids = self._section(unit, self.at.ids, chunk + 2 * MARGIN)
        sources = self._section(unit, self.at.sources, chunk)
        arrived = self.scratch.words_arrived.at[unit.word_slot]
        moves = [(work.ids, ids), (work.sources, sources)]
        moves += [(x, self.scratch.gains.at[gains]) for x in work.gains]
        return [
            pltpu.make_async_copy(x.at[pl.ds(begin, target.shape[0])], target, arrived)
            for x, target in moves
        ]

    def streams(self, unit: Unit) -> Iterator[tuple[pl.Slice, Refs, Refs, Ref]]:
        """A chunk in equal parts: rows of buffers; records to get, to put, to add."""
        chunk, length = self.config.chunk, self.config.stream_length
        fetched, written = map(self.at.each, self.lists())
        for at in range(0, chunk, length):
            size = min(length, chunk - at)
            yield (
                pl.Slice(pl.multiple_of(unit.row + at, MARGIN), size),
                [self._section(unit, begin + at, size) for begin in fetched],
                [self._section(unit, begin + at, size) for begin in written],
                self._section(unit, self.at.sources + at, size),
            )

    def _section(self, unit: Unit, begin: int, length: int) -> Ref:
        at = pl.multiple_of(unit.words + begin, self.config.alignment)
        return self.scratch.words.at[pl.ds(at, length)]

    def opened(self, unit: Unit, slices: list[pl.Slice]) -> list[pl.Slice]:
        """Where vectors of this unit stand in what is kept of an open run."""
        first = unit.block * self.records.width
        return [pl.Slice(first + s.start, s.size) for s in slices]

    def vector(self, ref: Ref, at: Index) -> jax.Array:
        """Returns a vector whose first element is the scalar that is wanted."""
        return ref[pl.ds(at, self.window)]

    def same_as_previous(self, unit: Unit, i: Index) -> jax.Array:
        """Returns whether occurrence i has the id of the one before it."""
        at = unit.words + self.at.ids + MARGIN + i
        words = self.scratch.words
        same = self.vector(words, at) == self.vector(words, at - 1)
        return same.astype(jnp.int32)[0] != 0
