"""What all optimizers of the embedding API share: an update rule and its options.

An optimizer is a frozen dataclass with the arguments of its class in TensorFlow and one
method of its own, `make_rule`. How slots are made and rows are updated stands here.
Nothing else in this folder knows which optimizer it drives.
"""

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, TypeAlias, TypeVar, cast, overload

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from sparse_adam._types import ImplementationName, Rounding, Storage
from sparse_adam.embedding.slots import (
    Initializer,
    first_value,
    slot_initializer,
    with_ema,
)
from sparse_adam.embedding.step import STEP
from sparse_adam.ops import dispatch, validate
from sparse_adam.ops.options import UpdateInputs, UpdateOptions
from sparse_adam.ops.packed import PackedTable
from sparse_adam.ops.plan import UpdatePlan
from sparse_adam.ops.sparse_update import update_state
from sparse_adam.rules import UpdateRule, WithEMA, catches_up, check_rule, numbers

PARAMETERS = "parameters"  # what a checkpoint calls the weights, as TensorFlow does
SlotCreationFn: TypeAlias = Callable[
    [jax.Array, Sequence[str], Sequence[Initializer]], dict[str, jax.Array]
]

# The state of a table: a named tuple of its weights and slots.
TableState_co = TypeVar("TableState_co", bound=tuple[jax.Array, ...], covariant=True)
_Stored = TypeVar("_Stored", bound=tuple[jax.Array, ...] | PackedTable)


@dataclasses.dataclass(frozen=True)
class _Beyond:
    """What this package adds to the arguments of each optimizer of TensorFlow."""

    ema_decay: float | None = dataclasses.field(default=None, kw_only=True)


class Optimizer(_Beyond, abc.ABC, Generic[TableState_co]):
    """A row-wise optimizer of embedding tables; hashable, and equal by value.

    A subclass is a frozen dataclass that has the fields below among its own, in the
    order of its class in TensorFlow, and makes a rule of them. Type checkers know it by
    the state of its tables, such as `Optimizer[SGDState]`.

    Attributes:
        learning_rate: a number; or a function of the step, such as a schedule of
            optax, of which an `EmbeddingState` counts the updates before; or a callable
            without arguments, as in TensorFlow, that is asked at each update. What can
            be called without arguments is called so.
        use_gradient_accumulation: True sums the gradients of equal ids before one
            update, False makes an update for each.
        clip_weight_min: lower bound of the weights after an update; None is none.
        clip_weight_max: upper bound of the weights after an update; None is none.
        weight_decay_factor: decoupled decay of the weights; None is none.
        multiply_weight_decay_factor_by_learning_rate: True multiplies the factor by
            the current rate.
        clipvalue: bounds of the gradient: `x` for `(-x, x)`, or a tuple `(low, high)`
            with None for an open side.
        slot_variable_creation_fn: makes the slots in place of `init_slots`; None is
            the built-in way.
        ema_decay: d of an exponential moving average of the weights, in `[0, 1)`, which
            the slot `ema` then keeps: after each step of a row d of its average and
            1 - d of its weights. It begins as the weights; see `WithEMA`. None keeps
            none. (TensorFlow has no such option.)
    """

    learning_rate: float | jax.Array | Callable[..., Any]
    use_gradient_accumulation: bool
    clip_weight_min: float | None
    clip_weight_max: float | None
    weight_decay_factor: float | None
    multiply_weight_decay_factor_by_learning_rate: bool | None
    clipvalue: float | tuple[float | None, float | None] | None
    slot_variable_creation_fn: SlotCreationFn | None = None

    @abc.abstractmethod
    def make_rule(self) -> UpdateRule:
        """Returns the update rule of these parameters."""

    @functools.cached_property
    def rule(self) -> UpdateRule:
        """Returns what a step of a row computes, the moving average included."""
        rule = self.make_rule()
        return rule if self.ema_decay is None else WithEMA(rule, self.ema_decay)

    @property
    def lazy(self) -> bool:
        """Returns whether only rows that were looked up are updated."""
        return True

    def __post_init__(self) -> None:
        create = self.slot_variable_creation_fn
        if create is not None and not callable(create):
            raise ValueError(
                f"slot_variable_creation_fn={create!r} must be a callable (table, "
                "slot_names, initializers) -> dict, or None"
            )
        self.options(learning_rate=0.0)
        if self.ema_decay is not None:
            numbers.set_all(self, ema_decay=numbers.beta("ema_decay", self.ema_decay))
        check_rule(self.rule)
        taken = {PARAMETERS, STEP} & set(self.slot_names)
        if taken:
            raise ValueError(
                f"{self.rule!r} has slots called {sorted(taken)}, which is what a "
                "checkpoint calls the weights and the step: give them other names"
            )
        if callable(self.learning_rate):
            if not any(accepts(self.learning_rate, count) for count in (0, 1)):
                raise ValueError(
                    f"learning_rate={self.learning_rate!r} must be a number, a "
                    "function of one argument, the step, or a callable without "
                    "arguments"
                )
        else:
            rate = numbers.scalar("learning_rate", self.learning_rate)
            given_array = isinstance(self.learning_rate, jax.Array | np.ndarray)
            if given_array and not isinstance(rate, jax.core.Tracer):
                object.__setattr__(self, "learning_rate", float(rate))

    @functools.cached_property
    def rate_is_by_step(self) -> bool:
        """Returns whether the learning rate is a function of the step."""
        rate = self.learning_rate
        return callable(rate) and not accepts(rate, 0)

    @property
    def needs_step(self) -> bool:
        """Returns whether a state must count steps: for its rate, or for its rows."""
        return self.rate_is_by_step or catches_up(self.rule)

    @property
    def slot_names(self) -> tuple[str, ...]:
        """Returns the names of the slots, in their order."""
        return tuple(slot.name for slot in self.rule.slots)

    def state_of(self, arrays: Sequence[jax.Array]) -> TableState_co:
        """Returns the table and its slots as the state of this optimizer."""
        return cast(TableState_co, tuple(arrays))

    def named(self, kind: Any, arrays: Sequence[jax.Array]) -> Any:
        """Returns arrays as a named tuple, with a field `ema` for an average.

        Args:
            kind: a `NamedTuple` of the table and the slots of `make_rule()`.
            arrays: the table and all slots.
        """
        return (kind if self.ema_decay is None else with_ema(kind))(*arrays)

    @overload
    def init(
        self,
        table: ArrayLike,
        storage: Literal["plain"],
        slot_dtype: DTypeLike = jnp.float32,
    ) -> TableState_co: ...
    @overload
    def init(
        self,
        table: ArrayLike,
        storage: Literal["packed"],
        slot_dtype: DTypeLike = jnp.float32,
    ) -> PackedTable: ...
    @overload
    def init(
        self,
        table: ArrayLike,
        storage: Storage | None = None,
        slot_dtype: DTypeLike = jnp.float32,
    ) -> Any: ...
    def init(
        self,
        table: ArrayLike,
        storage: Storage | None = None,
        slot_dtype: DTypeLike = jnp.float32,
    ) -> Any:
        """Returns `table` with new slots: the state to train.

        The state is the caller's alone, to donate: `table` itself is copied.

        Args:
            table: `[V, D]` weights, float32 or bfloat16; the slots are spread over
                devices as it is.
            storage: "plain" for a named tuple of arrays, "packed" for a `PackedTable`,
                or None: packed where a TPU is in scope and the rule allows it.
            slot_dtype: float32, or bfloat16: then a slot that decays slowly, as Adam's
                second moment, stands still unless rounding is stochastic.

        Raises:
            TypeError: arrays of another dtype.
            ValueError: another storage, a table that is not `[V, D]` or is too wide to
                be packed, or a rule with a slot that is per row.
        """
        if np.ndim(table) != 2:
            raise ValueError(f"table.shape={np.shape(table)} must be (V, D)")
        if self.storage(np.shape(table)[1], storage) == "packed":
            slots = self.init_slots(table, slot_dtype)
            return PackedTable.pack(table, *(slots[name] for name in self.slot_names))
        table = jnp.array(table, copy=True)
        slots = self.init_slots(table, slot_dtype)
        state = self.state_of([table, *(slots[name] for name in self.slot_names)])
        validate.plain_layout(state, self.rule)
        return state

    def storage(self, dim: int, asked: str | None) -> Storage:
        """Returns how tables of D=`dim` are stored, "plain" or "packed".

        Raises:
            ValueError: what is asked for is neither, or cannot be.
        """
        if asked is None and check_rule(self.rule).per_row:
            return "plain"
        return dispatch.storage(dim, asked)

    def init_slots(
        self, table: ArrayLike, slot_dtype: DTypeLike = jnp.float32
    ) -> dict[str, jax.Array]:
        """Returns new slots of `table` by name: `[V, D]`, or `[V]` of one per row.

        No two of them share memory, nor does one with an array of
        `slot_variable_creation_fn`, so that all can be donated.

        Raises:
            ValueError: `slot_variable_creation_fn` returned other names or shapes.
        """
        table = jnp.asarray(table)
        slots = self.rule.slots
        given: Mapping[str, Any] = {}
        if self.slot_variable_creation_fn is not None:
            create = self.slot_variable_creation_fn
            initializers = [slot_initializer(slot, table, slot_dtype) for slot in slots]
            given = create(table, list(self.slot_names), initializers)
            if not isinstance(given, dict) or set(given) != set(self.slot_names):
                what = list(given) if isinstance(given, dict) else type(given).__name__
                raise ValueError(
                    f"slot_variable_creation_fn returned {what}; it must return a "
                    f"dict with the keys {self.slot_names}"
                )
        made = {}
        for slot in slots:
            shape = table.shape[:1] if slot.per == "row" else table.shape
            if slot.name not in given:
                made[slot.name] = first_value(slot, table, slot_dtype)
            elif np.shape(given[slot.name]) != shape:
                raise ValueError(
                    f"slot_variable_creation_fn returned {slot.name} of shape "
                    f"{np.shape(given[slot.name])}; it must have {shape}, as the table "
                    "says"
                )
            else:
                made[slot.name] = jnp.array(given[slot.name], copy=True)
        return made

    def update(
        self,
        state: _Stored,
        ids: ArrayLike,
        grads: ArrayLike,
        *,
        learning_rate: ArrayLike | None = None,
        sample_ids: ArrayLike | None = None,
        gains: ArrayLike | None = None,
        plan: UpdatePlan | None = None,
        gradient_scale: ArrayLike | None = None,
        rounding: Rounding = "nearest",
        key: jax.Array | None = None,
        implementation: ImplementationName | None = None,
        step: ArrayLike | None = None,
    ) -> _Stored:
        """Returns the state after one `sparse_update` with these parameters.

        Args:
            state: the table and its slots, plain or packed, as `init` returns them.
            ids: as in `sparse_update`, like `grads` and the rest.
            grads: `ids.shape + (D,)`, or `[B, D]` with `sample_ids`.
            learning_rate: the rate of this update; None takes the optimizer's own.
            sample_ids: which gradient each id has.
            gains: factor of each id's gradient.
            plan: `plan_update(ids, V)`, made earlier.
            gradient_scale: factor of all summed gradients; None is 1.
            rounding: of bfloat16 arrays: "nearest" or "stochastic".
            key: for stochastic rounding.
            implementation: which one to run; None is the best that can.
            step: the number of this update, from 1, where rows catch up.

        Raises:
            TypeError: the optimizer's rate is a function of the step, or is a callable
                and this is being traced; the state is no state of this optimizer.
        """
        if not isinstance(state, tuple | PackedTable):
            raise TypeError(
                f"state is {_described(state)}; it must be the table and its slots, "
                f"what {type(self).__name__}(...).init(table) returns"
            )
        options = self.options(
            learning_rate=self._rate() if learning_rate is None else learning_rate,
            gradient_scale=gradient_scale,
            rounding=rounding,
            key=key,
            implementation=implementation,
            step=step,
        )
        inputs = UpdateInputs(ids, grads, sample_ids, gains, plan)
        new: Any = update_state(state, inputs, self.rule, options)
        if not isinstance(new, PackedTable):
            new = self.state_of(new)
        return cast(_Stored, new)

    def options(self, **of_this_update: Any) -> UpdateOptions:
        """Returns the options of an update: the optimizer's, and those of the call."""
        return UpdateOptions(
            lazy=self.lazy,
            use_gradient_accumulation=self.use_gradient_accumulation,
            clip_weight_min=self.clip_weight_min,
            clip_weight_max=self.clip_weight_max,
            weight_decay_factor=self.weight_decay_factor,
            multiply_weight_decay_factor_by_learning_rate=(
                self.multiply_weight_decay_factor_by_learning_rate
            ),
            clipvalue=self.clipvalue,
            **of_this_update,
        )

    def _rate(self) -> ArrayLike:
        if not callable(self.learning_rate):
            return self.learning_rate
        if self.rate_is_by_step:
            raise TypeError(
                f"learning_rate={self.learning_rate!r} is a function of the step, "
                "which an EmbeddingState counts and this state does not: pass "
                "update(..., learning_rate=schedule(step))"
            )
        if is_traced():
            raise TypeError(
                f"learning_rate={self.learning_rate!r} is a callable, and this update "
                "is being traced (jit, scan): its value would be frozen. Call it "
                "outside and pass the rate in: update(..., learning_rate=rate)"
            )
        return self.learning_rate()


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ + ("" if shape is None else f" of the shape {shape}")


def accepts(function: Callable[..., Any], count: int) -> bool:
    """Tells whether a function can be called with so many arguments.

    True also where nobody can know.
    """
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # it has no signature to be known
        return True
    return True


def is_traced() -> bool:
    """Tells whether JAX is tracing here (jit, scan), whatever the arguments are."""
    return isinstance(_nothing(), jax.core.Tracer)


@jax.jit
def _nothing() -> jax.Array:
    """Returns a number. A compiled call is the cheapest way to ask JAX for one."""
    return jnp.zeros((), jnp.int32)
