"""Routed over eight devices, a training step is the one that one device makes."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_adam.ops.routing.rounds import Quota
from tests.helpers import assert_bitwise_equal
from tests.ops.routing.machine import (
    DEVICES,
    DISTRIBUTIONS,
    MESHES,
    Machine,
    batch,
    initial,
    many_devices,
    one_device,
)
from tests.strategies import SEEDS

V, N = 4091, 96
# The default, a large total with short parts, and the least there can be.
KINDS = (
    Machine(V, N, interleaved=True),
    Machine(V, N, quota=Quota(300, 8)),
    Machine(61, 12, interleaved=True, quota=Quota(1, 1)),
)
MACHINES = (
    *(replace(kind, ragged=ragged) for kind in KINDS for ragged in (False, True)),
    Machine(V, N, ragged=True, quota=Quota(300, 8), dim=65),
)


def check(machine, batches):
    """Makes steps on one device and on eight; returns whether any took two rounds."""
    expected = initial(machine)
    placement, second = machine.placement, False
    state = tuple(placement.spread(x) for x in expected)
    for ids, factors in batches:
        before = expected[2]
        expected, rows = one_device(machine.num_rows)(expected, ids, factors)
        state, found, more = many_devices(machine)(state, ids, factors)
        second |= bool(np.any(more))
        assert_bitwise_equal(found, rows, "rows")
        new = [placement.collect(np.asarray(x)) for x in state]
        for name, one, two in zip(("w", "s", "steps"), new, expected, strict=True):
            assert_bitwise_equal(one, two, name)
        touched = np.zeros(machine.num_rows, np.int32)
        touched[ids[(ids >= 0) & (ids < machine.num_rows)]] = 1
        np.testing.assert_array_equal(new[2] - before, touched)
    return second


@pytest.mark.parametrize("machine", MACHINES, ids=str)
@settings(max_examples=10)
@given(
    st.lists(st.tuples(st.sampled_from(DISTRIBUTIONS), SEEDS), min_size=1, max_size=3)
)
def test_steps_are_those_of_one_device(machine, drawn):
    check(machine, [batch(machine, *each) for each in drawn])


@pytest.mark.parametrize("mesh", list(MESHES)[1:])
@pytest.mark.parametrize("ragged", [False, True])
def test_rows_over_several_axes(mesh, ragged):
    machine = Machine(V, N, True, mesh, ragged, Quota(300, 8))
    check(machine, [batch(machine, kind, 1) for kind in ("zipf", "one owner")])


@pytest.mark.parametrize(
    ("distribution", "quota", "second"),
    [
        ("uniform", None, False),
        ("zipf", None, False),
        ("hot", None, False),
        ("one owner", None, True),
        ("one owner, sorted", Quota(300, 96), True),
        ("all the same", Quota(8, 1), False),
        ("all the same", Quota(1, 1), False),  # too little for a row of each device
    ],
)
def test_how_many_rounds_a_batch_takes(distribution, quota, second):
    """One is the rule: a hot row costs one row a device."""
    machine = Machine(V, N, True, quota=quota)
    for seed in range(3):
        assert check(machine, [batch(machine, distribution, seed)]) == second


@pytest.mark.parametrize("num_rows", [1, 5, DEVICES, DEVICES + 1])
def test_small_tables(num_rows):
    machine = Machine(num_rows, 4, interleaved=True)
    check(machine, [batch(machine, kind, 2) for kind in ("uniform", "padded")])


def test_a_batch_without_ids():
    machine = Machine(V, 0)
    nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
    assert not check(machine, [nothing])


def test_sums_are_right_to_rounding():
    machine = Machine(V, N, True, quota=Quota(200, 20))
    ids, _ = batch(machine, "zipf", 3)
    factors = np.random.default_rng(0).normal(size=ids.size).astype(np.float32)
    start = initial(machine)
    expected, _ = one_device(V)(start, ids, factors)
    state = tuple(machine.placement.spread(x) for x in start)
    state, *_ = many_devices(machine)(state, ids, factors)
    for one, two in zip(jax.tree.leaves(state), expected, strict=True):
        one = machine.placement.collect(np.asarray(one))
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
