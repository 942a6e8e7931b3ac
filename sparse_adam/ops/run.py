"""Runs a validated update: canonicalizes the batch, shards, batches and runs it.

The stages from a user's call to a kernel, each a function by its name: an op
*validates* (`validate`), *chooses* (`dispatch`) and *canonicalizes* the batch; the
update is *sharded*, where rows are spread over devices, and *batched*, where `jax.vmap`
is around it; and it is *run* by the implementation chosen for the platform at hand.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sparse_adam._types import Gains, Grads, Indices
from sparse_adam.kernels import cpu
from sparse_adam.kernels.rounding import noise
from sparse_adam.kernels.spec import SortedBatch, State, StepScalars, UpdateSpec
from sparse_adam.ops.automatic import Cut, Partition
from sparse_adam.ops.dispatch import Choice, Choices
from sparse_adam.ops.integers import in_32_bits
from sparse_adam.ops.late import late_primitive, no_gradient
from sparse_adam.ops.options import UpdateInputs
from sparse_adam.ops.plan import check_plan, indices_or, sort_occurrences
from sparse_adam.ops.shards import Shards, check_alike, everywhere
from sparse_adam.ops.sorting import in_order


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
        check_plan(inputs.ids, plan)
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
        return bind(state, batch, scalars, spec, chosen)
    update_own = functools.partial(_update_own, shards=shards, spec=spec, chosen=chosen)
    return shards.on_each(update_own, state, batch, scalars)


def _update_own(
    state: State,
    batch: FlatBatch,
    scalars: StepScalars,
    *,
    shards: Shards,
    spec: UpdateSpec,
    chosen: Choices,
) -> State:
    """Updates the rows that one device has."""
    batch = _own(batch, shards, spec.num_rows)
    return bind(state, batch, own_scalars(scalars, shards), spec, chosen)


def own_scalars(scalars: StepScalars, shards: Shards) -> StepScalars:
    """Returns the traced numbers as a device sees them: with noise of its own."""
    seeds = scalars.seeds
    if seeds is not None and shards.axes:
        # Rows of one number on several devices must not share their noise.
        seeds = noise(seeds, lax.axis_index(shards.axes)[None])
    return scalars._replace(seeds=seeds)


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


def bind(
    state: State,
    batch: FlatBatch,
    scalars: StepScalars,
    spec: UpdateSpec,
    chosen: Choices,
    each: UpdateSpec | None = None,
) -> State:
    """Puts the update into the program: of one table, or of several.

    Args:
        state: arrays of the layout; with `each`, T of them in one array.
        batch: of the table; with `each`, T of them in one array.
        scalars: the traced numbers, which T tables share.
        spec: of the table; with `each`, of the one tall table that T tables make.
        chosen: what runs.
        each: of each of T tables; None is one table.
    """
    arrays, structure = jax.tree.flatten((state, batch, scalars))
    new = _update(*arrays, structure=structure, spec=spec, chosen=chosen, each=each)
    return tuple(new)


def _run(
    platform: str | None,
    *arrays: jax.Array,
    structure: Any,
    spec: UpdateSpec,
    chosen: Choices,
    each: UpdateSpec | None,
) -> State:
    """Runs the update of one table, or of several as one tall table."""
    state, batch, scalars = jax.tree.unflatten(structure, arrays)
    choice = chosen.on(platform)
    if each is None:
        return _run_one(platform, state, batch, scalars, spec, choice)
    tall_state, tall_batch = _one_tall_table(state, batch, each)
    new = _run_one(platform, tall_state, tall_batch, scalars, spec, choice)
    return tuple(x.reshape(old.shape) for x, old in zip(new, state, strict=True))


def _run_one(
    platform: str | None,
    state: State,
    batch: FlatBatch,
    scalars: StepScalars,
    spec: UpdateSpec,
    choice: Choice,
) -> State:
    """Runs the update by what was chosen for the platform, with a plan if it needs."""
    ids, order, grads, sources, gains = batch
    if platform == "cpu" and choice.implementation.name == "xla" and not choice.named:
        cpu.warn_of_fallback()
    payload, structure = jax.tree.flatten((sources, gains))
    if order is not None:
        payload = in_order(platform, order, payload)
    elif not choice.implementation.sorts:
        plan, payload = sort_occurrences(ids, payload, num_rows=spec.num_rows)
        ids, order = plan.ids, plan.order
    else:
        order = lax.iota(jnp.int32, ids.size)
    sources, gains = jax.tree.unflatten(structure, payload)
    if sources is None:
        sources = order
    if spec.weighted and gains is None:
        gains = jnp.ones(ids.shape, jnp.float32)
    return choice.update(state, SortedBatch(grads, ids, sources, gains), scalars, spec)


def _results(
    *types: Any, structure: Any, spec: UpdateSpec, chosen: Choices, each: Any
) -> list[Any]:
    """Returns the types of the new state: those of the old one."""
    del chosen, each
    state, _, _ = jax.tree.unflatten(structure, types)
    assert len(state) == len(spec.layout.shapes)
    return list(state)


def _over_tables(
    arrays: Any,
    axes: Any,
    *,
    structure: Any,
    spec: UpdateSpec,
    chosen: Choices,
    each: UpdateSpec | None,
) -> tuple[State, list[int]]:
    """Updates T tables under `jax.vmap` as one tall table, where that is the same.

    The update of T tables of V rows is the update of one table of T * V rows, with the
    ids of table t raised by t * V: one call, in place, no slower than one table with as
    many ids. (On a TPU the tall table is the same memory where V is a multiple of 8,
    else a copy.) Tables with noise, or with a number each (such as a learning rate),
    are updated in turn; on a TPU they pass through copies.
    """
    size = next(
        x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None
    )
    stacked = [
        jnp.broadcast_to(x, (size, *x.shape))
        if axis is None
        else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(arrays, axes, strict=True)
    ]
    state, batch, _ = jax.tree.unflatten(structure, stacked)
    _, _, scalars = jax.tree.unflatten(structure, arrays)
    _, _, scalar_axes = jax.tree.unflatten(structure, [a is not None for a in axes])
    one = spec if each is None else each
    shapes = [x.shape for x in state]
    if each is not None:
        state, batch = _flatten_tables((state, batch))
    count = len(state[0])
    too_tall = count * (one.layout.room + one.num_ids) >= 2**31
    # The noise of an element depends on its place in the table.
    if too_tall or one.stochastic or any(jax.tree.leaves(scalar_axes)):

        def update(arrays: list[jax.Array]) -> State:
            state, batch, scalars = jax.tree.unflatten(structure, arrays)
            return bind(state, batch, scalars, spec, chosen, each)

        new = lax.map(update, stacked)
    else:
        tall = _tall_spec(one, count)
        new = bind(state, batch, scalars, tall, chosen.for_spec(tall), one)
        new = tuple(x.reshape(shape) for x, shape in zip(new, shapes, strict=True))
    return new, [0] * len(new)


def _flatten_tables(arrays: Any) -> Any:
    """Makes the first two dimensions of each array one."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), arrays)


def _tall_spec(spec: UpdateSpec, count: int) -> UpdateSpec:
    return spec.replace(
        layout=spec.layout.with_rows(count * spec.layout.room),
        num_ids=count * spec.num_ids,
        num_grads=count * spec.num_grads,
    )


def _one_tall_table(
    state: State, batch: FlatBatch, spec: UpdateSpec
) -> tuple[State, FlatBatch]:
    """Makes one table and one batch of several, which `spec` tells of."""
    size, room = state[0].shape[0], spec.layout.room
    number = lax.broadcasted_iota(jnp.int32, batch.ids.shape, 0)
    sample_ids, order = batch.sample_ids, batch.order
    if sample_ids is not None:
        raised = sample_ids + number * spec.num_grads
        sample_ids = jnp.where(sample_ids < 0, -1, raised)
    if order is not None:
        order = order + number * spec.num_ids
    ids = jnp.where(batch.ids < spec.num_rows, batch.ids + number * room, size * room)
    tall = FlatBatch(ids, order, batch.grads, sample_ids, batch.gains)
    return _flatten_tables((state, tall))


def _spread_alike(
    *types: Any, structure: Any, spec: UpdateSpec, chosen: Choices, each: Any
) -> tuple[str, dict[str, int]]:
    """Says that the rows of all arrays of a state are spread alike; so are tables."""
    del spec, chosen
    state, batch, scalars = jax.tree.unflatten(structure, types)
    tables = [] if each is None else ["tables"]

    def factors(shared: list[str], name: str, x: Any) -> str:
        own = (f"{name}_{axis}" for axis in range(len(shared), x.ndim))
        return " ".join([*shared, *own])

    stored = [factors([*tables, "rows"], f"lane{i}", x) for i, x in enumerate(state)]
    shared = [
        factors(tables, f"batch{i}", x) for i, x in enumerate(jax.tree.leaves(batch))
    ]
    other = [
        factors([], f"scalar{i}", x) for i, x in enumerate(jax.tree.leaves(scalars))
    ]
    return f"{', '.join([*stored, *shared, *other])} -> {', '.join(stored)}", {}


def _cut(
    mesh: Any,
    specs: Sequence[PartitionSpec],
    *,
    structure: Any,
    spec: UpdateSpec,
    chosen: Choices,
    each: UpdateSpec | None,
) -> Cut:
    """Gives every device its rows of each array, and the whole batch."""
    tables = () if each is None else (specs[0][0],)
    state, batch, scalars = jax.tree.unflatten(structure, specs)
    rows = [PartitionSpec(*x[len(tables) :]) for x in state]
    check_alike(spec.array_names, [NamedSharding(mesh, x) for x in rows])
    shards = Shards.by(spec.array_names[0], mesh, rows[0])
    one = spec if each is None else each
    own = one.replace(layout=one.layout.divided(shards.count))
    update = functools.partial(
        _update_own, shards=shards, spec=own, chosen=chosen.for_part(own)
    )
    if each is not None:
        update = jax.vmap(update, (0, 0, None))

    def run(*arrays: jax.Array) -> State:
        return update(*jax.tree.unflatten(structure, arrays))

    stored = (PartitionSpec(*tables, *shards.rows),) * len(state)
    shared = (PartitionSpec(*tables),) * len(jax.tree.leaves(batch))
    others = (PartitionSpec(),) * len(jax.tree.leaves(scalars))
    return Cut(run, (*stored, *shared, *others), stored)


_update = late_primitive(
    "sparse_update",
    _run,
    _results,
    _over_tables,
    jvp=no_gradient(
        "an update of a table cannot be differentiated: differentiate the loss by the "
        "rows that were looked up, and pass that gradient to the update"
    ),
    over_devices=Partition(_spread_alike, _cut),
)
