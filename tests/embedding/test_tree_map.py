"""A state as a pytree: computing with its leaves is right or is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam._types import Storage
from sparse_adam.embedding import (
    Adam,
    EmbeddingState,
    FeatureConfig,
    TableConfig,
    TPUEmbedding,
    apply_gradients,
    from_logical,
    init,
    lookup,
    map_arrays,
    serving_embedding_lookup,
    to_logical,
    weights_only,
)
from tests.embedding.golden import normal
from tests.embedding.test_tpu_embedding import assert_same

V, D = 9, 4  # two tables that share a stack, and rows between them that nobody uses
CONFIG = [
    FeatureConfig(TableConfig(V, D, normal, combiner="sum", name=name)) for name in "ab"
]
IDS = [jnp.array([3, -1, 8])] * 2
STORED = [("plain", True), ("plain", False), ("packed", True), ("packed", False)]


def state(seed: int, storage: Storage, stack: bool) -> EmbeddingState:
    key = jax.random.key(seed)
    return init(CONFIG, Adam(0.1), key, storage=storage, stack=stack)


def mean(x: Any, y: Any) -> Any:
    return (x + y) / 2


def halved(x: Any) -> Any:
    return x.astype(jnp.bfloat16)


# Of one state or of two, as users write them; each makes floats of the leaves.
COMPUTED = {
    "average": lambda a, b: jax.tree.map(mean, a, b),
    "moving average": lambda a, b: jax.tree.map(lambda x, y: 0.9 * x + 0.1 * y, a, b),
    "cast": lambda a, b: jax.tree.map(halved, a),
    "noise": lambda a, b: jax.tree.map(lambda x: x + 0.5, a),
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize(("storage", "stack"), STORED)
def test_computing_with_leaves_is_right_or_refused(name, storage, stack):
    compute, pair = COMPUTED[name], (state(0, storage, stack), state(1, storage, stack))
    with jax.numpy_dtype_promotion("standard"):
        got = compute(*pair)
        plain = (state(0, "plain", False), state(1, "plain", False))
        want = {
            name: compute(plain[0].table(name), plain[1].table(name)) for name in "ab"
        }
    if storage == "plain":
        for table in "ab":
            assert_same(got.table(table), want[table], rtol=0)
            assert got.table(table).dtype == want[table].dtype
        looked_up = lookup(got, IDS)
        assert_same(looked_up[0][0], want["a"][3])
        new = apply_gradients(got, IDS, jax.tree.map(jnp.ones_like, looked_up))
        assert np.all(new.table("a")[8] != want["a"][8])
        return
    other = TPUEmbedding(CONFIG, Adam(0.1), storage=storage, stack=stack)
    for use in (
        lambda: lookup(got, IDS),
        lambda: jax.jit(lookup)(got, IDS),
        lambda: serving_embedding_lookup(got, IDS),
        lambda: apply_gradients(got, IDS, [jnp.ones((3, D))] * 2),
        lambda: got.table("a"),
        lambda: got.slots("a"),
        lambda: to_logical(got),
        lambda: from_logical(got, {}),
        lambda: map_arrays(halved, got),
        lambda: weights_only(got),
        lambda: setattr(other, "state", got),
    ):
        with pytest.raises(TypeError, match=r"packed.lines.dtype=.* must be int32"):
            use()


@pytest.mark.parametrize(("storage", "stack"), STORED)
def test_the_ways_that_are_right_for_every_storage(storage, stack):
    pair = state(0, storage, stack), state(1, storage, stack)
    want = jax.tree.map(mean, *(to_logical(state(n, "plain", False)) for n in (0, 1)))
    assert_same(to_logical(map_arrays(mean, *pair)), want, rtol=0)
    cast = map_arrays(halved, pair[0])
    assert {x.dtype for x in jax.tree.leaves(to_logical(cast))} == {
        np.dtype(jnp.bfloat16)
    }
    assert_same(cast.table("b"), halved(pair[0].table("b")), rtol=0)
    # Of leaves also the slots, the rows between tables and a packed row's rest count.
    logical = to_logical(pair[0])
    assert sum(own["parameters"].size for own in logical.values()) == 2 * V * D
    assert sum(x.size for x in jax.tree.leaves(logical)) == 3 * 2 * V * D
