"""Reading and writing rows in `jax.numpy`, in plain and in packed storage.

The two classes do the same on different arrays: `PlainRows` on the arrays of a table
and its slots, `PackedRows` on the one array of a `PackedLayout`. Rows are float32
values outside, `[n, D]` or `[n, 1]` of a slot that is per row; they are rounded to the
dtypes of the layout where they are written.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_adam._types import Indices
from sparse_adam.kernels import rounding
from sparse_adam.kernels.layout import Layout, Noises, PackedLayout, PlainLayout
from sparse_adam.kernels.spec import State
from sparse_adam.kernels.tiles import LANES
from sparse_adam.rules import Values


@runtime_checkable
class StoredRows(Protocol):
    """The rows of a state, to be read and written in `jax.numpy`.

    Attributes:
        num_rows: rows that there is room for.
        step: a slice begins and ends at a multiple of it.
    """

    @property
    def num_rows(self) -> int: ...
    @property
    def step(self) -> int: ...
    def gather(self, state: State, rows: Indices) -> Values:
        """Reads rows by number; one out of range reads some other row."""
        ...

    def scatter(
        self,
        state: State,
        rows: Indices,
        values: Values,
        noises: Noises,
        ascending: bool,
    ) -> State:
        """Writes distinct rows; those out of range are dropped."""
        ...

    def slice(self, state: State, start: jax.Array, size: int) -> Values:
        """Reads rows that stand one after the other."""
        ...

    def update_slice(
        self, state: State, start: jax.Array, values: Values, noises: Noises
    ) -> State:
        """Writes rows that stand one after the other."""
        ...

    def opened(self, state: State) -> State:
        """Returns the arrays as `slice` and `update_slice` take them."""
        ...

    def closed(self, state: State) -> State:
        """Returns opened arrays as they were."""
        ...


def rows_of(layout: Layout) -> StoredRows:
    """Returns the rows of a layout."""
    if isinstance(layout, PackedLayout):
        return PackedRows(layout)
    assert isinstance(layout, PlainLayout)
    return PlainRows(layout)


@dataclasses.dataclass(frozen=True, slots=True)
class PlainRows:
    """Rows of one array for the weights and one for each slot."""

    layout: PlainLayout

    step = 1

    @property
    def num_rows(self) -> int:
        """Returns V."""
        return self.layout.num_rows

    def gather(self, state: State, rows: Indices) -> Values:
        """Reads rows by number; one out of range reads some other row."""
        return tuple(_tile(x.at[rows].get(mode="clip")) for x in state)

    def scatter(
        self,
        state: State,
        rows: Indices,
        values: Values,
        noises: Noises,
        ascending: bool,
    ) -> State:
        """Writes distinct rows; those out of range are dropped."""
        return tuple(
            x.at[rows].set(
                new, mode="drop", unique_indices=True, indices_are_sorted=ascending
            )
            for x, new in zip(state, self._rounded(values, noises), strict=True)
        )

    def slice(self, state: State, start: jax.Array, size: int) -> Values:
        """Reads rows that stand one after the other."""
        blocks = (lax.dynamic_slice_in_dim(x, start, size) for x in state)
        return tuple(
            _tile(lax.bitcast_convert_type(x, dtype))
            for x, dtype in zip(blocks, self.layout.dtypes, strict=True)
        )

    def update_slice(
        self, state: State, start: jax.Array, values: Values, noises: Noises
    ) -> State:
        """Writes rows that stand one after the other."""
        return tuple(
            lax.dynamic_update_slice_in_dim(x, _as_words(new), start, 0)
            for x, new in zip(state, self._rounded(values, noises), strict=True)
        )

    def opened(self, state: State) -> State:
        """Returns the arrays as words: a slice of bfloat16 would convert all of it."""
        return tuple(map(_as_words, state))

    def closed(self, state: State) -> State:
        """Returns words as the arrays."""
        return tuple(
            lax.bitcast_convert_type(x, dtype)
            for x, dtype in zip(state, self.layout.dtypes, strict=True)
        )

    def _rounded(self, values: Values, noises: Noises) -> State:
        """Returns values in the dtypes and the shapes of the arrays."""
        rounded = (
            rounding.store(value, dtype, None if noises is None else noises[t])
            for t, (value, dtype) in enumerate(
                zip(values, self.layout.dtypes, strict=True)
            )
        )
        pairs = zip(rounded, self.layout.per_row, strict=True)
        return tuple(x[:, 0] if per_row else x for x, per_row in pairs)


def _tile(x: jax.Array) -> jax.Array:
    """Returns rows as float32 `[n, D]`, or `[n, 1]` where each is one number."""
    x = x.astype(jnp.float32)
    return x[:, None] if x.ndim == 1 else x


def _as_words(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


@dataclasses.dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of one array of lines."""

    layout: PackedLayout

    @property
    def num_rows(self) -> int:
        """Returns the rows that there is room for."""
        return self.layout.room

    @property
    def step(self) -> int:
        """Returns the rows of a group: a slice begins and ends with one."""
        return self.layout.rows_per_group

    def gather(self, state: State, rows: Indices) -> Values:
        """Reads rows by number; one out of range reads some other row."""
        planes = range(len(self.layout.planes))
        return self.layout.values(tuple(self.plane(state, rows, p) for p in planes))

    def plane(self, state: State, rows: Indices, plane: int) -> jax.Array:
        """Reads one plane of rows by number: int32 `[n, D]`."""
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
        self,
        state: State,
        rows: Indices,
        values: Values,
        noises: Noises,
        ascending: bool,
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

    def slice(self, state: State, start: jax.Array, size: int) -> Values:
        """Reads rows that stand one after the other, whole groups of them."""
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
        self, state: State, start: jax.Array, values: Values, noises: Noises
    ) -> State:
        """Writes rows that stand one after the other, whole groups of them."""
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
        """Returns the array, which is words already."""
        return state

    def closed(self, state: State) -> State:
        """Returns the array."""
        return state

    def _places(self, rows: Indices, planes: tuple[int, ...]) -> jax.Array:
        """Returns line and first lane of each line of these planes: `[n, lines, 2]`.

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


def row_noises(
    rows: Indices, seeds: jax.Array | None, layout: Layout
) -> tuple[jax.Array | None, ...] | None:
    """Returns random bits for the bfloat16 arrays of these rows, or None for none."""
    if seeds is None:
        return None
    columns = lax.iota(jnp.int32, layout.dim)[None]
    elements = rounding.element(rows[:, None], columns, layout.dim)
    return rounding.noises(seeds, elements, layout.dtypes)
