"""Rounding to bfloat16: exact to the nearest, right on average with noise."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sparse_adam.kernels import rounding

ODD = np.array(
    [0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 3.4e38, -3.3961e38, 1.00390625],
    np.float32,
)


def as_bfloat16(words):
    assert (np.asarray(words) & 0xFFFF == 0).all()
    return np.asarray(words).view(np.float32)


def test_to_the_nearest():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    ties = (bits.view(np.uint32) & np.uint32(0xFFFF0000) | np.uint32(0x8000)).view("f4")
    for x in (bits, ties, ODD):
        rounded = as_bfloat16(rounding.round_to_bfloat16(jnp.asarray(x)))
        with np.errstate(invalid="ignore"):
            expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(rounded, expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_stochastic_rounding_is_a_neighbour_and_unbiased(sign):
    # 100 numbers between two bfloat16, each rounded 10,000 times.
    rng = np.random.default_rng(0)
    share = rng.random(100).astype(np.float32)
    low, unit = 1.5, 2.0**-7
    x = np.float32(sign) * (np.float32(low) + share * np.float32(unit))
    share = (np.abs(x).astype(np.float64) - low) / unit
    elements = jnp.arange(100 * 10_000, dtype=jnp.int32).reshape(10_000, 100)
    noise = rounding.noise(jnp.int32(123), elements)
    x = jnp.broadcast_to(jnp.asarray(x), elements.shape)
    up = (np.abs(as_bfloat16(rounding.round_to_bfloat16(x, noise))) - low) / unit
    assert set(np.unique(up)) == {0.0, 1.0}
    error = (up.mean(axis=0) - share) / np.sqrt(share * (1 - share) / 10_000)
    assert np.abs(error).max() < 4.5
    assert np.abs(error.mean()) < 4.5 / 10


def test_stochastic_rounding_keeps_what_is_bfloat16_already():
    x = jnp.asarray(ODD.astype(ml_dtypes.bfloat16).astype(np.float32))
    for seed in range(20):
        noise = rounding.noise(jnp.int32(seed), jnp.arange(x.size, dtype=jnp.int32))
        rounded = as_bfloat16(rounding.round_to_bfloat16(x, noise))
        np.testing.assert_array_equal(rounded, x)


def test_noise_is_even_and_unlike_its_neighbours():
    # Each of the 16 bits that count, over elements and over seeds. A hash of 32 bits is
    # no cipher: bits of neighbours agree 0.15 % more or less often than they should.
    elements = jnp.arange(2**16, dtype=jnp.int32)
    seeds = jax.random.bits(jax.random.key(0), (64,), jnp.uint32).astype(jnp.int32)
    bits = np.asarray(rounding.noise(seeds[:, None], elements[None]))
    bits = bits[..., None] >> np.arange(16) & 1
    sigma = 0.5 / np.sqrt(bits[..., 0].size)
    assert np.abs(bits.mean(axis=(0, 1)) - 0.5).max() < 5 * sigma
    for lag in (1, 2, 16, 128):
        same = (bits[:, lag:] == bits[:, :-lag]).mean(axis=(0, 1))
        assert np.abs(same - 0.5).max() < 0.0025
    same = (bits[1:] == bits[:-1]).mean(axis=(0, 1))
    assert np.abs(same - 0.5).max() < 0.0025
