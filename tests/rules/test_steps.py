"""Each rule's step in float32 against the step of the reference in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_adam import rules
from sparse_adam.rules import Limits, StepNumbers, step_tile
from tests.rules.pairs import PAIRS, Pair

ROWS, DIM, STEPS = 6, 5, 5
RATES = (1.0, 0.125, 1e-3)
F32 = np.float32
each_pair = pytest.mark.parametrize("pair", PAIRS, ids=str)


@functools.cache
def jitted(pair: Pair):
    return jax.jit(pair.rule.step)


def run(pair, state, gradient, rate):
    """One step by the rule: slots per row are `[V]` outside and `[V, 1]` inside."""
    values = tuple(x if x.ndim == 2 else x[:, None] for x in state)
    new = jitted(pair)(values, gradient, F32(rate))
    return tuple(
        np.asarray(x).reshape(old.shape) for x, old in zip(new, state, strict=True)
    )


def assert_step(pair, state, new, gradient, rate):
    expected = pair.expected(state, gradient, rate)
    bounds = pair.tolerance(state, gradient, rate)
    names = ("weights", *(slot.name for slot in pair.rule.slots))
    for name, old, got, exact, bound in zip(
        names, state, new, expected, bounds, strict=True
    ):
        assert got.dtype == F32
        off = np.abs((got.astype(float) - old) - (exact - old))
        assert (off <= bound).all(), (name, (off / bound).max())


def test_every_rule_has_a_pair():
    classes = {x for x in vars(rules).values() if isinstance(x, type)}
    own = {
        x
        for x in classes
        if x.__name__.endswith("Rule") and x.__module__ != ("sparse_adam.rules.rule")
    }
    assert own == {pair.kind for pair in PAIRS}
    assert len({pair.name for pair in PAIRS}) == len(PAIRS)


@each_pair
def test_numbers_are_not_the_defaults(pair):
    if pair.kind is not rules.SGDRule:
        assert getattr(pair.rule, "rule", pair.rule) != pair.kind()


@each_pair
@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**31),
    rate=st.sampled_from(RATES),
    size=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    zeros=st.booleans(),
)
def test_many_steps(pair, seed, rate, size, zeros):
    rng = np.random.default_rng(seed)
    state = pair.state(ROWS, DIM, seed)
    for _ in range(STEPS):
        gradient = F32(size) * rng.standard_normal((ROWS, DIM)).astype(F32)
        if zeros:
            gradient[rng.random(ROWS) < 0.5] = 0
        new = run(pair, state, gradient, rate)
        assert_step(pair, state, new, gradient, rate)
        state = new


@each_pair
def test_from_initial_slots_with_zero_gradients(pair):
    """A row without gradients must not become NaN, however often it is looked up."""
    table = np.random.default_rng(1).standard_normal((ROWS, DIM)).astype(F32)
    slots = rules.initial_slots(pair.rule, table.shape, F32, table)
    state = (table, *map(np.asarray, slots))
    zeros = np.zeros((ROWS, DIM), F32)
    for _ in range(STEPS):
        new = run(pair, state, zeros, 0.125)
        assert_step(pair, state, new, zeros, 0.125)
        assert all(np.isfinite(x).all() for x in new)
        state = new


@each_pair
def test_a_nan_stays_in_its_row(pair):
    state = pair.state(ROWS, DIM)
    gradient = np.random.default_rng(2).standard_normal((ROWS, DIM)).astype(F32)
    clean = run(pair, state, gradient, 0.125)
    gradient[2] = np.nan
    new = run(pair, state, gradient, 0.125)
    others = np.arange(ROWS) != 2
    for got, expected in zip(new, clean, strict=True):
        np.testing.assert_array_equal(got[others], expected[others])
    assert np.isnan(new[0][2]).all()


@each_pair
@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks_of_tiles(pair, rank):
    state = pair.state(ROWS, DIM)
    gradient = np.random.default_rng(3).standard_normal((ROWS, DIM)).astype(F32)
    values = tuple(x if x.ndim == 2 else x[:, None] for x in state)
    expected = jitted(pair)(values, gradient, F32(0.125))
    shape = {1: (-1,), 3: (2, ROWS // 2, -1)}[rank]
    if rank == 1:
        values, gradient = tuple(x[4] for x in values), gradient[4]
        expected = tuple(x[4] for x in expected)
    tile = tuple(x.reshape(shape) for x in values), gradient.reshape(shape)
    new = pair.rule.step(*tile, F32(0.125))
    for got, whole in zip(new, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(got).reshape(whole.shape), whole, rtol=2e-5, atol=1e-5
        )


def test_first_step_of_a_row_with_bias_correction_is_the_rate():
    # Whatever the betas: also where 1 - beta has few digits in float32.
    for betas in ((0.9, 0.999), (0.0, 0.5), (0.99, 0.9999999), (0.9999999, 0.99999)):
        rule = rules.AdamRule(*betas, epsilon=1e-12, bias_correction="row")
        gradient = np.array([[0.5, -2.0, 30.0, -0.01]], F32)
        zeros = np.zeros_like(gradient)
        state = (zeros, zeros, zeros, np.zeros((1, 1), F32))
        new = jax.jit(rule.step)(state, gradient, F32(0.125))
        np.testing.assert_allclose(new[0], -0.125 * np.sign(gradient), rtol=1e-6)
        assert new[3] == 1


def test_rows_have_their_own_step_counts():
    rule = rules.AdamRule(0.5, 0.75, 1e-6, bias_correction="row")
    gradient, counts = jnp.ones((3, 2)), jnp.float32([[0], [1], [10**6]])
    w, m, v = (jnp.full((3, 2), x) for x in (0.0, 0.5, 0.25))
    w, _, _, new_counts = rule.step((w, m, v, counts), gradient, jnp.float32(1))
    # m = .25 + .5, v = .1875 + .25; t = 1: sqrt(.25) / .5, t = 2: sqrt(.4375) / .75
    factors = np.array([1, 0.4375**0.5 / 0.75, 1])
    step = factors * 0.75 / (0.4375 + 1e-12) ** 0.5
    np.testing.assert_allclose(w, -np.stack([step, step], 1), rtol=1e-6)
    np.testing.assert_array_equal(new_counts, [[1], [2], [10**6 + 1]])


def test_limits_surround_the_step_of_any_rule():
    limits = Limits.of((-1.0, 2.0), -3.0, 4.0)
    numbers = StepNumbers(*jnp.float32([0.5, 0.25, 10]))
    w = jnp.float32([[8.0, 8.0, -8.0, 2.0]])
    gradient = jnp.float32([[1.0, -1.0, 0.05, 0.0]])
    (new,) = step_tile(rules.SGDRule(), limits, (w,), gradient, numbers)
    # Scaled and clipped: 2, -1, .5, 0; decayed: 6, 6, -6, 1.5; then the step.
    np.testing.assert_array_equal(new, [[4.0, 4.0, -3.0, 1.5]])


def test_limits_that_are_open_do_nothing():
    w, gradient = jnp.float32([[8.0, jnp.nan]]), jnp.float32([[3.0, 1.0]])
    numbers = StepNumbers(jnp.float32(0.5))
    (new,) = step_tile(rules.SGDRule(), Limits(), (w,), gradient, numbers)
    np.testing.assert_array_equal(new, [[6.5, np.nan]])
