"""The functional core: `init`, `lookup`, `apply_gradients`.

The state is a pytree of the tables and their slots. A train step is three lines:

    activations = lookup(state, features)
    loss, gradients = jax.value_and_grad(loss_of)(activations, labels)
    state = apply_gradients(state, features, gradients)

Gradients are taken by the activations, so that nothing of the size of a table is made;
and they go to the optimizer as `[samples, D]` with each id's sample and factor, so that
nothing of the size `[ids, D]` is made of them either.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, overload

import jax
from jax.typing import ArrayLike

from sparse_adam._types import ImplementationName, Rounding, Storage
from sparse_adam.embedding import on_mesh
from sparse_adam.embedding.combine import activations_of, gather_batch, parts_of
from sparse_adam.embedding.gradients import check_gradients, warn_of_missing_gradients
from sparse_adam.embedding.inputs import Ragged, Sparse
from sparse_adam.embedding.optimizer import Optimizer
from sparse_adam.embedding.rates import (
    LearningRates,
    rates_now,
    rates_of_update,
    tables_by_rate,
)
from sparse_adam.embedding.stacks import Stack, Table
from sparse_adam.embedding.state import EmbeddingState
from sparse_adam.embedding.stored import checked, stacked
from sparse_adam.embedding.tables import EmbeddingLayout, make_layout
from sparse_adam.rules import catches_up

_TableState = TypeVar("_TableState", bound=tuple[jax.Array, ...])
_Ids: TypeAlias = ArrayLike | Ragged | Sparse


def init(
    feature_config: Any,
    optimizer: Optimizer[_TableState] | None,
    key: jax.Array,
    *,
    storage: Storage | None = None,
    stack: bool = True,
    mesh: jax.sharding.Mesh | None = None,
    axes: str | Sequence[str] | None = None,
) -> EmbeddingState[_TableState]:
    """Makes the tables of `feature_config`, and their slots.

    Args:
        feature_config: a `FeatureConfig`, or a nested structure of them. Features that
            hold the same `TableConfig` object share a table.
        optimizer: for the tables that have none of their own; None if all have.
        key: of `jax.random`, for the tables' first weights.
        storage: "plain" or "packed" tables, or None: packed ones where a TPU is in
            scope. What is looked up and learnt does not depend on it.
        stack: True lets tables of one width, one set of dtypes and equal optimizers
            share an array, so that a step has one lookup and one update for all of
            them; False keeps each table alone. What is looked up and learnt does not
            depend on it, either.
        mesh: whose devices share the rows of all tables and, in `lookup` and
            `apply_gradients`, the samples of a batch. Its axes may be of any type. The
            same key makes the same tables on each.
        axes: of the mesh, over which rows and samples are spread; None is all of them.
            Along the others, devices have copies.

    Returns:
        The state to train.

    Raises:
        TypeError: `stack` is not True or False, or `mesh` is no mesh.
        ValueError: see `TableConfig` and `FeatureConfig`; two tables have one name; a
            table has no optimizer; the mesh has no such axes.

    Example:
        >>> import jax
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig
        >>> video = TableConfig(vocabulary_size=8, dim=4, name="video")
        >>> features = {"watched": FeatureConfig(video), "liked": FeatureConfig(video)}
        >>> state = init(features, Adam(0.1), jax.random.key(0))
        >>> jax.tree.map(lambda x: x.shape, state.tables["video"])
        AdamState(table=(8, 4), momenta=(8, 4), velocities=(8, 4))
    """
    spread = on_mesh.spread_of(mesh, axes)
    layout = make_layout(feature_config, optimizer, stack=stack, spread=spread)
    keys = jax.random.split(key, len(layout.tables))
    key_of = {table.name: key for table, key in zip(layout.tables, keys, strict=True)}

    def make(table: Table) -> Any:
        weights = table.config.initialize(key_of[table.name], table.name)
        return table.optimizer.init(weights, storage, table.config.slot_dtype)

    stacks = [stacked(own, list(map(make, own.tables))) for own in layout.stacks]
    return EmbeddingState(tuple(stacks), layout)


@overload
def lookup(
    state: EmbeddingState[Any], features: _Ids, weights: Any = None
) -> jax.Array: ...
@overload
def lookup(
    state: EmbeddingState[Any], features: Mapping[str, _Ids], weights: Any = None
) -> dict[str, jax.Array]: ...
@overload
def lookup(
    state: EmbeddingState[Any], features: list[Any], weights: Any = None
) -> list[Any]: ...
@overload
def lookup(state: EmbeddingState[Any], features: Any, weights: Any = None) -> Any: ...
def lookup(state: EmbeddingState[Any], features: Any, weights: Any = None) -> Any:
    r"""Looks up every feature and combines the rows of each sample.

    A sample with the ids :math:`i_1, i_2, \dots` of the weights :math:`w_1, \dots`
    becomes

    .. math::

        s \sum_k w_k\, \mathtt{table}[i_k], \qquad
        s = 1 \text{ (sum)}, \quad
        \frac{1}{\sum_k w_k} \text{ (mean)}, \quad
        \frac{1}{\sqrt{\sum_k w_k^2}} \text{ (sqrtn)},

    with :math:`s = 0` where it would divide by 0, and so zeros for a sample without
    ids. An id outside `[0, V)` is no id: it adds nothing, to the divisor neither. A
    sequence feature is not combined: column k of a sample is place k of its sequence.

    Args:
        state: from `init`.
        features: nested as the feature configuration. For each feature one of

            * dense ids, `[B]` or `[..., 1]`: activations `[B, D]` or `[..., D]`;
            * padded ids, `[..., L]` with -1 for none: `[..., D]`;
            * `Ragged(values, row_splits)` of B rows: `[B, D]`;
            * `Sparse(indices, values, dense_shape)`, or a `BCOO`, of the shape
              `[..., L]`: `[..., D]`.

            A sequence feature gives `[..., max_sequence_length, D]`, and
            `output_shape` takes the place of all but D.
        weights: None; or nested alike, for each feature None or weights in the form
            of its ids. Dense ids and sequence features have none.

    Returns:
        Activations in the same structure, in the tables' dtypes, summed in float32.

    Raises:
        TypeError: ids are not integers, or the state is none.
        ValueError: another structure, shapes that do not fit, weights that may not be;
            a table that is not of its layout's shape, as inside `jax.shard_map`.

    Example:
        >>> import jax.numpy as jnp
        >>> from sparse_adam.embedding import Adam, FeatureConfig, Ragged, TableConfig
        >>> ramp = lambda key, shape, dtype: jnp.arange(8, dtype=dtype).reshape(shape)
        >>> table = TableConfig(4, 2, initializer=ramp, combiner="mean")
        >>> state = init(FeatureConfig(table), Adam(), jax.random.key(0))
        >>> print(lookup(state, Ragged.from_rows([[3], [], [0, 1]])))
        [[6. 7.]
         [0. 0.]
         [1. 2.]]
    """
    layout = state.layout
    parts = parts_of(layout, features, weights)
    stacks = checked(state.stacks, layout.stacks)
    activations = activations_of(layout, stacks, parts, quantize=True)
    return jax.tree.unflatten(layout.structure, activations)


def apply_gradients(
    state: EmbeddingState[_TableState],
    features: Any,
    activation_gradients: Any,
    weights: Any = None,
    *,
    learning_rates: Mapping[str, ArrayLike] | None = None,
    gradient_scale: ArrayLike | None = None,
    rounding: Rounding = "nearest",
    key: jax.Array | None = None,
    implementation: ImplementationName | None = None,
    step: ArrayLike | None = None,
) -> EmbeddingState[_TableState]:
    """Updates the rows that `lookup(state, features, weights)` read.

    The gradient of a row is the sum over all its occurrences, in all samples of all
    features of its table, of the occurrence's factor in its sample (weight times
    combiner) times the gradient of the sample's activation. Each *stack* of tables has
    **one** update. All rows that were looked up are updated, also where their gradient
    is 0; ids beyond the length of a sequence were not looked up. Weights are constants.

    Donate the state (``jax.jit(step, donate_argnums=0)``) and tables are updated in
    place.

    Args:
        state: from `init` or from the update before.
        features: as in `lookup`.
        activation_gradients: nested alike, each of the shape of its activation: the
            loss's gradient by it, summed over samples, never averaged here. None
            counts as zeros, with a warning. Those of tables that are not trainable are
            not used, and may be None.
        weights: as in `lookup`.
        learning_rates: by table name, traced or not, in place of the optimizers' own;
            of some tables or all. Needed under `jit` for a rate that is a callable:
            pass `current_learning_rates(state)`, made outside, in as an argument.
            Tables of a stack that have equal numbers or one traced object are updated
            together, and those of another rate apart.
        gradient_scale: a scalar, traced or not, that the gradients of rows are
            multiplied by before `clipvalue`: for clipping by global norm
            (`gradient_norm`), or loss scaling. None is 1.
        rounding: of bfloat16 tables and slots: "nearest", to which an update of less
            than half a unit in the last place is lost, or "stochastic", which keeps it
            on average.
        key: of `jax.random`, for stochastic rounding. Pass a new one at each step,
            `jax.random.fold_in(key, step)`; each update gets its own of it.
        implementation: of the update, as in `sparse_adam_update`.
        step: the number of this update, from 1, traced or not: needed by optimizers
            with `catch_up=True`, and not used by others.

    Returns:
        The state after the update.

    Raises:
        TypeError: an optimizer's rate is a callable, this is traced, and
            `learning_rates` does not have it; or ids or gradients are of a wrong kind.
        ValueError: another structure, or shapes that do not fit; a table that is not of
            its layout's shape, as inside `jax.shard_map`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig
        >>> user = TableConfig(4, 2, initializer=jax.nn.initializers.ones, name="user")
        >>> state = init({"user": FeatureConfig(user)}, Adam(0.1), jax.random.key(0))
        >>> features = {"user": jnp.array([1, 3])}
        >>> def loss_of(activations):
        ...     return (activations["user"] ** 2).sum()
        >>> activations = lookup(state, features)
        >>> gradients = jax.grad(loss_of)(activations)
        >>> state = apply_gradients(state, features, gradients)
        >>> print(state.table("user").round(4))
        [[1.     1.    ]
         [0.6838 0.6838]
         [1.     1.    ]
         [0.6838 0.6838]]
    """
    warn_of_missing_gradients(state.layout, activation_gradients, stacklevel=3)
    return update_tables(
        state,
        features,
        activation_gradients,
        weights,
        learning_rates=learning_rates,
        gradient_scale=gradient_scale,
        rounding=rounding,
        key=key,
        implementation=implementation,
        step=step,
    )


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
    rates = rates_of_update(layout.tables, learning_rates)
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
    step: ArrayLike | None = None,
    **options: Any,
) -> EmbeddingState[_TableState]:
    """Makes one update for each rate of each trainable stack.

    Args:
        state: the state before.
        rates: by table name.
        change: `(stack, stored, tables, how)`, of the tables of one rate: returns the
            stack, as it is stored, after their update with the options `how`.
        key: for stochastic rounding; each update gets its own of it.
        step: the number of the update, for the stacks whose rows catch up.
        **options: `gradient_scale`, `rounding` and `implementation`, as in
            `apply_gradients`.
    """
    layout = state.layout
    stacks = list(checked(state.stacks, layout.stacks))
    for number, stack in enumerate(layout.stacks):
        if not stack.trainable:
            continue
        for rate, tables in tables_by_rate(stack, rates):
            how = options | {
                "learning_rate": rate,
                "key": _key_of(key, layout.tables.index(tables[0])),
                "step": step if catches_up(stack.optimizer.rule) else None,
            }
            stacks[number] = change(stack, stacks[number], tables, how)
    return EmbeddingState(tuple(stacks), layout)


def current_learning_rates(state: EmbeddingState) -> LearningRates:
    """Asks for the rates of trainable tables, now, as `apply_gradients` takes them.

    A callable that several tables share is called once. Call this outside of `jit` and
    pass the rates in: a new value does not recompile. The dict is a pytree in which the
    tables of one rate have one leaf, so that they still share it inside.

    Example:
        >>> import jax
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig
        >>> rates = iter([0.1, 0.05])
        >>> state = init(FeatureConfig(TableConfig(4, 2, name="user")),
        ...              Adam(lambda: next(rates)), jax.random.key(0))
        >>> current_learning_rates(state), current_learning_rates(state)
        ({'user': 0.1}, {'user': 0.05})
    """
    return rates_now(state.layout.tables)


def activation_shapes(
    layout: EmbeddingLayout, features: Any, weights: Any
) -> list[tuple[int, ...]]:
    """Returns the shape of each feature's activations; refuses what `lookup` would."""
    return [part.activations for part in parts_of(layout, features, weights)]


def _key_of(key: Any, number: int) -> Any:
    """Returns an update's own key; what is no key, for its optimizer to refuse."""
    return jax.random.fold_in(key, number) if isinstance(key, jax.Array) else key
