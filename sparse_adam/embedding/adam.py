"""`Adam`: the optimizer of `tf.tpu.experimental.embedding.Adam`, for JAX."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

from sparse_adam.embedding.adam_states import AnyAdamState, adam_kind
from sparse_adam.embedding.optimizer import Optimizer, SlotCreationFn
from sparse_adam.rules import AdamRule, numbers


@dataclasses.dataclass(frozen=True)
class Adam(Optimizer[AnyAdamState]):
    """Optimization parameters for Adam with embedding tables.

    The arguments, defaults and rules of `tf.tpu.experimental.embedding.Adam`; the
    update itself is documented at `sparse_adam_update`. Equal by value and hashable,
    so that tables with equal optimizers can be told.

    Args:
        learning_rate: a number or a scalar array, of which a concrete one is kept as a
            number; or a function of the step, such as a schedule of optax, where an
            `EmbeddingState` counts the steps; or, as in TensorFlow, a callable without
            arguments, which is called at each `update`. Inside `jax.jit` pass the rate
            to `update(..., learning_rate=rate)` instead of the last: it would be called
            once, while tracing, and its value frozen.
        beta_1: decay of the first moment, in `[0, 1)`.
        beta_2: decay of the second moment, in `[0, 1)`.
        epsilon: a small positive constant for numerical stability.
        lazy_adam: True updates the rows that were looked up, False all rows.
        sum_inside_sqrt: True divides by `sqrt(v + epsilon**2)`, False by
            `sqrt(v) + epsilon`.
        use_gradient_accumulation: True sums the gradients of equal ids before one
            update, False makes an update for each.
        clip_weight_min: lower bound of the weights after an update; None is none.
        clip_weight_max: upper bound of the weights after an update; None is none.
        weight_decay_factor: decoupled decay of the weights; None is none.
        multiply_weight_decay_factor_by_learning_rate: True multiplies the factor by
            the current rate.
        slot_variable_creation_fn: `(table, slot names, initializers) -> dict`: makes
            the slots in place of `init_slots`. None is the built-in way: zeros.
        clipvalue: bounds of the gradient: `x` for `(-x, x)`, or a tuple `(low, high)`
            with None for an open side.
        bias_correction: None makes none, as TensorFlow on a TPU. "row" counts the steps
            of each row in a slot of its own and corrects by them: exact from a row's
            first step on. (TensorFlow has no such option, nor those that follow.)
        amsgrad: True divides by the root of the largest second moment that each weight
            has had, which a slot `maxima` keeps.
        catch_up: True makes up for the decay of the steps that a row has missed before
            its next one; a slot counts them. An `EmbeddingState` counts the
            updates; `update` takes their number, `step=`.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of its range, or two that exclude each other.

    Examples:
        >>> import jax.numpy as jnp
        >>> adam = Adam(0.1)
        >>> state = adam.init(jnp.ones((3, 2)))
        >>> state = adam.update(state, jnp.array([1]), jnp.array([[1.0, -1.0]]))
        >>> print(state.table.round(4))
        [[1.     1.    ]
         [0.6838 1.3162]
         [1.     1.    ]]

        Pass this to `TPUEmbedding` to set the global optimizer and its parameters:

        >>> from sparse_adam.embedding import FeatureConfig, TableConfig, TPUEmbedding
        >>> embedding = TPUEmbedding(
        ...     feature_config=FeatureConfig(TableConfig(vocabulary_size=8, dim=4)),
        ...     optimizer=Adam(0.1))

        This can also be used in a `TableConfig`, to set an optimizer of that table. It
        overrides the global one:

        >>> table_one = TableConfig(
        ...     vocabulary_size=8,
        ...     dim=4,
        ...     optimizer=Adam(0.2))
        >>> table_two = TableConfig(
        ...     vocabulary_size=16,
        ...     dim=2)
        >>> feature_config = (
        ...     FeatureConfig(
        ...         table=table_one),
        ...     FeatureConfig(
        ...         table=table_two))
        >>> embedding = TPUEmbedding(
        ...     feature_config=feature_config,
        ...     batch_size=2,
        ...     optimizer=Adam(0.1))

        The first feature is looked up in a table that has a learning rate of 0.2, the
        second one in a table that has a learning rate of 0.1:

        >>> from sparse_adam.embedding import current_learning_rates
        >>> current_learning_rates(embedding.state)
        {'table_0': 0.2, 'table_1': 0.1}

    Source: `tensorflow/python/tpu/tpu_embedding_v2_utils.py`, class Adam.
    """

    learning_rate: float | jax.Array | Callable[..., Any] = 0.001
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-07
    lazy_adam: bool = True
    sum_inside_sqrt: bool = True
    use_gradient_accumulation: bool = True
    clip_weight_min: float | None = None
    clip_weight_max: float | None = None
    weight_decay_factor: float | None = None
    multiply_weight_decay_factor_by_learning_rate: bool | None = None
    slot_variable_creation_fn: SlotCreationFn | None = None
    clipvalue: float | tuple[float | None, float | None] | None = None

    bias_correction: Literal["row"] | None = None
    amsgrad: bool = False
    catch_up: bool = False

    def __post_init__(self) -> None:
        numbers.flag("lazy_adam", self.lazy_adam)
        super().__post_init__()

    def make_rule(self) -> AdamRule:
        """Returns the rule that these arguments describe, without its rate."""
        return AdamRule(
            self.beta_1,
            self.beta_2,
            self.epsilon,
            self.sum_inside_sqrt,
            self.bias_correction,
            self.amsgrad,
            catch_up=self.catch_up,
        )

    @property
    def lazy(self) -> bool:
        """Returns whether only rows that were looked up are updated."""
        return self.lazy_adam

    def state_of(self, arrays: Sequence[jax.Array]) -> AnyAdamState:
        """Returns the arrays under their names."""
        return self.named(adam_kind(self.make_rule()), arrays)
