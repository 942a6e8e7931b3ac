"""Two towers in Keras 3 on JAX: set KERAS_BACKEND=jax before you start Python."""

import functools

import keras
from shop import batches, features, first_weights

from sparse_adam.embedding import Adam
from sparse_adam.keras import Embeddings, Model


class TwoTower(Model):
    def __init__(self):
        super().__init__()
        self.embeddings = Embeddings(features, Adam(0.01))
        self.tower = keras.layers.Dense(16, activation="tanh", use_bias=False)
        self.tower.kernel_initializer = functools.partial(first_weights, None)

    def call(self, ids):
        rows = self.embeddings(ids)
        user = self.tower(rows["user"] + rows["history"])
        return keras.ops.sum(user * rows["candidate"], axis=1, keepdims=True)


def train():
    model, losses = TwoTower(), []
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss=loss)
    for ids, clicked in batches():  # a fit for each, to see the loss of each
        fitted = model.fit(ids, clicked[:, None], verbose=0)  # pyright: ignore
        losses += fitted.history["loss"]
    return losses
