"""Groups of rows in VMEM, as the TensorCore's kernels move, read and write them.

What is moved at once is a *group* (`layout`): a row of some plain arrays, by one DMA
each, or the lines of a packed group, by one. It is computed in *blocks*: of packed
lines and in a sweep 128 lanes of each plane, of plain rows that a row kernel moves the
whole row. The *words* of a block are one array `[n, width]` for each plane and n
groups; `values` reads them as float32.

Per-row slots are no part of this: they are one word a row, which no DMA moves alone.
"""

import dataclasses
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Index, Ref
from sparse_adam.kernels import rounding
from sparse_adam.kernels.layout import (
    FLOAT32,
    Layout,
    Noises,
    PackedLayout,
    PlainLayout,
    PlaneWords,
    RoundPair,
)
from sparse_adam.kernels.tiles import LANES
from sparse_adam.rules import Values

Refs: TypeAlias = tuple[Ref, ...]
Copies: TypeAlias = list[tuple[Ref, Ref]]  # slices of refs: in HBM, in VMEM


@runtime_checkable
class Groups(Protocol):
    """The groups of a layout in buffers of VMEM.

    Attributes:
        width: lanes of a block.
        blocks: of a row.
    """

    @property
    def width(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    def buffers(self, slots: int, groups: int) -> tuple[Any, ...]:
        """Returns what to allocate for `groups` groups in each slot."""
        ...

    def words_scratch(self) -> tuple[Any, ...]:
        """Returns what to allocate for the words of one group, block by block."""
        ...

    def copies(
        self, state: Refs, buffers: Refs, first: Index, at: Index, count: int
    ) -> Copies:
        """Returns where `count` groups stand in the table and in a slot's buffers."""
        ...

    def moved(self, buffers: Refs, groups: int) -> Refs:
        """Returns refs of as many words as the copies of `groups` groups move."""
        ...

    def read(self, buffers: Refs, groups: pl.Slice, block: Index) -> PlaneWords:
        """Returns the words of a block of some groups in a slot's buffers."""
        ...

    def write(
        self, buffers: Refs, groups: pl.Slice, block: Index, words: PlaneWords
    ) -> None:
        """Puts the words back."""
        ...

    def values(self, words: PlaneWords) -> Values:
        """Returns the words as float32, one array for each of the state's."""
        ...

    def words(self, values: Values, noises: Noises = None) -> PlaneWords:
        """Returns values as words, rounded to the dtypes of the table."""
        ...


def groups_of(layout: Layout, *, whole_rows: bool, compiled: bool) -> Groups:
    """Returns how a kernel moves and reads the groups of a layout.

    Args:
        layout: of the table.
        whole_rows: whether plain rows are computed whole, or 128 lanes at a time.
        compiled: whether the kernel is compiled; the interpreters do not know the
            instruction that rounds two numbers at once.
    """
    if isinstance(layout, PackedLayout):
        return PackedGroups(layout, round_pair if compiled else None)
    assert isinstance(layout, PlainLayout)
    return PlainGroups(layout, layout.dim if whole_rows else LANES, whole_rows)


@dataclasses.dataclass(frozen=True, slots=True)
class PlainGroups:
    """Rows of plain arrays.

    Attributes:
        layout: of the arrays.
        width: lanes of a block.
        stacked: whether arrays of one dtype share a buffer, so that one wait covers the
            copies of all of them. Otherwise each has its own, which costs a sweep of
            bfloat16 fewer instructions.
    """

    layout: PlainLayout
    width: int
    stacked: bool

    @property
    def blocks(self) -> int:
        """Returns the blocks of a row."""
        return self.layout.dim // self.width

    @property
    def _dtypes(self) -> list[np.dtype]:
        """Returns the dtypes of the arrays that are moved."""
        return [self.layout.dtypes[t] for (t,) in self.layout.planes]

    @property
    def _shared(self) -> list[list[int]]:
        """Returns for each buffer the arrays that it holds."""
        numbers = range(len(self._dtypes))
        if not self.stacked:
            return [[t] for t in numbers]
        distinct = dict.fromkeys(self._dtypes)
        return [[t for t in numbers if self._dtypes[t] == d] for d in distinct]

    @property
    def _places(self) -> list[tuple[int, int]]:
        """Returns for each array its buffer, and its number in that."""
        return [
            next((b, s.index(t)) for b, s in enumerate(self._shared) if t in s)
            for t in range(len(self._dtypes))
        ]

    def buffers(self, slots: int, groups: int) -> tuple[Any, ...]:
        """Returns a buffer for each dtype, or for each array."""
        return tuple(
            pltpu.VMEM((slots, len(s), groups, self.layout.dim), self._dtypes[s[0]])
            for s in self._shared
        )

    def words_scratch(self) -> tuple[Any, ...]:
        """Returns room for the words of one row, an array at a time."""
        shape = self.blocks, self.width
        return tuple(pltpu.VMEM(shape, dtype) for dtype in self._dtypes)

    def copies(
        self, state: Refs, buffers: Refs, first: Index, at: Index, count: int
    ) -> Copies:
        """Returns a copy for each array."""
        return [
            (table.at[pl.ds(first, count)], buffers[b].at[i, pl.ds(at, count)])
            for table, (b, i) in zip(state, self._places, strict=True)
        ]

    def moved(self, buffers: Refs, groups: int) -> Refs:
        """Returns a part of each buffer."""
        return tuple(buffer.at[:, pl.ds(0, groups)] for buffer in buffers)

    def read(self, buffers: Refs, groups: pl.Slice, block: Index) -> PlaneWords:
        """Returns the words of a block of some rows."""
        lanes = self._lanes(block)
        return tuple(buffers[b][i, groups, lanes] for b, i in self._places)

    def write(
        self, buffers: Refs, groups: pl.Slice, block: Index, words: PlaneWords
    ) -> None:
        """Puts the words back."""
        lanes = self._lanes(block)
        for (b, i), word in zip(self._places, words, strict=True):
            buffers[b][i, groups, lanes] = word

    def _lanes(self, block: Any) -> slice | pl.Slice:
        if self.blocks == 1:
            return slice(None)
        return pl.ds(pl.multiple_of(block * self.width, self.width), self.width)

    def values(self, words: PlaneWords) -> Values:
        """Returns the words as float32."""
        return tuple(word.astype(jnp.float32) for word in words)

    def words(self, values: Values, noises: Noises = None) -> PlaneWords:
        """Returns values rounded to the dtypes of the arrays."""
        return tuple(
            rounding.store(value, dtype, None if noises is None else noises[t])
            for t, (value, dtype) in enumerate(zip(values, self._dtypes, strict=True))
        )


@dataclasses.dataclass(frozen=True, slots=True)
class PackedGroups:
    """The lines of packed groups.

    Attributes:
        layout: of the lines.
        round_pair: how two bfloat16 arrays are rounded to the nearest; None where the
            kernel is interpreted.
    """

    layout: PackedLayout
    round_pair: RoundPair | None = None

    width = LANES

    @property
    def blocks(self) -> int:
        """Returns the lines of a plane."""
        return self.layout.blocks

    def buffers(self, slots: int, groups: int) -> tuple[Any, ...]:
        """Returns one buffer of lines."""
        lines = groups * self.layout.lines_per_group
        return (pltpu.VMEM((slots, lines, LANES), jnp.int32),)

    def words_scratch(self) -> tuple[Any, ...]:
        """Returns room for the words of one group, a plane at a time."""
        word = pltpu.VMEM((self.blocks, LANES), jnp.int32)
        return (word,) * len(self.layout.planes)

    def copies(
        self, state: Refs, buffers: Refs, first: Index, at: Index, count: int
    ) -> Copies:
        """Returns one copy: the lines of groups stand together."""
        lines = self.layout.lines_per_group
        (table,), (buffer,) = state, buffers
        here = buffer.at[pl.ds(at * lines, count * lines)]
        return [(table.at[pl.ds(first * lines, count * lines)], here)]

    def moved(self, buffers: Refs, groups: int) -> Refs:
        """Returns the lines of that many groups."""
        return (buffers[0].at[pl.ds(0, groups * self.layout.lines_per_group)],)

    def read(self, buffers: Refs, groups: pl.Slice, block: Index) -> PlaneWords:
        """Returns the words of a block of some groups."""
        planes = range(len(self.layout.planes))
        return tuple(buffers[0][self._lines(groups, p, block)] for p in planes)

    def write(
        self, buffers: Refs, groups: pl.Slice, block: Index, words: PlaneWords
    ) -> None:
        """Puts the words back."""
        for plane, word in enumerate(words):
            buffers[0][self._lines(groups, plane, block)] = word

    def _lines(self, groups: pl.Slice, plane: int, block: Index) -> pl.Slice:
        """Returns the lines of one plane: every n-th line, where a group has n."""
        lines = self.layout.lines_per_group
        start = groups.start * lines + self.layout.line(plane, 0) + block
        return pl.Slice(start, groups.size, lines if groups.size > 1 else 1)

    def values(self, words: PlaneWords) -> Values:
        """Returns the words as float32, one array for each of the state's."""
        return self.layout.values(words)

    def words(self, values: Values, noises: Noises = None) -> PlaneWords:
        """Returns values as words, rounded to the dtypes of the table."""
        return self.layout.words(values, noises, self.round_pair)


def round_pair(low: jax.Array, high: jax.Array) -> jax.Array:
    """Rounds both to the nearest bfloat16, into the halves of int32 words.

    It is one instruction of every TensorCore, the one by which XLA converts to
    bfloat16. The interpreters do not know it.
    """
    words = pltpu.pack_elementwise([low, high], packed_dtype=jnp.bfloat16)
    return lax.bitcast_convert_type(words, jnp.int32)


def select(where: jax.Array, new: PlaneWords, old: PlaneWords) -> PlaneWords:
    """Returns the new words where they change, and the old bits elsewhere."""
    return tuple(jnp.where(where, n, o) for n, o in zip(new, old, strict=True))


def group_noises(seeds: Refs, groups: Any, block: Index, layout: Layout) -> Noises:
    """Returns random bits for a block of some groups; None to round to the nearest.

    Args:
        seeds: () or one ref in SMEM, a seed for each array.
        groups: their numbers, one, or `[n, 128]`.
        block: which 128 lanes.
        layout: of the table.
    """
    if not seeds:
        return None
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    stride = jnp.int32(layout.stride)
    column = lax.rem(lane, stride) + block * LANES
    within = rounding.element(lax.div(lane, stride), column, layout.dim)
    elements = groups * (layout.rows_per_group * layout.dim) + within
    return rounding.noises(seeds[0], elements, layout.dtypes)


def pad_to_lines(grads: jax.Array, layout: Layout) -> jax.Array:
    """Returns gradients in float32, filled with zeros to whole blocks of 128 lanes."""
    missing = layout.blocks * LANES - grads.shape[1]
    return jnp.pad(grads.astype(jnp.float32), ((0, 0), (0, missing)))


def is_float32(layout: Layout) -> bool:
    """Tells whether all arrays of a layout are float32."""
    return all(dtype == FLOAT32 for dtype in layout.dtypes)
