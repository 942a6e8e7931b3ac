r"""Makes one step of one row, for each optimizer, in NumPy and float64.

Each function takes the numbers of an optimizer and returns its step, a function of the
values of one row, its gradient and the learning rate. The values are the weights `[D]`,
then the slots: `[D]` each, or a scalar for a slot that has one number for each row.

The numbers are rounded to float32, and `1 - beta` and `epsilon**2` are formed in
float32, because that is what the float32 programs work with. The formulas are
TensorFlow's; those of row-wise Adagrad are FBGEMM's.
"""

from typing import Literal

import numpy as np

from sparse_adam.reference.update import Number, RowStep, RowValues, float32


def adam(
    beta_1: Number = 0.9,
    beta_2: Number = 0.999,
    epsilon: Number = 1e-7,
    sum_inside_sqrt: bool = True,
    bias_correction: Literal["row"] | None = None,
    amsgrad: bool = False,
    epsilon_hat: bool = True,
    catch_up: bool = False,
) -> RowStep:
    r"""Returns Adam's step.

    .. math::

        m &\leftarrow \beta_1 m + (1 - \beta_1) G \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) G^2 \\
        w &\leftarrow w - \eta\, m / \sqrt{v + \epsilon^2}
            \quad\text{or}\quad w - \eta\, m / (\sqrt{v} + \epsilon)

    With `amsgrad` the next slot holds the largest v that each weight has had, which
    takes the place of v in the last line. With `bias_correction="row"` the last slot
    counts the steps t of the row, and :math:`\eta` is multiplied by
    :math:`\sqrt{1 - \beta_2^t} / (1 - \beta_1^t)`. With `epsilon_hat=False`, m and v
    themselves are corrected in the last line, by :math:`1 - \beta_1^t` and
    :math:`1 - \beta_2^t`. With `catch_up` the last slot counts the steps of the row
    too; those that it has missed are made by `caught_up`.
    """
    one_minus_beta_1, one_minus_beta_2 = _one_minus(beta_1), _one_minus(beta_2)
    epsilon_squared = np.float64(np.float32(epsilon) * np.float32(epsilon))
    beta_1, beta_2, epsilon = float32(beta_1), float32(beta_2), float32(epsilon)

    def step(values: RowValues, gradient: np.ndarray, rate: np.float64) -> RowValues:
        w, m, v, *others = values
        m = beta_1 * m + one_minus_beta_1 * gradient
        v = beta_2 * v + one_minus_beta_2 * gradient**2
        second = v
        if amsgrad:
            second = others[0] = np.maximum(others[0], v)
        if bias_correction == "row" or catch_up:
            others[-1] = others[-1] + 1
        if bias_correction == "row":
            t = others[-1]
            if epsilon_hat:
                rate = rate * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
            else:
                rate, second = rate / (1 - beta_1**t), second / (1 - beta_2**t)
        if sum_inside_sqrt:
            w = w - rate * m / np.sqrt(second + epsilon_squared)
        else:
            w = w - rate * m / (np.sqrt(second) + epsilon)
        return (w, m, v, *others)

    return step


def sgd() -> RowStep:
    r"""Returns the step of gradient descent, :math:`w \leftarrow w - \eta G`."""

    def step(values: RowValues, gradient: np.ndarray, rate: np.float64) -> RowValues:
        (w,) = values
        return (w - rate * gradient,)

    return step


def adagrad() -> RowStep:
    r"""Returns Adagrad's step.

    .. math::

        a &\leftarrow a + G^2 \\
        w &\leftarrow w - \eta\, G / \sqrt{a}
    """

    def step(values: RowValues, gradient: np.ndarray, rate: np.float64) -> RowValues:
        w, a = values
        a = a + gradient**2
        return w - rate * gradient / np.sqrt(a), a

    return step


def adagrad_momentum(
    momentum: Number = 0.0,
    use_nesterov: bool = False,
    exponent: Number = 2.0,
    beta2: Number = 1.0,
    epsilon: Number = 1e-10,
) -> RowStep:
    r"""Returns the step of Adagrad with momentum.

    .. math::

        a &\leftarrow a + G^2 \quad\text{if } \beta_2 = 1,
            \text{ else } \beta_2 a + (1 - \beta_2) G^2 \\
        s &= (a + \epsilon)^{-1/k}\, G \\
        m &\leftarrow \mu m + s \\
        w &\leftarrow w - \eta\, m
            \quad\text{or}\quad w - \eta\, (\mu m + s) \text{ with Nesterov}

    where k is the exponent, :math:`\mu` the momentum, and the last line of Nesterov
    uses the new m.
    """
    mu, power = float32(momentum), float32(-1 / exponent)
    decay, share, epsilon = float32(beta2), _one_minus(beta2), float32(epsilon)

    def step(values: RowValues, gradient: np.ndarray, rate: np.float64) -> RowValues:
        w, a, m = values
        grown, decayed = a + gradient**2, decay * a + share * gradient**2
        a = grown if beta2 == 1 else decayed
        s = (a + epsilon) ** power * gradient
        m = mu * m + s
        if use_nesterov:
            return w - rate * (mu * m + s), a, m
        return w - rate * m, a, m

    return step


def row_wise_adagrad(epsilon: float = 1e-8) -> RowStep:
    r"""Returns the step of Adagrad with one number a for each row.

    .. math::

        a &\leftarrow a + \frac1D \sum_d G_d^2 \\
        w &\leftarrow w - \eta\, G / (\sqrt{a} + \epsilon)
    """
    epsilon = float32(epsilon)

    def step(values: RowValues, gradient: np.ndarray, rate: np.float64) -> RowValues:
        w, a = values
        a = a + np.mean(gradient**2)
        return w - rate * gradient / (np.sqrt(a) + epsilon), a

    return step


def ftrl(
    learning_rate_power: Number = -0.5,
    l1_regularization_strength: Number = 0.0,
    l2_regularization_strength: Number = 0.0,
    beta: Number = 0.0,
    multiply_linear_by_learning_rate: bool = False,
) -> RowStep:
    r"""Returns FTRL's step.

    With :math:`p` = -`learning_rate_power` and :math:`a' = a + G^2`:

    .. math::

        l &\leftarrow l + G - (a'^p - a^p)\, w / \eta \\
        w &\leftarrow (\min(\max(l, -l_1), l_1) - l)
            \,/\, ((a'^p + \beta) / \eta + 2 l_2) \\
        a &\leftarrow a'

    With `multiply_linear_by_learning_rate` the slot keeps :math:`\eta\, l`:

    .. math::

        l &\leftarrow l + \eta\, G - (a'^p - a^p)\, w \\
        w &\leftarrow (\min(\max(l, -\eta\, l_1), \eta\, l_1) - l)
            \,/\, (a'^p + \beta + 2 \eta\, l_2)
    """
    power, beta = float32(-learning_rate_power), float32(beta)
    l1, l2 = float32(l1_regularization_strength), float32(l2_regularization_strength)

    def step(values: RowValues, gradient: np.ndarray, rate: np.float64) -> RowValues:
        w, a, linear = values
        grown = a + gradient**2
        increase = grown**power - a**power
        if multiply_linear_by_learning_rate:
            linear = linear + rate * gradient - increase * w
            bound = rate * l1
            denominator = grown**power + beta + 2 * rate * l2
        else:
            linear = linear + gradient - increase * w / rate
            bound = l1
            denominator = (grown**power + beta) / rate + 2 * l2
        w = (np.minimum(np.maximum(linear, -bound), bound) - linear) / denominator
        return w, grown, linear

    return step


def _one_minus(beta: float) -> np.float64:
    """Returns `1 - beta` as float32 programs form it."""
    return np.float64(np.float32(1) - np.float32(beta))
