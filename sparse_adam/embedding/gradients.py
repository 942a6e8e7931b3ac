"""The gradients that a user hands back: what is asked of them, and whose they are."""

import reprlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparse_adam.embedding.combine import Part, UpdateBatch, gather_batch, parts_of
from sparse_adam.embedding.inputs import as_array
from sparse_adam.embedding.stacks import Stack
from sparse_adam.embedding.tables import EmbeddingLayout
from sparse_adam.ops.shards import everywhere


def check_gradients(
    layout: EmbeddingLayout, gradients: Any, shapes: Sequence[tuple[int, ...]]
) -> list[Any]:
    """Returns the gradient of each feature, or None, of the shapes of its activations.

    Raises:
        TypeError: one is no array of floats.
        ValueError: another structure or another shape.
    """
    leaves = [
        as_array(f"the gradient of feature {feature.name!r}", leaf)
        if hasattr(leaf, "dtype")
        else leaf
        for feature, leaf in zip(
            layout.features,
            layout.leaves("activation_gradients", gradients),
            strict=True,
        )
    ]
    for feature, gradient, shape in zip(layout.features, leaves, shapes, strict=True):
        if gradient is None:
            continue
        dtype = getattr(gradient, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            what = reprlib.repr(gradient)
            if dtype is not None:
                what = f"{dtype}{list(np.shape(gradient))}"
            raise TypeError(
                f"the gradient of feature {feature.name!r} is {what}; it must be an "
                f"array of floats of the shape {shape}, or None"
            )
        if np.shape(gradient) != shape:
            raise ValueError(
                f"the gradient of feature {feature.name!r} has the shape "
                f"{np.shape(gradient)}; it must have that of its activations, {shape}"
            )
    return [None if leaf is None else jnp.asarray(leaf) for leaf in leaves]


def warn_of_missing_gradients(
    layout: EmbeddingLayout, gradients: Any, *, stacklevel: int
) -> None:
    """Warns of each feature of a trainable table without a gradient."""
    leaves = layout.leaves("activation_gradients", gradients)
    for feature, gradient in zip(layout.features, leaves, strict=True):
        if gradient is None and layout.tables[feature.table].trainable:
            warnings.warn(
                f"activation_gradients has no gradient for feature {feature.name!r}: "
                "it counts as zero, and the rows that were looked up still move with "
                "their momenta. Pass zeros if that is meant",
                stacklevel=stacklevel,
            )


def gradients_of_stacks(
    layout: EmbeddingLayout, features: Any, gradients: Any, weights: Any
) -> Iterator[tuple[Stack, list[Part], list[Any]]]:
    """Yields each trainable stack, its features, and the gradient of each, or None.

    Args:
        layout: of the features.
        features: as in `lookup`.
        gradients: by the activations; None counts as zeros.
        weights: as in `lookup`.

    Raises:
        TypeError: ids or gradients are of a wrong kind.
        ValueError: another structure, or shapes that do not fit.
    """
    parts = parts_of(layout, features, weights)
    shapes = [part.activations for part in parts]
    gradients = check_gradients(layout, gradients, shapes)
    for number, stack in enumerate(layout.stacks):
        if not stack.trainable:
            continue
        own = [i for i, part in enumerate(parts) if part.stack == number]
        yield stack, [parts[i] for i in own], [gradients[i] for i in own]


def whole_batch(parts: Sequence[Part], gradients: Sequence[Any]) -> UpdateBatch:
    """Returns all ids and gradients of features of a stack, whole on every device."""
    return everywhere(gather_batch(parts, gradients))
