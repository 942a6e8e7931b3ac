"""The reference's steps against what torch, FBGEMM and TensorFlow computed."""

import numpy as np
import pytest

from sparse_adam.reference import (
    adagrad,
    adagrad_momentum,
    row_wise_adagrad,
    sparse_update,
)
from tests.peers import GOLDENS, PEERS, Peer
from tests.reference import make_peer_goldens


def run(peer, step):
    def update(state, ids, grads, **options):
        return sparse_update(state, ids, grads, step, **options)

    peer.check(update, np.float64)


@pytest.mark.parametrize("peer", PEERS, ids=str)
def test_reference(peer):
    run(peer, peer.step)


def test_every_case_is_compared():
    assert {peer.name for peer in PEERS} == set(GOLDENS["cases"])
    assert set(make_peer_goldens.CASES) == set(GOLDENS["cases"])


def test_inputs_are_those_of_the_script():
    table, batches = make_peer_goldens.inputs()
    np.testing.assert_array_equal(table, GOLDENS["table"])
    for (ids, grads), batch in zip(batches, GOLDENS["batches"], strict=True):
        np.testing.assert_array_equal(ids, batch["ids"])
        np.testing.assert_array_equal(grads, batch["grads"])


def test_adagrad_without_momentum_is_adagrad():
    peer = next(peer for peer in PEERS if peer.name == "torch_adagrad")
    expected = [arrays[0] for arrays in GOLDENS["cases"][peer.name]]
    step = adagrad_momentum(epsilon=0.25)  # in place of what the sums begin with
    table = np.asarray(GOLDENS["table"])
    state = (table, np.zeros_like(table), np.zeros_like(table))
    for batch, wanted in zip(GOLDENS["batches"], expected, strict=True):
        grads = np.asarray(batch["grads"])
        state = sparse_update(state, batch["ids"], grads, step, learning_rate=0.125)
        np.testing.assert_allclose(state[0], wanted, rtol=0, atol=1e-9)


def inside_sqrt(values, gradient, rate):
    """Row-wise Adagrad with epsilon on the other side of the root."""
    w, a = values
    a = a + np.mean(gradient**2)
    return w - rate * gradient / np.sqrt(a + 0.25), a


@pytest.mark.parametrize("step", [inside_sqrt, row_wise_adagrad(0.45)])
def test_the_numbers_show_where_epsilon_stands(step):
    peer = next(p for p in PEERS if p.name == "fbgemm_row_wise_adagrad_epsilon")
    with pytest.raises(AssertionError, match="array 0 after batch 1"):
        run(peer, step)


def test_fbgemm_and_torch_agree_on_adagrad():
    of_torch, of_fbgemm = (
        np.asarray(GOLDENS["cases"][name][-1][0])
        for name in ("torch_adagrad", "fbgemm_adagrad")
    )
    np.testing.assert_allclose(of_fbgemm, of_torch, rtol=0, atol=1e-6)
    peer = next(peer for peer in PEERS if peer.name == "fbgemm_adagrad")
    run(Peer("torch_adagrad", peer.rule, adagrad(), (0.25,)), peer.step)
