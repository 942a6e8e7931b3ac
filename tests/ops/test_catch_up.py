"""Rows that come back make up for the steps that they have missed."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import PackedTable, reference, sparse_update
from sparse_adam.rules import AdamRule, SGDRule, initial_slots
from tests.helpers import assert_bitwise_equal

V, RATE, DECAY = 24, 0.125, 0.25
SHAPE = (8, 128)
BETAS: dict[str, Any] = {"beta_1": 0.75, "beta_2": 0.875}
RULES = {
    "plain": {"epsilon": 0.25},
    "all": {
        "epsilon": 0.25,
        "sum_inside_sqrt": False,
        "bias_correction": "row",
        "amsgrad": True,
        "epsilon_hat": False,
    },
}
BY_RATE = {
    "weight_decay_factor": DECAY,
    "multiply_weight_decay_factor_by_learning_rate": True,
}
# The number of each update, and some rows that it has; there are others.
NUMBERS = (3, 4, 9, 10, 40)


def batch(number: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(number)
    ids = rng.integers(-1, V // 2, 10).astype(np.int32)
    return ids, (rng.integers(-16, 17, (10, dim)) / 8).astype(np.float32)


def first_state(rule: AdamRule, dim: int) -> tuple[np.ndarray, ...]:
    """Returns a state from which every row has made 0 to 2 steps."""
    rng = np.random.default_rng(0)
    table, m = (rng.standard_normal((V, dim)) for _ in range(2))
    v, largest = (rng.uniform(0.25, 1, (V, dim)) for _ in range(2))
    maxima = (largest,) if rule.amsgrad else ()
    arrays = (table, m, v, *maxima, rng.integers(0, 3, V))
    return tuple(x.astype(np.float32) for x in arrays)


def expected(
    rule: AdamRule, numbers: dict[str, Any], state: Any, number: int, **options: Any
) -> tuple[np.ndarray, ...]:
    """Makes the missed steps one by one, then the step of the batch, in float64."""
    ids, grads = batch(number, state[0].shape[1])
    rows = ids if options.get("lazy", True) else np.arange(V)
    state = reference.caught_up(state, rows, number, **BETAS, decay=DECAY * RATE)
    step = reference.adam(**numbers, **BETAS, catch_up=True)
    return reference.sparse_update(
        state, ids, grads, step, learning_rate=RATE, **BY_RATE, **options
    )


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("implementation", ["xla", "cpu", "tensorcore"])
def test_equals_the_loop_over_missed_steps(implementation, name):
    rule = AdamRule(**RULES[name], **BETAS, catch_up=True)
    dim = 128 if implementation == "tensorcore" else 5
    start = first_state(rule, dim)
    modes: list[dict[str, Any]] = [{}]
    if implementation != "tensorcore":
        modes += [{"lazy": False}, {"use_gradient_accumulation": False}]
    for options in modes:

        @jax.jit
        def update(state, ids, grads, number, options=options):
            return sparse_update(
                *(state, ids, grads, rule),
                learning_rate=RATE,
                implementation=implementation,
                step=number,
                **BY_RATE,
                **options,
            )

        state: Any = tuple(map(jnp.asarray, start))
        right: Any = tuple(x.astype(np.float64) for x in start)
        touched = np.zeros(V, bool)
        for number in NUMBERS:
            ids, grads = batch(number, dim)
            touched[ids[ids >= 0]] = True
            state = update(state, ids, grads, number)
            right = expected(rule, RULES[name], right, number, **options)
        assert cast(Any, update)._cache_size() == 1
        assert not touched.all()
        for got, exact, old in zip(state, right, start, strict=True):
            np.testing.assert_allclose(got, exact, rtol=4e-6, atol=4e-6)
            if options.get("lazy", True):
                assert_bitwise_equal(np.asarray(got)[~touched], old[~touched])


def test_without_motion_it_is_the_dense_optimizer():
    """What has a closed form equals a dense loop with the gradient 0 for absent rows.

    The rows have no first moment before they come back, so a dense step moves them by
    the weight decay only.
    """
    rule = AdamRule(**BETAS, epsilon=0.25, catch_up=True)
    dense = AdamRule(**BETAS, epsilon=0.25)
    table = np.linspace(-1, 1, 4 * 8, dtype=np.float32).reshape(4, 8)
    zeros, v = np.zeros_like(table), np.full_like(table, 0.5)
    lazy: Any = tuple(map(jnp.asarray, (table, zeros, v, np.zeros(4, np.float32))))
    whole: Any = lazy[:3]
    for number in range(1, 31):
        ids = np.array([number % 2] if number < 30 else [0, 1, 2, 3])
        grads = np.zeros((ids.size, 8), np.float32)
        options: dict[str, Any] = {"learning_rate": RATE, **BY_RATE}
        lazy = sparse_update(lazy, ids, grads, rule, step=number, **options)
        whole = sparse_update(whole, ids, grads, dense, lazy=False, **options)
    for got, right in zip(lazy, whole, strict=False):
        np.testing.assert_allclose(got, right, rtol=1e-5)
    np.testing.assert_array_equal(lazy[3], np.full(4, 30))
    kept = (1 - np.float64(RATE * DECAY)) ** 30
    np.testing.assert_allclose(lazy[0][3], kept * table[3], rtol=2e-6)


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
def test_a_small_decay_keeps_its_digits_and_a_whole_one_is_finite(implementation):
    rule = AdamRule(catch_up=True)
    ones = jnp.ones(SHAPE)
    slots = initial_slots(rule, SHAPE, jnp.float32)
    for decay, step in ((1e-6, 100_001), (1.0, 1), (1.0, 4), (0.0, 4)):
        table, *_ = sparse_update(
            *((ones, *slots), jnp.array([1]), jnp.zeros((1, 128)), rule),
            learning_rate=1.0,
            weight_decay_factor=jnp.float32(decay),
            implementation=implementation,
            step=step,
        )
        kept = (1 - np.float64(np.float32(decay))) ** step
        np.testing.assert_allclose(table[1], np.full(128, kept), rtol=1e-6)


def test_where_it_cannot_run_it_says_so():
    rule = AdamRule(catch_up=True)
    ones = jnp.ones(SHAPE)
    state = (ones, *initial_slots(rule, SHAPE, jnp.float32))
    ids, grads = jnp.array([1]), jnp.ones((1, 128))
    options: dict[str, Any] = {"learning_rate": 0.1, "step": 1}
    for name in ("sweep", "sparsecore"):
        with pytest.raises(ValueError, match="its rule has numbers of whole rows"):
            sparse_update(state, ids, grads, rule, implementation=name, **options)
    with pytest.raises(ValueError, match="a packed table has no place"):
        PackedTable.init(jax.random.key(0), 8, 128, jax.nn.initializers.ones, rule=rule)


def test_steps_that_are_refused():
    rule = AdamRule(catch_up=True)
    ones = jnp.ones(SHAPE)
    state = (ones, *initial_slots(rule, SHAPE, jnp.float32))
    ids, grads = jnp.array([1]), jnp.ones((1, 128))

    def update(state, rule, step):
        return sparse_update(state, ids, grads, rule, learning_rate=0.1, step=step)

    with pytest.raises(ValueError, match=r"step=None, but AdamRule.*step=1 at the fir"):
        update(state, rule, None)
    with pytest.raises(ValueError, match=r"step=7 is of use only for .*catch_up=True"):
        update((ones,), SGDRule(), 7)
    with pytest.raises(ValueError, match="step=0 must be at least 1"):
        update(state, rule, 0)
    with pytest.raises(ValueError, match=r"step has shape \(2,\)"):
        update(state, rule, jnp.array([1, 2]))
    with pytest.raises(TypeError, match="step='one' must be a real number"):
        update(state, rule, "one")
