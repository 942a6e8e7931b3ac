"""The contract under JAX: jit, scan, vmap, shard_map, and what is compiled."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from sparse_adam import AdamState, plan_update, reference, sparse_adam_update
from sparse_adam.ops import dispatch
from tests import cases, helpers, programs
from tests.cases import CASES, Case
from tests.helpers import assert_states_bitwise_equal

RATE = 0.01
DEFAULT = CASES[0]
MODES = {
    "lazy": {},
    "each_occurrence": {"use_gradient_accumulation": False},
    "not_lazy": {"lazy_adam": False},
}

each_implementation = pytest.mark.parametrize("implementation", dispatch.NAMES)
each_mode = pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())


def bind(implementation=None, **options):
    return functools.partial(
        sparse_adam_update, implementation=implementation, **options
    )


@each_implementation
def test_jit_with_ids_computed_on_device(implementation):
    state, ids, grads, _ = cases.arrays(DEFAULT)

    @jax.jit
    def update(state, words, grads):
        return bind(implementation)(*state, (words * 7 + 3) % 61 - 9, grads)

    new = update(state, ids, grads)
    expected = reference.sparse_adam_update(*state, (ids * 7 + 3) % 61 - 9, grads)
    helpers.assert_close_states(new, state, expected)


@each_implementation
def test_scan(implementation):
    batches = [cases.arrays(DEFAULT, seed) for seed in range(4)]
    state = batches[0].state
    ids = np.stack([b.ids for b in batches])
    grads = np.stack([b.grads for b in batches])
    rates = np.array([0.01, 0.02, 0.04, 0.08], np.float32)

    def step(state, batch):
        ids, grads, rate = batch
        state = bind(implementation)(*state, ids, grads, learning_rate=rate)
        return state, state

    last, states = lax.scan(
        step, AdamState(*map(jnp.asarray, state)), (ids, grads, rates)
    )
    for i, rate in enumerate(rates):
        new = [x[i] for x in states]
        expected = reference.sparse_adam_update(
            *state, ids[i], grads[i], learning_rate=rate
        )
        helpers.assert_close_states(new, state, expected, learning_rate=rate)
        state = helpers.as_float32(new)
    assert_states_bitwise_equal(last, state)


@each_implementation
@pytest.mark.parametrize(
    "shared", ["nothing", "ids_and_gradients", "gradients", "table"]
)
def test_vmap_over_tables(implementation, shared):
    # Padding and a run of equal ids at the end of one table and the start of the next.
    tables = [cases.arrays(DEFAULT, seed) for seed in range(3)]
    ids = np.stack([t.ids for t in tables])
    ids[0, :9], ids[1, 3:7], ids[2, :5] = 39, -1, 0
    state = [np.stack([t.state[i] for t in tables]) for i in range(3)]
    grads = np.stack([t.grads for t in tables])
    arguments = [*state, ids, grads]
    axes: list[int | None] = [0, 0, 0, 0, 0]
    for i in {
        "nothing": (),
        "ids_and_gradients": (3, 4),
        "gradients": (4,),
        "table": (0, 1, 2),
    }[shared]:
        arguments[i], axes[i] = arguments[i][0], None
    new = jax.vmap(bind(implementation), in_axes=tuple(axes))(*arguments)
    for i in range(3):
        own = [x if a is None else x[i] for x, a in zip(arguments, axes, strict=True)]
        expected = reference.sparse_adam_update(*own)
        helpers.assert_close_states([x[i] for x in new], own[:3], expected)


@each_implementation
def test_vmap_over_rates_and_gains(implementation):
    case = next(case for case in CASES if case.name == "weighted")
    state, ids, grads, weights = cases.arrays(case)
    rates = np.array([0.01, 0.1], np.float32)
    gains = np.stack([weights["gains"], -2 * weights["gains"]])

    def update(rate, gains):
        return bind(implementation)(
            *(*state, ids, grads),
            sample_ids=weights["sample_ids"],
            gains=gains,
            learning_rate=rate,
        )

    new = jax.vmap(update)(rates, gains)
    for i, rate in enumerate(rates):
        options = {"sample_ids": weights["sample_ids"], "gains": gains[i]}
        expected = reference.sparse_adam_update(
            *(*state, ids, grads), learning_rate=rate, **options
        )
        one = [x[i] for x in new]
        helpers.assert_close_states(one, state, expected, learning_rate=rate)


@each_implementation
def test_vmap_with_ids_and_sample_ids_of_none_in_any_table(implementation):
    """None stays none: it is no row, or sample, of the table before or behind."""
    tables = [cases.arrays(DEFAULT, seed) for seed in range(2)]
    state = [np.stack([t.state[i] for t in tables]) for i in range(3)]
    ids = np.array([[0, 1, -1, 39], [-1, 0, 5, 39]], np.int32)
    sample_ids = np.array([[0, 1, 2, 2], [0, -1, 2, 1]], np.int32)
    grads = np.stack([t.grads[:3] for t in tables])
    update = bind(implementation)

    def one(state, ids, grads, sample_ids):
        return update(*state, ids, grads, sample_ids=sample_ids)

    new = jax.vmap(one)(state, ids, grads, sample_ids)
    for i, table in enumerate(tables):
        kept = {"sample_ids": sample_ids[i]}
        expected = reference.sparse_adam_update(
            *(*table.state, ids[i], grads[i]), **kept
        )
        helpers.assert_close_states([x[i] for x in new], table.state, expected)


@each_implementation
def test_vmap_with_plans(implementation):
    tables = [cases.arrays(DEFAULT, seed) for seed in range(2)]
    state, ids, grads, _ = jax.tree.map(lambda *x: np.stack(x), *tables)

    def one(state, ids, grads):
        plan = plan_update(ids, DEFAULT.num_rows)
        return bind(implementation, plan=plan)(*state, ids, grads)

    new = jax.vmap(one)(state, ids, grads)
    for i, table in enumerate(tables):
        expected = reference.sparse_adam_update(*table.state, table.ids, table.grads)
        helpers.assert_close_states([x[i] for x in new], table.state, expected)


@each_mode
def test_vmap_of_each_mode(options):
    tables = [cases.arrays(Case("", 40, 8, 24), seed) for seed in range(2)]
    state = [np.stack([t.state[i] for t in tables]) for i in range(3)]
    ids, grads = np.stack([t.ids for t in tables]), np.stack([t.grads for t in tables])
    new = jax.vmap(bind(**options))(*state, ids, grads)
    for i, table in enumerate(tables):
        arguments = (*table.state, table.ids, table.grads)
        alone = reference.sparse_adam_update(*arguments, **options)
        steps = np.unique(table.ids, return_counts=True)[1].max()
        one = [x[i] for x in new]
        helpers.assert_close_states(one, table.state, alone, steps=steps)


@pytest.mark.parametrize(
    ("implementation", "options"),
    [
        *((name, {}) for name in (None, *dispatch.NAMES)),
        *((None, options) for options in MODES.values() if options),
    ],
)
def test_shard_map_over_row_shards(implementation, options):
    state, ids, grads, _ = cases.arrays(DEFAULT)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = PartitionSpec("rows"), PartitionSpec()

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(rows, rows, rows, everywhere, everywhere),
        out_specs=rows,
        # The interpreter of Pallas kernels does not know which values vary.
        check_vma=implementation in (None, "xla"),
    )
    def update(table, momenta, velocities, ids, grads):
        first = lax.axis_index("rows") * table.shape[0]
        # The ids of the other shard are out of range here, and so ignored.
        return bind(implementation, **options)(
            table, momenta, velocities, ids - first, grads
        )

    new = update(*state, ids, grads)
    expected = reference.sparse_adam_update(*state, ids, grads, **options)
    steps = np.unique(ids, return_counts=True)[1].max()
    helpers.assert_close_states(new, state, expected, steps=steps)


@each_implementation
def test_a_new_rate_compiles_nothing(implementation):
    state, ids, grads, _ = cases.arrays(DEFAULT)
    state = jax.device_put(state)
    update = bind(implementation)
    jitted = jax.jit(lambda rate: update(*state, ids, grads, learning_rate=rate))
    plan = plan_update(ids, DEFAULT.num_rows)

    def at_rates(rates):
        for rate in rates:
            update(*state, ids, grads, learning_rate=rate, plan=plan)
            jitted(rate)

    kinds = (0.1, np.float32(0.2), jnp.float32(0.3))
    with programs.compilations() as compiles:
        at_rates(kinds)
        seen = len(compiles)
        at_rates((0.5, np.float32(0.6), jnp.float32(0.7)))
    assert seen > 0
    assert len(compiles) == seen


def test_shapes_and_dtypes_without_running():
    state, ids, grads, _ = cases.arrays(Case("", 40, 16, 24, dtypes=cases.MIXED))
    new = jax.eval_shape(bind(), *state, ids, grads)
    assert isinstance(new, AdamState)
    for x, old in zip(new, state, strict=True):
        assert (x.shape, x.dtype) == (old.shape, old.dtype)


DIM = 128
NUM_IDS = 64


@functools.cache
def compiled(num_rows, mode):
    """The XLA path, compiled for tables that are donated."""
    table = jax.ShapeDtypeStruct((num_rows, DIM), jnp.float32)
    ids = jax.ShapeDtypeStruct((NUM_IDS,), jnp.int32)
    grads = jax.ShapeDtypeStruct((NUM_IDS, DIM), jnp.float32)
    update = jax.jit(bind("xla", **MODES[mode]), donate_argnums=(0, 1, 2))
    return programs.as_for_users(update.lower(table, table, table, ids, grads))


@pytest.mark.parametrize("mode", MODES)
def test_donated_tables_are_updated_in_place(mode):
    num_rows = 500_000
    memory = programs.memory(compiled(num_rows, mode))
    table = num_rows * DIM * 4
    assert memory.alias_size_in_bytes == 3 * table
    # A few blocks in the sweep of all rows, a few batches otherwise.
    assert memory.temp_size_in_bytes < table / 8


@pytest.mark.parametrize("mode", ["lazy", "each_occurrence"])
def test_lazy_work_does_not_grow_with_the_table(mode):
    small, large = (compiled(v, mode) for v in (1000, 500_000))
    assert programs.flops(small) == programs.flops(large)
    memory = [programs.memory(x).temp_size_in_bytes for x in (small, large)]
    assert memory[0] == memory[1]
    # Of the whole tables, the program makes nothing but the scatters in place.
    made = re.findall(r"= \w+\[500000,128\]\S* ([\w-]+)\(", programs.text(large))
    assert set(made) == {"parameter", "scatter", "fusion"}
    assert made.count("scatter") == made.count("fusion") == 3


@each_implementation
def test_donated_buffers_are_used_up(implementation):
    state, ids, grads, _ = cases.arrays(DEFAULT)
    update = jax.jit(bind(implementation), donate_argnums=(0, 1, 2))
    donated = jax.device_put(state)
    new = update(*donated, ids, grads)
    assert all(x.is_deleted() for x in donated)
    expected = reference.sparse_adam_update(*state, ids, grads)
    helpers.assert_close_states(new, state, expected)
