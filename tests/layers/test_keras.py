"""The layer and the model of Keras, which has its own ways to build and to save."""

import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

import sparse_adam.equinox
import sparse_adam.keras
import sparse_adam.linen
import sparse_adam.nnx
from sparse_adam.embedding import (
    SGD,
    lookup,
    to_logical,
)
from tests.layers.models import (
    FEATURES,
    IDS,
    check_spread,
    functional_model,
    mesh_of_eight,
)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_keras_saves_and_loads_tables_and_slots(tmp_path):
    (model, layer), (other, fresh) = (
        functional_model(sparse_adam.keras.Model) for _ in range(2)
    )
    model.compile(optimizer="sgd", loss="mse")
    ids, wanted = {"user": np.array([[3], [5]], np.int32)}, np.ones((2, 1))
    model.fit(ids, wanted, verbose=0)
    rows = lookup(layer.state, {"user": jnp.arange(641)})["user"]
    assert jnp.flatnonzero((rows != 1).any(1)).tolist() == [3, 5]
    model.save_weights(tmp_path / "some.weights.h5")
    other.load_weights(tmp_path / "some.weights.h5")
    for saved, loaded in zip(
        jax.tree.leaves(layer.state), jax.tree.leaves(fresh.state), strict=True
    ):
        np.testing.assert_array_equal(saved, loaded)
    np.testing.assert_array_equal(model(ids), other(ids))
    with pytest.raises(NotImplementedError, match="by save_weights and load_weights"):
        model.save(tmp_path / "model.keras")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_keras_counts_the_steps_of_a_schedule():
    falling = optax.linear_schedule(1.0, 0.0, transition_steps=2)
    ids = keras.Input((1,), dtype="int32", name="user")
    layer = sparse_adam.keras.Embeddings(FEATURES, SGD(falling))
    out = keras.layers.Dense(1)(layer({"user": ids})["user"])
    model: Any = sparse_adam.keras.Model({"user": ids}, out)
    model.compile(optimizer="sgd", loss="mse")
    batch = {"user": np.array([[3]], np.int32)}, np.full((1, 1), 9.0)
    model.fit(*batch, epochs=2, verbose=0)
    moved = np.asarray(layer.state.table("user"))
    assert layer.state.step == 2
    assert np.all(moved[3] != 1)
    model.fit(*batch, verbose=0)  # at a rate of 0
    assert layer.state.step == 3
    np.testing.assert_array_equal(layer.state.table("user"), moved)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_keras_trains_tables_that_are_spread_over_a_mesh():
    """Of a functional model, whose shapes Keras asks for with a batch of no size."""
    ids, wanted = {"user": np.arange(16, dtype=np.int32)[:, None]}, np.zeros((16, 1))
    states = []
    for options in ({"mesh": mesh_of_eight(), "axes": "a"}, {}):
        model, layer = functional_model(sparse_adam.keras.Model, **options)
        model.compile(optimizer="sgd", loss="mse")
        model.fit(ids, wanted, verbose=0)
        states.append(layer.state)
    check_spread(states[0])
    found, expected = (to_logical(state)["user"] for state in states)
    assert np.flatnonzero((expected["parameters"] != 1).any(1)).tolist() == [*range(16)]
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6, err_msg=name)


def test_keras_models_of_both_kinds_live_together(examples):
    functional, _ = functional_model(sparse_adam.keras.Model)
    assert isinstance(functional, sparse_adam.keras.Model)
    written = examples("keras").TwoTower()
    assert sparse_adam.keras.Model.__bases__ == (keras.Model,)
    assert not isinstance(
        written, type(keras.Model(*functional.inputs, functional.outputs))
    )


def test_keras_tells_what_would_not_train_the_tables():
    model, layer = functional_model(keras.Model)
    with pytest.warns(UserWarning, match="the model is no sparse_adam.keras.Model"):
        layer(IDS, training=True)
    model, _ = functional_model(sparse_adam.keras.Model)
    model.compile(optimizer=keras.optimizers.SGD(0.1, loss_scale_factor=8), loss="mse")
    with pytest.raises(ValueError, match="scales the loss"):
        model.fit({"user": np.array([[3]], np.int32)}, np.ones((1, 1)), verbose=0)


def test_keras_on_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    monkeypatch.delitem(sys.modules, "sparse_adam.keras")
    with pytest.raises(ImportError, match=r"set KERAS_BACKEND=jax .*is 'torch'"):
        importlib.import_module("sparse_adam.keras")
