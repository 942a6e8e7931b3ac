"""Tables whose rows are spread over devices: with explicit axes, and in `shard_map`."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparse_adam import (
    AdamState,
    PackedTable,
    explain,
    packed_adam_update,
    plan_update,
    reference,
    sparse_adam_update,
)
from sparse_adam import lookup as lookup_rows
from sparse_adam.embedding import (
    Adam,
    FeatureConfig,
    TableConfig,
    apply_gradients,
    init,
    lookup,
)
from sparse_adam.ops import packing, run
from sparse_adam.ops.run import FlatBatch
from sparse_adam.ops.shards import Shards
from tests import cases, helpers, programs, ways
from tests.cases import Case
from tests.helpers import assert_bitwise_equal, assert_states_bitwise_equal

ROWS, WHOLE = PartitionSpec("rows"), PartitionSpec()
# Packed rows of 32 lanes: two tables of four tiles.
V = 64
NATIVE = [way for way in ways.LAZY if way.implementation in ("cpu", "xla")]
native = pytest.mark.parametrize("way", NATIVE, ids=str)


def mesh(kind=AxisType.Explicit):
    return jax.make_mesh((2,), ("rows",), axis_types=(kind,))


def spread(x, spec=ROWS):
    return jax.device_put(x, NamedSharding(mesh(), spec))


def spec(x: Any) -> PartitionSpec:
    return x.sharding.spec


def call(way, distribution="wild", **fields):
    return cases.arrays(Case("", V, way.dim, 24, distribution, **fields))


@pytest.mark.parametrize("batch", [WHOLE, ROWS], ids=["whole", "spread"])
@pytest.mark.parametrize("way", ways.LAZY, ids=str)
def test_every_device_updates_its_rows(way, batch):
    """Ids are 64-bit NumPy ones where the batch is whole: strays stay strays."""
    state, ids, grads, _ = call(way)
    expected = reference.sparse_adam_update(*state, ids, grads)
    spread_state = [spread(x) for x in state]
    if batch == ROWS:
        inside = np.where((ids >= 0) & (ids < V), ids, -1).astype(np.int32)
        ids, grads = spread(inside), spread(grads)
    new = way(*spread_state, ids, grads)
    steps = np.unique(ids, return_counts=True)[1].max()
    helpers.assert_close_states(new, state, expected, steps=steps)
    assert all(spec(x) == PartitionSpec("rows", None) for x in new)


@native
def test_modes(way):
    state, ids, grads, weights = call(way, "padded", weighted=True)
    for options in ({"lazy_adam": False}, {"use_gradient_accumulation": False}):
        options |= weights
        expected = reference.sparse_adam_update(*state, ids, grads, **options)
        new = way(*map(spread, state), ids, grads, **options)
        steps = np.unique(ids, return_counts=True)[1].max()
        helpers.assert_close_states(new, state, expected, steps=steps)


@native
def test_a_plan_is_of_the_whole_table(way):
    state, ids, grads, weights = call(way, "zipf", weighted=True)
    plan = plan_update(ids, V)
    new = way(*map(spread, state), ids, grads, plan=plan, **weights)
    expected = reference.sparse_adam_update(*state, ids, grads, **weights)
    helpers.assert_close_states(new, state, expected)


@pytest.mark.parametrize("planned", [False, True])
def test_what_a_device_sees_of_a_batch(planned):
    """Its own ids and V for the others'; what was sorted still is."""
    plan = plan_update(np.array([40, 3, V, 33, 3, 40], np.int32), V)
    ids, order = (plan.ids, plan.order) if planned else (jnp.array([40, V, 3]), None)
    batch = FlatBatch(ids, order, jnp.ones((6, 8)), None, None)
    shards = Shards.by("table", mesh(), ROWS)
    own = functools.partial(run._own, shards=shards, num_rows=V // 2)
    seen = jax.shard_map(own, mesh=mesh(), in_specs=WHOLE, out_specs=ROWS)(batch)
    if planned:
        own_ids = [[3, 3, 32, 32, 32, 32], [1, 8, 8, 32, 32, 32]]
        assert np.asarray(seen.order).reshape(2, 6)[:, :2].tolist() == [[1, 4], [3, 0]]
    else:
        own_ids = [[32, 32, 3], [8, 32, 32]]
    assert np.asarray(seen.ids).reshape(2, -1).tolist() == own_ids


@native
def test_untouched_rows_and_repeated_calls(way):
    state, ids, grads, _ = call(way, "distinct")
    new = way(*map(spread, state), ids, grads)
    again = jax.jit(lambda *x: way(*x))(*map(spread, state), ids, grads)
    untouched = np.setdiff1d(np.arange(V), ids)
    for old, one, two in zip(state, new, again, strict=True):
        assert_bitwise_equal(np.asarray(one)[untouched], old[untouched])
        np.testing.assert_allclose(np.asarray(one), np.asarray(two), rtol=1e-6)


def test_arrays_from_before_the_mesh_was_set():
    state, ids, grads, _ = cases.arrays(Case("", V, 128, 24, "zipf"))
    before = tuple(map(jnp.asarray, state))
    expected = state
    for _ in range(2):
        expected = reference.sparse_adam_update(*expected, ids, grads)
    for way in ways.LAZY[:3]:
        with jax.set_mesh(mesh()):
            new = jax.jit(lambda *x, way=way: way(*x))(*before, ids, grads)
            new = way(*new, ids, grads)
        helpers.assert_close_states(new, state, expected, steps=2)


def test_in_a_scan_and_donated():
    state, ids, grads, _ = cases.arrays(Case("", V, 128, 24, "zipf"))

    def steps(state):
        def step(state: AdamState, _):
            return sparse_adam_update(*state, ids, grads), None

        return lax.scan(step, AdamState(*state), None, length=3)[0]

    placed = [spread(jnp.copy(x)) for x in state]
    pointers = [x.addressable_shards[1].data.unsafe_buffer_pointer() for x in placed]
    compiled = jax.jit(steps, donate_argnums=0).lower(placed).compile()
    new = compiled(placed)
    expected = state
    for _ in range(3):
        expected = reference.sparse_adam_update(*expected, ids, grads)
    helpers.assert_close_states(new, state, expected, steps=3)
    assert pointers == [
        x.addressable_shards[1].data.unsafe_buffer_pointer() for x in new
    ]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_only_the_batch_is_sent(packed):
    """A step for each occurrence needs all of it, so it is not routed."""
    state, ids, grads, _ = cases.arrays(Case("", 4096, 128, 24))

    def update(state: AdamState, ids, grads):
        options: Any = {"use_gradient_accumulation": False}
        if not packed:
            return sparse_adam_update(*state, ids, grads, **options)
        return packed_adam_update(PackedTable.pack(*state), ids, grads, **options)

    placed = AdamState(*map(spread, state))
    arguments = placed, spread(jnp.asarray(ids)), spread(grads)
    text = programs.text(programs.as_for_users(jax.jit(update).lower(*arguments)))
    moves = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    sent = re.findall(rf"= \w+\[([\d,]*)\]\S* (?:{moves})", text)
    assert sorted(sent) == ["24", "24,128"]


def test_devices_do_not_share_their_noise():
    zeros = np.zeros((V, 128), jnp.bfloat16)
    state = AdamState(*map(spread, (zeros + 1, zeros, zeros)))
    ids, grads = np.arange(V), np.ones((V, 128), np.float32)

    def tables(key):
        options: Any = {"rounding": "stochastic", "key": key, "learning_rate": 1e-3}
        return np.asarray(sparse_adam_update(*state, ids, grads, **options).table)

    new = tables(jax.random.key(0))
    first, second = np.split(new, 2)
    assert (first != second).mean() > 0.1
    # Nor is it the same noise in another order of rows, or of lanes.
    assert len({row.tobytes() for row in new}) == V
    assert len({row.tobytes() for x in (first, second) for row in x.T}) == 2 * 128
    assert not np.array_equal(np.sort(first, None), np.sort(second, None))
    assert_bitwise_equal(tables(jax.random.key(0)), new)
    mean = new.astype(np.float32).mean()
    assert abs(mean - (1 - 3.1623e-3)) < 5 * 2**-8 / np.sqrt(12 * new.size)


def test_packing_and_lookups():
    state, ids, *_ = cases.arrays(Case("", V, 32, 24, "wild"))
    whole, packed = PackedTable.pack(*state), PackedTable.pack(*map(spread, state))
    assert_bitwise_equal(packed.lines, whole.lines)
    assert spec(packed.lines) == PartitionSpec("rows", None)
    assert_states_bitwise_equal(packed.unpack(), state)
    assert_bitwise_equal(packed.lookup(ids), whole.lookup(ids))
    inside = np.where((ids >= 0) & (ids < V), ids, -1).astype(np.int32).reshape(4, 6)
    found = packed.lookup(spread(inside))
    assert_bitwise_equal(found, whole.lookup(inside))
    assert spec(found) == PartitionSpec("rows", None, None)


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_lookups_of_the_first_and_the_last_row_of_each_device(storage):
    weights = np.arange(1, V * 32 + 1, dtype=np.float32).reshape(V, 32)
    table: Any = spread(weights)
    if storage == "packed":
        table = PackedTable.pack(*[table] * 3)
    ids = np.array([0, V // 2 - 1, V // 2, V - 1, -1, V, 0], np.int32)
    expected = np.where((ids >= 0) & (ids < V), 1, 0)[:, None] * weights[ids % V]
    assert_bitwise_equal(lookup_rows(table, ids), expected.astype(np.float32))


def test_a_second_call_compiles_nothing():
    state, ids, grads, _ = cases.arrays(Case("", V, 32, 24))
    arrays = [spread(x) for x in state]

    def cycle():
        table = packed_adam_update(PackedTable.pack(*arrays), ids, grads)
        return jax.block_until_ready((table.lookup(ids), table.unpack()))

    jax.clear_caches()
    with programs.compilations() as compiled:
        cycle()
        seen = len(compiled)
        cycle()
    assert len(compiled) == seen > 0


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_the_embedding_api_takes_a_spread_state(storage):
    item = TableConfig(V, 32, name="item", combiner="mean")
    state = init(FeatureConfig(item), Adam(0.1), jax.random.key(0), storage=storage)
    ids = jnp.array([[3, 60, -1], [5, 3, 3]])

    def step(state):
        activations = lookup(state, ids)
        return apply_gradients(state, ids, activations), activations

    expected, activations = jax.jit(step)(state)
    new, found = jax.jit(step)(spread(state))
    np.testing.assert_allclose(found, activations, rtol=1e-6)
    for one, two in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(two), atol=1e-6)
        assert spec(one) == PartitionSpec("rows", None)


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_explain_tells_what_one_device_does(storage):
    state, ids, grads, _ = cases.arrays(
        Case("", V, 128 if storage == "plain" else 64, 4)
    )
    own = [x[: V // 2] for x in state]
    stored, one = list(map(spread, state)), own
    if storage == "packed":
        stored, one = [PackedTable.pack(*stored)], [PackedTable.pack(*own)]
    words = explain(*stored, ids, grads)
    assert words == explain(*one, ids, grads) and "N / V = 12.50%" in words


def test_refused():
    state, ids, grads, _ = cases.arrays(Case("", V, 128, 24))
    columns = AdamState(*(spread(x, PartitionSpec(None, "rows")) for x in state))
    with pytest.raises(ValueError, match=r"table has the sharding .* spread its rows"):
        sparse_adam_update(*columns, ids, grads)
    few = [spread(np.ones((34, 32), np.float32)) for _ in range(3)]
    with pytest.raises(ValueError, match=r"V=34 .* V must be a multiple of 64"):
        PackedTable.pack(*few)


@native
def test_results_vary_where_ids_do(way):
    """Replicas that are given different ids in a `shard_map` are none any more."""
    state, ids, grads, _ = call(way, "uniform")

    def sharded(out_specs):
        return jax.shard_map(
            lambda state, ids, grads: way(*state, ids, grads),
            mesh=mesh(AxisType.Auto),
            in_specs=(WHOLE, ROWS, ROWS),
            out_specs=out_specs,
        )

    with pytest.raises(ValueError, match="require replication"):
        sharded(WHOLE)(state, ids, grads)
    new = sharded(ROWS)(state, ids, grads)
    for device in range(2):
        own = [np.split(x, 2)[device] for x in (ids, grads)]
        one = [np.split(np.asarray(x), 2)[device] for x in new]
        expected = reference.sparse_adam_update(*state, *own)
        helpers.assert_close_states(one, state, expected)


def test_packed_tables_in_a_shard_map(monkeypatch):
    """Each device packs, looks up and updates a table of its own, block by block."""
    monkeypatch.setattr(packing, "_BLOCK_WORDS", 8 * 32)
    state, ids, grads, _ = cases.arrays(Case("", V, 32, 24, "padded"))

    def update(state, ids, grads):
        table = PackedTable.pack(*state)
        mine = ids - lax.axis_index("rows") * table.num_rows
        found = lax.psum(table.lookup(mine), "rows")
        table = packed_adam_update(table, mine, grads)
        return AdamState(*table.unpack()), found

    new, found = jax.jit(
        jax.shard_map(
            update,
            mesh=mesh(AxisType.Auto),
            in_specs=(ROWS, WHOLE, WHOLE),
            out_specs=(ROWS, WHOLE),
        )
    )(state, ids, grads)
    expected = reference.sparse_adam_update(*state, ids, grads)
    helpers.assert_close_states(new, state, expected)
    rows = np.where((ids >= 0)[:, None], state[0][np.maximum(ids, 0)], 0)
    np.testing.assert_array_equal(found, rows)
