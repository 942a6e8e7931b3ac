"""Simulated quantization: formula, forward pass, straight-through gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam.embedding import (
    Adam,
    FeatureConfig,
    QuantizationConfig,
    TableConfig,
    apply_gradients,
    init,
    lookup,
    serving_embedding_lookup,
)
from sparse_adam.embedding.quantization import simulate_quantization


def expected(x, buckets, lower, upper):
    """The formula of the proto's comment, in float64."""
    x = np.clip(np.asarray(x, np.float64), lower, upper)
    q = (upper - lower) / (buckets - 1)
    return np.floor((x - lower) / q + 0.5) * q + lower


@pytest.mark.parametrize("config", [(2, 0.0, 1.0), (5, -1.0, 1.0), (256, -0.3, 2.0)])
def test_the_formula(config):
    x = np.linspace(-3, 3, 1001, dtype=np.float32)
    got = simulate_quantization(jnp.asarray(x), QuantizationConfig(*config))
    want = expected(x, *config)
    apart = np.abs(got - want) > 1e-6
    assert apart.sum() <= 2  # a tie that float32 rounds to the other side
    assert len(np.unique(np.asarray(got))) == min(config[0], 1001)


def test_forward_before_the_combiner_and_straight_through():
    quantization = QuantizationConfig(3, -1.0, 1.0)

    def weights(key, shape, dtype):
        return jnp.array([[0.4, 0.6], [-5.0, 0.9], [0.2, -0.6]], dtype)

    def state_of(quantization):
        table = TableConfig(
            3, 2, weights, combiner="mean", name="t", quantization_config=quantization
        )
        return init(FeatureConfig(table), Adam(0.1), jax.random.key(0))

    state, plain = state_of(quantization), state_of(None)
    ids = jnp.array([[0, 1], [2, -1]])
    # Rounded: [0, 1], [-1, 1], [0, -1].
    np.testing.assert_allclose(lookup(state, ids), [[-0.5, 1], [0, -1]])
    stored = serving_embedding_lookup(state, ids)
    np.testing.assert_allclose(stored, lookup(plain, ids))

    gradient = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    new, new_plain = (apply_gradients(s, ids, gradient) for s in (state, plain))
    for a, b in zip(new.tables["t"], new_plain.tables["t"], strict=True):
        np.testing.assert_array_equal(a, b)

    def by_table(state):
        return (lookup(state, ids) * gradient).sum()

    dense = jax.grad(by_table)(state).tables["t"].table
    np.testing.assert_allclose(dense, [[0.5, 1], [0.5, 1], [3, 4]])
