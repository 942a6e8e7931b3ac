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


def to_array(name: str, value: Any) -> Any:
    """Returns an array of NumPy or JAX for a tensor of another package.

    What NumPy and JAX know comes back as it is; None, too.

    Raises:
        TypeError: it has a dtype, but no way to convert it.
    """
    if isinstance(value, jax.Array | np.ndarray) or not hasattr(value, "dtype"):
        return value
    if isinstance(value.dtype, np.dtype):  # `jax.ShapeDtypeStruct`, NumPy's scalars
        return value
    for convert in (np.asarray, np.from_dlpack, jnp.from_dlpack):
        try:
            found = convert(value)
        except Exception:  # of another device, or it has a gradient: each says its own
            continue
        if found.dtype != object:  # as NumPy calls what it does not know
            return found
    raise TypeError(
        f"{name} is a {type(value).__name__} that NumPy and DLPack cannot convert: "
        "pass it detached and on the host, as a NumPy array"
    )


def integers(name: str, array: Any) -> tuple[int, ...]:
    """Returns the shape of an array of any integer dtype.

    Args:
        name: for messages: of an argument, such as `ids`, or words in the plural.
        array: to be checked.

    Raises:
        TypeError: it is of another dtype.
    """
    if array is None:
        raise TypeError(f"{name}=None must be an array of integers")
    dtype = getattr(array, "dtype", None) or np.asarray(array).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        way = "astype(jnp.int32)"
        if " " in name:
            raise TypeError(
                f"{name} have dtype={dtype}; it must be an integer dtype: pass .{way}"
            )
        way = f"{name}.{way}" if hasattr(array, way[:6]) else f"np.array({name}).{way}"
        raise TypeError(f"{name}.dtype={dtype} must be an integer dtype: pass {way}")
    return np.shape(array)


def check_rows(num_rows: int) -> None:
    """Refuses a table of more rows than int32 can number.

    Raises:
        ValueError: it has.
    """
    if num_rows >= 2**31:
        raise ValueError(
            f"V={num_rows} rows must be below 2**31, since ids are int32 in the "
            "lookup: split the table"
        )
