"""What a batch holds, against counts in plain Python."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse import BCOO

from sparse_adam.embedding import (
    Adam,
    FeatureConfig,
    Ragged,
    Sparse,
    TableConfig,
    batch_stats,
    init,
)
from tests import programs
from tests.embedding.golden import KEY, normal

D = 4
A = TableConfig(10, D, normal, name="a")
B = TableConfig(3, D, normal, name="b")
FROZEN = TableConfig(3, D, normal, name="frozen", trainable=False)
INDICES = np.array([[0, 0], [1, 1], [9, 0], [1, 0]])  # the third is of no sample
FIELDS = ("ids", "valid", "ignored", "unique", "hottest")


def counted(num_rows, ids):
    inside = [i for i in ids if 0 <= i < num_rows]
    hottest = max(collections.Counter(inside).values(), default=0)
    ignored, share = len(ids) - len(inside), hottest / max(len(inside), 1)
    return len(ids), len(inside), ignored, len(set(inside)), share


@pytest.mark.parametrize("stack", [True, False])
def test_counts_of_every_form(stack):
    config = {
        "dense": FeatureConfig(A),
        "padded": FeatureConfig(A),
        "ragged": FeatureConfig(A),
        "sequence": FeatureConfig(B, max_sequence_length=2),
        "sparse": FeatureConfig(B),
        "bcoo": FeatureConfig(FROZEN),
    }
    indices = jnp.asarray(INDICES)
    ids = {
        "dense": np.array([9, 9, -5, 2**40]),
        "padded": jnp.array([[9, 1, -1], [10, -1, -1]]),
        "ragged": Ragged(np.array([1, 9, 13, 9, 9]), np.array([0, 2, 3])),
        "sequence": np.array([[0, 1, 1], [2, 3, 2]]),  # the last column is cut off
        "sparse": Sparse(INDICES, np.array([3, 2, 2, -1]), (2, 2)),
        "bcoo": BCOO((jnp.array([3, 4, 0, -1]), indices), shape=(2, 2)),
    }
    state = init(config, Adam(), KEY, stack=stack)
    found = jax.jit(lambda state: batch_stats(state, ids))(state)
    a = [9, 9, -5, 2**40, 9, 1, 10, 1, 9, 13]
    wanted = {
        "a": counted(10, a),
        "b": counted(3, [0, 1, 2, 3, 3, 2]),
        "frozen": counted(3, [3, 4]),
    }
    assert found.keys() == wanted.keys()
    for name, own in wanted.items():
        assert [x.dtype for x in found[name]] == [jnp.int32] * 4 + [jnp.float32]
        assert found[name]._fields == FIELDS
        np.testing.assert_allclose(found[name], own, rtol=1e-6, err_msg=name)


def test_a_batch_of_nothing_unsigned_ids_and_floats():
    state = init(FeatureConfig(B), Adam(), KEY)
    stats = jax.jit(batch_stats)
    assert [float(x) for x in stats(state, np.zeros((0,), np.int32))["b"]] == [0] * 5
    found = stats(state, jnp.array([2, 255], jnp.uint8))["b"]
    assert [float(x) for x in found] == [2, 1, 1, 1, 1]
    with pytest.raises(TypeError, match="must be an integer dtype"):
        batch_stats(state, np.ones(2))


def test_a_count_of_ignored_ids_needs_no_sort():
    """A step that watches for ids of no row returns nothing else of them."""
    state = init({"a": FeatureConfig(A), "b": FeatureConfig(B)}, Adam(), KEY)
    ids = {"a": jnp.array([9, 10, -1]), "b": jnp.array([[1, 2], [3, 4]])}

    def count(state, ids):
        return {name: own.ignored for name, own in batch_stats(state, ids).items()}

    assert {name: int(x) for name, x in count(state, ids).items()} == {"a": 1, "b": 2}
    for function, sorts in ((count, False), (batch_stats, True)):
        program = jax.jit(function).lower(state, ids).compile()
        assert (" sort(" in programs.text(program)) == sorts
