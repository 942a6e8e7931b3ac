"""The learning rates of tables, and which of them are one rate."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from sparse_adam.embedding.optimizer import Optimizer, is_traced
from sparse_adam.embedding.stacks import Stack, Table
from sparse_adam.embedding.state import EmbeddingState
from sparse_adam.embedding.step import check_step


@jax.tree_util.register_pytree_node_class
class LearningRates(dict[str, Any]):
    """Rates by table name; as a pytree it has one leaf for each rate, not each table.

    `jax.jit` makes a tracer of each leaf of its arguments. So tables that share a rate
    outside of compiled code share one inside, and tables of a stack one update.
    """

    def tree_flatten(self) -> tuple[list[Any], tuple[tuple[str, int], ...]]:
        """Returns the different objects among the rates, and whose they are."""
        leaves: list[Any] = []
        numbers = {}
        for name, rate in self.items():
            known = [i for i, leaf in enumerate(leaves) if leaf is rate]
            numbers[name] = known[0] if known else len(leaves)
            if not known:
                leaves.append(rate)
        return leaves, tuple(numbers.items())

    @classmethod
    def tree_unflatten(
        cls, numbers: tuple[tuple[str, int], ...], leaves: Sequence[Any]
    ) -> "LearningRates":
        """Returns the rates by table, of the leaves that `tree_flatten` gave.

        A leaf that several tables share is one object in all of them again.
        """
        return cls((name, leaves[number]) for name, number in numbers)


def rates_now(tables: Sequence[Table], step: Any) -> LearningRates:
    """Returns each trainable table's rate, the optimizer's own. Equal ones are one.

    A callable that several share is called once. TensorFlow sends one rate for each
    different callable, too, so tables that share a schedule can not drift apart.

    Args:
        tables: some tables of a layout.
        step: of the state, for rates that are functions of it.
    """
    known: list[tuple[Any, Any]] = []

    def rate_of(optimizer: Optimizer) -> Any:
        rate: Any = optimizer.learning_rate
        for other, value in known:
            if _is_same(other, rate) or (callable(rate) and other == rate):
                return value
        if optimizer.rate_is_by_step:
            value = rate(step)
        else:
            value = rate() if callable(rate) else rate
        known.append((rate, value))
        return value

    return LearningRates(
        {table.name: rate_of(table.optimizer) for table in tables if table.trainable}
    )


def rates_of_host(tables: Sequence[Table]) -> LearningRates:
    """Returns the rates that no compiled update can find: all but those by step."""
    own = [table for table in tables if not table.optimizer.rate_is_by_step]
    return rates_now(own, None)


def rates_of_update(
    state: EmbeddingState, given: Mapping[str, ArrayLike] | None
) -> dict[str, Any]:
    """Returns the rate of each table: the given one, or else the optimizer's own.

    Raises:
        TypeError: `given` is no dict; a rate is a callable without arguments and this
            is traced; or the step of the state is no int32 scalar.
        ValueError: a table of another name; or the state lacks a step.
    """
    tables = state.layout.tables
    check_step(state.step, state.layout.by_step)
    given = {} if given is None else given
    names = [table.name for table in tables]
    if not isinstance(given, Mapping):
        raise TypeError(
            f"learning_rates={reprlib.repr(given)} must be a dict of rates by table "
            f"name: for all tables pass dict.fromkeys({names}, rate)"
        )
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"learning_rates has {unknown}, but the tables are {names}")
    own = [table for table in tables if table.name not in given]
    dynamic = [
        table.name
        for table in own
        if callable(table.optimizer.learning_rate)
        and not table.optimizer.rate_is_by_step
    ]
    if dynamic and is_traced():
        raise TypeError(
            f"the learning rates of the tables {dynamic} are callables without "
            "arguments, and this update is being traced (jit, scan): their values "
            "would be frozen. Call current_learning_rates(state) outside and pass it "
            "in: apply_gradients(..., learning_rates=rates); or make the rate a "
            "function of the step, which the state counts"
        )
    return dict(given) | rates_now(own, state.step)


def tables_by_rate(
    stack: Stack, rates: Mapping[str, Any]
) -> list[tuple[Any, list[Table]]]:
    """Returns the different rates of a stack's tables, and the tables of each."""
    found: list[tuple[Any, list[Table]]] = []
    for table in stack.tables:
        rate = rates[table.name]
        for other, tables in found:
            if _is_same(other, rate):
                tables.append(table)
                break
        else:
            found.append((rate, [table]))
    return found


def _is_same(one: Any, other: Any) -> bool:
    """Tells one object, or two numbers that are equal. Nothing waits for a device."""
    if one is other:
        return True
    numbers = (int, float, np.number)
    return isinstance(one, numbers) and isinstance(other, numbers) and one == other
