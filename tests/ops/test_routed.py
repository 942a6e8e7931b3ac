"""Batches that are spread as the rows are: each id travels to the owner of its row."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.routing import collectives
from sparse_adam import (
    AdamState,
    PackedTable,
    explain,
    lookup,
    packed_adam_update,
    sparse_adam_update,
    sparse_update,
)
from sparse_adam.ops.routed import Routed
from sparse_adam.ops.routing import default_quota
from sparse_adam.ops.shards import Shards
from sparse_adam.rules import RowWiseAdagradRule
from tests import helpers, programs
from tests.helpers import assert_bitwise_equal
from tests.ops.routing.machine import DEVICES, DISTRIBUTIONS, Machine, batch

V, D, N = 4096, 32, 96  # N ids on each device
ROWS = PartitionSpec("x")
# An owner of 512 rows receives up to 155 of them in a round.
MACHINE = Machine(V, N)

each_storage = pytest.mark.parametrize("storage", ["plain", "packed"])
each_batch = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


@functools.cache
def line() -> Any:
    return jax.make_mesh((DEVICES,), ("x",))


@functools.cache
def cube() -> Any:
    return jax.make_mesh((2, 2, 2), ("y", "x", "z"))


def spread(x: Any, spec: PartitionSpec = ROWS, mesh: Any = None) -> jax.Array:
    return jax.device_put(x, NamedSharding(mesh or line(), spec))


def spec(x: Any) -> PartitionSpec:
    return x.sharding.spec


def initial(num_rows: int = V) -> AdamState:
    rng = np.random.default_rng(0)
    table, momenta = rng.standard_normal((2, num_rows, D), np.float32)
    return AdamState(table, momenta, rng.uniform(size=table.shape).astype(np.float32))


def draw(distribution: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids and gradients for all devices; sums of these are exact in every order."""
    ids, _ = batch(MACHINE, distribution, seed)
    odd = 2 * np.random.default_rng(seed).integers(-32, 32, (*ids.shape, D)) + 1
    return ids, (odd / 16).astype(np.float32)


@functools.partial(jax.jit, donate_argnums=0)
def step(state: Any, ids: jax.Array, grads: jax.Array) -> Any:
    """A lookup, and an update by gradients that depend on it; also returns the rows."""
    table: Any = state if isinstance(state, PackedTable) else state.table
    rows = lookup(table, ids)
    grads = jnp.where(rows > 0, grads, -grads)
    if isinstance(state, PackedTable):
        return packed_adam_update(state, ids, grads), rows
    return update(state, ids, grads), rows


def update(state: Any, ids: Any, grads: Any, **options: Any) -> AdamState:
    table, momenta, velocities = state
    return sparse_adam_update(table, momenta, velocities, ids, grads, **options)


def stored(storage: str, place: Any = jnp.asarray) -> Any:
    state = AdamState(*(place(x) for x in initial()))
    return PackedTable.pack(*state) if storage == "packed" else state


def numbers(state: Any) -> AdamState:
    return AdamState(*state.unpack()) if isinstance(state, PackedTable) else state


@each_storage
@each_batch
def test_a_step_is_that_of_one_device(storage, distribution):
    ids, grads = draw(distribution)
    expected, expected_rows = step(stored(storage), ids, grads)
    new, rows = step(stored(storage, spread), spread(ids), spread(grads))
    assert_bitwise_equal(rows, expected_rows)
    helpers.assert_states_bitwise_equal(numbers(new), numbers(expected))
    assert spec(rows) == PartitionSpec("x", None)
    assert all(spec(x) == PartitionSpec("x", None) for x in jax.tree.leaves(new))


@each_storage
def test_rows_over_two_axes_and_replicas_along_a_third(storage):
    """Ids are spread by other dimensions, in another order, than the rows."""
    ids, grads = draw("zipf")
    expected, expected_rows = step(stored(storage), ids, grads)
    rows_spec, ids_spec = PartitionSpec(("y", "x")), PartitionSpec(None, "x", "y")
    state = stored(storage, lambda x: spread(x, rows_spec, cube()))
    ids, grads = ids.reshape(2, 4, -1), grads.reshape(2, 4, -1, D)
    placed = [spread(x, ids_spec, cube()) for x in (ids, grads)]
    new, rows = step(state, *placed)
    assert_bitwise_equal(np.asarray(rows).reshape(-1, D), expected_rows)
    assert spec(rows) == PartitionSpec(None, "x", "y", None)
    helpers.assert_states_bitwise_equal(numbers(new), numbers(expected))
    for x in jax.tree.leaves(new):
        assert spec(x) == PartitionSpec(("y", "x"), None)
        copies: dict[str, list[np.ndarray]] = {}
        for shard in x.addressable_shards:
            copies.setdefault(str(shard.index), []).append(np.asarray(shard.data))
        assert [len(each) for each in copies.values()] == [2] * 4
        for one, two in copies.values():
            assert_bitwise_equal(one, two)


@each_storage
def test_nothing_grows_with_the_table_or_the_number_of_devices(storage):
    """The state is updated in place; rows travel in buffers for one device's ids."""
    num_rows = 32 * V

    def placed(shape: Any, dtype: Any = jnp.float32) -> Any:
        place = NamedSharding(line(), ROWS)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    table = placed((num_rows, D))
    state: Any = AdamState(table, table, table)
    if storage == "packed":
        packed = jax.eval_shape(PackedTable.pack, *state)
        lines = placed(packed.lines.shape, jnp.int32)
        state = PackedTable(lines, packed.layout)
    arguments = placed((DEVICES * N,), jnp.int32), placed((DEVICES * N, D))
    compiled = programs.as_for_users(step.lower(state, *arguments))
    memory, own = programs.memory(compiled), 3 * 4 * num_rows * D // DEVICES
    assert memory.alias_size_in_bytes == own
    assert memory.temp_size_in_bytes < own // 3 // 4
    sent = list(collectives(programs.text(compiled)))
    assert {each.name for each in sent} == {"all-to-all", "all-reduce"}
    quota = default_quota(N, DEVICES)
    for each in sent:
        assert np.prod(each.shape) <= max(DEVICES * quota.part, quota.part * D)


@each_storage
def test_donated_rows_stay_where_they_are(storage):
    state = stored(storage, lambda x: spread(jnp.copy(x)))
    before = [x.addressable_shards[3].data for x in jax.tree.leaves(state)]
    pointers = [x.unsafe_buffer_pointer() for x in before]
    new, _ = step(state, *map(spread, draw("one owner")))
    after = [x.addressable_shards[3].data for x in jax.tree.leaves(new)]
    assert pointers == [x.unsafe_buffer_pointer() for x in after]


def test_sums_that_are_rounded():
    ids, grads = draw("zipf")
    grads = np.random.default_rng(1).standard_normal(grads.shape, np.float32)
    expected, _ = step(stored("plain"), ids, grads)
    new, _ = step(stored("plain", spread), spread(ids), spread(grads))
    for one, two in zip(new, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_gains_narrow_ids_and_gradients_that_are_not_spread():
    """The ids alone decide; what belongs to them follows."""
    ids, grads = draw("uniform")
    ids = (ids % 300 - 10).astype(np.int16)
    gains = np.random.default_rng(2).choice([-1.5, 0.5, 2], ids.shape)
    grads, gains = grads.astype(jnp.bfloat16), gains.astype(np.float32)
    state, options = initial(), {"gains": gains, "gradient_scale": 0.5}
    expected = update(state, ids, grads, **options)
    new = update(map(spread, state), spread(ids), grads, **options)
    helpers.assert_states_bitwise_equal(new, expected)


def test_a_slot_of_one_number_for_each_row():
    ids, grads = draw("zipf")
    table = initial().table
    state = jnp.asarray(table), jnp.ones(V)
    rule = RowWiseAdagradRule()

    expected = sparse_update(state, ids, grads, rule, learning_rate=0.1)
    placed = tuple(map(spread, state))
    new = sparse_update(placed, spread(ids), spread(grads), rule, learning_rate=0.1)
    for one, two in zip(new, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)
        assert spec(one)[0] == "x"


def test_devices_do_not_share_their_noise():
    """Row r of each device is stepped alike, and is rounded in another way."""
    zeros = np.zeros((64, D), jnp.bfloat16)
    state = map(spread, (zeros + 1, zeros, zeros))
    ids, grads = spread(np.arange(64)), spread(np.ones((64, D), np.float32))
    options: Any = {"rounding": "stochastic", "key": jax.random.key(0)}
    table = np.asarray(update(state, ids, grads, **options).table)
    own = {part.tobytes() for part in np.split(table, DEVICES)}
    assert len(own) == DEVICES


def test_a_loss_can_be_differentiated_by_a_plain_table():
    ids, cotangents = draw("zipf")

    def by_table(table: Any, ids: Any, cotangents: Any) -> jax.Array:
        _, back = jax.vjp(lambda table: lookup(table, ids), table)
        return back(cotangents)[0]

    expected = by_table(initial().table, ids, cotangents)
    found = by_table(*map(spread, (initial().table, ids, cotangents)))
    assert_bitwise_equal(found, expected)
    assert spec(found) == PartitionSpec("x", None)


@pytest.mark.parametrize(
    ("rows", "ids", "routed"),
    [
        (PartitionSpec("x"), PartitionSpec("x"), True),
        (PartitionSpec("x"), PartitionSpec(None, "x"), True),
        (PartitionSpec(("y", "x")), PartitionSpec("x", "y"), True),
        (PartitionSpec(("y", "x")), PartitionSpec(("x", "y")), True),
        (PartitionSpec("x"), PartitionSpec(), False),
        (PartitionSpec("x"), PartitionSpec("y"), False),
        (PartitionSpec("x"), PartitionSpec(("x", "y")), False),
        (PartitionSpec(("y", "x")), PartitionSpec("x"), False),
        (PartitionSpec(), PartitionSpec("x"), False),
        (PartitionSpec(), PartitionSpec(), False),
    ],
    ids=str,
)
def test_which_batches_are_routed(rows, ids, routed):
    shards = Shards.of("table", spread(np.zeros((8, 1)), rows, cube()))
    placed = spread(np.zeros((4, 4), np.int32), ids, cube())
    assert (Routed.of(shards, placed, 8) is not None) == routed


def test_explain_tells_how_a_batch_travels():
    state, (ids, grads) = initial(), draw("uniform")
    words = explain(*map(spread, state), spread(ids), spread(grads))
    assert words.endswith(
        "  the batch is routed: 96 ids on each of 8 devices (docs/routing.md)\n"
        "  route: one all-to-all of 3,136 bytes and one of 32 bytes\n"
        "  update: up to 155 summed gradients, 19,840 bytes, in a round\n"
        "  one round, if no device is asked for more than 155 rows, by one for 96\n"
        "  ragged-all-to-all on TPUs, all-to-all of equal parts elsewhere"
    )
    of_samples = {"sample_ids": ids, "lazy_adam": False}
    words = explain(*map(spread, state), spread(ids), spread(grads), **of_samples)
    assert "gradients of samples: one all-to-all of 3,136 bytes and one of 32" in words
    assert words.count("here, on cpu") == 1
    assert "routed" not in explain(*map(spread, state), ids, grads)


def test_arrays_of_other_meshes_and_of_numpy_are_not_routed():
    shards = Shards.of("table", spread(np.zeros((8, 1))))
    ids = np.zeros(8, np.int32)
    assert Routed.of(shards, spread(ids), 8) is not None
    assert Routed.of(shards, spread(ids, mesh=cube()), 8) is None
    assert Routed.of(shards, ids, 8) is None
    assert Routed.of(None, spread(ids), 8) is None
