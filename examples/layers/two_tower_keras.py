"""Two towers in Keras 3 on JAX: set KERAS_BACKEND=jax before you start Python."""

import keras
import numpy as np
from shop import batches, features, first_weights

from sparse_adam.embedding import Adam
from sparse_adam.keras import Embeddings, Model


class TwoTower(Model):
    def __init__(self):
        super().__init__()
        self.embeddings = Embeddings(features, Adam(0.05))
        options = {"use_bias": False, "kernel_initializer": first_weights}
        self.tower = keras.layers.Dense(16, activation="tanh", **options)

    def call(self, ids):
        rows = self.embeddings(ids)
        user = self.tower(rows["user"] + rows["history"])
        return keras.ops.sum(user * rows["candidate"], axis=1, keepdims=True)


class Losses(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        self.model.reset_metrics()  # so that the loss is of one batch

    def on_train_batch_end(self, batch, logs=None):
        self.seen = [*getattr(self, "seen", []), float(logs["loss"])]


def train():
    model, losses = TwoTower(), Losses()
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss=loss)
    ids, clicked = (list(part) for part in zip(*batches(), strict=True))
    ids = {name: np.concatenate([each[name] for each in ids]) for name in ids[0]}
    clicked = np.concatenate(clicked)[:, None]
    model.fit(ids, clicked, batch_size=32, shuffle=False, verbose=0, callbacks=[losses])
    return losses.seen
