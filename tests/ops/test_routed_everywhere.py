"""Batches that are routed on automatic axes, in a `jax.shard_map`, and by samples."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.routing import collectives
from sparse_adam import (
    AdamState,
    PackedTable,
    lookup,
    packed_adam_update,
    plan_update,
)
from sparse_adam.ops.routed import Routed
from sparse_adam.ops.routing import default_quota
from sparse_adam.ops.shards import Shards
from tests import helpers, programs
from tests.helpers import assert_bitwise_equal
from tests.ops.routing.machine import DEVICES
from tests.ops.test_routed import D, N, V, draw, initial, numbers, stored, update

ROWS = PartitionSpec(("x", "y"))
PLACES = 3  # ids of a sample

each_storage = pytest.mark.parametrize("storage", ["plain", "packed"])


@functools.cache
def mesh(way: str = "automatic") -> Mesh:
    kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


def spread(way: str, x: Any) -> jax.Array:
    return jax.device_put(x, NamedSharding(mesh(way), ROWS))


def run(way: str, function: Any, *arrays: Any) -> Any:
    """Calls `function(sharding, *arrays)` with arrays that are spread by their rows."""
    if way == "shard_map":
        own = functools.partial(function, ROWS)
        mapped = jax.shard_map(own, mesh=mesh(way), in_specs=ROWS, out_specs=ROWS)
        return jax.jit(mapped)(*arrays)
    told = NamedSharding(mesh(way), ROWS)
    return jax.jit(functools.partial(function, told))(*arrays)


def step(sharding: Any, state: Any, ids: Any, grads: Any) -> Any:
    """A lookup, and an update by gradients that depend on it; also returns the rows."""
    layout = state.layout if isinstance(state, PackedTable) else None
    if layout is not None and isinstance(sharding, PartitionSpec):
        state = PackedTable(state.lines, layout.divided(DEVICES))
    table: Any = state if isinstance(state, PackedTable) else state.table
    rows = lookup(table, ids, sharding=sharding)
    grads = jnp.where(rows > 0, grads, -grads)
    if layout is None:
        return update(state, ids, grads, sharding=sharding), rows
    new = packed_adam_update(state, ids, grads, sharding=sharding)
    return PackedTable(new.lines, layout), rows


@each_storage
@pytest.mark.parametrize("way", ["automatic", "shard_map"])
def test_a_step_is_that_of_one_device(storage, way):
    ids, grads = draw("zipf")
    expected, expected_rows = jax.jit(functools.partial(step, None))(
        stored(storage), ids, grads
    )
    state = stored(storage, functools.partial(spread, way))
    batch = (spread(way, x) for x in (ids, grads))
    new, rows = run(way, step, state, *batch)
    assert_bitwise_equal(rows, expected_rows)
    helpers.assert_states_bitwise_equal(numbers(new), numbers(expected))
    for x in jax.tree.leaves((new, rows)):
        assert {s.data.nbytes for s in x.addressable_shards} == {x.nbytes // DEVICES}


def test_a_batch_that_does_not_divide_and_has_two_dimensions():
    ids, grads = draw("uniform")
    ids, grads = ids[: 5 * 67].reshape(5, 67), grads[: 5 * 67].reshape(5, 67, D)
    expected, expected_rows = step(None, initial(), ids, grads)
    state = AdamState(*(spread("automatic", x) for x in initial()))
    new, rows = run("automatic", step, state, ids, grads)
    assert_bitwise_equal(rows, expected_rows)
    helpers.assert_states_bitwise_equal(new, expected)


def test_an_eager_call_sees_how_ids_are_spread():
    ids, grads = draw("zipf")
    expected = update(initial(), ids, grads)
    state = [spread("automatic", x) for x in initial()]
    placed = spread("automatic", ids)
    shards = Shards.of("table", state[0])
    assert shards is not None
    assert Routed.of(shards, placed, V) == Routed(shards, ROWS, V)
    assert Routed.of(shards, ids, V) is None
    new = update(state, placed, spread("automatic", grads))
    helpers.assert_states_bitwise_equal(new, expected)
    assert_bitwise_equal(
        lookup(state[0], placed), lookup(jnp.asarray(initial().table), ids)
    )


@pytest.mark.parametrize(
    ("way", "lazy"),
    [("automatic", False), ("explicit", True), ("shard_map", True)],
)
def test_samples_of_several_ids(way, lazy):
    """One that owns no id, ids of no sample, gains; every row is stepped, or some."""
    ids, grads = draw("zipf")
    rng = np.random.default_rng(1)
    own = N // PLACES + 1
    sample_ids = rng.integers(-1, own, ids.shape, np.int32)
    gains = rng.choice([-1.5, 0.5, 2], ids.shape).astype(np.float32)
    grads = grads[: own * DEVICES]
    device = np.arange(ids.size, dtype=np.int32) // N
    of_all = np.where(sample_ids < 0, -1, sample_ids + device * own)

    def advance(sharding, state, ids, grads, sample_ids, gains):
        return update(
            state,
            ids,
            grads,
            sample_ids=sample_ids,
            gains=gains,
            lazy_adam=lazy,
            sharding=sharding,
        )

    expected = advance(None, initial(), ids, grads, of_all, gains)
    given = sample_ids if way == "shard_map" else of_all
    arrays = (AdamState(*initial()), ids, grads, given, gains)
    placed = jax.tree.map(functools.partial(spread, way), arrays)
    new = run(way, advance, *placed)
    helpers.assert_states_bitwise_equal(new, expected)


@pytest.mark.parametrize("way", ["automatic", "shard_map"])
def test_a_loss_can_be_differentiated_by_a_plain_table(way):
    ids, cotangents = draw("zipf")

    def by_table(sharding: Any, table: Any, ids: Any, cotangents: Any) -> jax.Array:
        def look_up(table: Any) -> Any:
            return lookup(table, ids, sharding=sharding)

        return jax.vjp(look_up, table)[1](cotangents)[0]

    expected = by_table(None, initial().table, ids, cotangents)
    arrays = (spread(way, x) for x in (initial().table, ids, cotangents))
    assert_bitwise_equal(run(way, by_table, *arrays), expected)


@pytest.mark.parametrize("samples", [False, True], ids=["ids", "samples"])
def test_what_a_device_receives_does_not_grow_with_their_number(samples):
    """Each has 2048 ids; what a slice holds at most is all that grows, by its root."""
    num_ids = 2048

    def received(count: int) -> int:
        devices = Mesh(np.array(jax.devices()[:count]), ("x",))
        place = NamedSharding(devices, PartitionSpec("x"))

        def placed(shape: Any, dtype: Any = jnp.float32) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

        def advance(state: Any, ids: Any, grads: Any, **of_samples: Any) -> Any:
            rows = lookup(state[0], ids, sharding=place)
            return update(state, ids, grads, sharding=place, **of_samples), rows

        table = placed((1_000_000, D))
        ids = placed((count * num_ids,), jnp.int32)
        grads = placed((count * num_ids // (4 if samples else 1), D))
        given = {"sample_ids": ids} if samples else {}
        lowered = jax.jit(advance, donate_argnums=0).lower(
            AdamState(table, table, table), ids, grads, **given
        )
        compiled = programs.as_for_users(lowered)
        memory, own = programs.memory(compiled), 3 * 4 * 1_000_000 * D // count
        assert memory.alias_size_in_bytes == own
        sent = list(collectives(programs.text(compiled)))
        assert {each.name for each in sent} == {"all-to-all", "all-reduce"}
        part = default_quota(num_ids, count).part
        assert all(np.prod(x.shape) <= count * part * D for x in sent)
        return sum(4 * int(np.prod(x.shape)) for x in sent)

    assert received(8) < 1.5 * received(2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"plan": None}, "plan= needs the whole batch, but with sharding= within"),
        ({"use_gradient_accumulation": False}, "use_gradient_accumulation=False needs"),
    ],
)
def test_what_needs_the_whole_batch_is_refused_in_a_shard_map(options, words):
    ids, grads = draw("uniform")

    def advance(sharding: Any, state: Any, ids: Any, grads: Any) -> Any:
        given = {
            name: plan_update(ids, V // DEVICES) if x is None else x
            for name, x in options.items()
        }
        return update(state, ids, grads, sharding=sharding, **given)

    with pytest.raises(ValueError, match=words):
        run("shard_map", advance, initial(), ids, grads)
