"""What both ways to update rows share: gradients that arrive, rows in and out."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Index, Ref
from sparse_adam.kernels import rounding
from sparse_adam.kernels.layout import Noises
from sparse_adam.kernels.sparsecore.config import MARGIN, WINDOW, WordOffsets
from sparse_adam.kernels.sparsecore.memory import (
    Operands,
    Share,
    SubcoreScratch,
    Unit,
)
from sparse_adam.kernels.sparsecore.pipeline import NO_ID, Pipeline
from sparse_adam.kernels.sparsecore.shim import NONE
from sparse_adam.kernels.spec import UpdateSpec
from sparse_adam.rules import StepNumbers, Values


@dataclasses.dataclass(frozen=True)
class UpdatePipeline(Pipeline):
    """Rows of the state and of gradients come in, and rows of the state go out."""

    operands: Operands
    scratch: SubcoreScratch
    spec: UpdateSpec

    @abc.abstractmethod
    def list_state(self, unit: Unit, share: Share) -> None:
        """Lists the records of the state to fetch and to write."""

    def list_rows(self, unit: Unit, share: Share) -> None:
        """Lists the records of the state, and turns rows of gradients into records."""
        self.list_state(unit, share)
        self._list_gradients(unit)

    @property
    def at(self) -> WordOffsets:
        """Returns where each kind of word stands in a slot."""
        return self.config.offsets(len(self.records.shifts))

    def constants(self) -> list[tuple[Ref, Ref]]:
        """Adds the traced numbers, and the seeds if there are any."""
        scratch = self.scratch
        seeds = [(x, scratch.seeds) for x in self.operands.seeds]
        return [*super().constants(), (self.operands.numbers, scratch.numbers), *seeds]

    def head(self, first: jax.Array) -> Index:
        """Returns the id of a run that began in the share before, or `NO_ID`."""
        edge, ids = self.scratch.edge, self.operands.work.ids
        at = pl.multiple_of(first * self.config.chunk, MARGIN)
        pltpu.sync_copy(ids.at[pl.ds(at, WINDOW)], edge.at[pl.ds(0, WINDOW)])
        before = self.vector(edge, MARGIN - 1)[0]
        return jnp.where(before == self.vector(edge, MARGIN)[0], before, NO_ID)

    def arriving(self, unit: Unit) -> list[Any]:
        """Returns the gathers of gradients and of each plane of the state."""
        operands, scratch = self.operands, self.scratch
        planes, copies = self.records.plane_refs(operands.state), []
        own, *others = _semaphores(scratch.rows_arrived, unit.row_slot, 1 + len(planes))
        for here, fetched, _, sources in self.streams(unit):
            tile = scratch.grads.at[here]
            copies += self.on.gather([operands.grads], [sources], [tile], [own])
            tiles = [x.at[here] for x in scratch.state]
            copies += self.on.gather(planes, fetched, tiles, others)
        return copies

    def leaving(self, unit: Unit) -> list[Any]:
        """Returns the scatters of each plane of the state."""
        planes, copies = self.records.plane_refs(self.operands.state), []
        left = _semaphores(self.scratch.rows_left, unit.row_slot, len(planes))
        for here, _, written, _ in self.streams(unit):
            tiles = [x.at[here] for x in self.scratch.state]
            copies += self.on.scatter(
                tiles, planes, written, left, passing_over=not self.fills
            )
        return copies

    def _list_gradients(self, unit: Unit) -> None:
        if self.records.blocks == 1:
            return
        for place in range(0, self.config.chunk, self.window):
            here = pl.ds(unit.words + self.at.sources + place, self.window)
            source = self.scratch.words[here]
            record = self.records.grads.index(source, unit.block)
            self.scratch.words[here] = jnp.where(source == NONE, source, record)

    def parts(self, size: int) -> list[list[pl.Slice]]:
        """Returns the vectors in groups of `size`: one for each loop over rows."""
        starts = range(0, len(self.slices), size)
        return [self.slices[at : at + size] for at in starts]

    def gradient(self, unit: Unit, i: jax.Array, lanes: pl.Slice) -> jax.Array:
        """Returns some lanes of occurrence i's gradient, times its gain if any."""
        gradient = self.scratch.grads[unit.row + i, lanes]
        if not self.operands.work.gains:
            return gradient
        gains, chunk = self.scratch.gains, self.config.chunk
        gain = self.vector(gains, unit.word_slot * chunk + i)[0]
        source = self.vector(self.scratch.words, unit.words + self.at.sources + i)[0]
        return jnp.where(source != NONE, gain * gradient, 0.0)

    def stored(self, row: Index, lanes: pl.Slice) -> Values:
        """Returns some lanes of a row in the buffers: float32, one for each array."""
        return self.records.values(tuple(x[row, lanes] for x in self.scratch.state))

    def store(
        self, row: Index, lanes: pl.Slice, values: Values, noises: Noises
    ) -> None:
        """Rounds some lanes of a row and puts them back into the buffers."""
        words = self.records.words(values, noises, self.on.pack)
        for x, word in zip(self.scratch.state, words, strict=True):
            x[row, lanes] = word

    def numbers(self) -> StepNumbers:
        """Returns the traced numbers of the update."""
        numbers = self.vector(self.scratch.numbers, 0)
        return self.spec.numbers(lambda i: numbers[i])

    def noises(self, unit: Unit, i: Index) -> Callable[[Any], Noises]:
        """Random bits for vectors of the row of occurrence i."""
        if not self.operands.seeds:
            return lambda lanes: None
        seeds = self.vector(self.scratch.seeds, 0)
        row = self.vector(self.scratch.words, unit.words + self.at.ids + MARGIN + i)[0]

        def of(lanes: Any) -> Noises:
            first = unit.block * self.records.width + lanes.start
            columns = lax.iota(jnp.int32, lanes.size) + first
            elements = rounding.element(row, columns, self.spec.dim)
            return rounding.noises(seeds, elements, self.spec.dtypes)

        return of


def _semaphores(ref: Ref, slot: jax.Array, count: int) -> list[Ref]:
    """Returns one for each of some arrays: those of the slot, in turn."""
    return [ref.at[slot, at % ref.shape[1]] for at in range(count)]
