"""Comparing what was computed with the reference, and how far off it may be.

A bound is no fixed tolerance. It is made, for each number, of float32 roundings: how
much the float64 update moves where all that goes into it moves by a unit in the last
place, and a unit of what goes in and comes out; four times that for each step of a
row. Sums of gradients are exact (`batches.py`), so nothing is allowed for them. Rows
that make no step must keep every bit.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from sparse_adam.rules import FTRLRule, UpdateRule

ULP = 2.0**-23  # of a float32 of about 1
ROUNDINGS = 4
SIGMAS = 6.0  # of a mean: one in 500 million is further off
# Takes a state and gradients in float64, and returns the new state.
Update: TypeAlias = Callable[[Any, Any], Sequence[np.ndarray]]


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison found.

    Attributes:
        error: of the number that comes nearest to its bound, or furthest beyond it.
        bound: of that number.
        fault: what is wrong first, in words; None where nothing is.
    """

    error: float = 0.0
    bound: float = 0.0
    fault: str | None = None

    @property
    def ratio(self) -> float:
        """The error in units of its bound."""
        return self.error / self.bound if self.bound else 0.0


def roundings(
    rule: UpdateRule, update: Update, state: Any, gradient: Any, rate: float
) -> tuple[Sequence[np.ndarray], list[np.ndarray]]:
    """Returns what `update(state, gradient)` gives, and how far roundings move it.

    That is how much the float64 update moves where its arguments move by a unit in
    the last place, in random directions, and a unit of what it is made of.
    """
    new = update(state, gradient)
    rng = np.random.default_rng(0)

    def nearby(x: Any) -> np.ndarray:
        return x * (1 + ULP * rng.choice([-1.0, 1.0], np.shape(x)))

    moved = [update(tuple(map(nearby, state)), nearby(gradient)) for _ in range(5)]
    bounds = []
    for index, value in enumerate(new):
        distance = np.max([np.abs(x[index] - value) for x in moved], axis=0)
        size = np.abs(value) + np.abs(state[index])
        bounds.append(distance + ULP * size)
    for index, slot in enumerate(rule.slots, start=1):
        if slot.name == "steps":  # a count is exact
            bounds[index] = np.zeros_like(new[index])
    if isinstance(rule, FTRLRule):
        # The powers of old and new sums are rounded before they are subtracted.
        power = new[1] ** -rule.learning_rate_power
        lost = 2 * ULP * power * np.abs(state[0])
        if not rule.multiply_linear_by_learning_rate:
            lost = lost / rate
        bounds[2] = bounds[2] + lost
        bounds[0] = bounds[0] + 2 * ULP * (np.abs(state[0]) + np.abs(new[0]))
    return new, bounds


def compare(
    name: str,
    new: np.ndarray,
    old: np.ndarray,
    expected: np.ndarray,
    bounds: np.ndarray,
    stepped: np.ndarray,
    *,
    stochastic: bool = False,
) -> Comparison:
    """Compares one array of a state with the reference.

    Args:
        name: of the array, for the words of a fault.
        new: what was computed, float32 or bfloat16.
        old: what it was before.
        expected: float64, the reference's.
        bounds: float64, how far off `new` may be, before it is rounded to bfloat16.
        stepped: bool `[V]`, the rows that make a step; the others keep their bits.
        stochastic: whether a bfloat16 `new` may be either neighbour of a number.
    """
    if (new.shape, new.dtype) != (old.shape, old.dtype):
        was, now = f"{old.dtype}{old.shape}", f"{new.dtype}{new.shape}"
        return Comparison(fault=f"{name} was {was} and came back as {now}")
    kept = ~stepped.reshape(-1, *[1] * (new.ndim - 1))
    changed = (_words(new) != _words(old)) & kept
    if changed.any():
        at = _first(changed)
        return Comparison(
            np.inf,
            0.0,
            f"{name}{list(at)} is of a row that is to keep its bits, and went from "
            f"{old[at]} to {new[at]}: {_rows(changed)}",
        )
    got = new.astype(np.float64)
    error = _before_rounding(new, expected, stochastic)
    same = (np.isnan(got) & np.isnan(expected)) | (error == 0) | kept
    ratio = np.where(same, 0, error / np.maximum(bounds, np.finfo(np.float64).tiny))
    ratio = np.nan_to_num(ratio, nan=np.inf)
    at = tuple(int(i) for i in np.unravel_index(ratio.argmax(), ratio.shape))
    if ratio[at] == 0:
        return Comparison()
    if ratio[at] <= 1:
        return Comparison(float(error[at]), float(bounds[at]))
    return Comparison(
        float(error[at]),
        float(bounds[at]),
        f"{name}{list(at)} went from {float(old[at]):.9g} to {float(got[at]):.9g} and "
        f"must be {float(expected[at]):.9g} +- {float(bounds[at]):.2g}: "
        f"{_rows(ratio > 1)}",
    )


def compare_bits(name: str, new: np.ndarray, expected: np.ndarray) -> Comparison:
    """Compares arrays that must be equal bit for bit."""
    if (new.shape, new.dtype) != (expected.shape, expected.dtype):
        must, is_ = (f"{x.dtype}{x.shape}" for x in (expected, new))
        return Comparison(fault=f"{name} is {is_} and must be {must}")
    wrong = _words(new) != _words(expected)
    if not wrong.any():
        return Comparison()
    at = _first(wrong)
    return Comparison(
        np.inf,
        0.0,
        f"{name}{list(at)} is {new[at]} and must be {expected[at]}: {_rows(wrong)}",
    )


def compare_mean(name: str, new: np.ndarray, expected: np.ndarray) -> Comparison:
    """Compares the mean of stochastic rounding with the number that was rounded.

    Args:
        name: of the array.
        new: bfloat16, the same number rounded many times.
        expected: float64, that number, in each place.
    """
    exact = float(expected.flat[0])
    near = new.dtype.type(exact)
    other = np.nextafter(
        near, new.dtype.type(np.inf if exact > float(near) else -np.inf)
    )
    low, high = sorted((float(near), float(other)))
    values = new.astype(np.float64)
    outside = (values != low) & (values != high)
    if outside.any():
        at = _first(outside)
        return Comparison(
            np.inf,
            0.0,
            f"{name}{list(at)} is {values[at]:.9g}, and {exact:.9g} rounds to {low:.9g}"
            f" or {high:.9g} only: {_rows(outside)}",
        )
    share = (exact - low) / (high - low)
    deviation = (high - low) * np.sqrt(share * (1 - share) / values.size)
    error, bound = abs(float(values.mean()) - exact), float(SIGMAS * deviation)
    if error <= bound:
        return Comparison(error, bound)
    fault = f"the mean of {name} is {values.mean():.9g}, and must be {exact:.9g}"
    return Comparison(
        error, bound, f"{fault} +- {bound:.2g} over {values.size} numbers"
    )


def _before_rounding(
    new: np.ndarray, expected: np.ndarray, stochastic: bool
) -> np.ndarray:
    """Returns how far off the numbers were, at least, that were rounded to `new`.

    Of float32 that is the distance to `new` itself. A bfloat16 number stands for all
    those that round to it: up to the middle between it and its neighbours, or, rounded
    stochastically, up to the neighbours.
    """
    got = new.astype(np.float64)
    if new.dtype != jnp.bfloat16:
        return np.abs(got - expected)
    infinity = new.dtype.type(np.inf)
    below, above = (
        np.nextafter(new, end).astype(np.float64) for end in (-infinity, infinity)
    )
    if not stochastic:
        below, above = (got + below) / 2, (got + above) / 2
    off = np.maximum(below - expected, expected - above)
    return np.maximum(off, 0)  # a NaN stays one


def _words(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def _first(wrong: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(wrong)[0])


def _rows(wrong: np.ndarray) -> str:
    rows = np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))
    listed = ", ".join(map(str, rows[:8])) + ", ..." * (len(rows) > 8)
    return f"{int(wrong.sum())} of {wrong.size} numbers are wrong, in rows {listed}"
