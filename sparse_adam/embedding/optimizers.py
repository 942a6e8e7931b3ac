"""TensorFlow's other optimizers of embedding tables, and one for any rule.

Each is a frozen dataclass with the arguments and the defaults of its class in
`tf.tpu.experimental.embedding`, in the same order, and says which rule it is. What the
arguments that they share mean stands at `Optimizer`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from sparse_adam.embedding.optimizer import Optimizer, SlotCreationFn
from sparse_adam.rules import (
    AdagradMomentumRule,
    AdagradRule,
    FTRLRule,
    RowWiseAdagradRule,
    SGDRule,
    UpdateRule,
)

_Rate: TypeAlias = float | jax.Array | Callable[..., Any]
_Clip: TypeAlias = float | tuple[float | None, float | None] | None


class SGDState(NamedTuple):
    """A table: this optimizer has no slots."""

    table: jax.Array  # [V, D]


@dataclasses.dataclass(frozen=True)
class SGD(Optimizer[SGDState]):
    """Stochastic gradient descent on the rows that were looked up.

    See `SGDRule` for the maths and `Optimizer` for the arguments.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of its range, or two that exclude each other.

    Examples:
        >>> import jax.numpy as jnp
        >>> sgd = SGD(0.5)
        >>> state = sgd.init(jnp.ones((2, 2)))
        >>> state = sgd.update(state, jnp.array([1, 1]), jnp.ones((2, 2)))
        >>> print(state.table)
        [[1. 1.]
         [0. 0.]]

    Source: `tf.tpu.experimental.embedding.SGD`.
    """

    learning_rate: _Rate = 0.01
    use_gradient_accumulation: bool = True
    clip_weight_min: float | None = None
    clip_weight_max: float | None = None
    weight_decay_factor: float | None = None
    multiply_weight_decay_factor_by_learning_rate: bool | None = None
    clipvalue: _Clip = None

    def make_rule(self) -> SGDRule:
        """Returns the rule that these arguments describe, without its rate."""
        return SGDRule()

    def state_of(self, arrays: Sequence[jax.Array]) -> SGDState:
        """Returns the array under its name."""
        return self.named(SGDState, arrays)


class AdagradState(NamedTuple):
    """A table and the sums of its squared gradients."""

    table: jax.Array  # [V, D]
    accumulators: jax.Array  # [V, D]


@dataclasses.dataclass(frozen=True)
class Adagrad(Optimizer[AdagradState]):
    """Adagrad on the rows that were looked up.

    See `AdagradRule` for the maths and `Optimizer` for the arguments that all share.

    Args:
        initial_accumulator_value: what every sum of squares begins with; > 0.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of its range, or two that exclude each other.

    Source: `tf.tpu.experimental.embedding.Adagrad`.
    """

    learning_rate: _Rate = 0.001
    initial_accumulator_value: float = 0.1
    use_gradient_accumulation: bool = True
    clip_weight_min: float | None = None
    clip_weight_max: float | None = None
    weight_decay_factor: float | None = None
    multiply_weight_decay_factor_by_learning_rate: bool | None = None
    slot_variable_creation_fn: SlotCreationFn | None = None
    clipvalue: _Clip = None

    def make_rule(self) -> AdagradRule:
        """Returns the rule that these arguments describe, without its rate."""
        return AdagradRule(self.initial_accumulator_value)

    def state_of(self, arrays: Sequence[jax.Array]) -> AdagradState:
        """Returns the arrays under their names."""
        return self.named(AdagradState, arrays)


class AdagradMomentumState(NamedTuple):
    """A table, the sums of its squared gradients, and its momenta."""

    table: jax.Array  # [V, D]
    accumulators: jax.Array  # [V, D]
    momenta: jax.Array  # [V, D]


@dataclasses.dataclass(frozen=True)
class AdagradMomentum(Optimizer[AdagradMomentumState]):
    """Adagrad with momentum on the rows that were looked up.

    See `AdagradMomentumRule` for the maths and for `momentum`, `use_nesterov`,
    `exponent`, `beta2` and `epsilon`, and `Optimizer` for the arguments that all share.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of its range, or two that exclude each other.

    Source: `tf.tpu.experimental.embedding.AdagradMomentum`.
    """

    learning_rate: _Rate = 0.001
    momentum: float = 0.0
    use_nesterov: bool = False
    exponent: float = 2
    beta2: float = 1
    epsilon: float = 1e-10
    use_gradient_accumulation: bool = True
    clip_weight_min: float | None = None
    clip_weight_max: float | None = None
    weight_decay_factor: float | None = None
    multiply_weight_decay_factor_by_learning_rate: bool | None = None
    slot_variable_creation_fn: SlotCreationFn | None = None
    clipvalue: _Clip = None

    def make_rule(self) -> AdagradMomentumRule:
        """Returns the rule that these arguments describe, without its rate."""
        return AdagradMomentumRule(
            self.momentum, self.use_nesterov, self.exponent, self.beta2, self.epsilon
        )

    def state_of(self, arrays: Sequence[jax.Array]) -> AdagradMomentumState:
        """Returns the arrays under their names."""
        return self.named(AdagradMomentumState, arrays)


class FTRLState(NamedTuple):
    """A table, the sums of its squared gradients, and the linear terms."""

    table: jax.Array  # [V, D]
    accumulators: jax.Array  # [V, D]
    linears: jax.Array  # [V, D]


@dataclasses.dataclass(frozen=True)
class FTRL(Optimizer[FTRLState]):
    """Follow the regularized leader on the rows that were looked up.

    See `FTRLRule` for the maths and for `learning_rate_power` and the regularization,
    and `Optimizer` for the arguments that all share.

    Args:
        allow_zero_accumulator: for TensorFlow's sake; without effect, as there.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of its range, or two that exclude each other.

    Source: `tf.tpu.experimental.embedding.FTRL`.
    """

    learning_rate: _Rate = 0.001
    learning_rate_power: float = -0.5
    l1_regularization_strength: float = 0.0
    l2_regularization_strength: float = 0.0
    beta: float = 0.0
    initial_accumulator_value: float = 0.1
    use_gradient_accumulation: bool = True
    clip_weight_min: float | None = None
    clip_weight_max: float | None = None
    weight_decay_factor: float | None = None
    multiply_weight_decay_factor_by_learning_rate: bool | None = None
    slot_variable_creation_fn: SlotCreationFn | None = None
    clipvalue: _Clip = None
    multiply_linear_by_learning_rate: bool = False
    allow_zero_accumulator: bool = False

    def make_rule(self) -> FTRLRule:
        """Returns the rule that these arguments describe, without its rate."""
        return FTRLRule(
            self.learning_rate_power,
            self.l1_regularization_strength,
            self.l2_regularization_strength,
            self.beta,
            self.initial_accumulator_value,
            self.multiply_linear_by_learning_rate,
        )

    def state_of(self, arrays: Sequence[jax.Array]) -> FTRLState:
        """Returns the arrays under their names."""
        return self.named(FTRLState, arrays)


class RowWiseAdagradState(NamedTuple):
    """A table and one number for each of its rows."""

    table: jax.Array  # [V, D]
    accumulators: jax.Array  # [V]


@dataclasses.dataclass(frozen=True)
class RowWiseAdagrad(Optimizer[RowWiseAdagradState]):
    """Adagrad with one number for each row, the optimizer with the smallest slots.

    See `RowWiseAdagradRule` for the maths and `Optimizer` for the arguments that all
    share. Its tables are plain: a packed one has no place for a number of a row.

    Args:
        epsilon: above 0, outside of the root.
        initial_accumulator_value: what every number begins with; 0 or more.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of its range, or two that exclude each other.

    Source: FBGEMM, `EmbOptimType.EXACT_ROWWISE_ADAGRAD`.
    """

    learning_rate: _Rate = 0.01
    epsilon: float = 1e-8
    initial_accumulator_value: float = 0.0
    use_gradient_accumulation: bool = True
    clip_weight_min: float | None = None
    clip_weight_max: float | None = None
    weight_decay_factor: float | None = None
    multiply_weight_decay_factor_by_learning_rate: bool | None = None
    slot_variable_creation_fn: SlotCreationFn | None = None
    clipvalue: _Clip = None

    def make_rule(self) -> RowWiseAdagradRule:
        """Returns the rule that these arguments describe, without its rate."""
        return RowWiseAdagradRule(self.epsilon, self.initial_accumulator_value)

    def state_of(self, arrays: Sequence[jax.Array]) -> RowWiseAdagradState:
        """Returns the arrays under their names."""
        return self.named(RowWiseAdagradState, arrays)


@dataclasses.dataclass(frozen=True)
class RuleOptimizer(Optimizer[tuple[jax.Array, ...]]):
    """An optimizer of any update rule, one of a user's own too.

    Its state is a tuple of the table and the slots in the order of the rule.

    Args:
        update_rule: what a step of a row computes; see docs/rules.md.
        learning_rate: as of `Optimizer`, like all that follow.
        lazy: True updates the rows that were looked up, False all rows.

    Raises:
        TypeError: the rule is none, or an argument is of the wrong kind.
        ValueError: an argument out of its range, or two that exclude each other.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sparse_adam.rules import AdamRule
        >>> optimizer = RuleOptimizer(AdamRule(bias_correction="row"), 0.1)
        >>> state = optimizer.init(jnp.ones((2, 1)))
        >>> table, *_ = optimizer.update(state, jnp.array([1]), jnp.ones((1, 1)))
        >>> print(table.round(4).ravel())
        [1.  0.9]
    """

    update_rule: UpdateRule
    learning_rate: _Rate = 0.001
    lazy: bool = True  # type: ignore[assignment]
    use_gradient_accumulation: bool = True
    clip_weight_min: float | None = None
    clip_weight_max: float | None = None
    weight_decay_factor: float | None = None
    multiply_weight_decay_factor_by_learning_rate: bool | None = None
    slot_variable_creation_fn: SlotCreationFn | None = None
    clipvalue: _Clip = None

    def make_rule(self) -> UpdateRule:
        """Returns the rule that these arguments describe, without its rate."""
        return self.update_rule
