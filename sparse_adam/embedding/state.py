"""The state of an embedding: stacks of tables, which users see as tables by name."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp

from sparse_adam.embedding.optimizer import TableState_co
from sparse_adam.embedding.stacks import Stack
from sparse_adam.embedding.step import check_step
from sparse_adam.embedding.stored import checked, table_arrays, table_weights
from sparse_adam.embedding.tables import EmbeddingLayout

_Value = TypeVar("_Value")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("stacks", "step"),
    meta_fields=("layout",),
)
@dataclasses.dataclass(frozen=True)
class EmbeddingState(Generic[TableState_co]):
    """Tables with their slots: a pytree of arrays.

    It checkpoints, shards, scans and donates like any other. Its arrays are those of
    stacks; `table`, `slots`, `tables` and `to_logical` give those of tables. Type
    checkers take all tables for those of the optimizer that `init` was given.

    Attributes:
        stacks: of each stack of the layout the optimizer's state: for `Adam` an
            `AdamState(table, momenta, velocities)` of `[rows, D]` arrays, or a
            `PackedTable`.
        layout: static: the features, the tables and the stacks.
        step: how many updates there were, an int32 scalar, where the learning rate of a
            table is a function of it, or its rows catch up; else None.

    Examples:
        >>> import jax
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig, init
        >>> user, item = TableConfig(5, 4, name="user"), TableConfig(7, 4, name="item")
        >>> config = [FeatureConfig(user), FeatureConfig(item)]
        >>> state = init(config, Adam(0.1), jax.random.key(0))
        >>> len(state.stacks), state.table("user").shape
        (1, (5, 4))
        >>> list(state.slots("item")), state.tables["item"].momenta.shape
        (['momenta', 'velocities'], (7, 4))
    """

    stacks: tuple[Any, ...]
    layout: EmbeddingLayout
    step: Any = None

    def table(self, name: str) -> jax.Array:
        """Returns the weights of a table, `[V, D]`.

        Raises:
            KeyError: there is no table of this name.
            TypeError: the state has arrays of a wrong dtype.
            ValueError: the state is not of its layout's shape.
        """
        return table_weights(*self._stored(name))

    def slots(self, name: str) -> dict[str, jax.Array]:
        """Returns the slots of a table by name: `[V, D]`, or `[V]` of one per row.

        Raises what `table` does.
        """
        stored, stack, place = self._stored(name)
        arrays = table_arrays(stored, stack, place)
        return dict(zip(stack.array_names[1:], arrays[1:], strict=True))

    @property
    def tables(self) -> Mapping[Any, TableState_co]:
        """The optimizer's state of each table by name, such as an `AdamState`.

        Arrays `[V, D]`, cut out of the stacks when a table is asked for.
        """

        def state_of(name: str) -> TableState_co:
            stored, stack, place = self._stored(name)
            return stack.optimizer.state_of(table_arrays(stored, stack, place))

        return ByTable(self.layout, state_of)

    def _stored(self, name: str) -> tuple[Any, Stack, int]:
        """Returns the stack of a table, as stored and as laid out, and its place there.

        Raises what `table` does.
        """
        number, place = self.layout.place(name)
        stored = checked(self.stacks, self.layout.stacks)[number]
        return stored, self.layout.stacks[number], place


def owned(state: EmbeddingState) -> EmbeddingState:
    """Returns a state that is handed over, checked: all its arrays can be donated.

    Raises:
        TypeError: an array of a wrong kind or dtype, or a step that is no int32 scalar.
        ValueError: the state is not of its layout's shape, lacks a step, or has one
            array in two places.
    """
    stacks = checked(state.stacks, state.layout.stacks)
    state = dataclasses.replace(state, stacks=stacks)
    check_step(state.step, state.layout.by_step)
    leaves = jax.tree.leaves(state)
    if len(set(map(id, leaves))) < len(leaves):
        raise ValueError(
            "state has one array in two places, but the next update donates each: "
            "pass jax.tree.map(jnp.copy, state)"
        )
    # NumPy arrays become JAX's own; JAX may share the memory of one.
    return jax.tree.map(
        lambda x: x if isinstance(x, jax.Array) else jnp.array(x, copy=True), state
    )


class ByTable(Mapping[Any, _Value]):
    """What a function makes of each table: by its name, or its `TableConfig` object.

    It is made when it is asked for, and then kept.
    """

    def __init__(
        self, layout: EmbeddingLayout, function: Callable[[str], _Value]
    ) -> None:
        self._names = [table.name for table in layout.tables]
        self._name_of = {id(table.config): table.name for table in layout.tables}
        self._function = function
        self._made: dict[str, _Value] = {}

    def __getitem__(self, key: Any) -> _Value:
        name = self._name_of.get(id(key), key)
        if name not in self._names:
            raise KeyError(f"{key!r} is none of the tables {self._names}")
        if name not in self._made:
            self._made[name] = self._function(name)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._names})"
