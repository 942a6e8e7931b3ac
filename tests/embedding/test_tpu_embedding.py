"""The object: the queue, the numbers of the functional core, load and retrieve."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparse_adam.embedding import (
    Adam,
    FeatureConfig,
    Ragged,
    Sparse,
    TableConfig,
    TPUEmbedding,
    apply_gradients,
    init,
    lookup,
)

KEY = jax.random.key(3)
USER = TableConfig(6, 2, name="user")
ITEM = TableConfig(9, 2, combiner="sum", name="item")
CONFIG = {
    "user": FeatureConfig(USER),
    "seen": FeatureConfig(ITEM),
    "liked": FeatureConfig(ITEM, max_sequence_length=2),
}


def batch(number):
    rng = np.random.default_rng(number)
    weights = {"user": None, "seen": rng.random((4, 3), np.float32), "liked": None}
    features = {
        "user": rng.integers(0, 6, 4),
        "seen": rng.integers(-1, 9, (4, 3)),
        "liked": rng.integers(-1, 9, (4, 2)),
    }
    return features, weights


def loss_of(activations):
    return sum((x**2).sum() for x in activations.values())


def built(optimizer=None, **options):
    embedding = TPUEmbedding(CONFIG, optimizer or Adam(0.1), **options)
    embedding.build(key=KEY)
    return embedding


def train(embedding, number):
    embedding.enqueue(*batch(number))
    activations = embedding.dequeue()
    embedding.apply_gradients(jax.grad(loss_of)(activations))
    return activations


def assert_same(a, b, **tolerance):
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-6}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def step(state, number):
    features, weights = batch(number)
    activations = lookup(state, features, weights)
    gradients = jax.grad(loss_of)(activations)
    return activations, (features, gradients, weights)


def test_the_numbers_are_the_functional_cores():
    embedding, state = built(batch_size=4), init(CONFIG, Adam(0.1), KEY)
    assert_same(embedding.state, state, rtol=0)
    for number in range(3):
        want, update = step(state, number)
        state = apply_gradients(state, *update)
        assert_same(train(embedding, number), want)
        assert_same(embedding.state, state)
    assert_same(embedding(*batch(5)), lookup(state, *batch(5)))


def test_pipelined_activations_are_one_step_old():
    embedding = built(pipeline_execution_with_tensor_core=True)
    state = before = init(CONFIG, Adam(0.1), KEY)
    update: Any = None
    for number in range(4):
        # fwd(0), fwd(1), bwd(0), fwd(2), bwd(1): what the update before does to the
        # tables is not yet seen.
        want, next_update = step(state, number)
        if update is not None:
            before, state = state, apply_gradients(state, *update)
        update = next_update
        assert_same(train(embedding, number), want)
    assert np.any(before.tables["user"].table != state.tables["user"].table)
    state = apply_gradients(state, *update)
    assert_same(embedding(*batch(5)), lookup(state, *batch(5)))  # inference is exact
    assert_same(embedding.state, state)


def test_the_devices_of_a_mesh_are_as_one():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    options = {"pipeline_execution_with_tensor_core": True}
    one, many = built(**options), built(mesh=mesh, axes=("y", "x"), **options)
    assert_same(many.retrieve(), one.retrieve(), rtol=0)
    for number in range(3):
        assert_same(train(many, number), train(one, number))
    trained = many.retrieve()
    assert_same(trained, one.retrieve())
    rows = NamedSharding(mesh, PartitionSpec(("y", "x")))
    assert all(
        x.sharding.is_equivalent_to(rows, x.ndim) for x in jax.tree.leaves(many.state)
    )

    train(many, 3)
    assert np.any(many.embedding_tables["item"] != trained["item"]["parameters"])
    many.load(trained)
    assert_same(many.retrieve(), trained, rtol=0)
    assert_same(many(*batch(5)), one(*batch(5)))
    assert_same(train(many, 3), train(one, 3))  # its arrays can be donated
    with pytest.raises(ValueError, match="mesh= and axes=, or load"):
        many.state = one.state
    with pytest.raises(ValueError, match="axes='x' need a mesh"):
        built(axes="x")


def test_the_order_of_calls():
    embedding = built()
    with pytest.raises(RuntimeError, match=r"dequeue\(\) found no batch"):
        embedding.dequeue()
    with pytest.raises(RuntimeError, match=r"apply_gradients\(\) has no batch"):
        embedding.apply_gradients({})
    embedding.enqueue(*batch(0), name="n", device="d")
    embedding.enqueue(*batch(1))
    first = embedding.dequeue()
    with pytest.raises(RuntimeError, match="call apply_gradients, or enqueue with"):
        embedding.dequeue()
    before = embedding.retrieve()
    with pytest.raises(ValueError, match="'user' has the shape"):
        embedding.apply_gradients(first | {"user": jnp.ones((1, 2))})
    assert_same(embedding.retrieve(), before, rtol=0)
    embedding.apply_gradients(jax.tree.map(jnp.ones_like, first))
    embedding.dequeue()

    embedding = built()
    embedding.enqueue(*batch(0), training=False)
    want = embedding(*batch(0))
    assert_same(embedding.dequeue(), want)
    with pytest.raises(RuntimeError, match=r"enqueue\(\.\.\., training=True\)"):
        embedding.apply_gradients(want)


def test_rates_are_asked_for_at_each_update_and_do_not_recompile():
    rates = iter([0.1, 0.0, 0.2])
    embedding = built(Adam(lambda: next(rates)))
    from sparse_adam.embedding import steps

    update: Any = steps.update
    moved, compiled = [], []
    for number in range(3):
        old = embedding.retrieve()
        train(embedding, number)
        new = embedding.retrieve()
        moved.append(np.any(new["user"]["parameters"] != old["user"]["parameters"]))
        compiled.append(update._cache_size())
    assert moved == [True, False, True]
    assert compiled[0] == compiled[2]
    with pytest.raises(StopIteration):
        train(embedding, 3)


def test_missing_gradients_warn_at_every_step():
    embedding = built()
    train(embedding, 0)
    for number in (1, 2):
        embedding.enqueue(*batch(number))
        gradients = jax.grad(loss_of)(embedding.dequeue()) | {"liked": None}
        with pytest.warns(UserWarning, match="'liked'") as caught:
            embedding.apply_gradients(gradients)
        assert [w.filename for w in caught] == [__file__]


def test_load_and_retrieve():
    embedding = built()
    train(embedding, 0)
    saved = embedding.retrieve()
    assert {name: list(arrays) for name, arrays in saved.items()} == {
        "item": ["parameters", "momenta", "velocities"],
        "user": ["parameters", "momenta", "velocities"],
    }
    assert saved["item"]["velocities"].shape == (9, 2)
    train(embedding, 1)
    other = TPUEmbedding(CONFIG, Adam(0.1))
    other.load(saved)
    assert_same(other.retrieve(), saved, rtol=0)
    train(other, 1)
    assert_same(other.retrieve(), embedding.retrieve(), rtol=0)
    # Loaded arrays are copies: the update above has not changed them.
    assert_same(saved, saved, rtol=0)

    ones = np.ones((6, 2))
    other.load({"user": {"momenta": ones}})
    after = other.retrieve()
    np.testing.assert_array_equal(after["user"]["momenta"], ones)
    assert after["user"]["momenta"].dtype == np.float32
    kept = embedding.retrieve()["user"]["parameters"]
    np.testing.assert_array_equal(after["user"]["parameters"], kept)
    with pytest.raises(ValueError, match="arrays has the table 'z', not in"):
        other.load({"z": {}})
    with pytest.raises(
        ValueError, match=r"'momenta' of shape \(2, 2\) for table 'user"
    ):
        other.load({"user": {"momenta": np.ones((2, 2))}})
    with pytest.raises(ValueError, match=r"arrays has 'accumulators' of shape"):
        other.load({"user": {"accumulators": ones}})


def test_embedding_tables_by_name_and_by_config():
    embedding = built()
    tables = embedding.embedding_tables
    assert set(tables) == {"user", "item"}
    assert tables[USER] is tables["user"]
    assert tables[ITEM].shape == (9, 2)
    with pytest.raises(KeyError, match="is none of the tables"):
        tables[TableConfig(6, 2, name="user")]  # equal, but another object


def test_state_can_be_taken_and_given():
    embedding, other = built(), built()
    train(embedding, 0)
    other.state = jax.tree.map(jnp.copy, embedding.state)
    train(embedding, 1)
    train(other, 1)
    assert_same(other.state, embedding.state, rtol=0)
    with pytest.raises(ValueError, match="must be that of this object"):
        other.state = init(CONFIG, Adam(0.3), KEY)


def test_build():
    embedding = TPUEmbedding(CONFIG, Adam(0.1))
    assert repr(embedding).endswith("not built)")
    embedding.build(per_replica_batch_size=4)
    embedding.build()
    assert repr(embedding).endswith(" built)")
    with pytest.raises(RuntimeError, match=r"build\(key=\.\.\.\) came after"):
        embedding.build(key=KEY)
    features, weights = batch(0)
    with pytest.raises(
        ValueError, match="'user' has 3 samples; they must be batch_siz"
    ):
        embedding.enqueue(features | {"user": np.array([1, 2, 3])}, weights)
    with pytest.raises(ValueError, match="features must be nested as feature_config"):
        embedding.enqueue([1, 2])
    ragged = Ragged.from_rows([[1], [], [2, 2], [0]])
    sparse = Sparse(np.array([[0, 0]]), np.array([1]), (4, 2))
    embedding.enqueue(features | {"seen": ragged, "liked": sparse})
    assert {x.shape for x in embedding.dequeue().values()} == {
        (4, 2),
        (4, 2, 2),
    }


def test_serving_takes_a_part_of_the_features_and_any_id():
    embedding = built()
    table = np.asarray(embedding.embedding_tables["item"])
    got = embedding.serving_embedding_lookup({"seen": np.array([[2, -1], [2**40, 9]])})
    np.testing.assert_allclose(got["seen"], [table[2], [0, 0]])
    assert list(got) == ["seen"]
    ragged = Ragged.from_rows([[1, 99, 3], []])
    got = embedding.serving_embedding_lookup({"seen": ragged, "user": jnp.array([5])})
    np.testing.assert_allclose(got["seen"], [table[1] + table[3], [0, 0]], rtol=1e-6)
    weights = Ragged.from_rows([[2.0, 5.0, 1.0], []])
    got = embedding.serving_embedding_lookup({"seen": ragged}, {"seen": weights})
    want = [2 * table[1] + table[3], [0, 0]]
    np.testing.assert_allclose(got["seen"], want, rtol=1e-6)
    with pytest.raises(ValueError, match=r"features have \['z'\], which is not among"):
        embedding.serving_embedding_lookup({"z": ragged})
    with pytest.raises(
        ValueError, match=r"weights have \['user'\], which is not among"
    ):
        embedding.serving_embedding_lookup({"seen": ragged}, {"user": weights})


def test_64_bit_ids_of_numpy_do_not_wrap():
    embedding = built()
    features, weights = batch(0)
    features["seen"] = np.full((4, 3), 2**32 + 1)
    features["user"] = np.array([2**32, -(2**32), 2**63 - 1, 2], np.int64)
    old = embedding.retrieve()
    embedding.enqueue(features, weights)
    activations = embedding.dequeue()
    assert not np.any(activations["seen"])
    assert not np.any(activations["user"][:3])
    embedding.apply_gradients(jax.tree.map(jnp.ones_like, activations))
    new = embedding.retrieve()
    moved = np.any(new["user"]["parameters"] != old["user"]["parameters"], axis=1)
    assert np.flatnonzero(moved).tolist() == [2]
