"""The contract, for every implementation: what an update returns, value by value."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import plan_update, reference, sparse_adam_update
from tests import cases, goldens, helpers, strategies, ways
from tests.cases import CASES, Case
from tests.helpers import assert_bitwise_equal, assert_states_bitwise_equal
from tests.ways import Way, each_way

RATE = 0.01
# Packed storage changes nothing but where rows stand, as these show.
FEW_CASES = ("packed-tensorcore",)
FEW = ("default", "zipf", "wild", "weighted", "narrow", "mixed", "each_occurrence")


def assert_matches_reference(way, case, seed=0, updates=3):
    """Several updates in a row, each one compared from the state it started with."""
    state = cases.arrays(case, seed).state
    for i in range(updates):
        _, ids, grads, weights = cases.arrays(case, seed + i)
        options = {"learning_rate": RATE, **case.options, **weights}
        new = way(*state, ids, grads, **options)
        expected = reference.sparse_adam_update(
            *helpers.as_float32(state), ids, grads, **options
        )
        each = not case.options.get("use_gradient_accumulation", True)
        helpers.assert_close_states(
            new,
            state,
            expected,
            learning_rate=RATE,
            beta_2=case.options.get("beta_2", 0.999),
            steps=np.unique(ids, return_counts=True)[1].max() if each else 1,
        )
        if case.options.get("lazy_adam", True):
            touched = np.isin(np.arange(case.num_rows), ids)
            for x, old in zip(new, state, strict=True):
                assert_bitwise_equal(np.asarray(x)[~touched], np.asarray(old)[~touched])
        state = new


@pytest.mark.parametrize(
    ("way", "case"),
    [
        pytest.param(way, case, id=f"{way}-{case.name}")
        for way in ways.CONTRACT
        for case in CASES
        if way.supports(case) and (str(way) not in FEW_CASES or case.name in FEW)
    ],
)
def test_case(way, case):
    assert_matches_reference(way, case)


@each_way
def test_any_case(way):
    @hypothesis.settings(max_examples=ways.examples(way))
    @hypothesis.given(strategies.supported_cases(way), strategies.SEEDS)
    def check(case, seed):
        assert_matches_reference(way, case, seed)

    check()


@pytest.mark.parametrize("golden", goldens.ALL, ids=lambda golden: golden.name)
def test_golden(golden):
    golden.check(sparse_adam_update)


@each_way
@pytest.mark.parametrize("name", ["B_inside_True", "B_inside_False"])
def test_golden_in_full_lanes(way, name):
    (golden,) = (golden for golden in goldens.ALL if golden.name == name)
    golden.check(way, dim=way.dim)


@each_way
@pytest.mark.parametrize("distribution", ["zipf", "padded", "wild"])
def test_untouched_rows_are_neither_read_nor_written(way, distribution):
    *state, ids, grads = way.inexact(distribution)
    touched = np.isin(np.arange(40), ids)
    assert touched.any()
    assert not touched.all()
    poison = np.uint32(0x7FC0ABCD).view(np.float32)
    for x in state:
        x[~touched] = poison
    new = way(*state, ids, grads)
    for x, old in zip(new, state, strict=True):
        assert np.isfinite(np.asarray(x)[touched]).all()
        assert_bitwise_equal(np.asarray(x)[~touched], old[~touched])


@each_way
@pytest.mark.parametrize(
    ("row", "occurrence"), [(3, 1), (4, 0), (5, 0), (5, 1), (5, 2), (6, 0)]
)
def test_nan_stays_in_its_row_and_lane(way, row, occurrence):
    # Sorted: 3 3 4 5 5 5 6 6, then padding; the run of 5 and its neighbours.
    *state, _, grads = way.inexact()
    ids = np.full(24, -1, np.int32)
    ids[:8] = 5, 3, 6, 5, 4, 3, 6, 5
    at = np.flatnonzero(ids == row)[occurrence]
    clean = way(*state, ids, grads)
    grads[at, 7] = np.nan
    for x, old in zip(way(*state, ids, grads), clean, strict=True):
        x, old = np.asarray(x), np.array(old)
        assert np.isnan(x[row, 7])
        old[row, 7] = x[row, 7]
        assert_bitwise_equal(x, old)


@each_way
def test_gradients_of_padding_are_ignored(way):
    *state, ids, grads = way.inexact("wild")
    expected = way(*state, ids, grads)
    grads[(ids < 0) | (ids >= 40)] = np.nan
    assert_states_bitwise_equal(way(*state, ids, grads), expected)


@each_way
def test_a_sample_out_of_range_adds_zero(way: Way):
    state, ids, grads, weights = way.arrays("zipf", weighted=True)
    ids[:3], weights["sample_ids"][:3] = (5, 6, 6), (-1, len(grads), 1)
    ids[3:][np.isin(ids[3:], (5, 6))] = 7
    weights["sample_ids"][3:] = 2
    grads[0] = grads[3:] = np.nan  # also where -1 and B might point
    new = way(*state, ids, grads, **weights)
    expected = reference.sparse_adam_update(*state, ids, grads, **weights)
    helpers.assert_close_states(new, state, expected)
    assert (np.asarray(new.momenta)[5] != state[1][5]).all()  # touched all the same


@each_way
def test_order_of_distinct_ids_changes_nothing(way):
    *state, ids, grads = way.inexact("distinct")
    expected = way(*state, ids, grads)
    order = np.random.default_rng(1).permutation(24)
    assert_states_bitwise_equal(way(*state, ids[order], grads[order]), expected)


@each_way
@pytest.mark.parametrize("distribution", ["equal", "zipf"])
def test_repeat_and_early_plan_give_the_same_bits(way, distribution):
    *state, ids, grads = way.inexact(distribution)
    expected = way(*state, ids, grads)
    assert_states_bitwise_equal(way(*state, ids, grads), expected)
    plan = plan_update(ids, 40)
    assert_states_bitwise_equal(way(*state, ids, grads, plan=plan), expected)


@each_way
@pytest.mark.parametrize("start", [0, 150, 256, 300])
def test_long_runs(way: Way, start):
    # The TensorCore kernel cuts 600 occurrences into three chunks of 256: a run of 300
    # begins, passes through or ends anywhere in them.
    state, _, grads, _ = way.arrays(num_ids=600)
    ids = np.empty(600, np.int32)
    ids[:start] = np.arange(start) % 19
    ids[start : start + 300] = 20
    ids[start + 300 :] = 21 + np.arange(300 - start) % 19
    order = np.random.default_rng(start).permutation(600)
    arguments = (*state, ids[order], grads[order])
    new = way(*arguments)
    expected = reference.sparse_adam_update(*arguments)
    helpers.assert_close_states(new, state, expected)


@each_way
def test_sums_that_are_rounded(way):
    # With beta_1 = 0 the first moment is the sum of the gradients.
    table, _, velocities, ids, grads = way.inexact("zipf", num_ids=600)
    _, momenta, _ = way(table, table, velocities, ids, grads, beta_1=0.0)
    for row in np.unique(ids):
        own = grads[ids == row].astype(np.float64)
        # Any order of adding k numbers errs by at most k - 1 roundings of |g| in all.
        bound = len(own) * helpers.ULP / 2 * np.abs(own).sum(axis=0)
        assert (np.abs(momenta[row] - own.sum(axis=0)) <= bound).all()


@each_way
@pytest.mark.parametrize("num_ids", [0, 5])
def test_no_valid_id_changes_nothing(way, num_ids):
    state, _, _, _ = way.arrays()
    ids = np.array([-1, 40, -(2**31), 2**31 - 1, 41], np.int32)[:num_ids]
    grads = np.ones((num_ids, way.dim), np.float32)
    new = way(*state, ids, grads)
    assert_states_bitwise_equal(new, state)


NOT_LAZY = tuple(
    way
    for way in ways.ALL
    if way.supports(Case("", 40, way.dim, 24, options={"lazy_adam": False}))
)


@pytest.mark.parametrize("way", NOT_LAZY, ids=str)
@pytest.mark.parametrize("num_ids", [0, 2])
def test_not_lazy_without_valid_ids(way: Way, num_ids):
    state, _, _, _ = way.arrays()
    arguments = (
        *(*state, np.full(num_ids, -1)),
        np.ones((num_ids, way.dim), np.float32),
    )
    new = way(*arguments, lazy_adam=False)
    expected = reference.sparse_adam_update(*arguments, lazy_adam=False)
    helpers.assert_close_states(new, state, expected)
    assert (np.asarray(new.momenta) != state[1]).any(axis=1).all()


INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@each_way
@pytest.mark.parametrize("dtype", INTEGERS)
def test_ids_of_any_integer_dtype(way, dtype):
    # V is out of the range of int8, and no id may wrap into the table.
    rng = np.random.default_rng(0)
    w, m, v = rng.random((3, 200, way.dim), np.float32)
    state, limits = (w, m, v), np.iinfo(dtype)
    valid = rng.integers(0, min(200, limits.max), 17)
    strays = [2**40, 2**32 + 3, 2**64 - 1, -1, -(2**32) + 3, limits.min, limits.max]
    ids = [i if limits.min <= i <= limits.max else limits.max for i in strays]
    ids = np.array([*valid.tolist(), *ids], dtype)
    grads = rng.integers(-8, 8, (24, way.dim)).astype(np.float32)
    expected = reference.sparse_adam_update(*state, ids, grads)
    new = way(*state, ids, grads)
    helpers.assert_close_states(new, state, expected)
    if limits.bits < 64:  # without x64 a device has no such integers
        on_device = way(*state, jnp.asarray(ids), grads)
        assert_states_bitwise_equal(on_device, new)


def test_int64_ids_on_device():
    state, _, grads, _ = cases.arrays(Case("", 40, 3, 4))
    ids = np.array([3, 2**32 + 3, -(2**32) + 3, 5])
    expected = sparse_adam_update(*state, ids, grads)
    with jax.enable_x64(True):
        new = sparse_adam_update(*state, jnp.asarray(ids), grads)
    assert_states_bitwise_equal(new, expected)


@each_way
def test_shape_of_the_ids_does_not_matter(way):
    *state, ids, grads = way.inexact()
    expected = way(*state, ids, grads)
    new = way(*state, ids.reshape(2, 3, 4), grads.reshape(2, 3, 4, way.dim))
    assert_states_bitwise_equal(new, expected)


@each_way
def test_gradients_of_lower_precision(way):
    case = Case("", 40, way.dim, 24, dtypes=(*cases.FLOAT32[:3], "bfloat16"))
    assert_matches_reference(way, case)


@each_way
@pytest.mark.parametrize("to_rate", [np.float32, np.float64, np.array, jnp.asarray])
def test_kinds_of_rates(way, to_rate):
    *state, ids, grads = way.inexact()
    expected = way(*state, ids, grads, learning_rate=RATE)
    new = way(*state, ids, grads, learning_rate=to_rate(RATE))
    assert_states_bitwise_equal(new, expected)
