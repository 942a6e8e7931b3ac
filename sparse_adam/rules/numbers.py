"""Checks of the numbers that a user passes. Every error names argument and value."""

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)


def flag(name: str, value: Any) -> bool:
    """Returns True or False; refuses what only looks like it."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}={value!r} must be True or False, known when tracing")
    return bool(value)


def number(name: str, value: Any) -> float:
    """Returns a Python float; refuses arrays and traced values."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} is traced; only learning_rate, weight_decay_factor and "
            "gradient_scale may be. Pass a Python number"
        )
    if not is_real(value) or np.shape(value) != ():
        raise TypeError(f"{name}={value!r} must be a number")
    return float(value)


def finite(name: str, value: Any) -> float:
    """Returns a Python float that is finite, and is so in float32."""
    x = number(name, value)
    if not math.isfinite(x):
        raise ValueError(f"{name}={x} must be finite")
    if abs(x) > LARGEST:
        raise ValueError(f"{name}={x} overflows float32: pass at most 3.4e38")
    return x


def set_all(rule: Any, **values: Any) -> None:
    """Sets fields of a frozen rule to the values that its checks returned.

    They are Python's own numbers then, so that rules of equal numbers are equal and a
    rule made of a NumPy or JAX scalar is hashable.
    """
    for name, value in values.items():
        object.__setattr__(rule, name, value)


def at_least_zero(name: str, value: Any) -> float:
    """Returns a finite Python float of 0 or more."""
    x = finite(name, value)
    if x < 0:
        raise ValueError(f"{name}={x} must be >= 0")
    return x


def is_real(value: Any) -> bool:
    """Tells whether a value is a real number, or an array of real numbers."""
    if isinstance(value, float | int):
        return not isinstance(value, bool)
    dtype = getattr(value, "dtype", np.dtype(bool))
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))


def scalar(name: str, value: Any) -> jax.Array:
    """Returns a float32 scalar of a number or an array of shape `()`, traced or not."""
    if callable(value):
        raise TypeError(
            f"{name}={value!r} is a callable: pass its value, {name}=schedule(step), "
            "so that it is not frozen when this is traced"
        )
    if not is_real(value):
        raise TypeError(f"{name}={value!r} must be a real number")
    if np.shape(value) != ():
        raise ValueError(
            f"{name} has shape {np.shape(value)} but one update has one: pass a scalar"
        )
    if isinstance(value, float | int | np.generic):
        finite(name, value)
    return jnp.asarray(value, jnp.float32)


def beta(name: str, value: Any) -> float:
    """Returns a decay rate, in [0, 1) also after rounding to float32."""
    rate = number(name, value)
    if not 0 <= rate < 1:
        raise ValueError(f"{name}={rate} must be >= 0 and < 1")
    if np.float32(rate) == 1:
        raise ValueError(f"{name}={rate} is 1 in float32: pass at most 0.9999999")
    return rate


def positive(name: str, value: Any, why: str) -> float:
    """Returns a positive, finite number that float32 can hold; `why` ends the error."""
    x = number(name, value)
    if not x > 0:
        raise ValueError(f"{name}={x} must be positive: {why}")
    if finite(name, x) < SMALLEST_NORMAL:
        raise ValueError(f"{name}={x} underflows float32: pass at least 1.2e-38")
    return x


def ordered(
    low_name: str, high_name: str, low: Any, high: Any
) -> tuple[float | None, float | None]:
    """Returns two bounds of which the first is not above the second; None is open."""
    bounds = []
    for name, value in ((low_name, low), (high_name, high)):
        bound = None if value is None else number(name, value)
        if bound is not None and math.isnan(bound):
            raise ValueError(f"{name}={bound} must be a number, or None for no bound")
        if bound is not None and LARGEST < abs(bound) < math.inf:
            raise ValueError(
                f"{name}={bound} overflows float32: pass None for no bound"
            )
        bounds.append(bound)
    low, high = bounds
    if low is not None and high is not None and low > high:
        raise ValueError(
            f"{low_name}={low} is above {high_name}={high}: exchange them, or pass "
            "None for an open side"
        )
    return low, high
