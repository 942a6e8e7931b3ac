"""The TensorCore kernel on packed storage, in the plain interpreter.

Rows that share lines are one group to it. So what is tried here is groups of which the
batch touches some rows and not others, in chunks that part them in every way. A shape
takes seconds to compile, hence few of them, and many batches for each.
"""

import dataclasses
import functools

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_adam import PackedTable
from sparse_adam.kernels.tensorcore import tensorcore_update
from sparse_adam.kernels.tensorcore.config import Config
from sparse_adam.ops.xla import xla_update
from tests import cases, helpers
from tests.cases import BFLOAT16, Arrays, Case
from tests.kernels import row_kernels
from tests.kernels.row_kernels import plainly

V, N = 150, 40
SMALL = Config(rows_per_chunk=8, dma_unroll=1)
SUMS = {"beta_2": 0.9}
STEPS = {"beta_2": 0.9, "use_gradient_accumulation": False}
SLOTS = ("float32", "bfloat16", "bfloat16", "float32")
MIXED = ("bfloat16", "float32", "bfloat16", "bfloat16")
SHAPES = (
    Case("1 sums", V, 1, N, options=SUMS),
    Case("3 steps", V, 3, N, options=STEPS),
    Case("3 slots sums", V, 3, N, dtypes=SLOTS, options=SUMS),
    Case("16 sums", V, 16, N, options=SUMS),
    Case("16 bfloat16 steps", V, 16, N, dtypes=BFLOAT16, options=STEPS),
    Case("20 mixed sums", V, 20, N, dtypes=MIXED, options=SUMS),
    Case("64 slots steps", V, 64, N, dtypes=SLOTS, options=STEPS),
    Case("100 steps", V, 100, N, options=STEPS),
    Case("128 bfloat16 sums", V, 128, N, dtypes=BFLOAT16, options=SUMS),
    Case("200 mixed steps", V, 200, N, dtypes=MIXED, options=STEPS),
    Case("256 sums", V, 256, N, options=SUMS),
    Case("16 weighted sums", V, 16, N, weighted=True, options=SUMS),
    Case("20 weighted steps", V, 20, N, weighted=True, options=STEPS),
)
EIGHT_TO_A_GROUP = tuple(case for case in SHAPES if case.dim == 16)


def named(shapes):
    return pytest.mark.parametrize("case", shapes, ids=[case.name for case in shapes])


def check(case, ids, config: Config | None = SMALL):
    row_kernels.check_kernel(tensorcore_update, plainly, case, ids, config, packed=True)


def run(arrays, case, config=SMALL):
    return row_kernels.run_kernel(
        tensorcore_update, plainly, arrays, case, config, packed=True
    )[0]


def padded(ids):
    return [*ids, *[-1] * (N - len(ids))]


@named(SHAPES)
def test_any_batch(case):
    # Of a few rows that stand together, or of many, beginning anywhere.
    drawn = st.tuples(
        st.integers(0, V - 1),
        st.sampled_from([1, 2, 9, 50, V]),
        st.integers(0, N),
        st.randoms(use_true_random=False),
    )

    @hypothesis.settings(max_examples=15)
    @hypothesis.given(drawn)
    def check_batch(batch):
        first, span, count, random = batch
        rows = range(first, min(first + span, V))
        ids = [random.choice(rows) for _ in range(count)]
        check(case, padded(ids))

    check_batch()


@named(SHAPES)
def test_every_row_of_a_group_several_times(case):
    # And of the groups beside it the last row, and the first; 40 in all.
    rows = table(case).layout.rows_per_group
    ids = [rows - 1, *np.resize(np.arange(rows, 2 * rows), N - 3), 2 * rows, V - 1]
    check(case, np.random.default_rng(0).permutation(ids))


@named(EIGHT_TO_A_GROUP)
@pytest.mark.parametrize("first", range(9))
def test_chunks_part_a_group_anywhere(case, first):
    # Sorted: `first` rows of other groups; then ten occurrences of three rows of one
    # group, and more groups behind it.
    others = [8 * i + i % 8 for i in range(first)]
    check(case, padded([*others, *[80] * 4, *[82] * 5, 83, 88, 96]))


@named(EIGHT_TO_A_GROUP)
def test_a_group_that_fills_many_chunks(case):
    check(case, [9] * 3 + [10] * 2 + [12] * 31 + [15] * 2 + [16, 17])


@named(EIGHT_TO_A_GROUP[:2])
@pytest.mark.parametrize("size", [16, 64])
def test_larger_chunks(case, size):
    for first in (0, 5, 77):
        check(case, first + np.arange(N) // 3, Config(size, dma_unroll=3))


@named(
    (
        Case("one row", 1, 16, 20, "wild", options=SUMS),
        Case("one id", 9, 128, 1, options=STEPS),
        Case("two wide rows", 2, 200, 20, "wild", options=STEPS),
        Case("wide rows", 5, 1100, 9, "zipf", MIXED, options=SUMS),
    )
)
def test_chosen_config(case):
    check(case, None, None)


@named(EIGHT_TO_A_GROUP[:2])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_gradient_of_zero_updates_its_row_and_no_neighbour(case, zero):
    state, _, grads, weights = cases.arrays(case)
    ids = np.array(padded([8, 10, 10, 11, 17, 150, 8, 30, 31, 31]), np.int32)
    grads = np.full_like(grads, zero)
    grads[1:3] = [[1.0], [-1.0]]  # in sum they are zero too
    new = run(Arrays(state, ids, grads, weights), case)
    touched = np.isin(np.arange(V), ids)
    for x, old in zip(new, state, strict=True):
        x = np.asarray(x)
        assert (x != old)[touched].mean() > 0.5
        helpers.assert_bitwise_equal(x[~touched], old[~touched])


@named(EIGHT_TO_A_GROUP[:2])
def test_nan_stays_in_its_row_and_lane(case):
    # Two rows of a group in four chunks; the other rows of it are not in the batch.
    state, _, grads, weights = cases.arrays(case)
    ids = np.array(padded([3, 3, 3, 3] + [9] * 9 + [10] * 9 + [20, 21]), np.int32)
    clean = run(Arrays(state, ids, grads, weights), case)
    grads = grads.copy()
    grads[7, 5] = np.nan
    dirty = run(Arrays(state, ids, grads, weights), case)
    for x, old in zip(dirty, clean, strict=True):
        x, old = np.asarray(x), np.array(old)
        assert np.isnan(x[9, 5].astype(np.float32))
        old[9, 5] = x[9, 5]
        helpers.assert_bitwise_equal(x, old)


@named(EIGHT_TO_A_GROUP[:2])
def test_neighbours_keep_every_bit(case):
    # Also a signalling NaN, which reading it as a number and writing it would quieten.
    arrays = cases.arrays(case)
    ids = np.array(padded([0, 2, 2, 9, 9, 15, 24, 24, 149]), np.int32)
    arrays = arrays._replace(ids=ids)
    layout = table(case).layout
    words = np.random.default_rng(0).integers(-(2**31), 2**31, layout.shape)
    words = words.astype(np.int32)
    words[::3] = np.int32(0x7F817F81)
    (new,) = run_stored((jnp.asarray(words),), arrays, case, SMALL)
    new, old = (
        np.asarray(x).reshape(-1, layout.lines_per_group, 8, 16) for x in (new, words)
    )
    changed = (new != old).any(axis=(1, 3)).reshape(-1)
    assert set(np.flatnonzero(changed)) == {0, 2, 9, 15, 24, 149}


def table(case):
    return PackedTable.pack(*map(jnp.asarray, cases.arrays(case).state))


run_stored = functools.partial(
    row_kernels.run_stored, tensorcore_update, plainly, packed=True
)


@named([case for case in SHAPES if "bfloat16" in case.dtypes[:3]])
def test_stochastic_rounding_is_that_of_the_portable_path(case):
    # With the same noise, a float32 that differs in its last bit is rounded to another
    # bfloat16 once in 2**15 times or so. With other noise a third of them would be.
    case = dataclasses.replace(case, distribution="zipf")
    arrays = cases.arrays(case)
    packed, seeds = table(case), jnp.int32([1, -(2**31), 77])
    lines = (packed.lines,)
    new = run_stored(lines, arrays, case, SMALL, seeds=seeds)
    nearest = run_stored(lines, arrays, case, SMALL)
    expected = row_kernels.run_stored(
        xla_update, plainly, lines, arrays, case, packed=True, seeds=seeds
    )
    states = (
        map(np.asarray, PackedTable(lines, packed.layout).unpack())
        for (lines,) in (new, expected, nearest)
    )
    touched = np.isin(np.arange(V), arrays.ids)
    for x, right, other, old in zip(*states, arrays.state, strict=True):
        helpers.assert_bitwise_equal(x[~touched], old[~touched])
        if x.dtype != np.float32:
            assert (x != right).sum() <= 1
            assert (x != other)[touched].mean() > 0.1


def test_same_bits_twice_and_whatever_the_unroll():
    case = EIGHT_TO_A_GROUP[0]
    grads = np.random.default_rng(0).standard_normal((N, 16)).astype(np.float32)
    arrays = cases.arrays(dataclasses.replace(case, distribution="zipf"))
    arrays = arrays._replace(grads=grads)
    expected = run(arrays, case)
    for config in (SMALL, Config(rows_per_chunk=8, dma_unroll=3)):
        helpers.assert_states_bitwise_equal(run(arrays, case, config), expected)
