"""The compiled functions of `TPUEmbedding`, their arguments, and its checks."""

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from sparse_adam._types import ImplementationName, Rounding
from sparse_adam.embedding import functional
from sparse_adam.embedding.rates import LearningRates
from sparse_adam.embedding.serving import serving_embedding_lookup
from sparse_adam.embedding.state import EmbeddingState
from sparse_adam.embedding.tables import EmbeddingLayout
from sparse_adam.embedding.updating import update_tables
from sparse_adam.rules import numbers

lookup = jax.jit(functional.lookup)
serve = jax.jit(serving_embedding_lookup)


@functools.partial(
    jax.jit, static_argnames=("rounding", "implementation"), donate_argnums=0
)
def update(
    state: EmbeddingState,
    change: "Update",
    noise: jax.Array | None,
    *,
    rounding: Rounding,
    implementation: ImplementationName | None,
) -> EmbeddingState:
    """Updates the tables; `noise` is the key whose children are those of the steps."""
    return update_tables(
        state,
        change.features,
        change.gradients,
        change.weights,
        learning_rates=change.rates,
        gradient_scale=change.scale,
        rounding=rounding,
        key=None if noise is None else jax.random.fold_in(noise, change.step),
        implementation=implementation,
    )


@dataclasses.dataclass(frozen=True)
class QueuedBatch:
    """A batch that waits for its lookup, and in training for its gradients."""

    features: Any
    weights: Any
    training: bool
    shapes: list[tuple[int, ...]]  # of its activations


class Update(NamedTuple):
    """What one update takes, apart from the state."""

    features: Any
    weights: Any
    gradients: Any
    rates: LearningRates
    scale: Any  # of the gradients, a scalar; None is 1
    step: np.uint32  # its number, from 0

    @classmethod
    def of(
        cls,
        batch: QueuedBatch,
        gradients: Any,
        rates: LearningRates,
        scale: ArrayLike | None,
        step: int,
    ) -> "Update":
        """Returns the update of a batch: its numbers as arrays, so none recompiles."""
        return cls(
            batch.features,
            batch.weights,
            gradients,
            jax.tree.map(functools.partial(numbers.scalar, "learning_rate"), rates),
            None if scale is None else numbers.scalar("gradient_scale", scale),
            np.uint32(step),
        )


def _signature(tree: Any) -> Hashable:
    """Returns what a compiled function knows of its arguments before it runs."""
    leaves, structure = jax.tree.flatten(tree)
    kinds = tuple((np.shape(x), getattr(x, "dtype", type(x))) for x in leaves)
    return structure, kinds


class Checks:
    """Refuses batches and updates by shapes and dtypes, once for each kind of them.

    What is refused is refused when it is given, not when it is computed with.
    """

    def __init__(self, layout: EmbeddingLayout) -> None:
        self._layout = layout
        self._shapes_of: dict[Hashable, list[tuple[int, ...]]] = {}  # batches seen
        self._updates_seen: set[Hashable] = set()

    def update(
        self,
        state: EmbeddingState,
        change: Update,
        noise: jax.Array | None,
        **how: Any,
    ) -> None:
        """Refuses now what would fail when the update is made, after the next lookup.

        Traces it for that, once for each kind; the update then need not.
        """
        kind = _signature((state, change))
        if kind not in self._updates_seen:
            update.eval_shape(state, change, noise, **how)
            self._updates_seen.add(kind)

    def activation_shapes(self, features: Any, weights: Any) -> list[tuple[int, ...]]:
        """Returns the shapes of a batch's activations; refuses what has none."""
        kind = _signature((features, weights))
        if kind not in self._shapes_of:
            found: list[tuple[int, ...]] = []

            def trace(features: Any, weights: Any) -> None:
                shapes = functional.activation_shapes(self._layout, features, weights)
                found.extend(shapes)

            jax.eval_shape(trace, features, weights)
            self._shapes_of[kind] = found
        return self._shapes_of[kind]
