"""Reading and writing rows in `jax.numpy`, in plain and in packed storage.

The two classes do the same on different arrays: `Plain` on `[V, D]` table, momenta and
velocities, `Packed` on the one array of a `PackedLayout`. Rows are float32 `(w, m, v)`
outside; they are rounded to the dtypes of the storage where they are written.
"""

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_adam._types import Indices, Tile
from sparse_adam.kernels import rounding
from sparse_adam.kernels.layout import NO_NOISE, Noises, PackedLayout
from sparse_adam.kernels.problem import Problem, State
from sparse_adam.kernels.tiles import LANES

Rows: TypeAlias = tuple[Tile, Tile, Tile]  # w, m, v


@dataclasses.dataclass(frozen=True, slots=True)
class Plain:
    """Three arrays."""

    num_rows: int
    dtypes: tuple[np.dtype, np.dtype, np.dtype]
    step: int = 1  # a slice may begin at any row

    def gather(self, state: State, rows: Indices) -> Rows:
        """Rows by number; one out of range reads some other row."""
        w, m, v = (x.at[rows].get(mode="clip").astype(jnp.float32) for x in state)
        return w, m, v

    def scatter(
        self, state: State, rows: Indices, values: Rows, noises: Noises, ascending: bool
    ) -> State:
        """Writes distinct rows; those out of range are dropped."""
        return tuple(
            x.at[rows].set(
                rounding.store(value, x.dtype, noise),
                mode="drop",
                unique_indices=True,
                indices_are_sorted=ascending,
            )
            for x, value, noise in zip(state, values, noises, strict=True)
        )

    def slice(self, state: State, start: jax.Array, size: int) -> Rows:
        """Rows that stand one after the other."""
        blocks = (lax.dynamic_slice_in_dim(x, start, size) for x in state)
        w, m, v = (
            self._from_words(x, dtype)
            for x, dtype in zip(blocks, self.dtypes, strict=True)
        )
        return w, m, v

    def update_slice(
        self, state: State, start: jax.Array, values: Rows, noises: Noises
    ) -> State:
        """Writes such rows."""
        return tuple(
            lax.dynamic_update_slice_in_dim(
                x, self._to_words(rounding.store(value, dtype, noise)), start, 0
            )
            for x, dtype, value, noise in zip(
                state, self.dtypes, values, noises, strict=True
            )
        )

    def opened(self, state: State) -> State:
        """The arrays as `slice` and `update_slice` take them.

        As words, since on a CPU a slice of a bfloat16 table converts all of it.
        """
        return tuple(self._to_words(x) for x in state)

    def closed(self, state: State) -> State:
        """And back."""
        return tuple(
            lax.bitcast_convert_type(x, dtype)
            for x, dtype in zip(state, self.dtypes, strict=True)
        )

    @staticmethod
    def _to_words(x: jax.Array) -> jax.Array:
        if x.dtype != jnp.bfloat16:
            return x
        return lax.bitcast_convert_type(x, jnp.uint16)

    @staticmethod
    def _from_words(x: jax.Array, dtype: np.dtype) -> Tile:
        return lax.bitcast_convert_type(x, dtype).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class Packed:
    """One array of lines."""

    layout: PackedLayout

    @property
    def num_rows(self) -> int:
        """Rows that there is room for."""
        return self.layout.num_groups * self.layout.rows_per_group

    @property
    def step(self) -> int:
        """A slice begins and ends with a group."""
        return self.layout.rows_per_group

    def gather(self, state: State, rows: Indices) -> Rows:
        """Rows by number; one out of range reads some other row."""
        planes = range(len(self.layout.planes))
        return self.layout.values(tuple(self.plane(state, rows, p) for p in planes))

    def plane(self, state: State, rows: Indices, plane: int) -> jax.Array:
        """One plane of rows by number: int32 `[n, D]`."""
        layout = self.layout
        words = lax.gather(
            state[0],
            self._places(rows, (plane,)),
            lax.GatherDimensionNumbers(
                offset_dims=(2,), collapsed_slice_dims=(0,), start_index_map=(0, 1)
            ),
            slice_sizes=(1, layout.stride),
            mode="clip",
        )
        return words.reshape(rows.size, -1)[:, : layout.dim]

    def scatter(
        self, state: State, rows: Indices, values: Rows, noises: Noises, ascending: bool
    ) -> State:
        """Writes distinct rows; those out of range are dropped."""
        del ascending  # lines of neighbouring rows are not ascending
        layout = self.layout
        width = layout.blocks * layout.stride
        words = jnp.concatenate(
            [
                jnp.pad(x, ((0, 0), (0, width - layout.dim))).reshape(
                    -1, layout.blocks, layout.stride
                )
                for x in layout.words(values, noises)
            ],
            axis=1,
        )
        lines = lax.scatter(
            state[0],
            self._places(rows, tuple(range(len(layout.planes)))),
            words,
            lax.ScatterDimensionNumbers(
                update_window_dims=(2,),
                inserted_window_dims=(0,),
                scatter_dims_to_operand_dims=(0, 1),
            ),
            unique_indices=True,
            mode="drop",
        )
        return (lines,)

    def slice(self, state: State, start: jax.Array, size: int) -> Rows:
        """Rows that stand one after the other, whole groups of them."""
        layout = self.layout
        groups = size // layout.rows_per_group
        first = start // layout.rows_per_group * layout.lines_per_group
        lines = lax.dynamic_slice_in_dim(
            state[0], first, groups * layout.lines_per_group
        )
        planes = lines.reshape(groups, len(layout.planes), layout.blocks * LANES)
        used = layout.blocks * layout.stride * layout.rows_per_group
        width = layout.blocks * layout.stride
        words = (planes[:, p, :used] for p in range(len(layout.planes)))
        return layout.values(
            tuple(x.reshape(-1, width)[:, : layout.dim] for x in words)
        )

    def update_slice(
        self, state: State, start: jax.Array, values: Rows, noises: Noises
    ) -> State:
        """Writes such rows."""
        layout = self.layout
        width = layout.blocks * layout.stride
        unused = layout.blocks * LANES - width * layout.rows_per_group
        groups = values[0].shape[0] // layout.rows_per_group
        planes = []
        for x in layout.words(values, noises):
            x = jnp.pad(x, ((0, 0), (0, width - layout.dim))).reshape(groups, -1)
            planes.append(jnp.pad(x, ((0, 0), (0, unused))))
        lines = jnp.stack(planes, axis=1).reshape(-1, LANES)
        first = start // layout.rows_per_group * layout.lines_per_group
        return (lax.dynamic_update_slice_in_dim(state[0], lines, first, 0),)

    def opened(self, state: State) -> State:
        """The array as `slice` and `update_slice` take it."""
        return state

    def closed(self, state: State) -> State:
        """And back."""
        return state

    def _places(self, rows: Indices, planes: tuple[int, ...]) -> jax.Array:
        """Line and first lane of each line of these planes: `[n, lines, 2]`.

        Those of a row out of range are distinct lines behind the last one.
        """
        layout = self.layout
        count = len(planes) * layout.blocks
        group, place = jnp.divmod(rows, layout.rows_per_group)
        within = np.array(
            [layout.line(p, k) for p in planes for k in range(layout.blocks)], np.int32
        )
        line = group[:, None] * layout.lines_per_group + within[None]
        beyond = layout.shape[0] + lax.iota(jnp.int32, line.size).reshape(line.shape)
        inside = (rows >= 0) & (rows < layout.num_rows)
        line = jnp.where(inside[:, None], line, beyond)
        lane = jnp.broadcast_to((place * layout.stride)[:, None], (rows.size, count))
        return jnp.stack([line, lane], axis=-1)


def of(problem: Problem) -> Plain | Packed:
    """The storage of a problem's state."""
    if problem.packed:
        return Packed(problem.layout)
    return Plain(problem.num_rows, problem.dtypes)


def noises_of(
    rows: Indices, seeds: jax.Array | None, dim: int, dtypes: tuple[np.dtype, ...]
) -> Noises:
    """Random bits for the bfloat16 arrays of these rows, or none at all."""
    if seeds is None:
        return NO_NOISE
    columns = lax.iota(jnp.int32, dim)[None]
    elements = rounding.element(rows[:, None], columns, dim)
    w, m, v = (
        rounding.noise(seeds[t], elements) if dtype == jnp.bfloat16 else None
        for t, dtype in enumerate(dtypes)
    )
    return w, m, v
