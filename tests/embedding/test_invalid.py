"""Ids that are of no row, refused: on the host, and by checkify."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.experimental.sparse import BCOO

from sparse_adam.embedding import (
    Adam,
    FeatureConfig,
    Ragged,
    Sparse,
    TableConfig,
    TPUEmbedding,
    check_ids,
    init,
    lookup,
)

TABLE = TableConfig(10, 2, jax.nn.initializers.ones, name="rows")
CONFIG = {"a{b}": FeatureConfig(TABLE)}
STATE = init(CONFIG, Adam(), jax.random.key(0))
INDICES = np.array([[0, 0], [2, 0], [1, 1]])  # the second is of no sample
RULE = r"it must be in \[0, 10\), the rows of table 'rows', or -1 for none"

# The ids of a batch, and what is wrong with the first that is.
WRONG = [
    (np.array([3, -1, 10]), r"id 10 at \[2\]"),
    (np.array([[3, -1], [-2, 12]]), r"id -2 at \[1, 0\]"),
    (Ragged(np.array([1, 11, 99]), np.array([0, 0, 2])), r"id 11 at \[1\]"),
    (Sparse(INDICES, np.array([1, 99, 10]), (2, 2)), r"id 10 at \[2\]"),
    (BCOO((jnp.array([1, 99, 10]), jnp.array(INDICES)), shape=(2, 2)), r"id 10 at"),
    (np.array([[[1]], [[200]]], np.uint8), r"id 200 at \[1, 0, 0\]"),
    (np.array([2**32 + 3]), r"id 4294967299 at \[0\]"),
]
RIGHT = [
    np.array([0, 9, -1]),
    np.array([0, 9], np.uint64),
    np.zeros((0, 3), np.int32),
    Ragged(np.array([9, 99]), np.array([0, 1])),
    Sparse(INDICES, np.array([0, 99, 9]), (2, 2)),
]


@pytest.mark.parametrize(("ids", "text"), WRONG)
def test_an_invalid_id_is_named(ids, text):
    with pytest.raises(ValueError, match=rf"feature 'a\{{b\}}' has the {text}.*{RULE}"):
        lookup(STATE, {"a{b}": ids}, on_invalid_ids="error")
    lookup(STATE, {"a{b}": ids})


@pytest.mark.parametrize(("ids", "text"), WRONG[:-1])
def test_traced_ids_are_checked_by_checkify(ids, text):
    def look_up(ids):
        return lookup(STATE, {"a{b}": ids}, on_invalid_ids="error")

    ids = jax.tree.map(jnp.asarray, ids)
    error, found = jax.jit(checkify.checkify(look_up))(ids)
    with pytest.raises(
        checkify.JaxRuntimeError, match=rf"feature 'a\{{b\}}' has the {text}.*{RULE}"
    ):
        error.throw()
    np.testing.assert_array_equal(found["a{b}"], lookup(STATE, {"a{b}": ids})["a{b}"])


@pytest.mark.parametrize("ids", RIGHT)
def test_padding_and_what_no_sample_owns_are_no_errors(ids):
    check_ids(STATE, {"a{b}": ids})
    traced = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), ids)
    checked = jax.jit(checkify.checkify(lambda ids: check_ids(STATE, {"a{b}": ids})))
    error, _ = checked(traced)
    assert error.get() is None


def test_several_invalid_ids_are_counted():
    with pytest.raises(ValueError, match=r"for none \(2 more are not\)"):
        check_ids(STATE.layout, {"a{b}": np.array([10, 9, 10, 10])})


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_ids_on_several_devices_are_checked(kind):
    """Apart from the lookup: checkify does not take all that routes rows."""
    mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType[kind],))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    state = init(CONFIG, Adam(), jax.random.key(0), mesh=mesh)
    ids = np.arange(16, dtype=np.int32).reshape(8, 2)
    batch = {"a{b}": jax.device_put(ids, rows)}
    with jax.set_mesh(mesh):
        error, _ = jax.jit(checkify.checkify(check_ids))(state, batch)
    assert "has the id 10 at [5, 0]" in error.get()
    with pytest.raises(ValueError, match=r"id 10 at \[5, 0\].*\(5 more are not\)"):
        lookup(state, batch, on_invalid_ids="error")


def test_by_default_nothing_is_looked_at():
    def traced(**options):
        def look_up(ids):
            return lookup(STATE, {"a{b}": ids}, **options)

        return str(jax.make_jaxpr(look_up)(jnp.array([[1, 2]])))

    assert traced() == traced(on_invalid_ids="ignore")
    with pytest.raises(ValueError, match="checkify"):
        jax.jit(lambda x: lookup(STATE, {"a{b}": x}, on_invalid_ids="error"))(
            jnp.ones(1, int)
        )


def test_the_object_refuses_a_batch_and_keeps_its_queue():
    embedding = TPUEmbedding(CONFIG, Adam(), on_invalid_ids="error")
    embedding.enqueue({"a{b}": np.array([9])}, training=False)
    for call in (embedding.enqueue, embedding):
        with pytest.raises(ValueError, match=r"'a\{b\}' has the id 10 at \[0\]"):
            call({"a{b}": np.array([10])})
    embedding.dequeue()
    with pytest.raises(RuntimeError, match="no batch"):
        embedding.dequeue()
    TPUEmbedding(CONFIG, Adam()).enqueue({"a{b}": np.array([10])})


def test_other_words_are_refused():
    ids, warn = {"a{b}": np.array([1])}, cast(Any, "warn")
    with pytest.raises(ValueError, match=r"return batch_stats\(state, features\)"):
        lookup(STATE, ids, on_invalid_ids=cast(Any, "count"))
    with pytest.raises(ValueError, match="on_invalid_ids='warn' must be 'ignore' or"):
        lookup(STATE, ids, on_invalid_ids=warn)
    with pytest.raises(ValueError, match="on_invalid_ids='warn'"):
        TPUEmbedding(CONFIG, Adam(), on_invalid_ids=warn)
    with pytest.raises(TypeError, match=r"ids of feature 'a\{b\}' have dtype=float64"):
        check_ids(STATE, {"a{b}": np.array([1.0])})
