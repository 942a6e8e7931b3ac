"""Embedding tables in Keras 3 on JAX: a layer, and a model whose `fit` trains it.

Two names replace those of Keras; `examples/layers/two_tower_keras.py` shows them:

| Keras | here |
|---|---|
| `keras.layers.Embedding`, for each table | `Embeddings`, for all tables |
| `keras.Model` | `Model`, also for functional models |
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sparse_adam._taps import is_recording, tapped_lookup
from sparse_adam._taps import value_and_grad as _value_and_grad
from sparse_adam._types import Storage
from sparse_adam.embedding import EmbeddingState, init
from sparse_adam.embedding import Optimizer as TableOptimizer

_NEEDS = (
    "sparse_adam.keras needs Keras on JAX: pip install sparse_adam[keras], and set "
    "KERAS_BACKEND=jax in the environment before keras is imported"
)
try:
    import keras  # without a backend that is installed, this fails as well
except ImportError as error:
    raise ImportError(_NEEDS) from error
if keras.backend.backend() != "jax":
    raise ImportError(f"{_NEEDS}; its backend is {keras.backend.backend()!r}")


class Embeddings(keras.layers.Layer):
    """Embedding tables that `Model.fit` trains sparsely.

    Tables and slots are non-trainable variables, so no optimizer of Keras touches them,
    and `save_weights` and `load_weights` hold them.

    Args:
        feature_config: a `FeatureConfig` or a nested structure of them, as in `init`.
        optimizer: for the tables that have none of their own; None if all have. The
            rate of each is a number or a function of the step.
        seed: an int, for the first weights.
        storage: as in `init`.
        mesh: whose devices share tables and batches, as in `init`.
        axes: of the mesh, over which they are spread, as in `init`.
        **options: `name` and others of a `keras.layers.Layer`.

    Examples:
        >>> import numpy as np
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig
        >>> features = {"user": FeatureConfig(TableConfig(1000, 16, name="user"))}
        >>> embeddings = Embeddings(features, Adam(0.1))
        >>> embeddings({"user": np.array([7, 42])})["user"].shape
        (2, 16)
    """

    def __init__(
        self,
        feature_config: Any,
        optimizer: TableOptimizer | None,
        *,
        seed: int = 0,
        storage: Storage | None = None,
        mesh: jax.sharding.Mesh | None = None,
        axes: str | Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        make = functools.partial(
            init, feature_config, optimizer, jax.random.key(seed), storage=storage
        )
        self._on_one_device = make
        leaves, self._structure = jax.tree.flatten(make(mesh=mesh, axes=axes))
        self._leaves = [
            self.add_weight(
                shape=leaf.shape,
                dtype=str(leaf.dtype),
                initializer=lambda shape, dtype, leaf=leaf: leaf,
                trainable=False,
                autocast=False,
                name=f"leaf_{number}",
            )
            for number, leaf in enumerate(leaves)
        ]
        self.built = True

    @property
    def state(self) -> EmbeddingState:
        """The `EmbeddingState`, with the slots of the tables' optimizers."""
        leaves = [variable.value for variable in self._leaves]
        return jax.tree.unflatten(self._structure, leaves)

    def get_config(self) -> Any:
        """Refuses what `model.save` asks for.

        Raises:
            NotImplementedError: always, with the way out. It is what Keras
                itself raises for a layer whose arguments are no JSON.
        """
        raise NotImplementedError(
            f"the layer {self.name!r} cannot be saved as a part of a model, since "
            "configurations of features are no JSON: build the model anew, and bring "
            "its weights there by save_weights and load_weights"
        )

    def call(
        self, features: Any, weights: Any = None, training: bool | None = None
    ) -> Any:
        """Returns activations; see `sparse_adam.embedding.lookup`."""
        if training and not is_recording():
            warnings.warn(
                f"the layer {self.name!r} is called in training, but the model is no "
                "sparse_adam.keras.Model, whose fit updates the tables: they stay as "
                "they are",
                stacklevel=2,
            )
        # Keras asks a functional model's layers for shapes, with a batch of no size.
        # That cannot be divided between devices, and does not matter to a shape.
        sizes = (size for ids in jax.tree.leaves(features) for size in np.shape(ids))
        is_symbolic = any(map(jax.export.is_symbolic_dim, sizes))
        state = self._on_one_device() if is_symbolic else self.state
        return tapped_lookup(self, state, features, weights)


class Model(keras.Model):
    """A `keras.Model` whose `fit` trains the tables of its `Embeddings` sparsely.

    Each `Embeddings` is called at most once in a step. `evaluate` and `predict` are
    those of Keras.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Makes a model of inputs and outputs, or one of a subclass with a `call`.

        Keras would give this very class another base where it is made of inputs and
        outputs, and no subclass could be made any more. A class of its own takes that.
        """
        is_functional = len(args) + len({"inputs", "outputs"} & {*kwargs}) == 2
        own: Any = _functional_model() if cls is Model and is_functional else cls
        return super().__new__(own)

    def train_step(self, state: Any, data: Any) -> Any:
        """Does a step as Keras on JAX does it, and updates the rows of the batch."""
        _check_loss_is_not_scaled(self.optimizer)
        trainable, fixed, optimizer, metrics = state
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        layers = _layers(self)
        names = {id(layer): name for name, layer in layers.items()}

        def loss_of(trainable: Any) -> Any:
            return self.compute_loss_and_updates(
                trainable,
                fixed,
                metrics,
                x,
                y,
                sample_weight,
                training=True,
                optimizer_variables=optimizer,
            )

        (_, aux), gradients = _value_and_grad(
            loss_of, trainable, lambda layer: names.get(id(layer))
        )
        loss, predicted, fixed, metrics = aux
        trainable, optimizer = self.optimizer.stateless_apply(
            optimizer, gradients.dense, trainable
        )
        fixed = list(fixed)
        places = {id(v): place for place, v in enumerate(self.non_trainable_variables)}
        for name, gradient in gradients.tables.items():
            own = [places[id(variable)] for variable in layers[name]._leaves]
            tables = jax.tree.unflatten(
                layers[name]._structure, [fixed[place] for place in own]
            )
            new = jax.tree.leaves(gradient.apply(tables))
            for place, leaf in zip(own, new, strict=True):
                fixed[place] = leaf
        logs, metrics = self._update_metrics_variables(
            metrics, loss, x, y, predicted, sample_weight
        )
        return logs, (trainable, fixed, optimizer, metrics)


@functools.cache
def _functional_model() -> type[Model]:
    """Returns a `Model` that is also Keras's class of models of inputs and outputs."""
    tensor = keras.Input((1,))
    return type("Model", (Model, type(keras.Model(tensor, tensor))), {})


def _check_loss_is_not_scaled(optimizer: Any) -> None:
    scaler = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if scaler or optimizer.loss_scale_factor is not None:
        raise ValueError(
            f"the optimizer {optimizer.name!r} scales the loss, and the tables would "
            "get scaled gradients: leave out loss_scale_factor and LossScaleOptimizer, "
            "and compute in bfloat16 rather than float16"
        )


def _layers(model: keras.Model) -> dict[str, Embeddings]:
    found = [x for x in model._flatten_layers() if isinstance(x, Embeddings)]
    return {f"{number}/{layer.name}": layer for number, layer in enumerate(found)}
