"""Sorting words with their payload, on one TPU TensorCore.

Why: XLA's sort of several arrays compiles for minutes where they are long, and issues
about twice the bundles of this one.

Data flow: all words stay in VMEM. A bitonic network sorts blocks of 2, 4, 8, ... words:
to sort a block of 2**k, words whose indices differ in bit k - 1, then k - 2, ... then
bit 0 are compared, and exchanged where they stand in the wrong order. The order of a
block is descending where bit k of its indices is set.

The lowest bits are compared most often, so they are the number of the vector register,
where a comparison moves nothing. Only the ten highest bits are places in a register.

Limits: equal keys lose payload, so keys must be distinct.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Ref
from sparse_adam.kernels.chips import VMEM_BUDGET
from sparse_adam.kernels.tiles import LANES, SUBLANES

_TILE = SUBLANES * LANES
_HELD_BITS = 3  # log2 of the registers of each word that are held at a time
_SIGN = np.int32(-(2**31))

Words = tuple[jax.Array, ...]


def unsupported(shape: Sequence[int], num_words: int) -> str | None:
    """Says why this kernel does not sort words, or returns None when it does.

    Args:
        shape: of each word, `[..., N]`.
        num_words: the keys and the payload.
    """
    *leading, size = shape
    if size <= _TILE:
        return f"{size} words fill no more than one vector register"
    # In and out; and of several rows, the next one in and the last one out.
    buffers = 2 if math.prod(leading) == 1 else 4
    num_bytes = 4 * num_words * buffers * _padded(size)
    if num_bytes > VMEM_BUDGET:
        return f"the words take {num_bytes} bytes of vector memory"
    return None


def sort(
    words: Sequence[jax.Array], num_keys: int, *, interpret: bool = False
) -> Words:
    """Sorts each row of 32-bit words `[T, N]` by the first `num_keys` of them.

    Args:
        words: the keys, then the payload. Keys are int32 or uint32, the first of them
            below the largest if N is not a power of two. With a payload, no two places
            of a row have the same keys.
        num_keys: how many of them are keys.
        interpret: whether to run in Pallas' interpreter.
    """
    tables, size = words[0].shape
    padded = _padded(size)
    shape = (tables, padded // _TILE, SUBLANES, LANES)

    def tiles(x: jax.Array, fill: int) -> jax.Array:
        if x.dtype != jnp.int32:
            x = lax.bitcast_convert_type(x, jnp.int32) ^ _flipped(x)
        x = jnp.pad(x, ((0, 0), (0, padded - size)), constant_values=fill)
        return x.reshape(shape)

    def row(x: jax.Array, like: jax.Array) -> jax.Array:
        # The number of the register is the lowest part of an index, then the sublane.
        x = x.transpose(0, 3, 2, 1).reshape(tables, padded)[:, :size]
        if like.dtype == jnp.int32:
            return x
        return lax.bitcast_convert_type(x ^ _flipped(like), like.dtype)

    block = pl.BlockSpec((None, *shape[1:]), lambda table: (table, 0, 0, 0))
    fills = [np.iinfo(np.int32).max, *(0 for _ in words[1:])]
    found = pl.pallas_call(
        functools.partial(_kernel, num_keys=num_keys),
        name="sparse_adam_sort",
        grid=(tables,),
        in_specs=[block for _ in words],
        out_specs=[block for _ in words],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.int32) for _ in words],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), disable_bounds_checks=True
        ),
        interpret=interpret,
    )(*map(tiles, words, fills))
    return tuple(map(row, found, words))


def _flipped(x: jax.Array) -> np.int32:
    """Returns the bits to flip so that signed integers compare as the words did."""
    return _SIGN if x.dtype == jnp.uint32 else np.int32(0)


def _padded(size: int) -> int:
    """Returns the words of a row that is filled up to a power of two."""
    return max(2 * _TILE, 1 << (size - 1).bit_length())


def _kernel(*refs: Ref, num_keys: int) -> None:
    count = len(refs) // 2
    source, words = refs[:count], refs[count:]
    register_bits = (words[0].shape[0] - 1).bit_length()
    all_bits = register_bits + (_TILE - 1).bit_length()
    for bits in range(1, all_bits + 1):
        _sort_blocks(source, words, bits, register_bits, all_bits, num_keys)
        source = words


def _sort_blocks(
    source: Sequence[Ref],
    words: Sequence[Ref],
    bits: int,
    register_bits: int,
    all_bits: int,
    num_keys: int,
) -> None:
    """Sorts blocks of `2**bits` words, of which both halves are sorted."""
    place = _place()
    end = min(bits, register_bits)
    within = range(bits - 1, register_bits - 1, -1)
    while end > 0:
        begin = max(0, end - _HELD_BITS)

        def step(
            i: jax.Array,
            _: None,
            source: Sequence[Ref] = source,
            within: Sequence[int] = within,
            begin: int = begin,
            end: int = end,
        ) -> None:
            first = ((i >> begin) << end) + (i & ((1 << begin) - 1))
            registers = pl.ds(first, 1 << (end - begin), 1 << begin)
            held = tuple(ref[registers] for ref in source)
            descending = None
            if bits < register_bits:
                descending = jnp.full(place.shape, first) & (1 << bits) != 0
            elif bits < all_bits:
                descending = place & (1 << (bits - register_bits)) != 0
            for bit in within:
                held = _exchange_within(
                    held, place, bit - register_bits, descending, num_keys
                )
            for bit in range(end - begin - 1, -1, -1):
                held = _exchange(held, bit, descending, num_keys)
            for ref, x in zip(words, held, strict=True):
                ref[registers] = x

        lax.fori_loop(0, words[0].shape[0] >> (end - begin), step, None)
        source, within, end = words, range(0), begin


def _place() -> jax.Array:
    """Returns the upper part of each index, `[1, 8, 128]`: the lane, the sublane."""
    shape = (1, SUBLANES, LANES)
    lane = lax.broadcasted_iota(jnp.int32, shape, 2)
    return lane * SUBLANES + lax.broadcasted_iota(jnp.int32, shape, 1)


def _exchange(
    words: Words, bit: int, descending: jax.Array | None, num_keys: int
) -> Words:
    """Brings words in order with those whose register differs in a bit."""
    shape = (-1, 2, 1 << bit, SUBLANES, LANES)
    first = tuple(x.reshape(shape)[:, 0] for x in words)
    second = tuple(x.reshape(shape)[:, 1] for x in words)
    wrong = _less(second[:num_keys], first[:num_keys])
    if descending is not None:
        wrong ^= descending[None]
    return tuple(
        jnp.stack((jnp.where(wrong, y, x), jnp.where(wrong, x, y)), axis=1).reshape(
            -1, SUBLANES, LANES
        )
        for x, y in zip(first, second, strict=True)
    )


def _exchange_within(
    words: Words,
    place: jax.Array,
    bit: int,
    descending: jax.Array | None,
    num_keys: int,
) -> Words:
    """Brings words in order with those whose place differs in a bit."""
    sublane_bits = (SUBLANES - 1).bit_length()
    upper = place & (1 << bit) != 0

    def other(x: jax.Array) -> jax.Array:
        if bit >= sublane_bits:
            rows = x.reshape(-1, LANES)
            lane = lax.broadcasted_iota(jnp.int32, rows.shape, 1)
            index = lane ^ (1 << (bit - sublane_bits))
            found = jnp.take_along_axis(rows, index, axis=1, mode="promise_in_bounds")
            return found.reshape(x.shape)
        below = pltpu.roll(x, 1 << bit, 1)
        if 2 << bit == SUBLANES:
            return below
        return jnp.where(upper, below, pltpu.roll(x, SUBLANES - (1 << bit), 1))

    others = tuple(map(other, words))
    larger = upper if descending is None else upper ^ descending
    taken = _less(others[:num_keys], words[:num_keys]) ^ larger
    return tuple(jnp.where(taken, y, x) for x, y in zip(words, others, strict=True))


def _less(first: Words, second: Words) -> jax.Array:
    """Compares words lexicographically."""
    less = first[-1] < second[-1]
    for x, y in zip(first[-2::-1], second[-2::-1], strict=True):
        less = (x < y) | ((x == y) & less)
    return less
