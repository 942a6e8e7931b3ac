"""Sorting on one device: by a kernel on most TPUs, by XLA elsewhere.

Whatever belongs to an occurrence rides through the sort. On a TPU a gather of N scalars
costs five bundles a scalar, which is more than an update of a row on SparseCores; a
word more in a sort costs a fraction of one.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparse_adam.kernels import chips
from sparse_adam.kernels import sort as kernel
from sparse_adam.kernels.avoided import avoided
from sparse_adam.ops.late import late_primitive, no_gradient
from sparse_adam.ops.shards import vary_alike

_SHORT = 8192  # up to here XLA compiles a sort of one word in less time


def sort_pairs(
    keys: jax.Array,
    values: jax.Array,
    key_bound: int,
    value_bound: int,
    payload: Sequence[jax.Array] = (),
) -> tuple[jax.Array, ...]:
    """Sorts pairs of int32 by key, then value, and other arrays with them.

    One word holds a pair where its bits suffice, since a sort of words compiles and
    runs several times as fast as one of pairs.

    Args:
        keys: `[N]`, in `[0, key_bound)`.
        values: `[N]`, in `[0, value_bound)`.
        key_bound: above all keys.
        value_bound: above all values.
        payload: 32-bit arrays `[N]`, only with pairs that are distinct.

    Returns:
        The sorted keys, their values, and the payload in the same order.
    """
    bits = max(value_bound - 1, 1).bit_length()
    if bits + max(key_bound - 1, 1).bit_length() > 32:
        return _sort((keys, values, *payload), num_keys=2)
    words = (keys.astype(jnp.uint32) << bits) | values.astype(jnp.uint32)
    words, *payload = _sort((words, *payload), num_keys=1)
    mask = jnp.uint32(2**bits - 1)
    keys, values = (words >> bits).astype(jnp.int32), (words & mask).astype(jnp.int32)
    return keys, values, *payload


def in_order(
    platform: str | None, order: jax.Array, arrays: Sequence[jax.Array]
) -> Sequence[jax.Array]:
    """Returns `x[order]` of each array `[N]`, where `order` is a permutation.

    On a TPU two sorts cost a fraction of a gather.
    """
    if not arrays or platform != "tpu":
        return [x[order] for x in arrays]
    places = lax.iota(jnp.int32, order.size)
    _, inverse = sort_pairs(order, places, order.size, order.size)
    return _sort((inverse, *arrays), num_keys=1)[1:]


def _sort(words: tuple[jax.Array, ...], num_keys: int) -> tuple[jax.Array, ...]:
    return tuple(_sort_words(*vary_alike(words), num_keys=num_keys))


def _run(platform: str | None, *words: jax.Array, num_keys: int) -> Sequence[jax.Array]:
    """Sorts words `[..., N]` along their last axis."""
    *leading, size = words[0].shape
    short = len(words) == 1 and words[0].size <= _SHORT
    # XLA shares a sort among both cores of v4 and v5p; the kernel runs on one.
    by_xla = platform != "tpu" or short or chips.in_scope().cores > 1
    if by_xla or avoided("sort") or kernel.unsupported(words[0].shape, len(words)):
        return lax.sort(words, num_keys=num_keys, is_stable=False)
    found = kernel.sort([x.reshape(-1, size) for x in words], num_keys)
    return [x.reshape(*leading, size) for x in found]


def _results(*types: Any, num_keys: int) -> list[Any]:
    del num_keys
    return list(types)


def _over_tables(
    words: Any, axes: Any, *, num_keys: int
) -> tuple[Sequence[jax.Array], list[int]]:
    """Sorts the words of each table by themselves."""
    size = next(
        x.shape[axis] for x, axis in zip(words, axes, strict=True) if axis is not None
    )
    stacked = [
        jnp.broadcast_to(x, (size, *x.shape))
        if axis is None
        else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(words, axes, strict=True)
    ]
    return _sort_words(*stacked, num_keys=num_keys), [0] * len(stacked)


_sort_words = late_primitive(
    "sparse_sort",
    _run,
    _results,
    _over_tables,
    jvp=no_gradient("a sort of occurrences cannot be differentiated"),
)
