"""Integers: of any dtype from users, of 32 bits inside."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

_Function = TypeVar("_Function", bound=Callable[..., Any])


def in_32_bits(function: _Function) -> _Function:
    """Traces a function without `jax_enable_x64`, which a program may have set.

    With it a Python number that meets no array is 64 bits wide, and the kernels' rows,
    lanes and semaphores are counted in int32. What comes in must have 32 bits already.
    """

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return cast(_Function, traced)


def integers(name: str, array: Any) -> tuple[int, ...]:
    """Returns the shape of an array of any integer dtype.

    Raises:
        TypeError: it is of another dtype.
    """
    dtype = getattr(array, "dtype", None) or np.asarray(array).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"{name}.dtype={dtype} must be an integer dtype: pass "
            f"{name}.astype(jnp.int32)"
        )
    return np.shape(array)
