"""Tables, ids and a mesh for the tests of all layers."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras

import sparse_adam.equinox
import sparse_adam.keras
import sparse_adam.linen
import sparse_adam.nnx
from sparse_adam.embedding import (
    Adam,
    EmbeddingState,
    FeatureConfig,
    TableConfig,
)

FOLDER = Path(__file__).parents[2] / "examples" / "layers"
USER = TableConfig(641, 4, jax.nn.initializers.ones, name="user")
FEATURES = {"user": FeatureConfig(USER)}
IDS = {"user": jnp.array([3, 5])}


def functional_model(base: type, **options: Any) -> tuple[Any, Any]:
    ids = keras.Input((1,), dtype="int32", name="user")
    layer = sparse_adam.keras.Embeddings(FEATURES, Adam(0.1), **options)
    out = keras.layers.Dense(1, kernel_initializer="ones")(layer({"user": ids})["user"])
    return base({"user": ids}, out), layer


def mesh_of_eight() -> jax.sharding.Mesh:
    return jax.make_mesh(
        (4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )


def check_spread(tables: EmbeddingState) -> None:
    """Tables are cut into four, one part for each two devices."""
    for array in jax.tree.leaves(tables):
        assert len(array.sharding.device_set) == 8
        assert len({str(shard.index) for shard in array.addressable_shards}) == 4
