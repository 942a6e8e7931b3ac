"""TensorFlow's correctness test as the tests of the embedding API set it up."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_adam.embedding import (
    Adam,
    EmbeddingState,
    FeatureConfig,
    TableConfig,
    init,
)
from tests.embedding.model import FORMS, Rows

KEY = jax.random.key(0)


def ramp(key: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.arange(np.prod(shape), dtype=dtype).reshape(shape)


def normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


def golden_a(
    initializer: Any = ramp, **options: Any
) -> tuple[dict[str, FeatureConfig], dict[str, Rows], EmbeddingState]:
    """The tables, features and ids of TensorFlow's correctness test."""
    video = TableConfig(8, 4, initializer, combiner="sum", name="video")
    user = TableConfig(16, 2, initializer, combiner="mean", name="user")
    config = {
        "watched": FeatureConfig(video),
        "favorited": FeatureConfig(video),
        "friends": FeatureConfig(user),
    }
    rows = {
        "watched": Rows([[0], [0, 1]]),
        "favorited": Rows([[0, 1], [1]]),
        "friends": Rows([[3], [0, 1, 2]]),
    }
    return config, rows, init(config, Adam(0.1, **options), KEY)


def to_form(
    rows: Mapping[str, Rows], form: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    pairs = {name: FORMS[form](own) for name, own in rows.items()}
    return ({n: p[0] for n, p in pairs.items()}, {n: p[1] for n, p in pairs.items()})


def loss_of(activations: Mapping[str, Any]) -> Any:
    """The sum over features of the mean over samples of the sum of squares."""
    return sum((x**2).reshape(len(x), -1).sum(1).mean() for x in activations.values())
