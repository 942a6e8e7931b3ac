"""The steps of the reference against numbers worked by hand and TensorFlow's test."""

import ml_dtypes
import numpy as np
import pytest

from sparse_adam.reference import (
    adagrad,
    adagrad_momentum,
    adam,
    ftrl,
    row_wise_adagrad,
    sgd,
    sparse_update,
)
from tests.helpers import assert_bitwise_equal

F32 = np.float32


def one_row(step, gradients, *values, rate=0.5, **options):
    """Updates row 1 of two, of width 1, and returns its values.

    A slot that is per row is given as a list of one number.
    """
    state = [
        np.array([5.0, *x]) if isinstance(x, list) else np.array([[5.0], [x]])
        for x in values
    ]
    ids = np.ones(len(gradients), int)
    grads = np.array(gradients, float)[:, None]
    new = sparse_update(state, ids, grads, step, learning_rate=rate, **options)
    for before, after in zip(state, new, strict=True):
        assert_bitwise_equal(after[0], before[0])
    return tuple(float(np.squeeze(x[1])) for x in new)


# All numbers are sums of few powers of two, so that float32 changes none.
BY_HAND = {
    "sgd": (sgd(), [3.0], (1.0,), (1 - 0.5 * 3,)),
    "sgd_sum": (sgd(), [3.0, -1.0], (1.0,), (0.0,)),
    # a = 7 + 9 = 16
    "adagrad": (adagrad(), [3.0], (1.0, 7.0), (1 - 0.5 * 3 / 4, 16.0)),
    "adagrad_of_the_sum": (adagrad(), [1.0, 2.0], (1.0, 7.0), (0.625, 16.0)),
    "adagrad_without_gradient": (adagrad(), [0.0], (1.0, 4.0), (1.0, 4.0)),
    # The sum is 3 + 4; s = 2 / sqrt(7 + 9); the momentum is .5 * 2 + .5.
    "adagrad_momentum": (
        adagrad_momentum(momentum=0.5, epsilon=9.0),
        [2.0],
        (1.0, 3.0, 2.0),
        (1 - 0.5 * 1.5, 7.0, 1.5),
    ),
    # The step is .5 * m + s of the new m.
    "adagrad_momentum_nesterov": (
        adagrad_momentum(momentum=0.5, use_nesterov=True, epsilon=9.0),
        [2.0],
        (1.0, 3.0, 2.0),
        (1 - 0.5 * (0.75 + 0.5), 7.0, 1.5),
    ),
    # a = .75 * 4 + .25 * 16 = 7
    "adagrad_momentum_decay": (
        adagrad_momentum(beta2=0.75, epsilon=9.0),
        [4.0],
        (1.0, 4.0, 2.0),
        (1 - 0.5 * 1, 7.0, 1.0),
    ),
    # Here s is 2 / (7 + 9).
    "adagrad_momentum_first_power": (
        adagrad_momentum(exponent=1.0, epsilon=9.0),
        [2.0],
        (1.0, 3.0, 2.0),
        (1 - 0.5 / 8, 7.0, 0.125),
    ),
    # And here it is 2 over the fourth root of 16.
    "adagrad_momentum_fourth_root": (
        adagrad_momentum(exponent=4.0, epsilon=9.0),
        [2.0],
        (1.0, 3.0, 2.0),
        (0.5, 7.0, 1.0),
    ),
    # a = 7 + 9; epsilon stands outside of the root.
    "row_wise_adagrad": (
        row_wise_adagrad(epsilon=2.0),
        [3.0],
        (1.0, [7.0]),
        (1 - 0.5 * 3 / (4 + 2), 16.0),
    ),
    # a' = 7 + 9; l = 1 + 3 - (4 - sqrt(7)) * 2 / .5 = 4 sqrt(7) - 12
    "ftrl": (
        ftrl(),
        [3.0],
        (2.0, 7.0, 1.0),
        (-(4 * 7**0.5 - 12) / (4 / 0.5), 16.0, 4 * 7**0.5 - 12),
    ),
    # a' = 16, a = 4: l = 1 + sqrt(12) - (4 - 2) * .25 / .5; l1 takes .5 off
    "ftrl_all": (
        ftrl(-0.5, 0.5, 0.75, 0.25),
        [12**0.5],
        (0.25, 4.0, 1.0),
        (-(12**0.5 - 0.5) / ((4 + 0.25) / 0.5 + 1.5), 16.0, 12**0.5),
    ),
    "ftrl_within_l1": (ftrl(-0.5, 4.0), [12**0.5], (0.25, 4.0, 1.0), (0, 16, 12**0.5)),
    "ftrl_negative": (
        ftrl(-0.5, 0.5),
        [-(12**0.5)],
        (-0.25, 4.0, -1.0),
        ((12**0.5 - 0.5) / 8, 16.0, -(12**0.5)),
    ),
    # With power 1: l = 0 + 2 - (8 - 4) * .25 / .5
    "ftrl_power": (ftrl(-1.0), [2.0], (0.25, 4.0, 0.0), (0.0, 8.0, 0.0)),
    # With power 0 the weights are -rate * l / 1: a sum of gradients.
    "ftrl_power_0": (ftrl(0.0), [2.0], (0.25, 4.0, 1.0), (-1.5, 8.0, 3.0)),
    # l = 1 + .5 * sqrt(12) - (4 - 2) * .5 = sqrt(3); l1: .5 * 2; 4 + 1 + .5 * 2 * 3
    "ftrl_multiplied": (
        ftrl(-0.5, 2.0, 3.0, 1.0, True),
        [12**0.5],
        (0.5, 4.0, 1.0),
        (-(3**0.5 - 1) / 8, 16.0, 3**0.5),
    ),
    # t = 1: sqrt(1 - .75) / (1 - .5) = 1; m = 1, v = 1: one step of the rate.
    "adam_row": (
        adam(0.5, 0.75, 1e-15, True, "row"),
        [2.0],
        (1.0, 0.0, 0.0, [0.0]),
        (0.5, 1.0, 1.0, 1.0),
    ),
    # t = 2: sqrt(1 - .5625) / (1 - .25); m = .5 * 2 + .5 * 4, v = .75 * 16 + .25 * 16
    "adam_row_second": (
        adam(0.5, 0.75, 1e-15, False, "row"),
        [4.0],
        (1.0, 2.0, 16.0, [1.0]),
        (1 - 0.5 * (0.4375**0.5 / 0.75) * 3 / 4, 3.0, 16.0, 2.0),
    ),
    # Late: no correction is left.
    "adam_row_late": (
        adam(0.5, 0.75, 1e-15, False, "row"),
        [4.0],
        (1.0, 2.0, 16.0, [4095.0]),
        (1 - 0.5 * 3 / 4, 3.0, 16.0, 4096.0),
    ),
    # The epsilon is the paper's "epsilon hat": outside of the correction.
    "adam_row_epsilon": (
        adam(0.5, 0.75, 1.0, False, "row"),
        [2.0],
        (1.0, 0.0, 0.0, [0.0]),
        (1 - 0.5 * 1 / (1 + 1), 1.0, 1.0, 1.0),
    ),
    # Corrected, m = 1 / .5 and v = 1 / .25; to the root of v epsilon is added.
    "adam_row_corrected_moments": (
        adam(0.5, 0.75, 2.0, False, "row", epsilon_hat=False),
        [2.0],
        (1.0, 0.0, 0.0, [0.0]),
        (1 - 0.5 * 2 / (2 + 2), 1.0, 1.0, 1.0),
    ),
    # m = .5 * 2 + .5 * 4, v = .75 * 16 + .25 * 16: v stays below the largest.
    "amsgrad": (
        adam(0.5, 0.75, 1.0, False, amsgrad=True),
        [4.0],
        (1.0, 2.0, 16.0, 25.0),
        (1 - 0.5 * 3 / (5 + 1), 3.0, 16.0, 25.0),
    ),
    # And here it passes it.
    "amsgrad_passed": (
        adam(0.5, 0.75, 1e-15, amsgrad=True),
        [4.0],
        (1.0, 2.0, 16.0, 15.0),
        (1 - 0.5 * 3 / 4, 3.0, 16.0, 16.0),
    ),
    # The largest v is that before its correction, which is 1 / .25.
    "amsgrad_row": (
        adam(0.5, 0.75, 1e-15, False, "row", amsgrad=True),
        [2.0],
        (1.0, 0.0, 0.0, 3.0, [0.0]),
        (1 - 0.5 * 1 / 3**0.5, 1.0, 1.0, 3.0, 1.0),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    step, gradients, values, expected = BY_HAND[name]
    new = one_row(step, gradients, *values)
    np.testing.assert_allclose(new, expected, rtol=1e-14, atol=1e-14)


def test_the_number_of_a_row_is_the_mean_over_its_elements():
    table, sums = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([4.0])
    gradient = np.array([[2.0, 4.0, -4.0, 0.0]])  # the mean square is 9
    step = row_wise_adagrad(epsilon=16 - 13**0.5)
    new, grown = sparse_update(
        (table, sums), np.array([0]), gradient, step, learning_rate=0.5
    )
    np.testing.assert_array_equal(grown, [13])
    np.testing.assert_allclose(new, table - gradient / 32, rtol=1e-7)


def test_the_rows_of_a_slot_per_row_are_counted_apart():
    table, zeros = np.ones((3, 2)), np.zeros((3, 2))
    step = adam(bias_correction="row")
    state = (table, zeros, zeros, np.array([0.0, 7.0, 9.0]))
    ids, grads = np.array([1, 0, 1]), np.ones((3, 2))
    *_, counts = sparse_update(state, ids, grads, step, learning_rate=0.1)
    assert counts.tolist() == [1, 8, 9]
    *_, counts = sparse_update(
        state, ids, grads, step, learning_rate=0.1, use_gradient_accumulation=False
    )
    assert counts.tolist() == [1, 9, 9]
    *_, counts = sparse_update(state, ids, grads, step, learning_rate=0.1, lazy=False)
    assert counts.tolist() == [1, 8, 10]


def test_gradient_scale_comes_before_the_clip():
    new = one_row(sgd(), [1.0, 3.0], 1.0, gradient_scale=0.25)
    assert new == one_row(sgd(), [1.0], 1.0)
    new = one_row(sgd(), [4.0], 1.0, gradient_scale=0.25, clipvalue=2.0)
    assert new == one_row(sgd(), [1.0], 1.0)
    new = one_row(sgd(), [4.0], 1.0, gradient_scale=2, clipvalue=3.0)
    assert new == one_row(sgd(), [3.0], 1.0)


def test_limits_surround_any_step():
    options = {
        "clipvalue": (None, 2.0),
        "weight_decay_factor": 0.25,
        "clip_weight_min": 3.5,
    }
    # G = 2, w = 8 - 2, a = 12 + 4, then the step, then the bound.
    assert one_row(adagrad(), [9.0], 8.0, 12.0, **options) == (5.75, 16)
    assert one_row(adagrad(), [9.0], 4.0, 12.0, **options) == (3.5, 16)


def test_without_decay_weights_that_are_infinite_stay_so():
    assert one_row(sgd(), [1.0], np.inf) == (np.inf,)


def test_numbers_are_rounded_to_float32():
    (w,) = one_row(sgd(), [1.0], 0.0, rate=0.1)
    assert w == -np.float64(F32(0.1))
    _, a, _ = one_row(adagrad_momentum(beta2=0.999), [1.0], 0.0, 0.0, 0.0)
    assert a == np.float64(F32(1) - F32(0.999))
    w, _ = one_row(row_wise_adagrad(0.1), [1.0], 0.0, [0.0], rate=1)
    assert w == -1 / (1 + np.float64(F32(0.1)))


def test_each_array_is_rounded_to_its_own_dtype():
    table = np.array([[1.0]], ml_dtypes.bfloat16)
    sums = np.array([0.5], F32)
    new = sparse_update(
        (table, sums),
        np.array([0]),
        np.array([[0.3]], F32),
        row_wise_adagrad(),
        learning_rate=0.1,
    )
    assert [x.dtype for x in new] == [ml_dtypes.bfloat16, F32]
    assert new[1] == F32(0.5 + np.float64(F32(0.3)) ** 2)


# `_check_embedding_and_slot_variables_for_...` of TensorFlow's tpu_embedding_base_test:
# the table `video` of `tests.goldens`, a rate of .1, and the numbers that the formulas
# of that test give in float64.
TABLE = np.arange(32.0).reshape(8, 4)
TENSORFLOW = {
    "sgd": (
        sgd(),
        (),
        [[-0.8, -0.3, 0.2, 0.7], [2.8, 3.3, 3.8, 4.3]],
        (),
    ),
    "adagrad": (
        adagrad(),
        (0.1,),
        [
            [-0.0999219665, 0.9000295727, 1.9000154285, 2.9000094500],
            [3.9000347042, 4.9000172964, 5.9000103295, 6.9000068580],
        ],
        ([[64.1, 169.1, 324.1, 529.1], [144.1, 289.1, 484.1, 729.1]],),
    ),
    "adagrad_momentum": (
        adagrad_momentum(momentum=0.9, use_nesterov=True, exponent=3, beta2=0.9),
        (0.0, 0.0),
        [
            [-0.8186851822, 0.0374985664, 0.9272189271, 1.8358841217],
            [3.0628394118, 3.9474649312, 4.8530059600, 5.7719722267],
        ],
        (
            [[6.4, 16.9, 32.4, 52.9], [14.4, 28.9, 48.4, 72.9]],
            [
                [4.3088693800, 5.0657970191, 5.6462161733, 6.1269256752],
                [4.9324241486, 5.5396582567, 6.0368107368, 6.4633040701],
            ],
        ),
    ),
    "ftrl": (
        ftrl(),
        (0.1, 0.0),
        [
            [-0.0999219664, 0.8757115535, 1.8648844311, 2.8587662486],
            [3.7946620302, 4.8070252173, 5.8137753009, 6.8180275042],
        ],
        (
            [[64.1, 169.1, 324.1, 529.1], [144.1, 289.1, 484.1, 729.1]],
            [
                [8.0, -113.8761781904, -335.7309959492, -657.578381329],
                [-455.5175271009, -817.3356578035, -1279.162690633, -1840.993681563],
            ],
        ),
    ),
}


@pytest.mark.parametrize("name", TENSORFLOW)
def test_tensorflows_test(name):
    step, initial, rows, slots = TENSORFLOW[name]
    state = (TABLE, *(np.full_like(TABLE, x) for x in initial))
    ids, samples = np.array([0, 0, 1, 0, 1, 1]), np.array([0, 1, 1, 2, 2, 3])
    grads = np.array([[0.0, 1, 2, 3], [4, 6, 8, 10], [4, 6, 8, 10], [4, 5, 6, 7]])
    new = sparse_update(state, ids, grads, step, learning_rate=0.1, sample_ids=samples)
    np.testing.assert_allclose(new[0][:2], rows, rtol=0, atol=2e-7)
    for array, expected in zip(new[1:], slots, strict=True):
        np.testing.assert_allclose(array[:2], expected, rtol=1e-6)
    for before, after in zip(state, new, strict=True):
        assert_bitwise_equal(after[2:], before[2:])
