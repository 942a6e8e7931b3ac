"""Packed tables: what they hold, and how they are looked up and passed around."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec

from sparse_adam import (
    PackedTable,
    explain,
    packed_adam_update,
    reference,
    sparse_adam_update,
)
from tests import cases, helpers, programs, ways
from tests.cases import Case
from tests.helpers import assert_bitwise_equal, assert_states_bitwise_equal
from tests.ways import Way, through_packed_table

DTYPES = (
    cases.FLOAT32,
    cases.BFLOAT16,
    cases.MIXED,
    ("float32", "bfloat16", "bfloat16", "float32"),
    ("bfloat16", "float32", "float32", "float32"),
)
DIMS = (1, 3, 16, 20, 64, 100, 128, 200, 4096)
PACKED = tuple(way for way in ways.LAZY if way.storage == "packed")
each_packed = pytest.mark.parametrize("way", PACKED, ids=str)


@pytest.mark.parametrize("num_rows", [1, 7, 40])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_pack_and_unpack(dim, dtypes, num_rows):
    state = cases.arrays(Case("", num_rows, dim, 1, dtypes=dtypes)).state
    packed = PackedTable.pack(*state)
    assert packed.lines.shape == packed.layout.shape
    assert (packed.num_rows, packed.dim) == (num_rows, dim)
    assert_states_bitwise_equal(packed.unpack(), state)


def test_pack_in_several_blocks():
    # A block is 2**20 words: 65,536 rows of 16 lanes.
    rng = np.random.default_rng(0)
    state = [rng.standard_normal((150_001, 16), np.float32) for _ in range(3)]
    assert_states_bitwise_equal(PackedTable.pack(*state).unpack(), state)


@pytest.mark.parametrize("dim", [16, 128])
def test_pack_and_unpack_take_no_table_on_the_way(dim):
    state = [jax.ShapeDtypeStruct((1_000_000, dim), jnp.float32)] * 3
    packed = jax.eval_shape(PackedTable.pack, *state)
    for f, arguments in ((PackedTable.pack, state), (PackedTable.unpack, [packed])):
        memory = programs.memory(programs.as_for_users(jax.jit(f).lower(*arguments)))
        assert memory.temp_size_in_bytes < 4 * 1_000_000 * dim // 8


def test_init():
    make = jax.nn.initializers.truncated_normal(0.5)
    key = jax.random.key(3)
    packed = PackedTable.init(key, 30, 12, make, dtype=jnp.bfloat16)
    table, momenta, velocities = packed.unpack()
    assert_bitwise_equal(table, make(key, (30, 12), jnp.bfloat16))
    for slot in (momenta, velocities):
        assert slot.dtype == jnp.float32
        assert not slot.any()


@hypothesis.given(
    st.sampled_from(DIMS),
    st.sampled_from(DTYPES),
    st.sampled_from(cases.DISTRIBUTIONS),
    st.integers(0, 2**32 - 1),
)
def test_lookup(dim, dtypes, distribution, seed):
    case = Case("", 40, dim, 24, distribution, dtypes)
    state, ids, _, _ = cases.arrays(case, seed)
    rows = PackedTable.pack(*state).lookup(ids.reshape(2, 3, 4))
    valid = (ids >= 0) & (ids < 40)
    expected = np.where(valid[:, None], state[0][np.where(valid, ids, 0)], 0)
    expected = expected.astype(state[0].dtype)
    assert_bitwise_equal(rows, expected.reshape(2, 3, 4, dim))


def test_a_step_of_training_differentiates_by_rows():
    state, ids, _, _ = cases.arrays(Case("", 40, 16, 24, "padded"))
    valid = (ids >= 0)[:, None]

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(packed, ids):
        loss, grads = jax.value_and_grad(lambda rows: (rows**2).sum())(
            packed.lookup(ids)
        )
        return loss, packed_adam_update(packed, ids, grads)

    loss, packed = train_step(PackedTable.pack(*state), ids)
    rows = np.where(valid, state[0][np.maximum(ids, 0)], 0)
    np.testing.assert_allclose(loss, (rows**2).sum(), rtol=1e-5)
    expected = reference.sparse_adam_update(*state, ids, 2 * rows)
    helpers.assert_close_states(packed.unpack(), state, expected)


def test_the_table_is_no_weight_to_differentiate_by():
    packed = PackedTable.pack(*[jnp.ones((4, 2))] * 3)
    with pytest.raises(TypeError, match="int32"):
        jax.grad(lambda packed: packed.lookup(jnp.array([1])).sum())(packed)
    # By anything else, a lookup is a constant.
    slope = jax.grad(lambda x: (x * packed.lookup(jnp.array([1, 7]))).sum())(2.0)
    assert slope == 2


@pytest.mark.parametrize(
    ("way", "dim", "dtypes"),
    [
        (way, dim, dtypes)
        for way in PACKED
        for dim in (3, 16, 20, 64, 100, 128, 200)
        for dtypes in DTYPES
        # The interpreted kernels have such tests of their own.
        if way.implementation in ("cpu", "xla") or (dim, dtypes) == (16, cases.MIXED)
    ],
    ids=str,
)
def test_neighbours_that_share_lines(way, dim, dtypes):
    # Every row of some groups, each several times; the rest of the lines untouched.
    case = Case("", 40, dim, 96, dtypes=dtypes)
    state, _, grads, _ = cases.arrays(case)
    ids = np.random.default_rng(0).permutation(np.resize(np.arange(4, 27), 96))
    ids[ids == 11] = 12
    new = way(*state, ids, grads, learning_rate=0.01)
    expected = reference.sparse_adam_update(
        *helpers.as_float32(state), ids, grads, learning_rate=0.01
    )
    helpers.assert_close_states(new, state, expected, learning_rate=0.01)
    touched = np.isin(np.arange(40), ids)
    for x, old in zip(new, state, strict=True):
        assert_bitwise_equal(np.asarray(x)[~touched], old[~touched])


@each_packed
def test_a_zero_gradient_is_an_update(way: Way):
    state, ids, grads, _ = way.arrays()
    ids[:3], grads[:3] = (8, 9, 8), [[1.0], [-0.0], [-1.0]]
    ids[3:][(ids[3:] >= 8) & (ids[3:] < 12)] = 20
    new = way(*state, ids, grads)
    expected = reference.sparse_adam_update(*state, ids, grads)
    helpers.assert_close_states(new, state, expected)
    assert (np.asarray(new.momenta)[8:10] != state[1][8:10]).all()
    assert_bitwise_equal(np.asarray(new.momenta)[10:12], state[1][10:12])


@each_packed
def test_scan(way):
    *state, ids, grads = way.inexact()
    rates = jnp.array([0.01, 0.02, 0.03])

    def step(packed, rate):
        return packed_adam_update(
            packed, ids, grads, learning_rate=rate, implementation=way.implementation
        ), None

    last, _ = lax.scan(step, PackedTable.pack(*state), rates)
    for rate in rates:
        state = way(*state, ids, grads, learning_rate=rate)
    helpers.assert_close_states(last.unpack(), state, helpers.as_float32(state))


@each_packed
def test_vmap_over_tables(way: Way):
    tables = [way.arrays(ids) for ids in ("uniform", "zipf", "padded")]
    packed = [PackedTable.pack(*t.state) for t in tables]
    packed = jax.tree.map(lambda *x: jnp.stack(x), *packed)
    ids, grads = np.stack([t.ids for t in tables]), np.stack([t.grads for t in tables])
    ids[0, :9], ids[1, 3:7], ids[2, :5] = 39, -1, 0
    update = functools.partial(packed_adam_update, implementation=way.implementation)
    new = jax.vmap(update)(packed, ids, grads)
    for i, table in enumerate(tables):
        one = jax.tree.map(lambda x, i=i: x[i], new)
        expected = reference.sparse_adam_update(*table.state, ids[i], grads[i])
        helpers.assert_close_states(one.unpack(), table.state, expected)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_shard_map_over_row_shards(implementation):
    state, ids, grads, _ = cases.arrays(Case("", 48, 16, 24))
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = PartitionSpec("rows"), PartitionSpec()

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(rows, rows, rows, everywhere, everywhere),
        out_specs=rows,
    )
    def update(table, momenta, velocities, ids, grads):
        first = lax.axis_index("rows") * table.shape[0]
        return through_packed_table(
            *(table, momenta, velocities, ids - first, grads),
            implementation=implementation,
        )

    new = update(*state, ids, grads)
    helpers.assert_close_states(
        new, state, reference.sparse_adam_update(*state, ids, grads)
    )


@pytest.mark.parametrize("options", [{}, {"lazy_adam": False}], ids=str)
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_a_donated_table_is_updated_in_place(implementation, options):
    table = jax.ShapeDtypeStruct((500_000, 32), jnp.float32)
    packed = jax.eval_shape(PackedTable.pack, table, table, table)
    update = functools.partial(
        packed_adam_update, implementation=implementation, **options
    )
    program = programs.as_for_users(
        jax.jit(update, donate_argnums=0).lower(
            packed,
            jax.ShapeDtypeStruct((100,), jnp.int32),
            jax.ShapeDtypeStruct((100, 32), jnp.float32),
        )
    )
    memory = programs.memory(program)
    assert memory.alias_size_in_bytes >= packed.layout.num_bytes
    assert memory.temp_size_in_bytes < packed.layout.num_bytes // 8


def test_explain():
    table = jax.ShapeDtypeStruct((1_000_000, 20), jnp.bfloat16)
    packed = jax.eval_shape(PackedTable.pack, table, table, table)
    ids = jax.ShapeDtypeStruct((4096,), jnp.int32)
    grads = jax.ShapeDtypeStruct((4096, 20), jnp.float32)
    assert "tpu: tensorcore, compiled" in explain(packed, ids, grads)
    assert "tpu: xla, compiled" in explain(
        packed=packed, ids=ids, grads=grads, implementation="xla"
    )


def test_errors():
    table = jnp.ones((4, 4097))
    with pytest.raises(ValueError, match=r"table.shape=\(4, 4097\): D must be at most"):
        PackedTable.pack(table, table, table)
    table = jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"slots\[0\].shape=\(4, 2\) must be \(V, D\)"):
        PackedTable.pack(table, table[:, :2], table)
    with pytest.raises(TypeError, match=r"slots\[1\].dtype=int32 must be float32"):
        PackedTable.pack(table, table, table.astype(jnp.int32))
    packed = PackedTable.pack(table, table, table)
    with pytest.raises(TypeError, match=r"ids.dtype=float32 must be an integer"):
        packed.lookup(jnp.ones(3))
    with pytest.raises(ValueError, match=r"grads.shape=\(3, 4\) must be ids.shape"):
        packed_adam_update(packed, jnp.zeros(3, jnp.int32), jnp.ones((3, 4)))
    wrong = PackedTable(packed.lines[:-1], packed.layout)
    with pytest.raises(ValueError, match=r"packed.lines.shape=.* must be \(24, 128\)"):
        packed_adam_update(wrong, jnp.zeros(3, jnp.int32), jnp.ones((3, 3)))
    with pytest.raises(ValueError, match=r"packed.lines.shape=.* must be \(24, 128\)"):
        wrong.lookup(jnp.zeros(3, jnp.int32))


def test_the_same_as_plain_storage():
    arrays = PACKED[-1].inexact()
    plain = sparse_adam_update(*arrays, implementation="xla")
    packed = through_packed_table(*arrays, implementation="xla")
    helpers.assert_close_states(packed, arrays[:3], helpers.as_float32(plain))
