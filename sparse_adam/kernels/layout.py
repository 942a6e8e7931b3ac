"""Where the weights and slots of each row stand: in plain arrays, or packed in lines.

Both layouts answer the same questions, so that a kernel need not ask which one it has.

Plain storage is one array for the weights and one for each slot, `[V, D]`, or `[V]` of
a slot that has one number for each row.

Packed storage is one int32 array of *lines*. A line is 128 words of 32 bits, one to a
lane: 512 contiguous bytes on every TPU. Rows of at most 64 lanes share a line, wider
ones take several. The rows that share lines are a *group*, and a group's lines stand
together, so that one DMA moves all that an update of them needs. A plain row is a group
of its own.

Within a packed group, the numbers of one weight stand in the same lane of different
*planes*: a plane is one line, or for a row of more than 128 lanes its lines one after
the other. So the update is elementwise, plane with plane, for every D. A float32 array
takes a plane of its own. Two bfloat16 arrays share the words of a plane; an odd one has
a plane to itself, as the float32 of the same value.

For Adam and D = 32 in float32, four rows to a group of three lines:

    line 3g       w of row 4g | of 4g + 1 | of 4g + 2 | of 4g + 3
    line 3g + 1   m
    line 3g + 2   v
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_adam.kernels.rounding import round_to_bfloat16
from sparse_adam.kernels.tiles import LANES, SUBLANES
from sparse_adam.rules import Values

MAX_DIM = 4096
_GRANULE = 8  # words: SparseCore moves no less
_HIGH_HALF = np.int32(-(2**16))
FLOAT32 = np.dtype(np.float32)
BFLOAT16 = np.dtype(jnp.bfloat16)
Dtypes: TypeAlias = tuple[np.dtype, ...]

PlaneWords: TypeAlias = tuple[jax.Array, ...]  # one array for each plane
Noises: TypeAlias = tuple[jax.Array | None, ...] | None  # one for each array; or none
RoundPair: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


@runtime_checkable
class Layout(Protocol):
    """Where each row of a table and its slots stands. Static and hashable.

    Attributes:
        num_rows: V.
        dim: D.
        dtypes: of the weights and of each slot, float32 or bfloat16.
        per_row: for each of these arrays, whether it has one number for each row.
    """

    @property
    def num_rows(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def dtypes(self) -> Dtypes: ...
    @property
    def per_row(self) -> tuple[bool, ...]: ...
    @property
    def storage(self) -> str:
        """Returns "plain" or "packed", for messages."""
        ...

    @property
    def stride(self) -> int:
        """Returns the lanes from a row of a group to the next one."""
        ...

    @property
    def rows_per_group(self) -> int:
        """Returns how many rows share lines."""
        ...

    @property
    def lines_per_group(self) -> int:
        """Returns the lines, or plain rows, of each array that a group takes."""
        ...

    @property
    def num_groups(self) -> int:
        """Returns the groups, those included that fill the last tile of memory."""
        ...

    @property
    def blocks(self) -> int:
        """Returns how many times 128 lanes a row takes."""
        ...

    @property
    def planes(self) -> tuple[tuple[int, ...], ...]:
        """Returns which arrays each plane holds."""
        ...

    @property
    def room(self) -> int:
        """Returns the rows from one table to the next, where several are one."""
        ...

    @property
    def group_bytes(self) -> int:
        """Returns the bytes of a group, of all arrays."""
        ...

    @property
    def num_bytes(self) -> int:
        """Returns the bytes of the whole state."""
        ...

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns the arrays that hold it all."""
        ...

    def with_rows(self, num_rows: int) -> "Layout":
        """Returns the layout of a table with other rows of the same kind."""
        ...

    def divided(self, count: int) -> "Layout":
        """Returns the layout of each of `count` equal parts of the rows."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class PlainLayout:
    """One array for the weights and one for each slot."""

    num_rows: int
    dim: int
    dtypes: Dtypes
    per_row: tuple[bool, ...]

    storage = "plain"
    rows_per_group = 1
    lines_per_group = 1
    weight_plane = 0

    @classmethod
    def of_weights(cls, table: jax.Array) -> "PlainLayout":
        """Returns the layout of a table `[V, D]` without slots."""
        num_rows, dim = table.shape
        return cls(num_rows, dim, (np.dtype(table.dtype),), (False,))

    @property
    def stride(self) -> int:
        """Returns D: a row stands alone."""
        return self.dim

    @property
    def num_groups(self) -> int:
        """Returns the rows that a TPU keeps room for: it stores and moves tiles."""
        return SUBLANES * -(-self.num_rows // SUBLANES)

    @property
    def blocks(self) -> int:
        """Returns how many times 128 lanes a row takes."""
        return -(-self.dim // LANES)

    @property
    def planes(self) -> tuple[tuple[int, ...], ...]:
        """Returns a plane for each array that has a number for each weight."""
        return tuple((t,) for t, per_row in enumerate(self.per_row) if not per_row)

    @property
    def room(self) -> int:
        """Returns V: tables stand side by side."""
        return self.num_rows

    @property
    def group_bytes(self) -> int:
        """Returns the bytes of a row, of all arrays."""
        pairs = zip(self.dtypes, self.per_row, strict=True)
        return sum(d.itemsize * (1 if per_row else self.dim) for d, per_row in pairs)

    @property
    def num_bytes(self) -> int:
        """Returns the bytes of all arrays."""
        return self.num_rows * self.group_bytes

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns the arrays: `[V, D]` each, or `[V]`."""
        whole, alone = (self.num_rows, self.dim), (self.num_rows,)
        pairs = zip(self.dtypes, self.per_row, strict=True)
        return tuple(jax.ShapeDtypeStruct(alone if p else whole, d) for d, p in pairs)

    def with_rows(self, num_rows: int) -> "PlainLayout":
        """Returns the layout of a table with other rows of the same kind."""
        return dataclasses.replace(self, num_rows=num_rows)

    def divided(self, count: int) -> "PlainLayout":
        """Returns the layout of each of `count` equal parts of the rows.

        Raises:
            ValueError: the parts would not be equal.
        """
        if self.num_rows % count:
            raise ValueError(
                f"table.shape[0]={self.num_rows} rows do not make {count} equal parts: "
                f"V must be a multiple of {count}"
            )
        return self.with_rows(self.num_rows // count)


@dataclasses.dataclass(frozen=True, slots=True)
class PackedLayout:
    """One int32 array of lines that hold the weights and all slots.

    Attributes:
        num_rows: V.
        dim: D, 1 to 4096.
        dtypes: of the weights and of each slot; float32 or bfloat16.
    """

    num_rows: int
    dim: int
    dtypes: Dtypes = (FLOAT32,) * 3

    storage = "packed"

    @property
    def per_row(self) -> tuple[bool, ...]:
        """Returns False for each array: lines hold one number for each weight."""
        return (False,) * len(self.dtypes)

    @property
    def stride(self) -> int:
        """Returns the lanes from a row of a line to the next one.

        From D = 8 on a multiple of 32 bytes, so that each row can be moved alone.
        """
        if self.dim > LANES // 2:
            return LANES
        if self.dim < _GRANULE:
            return self.dim
        return _GRANULE * -(-self.dim // _GRANULE)

    @property
    def rows_per_group(self) -> int:
        """Returns how many rows share lines."""
        return LANES // self.stride

    @property
    def blocks(self) -> int:
        """Returns the lines of a plane: what 128 lanes at a time make of D."""
        return -(-self.dim // LANES)

    @property
    def planes(self) -> tuple[tuple[int, ...], ...]:
        """Returns the arrays in each plane by number; of two, the low half first.

        A plane of one bfloat16 array holds it as float32.
        """
        halves = [t for t, dtype in enumerate(self.dtypes) if dtype == BFLOAT16]
        halves = halves[len(halves) % 2 :]
        pairs = list(zip(halves[::2], halves[1::2], strict=True))
        paired = set(halves)
        alone = [(t,) for t in range(len(self.dtypes)) if t not in paired]
        return tuple(sorted([*alone, *pairs]))

    @property
    def lines_per_group(self) -> int:
        """Returns the lines that one DMA moves."""
        return len(self.planes) * self.blocks

    @property
    def num_groups(self) -> int:
        """Returns the groups, those that fill the last tile of lines included."""
        groups = -(-self.num_rows // self.rows_per_group)
        step = SUBLANES // math.gcd(SUBLANES, self.lines_per_group)
        return step * -(-groups // step)

    @property
    def room(self) -> int:
        """Returns the rows that there is room for."""
        return self.num_groups * self.rows_per_group

    @property
    def shape(self) -> tuple[int, int]:
        """Returns the shape of the int32 array that holds it all."""
        return self.num_groups * self.lines_per_group, LANES

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns the one int32 array of lines that holds it all."""
        return (jax.ShapeDtypeStruct(self.shape, jnp.int32),)

    @property
    def group_bytes(self) -> int:
        """Returns the bytes of a group's lines."""
        return 4 * LANES * self.lines_per_group

    @property
    def num_bytes(self) -> int:
        """Returns the bytes of the array."""
        return 4 * math.prod(self.shape)

    @property
    def waste(self) -> float:
        """Returns the share of a group's bytes that hold no number of a row."""
        row = self.dim * sum(dtype.itemsize for dtype in self.dtypes)
        return 1 - self.rows_per_group * row / self.group_bytes

    def line(self, plane: int, block: int) -> int:
        """Returns where in a group this line stands."""
        return plane * self.blocks + block

    @property
    def weight_plane(self) -> int:
        """Returns the number of the plane that holds the weights."""
        return next(p for p, arrays in enumerate(self.planes) if 0 in arrays)

    def with_rows(self, num_rows: int) -> "PackedLayout":
        """Returns the layout of a table with other rows of the same kind."""
        return dataclasses.replace(self, num_rows=num_rows)

    def divided(self, count: int) -> "PackedLayout":
        """Returns the layout of each of `count` equal parts of the lines.

        Raises:
            ValueError: a part would be no table of whole tiles.
        """
        own = self.with_rows(self.num_rows // count)
        alike = count * own.num_rows == self.num_rows
        if count > 1 and not (alike and own.room == own.num_rows):
            least = count * self.with_rows(1).room
            raise ValueError(
                f"V={self.num_rows} rows of D={self.dim} do not make {count} packed "
                f"tables of whole tiles: V must be a multiple of {least}"
            )
        return own

    def values(self, words: PlaneWords) -> Values:
        """Reads planes: float32 values of the words' shape, one for each array."""
        found: dict[int, jax.Array] = {}
        for arrays, word in zip(self.planes, words, strict=True):
            if len(arrays) == 2:
                low, high = lax.shift_left(word, np.int32(16)), word & _HIGH_HALF
                found |= {arrays[0]: _as_float(low), arrays[1]: _as_float(high)}
            else:
                found[arrays[0]] = _as_float(word)
        return tuple(found[t] for t in range(len(self.dtypes)))

    def weights(self, word: jax.Array, dtype: Any = None) -> jax.Array:
        """Reads the weights alone, in their dtype or this, from their plane's words."""
        arrays = self.planes[self.weight_plane]
        if len(arrays) == 2:  # the weights come first
            word = lax.shift_left(word, np.int32(16))
        return _as_float(word).astype(dtype or self.dtypes[0])

    def words(
        self,
        values: Values,
        noises: Noises = None,
        round_pair: RoundPair | None = None,
    ) -> PlaneWords:
        """Writes planes, rounding each array to its own dtype.

        Args:
            values: float32, one for each array.
            noises: random bits for the arrays that are rounded stochastically; None
                rounds to the nearest.
            round_pair: rounds two arrays to the nearest bfloat16, into the halves of
                words, the first into the low half, where a machine has an instruction
                for that.
        """
        words = []
        for arrays in self.planes:
            *low, high = arrays  # a lower half without an array is 0
            noise = None if noises is None else noises[high]
            if self.dtypes[high] == FLOAT32:
                word = lax.bitcast_convert_type(values[high], jnp.int32)
            elif round_pair is not None and noise is None:
                zero = jnp.zeros_like(values[high])
                word = round_pair(values[low[0]] if low else zero, values[high])
            else:
                word = round_to_bfloat16(values[high], noise)
                for t in low:
                    noise = None if noises is None else noises[t]
                    rounded = round_to_bfloat16(values[t], noise)
                    word |= lax.shift_right_logical(rounded, np.int32(16))
            words.append(word)
        return tuple(words)


def _as_float(words: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(words, jnp.float32)
