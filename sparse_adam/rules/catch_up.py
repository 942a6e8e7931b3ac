"""Rows that come back: what a rule makes up for before the next step of a row.

A lazy update does nothing to a row that is not in a batch. Under a dense optimizer such
a row makes a step with the gradient 0: its moments and its weights decay. A rule that
catches up keeps the number of the last step of each row in a slot, is given the number
of this one, and makes the decay of all steps between in closed form.
"""

from typing import Protocol, cast

import jax.numpy as jnp
import numpy as np

from sparse_adam._types import Rate, Tile
from sparse_adam.rules.rule import UpdateRule, Values

_LEAST_LOG = np.float32(-1e4)  # whose exponential is 0


class CatchUpRule(UpdateRule, Protocol):
    """An update rule with rows that catch up, where its `catch_up` is True."""

    @property
    def catch_up(self) -> bool:
        """Whether rows catch up."""
        ...

    def caught_up(self, values: Values, step: Rate, decay: Rate | None) -> Values:
        """Returns the values of a tile of rows as they are just before a step.

        Args:
            values: as of `UpdateRule.step`.
            step: float32 `[]`: the number of the step to be made, from 1.
            decay: float32 `[]`: the share of the weights that each step takes; None
                is 0.
        """
        ...


def catches_up(rule: UpdateRule) -> bool:
    """Tells whether rows catch up by this rule, which then needs the step's number."""
    return getattr(rule, "catch_up", False) is True


def caught_up(
    rule: UpdateRule, values: Values, step: Rate, decay: Rate | None
) -> Values:
    """Returns what the rule's own function of this name does."""
    return cast(CatchUpRule, rule).caught_up(values, step, decay)


def power(log_base: float, exponents: Tile) -> Tile:
    """Returns a constant to powers of 0 or more; `log_base` is its logarithm."""
    return jnp.exp(np.float32(max(log_base, float(_LEAST_LOG))) * exponents)


def kept(decay: Rate, steps: Tile) -> Tile:
    """Returns `(1 - decay)**steps`, exact where `decay` is small; 0 if it is 1."""
    # A tile, since kernels have logarithms of those only.
    left = jnp.log1p(jnp.zeros_like(steps) - decay)
    return jnp.exp(jnp.maximum(left, _LEAST_LOG) * steps)
