"""Two towers in Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from shop import batches, features, first_weights, loss_of

from sparse_adam import equinox as sparse
from sparse_adam.embedding import Adam


class TwoTower(eqx.Module):
    embeddings: sparse.Embeddings
    tower: jax.Array

    def __call__(self, ids):
        rows = self.embeddings(ids)
        user = jnp.tanh((rows["user"] + rows["history"]) @ self.tower)
        return (user * rows["candidate"]).sum(1)


def train():
    embeddings = sparse.Embeddings(features, Adam(0.01), key=jax.random.key(0))
    model, tx = TwoTower(embeddings, first_weights(None, (16, 16))), optax.sgd(0.1)

    @eqx.filter_jit(donate="all")  # donated: the tables are updated in place
    def step(model, opt_state, ids, clicked):
        model_loss = sparse.filter_value_and_grad(lambda m: loss_of(m(ids), clicked))
        loss, gradients = model_loss(model)
        updates, opt_state = tx.update(gradients.dense, opt_state)
        return sparse.apply_updates(model, updates, gradients), opt_state, loss

    opt_state, losses = tx.init(sparse.dense(model)), []
    for ids, clicked in batches():
        model, opt_state, loss = step(model, opt_state, ids, clicked)
        losses.append(float(loss))
    return losses
