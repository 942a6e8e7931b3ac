"""Follow the regularized leader, with both penalties."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from sparse_adam._types import Rate, Tile
from sparse_adam.rules import numbers
from sparse_adam.rules.adagrad import check_accumulator
from sparse_adam.rules.rule import Slot, Values


@dataclasses.dataclass(frozen=True, slots=True)
class FTRLRule:
    r"""FTRL-proximal: weights are solved for, of sums of gradients and squares.

    With :math:`p` = -`learning_rate_power` and :math:`a' = a + G^2`:

    .. math::

        l &\leftarrow l + G - (a'^p - a^p)\, w / \eta \\
        w &\leftarrow (\mathrm{clip}(l, -l_1, l_1) - l)
            \,/\, ((a'^p + \beta) / \eta + 2 l_2) \\
        a &\leftarrow a'

    `multiply_linear_by_learning_rate` keeps :math:`\eta\, l` in place of :math:`l`, so
    that a changing rate does not rescale what is stored and a rate of 0 is finite.

    Args:
        learning_rate_power: 0 or less; -0.5 is Adagrad's root.
        l1_regularization_strength: :math:`l_1`, 0 or more.
        l2_regularization_strength: :math:`l_2`, 0 or more.
        beta: :math:`\beta`, 0 or more.
        initial_accumulator_value: what every :math:`a` begins with; > 0.
        multiply_linear_by_learning_rate: see above.

    Raises:
        ValueError: a number out of its range.

    Source: H. B. McMahan et al., "Ad click prediction: a view from the trenches"
    (2013); `tf.tpu.experimental.embedding.FTRL`.
    """

    learning_rate_power: float = -0.5
    l1_regularization_strength: float = 0.0
    l2_regularization_strength: float = 0.0
    beta: float = 0.0
    initial_accumulator_value: float = 0.1
    multiply_linear_by_learning_rate: bool = False

    def __post_init__(self) -> None:
        power = numbers.finite("learning_rate_power", self.learning_rate_power)
        if power > 0:
            raise ValueError(f"learning_rate_power={power} must be <= 0")
        not_negative = (
            *("l1_regularization_strength", "l2_regularization_strength"),
            "beta",
        )
        multiply = "multiply_linear_by_learning_rate"
        numbers.set_all(
            self,
            learning_rate_power=power,
            initial_accumulator_value=check_accumulator(self.initial_accumulator_value),
            **{x: numbers.at_least_zero(x, getattr(self, x)) for x in not_negative},
            **{multiply: numbers.flag(multiply, getattr(self, multiply))},
        )

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The sums of squares, and the linear terms."""
        return (
            Slot("accumulators", self.initial_accumulator_value),
            Slot("linears"),
        )

    def step(self, values: Values, gradient: Tile, rate: Rate) -> Values:
        """Returns new weights, sums and linear terms."""
        w, a, linear = values
        l1 = np.float32(self.l1_regularization_strength)
        twice_l2 = np.float32(2) * np.float32(self.l2_regularization_strength)
        beta = np.float32(self.beta)
        grown = a + gradient * gradient
        power = self._power(grown)
        pull = (power - self._power(a)) * w
        if self.multiply_linear_by_learning_rate:
            linear = linear + rate * gradient - pull
            bound = rate * l1
            curvature = power + rate * twice_l2 + beta
        else:
            linear = linear + gradient - pull / rate
            bound = l1
            curvature = (power + beta) / rate + twice_l2
        kept = jnp.minimum(jnp.maximum(linear, -bound), bound)
        return (kept - linear) / curvature, grown, linear

    def _power(self, x: Tile) -> Tile:
        """Returns `x**p` of positive numbers."""
        if self.learning_rate_power == -0.5:
            return jnp.sqrt(x)
        return jnp.exp(np.float32(-self.learning_rate_power) * jnp.log(x))
