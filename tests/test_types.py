"""What type checkers are told of the public API: pyright checks each `assert_type`.

At run time they do nothing; the functions are run for what they say to be true.
"""

from typing import Any, assert_type, cast

import jax
import jax.numpy as jnp
import numpy as np

from sparse_adam import AdamState, PackedTable, packed_adam_update, sparse_update
from sparse_adam import lookup as lookup_rows
from sparse_adam._types import Storage
from sparse_adam.embedding import (
    SGD,
    EmbeddingState,
    FeatureConfig,
    Ragged,
    TableConfig,
    apply_gradients,
    apply_row_gradients,
    init,
    lookup,
    row_gradients,
)
from sparse_adam.embedding.optimizers import SGDState
from sparse_adam.ops.sparse_adam import sparse_adam_update
from sparse_adam.rules import SGDRule

IDS, GRADS = jnp.array([1]), jnp.ones((1, 2))


def test_the_ops() -> None:
    ones = jnp.ones((4, 2))
    state = sparse_adam_update(ones, ones, ones, IDS, GRADS)
    assert isinstance(assert_type(state, AdamState), AdamState)
    rule, rate = SGDRule(), 0.1
    new = sparse_update((ones,), IDS, GRADS, rule, learning_rate=rate)
    assert isinstance(assert_type(new, tuple[jax.Array, ...]), tuple)
    packed = packed_adam_update(PackedTable.pack(*state), IDS, GRADS)
    assert isinstance(assert_type(packed, PackedTable), PackedTable)
    alone = sparse_update(PackedTable.pack(ones), IDS, GRADS, rule, learning_rate=rate)
    assert isinstance(assert_type(alone, PackedTable), PackedTable)
    assert isinstance(assert_type(packed.lookup(IDS), jax.Array), jax.Array)
    assert isinstance(assert_type(lookup_rows(ones, IDS), jax.Array), jax.Array)


def test_optimizers() -> None:
    sgd = SGD(0.5)
    plain = sgd.init(jnp.ones((4, 2)), storage="plain")
    assert isinstance(assert_type(plain, SGDState), SGDState)
    plain = sgd.update(plain, IDS, GRADS)
    assert isinstance(assert_type(plain, SGDState), SGDState)
    packed = sgd.init(jnp.ones((4, 2)), storage="packed")
    packed = sgd.update(packed, IDS, GRADS)
    assert isinstance(assert_type(packed, PackedTable), PackedTable)
    assert_type(sgd.storage(2, "plain"), Storage)


def test_the_embedding_api() -> None:
    user = FeatureConfig(TableConfig(4, 2, name="user"))
    state = init({"user": user}, SGD(0.5), jax.random.key(0))
    assert_type(state, EmbeddingState[SGDState])
    features = {"user": IDS}
    activations = lookup(state, features)
    assert_type(activations, dict[str, jax.Array])
    assert list(activations) == ["user"]
    state = apply_gradients(state, features, activations)
    rows = row_gradients(state, features, activations)
    state = apply_row_gradients(state, rows)
    table = state.tables["user"]
    assert isinstance(assert_type(table, SGDState), SGDState)
    assert_type(table.table, jax.Array)
    assert_type(state.table("user"), jax.Array)
    assert assert_type(state.slots("user"), dict[str, jax.Array]) == {}


def test_lookups_of_other_structures() -> None:
    config = FeatureConfig(TableConfig(4, 2, name="user"))
    alone = init(config, SGD(0.5), jax.random.key(0))
    for ids in (IDS, np.array([1])):
        assert assert_type(lookup(alone, ids), jax.Array).shape == (1, 2)
    ragged = lookup(alone, Ragged.from_rows([[1, 2], []]))
    assert assert_type(ragged, jax.Array).shape == (2, 2)
    listed = lookup(init([config], SGD(0.5), jax.random.key(0)), [IDS])
    assert isinstance(assert_type(listed, list[Any]), list)
    unknown = lookup(alone, cast(Any, IDS))
    assert unknown.shape == (1, 2)
