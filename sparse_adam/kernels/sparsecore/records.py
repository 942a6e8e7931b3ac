"""How rows stand in the arrays that the kernel sees."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparse_adam._types import Grads, Indices
from sparse_adam.kernels.layout import Noises, PackedLayout, Pair, Values, Words
from sparse_adam.kernels.problem import Problem, State
from sparse_adam.kernels.tiles import LANES

TILE = 8  # rows that lie together in a plain array of more than 128 lanes


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

    def index(self, row: Any, block: Any) -> Any:
        """Where this block of a row stands."""
        if self.lines == 1:
            return row
        group = lax.shift_right_logical(row, self.rows.bit_length() - 1)
        return (group * self.lines + block) * self.rows + (row & (self.rows - 1))

    def of(self, rows: jax.Array) -> jax.Array:
        """Makes them of `[B, D]`: on a TPU a bitcast where D is a multiple of 128."""
        missing = -rows.shape[0] % self.rows, self.blocks * self.width - rows.shape[1]
        rows = jnp.pad(rows, tuple((0, count) for count in missing))
        if self.blocks == 1:
            return rows
        blocks = rows.reshape(-1, self.rows, self.blocks, self.width)
        return blocks.transpose(0, 2, 1, 3).reshape(-1, self.width)


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """Where the state is, and the gradients to it: the same blocks of rows.

    `layout` is that of packed storage, None of three float32 arrays. Either way the
    kernel sees planes of the same records; those of packed storage overlap, a line
    apart each.
    """

    num_rows: int
    dim: int
    state: Records
    grads: Records
    layout: PackedLayout | None

    @classmethod
    def of(cls, problem: Problem) -> "Storage":
        """The storage of a problem's state."""
        if problem.packed:
            layout = problem.layout
            group, lines = layout.rows_per_group, layout.lines_per_group
            width = layout.stride if group > 1 else LANES
            state = Records(width, layout.blocks, group, lines)
        else:
            layout, state = None, tiled(LANES, problem.dim // LANES)
        grads = tiled(state.width, state.blocks)
        return cls(problem.num_rows, problem.dim, state, grads, layout)

    @property
    def width(self) -> int:
        """Words of a record."""
        return self.state.width

    @property
    def blocks(self) -> int:
        """Records of a row in each plane."""
        return self.state.blocks

    @property
    def planes(self) -> int:
        """Records of one block of a row."""
        return 3 if self.layout is None else len(self.layout.planes)

    @property
    def dtype(self) -> Any:
        """Of the words of the state."""
        return jnp.float32 if self.layout is None else jnp.int32

    def records(self, state: State) -> State:
        """The arrays of the state as records: a bitcast on a TPU."""
        if self.layout is None:
            return tuple(map(self.state.of, state))
        return tuple(x.reshape(-1, self.width) for x in state)

    def arrays(self, records: State) -> State:
        """And back."""
        if self.layout is not None:
            return tuple(x.reshape(self.layout.shape) for x in records)
        if self.blocks == 1:
            return records
        tiles = (x.reshape(-1, self.blocks, TILE, LANES) for x in records)
        return tuple(x.transpose(0, 2, 1, 3).reshape(-1, self.dim) for x in tiles)

    def lay_out(self, grads: Grads, sources: Indices) -> tuple[jax.Array, Indices]:
        """Gradients as records, and which of them each occurrence adds; -1: none.

        Narrow rows come column by column from a TPU. Side by side in lines they are
        made by a plain transposition if the lines are filled one place after the other:
        the first place of all of them, then the second. In the order of the rows it
        takes XLA up to eight times as long, and a copy with 128 words for each row.
        """
        grads = grads.astype(jnp.float32)
        if self.width == LANES:
            return self.grads.of(grads), sources
        places = LANES // self.width
        lines = LANES * pl.cdiv(grads.shape[0], LANES * places)
        missing = self.width - self.dim, places * lines - grads.shape[0]
        columns = jnp.pad(grads.T, tuple((0, count) for count in missing))
        grads = jnp.concatenate(jnp.split(columns, places, axis=1)).T
        records = lax.rem(sources, lines) * places + lax.div(sources, lines)
        # Otherwise XLA makes one reshape of two, and leaves the transposition to it.
        grads = lax.optimization_barrier(grads).reshape(-1, self.width)
        return grads, jnp.where(sources < 0, sources, records)

    def plane_refs(self, refs: tuple[Any, ...]) -> list[Any]:
        """A ref for each plane; the same index means the same row in all of them."""
        if self.layout is None:
            return list(refs)
        (ref,) = refs
        step, size = self.blocks * self.state.rows, ref.shape[0]
        return [
            ref.at[pl.ds(plane * step, size - plane * step)]
            for plane in range(self.planes)
        ]

    def values(self, words: Words) -> Values:
        """Reads planes: float32 `w`, `m`, `v`."""
        if self.layout is not None:
            return self.layout.values(words)
        w, m, v = words
        return w, m, v

    def words(self, values: Values, noises: Noises, nearest: Pair) -> Words:
        """Writes planes, rounding as the dtypes and the noise say."""
        if self.layout is None:
            return values
        return self.layout.words(values, noises, nearest)


def tiled(width: int, blocks: int) -> Records:
    """Of a plain array; if it has more than 128 lanes it stands in tiles of 8 rows."""
    return Records(width, blocks, TILE if blocks > 1 else 1, blocks)
