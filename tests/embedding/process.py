"""One of several processes that train together: number, how many, port, folder, runs.

All of them together have four devices, and each passes its own part of every batch. The
last device has no ids. One more batch, for runs named "uneven", does not divide by the
devices: it is whole on each process.

A run is the name of a folder of checkpoints, from the last of which it goes on. With
`name:step` the last process kills itself before that step. `name+orbax` saves the end
by Orbax too, from where `name=other` restores the run `other`.
"""

import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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
UNEVEN = 10  # samples of the batch after the last step
DEVICES = 4


def numbers(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """First weights that take no time to compile."""
    del key
    return jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(dtype))


CONFIG = {
    "one": FeatureConfig(TableConfig(V, D, numbers, name="one")),
    "two": FeatureConfig(TableConfig(13, D, numbers, combiner="sum", name="two")),
}


def batch(number: int) -> dict[str, np.ndarray]:
    """The whole batch of a step; the samples of the last device have no ids."""
    rng, size = np.random.default_rng(number), B if number < STEPS else UNEVEN
    ids = {
        "one": rng.integers(0, V, (size, PLACES), np.int32),
        "two": rng.integers(0, 13, (size, PLACES), np.int32),
    }
    for own in ids.values():
        own[-B // DEVICES :] = -1
    return ids


def new(key: jax.Array, mesh: Mesh | None) -> EmbeddingState:
    return init(CONFIG, Adagrad(0.1), key, mesh=mesh)


@jax.jit
def step(state: EmbeddingState, ids: Any) -> EmbeddingState:
    activations = lookup(state, ids)
    gradients = jax.tree.map(lambda x: 3 * x + 1, activations)
    return apply_gradients(state, ids, gradients)


def spread(ids: dict[str, np.ndarray], mesh: Mesh) -> Any:
    """Returns a batch of which this process passes its own part, if parts are equal."""
    if any(len(x) % mesh.size for x in ids.values()):
        return ids
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    make = functools.partial(jax.make_array_from_process_local_data, place)
    count, me = jax.process_count(), jax.process_index()
    return {name: make(np.split(x, count)[me]) for name, x in ids.items()}


def train(
    mesh: Mesh | None,
    folder: Path,
    steps: int,
    dies_before: int | None = None,
    orbax: bool = False,
) -> dict[str, dict[str, np.ndarray]]:
    """Makes steps from the last checkpoint of a folder on; returns the tables.

    Args:
        mesh: whose devices train; None for one device.
        folder: has a file for each step that was made, written by process 0.
        steps: how many are to be made in all.
        dies_before: the step before which the last process kills itself.
        orbax: saves the end by Orbax too.
    """
    state = new(jax.random.key(0), mesh)
    first = len(list(folder.glob("*.npz")))
    if first:
        with np.load(folder / f"{first - 1}.npz") as saved:
            tables: dict[str, Any] = {name: {} for name in CONFIG}
            for name, x in saved.items():
                table, _, array = name.partition("/")
                tables[table][array] = x
        state = from_logical(state, tables)
    for number in range(first, steps):
        if number == dies_before and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ids = batch(number)
        state = step(state, ids if mesh is None else spread(ids, mesh))
        logical = jax.tree.map(np.asarray, to_logical(state))
        if jax.process_index() == 0:
            save(folder / f"{number}.npz", logical)
    if orbax:
        from tests.embedding import by_orbax  # takes seconds, in each process

        by_orbax.save(folder, steps, state, mesh)
    return jax.tree.map(np.asarray, to_logical(state))


def save(file: Path, tables: dict[str, dict[str, np.ndarray]]) -> None:
    """Writes tables to a file that is whole as soon as it has its name."""
    flat: Any = {
        f"{table}/{name}": x for table, own in tables.items() for name, x in own.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    with new.open("wb") as writer:
        np.savez(writer, **flat)
    new.replace(file)


if __name__ == "__main__":
    number, count, port, folder, *runs = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", DEVICES // int(count))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", int(count), int(number))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    for run in runs:
        name, _, other = run.partition("=")
        if other:
            from tests.embedding import by_orbax

            tables = by_orbax.restored(Path(folder, other), mesh)
            save(Path(folder, name, "found", f"{number}.npz"), tables)
            continue
        name, _, orbax = run.partition("+")
        name, _, step_of_death = name.partition(":")
        checkpoints = Path(folder, name)
        dies_before = int(step_of_death) if step_of_death else None
        steps = STEPS + (name == "uneven")
        found = train(mesh, checkpoints, steps, dies_before, bool(orbax))
        save(checkpoints / "found" / f"{number}.npz", found)
