"""What slots begin with, and what the state of a table with more of them is called."""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sparse_adam.rules import Slot

# As those of `jax.nn.initializers`: `(key, shape, dtype) -> array`.
Initializer: TypeAlias = Callable[..., jax.Array]


def first_value(slot: Slot, table: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns what a slot begins with, spread over devices as the table is."""
    if slot.initial == "weights":
        return jnp.array(table, dtype, copy=True)
    if slot.per == "row":
        return jnp.full_like(table[:, 0], slot.initial, jnp.float32)
    return jnp.full_like(table, slot.initial, dtype)


def slot_initializer(
    slot: Slot, table: jax.Array, default_dtype: DTypeLike
) -> Initializer:
    """Returns an initializer of a slot: `(key, shape, dtype) -> array`."""

    def initialize(
        key: Any, shape: Sequence[int], dtype: DTypeLike = default_dtype
    ) -> jax.Array:
        del key
        if slot.initial == "weights":
            return jnp.array(table, dtype, copy=True)
        return jnp.full(shape, slot.initial, dtype)

    return initialize


@functools.cache
def with_ema(kind: Any) -> Any:
    """Returns the named tuple `kind` with one field more: one class for each."""
    named: Any = collections.namedtuple(
        f"{kind.__name__}WithEMA", (*kind._fields, "ema")
    )
    # No module has a name for this class, so pickle finds it by its kind.
    named.__reduce__ = lambda self: (_make, (kind, *self))
    return named


def _make(kind: Any, *values: Any) -> Any:
    return with_ema(kind)(*values)
