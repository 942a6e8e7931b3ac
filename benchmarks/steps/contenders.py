"""Who trains the models: ours, plain JAX, and torch."""

import importlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.contenders.torch_programs import EPSILON, import_torch
from benchmarks.steps.model import Arrays, Batch, Functions, Model, draw_batch
from benchmarks.workload import RATE
from sparse_adam import bias_corrected_learning_rate
from sparse_adam._types import Storage
from sparse_adam.embedding import (
    Adam,
    EmbeddingState,
    FeatureConfig,
    TableConfig,
    apply_gradients,
    init,
    lookup,
)

BATCHES = 4  # different ones, in turn
JAX = Functions(jax.nn.relu, jax.nn.softplus, jax.nn.logsumexp, jnp.concatenate)
OPTIMIZER = optax.adam(RATE, eps=EPSILON)  # of dense weights
# Torch's formula, so that both learn the same: epsilon stands beside the root. The rate
# that is passed in has the bias correction.
AS_TORCH = Adam(RATE, epsilon=EPSILON, sum_inside_sqrt=False)


class Running(Protocol):
    """A model in training."""

    compile_seconds: float

    def step(self, turn: int) -> Callable[[], float]:
        """Returns one step with the batch of the turn; it waits, and gives the loss."""
        ...


class Training(NamedTuple):
    """All that our step changes."""

    embedding: EmbeddingState
    weights: dict[str, jax.Array]
    optimizer: Any  # optax's state


def first_embedding(
    model: Model,
    adam: Adam,
    make: Callable[[str], jax.Array],
    storage: Storage | None = None,
) -> EmbeddingState:
    """Returns our tables; `make` gives the first weights of one, by its name."""

    def config(name: str) -> TableConfig:
        rows, dim = model.tables[name]

        def first(key: jax.Array, shape: Any, dtype: Any) -> jax.Array:
            del key, shape, dtype
            return make(name)

        return TableConfig(rows, dim, first, combiner=model.combiner, name=name)

    tables = {name: config(name) for name in model.tables}
    features = {
        name: FeatureConfig(tables[feature.table])
        for name, feature in model.features.items()
    }
    return init(features, adam, jax.random.key(0), storage=storage)


def our_step(
    model: Model, training: Training, batch: Batch, number: jax.Array
) -> tuple[Training, jax.Array]:
    """One step by the embedding API; `number` counts from 1.

    The names of the scopes are the stages by which compiled steps are summed.
    """
    embedding, weights, optimizer = training
    with jax.named_scope("lookup"):
        activations = lookup(embedding, batch.ids)

    def loss_of(weights: Arrays, activations: Arrays) -> jax.Array:
        with jax.named_scope("dense"):
            return model.loss(JAX, weights, activations, batch.inputs)

    loss, (by_weights, by_activations) = jax.value_and_grad(loss_of, (0, 1))(
        weights, activations
    )
    with jax.named_scope("dense"):
        weights, optimizer = _dense_adam(weights, optimizer, by_weights)
        rate = bias_corrected_learning_rate(RATE, number)
    with jax.named_scope("update"):
        embedding = apply_gradients(
            embedding,
            batch.ids,
            by_activations,
            learning_rates=dict.fromkeys(model.tables, rate),
        )
    return Training(embedding, weights, optimizer), loss


def plain_step(
    model: Model, training: Any, batch: Batch, number: jax.Array
) -> tuple[Any, jax.Array]:
    """One step as written without us: `jnp.take`, autodiff, `optax.adam` of all."""
    del number
    (tables, weights), optimizer = training

    def loss_of(parameters: Any) -> jax.Array:
        tables, weights = parameters
        activations = {}
        for name, feature in model.features.items():
            rows = jnp.take(tables[feature.table], batch.ids[name], axis=0)
            activations[name] = getattr(rows, model.combiner)(-2)
        return model.loss(JAX, weights, activations, batch.inputs)

    loss, gradients = jax.value_and_grad(loss_of)((tables, weights))
    parameters, optimizer = _dense_adam((tables, weights), optimizer, gradients)
    return (parameters, optimizer), loss


def _dense_adam(parameters: Any, optimizer: Any, gradients: Any) -> Any:
    changes, optimizer = OPTIMIZER.update(gradients, optimizer, parameters)
    return optax.apply_updates(parameters, changes), optimizer


class JaxSteps:
    """A step in JAX: compiled ahead of time, its state donated."""

    def __init__(self, model: Model, training: Any, step: Callable[..., Any]) -> None:
        self._training = training
        self._batches = [
            jax.tree.map(jnp.asarray, draw_batch(model, seed))
            for seed in range(BATCHES)
        ]
        self._number = 0

        def run(training: Any, batch: Batch, number: jax.Array) -> Any:
            return step(model, training, batch, number)

        jitted = jax.jit(run, donate_argnums=0)
        began = time.perf_counter()
        arguments = (training, self._batches[0], np.float32(1))
        self._run = jitted.lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - began

    def step(self, turn: int) -> Callable[[], float]:
        """Returns the step; it waits for the whole state."""
        batch = self._batches[turn % BATCHES]

        def call() -> float:
            self._number += 1
            number = np.float32(self._number)
            found = self._run(self._training, batch, number)
            self._training, loss = jax.block_until_ready(found)
            return float(loss)

        return call


def ours(model: Model, storage: Storage | None = None) -> JaxSteps:
    """Our embedding API."""
    weights = jax.tree.map(jnp.asarray, model.first_weights())
    embedding = first_embedding(
        model, AS_TORCH, lambda name: jnp.asarray(model.first_table(name)), storage
    )
    training = Training(embedding, weights, OPTIMIZER.init(weights))
    return JaxSteps(model, training, our_step)


def plain_jax(model: Model) -> JaxSteps:
    """JAX and optax: the gradient and the update have the size of the tables."""
    tables = {name: jnp.array(model.first_table(name)) for name in model.tables}
    weights = jax.tree.map(jnp.asarray, model.first_weights())
    parameters = tables, weights
    return JaxSteps(model, (parameters, OPTIMIZER.init(parameters)), plain_step)


class TorchSteps:
    """Sparse gradients of torch: `SparseAdam` for the tables, `Adam` for the rest.

    Rows are looked up by `embedding` and `embedding_bag` of `torch.nn.functional`,
    which is what `torch.nn.Embedding` and `EmbeddingBag` call, with `sparse=True`: so
    two features can share a table. Nothing is compiled.
    """

    compile_seconds = 0.0

    def __init__(self, model: Model) -> None:
        self._torch = torch = import_torch()
        self._nn = nn = importlib.import_module("torch.nn.functional")
        self._functions = Functions(nn.relu, nn.softplus, torch.logsumexp, torch.cat)
        self._model = model

        def parameter(array: np.ndarray) -> Any:
            return torch.nn.Parameter(torch.from_numpy(array).clone())

        self._tables = {n: parameter(model.first_table(n)) for n in model.tables}
        self._weights = {n: parameter(x) for n, x in model.first_weights().items()}
        tables, weights = [*self._tables.values()], [*self._weights.values()]
        adam = {"lr": RATE, "eps": EPSILON}
        self._optimizers = [torch.optim.SparseAdam(tables, **adam)]
        if weights:
            self._optimizers.append(torch.optim.Adam(weights, **adam))
        self._batches = [self._batch(seed) for seed in range(BATCHES)]

    def _batch(self, seed: int) -> Batch:
        torch, (ids, inputs) = self._torch, draw_batch(self._model, seed)
        return Batch(
            {name: torch.from_numpy(x.astype(np.int64)) for name, x in ids.items()},
            {name: torch.from_numpy(x) for name, x in inputs.items()},
        )

    def _look_up(self, name: str, ids: Any) -> Any:
        feature = self._model.features[name]
        table = self._tables[feature.table]
        if feature.places == 1:
            return self._nn.embedding(ids[..., 0], table, sparse=True)
        bags = ids.reshape(-1, feature.places)
        mode = self._model.combiner
        found = self._nn.embedding_bag(bags, table, mode=mode, sparse=True)
        return found.reshape(*feature.samples, -1)

    def step(self, turn: int) -> Callable[[], float]:
        """Returns the step."""
        ids, inputs = self._batches[turn % BATCHES]

        def call() -> float:
            for optimizer in self._optimizers:
                optimizer.zero_grad(set_to_none=True)
            activations = {name: self._look_up(name, ids[name]) for name in ids}
            loss = self._model.loss(self._functions, self._weights, activations, inputs)
            loss.backward()
            for optimizer in self._optimizers:
                optimizer.step()
            return loss.item()

        return call


# Name: its title in tables, and what starts it. Ours is the first.
CONTENDERS: dict[str, tuple[str, Callable[[Model], Running]]] = {
    "ours": ("sparse_adam.embedding", ours),
    "packed": ("sparse_adam.embedding, packed", partial(ours, storage="packed")),
    "plain": ("plain JAX, optax.adam", plain_jax),
    "torch": ("torch, SparseAdam", TorchSteps),
}
DEFAULT = ("ours", "plain", "torch")
HOST_ONLY = ("torch",)  # run on the CPU, whatever accelerator there is
