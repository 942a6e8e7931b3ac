"""The object under misuse: what is refused, that nothing is lost by it, and threads."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam.embedding import Adam, apply_gradients, init, lookup
from tests.embedding.test_tpu_embedding import (
    CONFIG,
    KEY,
    assert_same,
    batch,
    built,
    loss_of,
    step,
    train,
)

both_modes = pytest.mark.parametrize("pipelined", [False, True])


def gradients_of(activations):
    return jax.grad(loss_of)(activations)


@pytest.mark.parametrize(
    "use",
    [
        lambda e: e.build(),
        lambda e: e.state,
        lambda e: setattr(e, "state", init(CONFIG, Adam(0.1), KEY)),
        lambda e: e.embedding_tables,
        lambda e: e.enqueue(*batch(1)),
        lambda e: e.dequeue(),
        lambda e: e.apply_gradients(None),
        lambda e: e(*batch(1)),
        lambda e: e.serving_embedding_lookup({"user": np.array([1])}),
        lambda e: e.retrieve(),
        lambda e: e.load({}),
    ],
)
def test_inside_jit_every_method_is_refused(use):
    embedding = built()
    embedding.enqueue(*batch(0))

    @jax.jit
    def compiled(x):
        use(embedding)
        return x

    with pytest.raises(TypeError, match=r"is being traced .*pass embedding.state in"):
        compiled(1.0)
    # Nothing leaked, and the batch is still there.
    assert_same(embedding.dequeue(), embedding(*batch(0)))
    assert_same(embedding.state, init(CONFIG, Adam(0.1), KEY), rtol=0)


def test_traced_arguments_are_refused():
    embedding = built()
    features, _ = batch(0)
    ids = jnp.asarray(features["user"])[None]
    with pytest.raises(TypeError, match=r"TPUEmbedding.enqueue is being traced"):
        jax.vmap(lambda user: embedding.enqueue(features | {"user": user}))(ids)
    embedding.enqueue(*batch(0))
    activations = embedding.dequeue()
    with pytest.raises(TypeError, match=r"TPUEmbedding.apply_gradients is being tra"):
        jax.grad(lambda x: embedding.apply_gradients(x) or 0.0)(activations)


def test_it_may_be_called_beside_a_gradient():
    embedding = built()
    gradient = jax.grad(lambda w: w * embedding(*batch(0))["user"].sum())(2.0)
    assert gradient == pytest.approx(float(embedding(*batch(0))["user"].sum()))


@both_modes
def test_a_refused_gradient_loses_nothing(pipelined):
    embedding = built(pipeline_execution_with_tensor_core=pipelined)
    state = init(CONFIG, Adam(0.1), KEY)
    _, update = step(state, 0)
    state = apply_gradients(state, *update)
    train(embedding, 0)
    if pipelined:
        _, update = step(init(CONFIG, Adam(0.1), KEY), 1)  # one step old
    else:
        _, update = step(state, 1)
    embedding.enqueue(*batch(1))
    good = gradients_of(embedding.dequeue())
    for bad, error in (
        (good | {"user": jnp.ones((3, 4))}, ValueError),  # of the right size
        (good | {"user": good["user"].astype(int)}, TypeError),
        (good | {"user": [[1.0] * 3] * 4}, TypeError),
        ({"user": good["user"]}, ValueError),
    ):
        with pytest.raises(error, match="user"):
            embedding.apply_gradients(bad)
    embedding.apply_gradients(good)
    assert_same(embedding.state, apply_gradients(state, *update))


@both_modes
def test_what_an_implementation_cannot_do_is_told_by_apply_gradients(pipelined):
    embedding = built(
        implementation="sparsecore",  # of plain tables whose D is no multiple of 128
        storage="plain",
        pipeline_execution_with_tensor_core=pipelined,
    )
    before = embedding.retrieve()
    embedding.enqueue(*batch(0))
    embedding.enqueue(*batch(1))
    gradients = gradients_of(embedding.dequeue())
    for _ in range(2):  # the batch is still waiting for its gradients
        with pytest.raises(ValueError, match="implementation='sparsecore' cannot run"):
            embedding.apply_gradients(gradients)
    assert_same(embedding.retrieve(), before, rtol=0)


@both_modes
def test_a_rate_that_cannot_be_had_loses_nothing(pipelined):
    rates = iter([0.1])
    embedding = built(
        Adam(lambda: next(rates)), pipeline_execution_with_tensor_core=pipelined
    )
    train(embedding, 0)
    before = embedding.retrieve()
    embedding.enqueue(*batch(1))
    gradients = gradients_of(embedding.dequeue())
    with pytest.raises(StopIteration):
        embedding.apply_gradients(gradients)
    assert_same(embedding.retrieve(), before, rtol=0)
    rates = iter([0.2])
    embedding.apply_gradients(gradients)
    after = embedding.retrieve()["user"]["parameters"]
    assert np.any(after != before["user"]["parameters"])


@both_modes
def test_a_bad_batch_is_refused_by_enqueue(pipelined):
    embedding = built(pipeline_execution_with_tensor_core=pipelined)
    want = built(pipeline_execution_with_tensor_core=pipelined)
    train(embedding, 0)
    train(want, 0)
    features, weights = batch(1)
    for bad, own, error in (
        ({"seen": np.ones((4, 3))}, {}, TypeError),
        ({"liked": np.array([1, 2, 3, 4])}, {}, ValueError),
        ({}, {"seen": np.ones((4, 2), np.float32)}, ValueError),
        ({}, {"user": np.ones((4, 1), np.float32)}, ValueError),
    ):
        with pytest.raises(error, match=r"feature 'seen'|feature 'liked'|feature 'us"):
            embedding.enqueue(features | bad, weights | own)
    with pytest.raises(RuntimeError, match=r"dequeue\(\) found no batch"):
        embedding.dequeue()
    assert_same(train(embedding, 1), train(want, 1))
    assert_same(embedding.state, want.state)


def test_an_update_under_way_is_made_before_a_state_is_taken_or_given():
    embedding = built(pipeline_execution_with_tensor_core=True)
    train(embedding, 0)
    state = init(CONFIG, Adam(0.1), KEY)
    _, update = step(state, 0)
    assert_same(embedding.state, apply_gradients(state, *update))
    train(embedding, 0)
    given = init(CONFIG, Adam(0.1), jax.random.key(9))
    kept = jax.tree.map(np.array, given)
    embedding.state = given
    assert_same(embedding.state, kept, rtol=0)
    embedding.enqueue(*batch(5), training=False)
    assert_same(embedding.dequeue(), lookup(kept, *batch(5)))


def test_an_inference_batch_sees_the_update_under_way():
    embedding = built(pipeline_execution_with_tensor_core=True)
    train(embedding, 0)
    state = init(CONFIG, Adam(0.1), KEY)
    _, update = step(state, 0)
    before, state = state, apply_gradients(state, *update)
    embedding.enqueue(*batch(0), training=False)
    got = embedding.dequeue()
    assert_same(got, lookup(state, *batch(0)))
    assert np.any(got["user"] != lookup(before, *batch(0))["user"])


@both_modes
def test_batches_leave_the_queue_in_their_order(pipelined):
    embedding = built(pipeline_execution_with_tensor_core=pipelined)
    state = init(CONFIG, Adam(0.1), KEY)
    embedding.enqueue(*batch(0))
    embedding.enqueue(*batch(1), training=False)
    activations = embedding.dequeue()
    assert_same(activations, lookup(state, *batch(0)))
    # One that is not for training does not wait for the gradients of another.
    assert_same(embedding.dequeue(), lookup(state, *batch(1)))
    embedding.apply_gradients(gradients_of(activations))


def test_apply_gradients_donates_the_state():
    embedding = built()
    old = jax.tree.leaves(embedding.state)
    train(embedding, 0)
    assert all(array.is_deleted() for array in old)


def test_threads_may_look_up_while_one_trains():
    embedding = built()
    stop, failures, lookups = threading.Event(), [], []

    def look_up():
        try:
            while not stop.is_set():
                embedding(*batch(0))
                embedding.serving_embedding_lookup({"user": np.array([1])})
                lookups.append(embedding.retrieve()["user"]["parameters"])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=look_up) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(60):
            train(embedding, number % 3)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert lookups
    alone = built()
    for number in range(60):
        train(alone, number % 3)
    assert_same(embedding.state, alone.state)


def test_one_thread_may_enqueue_while_another_trains():
    embedding, alone = built(), built()
    producer = threading.Thread(
        target=lambda: [embedding.enqueue(*batch(number % 3)) for number in range(30)]
    )
    producer.start()
    done = 0
    while done < 30:
        try:
            activations = embedding.dequeue()
        except RuntimeError:  # no batch yet
            continue
        embedding.apply_gradients(gradients_of(activations))
        train(alone, done % 3)
        done += 1
    producer.join()
    assert_same(embedding.state, alone.state)
