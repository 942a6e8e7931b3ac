"""What the two towers share: features, first weights, batches and the loss."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_adam.embedding import FeatureConfig, TableConfig


def first_weights(_: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    """Makes the same weights in every framework; a model of yours draws random ones."""
    return jax.random.normal(jax.random.key(0), shape, dtype) * 0.2


user = TableConfig(1000, 16, first_weights, name="user")
item = TableConfig(5000, 16, first_weights, combiner="mean", name="item")
features = {
    "user": FeatureConfig(user),
    "history": FeatureConfig(item),  # both are looked up in one table
    "candidate": FeatureConfig(item),
}


def batches(steps: int = 20, size: int = 32) -> list[tuple[dict[str, Any], Any]]:
    """Draws ids, and whether each user clicked: on every candidate of an odd id."""
    draw = np.random.default_rng(0)
    ids = [
        {
            "user": draw.integers(50, size=(size, 1), dtype=np.int32),
            "history": draw.integers(-1, 50, (size, 4), np.int32),  # -1: no id
            "candidate": draw.integers(10, size=(size, 1), dtype=np.int32),
        }
        for _ in range(steps)
    ]
    return [(each, np.float32(each["candidate"][:, 0] % 2)) for each in ids]


def loss_of(logits: Any, clicked: Any) -> jax.Array:
    """Returns the mean cross entropy of clicks."""
    return jnp.mean(jax.nn.softplus(logits) - clicked * logits)
