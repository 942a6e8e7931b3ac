"""Packed lines in VMEM, as the TensorCore's kernels read, change and write them.

A kernel moves *groups*, the rows of a packed table that share lines (`layout`), and
computes *blocks* of some of them: 128 lanes of each plane. The *words* of a block are
one int32 array `[n, 128]` for each plane and n groups; `values` reads them as float32
w, m, v.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam.kernels import rounding
from sparse_adam.kernels.layout import (
    NO_NOISE,
    Noises,
    PackedLayout,
    Pair,
    Values,
    Words,
)
from sparse_adam.kernels.problem import Problem
from sparse_adam.kernels.tiles import LANES

Refs: TypeAlias = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Lines:
    """One array of lines, of which a buffer holds some groups.

    Attributes:
        layout: of the lines.
        nearest: how two bfloat16 arrays are rounded to the nearest: `nearest_pair` of a
            kernel that is compiled; None where it is interpreted.
    """

    layout: PackedLayout
    nearest: Pair | None = None

    @property
    def rows_per_group(self) -> int:
        """Rows that share lines."""
        return self.layout.rows_per_group

    @property
    def lines_per_group(self) -> int:
        """Lines that stand together."""
        return self.layout.lines_per_group

    @property
    def stride(self) -> int:
        """Lanes from a row of a line to the next one."""
        return self.layout.stride

    @property
    def blocks(self) -> int:
        """Of 128 lanes: lines of a plane."""
        return self.layout.blocks

    @property
    def planes(self) -> int:
        """Arrays of words."""
        return len(self.layout.planes)

    def read(self, buffer: Any, groups: pl.Slice, block: Any) -> Words:
        """The words of a block of some groups."""
        return tuple(
            buffer[self._lines(groups, plane, block)] for plane in range(self.planes)
        )

    def write(self, buffer: Any, groups: pl.Slice, block: Any, words: Words) -> None:
        """Puts them back."""
        for plane, word in enumerate(words):
            buffer[self._lines(groups, plane, block)] = word

    def _lines(self, groups: pl.Slice, plane: int, block: Any) -> pl.Slice:
        """Of one plane: every n-th line, where a group has n."""
        start = groups.start * self.lines_per_group + self.layout.line(plane, 0) + block
        stride = self.lines_per_group if groups.size > 1 else 1
        return pl.Slice(start, groups.size, stride)

    def values(self, words: Words) -> Values:
        """What they say."""
        return self.layout.values(words)

    def words(self, values: Values, noises: Noises = NO_NOISE) -> Words:
        """Rounds to the dtypes of the table."""
        return self.layout.words(values, noises, self.nearest)


def nearest_pair(low: jax.Array, high: jax.Array) -> jax.Array:
    """Both rounded to bfloat16, to the nearest, in the halves of int32 words.

    One instruction of every TensorCore, the one that XLA converts to bfloat16 by. The
    interpreters do not know it.
    """
    words = pltpu.pack_elementwise([low, high], packed_dtype=jnp.bfloat16)
    return lax.bitcast_convert_type(words, jnp.int32)


def select(where: jax.Array, new: Words, old: Words) -> Words:
    """Of each array, the new where it changes, and the old bits elsewhere."""
    return tuple(jnp.where(where, n, o) for n, o in zip(new, old, strict=True))


def noises_of(seeds: Refs, groups: Any, block: Any, problem: Problem) -> Noises:
    """Random bits for a block of some groups, as many lines; none to round to nearest.

    seeds: () or SMEM [3]; groups: their numbers, one, or `[n, 128]`.
    """
    if not seeds:
        return NO_NOISE
    layout, dim = problem.layout, problem.dim
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    stride = jnp.int32(layout.stride)
    column = lax.rem(lane, stride) + block * LANES
    within = rounding.element(lax.div(lane, stride), column, dim)
    elements = groups * (layout.rows_per_group * dim) + within
    w, m, v = (
        rounding.noise(seeds[0][t], elements) if dtype == jnp.bfloat16 else None
        for t, dtype in enumerate(problem.dtypes)
    )
    return w, m, v
