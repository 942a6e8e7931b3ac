"""Rounding to bfloat16: exact to the nearest, right on average with noise."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import pallas as pl

from sparse_adam.kernels import rounding
from sparse_adam.kernels.layout import PackedLayout
from sparse_adam.kernels.vmem import PackedGroups
from tests.kernels.row_kernels import plainly

ODD = np.array(
    [0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 3.4e38, -3.3961e38, 1.00390625],
    np.float32,
)


# One bit, all bits, the upper or the lower half of the fraction of a NaN, quiet or not.
PAYLOADS = (1, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x3F0000, 0x400000, 0x400001, 0x7FFFFF)
NANS = [0x7F800000 | payload for payload in PAYLOADS]
# Infinity and 0; the smallest and the largest subnormal and normal number; what just
# rounds to infinity, and what does not; ties to even, and beside them.
NUMBERS = [
    *(0x7F800000, 0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF),
    *(0x7FFF, 0x8000, 0x8001, 0x17FFF, 0x18000, 0x18001),
    *(0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F817FFF, 0x3F818000, 0x3F818001),
]


def specials():
    """float32 `[n, 128]`, of both signs, and as many that are random."""
    bits = np.array(NANS + NUMBERS, np.uint32)
    bits = np.concatenate([bits, bits | np.uint32(2**31)])
    bits = np.resize(bits, (8, 128))
    noise = np.random.default_rng(0).integers(0, 2**32, bits.shape, np.uint32)
    return np.concatenate([bits, noise]).view(np.float32)


def nearest(x):
    """What ml_dtypes makes of it: uint16, and where it is a NaN."""
    with np.errstate(invalid="ignore"):
        return x.astype(ml_dtypes.bfloat16).view(np.uint16), np.isnan(x)


def check_nearest(bits, x):
    """Bit for bit, and any NaN for a NaN."""
    expected, nan = nearest(x)
    np.testing.assert_array_equal(bits[~nan], expected[~nan])
    assert np.isnan(bits.view(ml_dtypes.bfloat16)[nan].astype(np.float32)).all()


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


def test_specials_to_the_nearest():
    x = specials()
    words = np.asarray(rounding.round_to_bfloat16(jnp.asarray(x)))
    assert not (words & 0xFFFF).any()
    check_nearest((words.view(np.uint32) >> 16).astype(np.uint16), x)


def test_specials_to_the_nearest_in_an_interpreted_kernel(run_in_tpu_interpreter):
    # All three arrays of a packed table: one has its words to itself, two share them.
    layout = PackedLayout(16, 128, (np.dtype(jnp.bfloat16),) * 3)
    assert layout.planes == ((0,), (1, 2))

    def kernel(w, m, v, alone, shared):
        alone[...], shared[...] = PackedGroups(layout).words((w[...], m[...], v[...]))

    words = jax.ShapeDtypeStruct((16, 128), jnp.int32)
    w, m, v = specials(), specials()[::-1].copy(), specials()[:, ::-1].copy()

    def call(*values):
        return pl.pallas_call(kernel, out_shape=(words, words), interpret=True)(*values)

    for run in (plainly, run_in_tpu_interpreter):
        alone, shared = (np.asarray(x).view(np.uint32) for x in run(call, w, m, v))
        assert not (alone & 0xFFFF).any()
        for halves, x in ((alone >> 16, w), (shared & 0xFFFF, m), (shared >> 16, v)):
            check_nearest(halves.astype(np.uint16), x)


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
