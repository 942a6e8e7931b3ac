"""Tables in Flax, Equinox and Keras: each trains as the functional core does."""

import functools
import importlib
import runpy
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict

import sparse_adam.equinox
import sparse_adam.keras
import sparse_adam.linen
import sparse_adam.nnx
from sparse_adam.embedding import (
    Adam,
    EmbeddingState,
    lookup,
)
from tests import programs
from tests.embedding import hlo
from tests.layers.models import (
    FEATURES,
    FOLDER,
    IDS,
    check_spread,
    functional_model,
    mesh_of_eight,
)

DENSE_GRADIENT = "a gradient by a whole table is taken, of the shape"


@functools.cache
def losses_of_plain_jax(example: Any) -> list[float]:
    return example.train()


@pytest.mark.parametrize("framework", ["nnx", "linen", "equinox", "keras"])
def test_two_towers_have_the_losses_of_plain_jax(examples, framework):
    expected = losses_of_plain_jax(examples("plain"))
    assert expected[-1] < 0.2 < 0.6 < expected[0]
    np.testing.assert_allclose(examples(framework).train(), expected, rtol=1e-5)
    assert len((FOLDER / f"two_tower_{framework}.py").read_text().splitlines()) < 40


def test_an_example_runs_as_a_script(examples, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "plain"])
    runpy.run_path(str(FOLDER / "train.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("step  1: loss 0.7098\n")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit, match="name one of plain, nnx, linen"):
        runpy.run_path(str(FOLDER / "train.py"), run_name="__main__")


class NnxModel(nnx.Module):
    def __init__(self, **options: Any) -> None:
        options["rngs"] = nnx.Rngs(0)
        self.embeddings = sparse_adam.nnx.Embeddings(FEATURES, Adam(0.1), **options)
        self.scale = nnx.Param(jnp.ones(()))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, ids: Any) -> jax.Array:
        self.calls[...] += 1
        return (self.embeddings(ids)["user"] * self.scale[...]).sum()


class EquinoxModel(eqx.Module):
    embeddings: sparse_adam.equinox.Embeddings
    scale: jax.Array

    def __call__(self, ids: Any) -> jax.Array:
        return (self.embeddings(ids)["user"] * self.scale).sum()


def equinox_model(**options: Any) -> EquinoxModel:
    options["key"] = jax.random.key(0)
    embeddings = sparse_adam.equinox.Embeddings(FEATURES, Adam(0.1), **options)
    return EquinoxModel(embeddings, jnp.ones(()))


def test_nnx_moves_the_rows_of_the_batch_and_other_variables_once():
    model = NnxModel()
    optimizer = sparse_adam.nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    def loss_of(model, ids):
        return model(ids), "more"

    (loss, more), gradients = sparse_adam.nnx.value_and_grad(loss_of, has_aux=True)(
        model, IDS
    )
    assert (float(loss), more) == (8.0, "more")
    assert list(gradients.tables) == ["embeddings"]
    assert gradients.tables["embeddings"].activations["user"].tolist() == [[1] * 4] * 2
    optimizer.update(model, gradients, learning_rates={"user": 0.0})
    assert model.embeddings(IDS)["user"].tolist() == [[1] * 4] * 2
    optimizer.update(model, gradients)
    rows = model.embeddings({"user": jnp.arange(641)})["user"]
    assert jnp.flatnonzero((rows != 1).any(1)).tolist() == [3, 5]
    assert int(model.calls[...]) == 1
    assert float(model.scale[...]) == pytest.approx(1 - 2 * 0.1 * 8)


def test_equinox_moves_the_rows_of_the_batch():
    model, tx = equinox_model(), optax.sgd(0.1)
    loss_of = sparse_adam.equinox.filter_value_and_grad(
        lambda m: (m(IDS), 7), has_aux=True
    )
    (loss, more), gradients = loss_of(model)
    assert (float(loss), more) == (8.0, 7)
    updates, _ = tx.update(gradients.dense, tx.init(sparse_adam.equinox.dense(model)))
    new = sparse_adam.equinox.apply_updates(model, updates, gradients)
    rows = new.embeddings({"user": jnp.arange(641)})["user"]
    assert jnp.flatnonzero((rows != 1).any(1)).tolist() == [3, 5]
    assert float(new.scale) == pytest.approx(1 - 0.1 * 8)
    still = sparse_adam.equinox.apply_updates(
        model, updates, gradients, learning_rates={"user": 0.0}
    )
    assert still.embeddings(IDS)["user"].tolist() == [[1] * 4] * 2


class LinenModel(nn.Module):
    options: Any = FrozenDict()

    @nn.compact
    def __call__(self, ids: Any) -> jax.Array:
        scale = self.param("scale", lambda _: jnp.ones(()))
        layer = functools.partial(sparse_adam.linen.Embeddings, name="rows")
        rows = layer(FEATURES, Adam(0.1), **self.options)(ids)
        return (rows["user"] * scale).sum()


def test_linen_moves_the_rows_of_the_batch():
    model = LinenModel()
    variables = model.init(jax.random.key(0), IDS)
    assert list(variables["params"]) == ["scale"]
    state = sparse_adam.linen.TrainState.create(
        apply_fn=model.apply, tx=optax.sgd(0.1), **variables
    )

    def loss_of(params, tables):
        return model.apply({"params": params, "tables": tables}, IDS)

    loss, gradients = sparse_adam.linen.value_and_grad(loss_of)(
        state.params, state.tables
    )
    assert float(loss) == 8.0
    new = state.apply_gradients(grads=gradients)
    rows = lookup(new.tables["rows"]["state"], {"user": jnp.arange(641)})["user"]
    assert jnp.flatnonzero((rows != 1).any(1)).tolist() == [3, 5]
    assert int(new.step) == 1
    still = state.apply_gradients(
        grads=gradients, options={"learning_rates": {"user": 0.0}}
    )
    assert lookup(still.tables["rows"]["state"], IDS)["user"].tolist() == [[1] * 4] * 2


# Keras copies its variables in a way that NumPy 2 finds old.
def nnx_step() -> tuple[Any, Any]:
    model = NnxModel()
    optimizer = sparse_adam.nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    def step(state):
        model, optimizer = nnx.merge(graph, state)
        _, gradients = sparse_adam.nnx.value_and_grad(lambda m: m(IDS) ** 2)(model)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer))

    return step, state


def linen_step() -> tuple[Any, Any]:
    model = LinenModel()
    state = sparse_adam.linen.TrainState.create(
        apply_fn=model.apply, tx=optax.sgd(0.1), **model.init(jax.random.key(0), IDS)
    )

    def step(state):
        def loss_of(params):
            loss: Any = model.apply({"params": params, "tables": state.tables}, IDS)
            return loss**2

        _, gradients = sparse_adam.linen.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=gradients)

    return step, state


def equinox_step() -> tuple[Any, Any]:
    def step(model):
        value_and_grad = sparse_adam.equinox.filter_value_and_grad(
            lambda m: m(IDS) ** 2
        )
        _, gradients = value_and_grad(model)
        return sparse_adam.equinox.apply_updates(model, gradients.dense, gradients)

    return step, equinox_model()


def keras_step() -> tuple[Any, Any]:
    model, _ = functional_model(sparse_adam.keras.Model)
    model.compile(optimizer="sgd", loss="mse")
    model.fit({"user": np.array([[3]], np.int32)}, np.ones((1, 1)), verbose=0)
    kinds = ("trainable", "non_trainable", "metrics")
    lists = [getattr(model, f"{kind}_variables") for kind in kinds]
    lists.insert(2, model.optimizer.variables)
    ids = {"user": IDS["user"][:, None]}

    def step(state):
        return model.train_step(state, (ids, jnp.ones((2, 1))))

    return step, tuple([variable.value for variable in own] for own in lists)


@pytest.mark.parametrize("make", [nnx_step, linen_step, equinox_step, keras_step])
def test_a_step_does_nothing_of_the_size_of_a_table(make):
    step, state = make()
    lowered = jax.jit(step, donate_argnums=0).lower(state)
    text = programs.text(programs.as_for_users(lowered))
    assert "f32[641,4]" in text
    assert hlo.dense_work(text, 641) == set()


def nnx_tables(**options: Any) -> EmbeddingState:
    return NnxModel(**options).embeddings.state.get_value()


def linen_tables(**options: Any) -> EmbeddingState:
    variables: Any = LinenModel(options).init(
        jax.random.key(0), {"user": jnp.arange(8)}
    )
    return variables["tables"]["rows"]["state"]


def equinox_tables(**options: Any) -> EmbeddingState:
    return equinox_model(**options).embeddings.state


@pytest.mark.parametrize("make", [nnx_tables, linen_tables, equinox_tables])
def test_tables_are_spread_over_a_mesh(make):
    check_spread(make(mesh=mesh_of_eight(), axes="a"))


def test_steps_may_be_scanned():
    step, state = linen_step()
    state = jax.tree.map(jnp.asarray, state)
    scanned, _ = jax.lax.scan(lambda state, _: (step(state), None), state, length=2)
    for ours, single in zip(
        jax.tree.leaves(scanned), jax.tree.leaves(step(step(state))), strict=True
    ):
        np.testing.assert_allclose(ours, single, rtol=1e-6)


def test_a_gradient_by_a_whole_table_is_warned_of():
    model = equinox_model()
    with pytest.warns(UserWarning, match=DENSE_GRADIENT):
        eqx.filter_jit(eqx.filter_grad(lambda model: model(IDS)))(model)
    variables = LinenModel().init(jax.random.key(0), IDS)
    with pytest.warns(UserWarning, match=DENSE_GRADIENT):
        jax.grad(LinenModel().apply)(variables, IDS)
    by_tables = nnx.DiffState(0, sparse_adam.nnx.Tables)
    with pytest.warns(UserWarning, match=DENSE_GRADIENT):
        nnx.grad(lambda model: model(IDS), argnums=by_tables)(NnxModel())


def test_the_gradient_of_the_frameworks_is_refused_by_the_updates():
    model = NnxModel()
    gradients = nnx.grad(lambda model: model(IDS))(model)
    optimizer = sparse_adam.nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    with pytest.raises(TypeError, match=r"make them by sparse_adam\.nnx\.value_and"):
        optimizer.update(model, gradients)
    with pytest.raises(TypeError, match=r"sparse_adam\.equinox\.filter_value_and"):
        plain: Any = eqx.filter_grad(lambda model: model.scale)(equinox_model())
        sparse_adam.equinox.apply_updates(equinox_model(), plain, plain)


def test_a_loss_that_would_leave_tables_out_is_refused():
    model, grad = equinox_model(), sparse_adam.equinox.filter_value_and_grad
    with pytest.raises(ValueError, match="calls no Embeddings layer"):
        grad(lambda model: model.scale)(model)
    with pytest.raises(ValueError, match="'embeddings' twice"):
        grad(lambda model: model(IDS) + model(IDS))(model)
    with pytest.raises(ValueError, match="no part of the model"):
        grad(lambda _: equinox_model()(IDS))(model)
    with pytest.raises(ValueError, match="under jit, vmap, remat or scan"):
        grad(lambda model: jax.vmap(model)({"user": IDS["user"][:, None]}).sum())(model)
    with pytest.raises(ValueError, match="under jit, vmap, remat or scan"):
        grad(lambda model: eqx.filter_jit(model)(IDS))(model)


@pytest.mark.parametrize("layer", ["nnx", "linen", "equinox", "keras"])
def test_a_missing_framework_is_told_with_the_command(layer, monkeypatch):
    for framework in ("flax", "equinox", "keras"):
        monkeypatch.setitem(sys.modules, framework, None)
    monkeypatch.delitem(sys.modules, f"sparse_adam.{layer}")
    with pytest.raises(ImportError, match=rf"pip install sparse_adam\[{layer}\]"):
        importlib.import_module(f"sparse_adam.{layer}")


def test_the_page_shows_the_examples_as_they_are():
    page = (FOLDER.parents[1] / "docs" / "frameworks.md").read_text()
    for file in (FOLDER / "shop.py", *FOLDER.glob("two_tower_*.py")):
        assert f"```python\n{file.read_text()}```" in page, file.name
