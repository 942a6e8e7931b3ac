"""Tables whose rows are spread over automatic axes: those of `jax.sharding.Mesh`."""

import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sparse_adam import (
    AdamState,
    PackedTable,
    explain,
    lookup,
    packed_adam_update,
    plan_update,
    reference,
    sparse_adam_update,
    sparse_update,
)
from sparse_adam.ops import packing
from sparse_adam.rules import AdamRule
from tests import cases, helpers, programs, ways
from tests.cases import Case, State
from tests.helpers import assert_bitwise_equal, assert_states_bitwise_equal

ROWS, WHOLE = PartitionSpec("rows"), PartitionSpec()
V = 64  # packed rows of 32 lanes: two tables of four tiles
MOVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
NATIVE = [way for way in ways.LAZY if way.implementation in ("cpu", "xla")]
native = pytest.mark.parametrize("way", NATIVE, ids=str)


def devices():
    return np.array(jax.devices()[:2])


def spread(x, spec=ROWS, mesh=None):
    mesh = Mesh(devices(), ("rows",)) if mesh is None else mesh
    return jax.device_put(x, NamedSharding(mesh, spec))


def spread_state(state, spec=ROWS, mesh=None):
    return AdamState(*(spread(x, spec, mesh) for x in state))


def arrays(dim=128, distribution="padded", **fields):
    return cases.arrays(Case("", V, dim, 24, distribution, **fields))


def assert_halves(*found):
    for x in found:
        assert {s.data.nbytes for s in x.addressable_shards} == {x.nbytes // 2}


def sizes_sent(compiled):
    return re.findall(rf"= \w+\[([\d,]*)\]\S* (?:{MOVES})", compiled.as_text())


@pytest.mark.parametrize("batch", [WHOLE, ROWS], ids=["whole", "spread"])
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@native
def test_every_device_updates_its_rows(way, jitted, batch):
    state, ids, grads, _ = arrays(way.dim)
    expected = reference.sparse_adam_update(*state, ids, grads)
    update = jax.jit(lambda *x: way(*x)) if jitted else way
    new = update(*map(spread, state), spread(ids, batch), spread(grads, batch))
    helpers.assert_close_states(new, state, expected)
    assert_halves(*new)


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_donated_rows_stay_where_they_are(storage):
    """Ids and gradients are all that is sent, and no table is copied."""
    state, ids, grads, _ = arrays(32)
    placed = spread_state(map(jnp.copy, state))
    if storage == "packed":
        placed = PackedTable.pack(*placed)
    old = jax.tree.leaves(placed)
    pointers = [x.addressable_shards[1].data.unsafe_buffer_pointer() for x in old]

    def update(state: AdamState | PackedTable, ids, grads):
        if isinstance(state, PackedTable):
            return packed_adam_update(state, ids, grads)
        return sparse_adam_update(*state, ids, grads)

    batch = spread(ids), spread(grads)
    compiled = programs.as_for_users(
        jax.jit(update, donate_argnums=0).lower(placed, *batch)
    )
    assert set(sizes_sent(compiled)) == {"24", "24,32"}
    memory = programs.memory(compiled)
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in old) // 2
    new = compiled(placed, *batch)
    leaves = jax.tree.leaves(new)
    assert all(x.is_deleted() for x in old)
    assert pointers == [
        x.addressable_shards[1].data.unsafe_buffer_pointer() for x in leaves
    ]
    assert_halves(*leaves)
    new = new.unpack() if storage == "packed" else new
    expected = reference.sparse_adam_update(*state, ids, grads)
    helpers.assert_close_states(new, state, expected)


@native
def test_modes_and_a_plan(way):
    state, ids, grads, weights = arrays(way.dim, weighted=True)
    plan = plan_update(ids, V)
    for options in ({"lazy_adam": False}, {"use_gradient_accumulation": False}, {}):
        expected = reference.sparse_adam_update(
            *state, ids, grads, **options, **weights
        )
        plan = plan_update(ids, V)
        new = way(*map(spread, state), ids, grads, plan=plan, **options, **weights)
        steps = np.unique(ids, return_counts=True)[1].max()
        helpers.assert_close_states(new, state, expected, steps=steps)
        assert_halves(*new)


def test_in_a_scan_that_begins_with_new_slots():
    """The zeros say nothing of how they are spread; they follow the table."""
    state, ids, grads, _ = arrays()

    def train(table):
        def step(state: AdamState, _):
            return sparse_adam_update(*state, ids, grads), None

        zeros = jnp.zeros_like(state[0])
        return lax.scan(step, AdamState(table, zeros, zeros), None, length=3)[0]

    compiled = jax.jit(train).lower(spread(state[0])).compile()
    assert not sizes_sent(compiled)
    new = compiled(spread(state[0]))
    assert_halves(*new)
    old = (state[0], np.zeros_like(state[0]), np.zeros_like(state[0]))
    expected = old
    for _ in range(3):
        expected = reference.sparse_adam_update(*expected, ids, grads)
    helpers.assert_close_states(new, old, expected, steps=3)


@pytest.mark.parametrize("axes", [1, 2], ids=["vmap", "vmap of vmap"])
@pytest.mark.parametrize("spec", [0, -2], ids=["tables", "rows"])
@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_tables_under_vmap(storage, spec, axes):
    """Be it that each device has some tables, or some rows of each."""
    tables = [arrays(32, seed) for seed in ("padded", "zipf", "uniform", "wild")]
    lead = (4,) if axes == 1 else (2, 2)

    def stack(xs):
        xs = np.stack(xs)
        return xs.reshape(*lead, *xs.shape[1:])

    state = tuple(stack([t.state[i] for t in tables]) for i in range(3))
    ids = stack([np.clip(t.ids, -1, V).astype(np.int32) for t in tables])
    grads = stack([t.grads for t in tables])

    def update(state: State, ids, grads):
        if storage == "plain":
            return lookup(state[0], ids), *sparse_adam_update(*state, ids, grads)
        packed = PackedTable.pack(*state)
        found = packed.lookup(ids)
        return found, *packed_adam_update(packed, ids, grads).unpack()

    for _ in range(axes):
        update = jax.vmap(update)
    expected = jax.jit(update)(state, ids, grads)
    names: list[str | None] = [None] * (axes + 2)
    names[spec] = "rows"
    placed = tuple(spread(x, PartitionSpec(*names)) for x in state)
    compiled = jax.jit(update).lower(placed, ids, grads).compile()
    table = 4 * V * 32 if storage == "plain" else 4 * V * 128
    for size in sizes_sent(compiled):
        assert np.prod([int(n) for n in size.split(",") if n]) < table // 2
    found, *new = compiled(placed, ids, grads)
    assert_halves(*new)
    for one, two in zip((found, *new), expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


def test_packing_and_lookups(monkeypatch):
    monkeypatch.setattr(packing, "_BLOCK_WORDS", 8 * 32)
    state, ids, *_ = arrays(32)
    whole, packed = PackedTable.pack(*state), PackedTable.pack(*map(spread, state))
    assert_bitwise_equal(packed.lines, whole.lines)
    assert_halves(packed.lines, *packed.unpack())
    assert_states_bitwise_equal(packed.unpack(), state)
    for batch in (WHOLE, ROWS):
        compiled = jax.jit(PackedTable.lookup).lower(packed, spread(ids, batch))
        compiled = compiled.compile()
        assert set(sizes_sent(compiled)) <= {"24", "24,32"}
        found = compiled(packed, spread(ids, batch))
        assert_bitwise_equal(found, whole.lookup(ids))
        assert found.sharding.spec == batch
        assert_bitwise_equal(packed.lookup(spread(ids, batch)), found)
        rows = jax.jit(lookup).lower(spread(state[0]), spread(ids, batch)).compile()
        assert all(int(size.split(",")[0]) <= 24 for size in sizes_sent(rows))
        assert_bitwise_equal(rows(spread(state[0]), spread(ids, batch)), found)


@pytest.mark.parametrize("told", ["sharding", "spec"])
@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_told_by_an_argument(storage, told):
    """That takes `jax.shard_map`, on any platform: the compiler is asked nothing."""
    state, ids, grads, _ = arrays(32)
    placed = spread_state(map(jnp.copy, state))
    stored = PackedTable.pack(*placed) if storage == "packed" else placed
    own = placed.table.sharding
    assert isinstance(own, NamedSharding) and isinstance(own.mesh, Mesh)
    sharding = own if told == "sharding" else ROWS
    found = np.where((ids >= 0)[:, None], state[0][np.maximum(ids, 0)], 0)

    def step(stored, ids, grads):
        if storage == "packed":
            new = packed_adam_update(stored, ids, grads, sharding=sharding)
            return lookup(stored, ids, sharding=sharding), new
        new = sparse_update(
            stored, ids, grads, AdamRule(), learning_rate=1e-3, sharding=sharding
        )
        return lookup(stored.table, ids, sharding=sharding), AdamState(*new)

    with jax.set_mesh(own.mesh):
        lowered = jax.jit(step, donate_argnums=0).lower(stored, ids, grads)
        assert "CustomSPMDPartitioning" not in lowered.as_text()
        rows, new = lowered.compile()(stored, ids, grads)
    assert_bitwise_equal(rows, found)
    assert_halves(*jax.tree.leaves(new))
    new = new.unpack() if storage == "packed" else new
    expected = reference.sparse_adam_update(*state, ids, grads)
    helpers.assert_close_states(new, state, expected)


def test_what_is_told_must_be_a_sharding_of_a_mesh():
    state, ids, grads, _ = arrays()
    with pytest.raises(TypeError, match=r"sharding='rows' must be a .*NamedSharding"):
        sparse_adam_update(*state, ids, grads, sharding=cast(Any, "rows"))
    with pytest.raises(ValueError, match=r"sharding=P.* no mesh is in scope: pass"):
        sparse_adam_update(*state, ids, grads, sharding=ROWS)


def test_replicas_get_the_whole_batch():
    state, ids, grads, _ = arrays()
    expected = reference.sparse_adam_update(*state, ids, grads)
    placed = [spread(x, WHOLE) for x in state]
    new = jax.jit(sparse_adam_update)(*placed, spread(ids), spread(grads))
    for device in range(2):
        one = [np.asarray(x.addressable_shards[device].data) for x in new]
        helpers.assert_close_states(one, state, expected)


@pytest.mark.parametrize("rows", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_of_both_kinds_of_axes(rows):
    other = AxisType.Auto if rows == AxisType.Explicit else AxisType.Explicit
    mesh = jax.make_mesh((2, 1), ("rows", "other"), axis_types=(rows, other))
    state, ids, grads, _ = arrays()
    placed = spread_state(state, ROWS, mesh)
    for update in (sparse_adam_update, jax.jit(sparse_adam_update)):
        new = update(*placed, ids, grads)
        expected = reference.sparse_adam_update(*state, ids, grads)
        helpers.assert_close_states(new, state, expected)
        assert_halves(*new)


def test_devices_do_not_share_their_noise():
    """Not one of their rows: neither the same ones, nor the same in another order."""
    zeros = np.zeros((V, 128), jnp.bfloat16)
    state = spread_state((zeros + 1, zeros, zeros))
    ids, grads = np.arange(V, dtype=np.int32), np.ones((V, 128), np.float32)
    key = jax.random.key(0)
    options: Any = {"rounding": "stochastic", "key": key, "learning_rate": 1e-3}
    table = np.asarray(sparse_adam_update(*state, ids, grads, **options).table)
    assert len({row.tobytes() for row in table}) == V
    assert set(np.unique(table.astype(np.float32))) == {1 - 2**-8, 1}


def test_explain_tells_of_the_whole_table():
    state, ids, grads, _ = arrays()
    assert "N / V = 37.50%" in explain(*map(spread, state), ids, grads)


COLUMNS, OTHERS = PartitionSpec(None, "rows"), [ROWS, WHOLE, ROWS]


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([COLUMNS] * 3, r"table has the sharding .*: spread its rows, not its columns"),
        (OTHERS, r"momenta has the sharding .*, but table has .*: .* jax.device_put"),
    ],
)
def test_refused(specs, words, jitted):
    """Under `jit` the compiler says it, in an error of its own."""
    state, ids, grads, _ = arrays()
    placed = AdamState(*map(spread, state, specs))
    update = jax.jit(sparse_adam_update) if jitted else sparse_adam_update
    with pytest.raises(jax.errors.JaxRuntimeError if jitted else ValueError) as error:
        update(*placed, ids, grads)
    assert re.search(words, str(error.value))


def test_rows_that_do_not_make_equal_parts():
    state, ids, grads, _ = cases.arrays(Case("", 33, 128, 24, "padded"))
    mesh = Mesh(devices(), ("rows",))

    @jax.jit
    def update(*state):
        rows = NamedSharding(mesh, ROWS)
        state = (lax.with_sharding_constraint(x, rows) for x in state)
        return sparse_adam_update(*AdamState(*state), ids, grads)

    with pytest.raises(jax.errors.JaxRuntimeError, match="V must be a multiple of 2"):
        update(*state)


def test_a_shard_map_that_leaves_axes_automatic_is_refused():
    mesh = Mesh(devices().reshape(1, 2), ("data", "rows"))
    state, ids, grads, _ = arrays()
    update = jax.shard_map(
        sparse_adam_update,
        mesh=mesh,
        in_specs=WHOLE,
        out_specs=WHOLE,
        axis_names={"data"},
        check_vma=False,
    )
    with pytest.raises(ValueError, match=r"axes \['rows'\] of the mesh are automatic"):
        jax.jit(update)(*state, ids, grads)


def test_the_older_partitioner_is_refused():
    state, ids, grads, _ = arrays()
    placed = [spread(x) for x in state]
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        with pytest.raises(ValueError, match="jax_use_shardy_partitioner=False, and"):
            jax.jit(lambda *x: sparse_adam_update(*x))(*placed, ids, grads)
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)
