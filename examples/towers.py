"""The dense half of the two-tower model: plain JAX, which knows of no table.

A tower makes a unit vector of the activations of a user, or of an item.

Source: X. Yi et al., "Sampling-bias-corrected neural modeling for large corpus item
recommendations" (2019), for the loss.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Tower = dict[str, jax.Array]


class Towers(NamedTuple):
    """A small network on each side, and what has its shape: gradients and slots."""

    user: Tower
    item: Tower


def new_tower(key: jax.Array, width: int, hidden: int, dim: int) -> Tower:
    """Makes a network of one hidden layer, from `width` numbers to `dim`."""
    first, second = jax.random.split(key)
    weights = jax.nn.initializers.he_normal()
    return {
        "hidden": weights(first, (width, hidden)),
        "bias": jnp.zeros(hidden),
        "out": weights(second, (hidden, dim)),
    }


def climb(tower: Tower, *inputs: jax.Array) -> jax.Array:
    """Returns a unit vector for each row of the inputs."""
    x = jnp.concatenate(inputs, axis=1)
    x = jax.nn.relu(x @ tower["hidden"] + tower["bias"][None]) @ tower["out"]
    return x / jnp.sqrt(jnp.sum(x * x, axis=1, keepdims=True) + 1e-6)


def loss_of(
    towers: Towers,
    activations: dict[str, jax.Array],
    items: jax.Array,
    log_popularity: jax.Array,
    temperature: float,
) -> jax.Array:
    """Returns the mean over users of -log of the share of their own item.

    The other items of the batch are the negatives. They are there as often as they are
    popular, which their logits are corrected for.
    """
    user = climb(towers.user, activations["user"], activations["history"])
    item = climb(towers.item, activations["item"], activations["category"])
    logits = user @ item.T / temperature - log_popularity[None, :]
    same = items[:, None] == items[None, :]
    own = jnp.eye(len(items), dtype=bool)
    logits = jnp.where(same & ~own, -jnp.inf, logits)
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits, axis=1)))


def dense_adam(
    towers: Towers, momenta: Towers, velocities: Towers, grads: Towers, rate: jax.Array
) -> tuple[Towers, Towers, Towers]:
    """Adam of the towers, where every weight has a gradient at every step."""
    tree_map = jax.tree.map
    momenta = tree_map(lambda m, g: 0.9 * m + 0.1 * g, momenta, grads)
    velocities = tree_map(lambda v, g: 0.999 * v + 0.001 * g * g, velocities, grads)
    towers = tree_map(
        lambda w, m, v: w - rate * m / (jnp.sqrt(v) + 1e-7),
        towers,
        momenta,
        velocities,
    )
    return towers, momenta, velocities
