"""One step for each occurrence, in the order of the batch."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparse_adam.kernels.sparsecore.config import FEW, MARGIN
from sparse_adam.kernels.sparsecore.memory import Share, Unit
from sparse_adam.kernels.sparsecore.shim import NONE
from sparse_adam.kernels.sparsecore.updating import UpdatePipeline
from sparse_adam.rules import Values


class EachOccurrence(UpdatePipeline):
    """Applies the runs of the worker's range, which holds whole ones.

    A row is fetched to the place of its first occurrence, stays in registers from one
    to the next, and is written from the place of its last.
    """

    def lists(self) -> tuple[int, int]:
        """They are fetched and written at different places."""
        return self.at.fetched, self.at.second

    def list_state(self, unit: Unit, share: Share) -> None:
        """Lists where runs of the range begin, and where they end."""
        words, window, at = self.scratch.words, self.window, self.at
        first = (share.first + unit.chunk) * self.config.chunk
        for place in range(0, self.config.chunk, window):
            here = unit.words + at.ids + MARGIN + place
            id_ = self.vector(words, here)
            number = lax.iota(jnp.int32, window) + (first + place)
            mine = (number >= share.begin) & (number < share.end)
            mine = mine & (id_ < self.spec.num_rows)
            record = self.records.state.index(id_, unit.block)
            for neighbour, begin in ((-1, at.fetched), (1, at.second)):
                other = self.vector(words, here + neighbour)
                listed = mine & (id_ != other)
                for at_, shift in zip(at.each(begin), self.records.shifts, strict=True):
                    here_ = pl.ds(unit.words + at_ + place, window)
                    words[here_] = jnp.where(listed, record + shift, NONE)

    def compute(self, unit: Unit, share: Share) -> None:
        """Makes a step of its row for each occurrence of the unit, in their order."""
        del share
        for slices in self.parts(FEW):
            self._step(unit, slices)

    def _step(self, unit: Unit, slices: list[pl.Slice]) -> None:
        opened, numbers = self.scratch.opened, self.numbers()
        size = self.records.blocks * self.records.width

        def step(i: jax.Array, rows: tuple[Values, ...]) -> tuple[Values, ...]:
            goes_on, new = self.same_as_previous(unit, i), []
            noises = self.noises(unit, i)
            for lanes, row in zip(slices, rows, strict=True):
                fetched = self.stored(unit.row + i, lanes)
                # A select: a row's NaN must not reach the next one.
                row = tuple(
                    jnp.where(goes_on, x, y) for x, y in zip(row, fetched, strict=True)
                )
                gradient = self.gradient(unit, i, lanes)
                row = self.spec.step(row, gradient, numbers)
                self.store(unit.row + i, lanes, row, noises(lanes))
                new.append(row)
            return tuple(new)

        places = [
            [pl.ds(t * size + s.start, s.size) for t in range(len(self.spec.dtypes))]
            for s in self.opened(unit, slices)
        ]
        rows = tuple(tuple(opened[at] for at in arrays) for arrays in places)
        rows = self.on.parallel_loop(self.config.chunk, step, rows)
        for arrays, row in zip(places, rows, strict=True):
            for at, value in zip(arrays, row, strict=True):
                opened[at] = value
