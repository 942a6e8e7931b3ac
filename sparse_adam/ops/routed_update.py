"""Updates whose batches are routed to the owners of the rows."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from sparse_adam._types import Grads, Indices
from sparse_adam.kernels.spec import State, StepScalars, UpdateSpec
from sparse_adam.ops import dispatch, routing
from sparse_adam.ops.combine import Samples
from sparse_adam.ops.dispatch import Choices
from sparse_adam.ops.integers import in_32_bits
from sparse_adam.ops.options import UpdateInputs, UpdateOptions
from sparse_adam.ops.plan import inside_or
from sparse_adam.ops.routed import Routed
from sparse_adam.ops.run import FlatBatch, bind, own_scalars
from sparse_adam.ops.samples import Part, add, deal, route_samples, update_samples
from sparse_adam.ops.shards import vary_alike


def update_routed(
    arrays: State,
    inputs: UpdateInputs,
    spec: UpdateSpec,
    options: UpdateOptions,
    routed: Routed,
) -> State:
    """Updates arrays by a batch of which each device has a part.

    Args:
        arrays: of the layout.
        inputs: the batch.
        spec: of the whole update; in a `jax.shard_map`, of a device's batch and rows.
        options: of the update.
        routed: how the batch travels.
    """
    own = routed.part(spec)
    chosen = dispatch.choices(own, options.implementation, options.config)
    if not spec.num_ids and spec.lazy:
        return arrays
    scalars = options.scalars(spec.layout, stochastic=spec.stochastic)
    batch = _canonicalize(inputs, spec, routed)
    return run_routed_update(
        arrays, batch, scalars, spec=own, chosen=chosen, routed=routed
    )


def _canonicalize(inputs: UpdateInputs, spec: UpdateSpec, routed: Routed) -> FlatBatch:
    """Returns a batch that is to be routed, 32 bits wide, in the shapes it came in."""
    ids = inside_or(inputs.ids, routed.num_rows, fill=-1)
    grads, gains, sample_ids = jnp.asarray(inputs.grads), inputs.gains, None
    if grads.dtype == np.float64:
        grads = grads.astype(jnp.float32)
    if gains is not None:
        gains = jnp.asarray(gains, jnp.float32)
    if inputs.sample_ids is not None:
        sample_ids = jnp.asarray(inside_or(inputs.sample_ids, spec.num_grads, fill=-1))
    return FlatBatch(jnp.asarray(ids), None, grads, sample_ids, gains)


@in_32_bits
@functools.partial(jax.jit, static_argnames=("spec", "chosen", "routed"))
def run_routed_update(
    state: State,
    batch: FlatBatch,
    scalars: StepScalars,
    *,
    spec: UpdateSpec,
    chosen: Choices,
    routed: Routed,
) -> State:
    """Updates the rows of a state on the devices that have them, in rounds.

    Args:
        state: the arrays of the layout.
        batch: ids and sample ids of -1 for none, in the shapes that they came in.
        scalars: the traced numbers.
        spec: of the update that one device makes in a round (`Routed.part`).
        chosen: what runs it.
        routed: how the batch travels.
    """
    dealt = not routed.shards.is_inside

    def update_own(state: State, batch: FlatBatch, scalars: StepScalars) -> State:
        scalars = own_scalars(scalars, routed.shards)

        def step(state: State, rows: Indices, grads: Grads) -> State:
            ids = jnp.where(rows < 0, jnp.int32(spec.num_rows), rows)
            own = FlatBatch(ids, None, grads, None, None)
            return bind(*vary_alike((state, own, scalars)), spec, chosen)

        if spec.lazy:
            return _bring(routed, batch, state, step, dealt)
        # A step for every row can be made once only, when all sums have arrived.
        zeros = jnp.zeros((spec.num_rows, spec.dim), jnp.float32)
        sums = _bring(routed, batch, zeros, add, dealt)
        return step(state, lax.iota(jnp.int32, spec.num_rows), sums)

    ids, _, grads, sample_ids, gains = batch
    dims = ids.ndim
    if sample_ids is None:
        if gains is not None:
            grads = routed.spread(grads, dims).astype(jnp.float32)
            grads, gains = grads * routed.spread(gains, dims)[..., None], None
        else:
            grads = routed.spread(grads, dims)
    else:
        grads = routed.cut(grads)
        sample_ids = routed.spread(sample_ids, dims, -1)
        gains = None if gains is None else routed.spread(gains, dims)
    batch = FlatBatch(routed.spread(ids, dims, -1), None, grads, sample_ids, gains)
    rows, place, whole = routed.shards.rows, routed.place, PartitionSpec()
    of_grads = place if sample_ids is None else rows
    of_batch: Any = (place, None, of_grads, place, place)
    operands = rows, FlatBatch(*of_batch), whole
    return routed.shards.map(update_own, operands, rows)(state, batch, scalars)


def _bring(
    routed: Routed,
    batch: FlatBatch,
    state: Any,
    local_update: Callable[[Any, Indices, Grads], Any],
    dealt: bool,
) -> Any:
    """Brings a device's gradients to the owners of the rows; called on each device.

    Args:
        routed: how the batch travels.
        batch: what this device has of it.
        state: what this device has of the table, or of something of its rows.
        local_update: as for `routing.update`.
        dealt: a device has any ids, whoever has their gradients; False if it passes its
            own ids and gradients.
    """
    ids, _, grads, sample_ids, gains = batch
    if sample_ids is None:
        return routing.update(routed.route(ids), grads, state, local_update)
    axes, ids = routed.shards.axes, ids.reshape(-1)
    samples = Samples(ids, sample_ids.reshape(-1), gains, None)
    if gains is not None:
        samples = samples._replace(gains=gains.reshape(-1))
    if dealt:
        samples = deal(samples, axes)
    part = Part(samples, grads.shape[0], dealt)
    route = route_samples([part], routed.placement, axes)
    return update_samples(route, [grads], state, local_update)
