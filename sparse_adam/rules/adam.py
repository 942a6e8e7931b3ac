"""Adam without a step counter, as TensorFlow runs it on TPUs."""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_adam._types import Rate, Tile
from sparse_adam.rules import numbers
from sparse_adam.rules.catch_up import kept, power
from sparse_adam.rules.rule import Slot, Values


@dataclasses.dataclass(frozen=True, slots=True)
class AdamRule:
    r"""Adam: a step along the first moment, scaled by the root of the second.

    .. math::

        m &\leftarrow \beta_1 m + (1 - \beta_1) G \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) G^2 \\
        w &\leftarrow w - \eta\, m / \sqrt{v + \epsilon^2}
            \quad\text{or}\quad w - \eta\, m / (\sqrt{v} + \epsilon)

    With `amsgrad` the last line divides by the root of the largest v that the weight
    has had, :math:`\hat v \leftarrow \max(\hat v, v)`, in place of :math:`v`.

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
        amsgrad: True keeps :math:`\hat v` in a third slot, `maxima`. It is the largest
            v without bias correction, as in `torch.optim.Adam(amsgrad=True)` and in
            Keras; `optax.amsgrad` takes the largest corrected one.
        epsilon_hat: where epsilon stands with `bias_correction="row"`. True adds it to
            the root of v as it is, the paper's :math:`\hat\epsilon`. False adds it to
            the root of the corrected v, as the paper's algorithm 1 and torch do: then
            :math:`\epsilon\sqrt{1 - \beta_2^t}` takes the place of :math:`\epsilon`.
        catch_up: True makes up for the k steps that a row has missed, before its next
            one: :math:`m \leftarrow \beta_1^k m`, :math:`v \leftarrow \beta_2^k v` and
            :math:`w \leftarrow (1 - \lambda)^k w` with the weight decay
            :math:`\lambda` of this update. The slot `steps` then holds the number of
            the last step of each row, and updates need their own number, `step=`. The
            motion of w along m in these steps is not made up for.

    Raises:
        TypeError: a number that is none, or is traced.
        ValueError: a number out of its range, or `epsilon_hat=False` without a bias
            correction.

    Source: D. Kingma and J. Ba, "Adam: a method for stochastic optimization" (2014);
    `tensorflow/core/protobuf/tpu/optimization_parameters.proto`, AdamParameters; for
    AMSGrad S. Reddi et al., "On the convergence of Adam and beyond" (2018); for rows
    that catch up the review of pytorch's pull request 3137.
    """

    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7
    sum_inside_sqrt: bool = True
    bias_correction: Literal["row"] | None = None
    amsgrad: bool = False
    epsilon_hat: bool = True
    catch_up: bool = False

    def __post_init__(self) -> None:
        inside = numbers.flag("sum_inside_sqrt", self.sum_inside_sqrt)
        numbers.set_all(
            self,
            beta_1=numbers.beta("beta_1", self.beta_1),
            beta_2=numbers.beta("beta_2", self.beta_2),
            epsilon=_check_epsilon(self.epsilon, inside),
            sum_inside_sqrt=inside,
            amsgrad=numbers.flag("amsgrad", self.amsgrad),
            epsilon_hat=numbers.flag("epsilon_hat", self.epsilon_hat),
            catch_up=numbers.flag("catch_up", self.catch_up),
        )
        if self.bias_correction not in (None, "row"):
            raise ValueError(
                f"bias_correction={self.bias_correction!r} must be None or 'row'; for "
                "one step count of all rows pass bias_corrected_learning_rate(...) as "
                "the learning rate"
            )
        if not self.epsilon_hat:
            self._check_corrected_epsilon()

    def _check_corrected_epsilon(self) -> None:
        """Refuses an epsilon that cannot be corrected as the second moment is."""
        if self.bias_correction is None:
            raise ValueError(
                "epsilon_hat=False adds epsilon to a corrected second moment, and "
                "bias_correction=None corrects none: pass bias_correction='row'"
            )
        least = self.epsilon * math.sqrt(1 - self.beta_2)  # at the first step
        if least ** (1 + self.sum_inside_sqrt) < numbers.SMALLEST_NORMAL:
            raise ValueError(
                f"epsilon={self.epsilon} underflows float32 when epsilon_hat=False "
                "multiplies it by the root of 1 - beta_2: pass a larger epsilon, or "
                "epsilon_hat=True"
            )

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Both moments, and what else is asked for."""
        maxima = (Slot("maxima"),) if self.amsgrad else ()
        counts = (Slot("steps", per="row"),) if self._counts else ()
        return (Slot("momenta"), Slot("velocities"), *maxima, *counts)

    @property
    def _counts(self) -> bool:
        """Whether there is a count of steps for each row."""
        return self.bias_correction == "row" or self.catch_up

    def caught_up(self, values: Values, step: Rate, decay: Rate | None) -> Values:
        """Returns the values after the decay of the steps that rows have missed."""
        w, m, v, *maxima, count = values
        missed = jnp.maximum(step - np.float32(1) - count, np.float32(0))
        if decay is not None:
            w = kept(decay, missed) * w
        m = power(_log(self.beta_1), missed) * m
        v = power(_log(self.beta_2), missed) * v
        return (w, m, v, *maxima, count + missed)

    def step(self, values: Values, gradient: Tile, rate: Rate) -> Values:
        """Returns new weights, moments, maxima and count."""
        w, m, v, *others = values
        maxima, counts = others[: int(self.amsgrad)], others[int(self.amsgrad) :]
        one = np.float32(1)
        beta_1, beta_2 = np.float32(self.beta_1), np.float32(self.beta_2)
        epsilon = np.float32(self.epsilon)
        counts = [count + one for count in counts]
        for count in counts if self.bias_correction == "row" else ():
            correction = jnp.sqrt(_one_minus_power(self.beta_2, count))
            rate = rate * (correction / _one_minus_power(self.beta_1, count))
            if not self.epsilon_hat:
                epsilon = epsilon * correction
        m = beta_1 * m + (one - beta_1) * gradient
        v = beta_2 * v + (one - beta_2) * gradient * gradient
        maxima = [jnp.maximum(largest, v) for largest in maxima]
        (second,) = maxima or [v]
        if self.sum_inside_sqrt:
            # One EUP instruction on a TPU, where a root and a division are many.
            step = rate * m * lax.rsqrt(second + epsilon * epsilon)
        else:
            step = rate * m / (jnp.sqrt(second) + epsilon)
        return (w - step, m, v, *maxima, *counts)


def _one_minus_power(beta: float, count: Tile) -> Tile:
    """Returns `1 - beta**count` without losing digits where the power is close to 1.

    Beta is rounded to float32, as in the moments that this corrects, so that the first
    step of a row is exact. By `expm1(x) = tanh(x / 2) (exp(x) + 1)`, since the kernels'
    compiler has no expm1.
    """
    x = count * np.float32(max(_log(beta), -1e4))
    return -jnp.tanh(np.float32(0.5) * x) * (jnp.exp(x) + np.float32(1))


def _log(beta: float) -> float:
    """Returns the logarithm of a beta as float32 has it; of 0 it is -inf."""
    with np.errstate(divide="ignore"):
        return float(np.log(np.float64(np.float32(beta))))


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
