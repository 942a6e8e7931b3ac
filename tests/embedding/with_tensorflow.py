"""TensorFlow itself, on a CPU: its lookup, and the Adams of its that this one equals.

It needs the extra `parity`, and so stands apart from the tests that always run:

    pip install '.[test,parity]'
    pytest tests/embedding/with_tensorflow.py
"""

import functools
import importlib
import warnings
from typing import Any

import jax
import numpy as np
import pytest

from sparse_adam import Adam, bias_corrected_learning_rate
from sparse_adam.embedding import (
    FeatureConfig,
    Ragged,
    Sparse,
    TableConfig,
    init,
    lookup,
    serving_embedding_lookup,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tf: Any = importlib.import_module("tensorflow")

V, D, B = 13, 5, 6
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)


def table():
    return np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)


def rows(seed=1):
    """Ids and weights of B samples: one is empty, and ids repeat."""
    rng = np.random.default_rng(seed)
    lengths = [2, 0, 4, 1, 3, 3]
    ids = [rng.integers(0, V, n).tolist() for n in lengths]
    weights = [rng.choice([-1.0, 0.0, 0.5, 2.0], n).tolist() for n in lengths]
    ids[0], weights[0] = [3, 3], [1.0, -1.0]  # a sum of 0
    return ids, weights


def ours(combiner, ids, weights=None, *, served=True, **options):
    config = FeatureConfig(
        TableConfig(V, D, lambda *_: jax.numpy.asarray(table()), combiner=combiner),
        **options,
    )
    state = init(config, Adam(), jax.random.key(0))
    look_up = serving_embedding_lookup if served else lookup
    return np.asarray(look_up(state, ids, weights))


def tensorflows(combiner, ids, weights=None, **options):
    api = tf.tpu.experimental.embedding
    config = api.TableConfig(V, D, combiner=combiner, name="t")
    feature = api.FeatureConfig(config, name="f", **options)
    tables = {config: tf.Variable(table())}
    return api.serving_embedding_lookup(ids, weights, tables, feature).numpy()


def both_ragged(values):
    dtype = np.int64 if isinstance(values[0][0], int) else np.float32
    ragged = Ragged.from_rows(values)
    ragged = Ragged(np.asarray(ragged.values, dtype), ragged.row_splits)
    theirs = tf.RaggedTensor.from_row_splits(ragged.values, ragged.row_splits)
    return ragged, theirs


def both_sparse(values):
    dtype = np.int64 if isinstance(values[0][0], int) else np.float32
    places = [(b, k) for b, row in enumerate(values) for k in range(len(row))]
    flat = np.array([x for row in values for x in row], dtype)
    sparse = Sparse(np.array(places), flat, (B, 4))
    return sparse, tf.SparseTensor(np.array(places, np.int64), flat, (B, 4))


def test_dense():
    ids = np.array([1, 12, 1, 0])
    expected = tensorflows("mean", tf.constant(ids))
    np.testing.assert_array_equal(ours("mean", ids), expected)
    # TensorFlow keeps a trailing 1 when it serves, but not when it trains on a TPU.
    column = tensorflows("mean", tf.constant(ids[:, None]))
    assert column.shape == (4, 1, D)
    np.testing.assert_array_equal(ours("mean", ids[:, None]), column[:, 0])


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", ["ragged", "sparse", "sparse_unsafe"])
def test_combined(combiner, weighted, form):
    convert = both_ragged if form == "ragged" else both_sparse
    options = {"validate_weights_and_indices": form != "sparse_unsafe"}
    ids, weights = rows()
    (own_ids, their_ids), (own_weights, their_weights) = convert(ids), convert(weights)
    if not weighted:
        own_weights = their_weights = None
    got = ours(combiner, own_ids, own_weights, **options)
    expected = tensorflows(combiner, their_ids, their_weights, **options)
    assert_close(got, expected)
    if not weighted or form != "sparse":  # in training no weight is dropped
        trained = ours(combiner, own_ids, own_weights, served=False, **options)
        assert_close(trained, expected)


@pytest.mark.parametrize("length", [2, 6])
@pytest.mark.parametrize("convert", [both_ragged, both_sparse])
def test_sequences(length, convert):
    own, theirs = convert(rows()[0])
    got = ours("mean", own, max_sequence_length=length)
    expected = tensorflows("mean", theirs, max_sequence_length=length)
    assert_close(got, expected)


@pytest.mark.parametrize("shape", [(2, 3), (B, 2), (3, 2, 3)])
def test_output_shapes_of_ragged_ids(shape):
    own, theirs = both_ragged(rows()[0])
    got = ours("mean", own, output_shape=shape)
    expected = tensorflows("mean", theirs, output_shape=shape)
    assert_close(got, expected.reshape(*shape, D))


def test_negative_ids_are_dropped_when_sparse():
    ids, _ = rows()
    ids[2][1] = -1
    (own, theirs) = both_sparse(ids)
    assert_close(ours("mean", own), tensorflows("mean", theirs))


def steps():
    rng = np.random.default_rng(5)
    for number in range(1, 6):
        ids = rng.integers(0, V, 7)
        ids[0] = ids[1]
        grads = rng.normal(size=(7, D)).astype(np.float32)
        yield number, ids, grads


def train(lazy):
    adam = Adam(lazy_adam=lazy, sum_inside_sqrt=False)
    state = adam.init(table())
    for number, ids, grads in steps():
        rate = bias_corrected_learning_rate(0.01, number)
        state = adam.update(state, ids, grads, learning_rate=rate)
        yield jax.tree.map(np.asarray, state)


def test_not_lazy_is_tensorflows_adam():
    adam = tf.compat.v1.train.AdamOptimizer(0.01, epsilon=1e-7)
    weights = tf.Variable(table())
    for (_, ids, grads), state in zip(steps(), train(lazy=False), strict=True):
        gradient = tf.IndexedSlices(tf.constant(grads), tf.constant(ids), (V, D))
        adam.apply_gradients([(gradient, weights)])
        assert_close(state.table, weights.numpy())
        for slot, array in (("m", state.momenta), ("v", state.velocities)):
            expected = adam.get_slot(weights, slot).numpy()
            np.testing.assert_allclose(array, expected, rtol=2e-5, atol=1e-7)


def test_lazy_is_tensorflows_adam_on_the_rows_of_the_batch():
    """LazyAdam, by TensorFlow's own kernel run on the rows that were looked up."""
    weights, m, v = (
        tf.Variable(x) for x in (table(), np.zeros((V, D), "f"), np.zeros((V, D), "f"))
    )
    for (number, ids, grads), state in zip(steps(), train(lazy=True), strict=True):
        unique, where = tf.unique(tf.constant(ids))
        sums = tf.math.unsorted_segment_sum(grads, where, len(unique))
        own = [tf.Variable(tf.gather(x, unique)) for x in (weights, m, v)]
        tf.raw_ops.ResourceApplyAdam(
            var=own[0].handle,
            m=own[1].handle,
            v=own[2].handle,
            beta1_power=0.9**number,
            beta2_power=0.999**number,
            lr=0.01,
            beta1=0.9,
            beta2=0.999,
            epsilon=1e-7,
            grad=sums,
        )
        for whole, part in zip((weights, m, v), own, strict=True):
            whole.scatter_update(tf.IndexedSlices(part, unique))
        assert_close(state.table, weights.numpy())
        np.testing.assert_allclose(state.momenta, m.numpy(), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(state.velocities, v.numpy(), rtol=2e-5, atol=1e-7)
