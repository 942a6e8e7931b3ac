"""Mistakes that users make, and the errors that name argument, value and way out."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam.embedding import (
    SGD,
    Adam,
    FeatureConfig,
    Ragged,
    TableConfig,
    TPUEmbedding,
    apply_gradients,
    init,
    lookup,
)

KEY = jax.random.key(0)
ITEM = TableConfig(6, 2, combiner="sum", name="item")
CONFIG = {"seen": FeatureConfig(ITEM), "liked": FeatureConfig(ITEM)}
IDS = {"seen": np.array([1, 2]), "liked": np.array([3, 4])}


def state():
    return init(CONFIG, Adam(0.1), KEY)


def embedding(**options):
    return TPUEmbedding(CONFIG, Adam(0.1), **options)


def with_gradients(**gradients):
    good = {"seen": jnp.ones((2, 2)), "liked": jnp.ones((2, 2))}
    return apply_gradients(state(), IDS, good | gradients)


def with_ids(ids):
    return [
        lambda: lookup(state(), IDS | {"seen": ids}),
        lambda: embedding().enqueue(IDS | {"seen": ids}),
        lambda: embedding()(IDS | {"seen": ids}),
    ]


@pytest.mark.parametrize(
    ("use", "error", "text"),
    [
        (
            lambda: Adam().update(
                cast(Any, jnp.ones((6, 2))), jnp.array([1]), jnp.ones((1, 2))
            ),
            TypeError,
            r"state is ArrayImpl of the shape \(6, 2\); .*Adam\(\.\.\.\).init\(table\)",
        ),
        (
            lambda: Adam().update(
                SGD().init(np.ones((6, 2), np.float32)), np.array([1]), np.ones((1, 2))
            ),
            ValueError,
            r"the state has 1 arrays, but AdamRule has 3, \('table', 'momenta'",
        ),
        (
            lambda: apply_gradients(state(), IDS, IDS, learning_rates=cast(Any, 0.1)),
            TypeError,
            r"learning_rates=0.1 must be a dict .*dict.fromkeys\(\['item'\], rate\)",
        ),
        (
            lambda: embedding().load({"item": cast(Any, jnp.ones((6, 2)))}),
            TypeError,
            r"ArrayImpl for table 'item'; .*pass {'item': {'parameters': array}}",
        ),
        (
            lambda: embedding().load(cast(Any, jnp.ones((6, 2)))),
            TypeError,
            r"arrays is a ArrayImpl; it must be a dict of tables by name",
        ),
        (
            lambda: TableConfig(
                6, 2, cast(Any, lambda shape, dtype=None: np.ones(shape))
            ),
            ValueError,
            r"\(key, shape, dtype\) -> array.*of one of TensorFlow's, \(shape, dtype\)",
        ),
        (
            lambda: TableConfig(2**31, 2, name="item"),
            ValueError,
            "vocabulary_size=2147483648 of table 'item' must be at most .*split the",
        ),
        (
            lambda: embedding().serving_embedding_lookup({"new": np.array([1])}),
            ValueError,
            r"features have \['new'\], .*\[\"\['liked'\]\", \"\['seen'\]\"\]: pass",
        ),
        (
            lambda: embedding(implementation="cppu"),
            ValueError,
            "implementation='cppu' must be None or one of",
        ),
        (lambda: embedding(batch_size=-3), ValueError, "batch_size=-3 must be an int"),
        (lambda: embedding(batch_size=2.0), ValueError, "batch_size=2.0 must be an "),
        (
            lambda: embedding().build(per_replica_batch_size=0),
            ValueError,
            "per_replica_batch_size=0 must be an int and at least 1",
        ),
        (lambda: embedding(storage="dense"), ValueError, "storage='dense' must be Non"),
        (lambda: embedding(rounding="up"), ValueError, "rounding='up' must be 'near"),
        (lambda: embedding(seed=0.5), TypeError, "seed=0.5 must be an int"),
    ],
)
def test_named(use, error, text):
    with pytest.raises(error, match=text):
        use()


@pytest.mark.parametrize(
    ("ids", "error", "text"),
    [
        ([[1], [2, 3]], ValueError, r"'seen' are a list .*Ragged.from_rows\(rows\)"),
        (
            np.array([[1], [2, 3]], dtype=object),
            TypeError,
            r"'seen' have dtype=object; .*Ragged.from_rows\(rows\)",
        ),
        (object(), TypeError, "'seen' have dtype=object; they must be an array of num"),
        (np.ones(2), TypeError, "'seen' have dtype=float64; it must be an integer"),
        (
            Ragged(np.ones(2), np.array([0, 1, 2])),
            TypeError,
            "'seen'.* have dtype=float64; it must be an integer dtype",
        ),
    ],
)
def test_ids_of_another_kind(ids, error, text):
    for use in with_ids(ids):
        with pytest.raises(error, match=text):
            use()


def test_messages_show_no_arrays():
    many = jnp.full((500, 3), 7)
    for use in (
        lambda: with_gradients(seen=many),
        lambda: with_gradients(seen=[7] * 1000),
        lambda: apply_gradients(state(), IDS, {"other": many}),
        lambda: apply_gradients(state(), IDS, many),
        lambda: apply_gradients(state(), IDS, (many, many)),
        lambda: lookup(state(), {"seen": many}),
        lambda: apply_gradients(state(), IDS, IDS, learning_rates=cast(Any, many)),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            use()
        text = str(caught.value)
        assert "7, 7, 7, 7, 7, 7, 7" not in text and "[7 7 7" not in text
        assert len(text) < 400
    with pytest.raises(TypeError, match=r"'seen' is int32\[500, 3\]; .*\(2, 2\)"):
        with_gradients(seen=many)
    with pytest.raises(ValueError, match=r"nested as .*shape=\(500, 3\), dtype=int32"):
        apply_gradients(state(), IDS, many)


class OfAnotherLibrary:
    """An array whose dtype JAX does not know, as that of torch or TensorFlow."""

    dtype = "another.int64"

    def __init__(self, array):
        self._array = np.asarray(array)
        self.shape = self._array.shape


class ByArray(OfAnotherLibrary):
    def __array__(self, dtype=None, copy=None):
        return self._array if dtype is None else self._array.astype(dtype)


class ByDlpack(OfAnotherLibrary):
    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


@pytest.mark.parametrize("kind", [ByArray, ByDlpack])
def test_arrays_of_other_libraries_are_ids(kind):
    ragged = [np.array([1, 2, 3]), np.array([0, 1, 3])]
    weights = np.array([0.5, 1, 2], np.float32)
    want = lookup(
        state(),
        {"seen": Ragged(*ragged), "liked": np.array([3, 2**32 + 1])},
        {"seen": Ragged(weights, ragged[1]), "liked": None},
    )
    features = {
        "seen": Ragged(*map(kind, ragged)),
        "liked": kind(np.array([3, 2**32 + 1])),
    }
    own = {"seen": Ragged(kind(weights), kind(ragged[1])), "liked": None}
    gradients = {"seen": kind(np.ones((2, 2), np.float32)), "liked": jnp.ones((2, 2))}
    jax.tree.map(np.testing.assert_array_equal, lookup(state(), features, own), want)
    new = apply_gradients(state(), features, gradients, own)
    served = embedding().serving_embedding_lookup(features, {"seen": own["seen"]})
    assert set(served) == set(want)
    e = embedding()
    e.state = state()
    e.enqueue(features, own)
    jax.tree.map(np.testing.assert_array_equal, e.dequeue(), want)
    e.apply_gradients(gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), e.state, new)


def test_rows_that_make_no_packed_tables_on_the_devices():
    mesh = jax.make_mesh((2,), ("rows",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    packed = init(CONFIG, Adam(0.1), KEY, storage="packed")
    spread = jax.device_put(packed, rows)
    with pytest.raises(ValueError, match=r"table 'item': V=6 .* V must be a multiple"):
        lookup(spread, IDS)
