"""The plan: the sorted occurrences of a batch of ids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sparse_adam import AdamState, plan_update, sparse_adam_update
from tests import cases
from tests.helpers import assert_states_bitwise_equal


@pytest.mark.parametrize("distribution", cases.DISTRIBUTIONS)
@pytest.mark.parametrize("num_ids", [1, 24, 600])
def test_stable_sort_with_strays_at_the_end(distribution, num_ids):
    ids = cases.ids(np.random.default_rng(0), distribution, 40, num_ids)
    plan = plan_update(ids, 40)
    clean = np.where((ids >= 0) & (ids < 40), ids, 40)
    order = np.argsort(clean, kind="stable")
    assert plan.num_rows == 40
    assert plan.ids.dtype == plan.order.dtype == jnp.int32
    np.testing.assert_array_equal(plan.order, order)
    np.testing.assert_array_equal(plan.ids, clean[order])


@pytest.mark.parametrize("num_rows", [2**24 - 1, 2**24, 2**24 + 1])
def test_padding_has_a_bit_of_its_own(num_rows):
    """A row and a place among 256 fill a word of 32 bits, or just do not."""
    ids = np.arange(256, dtype=np.int32) * 65793 % num_rows
    ids[::3] = -1
    plan = plan_update(ids, num_rows)
    clean = np.where(ids < 0, num_rows, ids)
    order = np.argsort(clean, kind="stable")
    np.testing.assert_array_equal(plan.order, order)
    np.testing.assert_array_equal(plan.ids, clean[order])


def test_shape_is_flattened():
    plan = plan_update(np.array([[3, 1], [2, 0]]), 4)
    assert plan.ids.tolist() == [0, 1, 2, 3]
    assert plan.order.tolist() == [3, 1, 2, 0]


def test_no_ids():
    plan = plan_update(np.zeros((0, 3), np.int32), 4)
    assert plan.ids.shape == plan.order.shape == (0,)


def test_passes_through_jit_and_scan():
    state, _, _, _ = cases.arrays(cases.Case("", 40, 8, 24))
    batches = [cases.arrays(cases.Case("", 40, 8, 24), seed) for seed in range(3)]
    ids = np.stack([b.ids for b in batches])
    grads = np.stack([b.grads for b in batches])
    plans = jax.jit(jax.vmap(lambda ids: plan_update(ids, 40)))(ids)
    assert plans.num_rows == 40

    def step(state: AdamState, batch):
        ids, grads, plan = batch
        return sparse_adam_update(*state, ids, grads, plan=plan), None

    def step_without(state, batch):
        return sparse_adam_update(*state, *batch), None

    state = sparse_adam_update(*state, ids[0], grads[0])
    planned, _ = lax.scan(step, state, (ids, grads, plans))
    unplanned, _ = lax.scan(step_without, state, (ids, grads))
    assert_states_bitwise_equal(planned, unplanned)


def test_one_plan_serves_several_tables():
    first, second = (cases.arrays(cases.Case("", 40, dim, 24)) for dim in (8, 3))
    plan = plan_update(first.ids, 40)
    for state, grads in ((first.state, first.grads), (second.state, second.grads)):
        assert_states_bitwise_equal(
            sparse_adam_update(*state, first.ids, grads, plan=plan),
            sparse_adam_update(*state, first.ids, grads),
        )


def test_the_plan_is_used_and_not_compared_under_jit():
    state, ids, grads, _ = cases.arrays(cases.Case("", 40, 8, 24))
    other = plan_update((ids + 1) % 40, 40)
    new = jax.jit(lambda p: sparse_adam_update(*state, ids, grads, plan=p))(other)
    expected = sparse_adam_update(*state, (ids + 1) % 40, grads)
    assert_states_bitwise_equal(new, expected)


@pytest.mark.parametrize("on", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize(
    ("other", "words"),
    [
        ([3, -1, 40, 6], r"plan.ids\[1\]=5, but .* finds 6 .*plan_update\(ids, 40\)"),
        ([3, 5, 40, 5], r"plan.ids\[2\]=40, but .* finds 5 there"),
        ([3, -1, 40, -1], r"plan.ids\[1\]=5, but .* finds -1 there"),
        ([5, -1, 40, 3], r"plan.ids\[0\]=3, but .* finds 5 there"),
    ],
)
def test_a_plan_of_other_ids_is_an_error(other, words, on):
    ones, grads = np.ones((40, 8), np.float32), np.ones((4, 8), np.float32)
    state = (ones, ones, ones)
    ids, other = (on(np.array(x, np.int32)) for x in ([3, -1, 40, 5], other))
    plan = plan_update(ids, 40)
    with pytest.raises(ValueError, match=words):
        sparse_adam_update(*state, other, grads, plan=plan)
    # All strays are alike, also those that are wider than the plan's integers.
    same = np.array([3, 2**35, -(2**40), 5])
    sparse_adam_update(*state, same, grads, plan=plan)
    is_of = jax.jit(lambda plan, ids: plan.is_of(ids))
    assert is_of(plan, ids) and not is_of(plan, other)


@pytest.mark.parametrize("num_rows", [0, -1, 2**31 - 3, 2**31])
def test_rows_that_do_not_fit_are_an_error(num_rows):
    with pytest.raises(ValueError, match=f"num_rows={num_rows} must .*split the table"):
        plan_update(np.zeros(3, np.int32), num_rows)


def test_ids_that_are_no_integers_are_an_error():
    with pytest.raises(TypeError, match=r"ids.dtype=float32 .*astype\(jnp.int32\)"):
        plan_update(np.zeros(3, np.float32), 4)
