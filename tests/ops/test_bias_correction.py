"""The rate that gives the update Adam's bias correction."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import (
    AdamState,
    bias_corrected_learning_rate,
    sparse_adam_update,
    sparse_update,
)
from sparse_adam.rules import AdamRule
from tests import goldens
from tests.helpers import ULP

STEPS = (1, 2, 3, 10, 100, 999, 1000, 4321, 10**5, 10**6, 2**24 + 1, 10**9)
BETAS = ((0.9, 0.999), (0.0, 0.0), (0.5, 0.99), (0.99, 0.9999), (0.9, 0.999999))


def exact(learning_rate, step, beta_1, beta_2):
    """In float64; `1 - beta**step` itself would lose the digits of a small step."""
    with np.errstate(divide="ignore"):
        first, second = (-np.expm1(step * np.log(beta)) for beta in (beta_1, beta_2))
    return learning_rate * np.sqrt(second) / first


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("step", STEPS)
def test_exact_at_small_and_large_steps(step, betas):
    rate = bias_corrected_learning_rate(0.1, step, *betas)
    assert (rate.dtype, rate.shape) == (jnp.float32, ())
    assert float(rate) == pytest.approx(exact(0.1, step, *betas), rel=4 * ULP)


def test_as_tensorflow_makes_it():
    for step in (1, 2, 3):
        rate = bias_corrected_learning_rate(0.1, step)
        assert float(rate) == pytest.approx(goldens.corrected(0.1, step), rel=4 * ULP)


@pytest.mark.parametrize("kind", [int, np.int64, np.asarray, jnp.asarray])
def test_kinds_of_steps(kind):
    rate = bias_corrected_learning_rate(0.1, kind(7))
    assert float(rate) == pytest.approx(exact(0.1, 7, 0.9, 0.999), rel=4 * ULP)


def test_traced_steps_and_rates():
    rate = jax.jit(bias_corrected_learning_rate)(0.1, 7)
    assert float(rate) == pytest.approx(exact(0.1, 7, 0.9, 0.999), rel=4 * ULP)
    steps = np.arange(1, 50)
    rates = jax.jit(jax.vmap(bias_corrected_learning_rate, (None, 0)))(0.1, steps)
    np.testing.assert_allclose(rates, exact(0.1, steps, 0.9, 0.999), rtol=4 * ULP)


def test_an_array_of_steps():
    steps = np.arange(1, 50)
    rates = bias_corrected_learning_rate(0.1, steps)
    np.testing.assert_allclose(rates, exact(0.1, steps, 0.9, 0.999), rtol=4 * ULP)


def test_a_traced_step_below_one_counts_as_one():
    rate = jax.jit(bias_corrected_learning_rate)(0.1, 0)
    assert rate == bias_corrected_learning_rate(0.1, 1)


@pytest.mark.parametrize("step", [0, -1, np.array([1, 0])])
def test_a_step_below_one_is_an_error(step):
    with pytest.raises(ValueError, match=r"step=.* must be at least 1"):
        bias_corrected_learning_rate(0.1, step)


@pytest.mark.parametrize("name", ["beta_1", "beta_2"])
@pytest.mark.parametrize("beta", [-0.1, 1.0, float("nan")])
def test_a_beta_out_of_range_is_an_error(name, beta):
    with pytest.raises(ValueError, match=f"{name}={beta} must be >= 0 and < 1"):
        bias_corrected_learning_rate(0.1, 1, **{name: beta})


@pytest.mark.parametrize(
    ("lazy_adam", "expected"),
    [(True, goldens.LAZY_TABLE), (False, goldens.KERAS_TABLE)],
)
def test_equals_lazy_adam_and_keras_adam(lazy_adam, expected):
    table, slots = np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32)
    state = (table, slots, slots)
    for step, (ids, grads) in enumerate(goldens.E_BATCHES, start=1):
        state = sparse_adam_update(
            *state,
            np.asarray(ids),
            np.array(grads, np.float32),
            learning_rate=bias_corrected_learning_rate(0.1, step),
            lazy_adam=lazy_adam,
            sum_inside_sqrt=False,
        )
    np.testing.assert_allclose(state[0], expected, rtol=0, atol=2e-6)


def adamw(table, grads, rates, weight_decay, epsilon):
    """The loop that `torch.optim.AdamW` documents, in float64."""
    beta_1, beta_2 = 0.9, 0.999
    w = table.astype(np.float64)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        w = w - rate * weight_decay * w
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g * g
        corrected_m, corrected_v = m / (1 - beta_1**t), v / (1 - beta_2**t)
        w = w - rate * corrected_m / (np.sqrt(corrected_v) + epsilon)
    return w


@pytest.mark.parametrize("by", ["rate", "row"])
def test_the_recipe_of_adamw(by):
    """That of docs/semantics.md, with a schedule of both the rate and the decay."""
    random = np.random.default_rng(0)
    table = random.normal(size=(6, 4)).astype(np.float32)
    ids = np.arange(6, dtype=np.int32)
    grads = random.normal(size=(29, 6, 4)).astype(np.float32)
    rates = np.float32(0.1) / np.arange(1, 30, dtype=np.float32)
    options: Any = {"epsilon": 1e-8, "sum_inside_sqrt": False}

    @jax.jit
    def by_rate(state: AdamState, grads, step, rate):
        return sparse_adam_update(
            *state,
            ids,
            grads,
            learning_rate=bias_corrected_learning_rate(rate, step),
            weight_decay_factor=rate * np.float32(0.5),
            **options,
        )

    @jax.jit
    def by_row(state, grads, step, rate):
        del step
        return sparse_update(
            *(state, ids, grads, AdamRule(bias_correction="row", **options)),
            learning_rate=rate,
            weight_decay_factor=0.5,
            multiply_weight_decay_factor_by_learning_rate=True,
        )

    update = by_rate if by == "rate" else by_row
    zeros = jnp.zeros_like(table)
    state: Any = AdamState(jnp.asarray(table), zeros, zeros)
    if by == "row":
        state = (*state, jnp.zeros(6))
    for step, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        state = update(state, g, step, rate)
    assert cast(Any, update)._cache_size() == 1
    expected = adamw(table, grads, rates, 0.5, 1e-8)
    moved = np.abs(expected - table).max()
    np.testing.assert_allclose(state[0], expected, atol=2e-5 * moved)
