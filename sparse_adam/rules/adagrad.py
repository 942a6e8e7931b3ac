"""Adagrad: by element, with momentum, and with one number for each row."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_adam._types import Rate, Tile
from sparse_adam.rules import numbers
from sparse_adam.rules.rule import Slot, Values


@dataclasses.dataclass(frozen=True, slots=True)
class AdagradRule:
    r"""Adagrad: the gradient over the root of the sum of all its squares.

    .. math::

        a &\leftarrow a + G^2 \\
        w &\leftarrow w - \eta\, G / \sqrt{a}

    Args:
        initial_accumulator_value: what every :math:`a` begins with; > 0.

    Raises:
        ValueError: the value is not positive.

    Source: `tf.tpu.experimental.embedding.Adagrad`.
    """

    initial_accumulator_value: float = 0.1

    def __post_init__(self) -> None:
        initial = check_accumulator(self.initial_accumulator_value)
        numbers.set_all(self, initial_accumulator_value=initial)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The sums of squares."""
        return (Slot("accumulators", self.initial_accumulator_value),)

    def step(self, values: Values, gradient: Tile, rate: Rate) -> Values:
        """Returns new weights and sums."""
        w, a = values
        a = a + gradient * gradient
        return w - rate * gradient * lax.rsqrt(a), a


@dataclasses.dataclass(frozen=True, slots=True)
class AdagradMomentumRule:
    r"""Adagrad with momentum, an exponent and a decay of the sums.

    .. math::

        a &\leftarrow a + G^2 \quad\text{if } \beta_2 = 1,
            \text{ else } \beta_2 a + (1 - \beta_2) G^2 \\
        s &= (a + \epsilon)^{-1/k}\, G \\
        m &\leftarrow \mu m + s \\
        w &\leftarrow w - \eta\, m
            \quad\text{or}\quad w - \eta\, (\mu m + s) \text{ with Nesterov}

    Args:
        momentum: :math:`\mu`, 0 or more.
        use_nesterov: True looks one step ahead.
        exponent: k > 0; 2 is Adagrad's root.
        beta2: :math:`\beta_2`, in `(0, 1]`; 1 sums squares without decay.
        epsilon: above 0.

    Raises:
        ValueError: a number out of its range.

    Source: `tf.tpu.experimental.embedding.AdagradMomentum`.
    """

    momentum: float = 0.0
    use_nesterov: bool = False
    exponent: float = 2.0
    beta2: float = 1.0
    epsilon: float = 1e-10

    def __post_init__(self) -> None:
        why = "the sums of squares begin at 0"
        epsilon = numbers.positive("epsilon", self.epsilon, why)
        exponent = numbers.positive(
            "exponent", self.exponent, "a power is 1 / exponent"
        )
        if -math.log(epsilon) / exponent > math.log(numbers.LARGEST):
            raise ValueError(
                f"epsilon={epsilon} and exponent={exponent}: epsilon**(-1 / exponent) "
                "overflows float32, and a row without gradients would become NaN. Pass "
                "a larger epsilon or exponent"
            )
        numbers.set_all(
            self,
            momentum=numbers.at_least_zero("momentum", self.momentum),
            use_nesterov=numbers.flag("use_nesterov", self.use_nesterov),
            exponent=exponent,
            beta2=_check_beta2(self.beta2),
            epsilon=epsilon,
        )

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The sums of squares, and the momenta."""
        return Slot("accumulators"), Slot("momenta")

    def step(self, values: Values, gradient: Tile, rate: Rate) -> Values:
        """Returns new weights, sums and momenta."""
        w, a, m = values
        one, mu = np.float32(1), np.float32(self.momentum)
        beta2, square = np.float32(self.beta2), gradient * gradient
        a = a + square if self.beta2 == 1 else beta2 * a + (one - beta2) * square
        scaled = _root(a + np.float32(self.epsilon), self.exponent) * gradient
        m = mu * m + scaled
        ahead = mu * m + scaled if self.use_nesterov else m
        return w - rate * ahead, a, m


@dataclasses.dataclass(frozen=True, slots=True)
class RowWiseAdagradRule:
    r"""Adagrad with one number for each row: the mean of its squared gradients.

    .. math::

        a &\leftarrow a + \frac1D \sum_d G_d^2 \\
        w &\leftarrow w - \eta\, G / (\sqrt{a} + \epsilon)

    One slot of `[V]` instead of `[V, D]`: a table and its slots take little more memory
    than the table alone.

    Args:
        epsilon: above 0, outside of the root.
        initial_accumulator_value: what every :math:`a` begins with; 0 or more.

    Raises:
        ValueError: a number out of its range.

    Source: FBGEMM, `EmbOptimType.EXACT_ROWWISE_ADAGRAD`.
    """

    epsilon: float = 1e-8
    initial_accumulator_value: float = 0.0

    def __post_init__(self) -> None:
        initial = self.initial_accumulator_value
        why = "a row without gradients divides by it"
        numbers.set_all(
            self,
            epsilon=numbers.positive("epsilon", self.epsilon, why),
            initial_accumulator_value=numbers.at_least_zero(
                "initial_accumulator_value", initial
            ),
        )

    @property
    def slots(self) -> tuple[Slot, ...]:
        """One number for each row."""
        return (Slot("accumulators", self.initial_accumulator_value, per="row"),)

    def step(self, values: Values, gradient: Tile, rate: Rate) -> Values:
        """Returns new weights and numbers."""
        w, a = values
        width = np.float32(gradient.shape[-1])
        a = a + jnp.sum(gradient * gradient, axis=-1, keepdims=True) / width
        return w - rate / (jnp.sqrt(a) + np.float32(self.epsilon)) * gradient, a


def check_accumulator(value: object) -> float:
    """Returns an initial sum of squares, which must be positive."""
    why = "the first gradient is divided by its root"
    return numbers.positive("initial_accumulator_value", value, why)


def _check_beta2(value: object) -> float:
    """Returns a decay of the sums of squares, in (0, 1]."""
    beta2 = numbers.number("beta2", value)
    if not 0 < beta2 <= 1:
        raise ValueError(f"beta2={beta2} must be > 0 and <= 1")
    if beta2 < 1 and np.float32(beta2) == 1:
        raise ValueError(
            f"beta2={beta2} is 1 in float32, where 1 sums the squares without decay: "
            "pass at most 0.9999999, or 1"
        )
    return beta2


def _root(x: Tile, exponent: float) -> Tile:
    """Returns `x**(-1 / exponent)` of positive numbers."""
    if exponent == 2:
        return lax.rsqrt(x)
    if exponent == 1:
        return np.float32(1) / x
    return jnp.exp(np.float32(-1 / exponent) * jnp.log(x))
