"""Stacks whose rows are spread over the devices of a mesh: lookup and update.

A stack is placed as one table (`placed`): its rows are interleaved, and its batches
routed to the devices that have them (docs/routing.md).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparse_adam.embedding.config import QuantizationConfig
from sparse_adam.embedding.placed import layout_of
from sparse_adam.embedding.quantization import simulate_quantization
from sparse_adam.embedding.stacks import Stack
from sparse_adam.ops.combine import Samples
from sparse_adam.ops.options import UpdateOptions
from sparse_adam.ops.packed import PackedTable
from sparse_adam.ops.spread import Spread
from sparse_adam.ops.spread_samples import lookup_batch, update_batch


def spread_of(mesh: Any, axes: Any) -> Spread | None:
    """Returns the devices that `mesh` and `axes` name; None where there is no mesh.

    Raises:
        TypeError: `mesh` is no mesh.
        ValueError: there are axes without a mesh, or of another one.
    """
    if mesh is None:
        if axes is not None:
            raise ValueError(f"{axes=} need a mesh: pass mesh= too")
        return None
    if not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(f"{mesh=} must be a jax.sharding.Mesh, or None")
    if axes is None:
        axes = mesh.axis_names
    return Spread(mesh, (axes,) if isinstance(axes, str) else tuple(axes))


def check_whole_batch(stacks: Sequence[Stack], function: str) -> None:
    """Refuses to count or sum over a batch of which a device sees its own part only.

    Raises:
        ValueError: this is traced in a `jax.shard_map` over the axes of a stack.
    """
    for stack in stacks:
        if stack.spread is not None and stack.spread.is_inside:
            raise ValueError(
                f"{function}() within jax.shard_map over the axes {stack.spread.axes} "
                "would see the samples of one device only: call it outside, with the "
                "whole batch"
            )


def look_up(
    stack: Stack,
    stored: Any,
    batch: Sequence[Samples],
    sizes: Sequence[int],
    quantization: QuantizationConfig | None,
) -> list[jax.Array]:
    """Returns the combined rows of each feature of a stack, `[S, D]`."""
    assert stack.spread is not None
    layout = layout_of(stack, stored)
    found = lookup_batch(
        stored.lines if isinstance(stored, PackedTable) else jnp.asarray(stored[0]),
        batch,
        spread=stack.spread,
        layout=layout,
        sizes=tuple(sizes),
        change=None if quantization is None else _quantizer(quantization),
    )
    return [x.astype(layout.dtypes[0]) for x in found]


def update(
    stack: Stack,
    stored: Any,
    batch: Sequence[Samples],
    grads: Sequence[jax.Array | None],
    sizes: Sequence[int],
    options: UpdateOptions,
) -> Any:
    """Returns the stack after one update by the gradients `[S, D]` of its features."""
    assert stack.spread is not None
    packed = isinstance(stored, PackedTable)
    new = update_batch(
        (stored.lines,) if packed else tuple(map(jnp.asarray, stored)),
        batch,
        grads,
        stack.optimizer.rule,
        options,
        spread=stack.spread,
        layout=layout_of(stack, stored),
        sizes=tuple(sizes),
    )
    if packed:
        return PackedTable(new[0], stored.layout)
    return stack.optimizer.state_of(new)


@functools.cache
def _quantizer(config: QuantizationConfig) -> Callable[[jax.Array], jax.Array]:
    """Returns one function for each configuration, for `jax.jit` to know it again."""

    def quantize(rows: jax.Array) -> jax.Array:
        return simulate_quantization(rows.astype(jnp.float32), config)

    return quantize
