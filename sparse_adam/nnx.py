"""Embedding tables in Flax NNX: a module, a gradient function, an optimizer.

Three names replace those of Flax; `examples/layers/two_tower_nnx.py` shows them:

| Flax | here |
|---|---|
| `nnx.Embed`, for each table | `Embeddings`, for all tables |
| `nnx.value_and_grad` | `value_and_grad` |
| `nnx.Optimizer` | `Optimizer` |
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from sparse_adam._taps import (
    Gradients,
    TableGradient,
    check_is_gradients,
    tapped_lookup,
)
from sparse_adam._taps import value_and_grad as _value_and_grad
from sparse_adam._types import Storage
from sparse_adam.embedding import Optimizer as TableOptimizer
from sparse_adam.embedding import init

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(
        "sparse_adam.nnx needs Flax and optax: pip install sparse_adam[nnx]"
    ) from error


class Tables(nnx.Variable):
    """An `EmbeddingState`. It is no `nnx.Param`, so no dense optimizer touches it."""


class Embeddings(nnx.Module):
    """Embedding tables that are trained sparsely.

    Attributes:
        state: the `Tables`, with the slots of their optimizers.

    Args:
        feature_config: a `FeatureConfig` or a nested structure of them, as in `init`.
        optimizer: for the tables that have none of their own; None if all have.
        rngs: its stream `params` makes the first weights.
        storage: as in `init`.
        mesh: whose devices share tables and batches, as in `init`.
        axes: of the mesh, over which they are spread, as in `init`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig
        >>> features = {"user": FeatureConfig(TableConfig(1000, 16, name="user"))}
        >>> embeddings = Embeddings(features, Adam(0.1), rngs=nnx.Rngs(0))
        >>> embeddings({"user": jnp.array([7, 42])})["user"].shape
        (2, 16)
    """

    def __init__(
        self,
        feature_config: Any,
        optimizer: TableOptimizer | None,
        *,
        rngs: nnx.Rngs,
        storage: Storage | None = None,
        mesh: jax.sharding.Mesh | None = None,
        axes: str | Sequence[str] | None = None,
    ) -> None:
        options: Any = {"storage": storage, "mesh": mesh, "axes": axes}
        self.state = Tables(init(feature_config, optimizer, rngs.params(), **options))

    def __call__(self, features: Any, weights: Any = None) -> Any:
        """Returns activations; see `sparse_adam.embedding.lookup`."""
        return tapped_lookup(self, self.state.get_value(), features, weights)

    def apply_gradient(self, gradient: TableGradient, **options: Any) -> None:
        """Updates the rows that were looked up; `options` as in `apply_gradients`."""
        self.state.set_value(gradient.apply(self.state.get_value(), **options))


def value_and_grad(
    loss_of: Callable[..., Any], *, has_aux: bool = False, wrt: Any = nnx.Param
) -> Callable[..., tuple[Any, Gradients]]:
    """Returns a function as `nnx.value_and_grad` does, which also serves the tables.

    Args:
        loss_of: takes the model and further arguments; returns the loss. It calls each
            `Embeddings` of the model at most once, and not inside `jit`, `vmap`,
            `remat` or `scan` of its own. It is traced twice.
        has_aux: whether it returns a pair, of the loss and what else it makes.
        wrt: the dense parameters.

    Returns:
        A function of the same arguments: what `loss_of` returns, and `Gradients`, whose
        `dense` is an `nnx.State`. Other variables of the model, such as statistics of
        `nnx.BatchNorm` and counts of `nnx.Rngs`, are updated.

    Raises:
        ValueError: the loss calls no `Embeddings` of the model, or one of them twice.
    """

    @functools.wraps(loss_of)
    def differentiated(model: Any, *args: Any, **kwargs: Any) -> Any:
        graph, dense, tables, rest = nnx.split(model, wrt, Tables, ...)
        names: dict[int, str] = {}

        def pure(dense: Any) -> Any:
            copied = jax.tree.map(lambda x: x, (tables, rest))
            model = nnx.merge(graph, dense, *copied)
            names.clear()
            names.update({id(module): name for name, module in _layers(model).items()})
            out = loss_of(model, *args, **kwargs)
            loss, aux = out if has_aux else (out, None)
            return loss, (aux, nnx.split(model, wrt, Tables, ...)[3])

        (loss, (aux, rest)), gradients = _value_and_grad(
            pure, dense, lambda layer: names.get(id(layer))
        )
        nnx.update(model, rest)
        return ((loss, aux) if has_aux else loss), gradients

    return differentiated


class Optimizer(nnx.Optimizer):
    """An `nnx.Optimizer` for the dense parameters that updates the tables as well."""

    def update(self, model: Any, grads: Gradients, /, **options: Any) -> Any:
        """Updates the model in place.

        Args:
            model: as given to `value_and_grad`.
            grads: from `value_and_grad` of this module.
            options: for the tables: `learning_rates`, `rounding`, `key` and
                `implementation`, as in `sparse_adam.embedding.apply_gradients`.

        Returns:
            The updates of the dense parameters, as `nnx.Optimizer.update` does.

        Raises:
            TypeError: `grads` are of `nnx.grad`, and so have none of the tables.
        """
        check_is_gradients(grads, "sparse_adam.nnx.value_and_grad")
        updates = super().update(model, grads.dense)
        layers = _layers(model)
        for name, gradient in grads.tables.items():
            layers[name].apply_gradient(gradient, **options)
        return updates


def _layers(model: Any) -> dict[str, Embeddings]:
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Embeddings)
    }
