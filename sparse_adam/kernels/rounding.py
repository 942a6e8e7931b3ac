"""Rounding to bfloat16: to the nearest, or stochastically.

To the nearest, an update of less than half a unit in the last place is lost, every
time: 1/512 to 1/256 of the weight. Stochastic rounding goes up or down with the odds of
the distances, so that the mean over many updates is what float32 would have made.

The noise of an element depends on the seed of its array and on where in the table it
stands, and on nothing else: not on the implementation, its chunks or its threads. Same
key, same bits.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_LOW_HALF = np.int32(2**16 - 1)
_QUIET = np.int32(0x00400000)
# C. Wellons, "Prospecting for hash functions" (2018), lowbias32: of its kind the
# function of 32 bits with the least bias.
_MULTIPLIERS = (np.uint32(0x7FEB352D).view(np.int32), np.uint32(0x846CA68B).view("i4"))
_SHIFTS = (np.int32(16), np.int32(15), np.int32(16))


def element(rows: jax.Array, columns: jax.Array, dim: int) -> jax.Array:
    """The number of an element in its table, int32, modulo 2**32."""
    return rows * np.int32(dim) + columns


def noise(seed: jax.Array, elements: jax.Array) -> jax.Array:
    """32 random bits for each element: int32, of the elements' shape.

    seed: int32, a scalar or broadcast; elements: int32, from `element`.
    """
    x = elements ^ seed
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        x = (x ^ lax.shift_right_logical(x, shift)) * multiplier
    return x ^ lax.shift_right_logical(x, _SHIFTS[-1])


def noises(
    seeds: jax.Array, elements: jax.Array, dtypes: tuple[np.dtype, ...]
) -> tuple[jax.Array | None, ...]:
    """Returns random bits for each array of a state that is rounded: the bfloat16 ones.

    Args:
        seeds: one for each array, int32; an array, a vector or a ref.
        elements: the numbers of the elements, from `element`.
        dtypes: of the arrays.
    """
    return tuple(
        noise(seeds[t], elements) if dtype == jnp.bfloat16 else None
        for t, dtype in enumerate(dtypes)
    )


def round_to_bfloat16(x: jax.Array, noise: jax.Array | None = None) -> jax.Array:
    """The bits of `x` rounded, in the upper half of int32 words; the lower half is 0.

    Without noise to the nearest, ties to even. With it, up in magnitude with the
    probability that makes the mean exact. A NaN stays a NaN and infinity itself.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    half = np.int32(0x7FFF) + (
        lax.shift_right_logical(bits, np.int32(16)) & np.int32(1)
    )
    add = half if noise is None else noise & _LOW_HALF
    # What is added is less than a unit of the upper half, so infinity stays itself.
    return jnp.where(x != x, bits | _QUIET, bits + add) & ~_LOW_HALF


def store(x: jax.Array, dtype: np.dtype, noise: jax.Array | None = None) -> jax.Array:
    """Converts float32 to the dtype of a table, with noise stochastically."""
    if noise is None or dtype == np.float32:
        return x.astype(dtype)
    rounded = lax.bitcast_convert_type(round_to_bfloat16(x, noise), jnp.float32)
    return rounded.astype(dtype)
