"""The rules in float32 against what torch, FBGEMM and TensorFlow computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam.rules import Limits, StepNumbers, step_tile
from tests.peers import PEERS


@pytest.mark.parametrize("peer", PEERS, ids=str)
def test_rules_equal_their_peers(peer):
    @jax.jit
    def step(values, gradient, numbers):
        return step_tile(peer.rule, Limits(), values, gradient, numbers)

    def update(state, ids, grads, *, learning_rate, weight_decay_factor=0.0, **flags):
        if flags:
            weight_decay_factor *= learning_rate
        rate, decay = jnp.float32(learning_rate), jnp.float32(weight_decay_factor)
        numbers = StepNumbers(rate, decay)
        rows = np.unique(ids)
        summed = np.stack([grads[ids == row].sum(axis=0) for row in rows])
        values = tuple(x[rows].reshape(len(rows), -1) for x in state)
        new = tuple(x.copy() for x in state)
        for array, changed in zip(new, step(values, summed, numbers), strict=True):
            array[rows] = np.asarray(changed).reshape(array[rows].shape)
        return new

    # A handful of roundings a step, relative to the largest number of an array.
    peer.check(update, np.float32, rtol=2e-6)
