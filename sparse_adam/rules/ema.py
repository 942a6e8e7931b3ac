"""A moving average of the weights, beside any rule."""

import dataclasses

import jax
import numpy as np

from sparse_adam._types import Rate, Tile
from sparse_adam.rules import numbers
from sparse_adam.rules.catch_up import catches_up
from sparse_adam.rules.rule import Slot, UpdateRule, Values


@dataclasses.dataclass(frozen=True, slots=True)
class WithEMA:
    r"""Any rule, with an exponential moving average of the weights in one more slot.

    After each step of a row, and after its weights were clipped,

    .. math::

        e \leftarrow d\, e + (1 - d)\, w

    computed in float32 as :math:`e + (1 - d)(w - e)`, so that an average that is equal
    to its weights stays so. The slot `ema` begins as the weights of the table, as that
    of `tf.train.ExponentialMovingAverage` does, and so has no bias towards 0.

    Only rows that make a step are averaged: the average of a row is over the steps that
    *it* has made, about the last :math:`1 / (1 - d)` of them. A row that comes rarely
    keeps its average until it comes again, however long that takes; one that has made k
    steps still has :math:`d^k` of its first weights in it. So choose d by how many
    steps a row makes, not by how long the training is: with d = 0.999 a row of ten
    steps is served almost as it was made. Keep the slot in float32: a bfloat16 one
    loses updates of less than 1/512 of its size, unless rounding is stochastic.

    Args:
        rule: what a step computes.
        decay: d, in `[0, 1)`; 0 keeps the weights themselves.

    Raises:
        TypeError: `rule` is no rule, or `decay` is no number.
        ValueError: `decay` is out of its range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sparse_adam import sparse_update
        >>> from sparse_adam.rules import SGDRule, initial_slots
        >>> rule, table = WithEMA(SGDRule(), 0.75), jnp.ones((3, 1))
        >>> state = (table, *initial_slots(rule, table.shape, jnp.float32, table))
        >>> for _ in range(2):
        ...     state = sparse_update(
        ...         state, jnp.array([1]), jnp.ones((1, 1)), rule, learning_rate=1.0)
        >>> print(state[0].ravel(), state[1].ravel())
        [ 1. -1.  1.] [1.     0.3125 1.    ]

    Source: B. Polyak and A. Juditsky, "Acceleration of stochastic approximation by
    averaging" (1992); `tf.train.ExponentialMovingAverage`.
    """

    rule: UpdateRule
    decay: float

    def __post_init__(self) -> None:
        if not isinstance(self.rule, UpdateRule) or isinstance(self.rule, type):
            raise TypeError(f"rule={self.rule!r} must be an update rule, as AdamRule()")
        numbers.set_all(self, decay=numbers.beta("decay", self.decay))

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Those of the rule, then the average."""
        return (*self.rule.slots, Slot("ema", initial="weights"))

    @property
    def catch_up(self) -> bool:
        """Whether rows make up for missed steps, as the rule says."""
        return catches_up(self.rule)

    @property
    def share(self) -> np.float32:
        """Returns `1 - d`, formed in float32: what a step adds of the weights."""
        return np.float32(1) - np.float32(self.decay)

    def averaged(self, ema: jax.Array, weights: jax.Array) -> jax.Array:
        """Returns the average after a step that ended in these weights."""
        return ema + self.share * (weights - ema)

    def step(self, values: Values, gradient: Tile, rate: Rate) -> Values:
        """Returns what the rule makes of its values, and the new average."""
        *own, ema = values
        own = self.rule.step(tuple(own), gradient, rate)
        return (*own, self.averaged(ema, own[0]))
