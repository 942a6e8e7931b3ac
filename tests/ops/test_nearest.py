"""The nearest rows, against a full sort in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sparse_adam import PackedTable, nearest
from tests import programs

V, D, B, K = 203, 12, 5, 7


def expected(table, queries, k, metric):
    table, queries = (np.asarray(x, np.float64) for x in (table, queries))
    scores = queries @ table.T
    if metric == "cosine":
        lengths = np.linalg.norm(table, axis=1)
        scores /= np.linalg.norm(queries, axis=1)[:, None]
        scores = np.divide(
            scores, lengths, out=np.zeros_like(scores), where=lengths > 0
        )
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, ids, 1), ids


def arrays(num_rows=V, dim=D):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(num_rows, dim)).astype(np.float32)
    return table, rng.normal(size=(B, dim)).astype(np.float32)


def check(found, table, queries, k=K, metric="dot"):
    scores, ids = expected(table, queries, k, metric)
    assert found.ids.dtype == jnp.int32
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("dim", [12, 130])
@pytest.mark.parametrize("block_rows", [None, 50])
def test_plain_and_packed(metric, dim, block_rows):
    table, queries = arrays(dim=dim)
    table[-1] = 0  # of no direction
    packed = PackedTable.pack(table, np.ones_like(table))
    for stored in (table, packed):
        found = nearest(stored, queries, K, metric=metric, block_rows=block_rows)
        check(found, table, queries, metric=metric)


def test_all_rows_of_a_small_table_and_queries_of_any_shape():
    table, queries = arrays(num_rows=9)
    found = nearest(table, queries, 9, block_rows=1, recall_target=1.0)
    check(found, table, queries, 9)
    assert nearest(table, queries[0], 2).ids.tolist() == found.ids[0, :2].tolist()
    assert nearest(table, queries.reshape(1, B, D), 2).ids.shape == (1, B, 2)
    assert nearest(table, queries[:0], 2).ids.shape == (0, 2)


def test_bfloat16():
    table, queries = arrays()
    low = jnp.asarray(table, jnp.bfloat16)
    check(nearest(low, queries, K, block_rows=64), low, queries)
    packed = PackedTable.pack(low, jnp.zeros_like(low))
    check(nearest(packed, queries, K, block_rows=64), low, queries)


def test_no_more_scores_than_of_a_block():
    table, queries = arrays()
    text = str(
        jax.make_jaxpr(lambda t, q: nearest(t, q, K, block_rows=64))(table, queries)
    )
    assert f"f32[{B},64]" in text
    assert f"f32[{B},{V}]" not in text


@pytest.mark.parametrize("packed", [False, True])
def test_rows_that_are_spread(packed):
    """A device has 64 rows, finds its own best, and sends no row."""
    table, queries = arrays(num_rows=512)
    mesh = jax.make_mesh((8,), ("x",))
    spread = jax.device_put(table, NamedSharding(mesh, PartitionSpec("x")))
    with jax.set_mesh(mesh):
        stored = PackedTable.pack(spread) if packed else spread
        check(nearest(stored, queries, K, block_rows=24), table, queries)
        search = jax.jit(lambda t, q: nearest(t, q, K, block_rows=24))
        text = programs.text(programs.as_for_users(search.lower(stored, queries)))
    assert "all-gather" in text
    assert "f32[512" not in text


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"queries": np.ones((2, 3), np.float32)},
            ValueError,
            r"must be \(\.\.\., 12\)",
        ),
        ({"queries": np.ones((2, D), np.int32)}, TypeError, "must be floating"),
        ({"k": 0}, ValueError, "k=0 must be at least 1 and at most 203"),
        ({"k": V + 1}, ValueError, "k=204 must be"),
        ({"metric": "l2"}, ValueError, "metric='l2' must be one of"),
        ({"recall_target": 0.0}, ValueError, "recall_target=0.0 must be above 0"),
        ({"block_rows": 0}, ValueError, "block_rows=0 must be at least 1"),
        ({"table": (1, 2)}, TypeError, r"pass state\[0\], or state.table"),
        ({"table": np.ones(3, np.float32)}, ValueError, r"must be \(V, D\)"),
    ],
)
def test_refused(options, error, text):
    table, queries = arrays()
    with pytest.raises(error, match=text):
        nearest(**({"table": table, "queries": queries, "k": K} | options))
