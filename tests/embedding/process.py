"""One of several processes that train together: number, how many, port, folder.

Each process has two devices, and passes its own part of every batch. The processes
train to the end, and then once more from the beginning, until the last one kills
itself. Started again with the same folder, they go on from the last checkpoint.
"""

import functools
import os
import signal
import sys
from pathlib import Path
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
    from_logical,
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


def train(
    mesh: Mesh | None, folder: Path, dies_before: int | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """Makes steps from the last checkpoint of a folder on; returns the tables.

    Args:
        mesh: whose devices train; None for one device.
        folder: has a file for each step that was made, written by process 0.
        dies_before: the step before which the last process kills itself.
    """
    state = init(CONFIG, Adagrad(0.1), jax.random.key(0), mesh=mesh)
    first = len(list(folder.glob("*.npz")))
    if first:
        with np.load(folder / f"{first - 1}.npz") as saved:
            tables: dict[str, Any] = {name: {} for name in CONFIG}
            for name, x in saved.items():
                table, _, array = name.partition("/")
                tables[table][array] = x
        state = from_logical(state, tables)
    for number in range(first, STEPS):
        if number == dies_before and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ids = batch(number)
        state = step(state, ids if mesh is None else spread(ids, mesh))
        logical = jax.tree.map(np.asarray, to_logical(state))
        if jax.process_index() == 0:
            save(folder / f"{number}.npz", logical)
    return jax.tree.map(np.asarray, to_logical(state))


def save(file: Path, tables: dict[str, dict[str, np.ndarray]]) -> None:
    """Writes tables to a file that is whole as soon as it has its name."""
    flat: Any = {
        f"{table}/{name}": x for table, own in tables.items() for name, x in own.items()
    }
    file.parent.mkdir(exist_ok=True)
    new = file.with_suffix(".new")
    with new.open("wb") as writer:
        np.savez(writer, **flat)
    new.replace(file)


if __name__ == "__main__":
    number, count, port, folder = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", int(count), int(number))
    mesh, out = Mesh(np.array(jax.devices()), ("data",)), Path(folder)
    broken = out / "broken"
    again = broken.exists()
    if not again:
        save(out / number / "whole.npz", train(mesh, out / "whole"))
    save(out / number / "broken.npz", train(mesh, broken, None if again else 2))
