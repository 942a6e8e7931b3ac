"""The program of one vector subcore; `sparsecore` says why and in which order."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam.kernels.adam_tile import adam_tile
from sparse_adam.kernels.config import LANES, SLOTS
from sparse_adam.kernels.problem import Hyperparams
from sparse_adam.kernels.sparsecore_config import (
    MARGIN,
    TILE,
    WINDOW,
    WORD_SLOTS,
    Config,
)
from sparse_adam.kernels.sparsecore_memory import Operands, Scratch, Unit, Words
from sparse_adam.kernels.sparsecore_shim import NONE, Interpreted, Native

NO_ID = -1


def kernel(
    on: Native | Interpreted,
    operands: Operands,
    scratch: Scratch,
    *,
    num_rows: int,
    hyper: Hyperparams,
    config: Config,
) -> None:
    """Updates the rows whose runs begin and end in this worker's range."""
    at = Words(config.chunk)
    Subcore(on, operands, scratch, num_rows, hyper, config, at).run()


@dataclasses.dataclass(frozen=True)
class Subcore:
    """One worker, and all that its steps share."""

    on: Native | Interpreted
    operands: Operands
    scratch: Scratch
    num_rows: int  # V, which as an id means none
    hyper: Hyperparams
    config: Config
    at: Words

    @property
    def blocks(self) -> int:
        """Of 128 lanes in a row."""
        return self.scratch.open_sum.shape[0] // LANES

    @property
    def window(self) -> int:
        """Words of the vectors that scalars are read with."""
        return min(self.config.lanes, self.config.chunk, WINDOW)

    @property
    def slices(self) -> list[Any]:
        """The vectors of a block."""
        lanes = self.config.lanes
        return [pl.ds(lane, lanes) for lane in range(0, LANES, lanes)]

    def run(self) -> None:
        """Takes every unit through four stages, each a step apart.

        In a step the stores of an old unit are waited for, which frees its slots; the
        words of a new one and the rows of the one before it begin to arrive; and the
        one before that is computed and its rows begin to leave.
        """
        scratch, work = self.scratch, self.operands.work
        worker = self.on.worker()
        for source, target in (
            (work.shares, scratch.shares),
            (self.operands.rate, scratch.rate),
        ):
            pltpu.sync_copy(source, target)
        shares = self._vector(scratch.shares, 0)
        share, active = shares[0], shares[1]
        first = jnp.minimum(worker * share, active)
        chunks = jnp.minimum(active - first, share)
        units = chunks * self.blocks

        at = pl.multiple_of(first * self.config.chunk, MARGIN)
        pltpu.sync_copy(
            work.ids.at[pl.ds(at, WINDOW)], scratch.edge.at[pl.ds(0, WINDOW)]
        )
        before = self._vector(scratch.edge, MARGIN - 1)[0]
        head = jnp.where(before == self._vector(scratch.edge, MARGIN)[0], before, NO_ID)
        lanes = self.config.lanes
        for lane in range(0, scratch.open_sum.shape[0], lanes):
            scratch.open_sum[pl.ds(lane, lanes)] = jnp.zeros((lanes,), jnp.float32)

        def step(s: jax.Array, _: None) -> None:
            def stage(age: int, body: Callable[[Unit], None]) -> None:
                @pl.when((s >= age) & (s - age < units))
                def _():
                    body(self._unit(s - age))

            stage(4, self.leave)
            stage(0, lambda unit: self.announce(unit, first))
            stage(1, lambda unit: self.fetch(unit, first, head))
            stage(2, lambda unit: self.finish(unit, worker, head, chunks))

        lax.fori_loop(0, jnp.where(units > 0, units + 4, 0), step, None)

    def announce(self, unit: Unit, first: jax.Array) -> None:
        """The words begin to arrive."""
        for copy in self._words(unit, first):
            copy.start()

    def fetch(self, unit: Unit, first: jax.Array, head: jax.Array) -> None:
        """The words are there: lists the rows to update; rows begin to arrive."""
        for copy in self._words(unit, first):
            copy.wait()
        self._list_rows(unit, head)
        for copy in self._arriving(unit):
            copy.start()

    def finish(
        self, unit: Unit, worker: jax.Array, head: jax.Array, chunks: jax.Array
    ) -> None:
        """The rows are there: sums, updates; rows begin to leave."""
        for copy in self._arriving(unit):
            copy.wait()
        words = self.scratch.words
        count = self._vector(words, unit.words + self.at.count)[0]
        continues = self._same_as_previous(unit, 0)
        if self.operands.work.gains:
            self._sum_runs(unit)
        else:
            # Otherwise every gradient is a run of its own, and so its own sum.
            pl.when((count < self.config.chunk) | continues)(
                lambda: self._sum_runs(unit)
            )
        is_last = unit.chunk + 1 == chunks
        first_id = self._vector(words, unit.words + self.at.ids + MARGIN)[0]

        @pl.when(is_last | (first_id == head))
        def range_may_split_a_run():
            self._hand_over(unit, worker, head, is_last)

        self._update_rows(unit, count)
        for copy in self._leaving(unit):
            copy.start()

    def leave(self, unit: Unit) -> None:
        """The rows have left."""
        for copy in self._leaving(unit):
            copy.wait()

    def _list_rows(self, unit: Unit, head: jax.Array) -> None:
        """Lists the runs that end in the chunk, but not the head: lines and places."""
        words, window = self.scratch.words, self.window
        ids = unit.words + self.at.ids + MARGIN
        rows, ends = unit.words + self.at.rows, unit.words + self.at.ends
        count = jnp.zeros((window,), jnp.int32)
        for place in range(0, self.config.chunk, window):
            words[pl.ds(rows + place, window)] = jnp.full_like(count, NONE)
        for place in range(0, self.config.chunk, window):
            id_ = self._vector(words, ids + place)
            following = self._vector(words, ids + place + 1)
            ending = (id_ != following) & (id_ < self.num_rows) & (id_ != head)
            rank = count + jnp.cumsum(ending.astype(jnp.int32)) - 1
            places = lax.iota(jnp.int32, window) + (unit.row + place)
            self.on.store_where(words, rows + rank, self._line(id_, unit), ending)
            self.on.store_where(words, ends + rank, places, ending)
            count = count + self.on.count(ending)
        words[pl.ds(unit.words + self.at.count, window)] = count
        if self.blocks > 1:
            for place in range(0, self.config.chunk, window):
                here = pl.ds(unit.words + self.at.sources + place, window)
                source = words[here]
                line = self._line(source, unit)
                words[here] = jnp.where(source == NONE, source, line)

    def _line(self, row: jax.Array, unit: Unit) -> jax.Array:
        """Where these lanes of a row stand: rows are stored in tiles of 8."""
        if self.blocks == 1:
            return row
        tile = lax.shift_right_logical(row, 3)
        return (tile * self.blocks + unit.block) * TILE + (row & (TILE - 1))

    def _sum_runs(self, unit: Unit) -> None:
        """Puts the sum of each run, as far as this worker has it, where it ends."""
        scratch = self.scratch
        first = unit.block * LANES
        opened = [pl.ds(first + s.start, s.size) for s in self.slices]

        def add(i: jax.Array, sums: tuple) -> tuple:
            goes_on = self._same_as_previous(unit, i)
            row, new = unit.row + i, []
            for lanes, total in zip(self.slices, sums, strict=True):
                gradient = scratch.grads[row, lanes]
                if self.operands.work.gains:
                    gradient = self._weigh(unit, i, gradient)
                # A select: a run's NaN must not reach the next one.
                total = jnp.where(goes_on, total + gradient, gradient)
                scratch.grads[row, lanes] = total
                new.append(total)
            return tuple(new)

        sums = tuple(scratch.open_sum[lanes] for lanes in opened)
        sums = self.on.parallel_loop(self.config.chunk, add, sums)
        for lanes, total in zip(opened, sums, strict=True):
            scratch.open_sum[lanes] = total

    def _weigh(self, unit: Unit, i: jax.Array, gradient: jax.Array) -> jax.Array:
        gains, chunk = self.scratch.gains, self.config.chunk
        gain = self._vector(gains, unit.word_slot * chunk + i)[0]
        source = self._vector(self.scratch.words, unit.words + self.at.sources + i)[0]
        return jnp.where(source != NONE, gain * gradient, 0.0)

    def _hand_over(
        self, unit: Unit, worker: jax.Array, head: jax.Array, is_last: jax.Array
    ) -> None:
        """Writes the partial sum of the head, where it ends, and of the tail."""
        words, window, chunk = self.scratch.words, self.window, self.config.chunk
        ids = unit.words + self.at.ids + MARGIN
        in_head = jnp.zeros((window,), jnp.int32)
        for place in range(0, chunk, window):
            in_head += self.on.count(self._vector(words, ids + place) == head)
        length = in_head[0]  # they come first
        last = self._vector(words, ids + chunk - 1)[0]
        following = self._vector(words, ids + chunk)[0]
        goes_on = (last == following) & (last < self.num_rows)
        ends_here = (length < chunk) | (following != head) | is_last
        self._write_sum(unit, 2 * worker, length - 1, (length > 0) & ends_here)
        is_tail = is_last & goes_on & (last != head)
        self._write_sum(unit, 2 * worker + 1, chunk - 1, is_tail)

    def _write_sum(self, unit: Unit, row: Any, i: Any, needed: jax.Array) -> None:
        @pl.when(needed)
        def write():
            at = pl.multiple_of(self._line(row, unit) * LANES, LANES)
            source = self.scratch.grads.at[unit.row + i]
            target = self.operands.sums.at[pl.ds(at, LANES)]
            pltpu.sync_copy(source, target)

    def _update_rows(self, unit: Unit, count: jax.Array) -> None:
        scratch = self.scratch
        rate = self._vector(scratch.rate, 0)[0]

        def update(i: jax.Array) -> None:
            end = self._vector(scratch.words, unit.words + self.at.ends + i)[0]
            for lanes in self.slices:
                w, m, v = (x[unit.row + i, lanes] for x in scratch.state)
                gradient = scratch.grads[end, lanes]
                new = adam_tile(w, m, v, gradient, rate, self.hyper)
                for x, value in zip(scratch.state, new, strict=True):
                    x[unit.row + i, lanes] = value

        self.on.parallel_loop(count, update)

    def _unit(self, number: jax.Array) -> Unit:
        chunk, block = number, 0
        if self.blocks > 1:
            chunk = lax.div(number, self.blocks)
            block = number - chunk * self.blocks
        word_slot, row_slot = lax.rem(number, WORD_SLOTS), lax.rem(number, SLOTS)
        return Unit(
            chunk=chunk,
            block=block,
            words=pl.multiple_of(word_slot * self.at.size, MARGIN),
            word_slot=word_slot,
            row=pl.multiple_of(row_slot * self.config.chunk, MARGIN),
            row_slot=row_slot,
        )

    def _words(self, unit: Unit, first: jax.Array) -> list[Any]:
        work, chunk = self.operands.work, self.config.chunk
        begin = pl.multiple_of((first + unit.chunk) * chunk, MARGIN)
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

    def _arriving(self, unit: Unit) -> list[Any]:
        operands, scratch = self.operands, self.scratch
        arrived = scratch.rows_arrived.at[unit.row_slot]
        copies = []
        for here, lines, sources in self._streams(unit):
            tile = scratch.grads.at[here]
            copies += self.on.gather([operands.grads], sources, [tile], arrived)
            tiles = [x.at[here] for x in scratch.state]
            copies += self.on.gather(operands.state, lines, tiles, arrived)
        return copies

    def _leaving(self, unit: Unit) -> list[Any]:
        left = self.scratch.rows_left.at[unit.row_slot]
        copies = []
        for here, lines, _ in self._streams(unit):
            tiles = [x.at[here] for x in self.scratch.state]
            copies += self.on.scatter(tiles, self.operands.state, lines, left)
        return copies

    def _streams(self, unit: Unit) -> Iterator[tuple[Any, Any, Any]]:
        """A chunk in equal parts: rows of buffers, lines to update, gradient lines."""
        chunk = self.config.chunk
        length = MARGIN * pl.cdiv(chunk, MARGIN * self.config.streams)
        for at in range(0, chunk, length):
            size = min(length, chunk - at)
            yield (
                pl.ds(pl.multiple_of(unit.row + at, MARGIN), size),
                self._section(unit, self.at.rows + at, size),
                self._section(unit, self.at.sources + at, size),
            )

    def _section(self, unit: Unit, begin: int, length: int) -> Any:
        at = pl.multiple_of(unit.words + begin, MARGIN)
        return self.scratch.words.at[pl.ds(at, length)]

    def _vector(self, ref: Any, at: Any) -> jax.Array:
        return ref[pl.ds(at, self.window)]

    def _same_as_previous(self, unit: Unit, i: Any) -> jax.Array:
        """Whether occurrence i has the id of the one before it."""
        at = unit.words + self.at.ids + MARGIN + i
        words = self.scratch.words
        same = self._vector(words, at) == self._vector(words, at - 1)
        return same.astype(jnp.int32)[0] != 0
