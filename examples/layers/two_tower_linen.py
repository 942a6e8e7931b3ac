"""Two towers in Flax Linen."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from shop import batches, features, first_weights, loss_of

from sparse_adam.embedding import Adam
from sparse_adam.linen import Embeddings, TrainState, value_and_grad


class TwoTower(nn.Module):
    @nn.compact
    def __call__(self, ids):
        rows = Embeddings(features, Adam(0.01))(ids)
        tower = nn.Dense(16, use_bias=False, kernel_init=first_weights)
        user = jnp.tanh(tower(rows["user"] + rows["history"]))
        return (user * rows["candidate"]).sum(1)


def step(state, ids, clicked):
    def model_loss(params):
        logits = state.apply_fn({"params": params, "tables": state.tables}, ids)
        return loss_of(logits, clicked)

    loss, gradients = value_and_grad(model_loss)(state.params)
    return state.apply_gradients(grads=gradients), loss


def train():
    model, losses = TwoTower(), []
    variables = model.init(jax.random.key(0), batches()[0][0])
    state = TrainState.create(apply_fn=model.apply, tx=optax.sgd(0.1), **variables)
    jitted = jax.jit(step, donate_argnums=0)  # donated: tables are updated in place
    for ids, clicked in batches():
        state, loss = jitted(state, ids, clicked)
        losses.append(float(loss))
    return losses
