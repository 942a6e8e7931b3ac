"""Packed tables behind the embedding API: nobody outside can tell."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import AdamState, PackedTable
from sparse_adam.embedding import (
    SGD,
    Adam,
    FeatureConfig,
    TableConfig,
    TPUEmbedding,
    apply_gradients,
    init,
    lookup,
    serving_embedding_lookup,
)
from sparse_adam.embedding.stored import placed_as
from tests.embedding.test_tpu_embedding import (
    CONFIG,
    KEY,
    assert_same,
    batch,
    built,
    train,
)


def test_storage_is_chosen_and_can_be_asked_for():
    kinds: Any = (
        (None, AdamState),  # no TPU here
        ("plain", AdamState),
        ("packed", PackedTable),
    )
    for storage, kind in kinds:
        state = init(CONFIG, Adam(), KEY, storage=storage)
        assert all(isinstance(table, kind) for table in state.stacks)
    with pytest.raises(ValueError, match="storage='dense' must be None, 'plain' or"):
        init(CONFIG, Adam(), KEY, storage=cast(Any, "dense"))


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
    packed.load({"user": {"momenta": np.full((6, 2), 2.0)}})
    after = packed.retrieve()
    assert (after["user"]["momenta"] == 2).all()
    np.testing.assert_array_equal(
        after["user"]["parameters"], plain.retrieve()["user"]["parameters"]
    )
    with pytest.raises(ValueError, match=r"'momenta' of shape \(2, 2\) for table 'us"):
        packed.load({"user": {"momenta": np.ones((2, 2))}})


def test_a_table_keeps_its_place():
    packed = Adam().init(np.ones((128, 16), np.float32), storage="packed")
    mesh = jax.make_mesh((2,), ("lines",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("lines"))
    packed = jax.device_put(packed, sharding)
    again = placed_as(packed, PackedTable.pack(*packed.unpack()))
    assert again.lines.sharding == sharding
    np.testing.assert_array_equal(again.lines, packed.lines)


def test_stochastic_rounding_of_bfloat16_tables():
    table = jnp.ones((8, 16), jnp.bfloat16)
    for storage in ("plain", "packed"):
        state = Adam(1e-3).init(table, storage=storage)
        ids, grads = jnp.arange(8), jnp.ones((8, 16))
        key = jax.random.key(0)
        new = Adam(1e-3).update(state, ids, grads, rounding="stochastic", key=key)
        weights = new.unpack()[0] if storage == "packed" else new.table
        moved = np.asarray(weights != table)
        assert 0 < moved.mean() < 1


TABLE = TableConfig(512, 8, combiner="sum", name="item")
IDS, GRADIENT = jnp.array([100, 3]), jnp.ones((2, 8))


def item_state(storage: Any = "plain", rows=512, optimizer=None):
    table = dataclasses.replace(TABLE, vocabulary_size=rows)
    return init(FeatureConfig(table), optimizer or Adam(0.1), KEY, storage=storage)


def with_item(state, stored):
    return dataclasses.replace(state, stacks=(stored,))


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_a_table_of_another_size_is_refused(storage):
    state = item_state(storage)
    small = with_item(state, item_state(storage, rows=64).stacks[0])
    embedding = TPUEmbedding(FeatureConfig(TABLE), Adam(0.1), storage=storage)
    text = r"table 'item' .*\(64, 8\); it must be \(512, 8\), as its layout says: pass"
    for refused in (
        lambda: lookup(small, IDS),
        lambda: serving_embedding_lookup(small, IDS),
        lambda: apply_gradients(small, IDS, GRADIENT),
        lambda: jax.jit(lookup)(small, IDS),
        lambda: setattr(embedding, "state", small),
    ):
        with pytest.raises(ValueError, match=text):
            refused()


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_inside_shard_map_the_way_out_is_told(storage):
    state = item_state(storage)
    mesh = jax.make_mesh((2,), ("rows",))
    rows, whole = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    spread = jax.device_put(state, jax.sharding.NamedSharding(mesh, rows))
    text = "table 'item' .*take whole tables. Call them outside of shard_map"
    for function, results in (
        (lambda state: lookup(state, IDS), whole),
        (lambda state: apply_gradients(state, IDS, GRADIENT), rows),
    ):
        with pytest.raises(ValueError, match=text):
            jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=results)(spread)


def test_what_is_no_state_of_the_layout_is_refused():
    state = item_state()
    table, m, v = state.stacks[0]
    mesh = jax.make_mesh((2,), ("rows",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    cases = [
        ([table, m, v], TypeError, "'item' is a list; .*optimizer.state_of"),
        ((table, m), ValueError, r"'item' has 2 arrays, but its optimizer Adam has 3"),
        ((table, m[:5], v), ValueError, r"momenta of table 'item' has .*\(5, 8\)"),
        ((table, m, "v"), TypeError, "velocities of table 'item' is a str"),
        (
            (table.astype(jnp.float16), m, v),
            TypeError,
            "parameters of table 'item' has dtype=float16; .*float32 or bfloat16",
        ),
        (
            (jax.device_put(table, rows), m, v),
            ValueError,
            r"'parameters': 'rows', 'momenta': None.*jax.device_put the whole state",
        ),
        (
            item_state("packed", optimizer=SGD()).stacks[0],
            ValueError,
            "'item' is packed with 1 arrays, but its optimizer Adam has 3",
        ),
    ]
    for stored, error, text in cases:
        for function in (
            lambda state: lookup(state, IDS),
            lambda state: apply_gradients(state, IDS, GRADIENT),
        ):
            with pytest.raises(error, match=text):
                function(with_item(state, stored))
    with pytest.raises(ValueError, match=r"state.stacks is a tuple of 0; .* the 1 st"):
        lookup(dataclasses.replace(state, stacks=()), IDS)
    embedding = TPUEmbedding(FeatureConfig(TABLE), Adam(0.1))
    with pytest.raises(TypeError, match=r"state is dict; .* load\(\) a dict"):
        embedding.state = {"item": table}
    with pytest.raises(ValueError, match="one array in two places"):
        embedding.state = with_item(state, (table, m, m))


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_a_state_may_be_of_numpy_arrays(storage):
    state = item_state(storage)
    as_numpy = jax.tree.map(np.array, state)
    kept = jax.tree.map(np.copy, as_numpy)
    assert_same(lookup(as_numpy, IDS), lookup(state, IDS))
    want = apply_gradients(state, IDS, GRADIENT)
    assert_same(apply_gradients(as_numpy, IDS, GRADIENT), want)
    embedding = TPUEmbedding(FeatureConfig(TABLE), Adam(0.1), storage=storage)
    embedding.state = as_numpy
    embedding.enqueue(IDS)
    embedding.dequeue()
    embedding.apply_gradients(GRADIENT)
    assert_same(embedding.state, want)
    jax.tree.map(np.testing.assert_array_equal, as_numpy, kept)
