"""The end of a run of `process.py`, saved by Orbax and restored by other processes."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparse_adam.checkpoint import (
    RestoreArrays,
    RestoreTables,
    SaveArrays,
    SaveTables,
    restore_latest,
)
from sparse_adam.embedding import EmbeddingState, to_logical
from tests.embedding import process

DENSE = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def save(folder: Path, steps: int, state: EmbeddingState, mesh: Mesh | None) -> None:
    """Saves tables, and arrays that all processes have alike."""
    others = {"dense": on_all(mesh, DENSE), "numbers": DENSE, "steps": steps}
    args = {"tables": SaveTables(state), "others": SaveArrays(others)}
    with manager_of(folder) as manager:
        manager.save(steps, args=ocp.args.Composite(**args))


def restored(folder: Path, mesh: Mesh | None) -> dict[str, dict[str, np.ndarray]]:
    """Returns the tables that were saved last, with however many processes."""
    make = functools.partial(process.new, mesh=mesh)
    like = jax.eval_shape(make, jax.random.key(0))
    zeros = np.zeros_like(DENSE)
    others = {"dense": on_all(mesh, zeros), "numbers": zeros, "steps": 0}
    args = {"tables": RestoreTables(like), "others": RestoreArrays(others)}
    with manager_of(folder) as manager:
        found: Any = restore_latest(manager, ocp.args.Composite(**args))
    assert found.items.others["steps"] == found.step
    for name in ("dense", "numbers"):
        assert isinstance(found.items.others[name], type(others[name]))
        assert np.asarray(found.items.others[name]).tobytes() == DENSE.tobytes()
    return jax.tree.map(np.asarray, to_logical(found.items.tables))


def manager_of(folder: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager((folder / "orbax").absolute())


def on_all(mesh: Mesh | None, array: np.ndarray) -> jax.Array:
    return jax.device_put(array, mesh and NamedSharding(mesh, PartitionSpec()))
