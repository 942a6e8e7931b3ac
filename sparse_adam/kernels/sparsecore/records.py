"""How rows stand in the arrays that the kernel sees: as records, in both layouts.

A record is one block of at most 128 words of one row in one plane. Where planes are
arrays of their own, a record has the same number in each, and one list of numbers
serves all of them. In one array the planes of a row stand a fixed number of records
apart.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparse_adam._types import Grads, Index, Indices, Ref
from sparse_adam.kernels.layout import (
    Layout,
    Noises,
    PackedLayout,
    PlainLayout,
    PlaneWords,
    RoundPair,
)
from sparse_adam.kernels.spec import State
from sparse_adam.kernels.tiles import LANES, SUBLANES
from sparse_adam.rules import Values


@dataclasses.dataclass(frozen=True, slots=True)
class Records:
    """An array `[n, width]`: rows, or of rows of more than 128 lanes the blocks.

    Of each group of rows the first blocks stand together, then the second ones, and so
    on; what else a group holds follows.
    """

    width: int
    blocks: int  # of a row
    rows: int  # of a group; a power of two
    lines: int  # how often as many records as that stand in a group

    def index(self, row: jax.Array, block: Index) -> jax.Array:
        """Returns where this block of a row stands."""
        if self.lines == 1:
            return row
        group = lax.shift_right_logical(row, self.rows.bit_length() - 1)
        return (group * self.lines + block) * self.rows + (row & (self.rows - 1))

    def of(self, rows: jax.Array) -> jax.Array:
        """Makes records of `[B, D]`: on a TPU a bitcast where 128 divides D."""
        missing = -rows.shape[0] % self.rows, self.blocks * self.width - rows.shape[1]
        rows = jnp.pad(rows, tuple((0, count) for count in missing))
        if self.blocks == 1:
            return rows
        blocks = rows.reshape(-1, self.rows, self.blocks, self.width)
        return blocks.transpose(0, 2, 1, 3).reshape(-1, self.width)

    def back(self, records: jax.Array) -> jax.Array:
        """Makes `[B, D]` of such records, B filled up to whole groups."""
        if self.blocks == 1:
            return records
        blocks = records.reshape(-1, self.blocks, self.rows, self.width)
        return blocks.transpose(0, 2, 1, 3).reshape(-1, self.blocks * self.width)


class RowRecords(abc.ABC):
    """The records of a state, and of the gradients to it: the same blocks of rows.

    Attributes:
        layout: of the state.
        dtype: of their words.
        keeps_tiles: whether the arrays stay in the tiles of a TensorCore.
    """

    layout: Any
    dtype: Any
    keeps_tiles: bool

    @property
    @abc.abstractmethod
    def state(self) -> Records:
        """Returns the records of the state."""

    @property
    def grads(self) -> Records:
        """Returns the records of the gradients, and of rows that are looked up."""
        return tiled(self.state.width, self.state.blocks)

    @property
    def width(self) -> int:
        """Returns the words of a record."""
        return self.state.width

    @property
    def blocks(self) -> int:
        """Returns the records of a row in each plane."""
        return self.state.blocks

    @property
    def planes(self) -> int:
        """Returns the records of one block of a row."""
        return len(self.layout.planes)

    @abc.abstractmethod
    def records(self, state: State) -> State:
        """Returns the arrays of the state as records: a bitcast on a TPU."""

    @abc.abstractmethod
    def arrays(self, records: State) -> State:
        """Returns records as the arrays of the state."""

    @property
    @abc.abstractmethod
    def shifts(self) -> tuple[int, ...]:
        """Returns, for each list of indices, how far behind the first plane it points.

        One list for all planes that are arrays of their own; one each in one array.
        """

    @abc.abstractmethod
    def plane_refs(self, refs: tuple[Ref, ...]) -> list[Ref]:
        """Returns the array of each plane."""

    @abc.abstractmethod
    def values(self, words: PlaneWords) -> Values:
        """Reads planes: float32, one array for each of the state's."""

    @abc.abstractmethod
    def words(
        self, values: Values, noises: Noises, round_pair: RoundPair
    ) -> PlaneWords:
        """Writes planes, rounding as the dtypes and the noise say."""

    @property
    def looked_up(self) -> Any:
        """Returns the dtype of rows that are looked up, and of their sums.

        The words of narrow rows stay int32: what lays them out anew reads them as
        floats for nothing, while wide ones would be copied for that alone.
        """
        return jnp.float32 if self.width == LANES else self.dtype

    @abc.abstractmethod
    def weights(self, words: jax.Array) -> jax.Array:
        """Reads the weights alone from words that are looked up: float32."""

    def words_of_sums(self, sums: jax.Array) -> jax.Array:
        """Returns float32 sums as they leave."""
        return _seen_as(sums, self.looked_up)

    def lay_out(self, grads: Grads, sources: Indices) -> tuple[jax.Array, Indices]:
        """Returns gradients as records, and which of them each occurrence adds.

        A source of -1 stays -1. Narrow rows come column by column from a TPU. Side by
        side in lines they are made by a plain transposition if the lines are filled one
        place after the other: the first place of all of them, then the second. In the
        order of the rows it takes XLA up to eight times as long, and a copy with 128
        words for each row.
        """
        grads = grads.astype(jnp.float32)
        if self.width == LANES:
            return self.grads.of(grads), sources
        places, lines = LANES // self.width, self._lines(grads.shape[0])
        records = self.numbers(sources, grads.shape[0])
        missing = self.width - grads.shape[1], places * lines - grads.shape[0]
        columns = jnp.pad(grads.T, tuple((0, count) for count in missing))
        grads = jnp.concatenate(jnp.split(columns, places, axis=1)).T
        # Otherwise XLA makes one reshape of two, and leaves the transposition to it.
        grads = lax.optimization_barrier(grads).reshape(-1, self.width)
        return grads, jnp.where(sources < 0, sources, records)

    def numbers(self, rows: Indices, count: int) -> Indices:
        """Returns which record each row is, or its first block, of `count` rows."""
        if self.width == LANES:
            return rows
        places, lines = LANES // self.width, self._lines(count)
        return lax.rem(rows, lines) * places + lax.div(rows, lines)

    def room(self, count: int) -> int:
        """Returns for how many rows there are records where there are `count` rows."""
        if self.width == LANES:
            return pl.cdiv(count, self.grads.rows) * self.grads.rows
        return self._lines(count) * (LANES // self.width)

    def take_back(self, records: jax.Array, count: int) -> jax.Array:
        """Returns float32 `[count, D]` of records that `numbers` has given places.

        The way back of `lay_out`: narrow rows become columns by one transposition.
        """
        if self.width == LANES:
            rows = self.grads.back(records)
        else:
            columns = lax.optimization_barrier(records.reshape(-1, LANES)).T
            places = LANES // self.width
            rows = jnp.concatenate(jnp.split(columns, places), axis=1).T
        return _seen_as(rows[:count, : self.layout.dim], jnp.float32)

    def _lines(self, count: int) -> int:
        """The lines of narrow rows: whole tiles of them, when they are transposed."""
        return LANES * pl.cdiv(count, LANES * (LANES // self.width))


@dataclasses.dataclass(frozen=True)
class PlainRecords(RowRecords):
    """A record is a row, or 128 lanes of one, of a float32 array."""

    layout: PlainLayout

    dtype = jnp.float32
    keeps_tiles = True

    @property
    def state(self) -> Records:
        """Returns the records of each array."""
        return tiled(LANES, self.layout.blocks)

    def records(self, state: State) -> State:
        """Returns each array as records."""
        return tuple(map(self.state.of, state))

    def arrays(self, records: State) -> State:
        """Returns records as `[V, D]` arrays."""
        return tuple(map(self.state.back, records))

    @property
    def shifts(self) -> tuple[int, ...]:
        """Returns one 0: the planes are arrays of their own, and share a list."""
        return (0,)

    def plane_refs(self, refs: tuple[Ref, ...]) -> list[Ref]:
        """Returns the arrays themselves."""
        return list(refs)

    def values(self, words: PlaneWords) -> Values:
        """Returns the words: they are floats."""
        return words

    def weights(self, words: jax.Array) -> jax.Array:
        """Returns the words of the table's rows as they are: they are floats."""
        return words

    def words(
        self, values: Values, noises: Noises, round_pair: RoundPair
    ) -> PlaneWords:
        """Returns the values: they are words."""
        del noises, round_pair
        return values


@dataclasses.dataclass(frozen=True)
class PackedRecords(RowRecords):
    """A record is what a row has of a line: one for each of its planes and blocks."""

    layout: PackedLayout

    dtype = jnp.int32
    keeps_tiles = False

    @property
    def state(self) -> Records:
        """Returns the records of the lines."""
        layout = self.layout
        width = layout.stride if layout.rows_per_group > 1 else LANES
        return Records(
            width, layout.blocks, layout.rows_per_group, layout.lines_per_group
        )

    def records(self, state: State) -> State:
        """Returns the lines, `[n, 128]`, cut into records, `[m, width]`."""
        return tuple(x.reshape(-1, self.width) for x in state)

    def arrays(self, records: State) -> State:
        """Returns records, `[m, width]`, joined to lines: the way back of `records`."""
        return tuple(x.reshape(self.layout.shape) for x in records)

    @property
    def shifts(self) -> tuple[int, ...]:
        """Returns how far behind the records of the first plane each one's stand."""
        step = self.blocks * self.state.rows
        return tuple(plane * step for plane in range(self.planes))

    def plane_refs(self, refs: tuple[Ref, ...]) -> list[Ref]:
        """Returns all lines each time: two views of one array are never in flight."""
        return list(refs) * self.planes

    def values(self, words: PlaneWords) -> Values:
        """Reads float32 weights and slots from the words of the planes of rows."""
        return self.layout.values(words)

    def weights(self, words: jax.Array) -> jax.Array:
        """Reads the plane of the weights."""
        if self.layout.dtypes[0] == jnp.float32:
            return _seen_as(words, jnp.float32)
        return self.layout.weights(_seen_as(words, self.dtype), jnp.float32)

    def words(
        self, values: Values, noises: Noises, round_pair: RoundPair
    ) -> PlaneWords:
        """Rounds weights and slots to their dtypes, and joins them to words."""
        return self.layout.words(values, noises, round_pair)


def _seen_as(words: jax.Array, dtype: Any) -> jax.Array:
    if words.dtype == dtype:
        return words
    return lax.bitcast_convert_type(words, dtype)


def records_of(layout: Layout) -> RowRecords:
    """Returns the records of a layout."""
    if isinstance(layout, PackedLayout):
        return PackedRecords(layout)
    assert isinstance(layout, PlainLayout)
    return PlainRecords(layout)


def tiled(width: int, blocks: int) -> Records:
    """Returns the records of a plain array.

    One that has more than 128 lanes stands in tiles of 8 rows.
    """
    return Records(width, blocks, SUBLANES if blocks > 1 else 1, blocks)
