"""Two towers in Flax NNX."""

import jax.numpy as jnp
import optax
from flax import nnx
from shop import batches, features, first_weights, loss_of

from sparse_adam.embedding import Adam
from sparse_adam.nnx import Embeddings, Optimizer, value_and_grad


class TwoTower(nnx.Module):
    def __init__(self, rngs):
        self.embeddings = Embeddings(features, Adam(0.01), rngs=rngs)
        options = {"use_bias": False, "kernel_init": first_weights}
        self.tower = nnx.Linear(16, 16, rngs=rngs, **options)

    def __call__(self, ids):
        rows = self.embeddings(ids)
        user = jnp.tanh(self.tower(rows["user"] + rows["history"]))
        return (user * rows["candidate"]).sum(1)


def model_loss(model, ids, clicked):
    return loss_of(model(ids), clicked)


@nnx.jit(donate_argnums=(0, 1))  # donated: the tables are updated in place
def step(model, optimizer, ids, clicked):
    loss, gradients = value_and_grad(model_loss)(model, ids, clicked)
    optimizer.update(model, gradients)
    return loss


def train():
    model = TwoTower(nnx.Rngs(0))
    optimizer = Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    return [float(step(model, optimizer, *batch)) for batch in batches()]
