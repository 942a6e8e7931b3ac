"""What the layers share: the gradient by activations, inside a framework's own loss.

A loss calls its layers as usual, and each looks up its tables. `value_and_grad` here
runs such a loss with a *tap* at each lookup: zeros that are added to the activations.
The gradient by a tap is the gradient by the activations, which is what the optimizers
of tables take, and nothing of the size of a table is differentiated. The shapes of the
taps come from tracing the loss once before, which computes nothing.
"""

import contextlib
import contextvars
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import get_opaque_trace_state

from sparse_adam.embedding import EmbeddingState, apply_gradients, lookup


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("features", "weights", "activations"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class TableGradient:
    """The gradient of one layer's tables, as what their optimizers take.

    Attributes:
        features: the ids that were looked up.
        weights: the weights of the ids, or None.
        activations: the gradient by the activations, in their structure.
    """

    features: Any
    weights: Any
    activations: Any

    def apply(self, state: EmbeddingState, **options: Any) -> EmbeddingState:
        """Returns the state after the update; for options see `apply_gradients`."""
        return apply_gradients(
            state, self.features, self.activations, self.weights, **options
        )


class Gradients(NamedTuple):
    """The gradients of a model with tables.

    Attributes:
        dense: by the dense parameters, as the framework's own function returns it.
        tables: by the path of each layer that was called, a `TableGradient`.
    """

    dense: Any
    tables: dict[str, TableGradient]


class _Recording(NamedTuple):
    name_of: Callable[[Any], str | None]
    taps: dict[str, Any] | None  # None while the shapes are being found
    trace: Any  # of the loss itself: a layer under a transformation has another
    batches: dict[str, tuple[Any, Any]]
    activations: dict[str, Any]


_RECORDING: contextvars.ContextVar[_Recording | None] = contextvars.ContextVar(
    "recording", default=None
)


@contextlib.contextmanager
def _recording(
    name_of: Callable[[Any], str | None], taps: dict[str, Any] | None
) -> Iterator[_Recording]:
    recording = _Recording(name_of, taps, get_opaque_trace_state(), {}, {})
    token = _RECORDING.set(recording)
    try:
        yield recording
    finally:
        _RECORDING.reset(token)


def is_recording() -> bool:
    """Tells whether `value_and_grad` runs the loss just now."""
    return _RECORDING.get() is not None


def tapped_lookup(
    layer: Any, state: EmbeddingState, features: Any, weights: Any
) -> Any:
    """Looks up as `lookup` does, for `layer`, with a tap where `value_and_grad` runs.

    Raises:
        ValueError: the layer is called twice in one loss, is no part of the model, or
            is under a transformation that is within the loss.
    """
    state = jax.tree.map(_watched_if_float, state)
    activations = lookup(state, features, weights)
    recording = _RECORDING.get()
    if recording is None:
        return activations
    if recording.trace != get_opaque_trace_state():
        raise ValueError(
            "the loss calls an Embeddings layer inside a function under jit, vmap, "
            "remat or scan: call it in the loss itself, and pass that function the "
            "activations"
        )
    name = recording.name_of(layer)
    if name is None:
        raise ValueError(
            "the loss calls an Embeddings layer that is no part of the model that it "
            "is differentiated by: pass the model that holds it as the first argument"
        )
    if name in recording.batches:
        raise ValueError(
            f"the loss calls the layer {name!r} twice, but its tables have one update "
            "a step: call it once with all features; two features may share a table"
        )
    recording.batches[name] = (features, weights)
    recording.activations[name] = activations
    if recording.taps is None:
        return activations
    return jax.tree.map(jnp.add, activations, recording.taps[name])


def value_and_grad(
    loss_of: Callable[[Any], tuple[jax.Array, Any]],
    dense: Any,
    name_of: Callable[[Any], str | None],
) -> tuple[tuple[jax.Array, Any], Gradients]:
    """Differentiates by the dense parameters, and by the activations of each layer.

    Args:
        loss_of: takes dense parameters; returns the loss and whatever else it makes.
            It is traced twice.
        dense: a pytree of floats.
        name_of: returns a layer's path in the model, or None if it is no part of it.

    Raises:
        ValueError: the loss calls no layer, one of them twice, or one under a
            transformation.
    """

    def tapped(dense: Any, taps: Any) -> tuple[jax.Array, Any]:
        with _recording(name_of, taps) as recording:
            loss, aux = loss_of(dense)
        return loss, (aux, recording.batches)

    def find_activations() -> Any:
        with _recording(name_of, None) as recording:
            loss_of(dense)
        return recording.activations

    shapes = jax.eval_shape(find_activations)
    if not shapes:
        raise ValueError(
            "the loss calls no Embeddings layer of the model, so no table would be "
            "trained: call the layer in the loss, not inside a function under jit"
        )
    taps = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (loss, (aux, batches)), (by_dense, by_taps) = jax.value_and_grad(
        tapped, argnums=(0, 1), has_aux=True
    )(dense, taps)
    tables = {
        name: TableGradient(features, weights, by_taps[name])
        for name, (features, weights) in batches.items()
    }
    return (loss, aux), Gradients(by_dense, tables)


def check_is_gradients(gradients: Any, function: str) -> None:
    """Refuses what is not from the layer's own `function`, e.g. a dense gradient."""
    if not isinstance(gradients, Gradients):
        raise TypeError(
            f"the gradients are a {type(gradients).__name__}, which has none of the "
            f"tables: make them by {function}"
        )


def _watched_if_float(array: Any) -> Any:
    return _watched(array) if jnp.issubdtype(array.dtype, jnp.floating) else array


@jax.custom_jvp
def _watched(array: jax.Array) -> jax.Array:
    """Returns the array, and warns if it is differentiated by."""
    return array


@functools.partial(_watched.defjvp, symbolic_zeros=True)
def _warn_of_dense_gradient(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (array,), (tangent,) = primals, tangents
    if isinstance(tangent, SymbolicZero):
        return array, jnp.zeros_like(array)
    warnings.warn(
        f"a gradient by a whole table is taken, of the shape {array.shape}: it is as "
        "large as the table, and no optimizer of a table takes it. Differentiate by "
        "value_and_grad of this layer's module, which takes the gradient by the "
        "activations",
        stacklevel=2,
    )
    return array, tangent
