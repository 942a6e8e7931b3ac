"""What is asked of ids on the host, before they reach compiled code."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sparse_adam.embedding.config import is_int
from sparse_adam.embedding.inputs import (
    Ragged,
    Sparse,
    as_array,
    check_splits,
    is_bcoo,
)
from sparse_adam.embedding.tables import EmbeddingLayout
from sparse_adam.ops.integers import integers


def is_input(value: Any) -> bool:
    """Tells whether a pytree of arrays is the ids or weights of one feature."""
    return isinstance(value, Ragged | Sparse) or is_bcoo(value)


def batch_size_of(argument: str, value: Any) -> int | None:
    """Returns the number of samples that every feature must have; None for any.

    Raises:
        ValueError: it is neither.
    """
    if value is not None and (not is_int(value) or value < 1):
        raise ValueError(
            f"{argument}={value!r} must be an int and at least 1; None is not checked"
        )
    return value


def check_batch_size(layout: EmbeddingLayout, features: Any, size: int | None) -> None:
    """Refuses a batch of which a feature has another number of samples than `size`.

    Raises:
        ValueError: it has; None is not checked.
    """
    if size is None:
        return
    leaves = layout.leaves("features", features)
    for feature, ids in zip(layout.features, leaves, strict=True):
        if _num_samples(ids) != size:
            raise ValueError(
                f"feature {feature.name!r} has {_num_samples(ids)} samples; they must "
                f"be batch_size={size}"
            )


def _num_samples(ids: Any) -> int:
    """Returns how many samples a feature's ids, in any form, are of."""
    if isinstance(ids, Ragged):
        return np.shape(ids.row_splits)[0] - 1
    shape = ids.dense_shape if isinstance(ids, Sparse) else np.shape(ids)
    return int(np.prod(shape[:-1])) if len(shape) > 1 else int(np.prod(shape))


def ready_for_jit(
    layout: EmbeddingLayout, features: Any, weights: Any
) -> tuple[Any, Any]:
    """Returns ids, of 32 bits, and weights, checked for what compiled code can not see.

    `jit` would let 64-bit NumPy integers wrap around. What does not fit becomes -1: no
    id, no place. Arrays of other libraries become NumPy's.

    Args:
        layout: of the features.
        features: ids in any form, nested as the features are.
        weights: nested alike, or None.

    Raises:
        TypeError: ids that are not integers.
        ValueError: another structure, row splits that are none, or weights with other
            ones.
    """
    ids_of = layout.leaves("features", features)
    weights_of = [None] * len(ids_of)
    if weights is not None:
        weights_of = layout.leaves("weights", weights)
    ready = [
        _ready(repr(feature.name), ids, own)
        for feature, ids, own in zip(layout.features, ids_of, weights_of, strict=True)
    ]
    ids_of, weights_of = zip(*ready, strict=True)
    structure = layout.structure
    features = jax.tree.unflatten(structure, ids_of)
    if weights is not None:
        weights = jax.tree.unflatten(structure, weights_of)
    return features, weights


def some_ready_for_jit(features: Any, weights: Any) -> tuple[Any, Any]:
    """Does what `ready_for_jit` does for any part of the features."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(features, is_leaf=is_input)
    given, own = jax.tree_util.tree_flatten_with_path(weights, is_leaf=is_input)
    weight_at = dict(given)
    ids = []
    for path, leaf in leaves:
        where = jax.tree_util.keystr(path)
        ready, weight = _ready(where, leaf, weight_at.get(path))
        ids.append(ready)
        if path in weight_at:
            weight_at[path] = weight
    return (
        jax.tree.unflatten(structure, ids),
        jax.tree.unflatten(own, weight_at.values()),
    )


def _ready(feature: str, ids: Any, weights: Any) -> tuple[Any, Any]:
    """Makes the ids and weights of one feature ready."""
    name = f"ids of feature {feature}"
    if isinstance(ids, Ragged):
        check_splits(name, ids, weights)
    ready = functools.partial(_in_32_bits, name)
    return (
        _of_each_array(ready, ids),
        _of_each_array(
            functools.partial(as_array, f"weights of feature {feature}"), weights
        ),
    )


def _of_each_array(function: Callable[[Any], Any], values: Any) -> Any:
    if values is None or is_bcoo(values):
        return values
    if isinstance(values, Ragged | Sparse):
        return jax.tree.map(function, values)
    return function(values)


def _in_32_bits(name: str, ids: Any) -> jax.Array | np.ndarray:
    ids = as_array(name, ids)
    integers(name, ids)
    if isinstance(ids, jax.Array) or ids.dtype.itemsize < 4:
        return ids
    fits = (ids >= 0) & (ids < 2**31)
    return np.where(fits, ids, -1).astype(np.int32)
