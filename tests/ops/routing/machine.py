"""A training step over eight devices, and the same on one, to be compared.

The rule has a slot and a step that is not linear in the gradient, and counts the steps
of each row. Gradients are small whole numbers, so that their sums are exact in every
order, and results can be compared bit for bit.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from sparse_adam.ops import routing
from sparse_adam.ops.routing import Placement, exchange
from sparse_adam.ops.routing.rounds import Quota

DEVICES = 8
MESHES = {
    "one axis": ((8,), ("x",), ("x",)),
    "two axes": ((2, 4), ("y", "x"), ("y", "x")),
    "two axes, the other way": ((2, 4), ("y", "x"), ("x", "y")),
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """How a batch travels: where the rows are, on which mesh, by which exchange."""

    num_rows: int
    num_ids: int
    interleaved: bool = False
    mesh: str = "one axis"
    ragged: bool = False
    quota: Quota | None = None
    dim: int = 3  # up to 64, rows share the lines of a ragged exchange

    @property
    def placement(self):
        return Placement(self.num_rows, DEVICES, self.interleaved)


def rule(state, rows, grads):
    """Steps each of the distinct `rows` once; others are outside the table."""
    table, slot, count = state
    square = slot.at[rows].get(mode="clip") + grads * grads
    moved = table.at[rows].get(mode="clip") - grads / jnp.sqrt(square + 1)
    return (
        table.at[rows].set(moved, mode="drop"),
        slot.at[rows].set(square, mode="drop"),
        count.at[rows].add(1, mode="drop"),
    )


def local_update(state, rows, grads):
    return rule(state, *routing.sum_equal(rows, grads, state[0].shape[0]))


def gradients(rows, factors):
    """Whole numbers that depend on what was looked up, so the lookup matters."""
    return jnp.round(4 * jnp.sin(rows)) + factors[:, None]


@functools.cache
def one_device(num_rows):
    """The step on all ids, in the order of the devices."""

    def step(state, ids, factors):
        inside = (ids >= 0) & (ids < num_rows)
        found = state[0].at[ids].get(mode="clip")
        found = jnp.where(inside[:, None], found, 0)
        return local_update(state, ids, gradients(found, factors)), found

    return jax.jit(step)


@functools.cache
def many_devices(machine):
    """The same step on shards; also returns whether a second round was needed."""
    sizes, names, axes = MESHES[machine.mesh]
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))
    placement, spec = machine.placement, PartitionSpec(axes)

    def step(state, ids, factors):
        state = jax.tree.map(lambda x: x[0], state)
        route = routing.route(ids, placement, axes, quota=machine.quota)
        found = routing.lookup(route, lambda r: state[0].at[r].get(mode="clip"))
        state = routing.update(route, gradients(found, factors), state, local_update)
        return jax.tree.map(lambda x: x[None], state), found, route.first.more

    shape = (DEVICES * machine.num_ids,)
    stored = (DEVICES, placement.rows_per_shard, machine.dim)
    state = (
        jax.ShapeDtypeStruct(stored, jnp.float32),
        jax.ShapeDtypeStruct(stored, jnp.float32),
        jax.ShapeDtypeStruct(stored[:2], jnp.int32),
    )
    mapped = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.MonkeyPatch.context() as patch:
        if machine.ragged:
            patch.setattr(lax, "ragged_all_to_all", emulated_ragged_all_to_all)
            patch.setattr(exchange, "by_equal", without_longest)
        return (
            jax.jit(mapped)
            .lower(
                state,
                jax.ShapeDtypeStruct(shape, jnp.int32),
                jax.ShapeDtypeStruct(shape, jnp.float32),
            )
            .compile()
        )


def without_longest(window, rows, size, longest, axes):
    del longest
    return exchange.by_ragged(window, rows, size, axes)


def emulated_ragged_all_to_all(
    operand,
    output,
    *,
    input_offsets,
    send_sizes,
    output_offsets,
    recv_sizes,
    axis_name,
):
    """What a TPU does, for a CPU: garbage wherever nothing is written.

    All is garbage if a receiver expects another size than is sent, or if slices do not
    fit.
    """
    me = lax.axis_index(axis_name)
    sent = lax.all_gather(operand, axis_name)
    begin, size, to = (
        lax.all_gather(x, axis_name)[:, me]
        for x in (input_offsets, send_sizes, output_offsets)
    )
    garbage = jnp.full_like(output, jnp.nan)
    position = lax.iota(jnp.int32, operand.shape[0])
    result, end = garbage, output.shape[0]
    fine = jnp.all(size == recv_sizes) & jnp.all((to >= 0) & (to + size <= end))
    fine &= jnp.all((begin >= 0) & (begin + size <= operand.shape[0]))
    for sender in range(begin.size):
        moved = position - begin[sender]
        inside = (moved >= 0) & (moved < size[sender])
        where = jnp.where(inside, to[sender] + moved, end)
        result = result.at[where].set(sent[sender], mode="drop")
    return jnp.where(fine, result, garbage)


def initial(machine):
    """Table, slot and the count of steps of each row."""
    rng, shape = np.random.default_rng(0), (machine.num_rows, machine.dim)
    table = rng.normal(size=shape).astype(np.float32)
    slot = rng.uniform(size=shape).astype(np.float32)
    return table, slot, np.zeros(machine.num_rows, np.int32)


def batch(machine, distribution, seed):
    """Ids and factors of the gradients for all devices, one behind the other."""
    rng = np.random.default_rng(seed)
    num_rows, size = machine.num_rows, DEVICES * machine.num_ids
    owner = rng.integers(DEVICES)
    owned = np.arange(machine.placement.rows_per_shard)
    if machine.interleaved:
        owned = owned * DEVICES + owner
    else:
        owned = owned + owner * machine.placement.rows_per_shard
    uniform = rng.integers(0, num_rows, size)
    if distribution == "uniform":
        ids = uniform
    elif distribution == "zipf":
        ids = np.minimum(rng.zipf(1.2, size) - 1, num_rows - 1)
    elif distribution == "one owner":
        ids = rng.choice(owned, size)
    elif distribution == "one owner, sorted":  # a device's rows follow another's
        ids = np.sort(rng.choice(owned, size))
    elif distribution == "hot":
        ids = np.where(rng.random(size) < 0.5, num_rows // 2, uniform)
    elif distribution == "padded":
        strays = rng.choice([-1, -(2**31), num_rows, 2**31 - 1], size)
        ids = np.where(rng.random(size) < 0.9, strays, uniform)
    elif distribution == "empty devices":
        lines = uniform.reshape(DEVICES, -1)
        ids = np.where(rng.random((DEVICES, 1)) < 0.6, -1, lines).reshape(-1)
    else:
        ids = np.full(size, rng.choice([-1, num_rows // 3]))
    return ids.astype(np.int32), rng.integers(-3, 4, size).astype(np.float32)


DISTRIBUTIONS = (
    *("uniform", "zipf", "one owner", "one owner, sorted", "hot", "padded"),
    *("empty devices", "all the same"),
)
