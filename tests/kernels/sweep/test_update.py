"""The sweep kernel's values, in the plain interpreter: both storages, every mode."""

import dataclasses
import functools
import math
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_adam import (
    AdamState,
    PackedTable,
    packed_adam_update,
    plan_update,
    sparse_adam_update,
)
from sparse_adam.kernels import chips, sweep
from sparse_adam.kernels.layout import PackedLayout
from sparse_adam.kernels.spec import SortedBatch
from sparse_adam.kernels.sweep import Config, sweep_update
from sparse_adam.ops import dispatch
from sparse_adam.ops.xla import xla_update
from tests import cases, helpers
from tests.cases import BFLOAT16, FLOAT32, MIXED, Case
from tests.kernels import row_kernels
from tests.kernels.row_kernels import RATE, plainly

# A block is 16 groups: rows of a plain table, rows that share lines of a packed one.
BLOCK = 16
SMALL = Config(groups_per_block=BLOCK, occurrences_per_chunk=16, unroll=1)
NOT_LAZY = {"lazy_adam": False}

# Five blocks, neither the last one full nor its last group; five chunks. Most tests use
# these two: what takes time is to compile another.
GROUPS, N = 4 * BLOCK + 5, 70
PLAIN = Case("plain", GROUPS, 128, N)
PACKED = Case("packed", 8 * GROUPS - 3, 16, N)

each_storage = pytest.mark.parametrize("case", [PLAIN, PACKED], ids=lambda c: c.name)


def is_packed(case):
    return case.dim % 128 != 0


def run(arrays, case, packed=None, config=SMALL):
    """The kernel's result, and the reference's."""
    packed = is_packed(case) if packed is None else packed
    return row_kernels.run_kernel(sweep_update, plainly, arrays, case, config, packed)


def check(case, ids=None, packed=None):
    packed = is_packed(case) if packed is None else packed
    if case.options.get("lazy_adam", True):
        row_kernels.check_kernel(sweep_update, plainly, case, ids, SMALL, packed)
    else:
        arrays = cases.arrays(case)
        new, expected = run(arrays, case, packed)
        helpers.assert_close_states(new, arrays.state, expected, learning_rate=RATE)


SWEPT = [c for c in cases.CASES if c.options.get("use_gradient_accumulation", True)]


@pytest.mark.parametrize("case", SWEPT, ids=lambda case: case.name)
def test_cases(case):
    check(case)


@pytest.mark.parametrize(
    ("dim", "dtypes", "options"),
    [
        (1, FLOAT32, {}),
        (3, BFLOAT16, NOT_LAZY),
        (64, FLOAT32, {}),
        (100, MIXED, {}),
        (128, BFLOAT16, NOT_LAZY),
        (256, MIXED, {}),
    ],
)
def test_packed_dims_and_dtypes(dim, dtypes, options):
    rows = (2 * BLOCK + 3) * PackedLayout(1, dim).rows_per_group - (dim <= 64)
    check(Case("", rows, dim, 40, "zipf", dtypes, options=options), packed=True)


@pytest.mark.parametrize(
    ("dim", "dtypes", "options"), [(128, BFLOAT16, {}), (256, MIXED, NOT_LAZY)]
)
def test_plain_bfloat16(dim, dtypes, options):
    check(Case("", 2 * BLOCK + 3, dim, 40, "zipf", dtypes, options=options))


PLACES = np.arange(N)
SPREAD = {
    "one block": 2 * BLOCK + PLACES % BLOCK,
    "first block": PLACES % BLOCK,
    "last block": 4 * BLOCK + PLACES % 5,
    "blocks between are empty": np.where(PLACES % 2, 1, GROUPS - 1),
    "edges of blocks": BLOCK * (PLACES % 5) - PLACES % 2,
    "runs across chunks": np.repeat(np.arange(7) * 11, 10),
    "one run": np.full(N, BLOCK),
    "every group": PLACES % GROUPS,
    "a chunk for a block": PLACES - 1,
    "none": np.full(N, GROUPS),
    "only the last": np.append(np.full(N - 1, -1), GROUPS - 1),
}


@pytest.mark.parametrize("spread", SPREAD)
@each_storage
def test_where_ids_fall(case, spread):
    ids = SPREAD[spread]
    if is_packed(case):
        ids = 8 * ids + PLACES % 5
    check(case, ids)


@hypothesis.given(ids=st.lists(st.integers(-1, 8 * GROUPS), min_size=N, max_size=N))
def test_any_ids(ids):
    check(PACKED, ids)


@each_storage
def test_no_ids(case):
    check(dataclasses.replace(case, num_ids=0, options=NOT_LAZY))


@each_storage
def test_no_gradient_counts(case):
    case = dataclasses.replace(case, weighted=True)
    arrays = cases.arrays(case)
    weights = arrays.weights | {"sample_ids": np.full(N, -1)}
    grads = np.full_like(arrays.grads, np.nan)
    new, expected = run(arrays._replace(grads=grads, weights=weights), case)
    helpers.assert_close_states(new, arrays.state, expected, learning_rate=RATE)
    moved = (np.asarray(new[1]) != arrays.state[1]).all(axis=1)
    assert (moved == np.isin(np.arange(case.num_rows), arrays.ids)).all()


@pytest.mark.parametrize("gradient", [0.0, -0.0])
@each_storage
def test_rows_with_gradients_of_zero_are_updated(case, gradient):
    arrays = cases.arrays(case)
    arrays = arrays._replace(grads=np.full_like(arrays.grads, gradient))
    new, expected = run(arrays, case)
    helpers.assert_close_states(new, arrays.state, expected, learning_rate=RATE)
    moved = (np.asarray(new[1]) != arrays.state[1]).all(axis=1)
    assert (moved == np.isin(np.arange(case.num_rows), arrays.ids)).all()


@each_storage
def test_nan_stays_in_its_row(case):
    arrays = cases.arrays(case)._replace(ids=PLACES // 2)
    clean, _ = run(arrays, case)
    grads = arrays.grads.copy()
    grads[11] = np.nan  # the second one of row 5
    dirty, _ = run(arrays._replace(grads=grads), case)
    others = np.arange(case.num_rows) != 5
    for x, old in zip(dirty, clean, strict=True):
        assert np.isnan(x[5]).all()
        helpers.assert_bitwise_equal(np.asarray(x)[others], np.asarray(old)[others])


@each_storage
def test_no_bit_depends_on_the_blocks(case):
    arrays = cases.arrays(case)
    first, again, larger = (
        run(arrays, case, config=config)[0]
        for config in (SMALL, SMALL, Config(64, 32, unroll=3))
    )
    helpers.assert_states_bitwise_equal(again, first)
    helpers.assert_states_bitwise_equal(larger, first)


def stored(case, state=None, stochastic=False):
    """The operands of a case as an implementation takes them."""
    arrays, packed = cases.arrays(case), is_packed(case)
    arrays = arrays._replace(state=state or arrays.state)
    problem = helpers.spec(case, arrays, packed)
    problem = helpers.changed(problem, stochastic=stochastic)
    state = tuple(map(jnp.asarray, arrays.state))
    if packed:
        state = (PackedTable.pack(*state).lines,)
    plan = plan_update(arrays.ids, case.num_rows)
    return (
        state,
        SortedBatch(jnp.asarray(arrays.grads), plan.ids, plan.order, None),
        problem,
    )


@each_storage
def test_untouched_rows_keep_even_the_bits_of_a_nan(case):
    arrays = cases.arrays(case)
    signalling = np.array(0x7F8100AB, np.uint32).view(np.float32)
    touched = np.isin(np.arange(case.num_rows), arrays.ids)
    state = tuple(np.where(touched[:, None], x, signalling) for x in arrays.state)
    stored_state, batch, problem = stored(case, state)
    update = row_kernels._jitted(sweep_update, problem, SMALL)
    new = update(stored_state, batch, row_kernels.scalars(None))
    if isinstance(problem.layout, PackedLayout):
        new = PackedTable(new[0], problem.layout).unpack()
    for x, old in zip(new, state, strict=True):
        helpers.assert_bitwise_equal(np.asarray(x)[~touched], old[~touched])


@pytest.mark.parametrize(
    ("dim", "dtypes", "options"),
    [(128, BFLOAT16, NOT_LAZY), (16, BFLOAT16, {}), (200, MIXED, {})],
)
def test_stochastic_rounding_is_that_of_the_portable_path(dim, dtypes, options):
    case = Case("", 150, dim, 50, "zipf", dtypes, options=options)
    state, batch, problem = stored(case, stochastic=True)

    def update(function, **config):
        function = functools.partial(function, spec=problem, **config)

        def values(seeds):
            step = row_kernels.scalars(jnp.array(seeds, jnp.int32))
            new = function(state, batch, step)
            if isinstance(problem.layout, PackedLayout):
                new = PackedTable(new[0], problem.layout).unpack()
            return tuple(x.astype(jnp.float32) for x in new)

        return jax.jit(values)

    portable = update(xla_update)
    swept, same, other = (
        update(sweep_update, config=SMALL, interpret=True)((1, 2, 3)),
        *(portable(seeds) for seeds in ((1, 2, 3), (4, 5, 6))),
    )
    for x, y, z, dtype in zip(swept, same, other, dtypes, strict=False):
        np.testing.assert_allclose(x, y, rtol=2.0**-7)
        if dtype == "bfloat16":
            # A last bit of float32 may differ, and so one in 2**16 or so of these.
            assert (x == y).mean() > 0.999
            assert (x == z).mean() < 0.98


@each_storage
def test_vmap_over_tables(case):
    # Some ids of the tables are padding, one table's all.
    state, batch, problem = stored(case)
    rows = case.num_rows
    ids = np.stack([cases.arrays(case, seed).ids for seed in range(4)])
    ids[0, 5:], ids[1], ids[3, :20] = -1, rows, -1

    def update(state, ids, plan=None) -> tuple[jax.Array, ...]:
        if isinstance(problem.layout, PackedLayout):
            table = PackedTable(state[0], problem.layout)
            new = packed_adam_update(table, ids, batch.grads, config=SMALL, plan=plan)
            return (new.lines,)
        state = AdamState(*state)
        return sparse_adam_update(*state, ids, batch.grads, config=SMALL, plan=plan)

    together = jax.jit(jax.vmap(update, in_axes=(None, 0)))(state, jnp.asarray(ids))
    # With plans the ids of the one tall table are grouped and not sorted.
    plans = [plan_update(x, rows) for x in ids]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *plans)
    planned = jax.jit(jax.vmap(update, in_axes=(None, 0, 0)))(
        state, jnp.asarray(ids), stacked
    )
    for t in range(4):
        alone = jax.jit(update)(state, jnp.asarray(ids[t]))
        for x, y, z in zip(together, planned, alone, strict=True):
            helpers.assert_bitwise_equal(x[t], z)
            helpers.assert_bitwise_equal(y[t], z)


def test_what_it_cannot_do():
    case = Case("", 40, 64, 8)
    problem = helpers.spec(case, cases.arrays(case))
    assert "D=64 is not a multiple of 128" in str(sweep.unsupported(problem))
    problem = helpers.changed(problem, packed=True)
    assert sweep.unsupported(problem) is None
    steps = helpers.changed(problem, accumulate=False)
    assert "use_gradient_accumulation=False" in str(sweep.unsupported(steps))
    wide = helpers.changed(problem, packed=False, dim=4096)
    assert sweep.unsupported(wide) is None
    assert Config.choose(wide).needed_bytes(wide) <= chips.UNKNOWN.vmem_bytes
    wider = helpers.changed(wide, dim=4224)
    assert "D=4224 is above 4096" in str(sweep.unsupported(wider))


def test_a_config_must_fit():
    _, _, problem = stored(PLAIN)
    large = Config(groups_per_block=2**14)
    words = r"needs .* bytes of VMEM of unknown, which has"
    with pytest.raises(ValueError, match=words):
        dispatch.choices(problem, None, large)
    wrong: dict[str, Any]
    for wrong in ({"groups_per_block": 8}, {"occurrences_per_chunk": 48}):
        with pytest.raises(ValueError, match="must be a power of two >= 16"):
            Config(**wrong)
    with pytest.raises(ValueError, match="unroll=17 must be 1 to 16"):
        Config(unroll=17)
    assert Config.choose(problem) == Config(128, 128)
    many = helpers.changed(problem, num_rows=10**6, num_ids=10**6)
    assert Config.choose(many) == Config(1024, 256)


def test_crossover(monkeypatch):
    problem = helpers.spec(PLAIN, cases.arrays(PLAIN))

    def share(chip, dim, packed, rows="tensorcore"):
        monkeypatch.setattr(chips, "in_scope", lambda: chip)
        changed = helpers.changed(problem, dim=dim, packed=packed)
        return sweep.crossover(changed, rows)

    plain = {chip.name: share(chip, 128, False) for chip in chips.CHIPS.values()}
    packed = {chip.name: share(chip, 128, True) for chip in chips.CHIPS.values()}
    assert plain == {"v4": 0.38, "v5e": 0.3, "v5p": 0.22, "v6e": 0.19, "7x": 0.1}
    fewer = {"v5e": 0.51, "v5p": 0.42, "v6e": 0.4, "7x": 0.38}
    assert packed == {"v4": math.inf, **fewer}
    v6e = chips.CHIPS["v6e"]
    # The fewer bytes a row has, the sooner to move all of them is faster than one DMA
    # for each.
    shares = [share(v6e, dim, True) for dim in (16, 32, 64, 128, 1024)]
    assert shares == sorted(shares)
    assert shares[-1] == math.inf
    assert share(v6e, 128, False, "sparsecore") == math.inf
    assert 0 < share(chips.UNKNOWN, 128, False) < 1
    with pytest.raises(ValueError, match="rows='cpu' must be"):
        share(v6e, 128, False, "cpu")
