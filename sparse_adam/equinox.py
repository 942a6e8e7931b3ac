"""Embedding tables in Equinox: a module, a gradient function, an update.

`examples/layers/two_tower_equinox.py` shows what replaces what:

| Equinox | here |
|---|---|
| `eqx.nn.Embedding`, for each table | `Embeddings`, for all tables |
| `eqx.filter(model, eqx.is_inexact_array)` | `dense(model)` |
| `eqx.filter_value_and_grad` | `filter_value_and_grad` |
| `eqx.apply_updates` | `apply_updates` |
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from sparse_adam._taps import Gradients, check_is_gradients, tapped_lookup
from sparse_adam._taps import value_and_grad as _value_and_grad
from sparse_adam._types import Storage
from sparse_adam.embedding import EmbeddingState, init
from sparse_adam.embedding import Optimizer as TableOptimizer

try:
    import equinox as eqx
except ImportError as error:
    raise ImportError(
        "sparse_adam.equinox needs Equinox: pip install sparse_adam[equinox]"
    ) from error


class Embeddings(eqx.Module):
    """Embedding tables that are trained sparsely.

    Attributes:
        state: the `EmbeddingState`, with the slots of the tables' optimizers.

    Args:
        feature_config: a `FeatureConfig` or a nested structure of them, as in `init`.
        optimizer: for the tables that have none of their own; None if all have.
        key: of `jax.random`, for the first weights.
        storage: as in `init`.
        mesh: whose devices share tables and batches, as in `init`.
        axes: of the mesh, over which they are spread, as in `init`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig
        >>> features = {"user": FeatureConfig(TableConfig(1000, 16, name="user"))}
        >>> embeddings = Embeddings(features, Adam(0.1), key=jax.random.key(0))
        >>> embeddings({"user": jnp.array([7, 42])})["user"].shape
        (2, 16)
    """

    state: EmbeddingState

    def __init__(
        self,
        feature_config: Any,
        optimizer: TableOptimizer | None,
        *,
        key: jax.Array,
        storage: Storage | None = None,
        mesh: jax.sharding.Mesh | None = None,
        axes: str | Sequence[str] | None = None,
    ) -> None:
        self.state = init(
            feature_config, optimizer, key, storage=storage, mesh=mesh, axes=axes
        )

    def __call__(self, features: Any, weights: Any = None) -> Any:
        """Returns activations of a whole batch; see `sparse_adam.embedding.lookup`."""
        return tapped_lookup(self, self.state, features, weights)


def dense(model: Any) -> Any:
    """Returns the dense parameters: `model` with None for tables and non-floats.

    Examples:
        >>> import equinox as eqx
        >>> import jax
        >>> linear = eqx.nn.Linear(2, 3, key=jax.random.key(0))
        >>> dense([linear, 3])[1] is None
        True
    """

    def keep(leaf: Any) -> Any:
        return leaf if eqx.is_inexact_array(leaf) else None

    return jax.tree.map(keep, model, is_leaf=_is_layer)


def filter_value_and_grad(
    loss_of: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., tuple[Any, Gradients]]:
    """Returns a function as Equinox's does, which also serves the tables.

    Args:
        loss_of: takes the model and further arguments; returns the loss. It calls each
            `Embeddings` of the model at most once, and not inside `jit`, `vmap`,
            `remat` or `scan` of its own. It is traced twice.
        has_aux: whether it returns a pair, of the loss and what else it makes.

    Returns:
        A function of the same arguments: what `loss_of` returns, and `Gradients`, whose
        `dense` has the structure of `dense(model)`.

    Raises:
        ValueError: the loss calls no `Embeddings` of the model, or one of them twice.
    """

    @functools.wraps(loss_of)
    def differentiated(model: Any, *args: Any, **kwargs: Any) -> Any:
        names = {id(layer): name for name, layer in _layers(model).items()}
        parameters = dense(model)

        def pure(parameters: Any) -> Any:
            # The layers are whole leaves here, so that they stay the same objects.
            whole = eqx.combine(parameters, model, is_leaf=_is_layer)
            out = loss_of(whole, *args, **kwargs)
            return out if has_aux else (out, None)

        (loss, aux), gradients = _value_and_grad(
            pure, parameters, lambda layer: names.get(id(layer))
        )
        return ((loss, aux) if has_aux else loss), gradients

    return differentiated


def apply_updates(
    model: Any, updates: Any, gradients: Gradients, **options: Any
) -> Any:
    """Returns the model after a step of the dense parameters and the tables.

    Args:
        model: as given to `filter_value_and_grad`.
        updates: of the dense parameters, which optax makes of `gradients.dense`.
        gradients: from `filter_value_and_grad` of this module.
        **options: for the tables: `learning_rates`, `rounding`, `key` and
            `implementation`, as in `sparse_adam.embedding.apply_gradients`.

    Raises:
        TypeError: `gradients` are of `eqx.filter_grad`, and so have none of the tables.
    """
    check_is_gradients(gradients, "sparse_adam.equinox.filter_value_and_grad")
    model = eqx.apply_updates(model, updates)
    layers = _layers(model)
    for name, gradient in gradients.tables.items():
        layers[name] = eqx.tree_at(
            lambda layer: layer.state,
            layers[name],
            gradient.apply(layers[name].state, **options),
        )
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: layers.get(_name(path), leaf), model, is_leaf=_is_layer
    )


def _is_layer(node: Any) -> bool:
    return isinstance(node, Embeddings)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _layers(model: Any) -> dict[str, Embeddings]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_layer)
    return {_name(path): layer for path, layer in leaves if _is_layer(layer)}
