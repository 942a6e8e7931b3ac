"""What TensorFlow wraps around every optimizer: clipping, decay, bounds of weights.

A step of a row, whatever its rule, is: scale and clip the gradient, make up for missed
steps if the rule does, decay the weights, make the rule's step, clip the weights.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sparse_adam._types import Rate, Tile
from sparse_adam.rules import numbers
from sparse_adam.rules.catch_up import caught_up
from sparse_adam.rules.ema import WithEMA
from sparse_adam.rules.rule import UpdateRule, Values


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of an update, static. A bound of None leaves that side open."""

    gradient_min: float | None = None
    gradient_max: float | None = None
    weight_min: float | None = None
    weight_max: float | None = None

    @classmethod
    def of(cls, clipvalue: Any, clip_weight_min: Any, clip_weight_max: Any) -> "Limits":
        """Checks the arguments of TensorFlow's optimizers.

        Raises:
            TypeError: a bound that is no number.
            ValueError: a NaN, or a lower bound above its upper one.
        """
        weights = numbers.ordered(
            "clip_weight_min", "clip_weight_max", clip_weight_min, clip_weight_max
        )
        return cls(*clip_bounds(clipvalue), *weights)


class StepNumbers(NamedTuple):
    """The traced numbers of an update: float32 scalars."""

    learning_rate: Rate
    decay: Rate | None = None  # share of the weights that each step takes; None is 0
    gradient_scale: Rate | None = None  # factor of each summed gradient; None is 1
    step: Rate | None = None  # the number of the step, from 1, if rows catch up


def step_tile(
    rule: UpdateRule,
    limits: Limits,
    values: Values,
    gradient: Tile,
    numbers: StepNumbers,
) -> Values:
    """Returns the new values of rows whose summed gradient is `gradient`.

    Every kernel and the portable XLA path call this function, so that a rule and what
    wraps it stand in one place. Everything is float32. A moving average is of the
    weights that all this ends in.
    """
    if isinstance(rule, WithEMA):
        *own, ema = values
        own = step_tile(rule.rule, limits, tuple(own), gradient, numbers)
        return (*own, rule.averaged(ema, own[0]))
    if numbers.gradient_scale is not None:
        gradient = numbers.gradient_scale * gradient
    gradient = clip(gradient, limits.gradient_min, limits.gradient_max)
    if numbers.step is not None:
        values = caught_up(rule, values, numbers.step, numbers.decay)
    w, *slots = values
    if numbers.decay is not None:
        w = w - numbers.decay * w
    w, *slots = rule.step((w, *slots), gradient, numbers.learning_rate)
    return (clip(w, limits.weight_min, limits.weight_max), *slots)


def clip(x: Tile, low: float | None, high: float | None) -> Tile:
    """Clips elementwise; a side that is None stays open and a NaN stays a NaN."""
    if low is not None:
        x = jnp.maximum(x, np.float32(low))
    if high is not None:
        x = jnp.minimum(x, np.float32(high))
    return x


def clip_bounds(clipvalue: Any) -> tuple[float | None, float | None]:
    """Returns the bounds that `clipvalue` means: of `x` they are `(-x, x)`.

    Raises:
        TypeError: it is neither a number nor a pair.
        ValueError: it is negative or NaN, or a pair whose first is above its second.
    """
    if clipvalue is None:
        return None, None
    if isinstance(clipvalue, list):
        raise TypeError(
            f"{clipvalue=} must be a number or a tuple (low, high): pass "
            f"clipvalue={tuple(clipvalue)!r}"
        )
    if isinstance(clipvalue, tuple):
        if len(clipvalue) != 2:
            raise ValueError(f"{clipvalue=} must be a number or a pair (low, high)")
        return numbers.ordered("clipvalue[0]", "clipvalue[1]", *clipvalue)
    x = numbers.number("clipvalue", clipvalue)
    if np.isnan(x) or x < 0:
        raise ValueError(f"{clipvalue=} must be >= 0, or a pair (low, high)")
    return numbers.ordered("-clipvalue", "clipvalue", -x, x)
