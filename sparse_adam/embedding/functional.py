"""The functional core: `init`, `lookup`, `apply_gradients`.

The state is a pytree of the tables and their slots. A train step is three lines:

    activations = lookup(state, features)
    loss, gradients = jax.value_and_grad(loss_of)(activations, labels)
    state = apply_gradients(state, features, gradients)

Gradients are taken by the activations, so that nothing of the size of a table is made;
and they go to the optimizer as `[samples, D]` with each id's sample and factor, so that
nothing of the size `[ids, D]` is made of them either.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, overload

import jax
from jax.typing import ArrayLike

from sparse_adam._types import ImplementationName, Rounding, Storage
from sparse_adam.embedding import on_mesh
from sparse_adam.embedding.combine import activations_of, parts_of
from sparse_adam.embedding.drawn import drawn
from sparse_adam.embedding.gradients import warn_of_missing_gradients
from sparse_adam.embedding.inputs import Ragged, Sparse
from sparse_adam.embedding.invalid import OnInvalidIds, check_if_asked
from sparse_adam.embedding.optimizer import Optimizer
from sparse_adam.embedding.placed import filled
from sparse_adam.embedding.rates import (
    LearningRates,
    rates_now,
)
from sparse_adam.embedding.stacks import Stack, Table
from sparse_adam.embedding.state import EmbeddingState
from sparse_adam.embedding.step import check_step, step_at
from sparse_adam.embedding.stored import checked, stacked
from sparse_adam.embedding.tables import EmbeddingLayout, make_layout
from sparse_adam.embedding.updating import update_tables

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
            same key makes the same tables on each, and no device ever has all of one:
            initializers of JAX are divided between the devices, as XLA does it.
        axes: of the mesh, over which rows and samples are spread; None is all of them.
            Along the others, devices have copies.

    Returns:
        The state to train.

    Raises:
        TypeError: `stack` is not True or False, or `mesh` is no mesh.
        ValueError: see `TableConfig` and `FeatureConfig`; two tables have one name; a
            table has no optimizer; the mesh has no such axes.

    Examples:
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
    key_of = layout.keys(key)

    def make(table: Table) -> Any:
        weights = table.config.initialize(key_of[table.name], table.name)
        return table.optimizer.init(weights, storage, table.config.slot_dtype)

    def make_stack(stack: Stack) -> Any:
        if stack.spread is None:
            return stacked(stack, list(map(make, stack.tables)))
        packed = stack.optimizer.storage(stack.dim, storage) == "packed"
        parts = [drawn(x, key_of[x.name], stack.spread) for x in stack.tables]
        return filled(stack, parts, packed=packed)

    stacks = tuple(map(make_stack, layout.stacks))
    step = step_at(0, spread) if layout.by_step else None
    return EmbeddingState(stacks, layout, step)


@overload
def lookup(
    state: EmbeddingState[Any],
    features: _Ids,
    weights: Any = None,
    *,
    on_invalid_ids: OnInvalidIds = "ignore",
) -> jax.Array: ...
@overload
def lookup(
    state: EmbeddingState[Any],
    features: Mapping[str, _Ids],
    weights: Any = None,
    *,
    on_invalid_ids: OnInvalidIds = "ignore",
) -> dict[str, jax.Array]: ...
@overload
def lookup(
    state: EmbeddingState[Any],
    features: list[Any],
    weights: Any = None,
    *,
    on_invalid_ids: OnInvalidIds = "ignore",
) -> list[Any]: ...
@overload
def lookup(
    state: EmbeddingState[Any],
    features: Any,
    weights: Any = None,
    *,
    on_invalid_ids: OnInvalidIds = "ignore",
) -> Any: ...
def lookup(
    state: EmbeddingState[Any],
    features: Any,
    weights: Any = None,
    *,
    on_invalid_ids: OnInvalidIds = "ignore",
) -> Any:
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
        on_invalid_ids: what becomes of an id that is neither a row of its table nor -1.
            "ignore" is as above and costs nothing; "error" refuses it, as `check_ids`
            does. `batch_stats` counts them.

    Returns:
        Activations in the same structure, in the tables' dtypes, summed in float32.

    Raises:
        TypeError: ids are not integers, or the state is none.
        ValueError: another structure, shapes that do not fit, weights that may not be;
            a table that is not of its layout's shape, as inside `jax.shard_map`; an
            invalid id, if asked for.

    Examples:
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
    check_if_asked(layout, features, on_invalid_ids)
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
            of some tables or all. Needed under `jit` for a rate that is a callable
            without arguments: pass `current_learning_rates(state)`, made outside, in as
            an argument. A rate that is a function of the step needs nothing: it is
            computed of `state.step`, which each call here counts, also for optimizers
            with `catch_up=True`.
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

    Returns:
        The state after the update.

    Raises:
        TypeError: an optimizer's rate is a callable without arguments, this is traced,
            and `learning_rates` does not have it; the state's step is no int32 scalar;
            or ids or gradients are of a wrong kind.
        ValueError: another structure, or shapes that do not fit; a table that is not of
            its layout's shape, as inside `jax.shard_map`.

    Examples:
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
    )


def current_learning_rates(state: EmbeddingState) -> LearningRates:
    """Asks for the rates of trainable tables, now, as `apply_gradients` takes them.

    A callable that several tables share is called once; one that is a function of the
    step gets that of the state. For callables without arguments call this outside of
    `jit` and pass the rates in: a new value does not recompile. The dict is a pytree in
    which the tables of one rate have one leaf, so that they still share it inside.

    Raises:
        TypeError: the state's step is no int32 scalar.
        ValueError: the state has no step, but a table needs it.

    Examples:
        >>> import jax
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig
        >>> rates = iter([0.1, 0.05])
        >>> state = init(FeatureConfig(TableConfig(4, 2, name="user")),
        ...              Adam(lambda: next(rates)), jax.random.key(0))
        >>> current_learning_rates(state), current_learning_rates(state)
        ({'user': 0.1}, {'user': 0.05})
    """
    check_step(state.step, state.layout.by_step)
    return rates_now(state.layout.tables, state.step)


def activation_shapes(
    layout: EmbeddingLayout, features: Any, weights: Any
) -> list[tuple[int, ...]]:
    """Returns the shape of each feature's activations; refuses what `lookup` would."""
    return [part.activations for part in parts_of(layout, features, weights)]
