"""The two storages of a table, as the TensorCore's row kernel moves and reads them.

What is moved at once is a *group*: one row of three plain arrays, by three DMAs, or the
lines of a packed group, by one (`layout`). It is computed in *blocks*: a packed one is
a line of each plane, a plain one all of the row. The *words* of a block are one array
for each plane, `[n, width]` for n groups; `values` reads them as float32 w, m, v.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Grads, Tile
from sparse_adam.kernels.layout import NO_NOISE, Noises, Pair, Values, Words
from sparse_adam.kernels.lines import Lines, Refs
from sparse_adam.kernels.problem import Problem
from sparse_adam.kernels.tiles import LANES

Copies: TypeAlias = list[tuple[Any, Any]]  # slices of Refs: in HBM, in VMEM


@dataclasses.dataclass(frozen=True, slots=True)
class Plain:
    """Three arrays `[V, D]` of float32, D a multiple of 128."""

    dim: int
    dtype: Any = jnp.float32
    rows_per_group: int = 1
    planes: int = 3
    blocks: int = 1

    @property
    def width(self) -> int:
        """Of a block."""
        return self.dim

    @property
    def stride(self) -> int:
        """Lanes from a row of a group to the next one."""
        return self.dim

    def buffer(self, slots: int, groups: int) -> Any:
        """Room in VMEM."""
        return pltpu.VMEM((slots, 3, groups, self.dim), self.dtype)

    def copies(self, state: Refs, buffer: Any, group: jax.Array, i: Any) -> Copies:
        """A group of the table, and the i-th one in the buffer of a slot."""
        return [
            (table.at[pl.ds(group, 1)], buffer.at[t, pl.ds(i, 1)])
            for t, table in enumerate(state)
        ]

    def moved(self, buffer: Any, groups: int) -> Any:
        """As many words as the DMAs of `groups` groups move."""
        return buffer.at[:, pl.ds(0, groups)]

    def read(self, buffer: Any, groups: pl.Slice, block: int) -> Words:
        """The words of a block of some groups in the buffer of a slot."""
        del block
        return tuple(buffer[t, groups] for t in range(3))

    def write(self, buffer: Any, groups: pl.Slice, block: int, words: Words) -> None:
        """Puts them back."""
        del block
        for t, word in enumerate(words):
            buffer[t, groups] = word

    def values(self, words: Words) -> Values:
        """They are floats."""
        w, m, v = words
        return w, m, v

    def words(self, values: Values, noises: Noises = NO_NOISE) -> Words:
        """They are floats."""
        del noises
        return values


@dataclasses.dataclass(frozen=True, slots=True)
class Packed(Lines):
    """One array of lines."""

    dtype: Any = jnp.int32
    width: int = LANES

    def buffer(self, slots: int, groups: int) -> Any:
        """Room in VMEM."""
        return pltpu.VMEM((slots, groups * self.lines_per_group, LANES), self.dtype)

    def copies(self, state: Refs, buffer: Any, group: jax.Array, i: Any) -> Copies:
        """A group of the table, and the i-th one in the buffer of a slot."""
        lines = self.lines_per_group
        here = buffer.at[pl.ds(i * lines, lines)]
        return [(state[0].at[pl.ds(group * lines, lines)], here)]

    def moved(self, buffer: Any, groups: int) -> Any:
        """As many words as the DMAs of `groups` groups move."""
        return buffer.at[pl.ds(0, groups * self.lines_per_group)]


Storage: TypeAlias = Plain | Packed


def storage_of(problem: Problem, nearest: Pair | None = None) -> Storage:
    """Of the problem's state; `nearest` as of `Lines`."""
    if problem.packed:
        return Packed(problem.layout, nearest)
    return Plain(problem.dim)


def in_lines(grads: Grads, stored: Storage) -> Tile:
    """Gradients in float32, and in whole lines."""
    missing = stored.blocks * stored.width - grads.shape[1]
    return jnp.pad(grads.astype(jnp.float32), ((0, 0), (0, missing)))
