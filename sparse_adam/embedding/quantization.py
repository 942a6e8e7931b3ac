"""Simulated quantization: what a table in few bits would have given."""

import functools

import jax
import jax.numpy as jnp

from sparse_adam.embedding.config import QuantizationConfig


def simulate_quantization(x: jax.Array, config: QuantizationConfig) -> jax.Array:
    """Returns `x` rounded to the nearest bucket of `config`; halves round up.

    Its derivative is that of `x`: the gradient passes straight through, also where `x`
    was clipped.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> config = QuantizationConfig(num_buckets=3, lower=-1.0, upper=1.0)
        >>> x = jnp.array([-7.0, -0.4, 0.5, 0.9])
        >>> print(simulate_quantization(x, config))
        [-1.  0.  1.  1.]
        >>> print(jax.grad(lambda x: simulate_quantization(x, config).sum())(x))
        [1. 1. 1. 1.]
    """
    return _round_to_bucket(x, config)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _round_to_bucket(x: jax.Array, config: QuantizationConfig) -> jax.Array:
    lower, upper = (jnp.asarray(b, x.dtype) for b in (config.lower, config.upper))
    bucket = (upper - lower) / jnp.asarray(config.num_buckets - 1, x.dtype)
    return (
        jnp.floor((jnp.clip(x, lower, upper) - lower) / bucket + 0.5) * bucket + lower
    )


@_round_to_bucket.defjvp
def _straight_through(
    config: QuantizationConfig,
    primals: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    return simulate_quantization(primals[0], config), tangents[0]
