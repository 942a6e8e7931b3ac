"""How weights and slots of a row lie together: packed in lines of 128 words.

A *line* is 128 words of 32 bits, one to a lane: 512 contiguous bytes on every TPU. Rows
of at most 64 lanes share a line, wider ones take several. The rows that share lines are
a *group*, and a group's lines stand together, so one DMA moves all that an update of
them needs.

Within a group, `w`, `m` and `v` of one weight stand in the same lane of different
*planes*: a plane is one line, or for a row of more than 128 lanes its lines one after
the other. So the update is elementwise, plane with plane, for every D. A float32 array
takes a plane of its own. Two bfloat16 arrays share the words of a plane; a third one
has a plane to itself, as the float32 of the same value.

For D = 32 in float32, four rows to a group of three lines:

    line 3g       w of row 4g | of 4g + 1 | of 4g + 2 | of 4g + 3
    line 3g + 1   m
    line 3g + 2   v
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_adam.kernels.rounding import round_to_bfloat16
from sparse_adam.kernels.tiles import LANES

MAX_DIM = 4096
_GRANULE = 8  # words: SparseCore moves no less
_TILE = 8  # lines that a TPU keeps together; it copies arrays that do not fill them
_HIGH_HALF = np.int32(-(2**16))
_FLOAT32 = np.dtype(np.float32)
_BFLOAT16 = np.dtype(jnp.bfloat16)

Words = tuple[jax.Array, ...]  # int32, one array for each plane
Values = tuple[jax.Array, jax.Array, jax.Array]  # float32: w, m, v
Noises = tuple[jax.Array | None, jax.Array | None, jax.Array | None]
Pair = Callable[[jax.Array, jax.Array], jax.Array]
NO_NOISE: Noises = (None, None, None)


@dataclasses.dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where each row of a packed table stands. Static and hashable.

    Attributes:
        num_rows: V.
        dim: D, 1 to 4096.
        table_dtype: of w; float32 or bfloat16, as the other two.
        momenta_dtype: of m.
        velocities_dtype: of v.
    """

    num_rows: int
    dim: int
    table_dtype: np.dtype = _FLOAT32
    momenta_dtype: np.dtype = _FLOAT32
    velocities_dtype: np.dtype = _FLOAT32

    @property
    def dtypes(self) -> tuple[np.dtype, np.dtype, np.dtype]:
        """Of w, m, v."""
        return self.table_dtype, self.momenta_dtype, self.velocities_dtype

    @property
    def stride(self) -> int:
        """Lanes from a row of a line to the next one.

        From D = 8 on a multiple of 32 bytes, so that each row can be moved alone.
        """
        if self.dim > LANES // 2:
            return LANES
        if self.dim < _GRANULE:
            return self.dim
        return _GRANULE * -(-self.dim // _GRANULE)

    @property
    def rows_per_group(self) -> int:
        """Rows that share lines."""
        return LANES // self.stride

    @property
    def blocks(self) -> int:
        """Lines of a plane: what 128 lanes at a time make of D."""
        return -(-self.dim // LANES)

    @property
    def planes(self) -> tuple[tuple[int, ...], ...]:
        """The arrays in each plane: 0 for w, 1 for m, 2 for v; of two, low half first.

        A plane of one bfloat16 array holds it as float32.
        """
        halves = [t for t, dtype in enumerate(self.dtypes) if dtype == _BFLOAT16]
        pair = tuple(halves[-2:]) if len(halves) >= 2 else ()
        alone = [(t,) for t in range(3) if t not in pair]
        return tuple(sorted([*alone, pair] if pair else alone))

    @property
    def lines_per_group(self) -> int:
        """Lines that one DMA moves."""
        return len(self.planes) * self.blocks

    @property
    def num_groups(self) -> int:
        """Groups, those that fill the last tile of lines included."""
        groups = -(-self.num_rows // self.rows_per_group)
        step = _TILE // math.gcd(_TILE, self.lines_per_group)
        return step * -(-groups // step)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the int32 array that holds it all."""
        return self.num_groups * self.lines_per_group, LANES

    @property
    def num_bytes(self) -> int:
        """Of that array."""
        return 4 * math.prod(self.shape)

    @property
    def waste(self) -> float:
        """Share of a group's bytes that hold no number of a row."""
        row = self.dim * sum(dtype.itemsize for dtype in self.dtypes)
        return 1 - self.rows_per_group * row / (4 * LANES * self.lines_per_group)

    def line(self, plane: int, block: int) -> int:
        """Where in a group this line stands."""
        return plane * self.blocks + block

    def values(self, words: Words) -> Values:
        """Reads planes: float32 `w`, `m`, `v` of the words' shape."""
        found: dict[int, jax.Array] = {}
        for arrays, word in zip(self.planes, words, strict=True):
            if len(arrays) == 2:
                low, high = lax.shift_left(word, np.int32(16)), word & _HIGH_HALF
                found |= {arrays[0]: _as_float(low), arrays[1]: _as_float(high)}
            else:
                found[arrays[0]] = _as_float(word)
        return found[0], found[1], found[2]

    def weights(self, word: jax.Array) -> jax.Array:
        """Reads w alone, in its dtype, from the words of its plane."""
        arrays = next(arrays for arrays in self.planes if 0 in arrays)
        if len(arrays) == 2:  # w comes first
            word = lax.shift_left(word, np.int32(16))
        return _as_float(word).astype(self.table_dtype)

    def words(
        self, values: Values, noises: Noises = NO_NOISE, nearest: Pair | None = None
    ) -> Words:
        """Writes planes: rounds each array to its own dtype, to the nearest without
        noise (`rounding.noise`), stochastically with it.

        nearest: rounds two bfloat16 arrays into the halves of words, the first one
            into the low half; where a machine has an instruction for that.
        """
        words = []
        for arrays in self.planes:
            *low, high = arrays  # a lower half without an array is 0
            if self.dtypes[high] == _FLOAT32:
                word = _as_words(values[high])
            elif nearest is not None and noises[high] is None:
                zero = jnp.zeros_like(values[high])
                word = nearest(values[low[0]] if low else zero, values[high])
            else:
                word = round_to_bfloat16(values[high], noises[high])
                for t in low:
                    rounded = round_to_bfloat16(values[t], noises[t])
                    word |= lax.shift_right_logical(rounded, np.int32(16))
            words.append(word)
        return tuple(words)


def _as_float(words: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(words, jnp.float32)


def _as_words(values: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(values, jnp.int32)
