"""The nearest rows of a table of an embedding: of its own rows only."""

import jax
import numpy as np
import pytest

from sparse_adam.embedding import (
    Adam,
    FeatureConfig,
    TableConfig,
    init,
    nearest,
    weights_only,
)
from tests.embedding.golden import normal
from tests.ops.test_nearest import check

CONFIG = {
    name: FeatureConfig(TableConfig(size, 12, normal, name=name))
    for name, size in (("a", 70), ("b", 133), ("c", 41))
}


@pytest.mark.parametrize("storage", ["plain", "packed"])
@pytest.mark.parametrize("devices", [1, 8])
def test_only_the_rows_of_the_table_are_searched(storage, devices):
    """Rows of other tables would score highest, and those between tables are zeros."""
    mesh = None
    if devices > 1:
        mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    state = init(CONFIG, Adam(), jax.random.key(0), storage=storage, mesh=mesh)
    assert len(state.stacks) == 1
    queries = np.asarray(-10 * state.table("b")[np.array([3, 132, 50, 77, 0])])
    for one in (state, weights_only(state)):
        found = nearest(one, "b", queries, 7, block_rows=40)
        check(found, state.table("b"), queries)
    found = nearest(state, "c", queries, 41, metric="cosine")
    check(found, state.table("c"), queries, 41, "cosine")


def test_refused():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "x")
    state = init(CONFIG, Adam(), jax.random.key(0), mesh=mesh)
    query = np.ones(12, np.float32)
    with pytest.raises(KeyError, match="none of the tables"):
        nearest(state, "other", query, 1)
    with pytest.raises(ValueError, match="k=71 must be at least 1 and at most 70"):
        nearest(state, "a", query, 71)
    rows = jax.sharding.PartitionSpec("x")
    inside = jax.shard_map(
        lambda state: nearest(state, "a", query, 1),
        mesh=mesh,
        in_specs=rows,
        out_specs=rows,
        check_vma=False,
    )
    with pytest.raises(ValueError, match=r"nearest\(\) within jax.shard_map"):
        inside(state)
