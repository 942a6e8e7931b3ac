"""Serving: weights without slots, and lookups of any part of the features."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparse_adam.embedding.combine import Part, activations_of
from sparse_adam.embedding.host import is_input
from sparse_adam.embedding.inputs import Ragged
from sparse_adam.embedding.occurrences import occurrences
from sparse_adam.embedding.optimizer import PARAMETERS
from sparse_adam.embedding.state import EmbeddingState
from sparse_adam.embedding.stored import checked, without_slots


def weights_only(state: EmbeddingState, *, ema: bool = False) -> EmbeddingState:
    """Returns a state for serving: all tables frozen, and so without slots.

    Lookups of it are those of `state`, to the bit, from a fraction of the memory: a
    third with `Adam`.

    Args:
        state: of any stacking and storage, both of which stay.
        ema: True takes the moving average for the weights, in their dtype, of each
            table whose optimizer keeps one (`ema_decay=`).

    Returns:
        A state as of tables with `trainable=False`. Weights of plain tables are the
        state's own arrays: copy them, `jax.tree.map(jnp.copy, weights_only(state))`,
        if a training step goes on to donate those.

    Raises:
        TypeError: the state has arrays of a wrong dtype.
        ValueError: the state is not of its layout's shape, or `ema` is True and no
            table keeps an average.

    Examples:
        >>> import jax
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig, init
        >>> config = FeatureConfig(TableConfig(4, 2, name="user"))
        >>> served = weights_only(init(config, Adam(), jax.random.key(0)))
        >>> [x.shape for x in jax.tree.leaves(served)], served.slots("user")
        ([(4, 2)], {})
    """
    own, layout = state.layout.stacks, state.layout.frozen()
    names = ["ema" if ema and "ema" in s.array_names else PARAMETERS for s in own]
    if ema and "ema" not in names:
        raise ValueError(
            f"{ema=}, but no table keeps an average: pass ema_decay= to the optimizer, "
            "or serve the weights"
        )
    stacks = map(without_slots, checked(state.stacks, own), own, layout.stacks, names)
    return EmbeddingState(tuple(stacks), layout)


def serving_embedding_lookup(
    state: EmbeddingState, features: Any, weights: Any = None
) -> Any:
    """Looks up some of the features, as TensorFlow serves them on a CPU.

    Differs from `lookup` in three things. `features` may leave features out. Rows are
    read as they are stored, without simulated quantization. And for features with
    `validate_weights_and_indices`, sparse ids of a weight <= 0 are dropped, unless the
    combiner is "sum".

    Args:
        state: the state to read.
        features: as in `lookup`, or a part of that structure.
        weights: as in `lookup`, or a part of that structure.

    Returns:
        The activations, nested as `features`.

    Raises:
        TypeError: ids are not integers.
        ValueError: a feature that is not in the configuration; shapes or weights as in
            `lookup`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig, init
        >>> table = TableConfig(4, 2, initializer=jax.nn.initializers.ones)
        >>> config = {"user": FeatureConfig(table), "item": FeatureConfig(table)}
        >>> state = init(config, Adam(), jax.random.key(0))
        >>> print(serving_embedding_lookup(state, {"item": jnp.array([3, -1])}))
        {'item': Array([[1., 1.],
               [0., 0.]], dtype=float32)}
    """
    layout = state.layout
    feature_at = {feature.path: feature for feature in layout.features}
    given, structure = _flatten_inputs("features", features, feature_at)
    weight_at, _ = _flatten_inputs("weights", weights, dict(given))
    parts = []
    for path, ids in given.items():
        feature = feature_at[path]
        part = occurrences(feature, ids, weight_at.get(path))
        if (
            feature.config.validate_weights_and_indices
            and part.weights is not None
            and feature.config.table.combiner != "sum"
            and not isinstance(ids, Ragged)
        ):
            part = part._replace(ids=jnp.where(part.weights > 0, part.ids, -1))
        parts.append(Part.of(layout, feature, part))
    stacks = checked(state.stacks, layout.stacks)
    activations = activations_of(layout, stacks, parts, quantize=False)
    return jax.tree.unflatten(structure, activations)


def _flatten_inputs(
    what: str, tree: Any, allowed: Mapping[str, Any]
) -> tuple[dict[str, Any], Any]:
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_input)
    found = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    for path in found:
        if path not in allowed:
            raise ValueError(
                f"{what} have {path or 'one array'}, which is not among "
                f"{sorted(allowed)}: pass these, or some of them, nested as "
                "feature_config is"
            )
    return found, structure
