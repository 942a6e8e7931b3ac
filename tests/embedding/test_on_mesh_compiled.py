"""A step of samples of several ids, as libtpu compiles it for slices of TPUs."""

import os
from collections import Counter

import pytest

from benchmarks.routed_batches import message_bytes
from benchmarks.routing import (
    Batch,
    Program,
    compiled,
    lower_step,
    slice_mesh,
)
from benchmarks.static.compiler import WITHOUT_TPU
from sparse_adam.ops.routing.rounds import default_quota, message_words

D, PLACES, SAMPLES = 128, 8, 64
N = SAMPLES * PLACES


@pytest.fixture(scope="module")
def programs() -> dict[int, Program]:
    """The steps of 4 and of 16 chips."""
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in WITHOUT_TPU.items():
            patch.setenv(variable, os.environ.get(variable, value))
        found = {}
        for topology, chips in (("v6e:2x2", 4), ("v6e:4x4", 16)):
            lowered = lower_step(
                slice_mesh(topology, chips), Batch("padded", N, PLACES, D)
            )
            found[chips] = compiled(lowered, topology, chips)
        return found


@pytest.mark.parametrize("chips", [4, 16])
def test_rows_travel_once_each_way_and_ids_once(programs, chips):
    """No all-gather; nothing has the size of all chips' ids, or of all samples."""
    quota = default_quota(N, chips)
    first = Counter((each.name, each.shape) for each in programs[chips].first_round)
    assert first == {
        ("ragged-all-to-all", (N, 1, D)): 1,  # rows to those who asked
        ("ragged-all-to-all", (quota.total, 1, D)): 1,  # gradients to the owners
        ("all-to-all", (chips, 1, message_words(quota))): 1,
        ("all-to-all", (chips, 1, 1)): 1,
        ("all-reduce", (chips,)): 1,
    }
    rows = 4 * D * (N + quota.total)
    loads = 4 * 128  # the sum that tells whether all fits one round, a line
    assert programs[chips].received_bytes == rows + message_bytes(quota, chips) + loads


@pytest.mark.parametrize("chips", [4, 16])
def test_the_table_is_updated_in_place(programs, chips):
    assert programs[chips].in_place_bytes == 1000 * D * 4 * 3


def test_neither_bytes_nor_temporaries_grow_with_the_chips(programs):
    few, many = programs[4], programs[16]
    assert few.received_bytes < many.received_bytes < 1.1 * few.received_bytes
    assert many.temporary_bytes < 1.1 * few.temporary_bytes
