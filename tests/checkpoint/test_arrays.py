"""Other arrays than tables: as they were, in the dtypes and places wanted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sparse_adam.checkpoint import (
    CheckpointMismatchError,
    RestoreArrays,
    SaveArrays,
    restore_latest,
)
from tests.checkpoint.states import (
    mesh,
)


def dense() -> Any:
    params = {"w": jnp.arange(12.0).reshape(3, 4), "b": [jnp.ones(3, jnp.bfloat16)]}
    others = {"mask": jnp.array([True, False]), "host": np.array([1.1, 2.2]), "n": 3}
    return params, optax.adam(optax.linear_schedule(0.1, 0.2, 3)).init(params), others


@pytest.mark.parametrize("count", [1, 2])
def test_other_arrays_are_restored_as_they_are_wanted(tmp_path, count):
    tree = dense()
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=SaveArrays(tree))
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.StandardSave(tree))
    with ocp.CheckpointManager(tmp_path) as manager:
        place = NamedSharding(mesh(count), PartitionSpec())
        like = jax.tree.map(
            lambda x: (
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
                if isinstance(x, jax.Array)
                else x
            ),
            tree,
        )
        for step in (0, 1):
            found = manager.restore(step, args=RestoreArrays(like))
            assert jax.tree.structure(found) == jax.tree.structure(tree)
            for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
                assert isinstance(x, jax.Array) == isinstance(y, jax.Array)
                assert isinstance(x, np.ndarray) == isinstance(y, np.ndarray)
                assert not isinstance(x, jax.Array) or x.sharding == place
                assert np.asarray(x).dtype == np.asarray(y).dtype
                assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
        narrow = jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)
        like[0]["w"] = narrow
        found = manager.restore(0, args=RestoreArrays(like))[0]["w"]
        assert found.dtype == jnp.bfloat16 and np.array_equal(found, tree[0]["w"])


def test_other_arrays_than_were_saved_are_refused(tmp_path):
    arrays = {"w": jnp.ones((2, 3)), "b": [jnp.ones(4)]}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=SaveArrays(arrays))
        for like, words in (
            ({**arrays, "w": jnp.ones((3, 2))}, r"\(2, 3\) at 'w', .* \(3, 2\)"),
            ({"w": arrays["w"]}, r"\(4,\) at 'b/0', and like has nothing"),
            ({**arrays, "c": jnp.ones(1)}, r"has nothing at 'c', and like has an"),
        ):
            with pytest.raises(CheckpointMismatchError, match=words):
                restore_latest(manager, RestoreArrays(like))
    with pytest.raises(TypeError, match=r"keys at 'a/key': pass jax\.random"):
        SaveArrays({"a": {"key": jax.random.key(0)}})
