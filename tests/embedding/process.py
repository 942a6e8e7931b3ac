"""One of several processes that train together: number, how many, port, file to write.

Each process has two devices, and passes its own part of every batch.
"""

import functools
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparse_adam.embedding import (
    Adagrad,
    EmbeddingState,
    FeatureConfig,
    TableConfig,
    apply_gradients,
    init,
    lookup,
    to_logical,
)

V, D, B, PLACES, STEPS = 91, 4, 12, 3, 3
CONFIG = {
    "one": FeatureConfig(TableConfig(V, D, name="one")),
    "two": FeatureConfig(TableConfig(13, D, combiner="sum", name="two")),
}


def batch(number: int) -> dict[str, np.ndarray]:
    """The whole batch of a step; the last quarter of the samples has no ids."""
    rng = np.random.default_rng(number)
    ids = {
        "one": rng.integers(0, V, (B, PLACES), np.int32),
        "two": rng.integers(0, 13, (B, PLACES), np.int32),
    }
    for own in ids.values():
        own[-B // 4 :] = -1
    return ids


@jax.jit
def step(state: EmbeddingState, ids: Any) -> EmbeddingState:
    activations = lookup(state, ids)
    gradients = jax.tree.map(lambda x: 3 * x + 1, activations)
    return apply_gradients(state, ids, gradients)


def spread(ids: dict[str, np.ndarray], mesh: Mesh) -> Any:
    """Returns a batch of which this process passes its own part."""
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    make = functools.partial(jax.make_array_from_process_local_data, place)
    count, me = jax.process_count(), jax.process_index()
    return {name: make(np.split(x, count)[me]) for name, x in ids.items()}


def train(mesh: Mesh | None) -> dict[str, dict[str, np.ndarray]]:
    """Makes some steps, on one device or on those of a mesh; returns the tables."""
    state = init(CONFIG, Adagrad(0.1), jax.random.key(0), mesh=mesh)
    for number in range(STEPS):
        ids = batch(number)
        state = step(state, ids if mesh is None else spread(ids, mesh))
        jax.block_until_ready(state)
    return jax.tree.map(np.asarray, to_logical(state))


if __name__ == "__main__":
    number, count, port, file = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", int(count), int(number))
    tables = train(Mesh(np.array(jax.devices()), ("data",)))
    flat: Any = {
        f"{table}/{name}": x for table, own in tables.items() for name, x in own.items()
    }
    np.savez(file, **flat)
