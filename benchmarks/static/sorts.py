"""Sorts of a plan, by the kernel and by XLA, to compile and count.

Each is a `build(rows, dim, ids)`; rows and the width of a row do not matter.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.static.program import Built

_Words = tuple[jax.Array, ...]


def _by_kernel(words: _Words, num_keys: int) -> _Words:
    from sparse_adam.kernels.sort import sort

    return tuple(x[0] for x in sort([x[None] for x in words], num_keys))


def _by_xla(words: _Words, num_keys: int) -> _Words:
    return tuple(lax.sort(words, num_keys=num_keys, is_stable=False))


def _sort(
    by: Callable[[_Words, int], _Words],
    num_keys: int,
    carried: int,
    rows: int,
    dim: int,
    ids: int,
) -> Built:
    del rows, dim
    key = jnp.uint32 if num_keys == 1 else jnp.int32
    dtypes = (*(key for _ in range(num_keys)), *(jnp.int32 for _ in range(carried)))
    words = tuple(jax.ShapeDtypeStruct((ids,), dtype) for dtype in dtypes)
    return lambda *words: by(words, num_keys), words, ()


kernel_word = partial(_sort, _by_kernel, 1, 0)
kernel_word_with_two = partial(_sort, _by_kernel, 1, 2)
kernel_pairs = partial(_sort, _by_kernel, 2, 0)
kernel_pairs_with_two = partial(_sort, _by_kernel, 2, 2)
xla_word = partial(_sort, _by_xla, 1, 0)
xla_word_with_two = partial(_sort, _by_xla, 1, 2)
xla_pairs = partial(_sort, _by_xla, 2, 0)
xla_pairs_with_two = partial(_sort, _by_xla, 2, 2)
