"""Embedding tables in Flax Linen: a module, a gradient function, a train state.

Three names replace those of Flax; `examples/layers/two_tower_linen.py` shows them:

| Flax | here |
|---|---|
| `nn.Embed`, for each table | `Embeddings`, for all tables |
| `jax.value_and_grad` | `value_and_grad` |
| `flax.training.train_state.TrainState` | `TrainState` |
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from sparse_adam._taps import Gradients, check_is_gradients, tapped_lookup
from sparse_adam._taps import value_and_grad as _value_and_grad
from sparse_adam._types import Storage
from sparse_adam.embedding import Optimizer as TableOptimizer
from sparse_adam.embedding import init

try:
    from flax import linen as nn
    from flax.training import train_state
except ImportError as error:
    raise ImportError(
        "sparse_adam.linen needs Flax and optax: pip install sparse_adam[linen]"
    ) from error


class Embeddings(nn.Module):
    """Embedding tables that are trained sparsely.

    The tables and slots are an `EmbeddingState` in the collection "tables", beside
    "params". Its first weights are made by the stream "params".

    Attributes:
        feature_config: a `FeatureConfig` or a nested structure of them, as in `init`.
            Linen makes tuples of its lists, so pass features in tuples and dicts.
        optimizer: for the tables that have none of their own; None if all have.
        storage: as in `init`.
        mesh: whose devices share tables and batches, as in `init`.
        axes: of the mesh, over which they are spread, as in `init`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig
        >>> config = FeatureConfig(TableConfig(1000, 16, name="user"))
        >>> embeddings = Embeddings(config, Adam(0.1))
        >>> ids = jnp.array([7, 42])
        >>> variables = embeddings.init(jax.random.key(0), ids)
        >>> embeddings.apply(variables, ids).shape
        (2, 16)
    """

    feature_config: Any
    optimizer: TableOptimizer | None
    storage: Storage | None = None
    mesh: jax.sharding.Mesh | None = None
    axes: str | Sequence[str] | None = None

    @nn.compact
    def __call__(self, features: Any, weights: Any = None) -> Any:
        """Returns activations; see `sparse_adam.embedding.lookup`."""

        def first_state() -> Any:
            return init(
                _thawed(self.feature_config),
                self.optimizer,
                self.make_rng("params"),
                storage=self.storage,
                mesh=self.mesh,
                axes=self.axes,
            )

        state = self.variable("tables", "state", first_state)
        return tapped_lookup(self, state.value, features, weights)


def value_and_grad(
    loss_of: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., tuple[Any, Gradients]]:
    """Returns a function as `jax.value_and_grad` does, which also serves the tables.

    Args:
        loss_of: takes the collection "params" and further arguments; returns the loss.
            It calls each `Embeddings` at most once, and not inside `jit`, `vmap`,
            `remat` or `scan` of its own. It is traced twice.
        has_aux: whether it returns a pair, of the loss and what else it makes.

    Returns:
        A function of the same arguments: what `loss_of` returns, and `Gradients`.

    Raises:
        ValueError: the loss calls no `Embeddings`, or one of them twice.
    """

    @functools.wraps(loss_of)
    def differentiated(params: Any, *args: Any, **kwargs: Any) -> Any:
        def pure(params: Any) -> Any:
            out = loss_of(params, *args, **kwargs)
            return out if has_aux else (out, None)

        (loss, aux), gradients = _value_and_grad(
            pure, params, lambda layer: "/".join(layer.path)
        )
        return ((loss, aux) if has_aux else loss), gradients

    return differentiated


class TrainState(train_state.TrainState):
    """A `TrainState` of Flax with the tables.

    Make it by `TrainState.create(apply_fn=model.apply, tx=tx, **variables)`, where
    `variables` are those that `model.init` makes.

    Attributes:
        tables: the collection of that name.
    """

    tables: Any

    def apply_gradients(
        self, *, grads: Gradients, options: Mapping[str, Any] | None = None, **new: Any
    ) -> "TrainState":
        """Returns the state after a step.

        Args:
            grads: from `value_and_grad` of this module.
            options: for the tables: `learning_rates`, `rounding`, `key` and
                `implementation`, as in `sparse_adam.embedding.apply_gradients`.
            **new: attributes to replace, as in Flax.

        Raises:
            TypeError: `grads` are of `jax.grad`, and so have none of the tables.
        """
        check_is_gradients(grads, "sparse_adam.linen.value_and_grad")
        tables = self.tables
        for name, gradient in grads.tables.items():
            path = [part for part in name.split("/") if part]
            tables = _updated(tables, [*path, "state"], gradient, options or {})
        return super().apply_gradients(grads=grads.dense, tables=tables, **new)


def _thawed(config: Any) -> Any:
    """Returns `config` with dicts where Linen made frozen ones of them."""
    if isinstance(config, Mapping):
        return {name: _thawed(part) for name, part in config.items()}
    if type(config) is tuple:
        return tuple(map(_thawed, config))
    return config


def _updated(tree: Any, path: list[str], gradient: Any, options: Any) -> Any:
    if not path:
        return gradient.apply(tree, **options)
    name, *rest = path
    return {**tree, name: _updated(tree[name], rest, gradient, options)}
