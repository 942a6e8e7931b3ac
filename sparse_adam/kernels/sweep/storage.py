"""The two storages of a table, as the sweep kernel moves and reads them in blocks.

A *group* is a row of three plain arrays, or the rows of a packed table that share lines
(`layout`). A *tile* is 128 lanes of some groups in VMEM: its *words* are as they are
stored, one array for each plain array or packed plane, `[n, 128]` for n groups; as
*values* they are float32 w, m, v of that shape.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Grads
from sparse_adam.kernels import rounding
from sparse_adam.kernels.layout import Noises, Pair, Values, Words
from sparse_adam.kernels.lines import Lines, Refs
from sparse_adam.kernels.problem import Problem
from sparse_adam.kernels.tiles import LANES, SUBLANES


@dataclasses.dataclass(frozen=True, slots=True)
class Plain:
    """Three arrays `[V, D]`, float32 or bfloat16 each, D a multiple of 128."""

    num_rows: int
    dim: int
    dtypes: tuple[np.dtype, np.dtype, np.dtype]
    lines_per_group: int = 1  # rows of each array
    rows_per_group: int = 1

    @property
    def num_groups(self) -> int:
        """Rows that a TPU keeps room for: it stores whole tiles, and moves no less."""
        return SUBLANES * -(-self.num_rows // SUBLANES)

    @property
    def stride(self) -> int:
        """Lanes of a row."""
        return self.dim

    @property
    def width(self) -> int:
        """Lanes of the gradient of a group."""
        return self.dim

    def buffers(self, slots: int, groups: int) -> Refs:
        """Room in VMEM for blocks."""
        return tuple(
            pltpu.VMEM((slots, groups, self.dim), dtype) for dtype in self.dtypes
        )

    def read(self, buffer: Refs, groups: pl.Slice, block: Any) -> Words:
        """The words of a tile."""
        lanes = pl.ds(pl.multiple_of(block * LANES, LANES), LANES)
        return tuple(array[groups, lanes] for array in buffer)

    def write(self, buffer: Refs, groups: pl.Slice, block: Any, words: Words) -> None:
        """Puts them back."""
        lanes = pl.ds(pl.multiple_of(block * LANES, LANES), LANES)
        for array, word in zip(buffer, words, strict=True):
            array[groups, lanes] = word

    def values(self, words: Words) -> Values:
        """Reads words."""
        w, m, v = (word.astype(jnp.float32) for word in words)
        return w, m, v

    def words(self, values: Values, noises: Noises) -> Words:
        """Rounds to the dtypes of the arrays."""
        return tuple(
            rounding.store(value, dtype, noise)
            for value, dtype, noise in zip(values, self.dtypes, noises, strict=True)
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Packed(Lines):
    """One array of lines."""

    @property
    def num_groups(self) -> int:
        """Those that fill the last tile of lines included."""
        return self.layout.num_groups

    @property
    def width(self) -> int:
        """Lanes of the gradient of a group."""
        return self.blocks * LANES

    def buffers(self, slots: int, groups: int) -> Refs:
        """Room in VMEM for blocks."""
        return (pltpu.VMEM((slots, groups * self.lines_per_group, LANES), jnp.int32),)

    def read(self, buffer: Refs, groups: pl.Slice, block: Any) -> Words:
        """The words of a tile."""
        return Lines.read(self, buffer[0], groups, block)

    def write(self, buffer: Refs, groups: pl.Slice, block: Any, words: Words) -> None:
        """Puts them back."""
        Lines.write(self, buffer[0], groups, block, words)


Storage: TypeAlias = Plain | Packed


def storage_of(problem: Problem, nearest: Pair | None = None) -> Storage:
    """Of the problem's state; `nearest` as of `Lines`."""
    if problem.packed:
        return Packed(problem.layout, nearest)
    return Plain(problem.num_rows, problem.dim, problem.dtypes)


def lay_out(grads: Grads, stored: Storage) -> jax.Array:
    """Gradients as rows of float32 lines, at least one; each in every place of a line
    where its row may stand.
    """
    grads = grads.astype(jnp.float32)
    missing = (0, int(grads.shape[0] == 0))
    if stored.rows_per_group > 1:
        unused = stored.stride - grads.shape[1]
        grads = jnp.pad(grads, (missing, (0, unused)))
        grads = jnp.tile(grads, (1, stored.rows_per_group))
        missing = (0, 0)
    return jnp.pad(grads, (missing, (0, stored.width - grads.shape[1])))
