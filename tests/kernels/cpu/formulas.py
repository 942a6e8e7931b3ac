"""Each rule's formula in NumPy and float64, with a bound on what float32 may lose.

They are written from the papers and from TensorFlow's and FBGEMM's documentation, not
from the package's rules.
"""

import dataclasses
from typing import Any

import numpy as np

from sparse_adam.rules import (
    AdagradMomentumRule,
    AdagradRule,
    AdamRule,
    FTRLRule,
    Limits,
    RowWiseAdagradRule,
    SGDRule,
)

ULP = 2.0**-23  # of a float32 of about 1


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The traced numbers of an update; None is one that does not count."""

    rate: float = 0.01
    decay: float | None = None
    scale: float | None = None


def step(
    rule: Any,
    limits: Limits,
    numbers: Numbers,
    values: list[np.ndarray],
    gradient: np.ndarray,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns new weights and slots of rows, and the error that each may have.

    Args:
        rule: which.
        limits: of gradients and weights.
        numbers: of the update.
        values: float64 `[R, D]` each, or `[R]` of a slot that is per row.
        gradient: float64 `[R, D]`, summed.
    """
    rate, decay, scale = (
        None if x is None else np.float64(np.float32(x))
        for x in dataclasses.astuple(numbers)
    )
    g = gradient if scale is None else scale * gradient
    g = np.clip(g, limits.gradient_min, limits.gradient_max)
    w, *slots = values
    decayed = w if decay is None else w - decay * w
    (new_w, *new), (step_error, *errors) = _step(rule, rate, decayed, slots, g)
    new_w = np.clip(new_w, limits.weight_min, limits.weight_max)
    error = step_error + np.abs(w) + np.abs(new_w)
    return [new_w, *new], [4 * ULP * x for x in (error, *errors)]


def _step(rule: Any, rate: Any, w: Any, slots: Any, g: Any) -> tuple[Any, Any]:
    """Returns the new values, and the magnitudes that errors are a few ULP of."""
    match rule:
        case SGDRule():
            return [w - rate * g], [np.abs(rate * g)]
        case AdamRule():
            return _adam(rule, rate, w, slots, g)
        case AdagradRule():
            a = slots[0] + g**2
            moved = rate * g / np.sqrt(a)
            return [w - moved, a], [np.abs(moved), a]
        case RowWiseAdagradRule():
            a = slots[0] + (g**2).mean(1)
            moved = rate * g / (np.sqrt(a) + single(rule.epsilon))[:, None]
            return [w - moved, a], [np.abs(moved), a]
        case AdagradMomentumRule():
            return _adagrad_momentum(rule, rate, w, slots, g)
        case FTRLRule():
            return _ftrl(rule, rate, w, slots, g)
    raise AssertionError(rule)


def _adam(rule: AdamRule, rate: Any, w: Any, slots: Any, g: Any) -> tuple[Any, Any]:
    beta_1, beta_2 = single(rule.beta_1), single(rule.beta_2)
    epsilon = single(rule.epsilon)
    m, v, *counts = slots
    size = np.abs(beta_1 * m) + np.abs((1 - beta_1) * g)
    m = beta_1 * m + (1 - beta_1) * g
    v = beta_2 * v + (1 - beta_2) * g**2
    counts = [count + 1 for count in counts]
    for count in counts:
        correction = np.sqrt(1 - beta_2**count) / (1 - beta_1**count)
        rate = rate * correction[:, None]
    root = np.sqrt(v + epsilon**2) if rule.sum_inside_sqrt else np.sqrt(v) + epsilon
    moved = rate / root
    zeros = [np.zeros_like(count) for count in counts]
    return [w - moved * m, m, v, *counts], [moved * size, size, v, *zeros]


def _adagrad_momentum(
    rule: AdagradMomentumRule, rate: Any, w: Any, slots: Any, g: Any
) -> tuple[Any, Any]:
    a, m = slots
    beta_2, momentum = single(rule.beta2), single(rule.momentum)
    a = a + g**2 if beta_2 == 1 else beta_2 * a + (1 - beta_2) * g**2
    scaled = (a + single(rule.epsilon)) ** (-1 / single(rule.exponent)) * g
    size = np.abs(momentum * m) + np.abs(scaled) * (1 + 1 / rule.exponent)
    m = momentum * m + scaled
    ahead, ahead_size = m, size
    if rule.use_nesterov:
        ahead, ahead_size = momentum * m + scaled, momentum * size + size
    return [w - rate * ahead, a, m], [rate * ahead_size, a, size]


def _ftrl(rule: FTRLRule, rate: Any, w: Any, slots: Any, g: Any) -> tuple[Any, Any]:
    a, linear = slots
    power, l1 = (
        -single(rule.learning_rate_power),
        single(rule.l1_regularization_strength),
    )
    l2, beta = single(rule.l2_regularization_strength), single(rule.beta)
    new_a = a + g**2
    new_p, old_p = new_a**power, a**power
    by = rate if rule.multiply_linear_by_learning_rate else 1.0
    pull = by * (new_p - old_p) / rate * w
    size = np.abs(linear) + np.abs(by * g)
    size = size + by * (1 + power) * (new_p + old_p) / rate * np.abs(w)
    linear = linear + by * g - pull
    curvature = by * ((new_p + beta) / rate + 2 * l2)
    new_w = (np.clip(linear, -by * l1, by * l1) - linear) / curvature
    return [new_w, new_a, linear], [(size + by * l1) / curvature, new_a, size]


def single(x: float) -> float:
    """Returns the float32 that the kernel is given."""
    return float(np.float32(x))
