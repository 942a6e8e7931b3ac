"""Runs a validated update: canonicalizes the batch, shards, batches and runs it.

The stages from a user's call to a kernel, each a function by its name: an op
*validates* (`validate`), *chooses* (`dispatch`) and *canonicalizes* the batch; the
update is *sharded*, where rows are spread over devices, and *batched*, where `jax.vmap`
is around it; and it is *run* by the implementation chosen for the platform at hand.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_adam._types import Gains, Grads, Indices
from sparse_adam.kernels import cpu
from sparse_adam.kernels.rounding import noise
from sparse_adam.kernels.spec import SortedBatch, State, StepScalars, UpdateSpec
from sparse_adam.ops.dispatch import Choices
from sparse_adam.ops.integers import in_32_bits
from sparse_adam.ops.late import late_primitive, no_gradient
from sparse_adam.ops.options import UpdateInputs
from sparse_adam.ops.plan import indices_or, plan_update
from sparse_adam.ops.shards import Shards, everywhere


class FlatBatch(NamedTuple):
    """A batch in arrays of one form: as it came, or by `order`, which a plan has made.

    An id outside `[0, V)` is V, a sample id outside `[0, B)` is -1.
    """

    ids: Indices
    order: Indices | None
    grads: Grads
    sample_ids: Indices | None
    gains: Gains | None


def canonicalize(inputs: UpdateInputs, spec: UpdateSpec) -> FlatBatch:
    """Returns a batch as arrays `[N]` and `[B, D]`, 32 bits wide, on every device."""
    ids, grads, sample_ids, gains, plan = everywhere(inputs)
    if plan is None:
        ids, order = indices_or(ids, spec.num_rows, fill=spec.num_rows), None
    else:
        ids, order = plan.ids, plan.order
    if sample_ids is not None:
        sample_ids = indices_or(sample_ids, spec.num_grads, fill=-1)
    if gains is not None:
        gains = jnp.asarray(gains, jnp.float32).reshape(-1)
    grads = jnp.asarray(grads).reshape(spec.num_grads, spec.dim)
    if grads.dtype == np.float64:
        grads = grads.astype(jnp.float32)
    return FlatBatch(ids, order, grads, sample_ids, gains)


@in_32_bits
@functools.partial(jax.jit, static_argnames=("spec", "chosen", "shards"))
def run_update(
    state: State,
    batch: FlatBatch,
    scalars: StepScalars,
    *,
    spec: UpdateSpec,
    chosen: Choices,
    shards: Shards | None,
) -> State:
    """Updates the rows of a state: on one device, or of each device its own.

    Args:
        state: the arrays of the layout.
        batch: from `canonicalize`.
        scalars: the traced numbers.
        spec: of the rows that one device has.
        chosen: what runs it.
        shards: the devices that share the rows; None is one device.
    """
    if shards is None:
        return _bind(state, batch, scalars, spec, chosen)

    def update_own(state: State, batch: FlatBatch, scalars: StepScalars) -> State:
        batch = _own(batch, shards, spec.num_rows)
        seeds = scalars.seeds
        if seeds is not None and shards.axes:
            # Rows of one number on several devices must not share their noise.
            seeds = noise(seeds, lax.axis_index(shards.axes)[None])
        return _bind(state, batch, scalars._replace(seeds=seeds), spec, chosen)

    return shards.on_each(update_own, state, batch, scalars)


def _own(batch: FlatBatch, shards: Shards, num_rows: int) -> FlatBatch:
    """Returns the batch as a device sees it, whose rows are `num_rows` of all."""
    ids = shards.own(batch.ids, num_rows)
    ids = jnp.where(ids < 0, num_rows, ids)
    if batch.order is None:
        return batch._replace(ids=ids)
    # What is sorted stays sorted: its own stand together, and come first.
    before = -jnp.argmax(ids < num_rows)
    return batch._replace(
        ids=jnp.roll(ids, before), order=jnp.roll(batch.order, before)
    )


def _bind(
    state: State,
    batch: FlatBatch,
    scalars: StepScalars,
    spec: UpdateSpec,
    chosen: Choices,
) -> State:
    arrays, structure = jax.tree.flatten((state, batch, scalars))
    new = _update_p.bind(*arrays, structure=structure, spec=spec, chosen=chosen)
    return tuple(new)


def _run(
    platform: str | None,
    *arrays: jax.Array,
    structure: Any,
    spec: UpdateSpec,
    chosen: Choices,
) -> State:
    """Runs the update by what was chosen for the platform, with a plan if it needs."""
    state, batch, scalars = jax.tree.unflatten(structure, arrays)
    ids, order, grads, sources, gains = batch
    choice = chosen.on(platform)
    if platform == "cpu" and choice.implementation.name == "xla" and not choice.named:
        cpu.warn_of_fallback()
    if spec.weighted and gains is None:
        gains = jnp.ones(ids.shape, jnp.float32)
    if order is None and not choice.implementation.sorts:
        plan = plan_update(ids, spec.num_rows)
        ids, order = plan.ids, plan.order
    if order is not None:
        sources = order if sources is None else sources[order]
        gains = None if gains is None else gains[order]
    elif sources is None:
        sources = lax.iota(jnp.int32, ids.size)
    return choice.update(state, SortedBatch(grads, ids, sources, gains), scalars, spec)


def _results(
    *types: Any, structure: Any, spec: UpdateSpec, chosen: Choices
) -> list[Any]:
    """Returns the types of the new state: those of the old one."""
    del chosen
    state, _, _ = jax.tree.unflatten(structure, types)
    assert len(state) == len(spec.layout.shapes)
    return list(state)


def _over_tables(
    arrays: Any, axes: Any, *, structure: Any, spec: UpdateSpec, chosen: Choices
) -> tuple[State, list[int]]:
    """Updates T tables under `jax.vmap` as one tall table, where that is the same.

    The update of T tables of V rows is the update of one table of T * V rows, with the
    ids of table t raised by t * V: one call, in place, no slower than one table with as
    many ids. (On a TPU the tall table is the same memory where V is a multiple of 8,
    else a copy.)
    """
    size = next(
        x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None
    )
    moved = [
        None if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(arrays, axes, strict=True)
    ]
    stacked = [
        jnp.broadcast_to(x, (size, *x.shape)) if each is None else each
        for x, each in zip(arrays, moved, strict=True)
    ]
    state, batch, _ = jax.tree.unflatten(structure, stacked)
    _, _, scalars = jax.tree.unflatten(structure, arrays)
    _, _, scalar_axes = jax.tree.unflatten(structure, [a is not None for a in axes])
    too_tall = size * (spec.layout.room + spec.num_ids) >= 2**31
    # The noise of an element depends on its place in the table.
    if too_tall or spec.stochastic or any(jax.tree.leaves(scalar_axes)):

        def one(each: list[jax.Array]) -> list[jax.Array]:
            return _update_p.bind(*each, structure=structure, spec=spec, chosen=chosen)

        new = lax.map(one, stacked)
    else:
        tall_state, tall_batch, tall = _one_tall_table(state, batch, spec)
        new = _bind(tall_state, tall_batch, scalars, tall, chosen.for_spec(tall))
        new = [x.reshape(size, -1, *x.shape[1:]) for x in new]
    return tuple(new), [0] * len(new)


def _one_tall_table(
    state: State, batch: FlatBatch, spec: UpdateSpec
) -> tuple[State, FlatBatch, UpdateSpec]:
    size, room = state[0].shape[0], spec.layout.room
    number = lax.broadcasted_iota(jnp.int32, batch.ids.shape, 0)
    num_rows = size * room

    def rows(x: Any) -> Any:
        return None if x is None else x.reshape(-1, *x.shape[2:])

    sample_ids, order = batch.sample_ids, batch.order
    if sample_ids is not None:
        raised = sample_ids + number * spec.num_grads
        sample_ids = jnp.where(sample_ids < 0, -1, raised)
    if order is not None:
        order = order + number * spec.num_ids
    ids = jnp.where(batch.ids < spec.num_rows, batch.ids + number * room, num_rows)
    tall = spec.replace(
        layout=spec.layout.with_rows(num_rows),
        num_ids=size * spec.num_ids,
        num_grads=size * spec.num_grads,
    )
    flat = FlatBatch(ids, order, batch.grads, sample_ids, batch.gains)
    return tuple(map(rows, state)), FlatBatch(*map(rows, flat)), tall


_update_p = late_primitive(
    "sparse_update",
    _run,
    _results,
    _over_tables,
    jvp=no_gradient(
        "an update of a table cannot be differentiated: differentiate the loss by the "
        "rows that were looked up, and pass that gradient to the update"
    ),
)
