"""Adam without a step counter, as TensorFlow runs it on TPUs."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_adam._types import Rate, Tile
from sparse_adam.rules import numbers
from sparse_adam.rules.rule import Slot, Values

_SLOTS = (Slot("momenta"), Slot("velocities"), Slot("steps", per="row"))


@dataclasses.dataclass(frozen=True, slots=True)
class AdamRule:
    r"""Adam: a step along the first moment, scaled by the root of the second.

    .. math::

        m &\leftarrow \beta_1 m + (1 - \beta_1) G \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) G^2 \\
        w &\leftarrow w - \eta\, m / \sqrt{v + \epsilon^2}
            \quad\text{or}\quad w - \eta\, m / (\sqrt{v} + \epsilon)

    Everything is float32; :math:`1 - \beta` and :math:`\epsilon^2` are formed in
    float32 too, as TensorFlow's SparseCore program forms them.

    Args:
        beta_1: decay of the first moment, in `[0, 1)`.
        beta_2: decay of the second moment, in `[0, 1)`.
        epsilon: keeps the division finite; > 0.
        sum_inside_sqrt: True takes the first form of the last line, False the second.
        bias_correction: None makes none, as on a TPU. "row" keeps the number of steps
            t that each row has made in a slot of its own and multiplies :math:`\eta` by
            :math:`\sqrt{1 - \beta_2^t} / (1 - \beta_1^t)`.

    Raises:
        TypeError: a number that is none, or is traced.
        ValueError: a number out of its range.

    Source: D. Kingma and J. Ba, "Adam: a method for stochastic optimization" (2014);
    `tensorflow/core/protobuf/tpu/optimization_parameters.proto`, AdamParameters.
    """

    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7
    sum_inside_sqrt: bool = True
    bias_correction: Literal["row"] | None = None

    def __post_init__(self) -> None:
        inside = numbers.flag("sum_inside_sqrt", self.sum_inside_sqrt)
        numbers.set_all(
            self,
            beta_1=numbers.beta("beta_1", self.beta_1),
            beta_2=numbers.beta("beta_2", self.beta_2),
            epsilon=_check_epsilon(self.epsilon, inside),
            sum_inside_sqrt=inside,
        )
        if self.bias_correction not in (None, "row"):
            raise ValueError(
                f"bias_correction={self.bias_correction!r} must be None or 'row'; for "
                "one step count of all rows pass bias_corrected_learning_rate(...) as "
                "the learning rate"
            )

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Both moments, and the count of steps where it is asked for."""
        return _SLOTS if self.bias_correction == "row" else _SLOTS[:2]

    def step(self, values: Values, gradient: Tile, rate: Rate) -> Values:
        """Returns new weights, moments and count."""
        w, m, v, *counts = values
        one = np.float32(1)
        beta_1, beta_2 = np.float32(self.beta_1), np.float32(self.beta_2)
        epsilon = np.float32(self.epsilon)
        counts = tuple(count + one for count in counts)
        for count in counts:
            correction = jnp.sqrt(_one_minus_power(self.beta_2, count))
            rate = rate * (correction / _one_minus_power(self.beta_1, count))
        m = beta_1 * m + (one - beta_1) * gradient
        v = beta_2 * v + (one - beta_2) * gradient * gradient
        if self.sum_inside_sqrt:
            # One EUP instruction on a TPU, where a root and a division are many.
            step = rate * m * lax.rsqrt(v + epsilon * epsilon)
        else:
            step = rate * m / (jnp.sqrt(v) + epsilon)
        return (w - step, m, v, *counts)


def _one_minus_power(beta: float, count: Tile) -> Tile:
    """Returns `1 - beta**count` without losing digits where the power is close to 1.

    Beta is rounded to float32, as in the moments that this corrects, so that the first
    step of a row is exact. By `expm1(x) = tanh(x / 2) (exp(x) + 1)`, since the kernels'
    compiler has no expm1.
    """
    with np.errstate(divide="ignore"):  # beta = 0: a power of exactly 0
        log_beta = np.log(np.float64(np.float32(beta)))
    x = count * np.float32(max(log_beta, -1e4))
    return -jnp.tanh(np.float32(0.5) * x) * (jnp.exp(x) + np.float32(1))


def _check_epsilon(value: object, sum_inside_sqrt: bool) -> float:
    why = "a row without gradients divides by it"
    epsilon = numbers.number("epsilon", value)
    if sum_inside_sqrt and 0 < epsilon <= numbers.LARGEST:
        square = float(np.float32(epsilon)) ** 2
        if square < numbers.SMALLEST_NORMAL:
            raise ValueError(
                f"epsilon={epsilon}: epsilon**2 underflows float32, and a row without "
                "gradients would become NaN. Pass at least 1.1e-19, or "
                "sum_inside_sqrt=False"
            )
        if square > numbers.LARGEST:
            raise ValueError(
                f"epsilon={epsilon}: epsilon**2 overflows float32, and no row would "
                "move. Pass at most 1.8e19, or sum_inside_sqrt=False"
            )
    return numbers.positive("epsilon", epsilon, why)
