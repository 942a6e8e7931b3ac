"""Gradients by rows: their norm, against dense differentiation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam.embedding import (
    Adam,
    FeatureConfig,
    TableConfig,
    gradient_norm,
    init,
    lookup,
)
from sparse_adam.embedding import by_row as module
from tests.embedding.golden import KEY, normal
from tests.embedding.test_stacks import CONFIG, batch


def with_tables(state, tables):
    """The state, of plain tables that stand alone, with these weights."""
    places = [state.layout.place(name)[0] for name in tables]
    stacks = list(state.stacks)
    for place, table in zip(places, tables.values(), strict=True):
        stacks[place] = stacks[place]._replace(table=table)
    return type(state)(tuple(stacks), state.layout)


def dense_gradients(config, loss_of, ids, weights=None, key=KEY):
    """The gradients of a loss by whole tables, `[V, D]` each."""
    state = init(config, Adam(), key, stack=False, storage="plain")
    tables = {name: state.table(name) for name in state.tables}

    def loss(tables):
        return loss_of(lookup(with_tables(state, tables), ids, weights))

    return jax.jit(jax.grad(loss))(tables)


def loss_of(activations):
    return sum(jnp.sin(x).sum() for x in jax.tree.leaves(activations))


def norm_of(arrays):
    return np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in arrays))


@functools.cache
def case():
    """A state, a batch, its gradients by activations, and those by whole tables."""
    ids, weights = batch()
    state = init(CONFIG, Adam(), KEY)
    gradients = jax.jit(jax.grad(loss_of))(jax.jit(lookup)(state, ids, weights))
    dense = dense_gradients(CONFIG, loss_of, ids, weights)
    return state, (ids, gradients, weights), dense


@pytest.mark.parametrize("chunk", [8192, 5])
def test_the_norm_is_that_of_dense_gradients(chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    state, update, dense = case()
    norm = jax.jit(lambda *arguments: gradient_norm(*arguments))(state, *update)
    assert norm.dtype == jnp.float32 and norm.shape == ()
    np.testing.assert_allclose(norm, norm_of(dense.values()), rtol=1e-6)
    # Of the activations it would be another number.
    assert abs(norm_of(jax.tree.leaves(update[1])) / norm - 1) > 0.1


def test_a_norm_of_nothing_and_of_what_is_ignored():
    config = {"a": FeatureConfig(TableConfig(4, 2, normal, name="a"))}
    state = init(config, Adam(), KEY)
    ids, nan = {"a": np.array([-1, 4, 2])}, np.full((3, 2), np.nan, np.float32)
    nan[2] = 3.0, 4.0
    assert jax.jit(gradient_norm)(state, ids, {"a": nan}) == 5
    assert gradient_norm(state, ids, {"a": None}) == 0
    empty = {"a": np.zeros((0,), np.int32)}
    assert gradient_norm(state, empty, {"a": np.zeros((0, 2), np.float32)}) == 0
