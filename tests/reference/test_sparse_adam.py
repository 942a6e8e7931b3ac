"""The reference against TensorFlow's numbers and against numbers worked by hand."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sparse_adam.reference import sparse_adam_update
from tests import goldens
from tests.cases import State
from tests.helpers import (
    as_float32,
    assert_bitwise_equal,
    assert_states_bitwise_equal,
)

F32 = np.float32


def zeros(table):
    return np.zeros_like(table), np.zeros_like(table)


def state_of(*rows: tuple[float, float, float]) -> State:
    """Columns of w, m and v, which are given for each row."""
    w, m, v = np.array(rows, F32).T[:, :, None]
    return w, m, v


def one_row(*gradients, w=1.0, m=0.0, v=0.0, ids=None, **options):
    """Updates row 1 of two, of width 1, and returns its (w, m, v)."""
    state = state_of((5, 5, 5), (w, m, v))
    ids = np.ones(len(gradients), np.int32) if ids is None else np.array(ids)
    new = sparse_adam_update(*state, ids, np.array(gradients, F32)[:, None], **options)
    return tuple(float(x[1, 0]) for x in new)


@pytest.mark.parametrize("golden", goldens.ALL, ids=lambda golden: golden.name)
def test_goldens(golden):
    golden.check(sparse_adam_update)


# With these constants, all powers of two but the rate, float32 and float64 agree.
PLAIN: dict[str, Any] = {
    "learning_rate": 0.5,
    "beta_1": 0.5,
    "beta_2": 0.75,
    "epsilon": 2.0**-20,
}


def test_one_step_by_hand():
    # m = .5 * 2 + .5 * 4 = 3; v = .75 * 16 + .25 * 16 = 16; w = 1 - .5 * 3 / 4
    w, m, v = one_row(4.0, m=2.0, v=16.0, **PLAIN)
    assert (m, v) == (3, 16)
    assert w == pytest.approx(0.625, rel=1e-7)


def test_epsilon_inside_and_outside_of_the_root():
    # m = .5 * 4 = 2; v = .25 * 16 = 4; inside: sqrt(4 + 4**2); outside: 2 + 4
    options = PLAIN | {"epsilon": 4.0}
    assert one_row(4.0, **options)[0] == pytest.approx(1 - 0.5 * 2 / 20**0.5, rel=1e-7)
    assert one_row(4.0, sum_inside_sqrt=False, **options)[0] == F32(1 - 0.5 * 2 / 6)


def test_duplicates_are_summed_before_the_square():
    assert one_row(1.0, 3.0, **PLAIN) == one_row(4.0, **PLAIN)


def test_each_occurrence_makes_a_step_in_the_order_of_the_ids():
    new = one_row(1.0, 3.0, use_gradient_accumulation=False, **PLAIN)
    # m: .5, then .25 + 1.5; v: .25, then .1875 + 2.25
    assert new[1:] == (1.75, 2.4375)
    w = 1 - 0.5 * 0.5 / 0.25**0.5 - 0.5 * 1.75 / 2.4375**0.5
    assert new[0] == pytest.approx(w, rel=1e-7)
    assert one_row(3.0, 1.0, use_gradient_accumulation=False, **PLAIN) != new


def test_steps_of_a_run_are_rounded_once():
    # Each of 256 decays by 2**-25 is lost if the row is rounded to float32 between.
    options = {"use_gradient_accumulation": False, "weight_decay_factor": 2.0**-25}
    w, _, _ = one_row(*[0.0] * 256, **options)
    assert w == F32((1 - 2.0**-25) ** 256) < 1


@pytest.mark.parametrize(
    ("clipvalue", "gradient", "clipped"),
    [
        (2.0, 5.0, 2.0),
        (2.0, -5.0, -2.0),
        ((-1.0, 3.0), -5.0, -1.0),
        ((-1.0, 3.0), 5.0, 3.0),
        ((None, 3.0), -5.0, -5.0),
        ((None, 3.0), 5.0, 3.0),
        ((-1.0, None), 5.0, 5.0),
        ((-1.0, None), -5.0, -1.0),
        ((None, None), -5.0, -5.0),
        (0.0, 5.0, 0.0),
    ],
)
def test_gradient_clip(clipvalue, gradient, clipped):
    assert one_row(gradient, clipvalue=clipvalue, **PLAIN) == one_row(clipped, **PLAIN)


def test_gradient_clip_is_of_the_sum():
    clipped = one_row(5.0, -4.0, clipvalue=2.0, **PLAIN)
    assert clipped == one_row(1.0, **PLAIN)


def test_weight_clip():
    assert one_row(0.0, w=3.0, clip_weight_max=2.0)[0] == 2
    assert one_row(0.0, w=-3.0, clip_weight_min=-2.0)[0] == -2
    assert one_row(0.0, w=-3.0, clip_weight_max=2.0)[0] == -3


def test_weight_decay_comes_before_the_step_and_spares_the_moments():
    decayed = one_row(4.0, w=2.0, weight_decay_factor=0.25, **PLAIN)
    plain = one_row(4.0, w=1.5, **PLAIN)
    assert decayed == plain


def test_weight_decay_times_the_rate():
    options = PLAIN | {"multiply_weight_decay_factor_by_learning_rate": True}
    by_rate = one_row(4.0, w=2.0, weight_decay_factor=0.5, **options)
    assert by_rate == one_row(4.0, w=2.0, weight_decay_factor=0.25, **PLAIN)


def test_weights_are_clipped_after_decay_and_step():
    new = one_row(4.0, w=2.0, weight_decay_factor=0.25, clip_weight_max=1.75, **PLAIN)
    assert new == one_row(4.0, w=1.5, **PLAIN)


def test_lazy_touches_rows_with_zero_gradients_and_no_others():
    table = np.array([[1], [2], [3]], F32)
    slots = (np.ones_like(table), np.ones_like(table))
    new = sparse_adam_update(table, *slots, np.array([1]), np.zeros((1, 1), F32))
    for old, changed in zip((table, *slots), new, strict=True):
        assert_bitwise_equal(changed[[0, 2]], old[[0, 2]])
        assert changed[1, 0] < old[1, 0]


def test_untouched_nans_keep_their_bits():
    table = np.array([0x7FC00123, 0xFF800456, 0], np.uint32).view(F32)[:, None]
    new, _, _ = sparse_adam_update(
        table, *zeros(table), np.array([2]), np.ones((1, 1), F32)
    )
    assert_bitwise_equal(new[:2], table[:2])


def test_not_lazy_steps_every_row():
    state = state_of((1, 2, 16), (1, 2, 16))
    ids, gradient = np.array([0]), np.array([[4]], F32)
    new = sparse_adam_update(*state, ids, gradient, lazy_adam=False, **PLAIN)
    row = one_row(0.0, m=2.0, v=16.0, **PLAIN)
    assert tuple(float(x[1, 0]) for x in new) == row
    row = one_row(4.0, m=2.0, v=16.0, **PLAIN)
    assert tuple(float(x[0, 0]) for x in new) == row


def test_not_lazy_clips_the_zero_gradient_of_other_rows():
    state = state_of((1, 2, 16), (1, 2, 16))
    none = np.zeros(0, np.int32), np.zeros((0, 1), F32)
    options = PLAIN | {"lazy_adam": False, "clipvalue": (0.5, None)}
    new = sparse_adam_update(*state, *none, **options)
    row = one_row(0.5, m=2.0, v=16.0, **PLAIN)
    for i in range(2):
        assert tuple(float(x[i, 0]) for x in new) == row


@pytest.mark.parametrize("stray", [-1, 2, -(2**40), 2**32 + 1, 2**63 - 1])
def test_ids_out_of_range_are_ignored(stray):
    ids = np.array([1, stray, 1], np.int64)
    assert one_row(1.0, 9.0, 3.0, ids=ids, **PLAIN) == one_row(4.0, **PLAIN)


def test_uint64_ids_are_not_wrapped():
    ids = np.array([1, 2**64 - 1], np.uint64)
    assert one_row(4.0, 9.0, ids=ids, **PLAIN) == one_row(4.0, **PLAIN)


def test_sample_ids_and_gains():
    table = np.ones((3, 1), F32)
    new = sparse_adam_update(
        *(table, *zeros(table)),
        np.array([[0, 2], [0, 1]]),
        np.array([[2], [4]], F32),
        sample_ids=np.array([[0, 1], [1, 2]]),
        gains=np.array([[1.5, 0.5], [0.25, 1]], F32),
        **PLAIN,
    )
    # Row 0: 1.5 * 2 + .25 * 4; row 1: sample 2 is out of range; row 2: .5 * 4.
    assert new[1].ravel().tolist() == [2, 0, 1]
    assert new[2].ravel().tolist() == [4, 0, 1]


def test_gains_without_sample_ids():
    gains = np.array([2, 0.5], F32)
    assert one_row(1.0, 2.0, gains=gains, **PLAIN) == one_row(3.0, **PLAIN)


def test_a_sample_out_of_range_touches_its_row():
    options = PLAIN | {"sample_ids": np.array([-1]), "clip_weight_max": 0.5}
    assert one_row(np.nan, **options)[0] == 0.5


def test_each_array_is_rounded_to_its_own_dtype():
    bfloat16 = ml_dtypes.bfloat16
    table = np.array([[1.0]], bfloat16)
    momenta, velocities = np.array([[1]], F32), np.array([[1]], bfloat16)
    ids, gradient = np.array([0]), np.array([[0.5]], bfloat16)
    new = sparse_adam_update(table, momenta, velocities, ids, gradient)
    assert [x.dtype for x in new] == [bfloat16, F32, bfloat16]
    wide = sparse_adam_update(*as_float32((table, momenta, velocities)), ids, gradient)
    for narrow, x in zip(new, wide, strict=True):
        assert_bitwise_equal(narrow, x.astype(narrow.dtype))


def test_constants_are_those_of_float32():
    # 1 - beta_2 is formed in float32: 0.9999871e-3 rather than 1e-3.
    _, m, v = one_row(1.0)
    assert (m, v) == (F32(1) - F32(0.9), F32(1) - F32(0.999))
    # 1e-7 is not a float32, and its square is rounded to float32 once more.
    w, _, _ = one_row(0.0, w=0.0, m=1e-6, v=0.0)
    squared = np.float64(F32(1e-7) * F32(1e-7))
    exact = -np.float64(F32(1e-3)) * np.float64(F32(0.9)) * np.float64(F32(1e-6))
    assert w == F32(exact / np.sqrt(squared))


def test_arguments_are_left_alone():
    table = np.ones((2, 2), F32)
    before = table.copy()
    sparse_adam_update(table, *zeros(table), np.array([0]), np.ones((1, 2), F32))
    assert_bitwise_equal(table, before)


def test_no_ids():
    table = np.ones((2, 2), F32)
    none = np.zeros((0,), np.int32), np.zeros((0, 2), F32)
    new = sparse_adam_update(table, *zeros(table), *none)
    assert_states_bitwise_equal(new, (table, *zeros(table)))
