"""One step for each row: the gradients of a run of equal ids are summed first."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparse_adam._types import Index
from sparse_adam.kernels.sparsecore.config import FEW, MARGIN
from sparse_adam.kernels.sparsecore.memory import Share, Unit
from sparse_adam.kernels.sparsecore.shim import NONE, CopiesIf
from sparse_adam.kernels.sparsecore.updating import UpdatePipeline


class Accumulate(UpdatePipeline):
    """Applies the runs that begin and end in the worker's range; hands over others."""

    def lists(self) -> tuple[int, int]:
        """Returns one list for both: the records that are fetched are written."""
        return self.at.fetched, self.at.fetched

    @property
    def fills(self) -> bool:
        """Tells whether the list of what is written has no index to be passed over."""
        return self.config.filled_lists

    def leaving(self, unit: Unit) -> list[Any]:
        """Returns the scatters; none where a filled list has nothing to begin with."""
        copies = super().leaving(unit)
        if not self.fills:
            return copies
        count = self.vector(self.scratch.words, unit.words + self.at.count)[0]
        return [CopiesIf(count > 0, copies)]

    def list_state(self, unit: Unit, share: Share) -> None:
        """Lists the runs that end in the chunk, but not the head: records, places."""
        words, window, records = self.scratch.words, self.window, self.records
        ids = unit.words + self.at.ids + MARGIN
        lists = self.at.each(self.at.fetched)
        ends = unit.words + self.at.second
        for begin in lists:
            self._fill(unit.words + begin, NONE)
        if self.config.all_rounds:
            self._fill(ends, unit.row)  # some row of gradients or other

        def append(i: jax.Array, count: jax.Array) -> jax.Array:
            place = i * window
            id_ = self.vector(words, ids + place)
            following = self.vector(words, ids + place + 1)
            ending = (
                (id_ != following) & (id_ < self.spec.num_rows) & (id_ != share.head)
            )
            rank = count + jnp.cumsum(ending.astype(jnp.int32)) - 1
            places = lax.iota(jnp.int32, window) + (unit.row + place)
            record = records.state.index(id_, unit.block)
            for begin, shift in zip(lists, records.shifts, strict=True):
                rows = unit.words + begin
                self.on.store_where(words, rows + rank, record + shift, ending)
            self.on.store_where(words, ends + rank, places, ending)
            return count + self.on.count(ending)

        count = jnp.zeros((window,), jnp.int32)
        count = self.on.parallel_loop(self.config.chunk // window, append, count)
        words[pl.ds(unit.words + self.at.count, window)] = count
        if self.config.filled_lists:
            self._repeat_first([*self.at.each(self.at.fetched), self.at.second], unit)

    def _fill(self, begin: Index, word: Index) -> None:
        """Puts a word into all places of a list."""
        for place in range(0, self.config.chunk, self.window):
            words = jnp.full((self.window,), word, jnp.int32)
            self.scratch.words[pl.ds(begin + place, self.window)] = words

    def _repeat_first(self, lists: list[int], unit: Unit) -> None:
        """Puts what a list begins with into the places behind what is listed.

        Where nothing is listed these are rows to fetch, of which none is written.
        """
        words, window = self.scratch.words, self.window
        count = self.vector(words, unit.words + self.at.count)
        for begin in lists:
            first = jnp.maximum(self.vector(words, unit.words + begin)[0], 0)
            for place in range(0, self.config.chunk, window):
                here = pl.ds(unit.words + begin + place, window)
                number = lax.iota(jnp.int32, window) + place
                words[here] = jnp.where(number < count, words[here], first)

    def compute(self, unit: Unit, share: Share) -> None:
        """Sums the gradients of each run, then steps the rows that end here."""
        words = self.scratch.words
        count = self.vector(words, unit.words + self.at.count)[0]
        continues = self.same_as_previous(unit, 0)
        if self.operands.work.gains:
            self._sum_runs(unit)
        else:
            # Otherwise every gradient is a run of its own, and so its own sum.
            pl.when((count < self.config.chunk) | continues)(
                lambda: self._sum_runs(unit)
            )
        is_last = unit.chunk + 1 == share.chunks
        first_id = self.vector(words, unit.words + self.at.ids + MARGIN)[0]

        @pl.when(is_last | (first_id == share.head))
        def range_may_split_a_run():
            self._hand_over(unit, share, is_last)

        self._update_rows(unit, count)

    def _sum_runs(self, unit: Unit) -> None:
        """Puts the sum of each run, as far as this worker has it, where it ends."""
        scratch = self.scratch

        def add(i: jax.Array, sums: tuple) -> tuple:
            goes_on = self.same_as_previous(unit, i)
            new = []
            for lanes, total in zip(self.slices, sums, strict=True):
                gradient = self.gradient(unit, i, lanes)
                # A select: a run's NaN must not reach the next one.
                total = jnp.where(goes_on, total + gradient, gradient)
                scratch.grads[unit.row + i, lanes] = total
                new.append(total)
            return tuple(new)

        opened = self.opened(unit, self.slices)
        sums = tuple(scratch.opened[lanes] for lanes in opened)
        sums = self.on.parallel_loop(self.config.chunk, add, sums)
        for lanes, total in zip(opened, sums, strict=True):
            scratch.opened[lanes] = total

    def _hand_over(self, unit: Unit, share: Share, is_last: jax.Array) -> None:
        """Writes the partial sum of the head, where it ends, and of the tail."""
        words, window, chunk = self.scratch.words, self.window, self.config.chunk
        ids, head = unit.words + self.at.ids + MARGIN, share.head
        in_head = jnp.zeros((window,), jnp.int32)
        for place in range(0, chunk, window):
            in_head += self.on.count(self.vector(words, ids + place) == head)
        length = in_head[0]  # they come first
        last = self.vector(words, ids + chunk - 1)[0]
        following = self.vector(words, ids + chunk)[0]
        goes_on = (last == following) & (last < self.spec.num_rows)
        ends_here = (length < chunk) | (following != head) | is_last
        row = 2 * share.worker
        self._write_sum(unit, row, length - 1, (length > 0) & ends_here)
        is_tail = is_last & goes_on & (last != head)
        self._write_sum(unit, row + 1, chunk - 1, is_tail)

    def _write_sum(
        self, unit: Unit, row: jax.Array, i: Index, needed: jax.Array
    ) -> None:
        @pl.when(needed)
        def write():
            width = self.records.width
            at = self.records.grads.index(row, unit.block) * width
            target = self.operands.sums.at[pl.ds(pl.multiple_of(at, width), width)]
            self.on.put(self.scratch.grads.at[unit.row + i], target)

    def _update_rows(self, unit: Unit, count: jax.Array) -> None:
        scratch, numbers = self.scratch, self.numbers()

        def update(slices: list[pl.Slice], i: jax.Array) -> None:
            end = self.vector(scratch.words, unit.words + self.at.second + i)[0]
            noises = self.noises(unit, end - unit.row)
            for lanes in slices:
                old = self.stored(unit.row + i, lanes)
                new = self.spec.step(old, scratch.grads[end, lanes], numbers)
                self.store(unit.row + i, lanes, new, noises(lanes))

        few = FEW if self.operands.seeds else len(self.slices)
        rounds = self.config.chunk if self.config.all_rounds else count
        for slices in self.parts(few):
            self.on.parallel_loop(rounds, functools.partial(update, slices))
