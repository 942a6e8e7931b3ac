"""Two towers in plain JAX: what the layers of the other files do under the hood."""

import jax
import jax.numpy as jnp
from shop import batches, features, first_weights, loss_of

from sparse_adam.embedding import Adam, apply_gradients, init, lookup


def model_loss(tower, rows, clicked):
    user = jnp.tanh((rows["user"] + rows["history"]) @ tower)
    return loss_of((user * rows["candidate"]).sum(1), clicked)


def train():
    state = init(features, Adam(0.01), jax.random.key(0))
    tower = first_weights(None, (16, 16))

    def step(state, tower, ids, clicked):
        rows = lookup(state, ids)
        loss, (by_tower, by_rows) = jax.value_and_grad(model_loss, argnums=(0, 1))(
            tower, rows, clicked
        )
        return apply_gradients(state, ids, by_rows), tower - 0.1 * by_tower, loss

    step, losses = jax.jit(step, donate_argnums=0), []
    for ids, clicked in batches():
        state, tower, loss = step(state, tower, ids, clicked)
        losses.append(float(loss))
    return losses
