"""The SparseCore kernel on packed storage, on a CPU through the shim.

A row of it is moved by itself, in as many records as the layout has planes. So what is
tried here is rows that share lines, taken by different chunks and subcores.
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import PackedTable, plan_update
from sparse_adam.kernels import chips
from sparse_adam.kernels.layout import PackedLayout
from sparse_adam.kernels.sparsecore import Config, sparsecore_update, unsupported
from sparse_adam.kernels.sparsecore.config import unsupported_layout
from sparse_adam.kernels.spec import SortedBatch
from sparse_adam.ops import xla
from tests import cases, helpers
from tests.cases import BFLOAT16, FLOAT32, Arrays, Case
from tests.kernels import row_kernels
from tests.kernels.row_kernels import plainly

TWO = Config(cores=1, subcores=2, lanes=128, chunk=8, streams=1)
FIVE = Config(cores=1, subcores=5, lanes=128, chunk=16, streams=1)
BFLOAT16_SLOTS = ("float32", "bfloat16", "bfloat16", "float32")
BFLOAT16_TABLE = ("bfloat16", "float32", "float32", "float32")
SUMS = {"beta_2": 0.9}
STEPS = {"beta_2": 0.9, "use_gradient_accumulation": False}

each_mode = pytest.mark.parametrize("options", [SUMS, STEPS], ids=["sums", "steps"])


def check(run, case, ids=None, config: Config | None = FIVE):
    row_kernels.check_kernel(sparsecore_update, run, case, ids, config, packed=True)


def update(arrays, case, config=FIVE):
    return row_kernels.run_kernel(
        sparsecore_update, plainly, arrays, case, config, packed=True
    )[0]


# In the interpreter that models a TPU.


@each_mode
def test_neighbours_on_two_subcores(run_in_tpu_interpreter, options):
    # Sorted, the ids 0 to 7 and 8 to 15 of two groups stand in chunks of both workers.
    ids = [*range(3, 14), 6, 6, 15, 24, 24, 24, 24, 25, -1]
    case = Case("", 30, 16, len(ids), options=options)
    check(run_in_tpu_interpreter, case, ids[::-1], TWO)


@each_mode
def test_rows_of_two_blocks(run_in_tpu_interpreter, options):
    case = Case("", 9, 256, 20, "zipf", BFLOAT16_SLOTS, weighted=True, options=options)
    check(run_in_tpu_interpreter, case, config=TWO)


def test_vectors_of_a_subcore(run_in_tpu_interpreter):
    config = Config(cores=2, subcores=1, lanes=8, chunk=8, streams=1)
    check(run_in_tpu_interpreter, Case("", 9, 12, 9, dtypes=BFLOAT16), config=config)


# In the plain interpreter.


@pytest.mark.parametrize("dim", [16, 64])
def test_a_sample_of_none_in_narrow_rows_adds_zero(dim):
    # More chunks than slots: what an earlier one left in a buffer must not count.
    check(plainly, Case("", 40, dim, 80, "zipf", weighted=True), config=TWO)


@each_mode
@pytest.mark.parametrize("dim", [16, 64])
def test_every_row_of_some_groups_several_times(dim, options):
    # Groups 1 and 2 whole, each row some times, in an order of no kind; of the groups
    # beside them one row, and the last row of the table.
    rows = PackedLayout(1, dim).rows_per_group
    ids = np.repeat(np.arange(rows, 3 * rows), 80 // rows)
    ids = np.append(ids, [0, 0, 3 * rows, 4 * rows - 2])
    ids = np.random.default_rng(dim).permutation(ids)
    check(plainly, Case("", 4 * rows - 1, dim, ids.size, options=options), ids)


@pytest.mark.parametrize(
    ("dim", "dtypes", "options"),
    [
        (8, FLOAT32, SUMS),
        (16, BFLOAT16, STEPS),
        (30, BFLOAT16_SLOTS, SUMS),
        (64, BFLOAT16_TABLE, SUMS),
        (100, BFLOAT16_SLOTS, STEPS),
        (128, BFLOAT16, SUMS),
        (200, BFLOAT16_TABLE, STEPS),
        (256, FLOAT32, SUMS),
    ],
)
def test_widths_and_dtypes(dim, dtypes, options):
    case = Case("", 70, dim, 300, "zipf", dtypes, weighted=dim > 64, options=options)
    check(plainly, case)


@each_mode
def test_one_row(options):
    check(plainly, Case("", 1, 16, 20, "wild", options=options), config=None)


@pytest.mark.parametrize(
    ("options", "forms"),
    [
        (SUMS, {}),
        (STEPS, {}),
        (SUMS, {"filled_lists": True, "semaphores": 4}),
        (STEPS, {"aligned_lists": True}),
    ],
)
def test_hot_ids(options, forms):
    # The five workers have shares of 320 of them.
    runs = [319, 1, 1, 318, 1, 320, 640]
    ids = np.repeat(3 * np.arange(len(runs)), runs)
    np.random.default_rng(0).shuffle(ids)
    case = Case("", 3 * len(runs), 16, 1600, options=options)
    check(plainly, case, ids, dataclasses.replace(FIVE, **forms))


@each_mode
def test_nan_stays_in_its_row_and_lane(options):
    # Runs across chunks and subcores; the rows 9, 10 and 11 share lines.
    case = Case("", 40, 16, 300, dtypes=BFLOAT16, options=options)
    state, _, grads, _ = cases.arrays(case)
    ids = np.repeat(np.array([3, 9, 10, 11, 30], np.int32), [40, 100, 100, 50, 10])
    clean = update(Arrays(state, ids, grads, {}), case)
    grads = grads.copy()
    grads[155, 5] = np.nan
    dirty = update(Arrays(state, ids, grads, {}), case)
    for x, old in zip(dirty, clean, strict=True):
        x, old = np.asarray(x), np.array(old)
        assert np.isnan(x[10, 5].astype(np.float32))
        old[10, 5] = x[10, 5]
        helpers.assert_bitwise_equal(x, old)


@each_mode
def test_neighbours_keep_every_bit(options):
    # Signalling NaN, infinity, subnormal numbers, -0: in rows beside those updated.
    dtypes = ("float32", "bfloat16", "bfloat16", "float32")
    case = Case("", 40, 16, 12, dtypes=dtypes, options=options)
    layout = PackedLayout(40, 16, tuple(map(np.dtype, dtypes[:3])))
    rng = np.random.default_rng(0)
    words = rng.integers(-(2**31), 2**31, layout.shape, np.int64).astype(np.int32)
    words[::5] = 0x7F80 << 16 | 0x7F81
    ids = np.array([0, 2, 2, 9, 9, 9, 15, 24, 24, 39, 39, -1], np.int32)
    new = update_lines(words, cases.arrays(case)._replace(ids=ids), case)
    table = np.asarray(new).reshape(-1, layout.lines_per_group, 8, 16)
    changed = (table != words.reshape(table.shape)).any(axis=(1, 3)).reshape(-1)
    assert set(np.flatnonzero(changed)) == {0, 2, 9, 15, 24, 39}


def update_lines(lines, arrays, case, seeds=None, update=sparsecore_update, **config):
    """The lines of a table after an update."""
    problem = helpers.spec(case, arrays, packed=True)
    problem = helpers.changed(problem, stochastic=seeds is not None)
    plan = plan_update(arrays.ids, case.num_rows)
    batch = SortedBatch(jnp.asarray(arrays.grads), plan.ids, plan.order, None)
    if update is sparsecore_update:
        config["interpret"] = True
    run = jax.jit(functools.partial(update, spec=problem, **config))
    step = row_kernels.scalars(seeds)
    return run((jnp.asarray(lines),), batch, step)[0]


@pytest.mark.parametrize(
    ("dim", "dtypes", "options"),
    [
        (16, BFLOAT16, SUMS),
        (60, BFLOAT16_TABLE, STEPS),
        (200, BFLOAT16_SLOTS, SUMS),
        (256, BFLOAT16, STEPS),
    ],
)
def test_stochastic_rounding_is_that_of_the_portable_path(dim, dtypes, options):
    # With the same noise a float32 that differs in its last bit is rounded to another
    # bfloat16 once in 2**15 times or so; with other noise, half of them would be.
    case = Case("", 150, dim, 200, "zipf", (*dtypes[:3], "float32"), options=options)
    arrays = cases.arrays(case)
    packed = PackedTable.pack(*map(jnp.asarray, arrays.state))
    seeds = jnp.int32([1, -(2**31), 77])
    new = update_lines(packed.lines, arrays, case, seeds, config=FIVE)
    expected = update_lines(packed.lines, arrays, case, seeds, xla.xla_update)
    nearest = update_lines(packed.lines, arrays, case, update=xla.xla_update)
    touched = np.isin(np.arange(150), arrays.ids)
    results = (
        [np.asarray(x) for x in PackedTable(lines, packed.layout).unpack()]
        for lines in (new, expected, nearest)
    )
    for x, same, other, old in zip(*results, arrays.state, strict=True):
        if x.dtype != np.float32:
            assert (x != same)[touched].mean() < 1e-3
            assert (x != other)[touched].mean() > 0.1
        helpers.assert_bitwise_equal(x[~touched], old[~touched])


# What it cannot do.


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((40, 20), "D=20 stand 24 words apart, which does not divide"),
        ((40, 3), "D=3 stand 3 words apart, which does not divide"),
        ((40, 4), "D=4 stand 4 words apart, fewer than the 8 that"),
        ((2**25, 128), "16 GiB"),
    ],
)
def test_unsupported_sizes(shape, words):
    def problem(num_rows, dim):
        case = Case("", 40, 8, 8)
        small = helpers.spec(case, cases.arrays(case), packed=True)
        return helpers.changed(small, num_rows=num_rows, dim=dim)

    assert words in unsupported(problem(*shape))
    assert unsupported(problem(40, 8)) is unsupported(problem(40, 25)) is None
    assert unsupported(problem(2**25 // 3 - 8, 128)) is None


def test_records_narrower_than_a_granule(monkeypatch):
    """TPUs to come move 64 bytes at least."""
    info = SimpleNamespace(num_lanes=8, dma_granule_size_bytes=64)
    monkeypatch.setattr(chips, "in_scope", lambda: SimpleNamespace(sparse_core=info))
    reason = unsupported_layout(PackedLayout(40, 8), ())
    assert "D=8 stand 8 words apart, fewer than the 16 that" in str(reason)
    assert unsupported_layout(PackedLayout(40, 16), ()) is None
