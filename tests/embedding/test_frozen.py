"""Frozen tables: no slots, no motion, and nothing asked of their gradients."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam.embedding import (
    SGD,
    Adam,
    FeatureConfig,
    TableConfig,
    TPUEmbedding,
    apply_gradients,
    current_learning_rates,
    from_logical,
    gradient_norm,
    init,
    lookup,
    serving_embedding_lookup,
    to_logical,
    weights_only,
)
from tests.embedding.golden import KEY, normal
from tests.embedding.test_tpu_embedding import assert_same

D = 4
TRAINED = TableConfig(6, D, normal, name="trained")
WORDS = TableConfig(9, D, normal, combiner="sum", name="words", trainable=False)
UNITS = TableConfig(5, D, normal, SGD(9.0), name="units", trainable=False)
CONFIG = {
    "trained": FeatureConfig(TRAINED),
    "words": FeatureConfig(WORDS),
    "units": FeatureConfig(UNITS),
}
IDS = {
    "trained": np.array([1, 1, 5]),
    "words": np.array([[0, 8], [8, -1], [9, 2]]),
    "units": np.array([4, 0, 0]),
}


def gradients_of(state):
    return jax.tree.map(jnp.cos, lookup(state, IDS))


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_a_frozen_table_stays_and_has_no_slots(storage):
    state = init(CONFIG, Adam(0.1), KEY, storage=storage)
    stacks = [[table.name for table in stack.tables] for stack in state.layout.stacks]
    assert stacks == [["trained"], ["units", "words"]]
    logical = to_logical(state)
    assert [list(own) for own in logical.values()] == [
        ["parameters", "momenta", "velocities"],
        ["parameters"],
        ["parameters"],
    ]
    assert state.slots("words") == {} and state.tables["units"]._fields == ("table",)
    # What is looked up, and what the others learn, is as if all were trained.
    config = [
        TRAINED,
        *(
            TableConfig(t.vocabulary_size, D, normal, name=t.name, combiner=t.combiner)
            for t in (WORDS, UNITS)
        ),
    ]
    config = {table.name: FeatureConfig(table) for table in config}
    other = init(config, Adam(0.1), KEY, storage="plain")
    assert_same(lookup(state, IDS), lookup(other, IDS))
    gradients = gradients_of(state)
    new = to_logical(apply_gradients(state, IDS, gradients))
    wanted = to_logical(apply_gradients(other, IDS, gradients))
    assert_same(new["trained"], wanted["trained"])
    assert np.any(new["words"]["parameters"] != wanted["words"]["parameters"])
    assert_same(
        {n: new[n] for n in ("words", "units")},
        {n: logical[n] for n in ("words", "units")},
        rtol=0,
    )
    # A checkpoint of the weights alone fits.
    part = {"words": {"parameters": np.ones((9, D), np.float32)}}
    assert from_logical(state, part).table("words").sum() == 9 * D
    with pytest.raises(ValueError, match="'momenta' of shape"):
        from_logical(state, {"words": {"momenta": np.ones((9, D), np.float32)}})


def test_gradients_rates_and_norms_leave_it_out():
    state = init(CONFIG, Adam(0.1), KEY)
    gradients = gradients_of(state)
    assert current_learning_rates(state) == {"trained": 0.1}
    given = dict.fromkeys(state.tables, 0.5)
    wanted = apply_gradients(state, IDS, gradients, learning_rates=given)
    alone = gradients | {"words": None, "units": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = apply_gradients(state, IDS, alone, learning_rates=given)
    assert_same(to_logical(new), to_logical(wanted), rtol=0)
    with pytest.warns(UserWarning, match="feature 'trained'"):
        apply_gradients(state, IDS, alone | {"trained": None})
    one = np.asarray(gradients["trained"])
    norm = np.sqrt(((one[0] + one[1]) ** 2).sum() + (one[2] ** 2).sum())
    np.testing.assert_allclose(gradient_norm(state, IDS, gradients), norm, rtol=1e-6)


def test_the_object_has_frozen_tables_and_needs_no_optimizer_for_them():
    embedding = TPUEmbedding({"words": FeatureConfig(WORDS)})
    before = embedding.retrieve()
    assert list(before["words"]) == ["parameters"]
    embedding.enqueue({"words": IDS["words"]})
    gradients = jax.tree.map(jnp.ones_like, embedding.dequeue())
    embedding.apply_gradients(gradients)
    assert_same(embedding.retrieve(), before, rtol=0)
    assert repr(WORDS).endswith("name='words', trainable=False)")
    with pytest.raises(TypeError, match="trainable='no' must be True or False"):
        TableConfig(4, 2, trainable="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_weights_only_looks_up_the_same_in_a_third_of_the_bytes(storage):
    state = init(CONFIG, Adam(0.1), KEY, storage=storage)
    served = weights_only(state)
    before, after = (
        sum(x.nbytes for x in jax.tree.leaves(one.stacks[0])) for one in (state, served)
    )
    assert before == 3 * after
    assert isinstance(served.stacks[0], type(state.stacks[1]))
    assert_same(lookup(served, IDS), lookup(state, IDS), rtol=0)
    part = {"words": IDS["words"]}
    assert_same(
        serving_embedding_lookup(served, part),
        serving_embedding_lookup(state, part),
        rtol=0,
    )
    logical = to_logical(served)
    for name, own in to_logical(state).items():
        assert list(logical[name]) == ["parameters"]
        assert_same(logical[name]["parameters"], own["parameters"], rtol=0)
    # Training goes on from the weights, and does not touch those that are served.
    none = dict.fromkeys(IDS)
    assert_same(apply_gradients(served, IDS, none), served, rtol=0)
    again = from_logical(state, logical)
    assert_same(to_logical(again), to_logical(state), rtol=0)
    assert current_learning_rates(served) == {}
    assert served.layout == weights_only(state).layout != state.layout


def test_weights_only_stay_spread_as_they_are():
    mesh = jax.make_mesh((2,), ("rows",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    config = FeatureConfig(TableConfig(512, 64, normal, name="user"))
    for storage in ("plain", "packed"):
        state = init(config, Adam(), KEY, storage=storage)
        state = jax.device_put(state, rows)
        served = weights_only(state)
        assert all(x.sharding.spec[0] == "rows" for x in jax.tree.leaves(served))
        ids = np.array([3, 511])
        assert_same(jax.jit(lookup)(served, ids), jax.jit(lookup)(state, ids), rtol=0)
