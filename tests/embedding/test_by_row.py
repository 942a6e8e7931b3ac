"""Gradients by rows: their norm, against dense differentiation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_adam.embedding import (
    SGD,
    Adam,
    FeatureConfig,
    TableConfig,
    TPUEmbedding,
    apply_gradients,
    gradient_norm,
    init,
    lookup,
)
from sparse_adam.embedding import by_row as module
from tests.embedding.golden import KEY, normal
from tests.embedding.test_stacks import CONFIG, D, batch


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


def test_clipping_by_global_norm_is_that_of_optax_on_a_dense_program():
    clip, rate = 0.5, 0.1
    ids, weights = batch()
    state = init(CONFIG, SGD(rate), KEY, stack=False, storage="plain")
    params = {
        "tables": {name: state.table(name) for name in state.tables},
        "tower": jnp.linspace(-1.0, 1.0, D),
    }

    def loss_of(activations, tower):
        return sum(jnp.sin(x @ tower).sum() for x in jax.tree.leaves(activations))

    @jax.jit
    def dense_step(params):
        def loss(params):
            tables = with_tables(state, params["tables"])
            return loss_of(lookup(tables, ids, weights), params["tower"])

        optimizer = optax.chain(optax.clip_by_global_norm(clip), optax.sgd(rate))
        gradients = jax.grad(loss)(params)
        updates, _ = optimizer.update(gradients, optimizer.init(params))
        return optax.apply_updates(params, updates), optax.tree.norm(gradients)

    @jax.jit
    def sparse_step(state, tower):
        activations = lookup(state, ids, weights)
        gradients, dense = jax.grad(loss_of, (0, 1))(activations, tower)
        norm = optax.tree.norm([dense, gradient_norm(state, ids, gradients, weights)])
        scale = jnp.minimum(1.0, clip / norm)
        state = apply_gradients(state, ids, gradients, weights, gradient_scale=scale)
        return state, tower - rate * scale * dense, norm

    wanted, wanted_norm = dense_step(params)
    state, tower, norm = sparse_step(init(CONFIG, SGD(rate), KEY), params["tower"])
    np.testing.assert_allclose(norm, wanted_norm, rtol=1e-6)
    assert norm > 10 * clip
    np.testing.assert_allclose(tower, wanted["tower"], rtol=1e-5, atol=1e-7)
    for name, table in wanted["tables"].items():
        np.testing.assert_allclose(state.table(name), table, rtol=1e-5, atol=1e-7)


def test_the_object_takes_a_scale():
    config = {"a": FeatureConfig(TableConfig(4, 2, normal, name="a"))}
    embedding = TPUEmbedding(config, SGD(1.0), storage="plain")
    before = embedding.retrieve()["a"]["parameters"]
    for scale in (0.5, jnp.float32(0.25)):
        embedding.enqueue({"a": np.array([1])})
        gradients = jax.tree.map(jnp.ones_like, embedding.dequeue())
        with pytest.raises(ValueError, match="gradient_scale has shape"):
            embedding.apply_gradients(gradients, gradient_scale=np.ones(2))
        embedding.apply_gradients(gradients, gradient_scale=scale)
    moved = before - embedding.retrieve()["a"]["parameters"]
    np.testing.assert_allclose(moved[1], 0.75, rtol=1e-6)
