"""One step of a state: an update for each rate of each stack."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax.typing import ArrayLike

from sparse_adam.embedding import on_mesh
from sparse_adam.embedding.combine import gather_batch, parts_of
from sparse_adam.embedding.gradients import check_gradients
from sparse_adam.embedding.rates import rates_of_update, tables_by_rate
from sparse_adam.embedding.stacks import Stack, Table
from sparse_adam.embedding.state import EmbeddingState
from sparse_adam.embedding.step import next_step
from sparse_adam.embedding.stored import checked
from sparse_adam.rules import catches_up

_TableState = TypeVar("_TableState", bound=tuple[jax.Array, ...])


def update_tables(
    state: EmbeddingState[_TableState],
    features: Any,
    activation_gradients: Any,
    weights: Any,
    *,
    learning_rates: Mapping[str, ArrayLike] | None,
    **options: Any,
) -> EmbeddingState[_TableState]:
    """Does what `apply_gradients` says, without its warning.

    Takes the arguments of `apply_gradients`, all of them: `options` are those that
    `update_stacks` takes.
    """
    layout = state.layout
    rates = rates_of_update(state, learning_rates)
    parts = parts_of(layout, features, weights)
    shapes = [part.activations for part in parts]
    gradients = check_gradients(layout, activation_gradients, shapes)

    def change(stack: Stack, stored: Any, tables: Sequence[Table], how: Any) -> Any:
        mine = [layout.tables.index(table) for table in tables]
        own = [i for i, part in enumerate(parts) if part.feature.table in mine]
        mine_parts, grads = [parts[i] for i in own], [gradients[i] for i in own]
        if stack.spread is not None:
            return on_mesh.update(
                stack,
                stored,
                [part.samples for part in mine_parts],
                [None if x is None else x.reshape(-1, stack.dim) for x in grads],
                [part.occurrences.num_samples for part in mine_parts],
                stack.optimizer.options(**how),
            )
        batch = gather_batch(mine_parts, grads)
        return stack.optimizer.update(
            stored,
            batch.ids,
            batch.grads,
            sample_ids=batch.sample_ids,
            gains=batch.gains,
            **how,
        )

    return update_stacks(state, rates, change, **options)


def update_stacks(
    state: EmbeddingState[_TableState],
    rates: Mapping[str, Any],
    change: Callable[[Stack, Any, Sequence[Table], Any], Any],
    *,
    key: jax.Array | None,
    **options: Any,
) -> EmbeddingState[_TableState]:
    """Makes one update for each rate of each trainable stack: one step of the state.

    Args:
        state: the state before.
        rates: by table name.
        change: `(stack, stored, tables, how)`, of the tables of one rate: returns the
            stack, as it is stored, after their update with the options `how`.
        key: for stochastic rounding; each update gets its own of it.
        **options: `gradient_scale`, `rounding` and `implementation`, as in
            `apply_gradients`.
    """
    layout, after = state.layout, next_step(state.step)
    stacks = list(checked(state.stacks, layout.stacks))
    for number, stack in enumerate(layout.stacks):
        if not stack.trainable:
            continue
        for rate, tables in tables_by_rate(stack, rates):
            how = options | {
                "learning_rate": rate,
                "key": _key_of(key, layout.tables.index(tables[0])),
                "step": after if catches_up(stack.optimizer.rule) else None,
            }
            stacks[number] = change(stack, stacks[number], tables, how)
    return EmbeddingState(tuple(stacks), layout, after)


def _key_of(key: Any, number: int) -> Any:
    """Returns an update's own key; what is no key, for its optimizer to refuse."""
    return jax.random.fold_in(key, number) if isinstance(key, jax.Array) else key
