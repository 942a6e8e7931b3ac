"""Packed tables behind the embedding API: nobody outside can tell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import AdamState, PackedTable
from sparse_adam.embedding import Adam, init, lookup, serving_embedding_lookup
from sparse_adam.embedding.stored import arrays, with_arrays
from tests.embedding.test_tpu_embedding import (
    CONFIG,
    KEY,
    assert_same,
    batch,
    built,
    train,
)


def test_storage_is_chosen_and_can_be_asked_for():
    for storage, kind in (
        (None, AdamState),  # no TPU here
        ("plain", AdamState),
        ("packed", PackedTable),
    ):
        state = init(CONFIG, Adam(), KEY, storage=storage)
        assert all(isinstance(table, kind) for table in state.tables.values())
    with pytest.raises(ValueError, match="storage='dense' must be None, 'plain' or"):
        init(CONFIG, Adam(), KEY, storage="dense")


def test_both_look_up_and_learn_the_same():
    plain, packed = built(storage="plain"), built(storage="packed")
    for number in range(3):
        assert_same(train(packed, number), train(plain, number))
    assert_same(packed.retrieve(), plain.retrieve())
    assert_same(dict(packed.embedding_tables), dict(plain.embedding_tables))
    features, weights = batch(3)
    assert_same(packed(features, weights), plain(features, weights))
    part = {"liked": features["liked"]}
    assert_same(
        serving_embedding_lookup(packed.state, part),
        serving_embedding_lookup(plain.state, part),
    )
    assert_same(lookup(packed.state, features), lookup(plain.state, features))


def test_load_and_retrieve():
    packed, plain = built(storage="packed"), built(storage="plain")
    train(plain, 0)
    packed.load(plain.retrieve())
    np.testing.assert_equal(packed.retrieve(), plain.retrieve())
    packed.load({"user": {"momenta": np.full((6, 3), 2.0)}})
    after = packed.retrieve()
    assert (after["user"]["momenta"] == 2).all()
    np.testing.assert_array_equal(
        after["user"]["parameters"], plain.retrieve()["user"]["parameters"]
    )
    with pytest.raises(ValueError, match=r"'momenta' of shape \(2, 2\) for table 'us"):
        packed.load({"user": {"momenta": np.ones((2, 2))}})


def test_a_table_keeps_its_place():
    packed = Adam().init(np.ones((8, 16), np.float32), storage="packed")
    mesh = jax.make_mesh((2,), ("lines",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("lines"))
    packed = jax.device_put(packed, sharding)
    again = with_arrays(packed, arrays(packed))
    assert again.lines.sharding == sharding
    np.testing.assert_array_equal(again.lines, packed.lines)


def test_stochastic_rounding_of_bfloat16_tables():
    table = jnp.ones((8, 16), jnp.bfloat16)
    for storage in ("plain", "packed"):
        state = Adam(1e-3).init(table, storage=storage)
        ids, grads = jnp.arange(8), jnp.ones((8, 16))
        key = jax.random.key(0)
        new = Adam(1e-3).update(state, ids, grads, rounding="stochastic", key=key)
        moved = np.asarray(arrays(new)[0] != table)
        assert 0 < moved.mean() < 1
