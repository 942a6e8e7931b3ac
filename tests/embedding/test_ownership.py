"""Whose arrays are donated: those of the state alone, never a caller's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam.embedding import (
    Adam,
    FeatureConfig,
    RowWiseAdagrad,
    TableConfig,
    TPUEmbedding,
    apply_gradients,
    init,
)

KEY = jax.random.key(0)
IDS, GRADIENTS = [jnp.array([1, 3])] * 2, [jnp.ones((2, 4))] * 2
MESH = jax.make_mesh((2,), ("rows",))
ROWS = jax.sharding.NamedSharding(MESH, jax.sharding.PartitionSpec("rows"))
donated_step = jax.jit(apply_gradients, donate_argnums=0)


def config_of(*arrays):
    """One table for each array, whose initializer returns the array itself."""

    def returns(array):
        return lambda key, shape, dtype: array

    return [FeatureConfig(TableConfig(8, 4, returns(array))) for array in arrays]


def one_for_both(table, names, initializers):
    zeros = jnp.zeros_like(table)
    return dict.fromkeys(names, zeros)


@pytest.mark.parametrize(
    ("place", "stack"),
    [(None, False), (ROWS, False), (ROWS, True)],
    ids=["one device", "spread", "spread stack"],
)
@pytest.mark.parametrize("adam", [Adam(), Adam(slot_variable_creation_fn=one_for_both)])
def test_an_initializers_array_outlives_donated_steps(place, stack, adam):
    pretrained = jnp.arange(32.0).reshape(8, 4)
    if place is not None:
        pretrained = jax.device_put(pretrained, place)
    want = np.array(pretrained)
    state = init(config_of(pretrained, pretrained), adam, KEY, stack=stack)
    assert len({id(x) for x in jax.tree.leaves(state)}) == (3 if stack else 6)
    for array in jax.tree.leaves(state):
        assert array.sharding.is_equivalent_to(pretrained.sharding, 2)
    for _ in range(2):
        state = donated_step(state, IDS, GRADIENTS)
    np.testing.assert_array_equal(pretrained, want)
    moved = np.any(np.asarray(state.tables["table_0"].table) != want, axis=1)
    assert np.flatnonzero(moved).tolist() == [1, 3]


def test_an_optimizers_init_copies_its_table():
    table = jnp.ones((8, 4))
    for optimizer in (Adam(0.1), RowWiseAdagrad(0.1)):
        state = optimizer.init(table)
        step = jax.jit(lambda s, o=optimizer: o.update(s, *FLAT), donate_argnums=0)
        step(state)
        assert np.all(table == 1)
    as_numpy = np.ones((8, 4), np.float32)
    state = Adam(0.1).init(as_numpy)
    jax.jit(lambda s: Adam(0.1).update(s, *FLAT), donate_argnums=0)(state)
    assert np.all(as_numpy == 1)


FLAT = IDS[0], GRADIENTS[0]


def test_slots_are_spread_as_their_table():
    table = jax.device_put(jnp.ones((8, 4)), ROWS)
    for optimizer in (Adam(), RowWiseAdagrad()):
        for array in optimizer.init(table):
            assert array.sharding.spec[0] == "rows"


def test_arrays_of_a_compiled_init_are_their_own():
    pretrained = jnp.ones((8, 4))
    config = config_of(pretrained, pretrained)
    adam = Adam(slot_variable_creation_fn=one_for_both)
    state = jax.jit(lambda key: init(config, adam, key))(KEY)
    donated_step(state, IDS, GRADIENTS)
    assert np.all(pretrained == 1)


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_the_object_donates_no_array_of_its_caller(storage):
    pretrained = jnp.ones((8, 4))
    config = config_of(pretrained, pretrained)
    embedding = TPUEmbedding(config, Adam(0.1), storage=storage)

    def train():
        embedding.enqueue(IDS)
        embedding.dequeue()
        embedding.apply_gradients(GRADIENTS)

    train()
    loaded = jnp.full((8, 4), 2.0)
    zeros = jnp.zeros((8, 4))
    one = {"parameters": loaded, "momenta": zeros, "velocities": zeros}
    embedding.load({"table_0": one, "table_1": one})
    train()
    for array, value in ((pretrained, 1), (loaded, 2), (zeros, 0)):
        assert np.all(array == value)
    assert np.any(embedding.retrieve()["table_1"]["parameters"] != 2)


@pytest.mark.parametrize(
    ("table", "error", "text"),
    [
        (np.ones(8), ValueError, r"table.shape=\(8,\) must be \(V, D\)"),
        (np.ones((8, 4), np.float16), TypeError, "table.dtype=float16 must be float32"),
        (np.ones((8, 4), int), TypeError, "table.dtype=int32 must be float32"),
    ],
)
def test_what_is_no_table_is_refused_at_init(table, error, text):
    for storage in ("plain", "packed"):
        with pytest.raises(error, match=text):
            Adam().init(table, storage=storage)


def test_slots_of_another_dtype_are_refused_at_init():
    def halves(table, names, initializers):
        return {name: jnp.zeros(table.shape, jnp.float16) for name in names}

    adam = dataclasses.replace(Adam(), slot_variable_creation_fn=halves)
    with pytest.raises(TypeError, match=r"momenta.dtype=float16 must be float32 or"):
        adam.init(jnp.ones((8, 4)))
