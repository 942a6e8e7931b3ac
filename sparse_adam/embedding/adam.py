"""`Adam`: the optimizer of `tf.tpu.experimental.embedding.Adam`, for JAX."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from sparse_adam.ops import dispatch, validate
from sparse_adam.ops.packed import PackedTable, packed_adam_update
from sparse_adam.ops.plan import UpdatePlan
from sparse_adam.ops.sparse_adam import AdamState, sparse_adam_update

Initializer = Callable[..., jax.Array]  # (key, shape, dtype), as jax.nn.initializers
SlotCreationFn = Callable[
    [jax.Array, Sequence[str], Sequence[Initializer]], dict[str, jax.Array]
]


@dataclasses.dataclass(frozen=True)
class Adam:
    """Optimization parameters for Adam with embedding tables.

    The arguments, defaults and rules of `tf.tpu.experimental.embedding.Adam`; the
    update itself is documented at `sparse_adam_update`. Equal by value and hashable,
    so that tables with equal optimizers can be told.

    Args:
        learning_rate: a number, a scalar array, or a callable without arguments, which
            is called at each `update`. A concrete array is kept as a number. Inside
            `jax.jit` pass the rate to `update(..., learning_rate=rate)` instead: a
            callable would be called once, while tracing, and its value frozen.
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

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of its range, or two that exclude each other.

    Example:
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

    learning_rate: float | jax.Array | Callable[[], Any] = 0.001
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

    slot_names: ClassVar[tuple[str, ...]] = ("momenta", "velocities")
    slot_initializers: ClassVar[tuple[Initializer, ...]] = (
        jax.nn.initializers.zeros,
        jax.nn.initializers.zeros,
    )

    def __post_init__(self) -> None:
        create = self.slot_variable_creation_fn
        if create is not None and not callable(create):
            raise ValueError(
                f"slot_variable_creation_fn={create!r} must be a callable (table, "
                "slot_names, initializers) -> dict, or None"
            )
        validate.modes(
            lazy_adam=self.lazy_adam,
            use_gradient_accumulation=self.use_gradient_accumulation,
            clipvalue=self.clipvalue,
        )
        validate.hyperparams(**self._numbers())
        if not callable(self.learning_rate):
            rate = validate.learning_rate(self.learning_rate)
            given_array = isinstance(self.learning_rate, jax.Array | np.ndarray)
            if given_array and not isinstance(rate, jax.core.Tracer):
                object.__setattr__(self, "learning_rate", float(rate))

    def init(
        self, table: ArrayLike, storage: str | None = None
    ) -> AdamState | PackedTable:
        """Returns `table` with new slots: the state to train.

        Args:
            table: `[V, D]` weights.
            storage: "plain" for an `AdamState`, "packed" for a `PackedTable`, or None:
                packed where a TPU is in scope.

        Raises:
            ValueError: another storage, or a table too wide to be packed.
        """
        state = AdamState(jnp.asarray(table), **self.init_slots(table))
        if dispatch.storage(state.table.shape[1], storage) == "packed":
            return PackedTable.pack(*state)
        return state

    def init_slots(self, table: ArrayLike) -> dict[str, jax.Array]:
        """Returns the slots of `table` by name: `momenta` and `velocities`, `[V, D]`.

        Raises:
            ValueError: `slot_variable_creation_fn` returned other names or shapes.
        """
        table = jnp.asarray(table)
        create = self.slot_variable_creation_fn or _create_slots
        slots = create(table, list(self.slot_names), list(self.slot_initializers))
        if not isinstance(slots, dict) or set(slots) != set(self.slot_names):
            raise ValueError(
                f"slot_variable_creation_fn returned {slots!r}; it must return a dict "
                f"with the keys {self.slot_names}"
            )
        for name, slot in slots.items():
            if np.shape(slot) != table.shape:
                raise ValueError(
                    f"slot_variable_creation_fn returned {name} of shape "
                    f"{np.shape(slot)}; it must have the table's, {table.shape}"
                )
        return slots

    def update(
        self,
        state: AdamState | PackedTable,
        ids: ArrayLike,
        grads: ArrayLike,
        *,
        learning_rate: ArrayLike | None = None,
        sample_ids: ArrayLike | None = None,
        gains: ArrayLike | None = None,
        plan: UpdatePlan | None = None,
        rounding: str = "nearest",
        key: jax.Array | None = None,
        implementation: str | None = None,
    ) -> AdamState | PackedTable:
        """Returns the state after one `sparse_adam_update` with these parameters.

        Args:
            state: table, momenta and velocities, plain or packed.
            ids: as in `sparse_adam_update`, like `grads` and the rest.
            grads: `ids.shape + (D,)`, or `[B, D]` with `sample_ids`.
            learning_rate: the rate of this update; None takes the optimizer's own.
            sample_ids: which gradient each id has.
            gains: factor of each id's gradient.
            plan: `plan_update(ids, V)`, made earlier.
            rounding: of bfloat16 arrays: "nearest" or "stochastic".
            key: for stochastic rounding.
            implementation: which one to run; None is the best that can.

        Raises:
            TypeError: the optimizer's rate is a callable and this is being traced.
        """
        if isinstance(state, PackedTable):
            update = functools.partial(packed_adam_update, state)
        else:
            update = functools.partial(sparse_adam_update, *state)
        return update(
            ids,
            grads,
            learning_rate=self._rate() if learning_rate is None else learning_rate,
            lazy_adam=self.lazy_adam,
            use_gradient_accumulation=self.use_gradient_accumulation,
            sample_ids=sample_ids,
            gains=gains,
            plan=plan,
            rounding=rounding,
            key=key,
            implementation=implementation,
            **self._numbers(),
        )

    def _rate(self) -> ArrayLike:
        if not callable(self.learning_rate):
            return self.learning_rate
        if isinstance(lax.full((), 0), jax.core.Tracer):
            raise TypeError(
                f"learning_rate={self.learning_rate!r} is a callable, and this update "
                "is being traced (jit, scan): its value would be frozen. Call it "
                "outside and pass the rate in: update(..., learning_rate=rate)"
            )
        return self.learning_rate()

    def _numbers(self) -> dict[str, Any]:
        names = (
            "beta_1",
            "beta_2",
            "epsilon",
            "sum_inside_sqrt",
            "clip_weight_min",
            "clip_weight_max",
            "weight_decay_factor",
            "multiply_weight_decay_factor_by_learning_rate",
            "clipvalue",
        )
        return {name: getattr(self, name) for name in names}


def _create_slots(
    table: jax.Array, names: Sequence[str], initializers: Sequence[Initializer]
) -> dict[str, jax.Array]:
    key = jax.random.key(0)  # zeros need none, but every initializer takes one
    return {
        name: initialize(key, table.shape, table.dtype)
        for name, initialize in zip(names, initializers, strict=True)
    }
