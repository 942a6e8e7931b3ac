"""The functional core: `init`, `lookup`, `apply_gradients`.

The state is a pytree of the tables and their slots. A train step is three lines:

    activations = lookup(state, features)
    loss, gradients = jax.value_and_grad(loss_of)(activations, labels)
    state = apply_gradients(state, features, gradients)

Gradients are taken by the activations, so that nothing of the size of a table is made;
and they go to the optimizer as `[samples, D]` with each id's sample and factor, so that
nothing of the size `[ids, D]` is made of them either.
"""

import dataclasses
import functools
import reprlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.typing import ArrayLike

from sparse_adam.embedding.combine import combine, gather_batch
from sparse_adam.embedding.gradients import check_gradients, warn_of_missing_gradients
from sparse_adam.embedding.occurrences import Occurrences, occurrences
from sparse_adam.embedding.optimizer import Optimizer, is_traced, rates_now
from sparse_adam.embedding.stored import checked
from sparse_adam.embedding.tables import EmbeddingLayout, Feature, make_layout


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("tables",), meta_fields=("layout",)
)
@dataclasses.dataclass(frozen=True)
class EmbeddingState:
    """Tables with their slots: a pytree of arrays.

    It checkpoints, shards, scans and donates like any other.

    Attributes:
        tables: by name, the optimizer's state of each: for `Adam` an
            `AdamState(table, momenta, velocities)` of `[V, D]` arrays, or a
            `PackedTable`, whose `unpack()` returns them.
        layout: static: the features and what each one's table is.
    """

    tables: dict[str, Any]
    layout: EmbeddingLayout


def init(
    feature_config: Any,
    optimizer: Optimizer | None,
    key: jax.Array,
    *,
    storage: str | None = None,
) -> EmbeddingState:
    """Makes the tables of `feature_config`, and their slots.

    Args:
        feature_config: a `FeatureConfig`, or a nested structure of them. Features that
            hold the same `TableConfig` object share a table.
        optimizer: for the tables that have none of their own; None if all have.
        key: of `jax.random`, for the tables' first weights.
        storage: "plain" or "packed" tables, or None: packed ones where a TPU is in
            scope. What is looked up and learnt does not depend on it.

    Returns:
        The state to train.

    Raises:
        ValueError: see `TableConfig` and `FeatureConfig`; two tables have one name; a
            table has no optimizer.

    Example:
        >>> import jax
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig
        >>> video = TableConfig(vocabulary_size=8, dim=4, name="video")
        >>> features = {"watched": FeatureConfig(video), "liked": FeatureConfig(video)}
        >>> state = init(features, Adam(0.1), jax.random.key(0))
        >>> jax.tree.map(lambda x: x.shape, state.tables)
        {'video': AdamState(table=(8, 4), momenta=(8, 4), velocities=(8, 4))}
    """
    layout = make_layout(feature_config, optimizer)
    keys = jax.random.split(key, len(layout.tables))
    tables = {
        table.name: table.optimizer.init(
            table.config.initialize(key, table.name), storage, table.config.slot_dtype
        )
        for table, key in zip(layout.tables, keys, strict=True)
    }
    return EmbeddingState(tables, layout)


def lookup(state: EmbeddingState, features: Any, weights: Any = None) -> Any:
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
    activations = []
    for feature, part in _parts(layout, features, weights):
        table = layout.tables[feature.table]
        stored = checked(state.tables, table)
        activations.append(combine(stored, part, table.config, quantize=True))
    return jax.tree.unflatten(layout.structure, activations)


def apply_gradients(
    state: EmbeddingState,
    features: Any,
    activation_gradients: Any,
    weights: Any = None,
    *,
    learning_rates: Mapping[str, ArrayLike] | None = None,
    rounding: str = "nearest",
    key: jax.Array | None = None,
    implementation: str | None = None,
) -> EmbeddingState:
    """Updates the rows that `lookup(state, features, weights)` read.

    The gradient of a row is the sum over all its occurrences, in all samples of all
    features of its table, of the occurrence's factor in its sample (weight times
    combiner) times the gradient of the sample's activation. Each table has **one**
    update. All rows that were looked up are updated, also where their gradient is 0;
    ids beyond the length of a sequence were not looked up. Weights are constants.

    Donate the state (``jax.jit(step, donate_argnums=0)``) and tables are updated in
    place.

    Args:
        state: from `init` or from the update before.
        features: as in `lookup`.
        activation_gradients: nested alike, each of the shape of its activation: the
            loss's gradient by it, summed over samples, never averaged here. None
            counts as zeros, with a warning.
        weights: as in `lookup`.
        learning_rates: by table name, traced or not, in place of the optimizers' own;
            of some tables or all. Needed under `jit` for a rate that is a callable:
            pass `current_learning_rates(state)`, made outside, in as an argument.
        rounding: of bfloat16 tables and slots: "nearest", to which an update of less
            than half a unit in the last place is lost, or "stochastic", which keeps it
            on average.
        key: of `jax.random`, for stochastic rounding. Pass a new one at each step,
            `jax.random.fold_in(key, step)`; each table gets its own of it.
        implementation: of the update, as in `sparse_adam_update`.

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
        >>> print(state.tables["user"].table.round(4))
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
        rounding=rounding,
        key=key,
        implementation=implementation,
    )


def update_tables(
    state: EmbeddingState,
    features: Any,
    activation_gradients: Any,
    weights: Any,
    *,
    learning_rates: Mapping[str, ArrayLike] | None,
    rounding: str,
    key: jax.Array | None,
    implementation: str | None,
) -> EmbeddingState:
    """Does what `apply_gradients` says, without its warning."""
    layout = state.layout
    rates = _rates(state, learning_rates)
    parts = _parts(layout, features, weights)
    shapes = [(*part.shape, feature.config.table.dim) for feature, part in parts]
    gradients = check_gradients(layout, activation_gradients, shapes)
    parts_of: list[list[Occurrences]] = [[] for _ in layout.tables]
    gradients_of: list[list[jax.Array | None]] = [[] for _ in layout.tables]
    for (feature, part), gradient in zip(parts, gradients, strict=True):
        parts_of[feature.table].append(part)
        gradients_of[feature.table].append(gradient)
    keys = _keys(key, len(layout.tables))
    tables = {}
    for table, parts, grads, own_key in zip(
        layout.tables, parts_of, gradients_of, keys, strict=True
    ):
        batch = gather_batch(parts, grads, table.config)
        tables[table.name] = table.optimizer.update(
            checked(state.tables, table),
            batch.ids,
            batch.grads,
            learning_rate=rates[table.name],
            sample_ids=batch.sample_ids,
            gains=batch.gains,
            rounding=rounding,
            key=own_key,
            implementation=implementation,
        )
    return EmbeddingState(tables, layout)


def current_learning_rates(state: EmbeddingState) -> dict[str, Any]:
    """Asks for the rate of each table, now: by name, as `apply_gradients` takes them.

    A callable that several tables share is called once. Call this outside of `jit` and
    pass the rates in: a new value does not recompile.

    Example:
        >>> import jax
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig
        >>> rates = iter([0.1, 0.05])
        >>> state = init(FeatureConfig(TableConfig(4, 2, name="user")),
        ...              Adam(lambda: next(rates)), jax.random.key(0))
        >>> current_learning_rates(state), current_learning_rates(state)
        ({'user': 0.1}, {'user': 0.05})
    """
    tables = state.layout.tables
    rates = rates_now([table.optimizer for table in tables])
    return {table.name: rate for table, rate in zip(tables, rates, strict=True)}


def _parts(
    layout: EmbeddingLayout, features: Any, weights: Any
) -> list[tuple[Feature, Occurrences]]:
    ids = layout.leaves("features", features)
    weights = (
        [None] * len(ids) if weights is None else layout.leaves("weights", weights)
    )
    return [
        (feature, occurrences(feature, *own))
        for feature, *own in zip(layout.features, ids, weights, strict=True)
    ]


def activation_shapes(
    layout: EmbeddingLayout, features: Any, weights: Any
) -> list[tuple[int, ...]]:
    """Returns the shape of each feature's activations; refuses what `lookup` would."""
    return [
        (*part.shape, feature.config.table.dim)
        for feature, part in _parts(layout, features, weights)
    ]


def _keys(key: Any, count: int) -> list[Any]:
    """Returns a key for each table; what is no key, for its optimizer to refuse."""
    if not isinstance(key, jax.Array):
        return [key] * count
    return [jax.random.fold_in(key, number) for number in range(count)]


def _rates(
    state: EmbeddingState, given: Mapping[str, ArrayLike] | None
) -> dict[str, Any]:
    """Returns the rate of each table: the given one, or else the optimizer's own."""
    given = {} if given is None else given
    tables = state.layout.tables
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
    dynamic = [table.name for table in own if callable(table.optimizer.learning_rate)]
    if dynamic and is_traced():
        raise TypeError(
            f"the learning rates of the tables {dynamic} are callables, and this "
            "update is being traced (jit, scan): their values would be frozen. Call "
            "current_learning_rates(state) outside and pass it in: "
            "apply_gradients(..., learning_rates=rates)"
        )
    rates = rates_now([table.optimizer for table in own])
    return dict(given) | {t.name: rate for t, rate in zip(own, rates, strict=True)}
