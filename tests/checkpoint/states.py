"""States of tables for the tests of checkpoints, and how they are compared."""

import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh

from sparse_adam import PackedTable
from sparse_adam.checkpoint import (
    RestoreTables,
    SaveTables,
)
from sparse_adam.embedding import (
    SGD,
    Adagrad,
    EmbeddingState,
    FeatureConfig,
    TableConfig,
    init,
)

SIZES = {"user": 13, "item": 40}  # 40 rows divide by the number of devices
ADAGRAD = Adagrad(0.1)
FORMS = list(itertools.product(("plain", "packed"), (True, False), (1, 2, 8)))


def config(sizes: Mapping[str, int] = SIZES, **options: Any) -> dict[str, Any]:
    return {
        name: FeatureConfig(TableConfig(size, 2, name=name, **options))
        for name, size in sizes.items()
    }


@functools.cache
def mesh(count: int, kind: AxisType = AxisType.Auto) -> Mesh:
    devices = jax.devices()[:count]
    return jax.make_mesh((count,), ("x",), axis_types=(kind,), devices=devices)


def new(
    seed: int = 0,
    features: Any = None,
    optimizer: Any = ADAGRAD,
    **how: Any,
) -> EmbeddingState:
    features = config() if features is None else features
    return init(features, optimizer, jax.random.key(seed), **how)


def shapes(*arguments: Any, **how: Any) -> EmbeddingState:
    return jax.eval_shape(functools.partial(new, *arguments, **how))


def of_form(storage: str, stack: bool, count: int) -> EmbeddingState:
    on = mesh(count) if count > 1 else None
    return shapes(storage=storage, stack=stack, mesh=on)


def random_arrays(like: EmbeddingState) -> Any:
    """Weights and slots by table that differ in every number."""
    rng = np.random.default_rng(0)
    return {
        table.name: {
            name: rng.normal(size=shape).astype(np.float32)
            for name, shape in zip(table.array_names, table.shapes, strict=True)
        }
        for table in like.layout.tables
    }


def assert_same_bits(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def saved(folder: Path, state: EmbeddingState, step: int = 0) -> Path:
    with ocp.CheckpointManager(folder) as manager:
        assert manager.save(step, args=SaveTables(state))
    return folder


def restored(folder: Path, like: EmbeddingState, **how: Any) -> EmbeddingState:
    with ocp.CheckpointManager(folder) as manager:
        return manager.restore(0, args=RestoreTables(like, **how))


def unpacked(state: EmbeddingState) -> list[tuple[jax.Array, ...]]:
    return [tuple(x.unpack() if is_packed(x) else x) for x in state.stacks]


def is_packed(stored: Any) -> bool:
    return isinstance(stored, PackedTable)


def one_array(seed: int = 0) -> EmbeddingState:
    """Orbax complains, later, of other arrays that it was reading at an error."""
    return new(seed, config({"user": 13}), SGD())
