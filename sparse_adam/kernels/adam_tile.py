"""The Adam update of one tile of rows: the one formula of the package.

Every kernel and the portable XLA path call `adam_tile`; the only other place where
the formula stands is the NumPy loop of `sparse_adam.reference`.

Numerics: everything is float32. `1 - beta` and `epsilon**2` are formed in float32
too, as TensorFlow's SparseCore program forms them (there `1 - 0.999` is 0.0009999871).
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_adam._types import Rate, Tile
from sparse_adam.kernels.problem import Hyperparams


def adam_tile(
    w: Tile, m: Tile, v: Tile, gradient: Tile, learning_rate: Rate, hyper: Hyperparams
) -> tuple[Tile, Tile, Tile]:
    """Returns the new `(w, m, v)` of rows whose summed gradient is `gradient`.

    In this order: clip the gradient, decay the weights, advance both moments with the
    undecayed gradient, step, clip the weights.
    """
    one = np.float32(1)
    beta_1, beta_2 = np.float32(hyper.beta_1), np.float32(hyper.beta_2)
    epsilon = np.float32(hyper.epsilon)

    gradient = clip(gradient, hyper.clip_gradient_min, hyper.clip_gradient_max)
    if hyper.weight_decay_factor:
        decay = np.float32(hyper.weight_decay_factor)
        if hyper.multiply_weight_decay_factor_by_learning_rate:
            decay = decay * learning_rate
        w = w - decay * w
    m = beta_1 * m + (one - beta_1) * gradient
    v = beta_2 * v + (one - beta_2) * gradient * gradient
    if hyper.sum_inside_sqrt:
        # One EUP instruction on a TPU, where a root and a division are many.
        step = learning_rate * m * lax.rsqrt(v + epsilon * epsilon)
    else:
        step = learning_rate * m / (jnp.sqrt(v) + epsilon)
    return clip(w - step, hyper.clip_weight_min, hyper.clip_weight_max), m, v


def clip(x: Tile, low: float | None, high: float | None) -> Tile:
    """Clips elementwise; a side that is None stays open and a NaN stays a NaN."""
    if low is not None:
        x = jnp.maximum(x, np.float32(low))
    if high is not None:
        x = jnp.minimum(x, np.float32(high))
    return x
