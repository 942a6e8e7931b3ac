"""Two towers in Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from shop import batches, features, first_weights

from sparse_adam.embedding import Adam
from sparse_adam.equinox import Embeddings, apply_updates, dense, filter_value_and_grad


class TwoTower(eqx.Module):
    embeddings: Embeddings
    tower: jax.Array

    def __call__(self, ids):
        rows = self.embeddings(ids)
        user = jnp.tanh((rows["user"] + rows["history"]) @ self.tower)
        return (user * rows["candidate"]).sum(1)


def loss_of(model, ids, clicked):
    logits = model(ids)
    return jnp.mean(jax.nn.softplus(logits) - clicked * logits)


def train():
    embeddings = Embeddings(features, Adam(0.05), key=jax.random.key(0))
    model, tx = TwoTower(embeddings, first_weights(None, (16, 16))), optax.sgd(0.1)

    @eqx.filter_jit(donate="all")  # donated: the tables are updated in place
    def step(model, opt_state, ids, clicked):
        loss, gradients = filter_value_and_grad(loss_of)(model, ids, clicked)
        updates, opt_state = tx.update(gradients.dense, opt_state)
        return apply_updates(model, updates, gradients), opt_state, loss

    opt_state, losses = tx.init(dense(model)), []
    for ids, clicked in batches():
        model, opt_state, loss = step(model, opt_state, ids, clicked)
        losses.append(float(loss))
    return losses
