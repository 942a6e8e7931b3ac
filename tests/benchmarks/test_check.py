"""A contender with wrong numbers is not timed."""

from functools import partial

import numpy as np
import pytest

from benchmarks.cases import Case
from benchmarks.check import WrongResultError, check, compare, restricted, sampled_rows
from benchmarks.workload import TimedBatch, Workload
from tests.benchmarks import fakes


def test_the_reference_passes():
    workload = Workload.of(fakes.SMALL)
    check(fakes.contender(), fakes.Reference(workload), workload)


def test_a_step_that_is_one_per_cent_too_long_does_not():
    workload = Workload.of(fakes.SMALL)
    wrong = partial(fakes.Reference, factor=1.01)
    with pytest.raises(WrongResultError, match=r"table: .* sampled numbers are wrong"):
        check(fakes.contender(start=wrong), wrong(workload), workload)


def test_an_untouched_row_must_keep_its_bits():
    old = np.ones((2, 3), np.float32)
    new, want = old.copy(), old.copy()
    want[0] += 1e-3
    new[0] += 1e-3
    compare("table", new, old, want)
    new[1, 2] = np.nextafter(np.float32(1), np.float32(2))
    with pytest.raises(WrongResultError, match="1 of 6"):
        compare("table", new, old, want)


def test_nan_is_wrong():
    old = np.ones((1, 2), np.float32)
    with pytest.raises(WrongResultError):
        compare("table", old * np.nan, old, old + 1)


def test_one_number_a_row_is_compared_too():
    old = np.ones(3, np.float32)
    compare("sums", old + 1, old, old + 1)
    with pytest.raises(WrongResultError, match="1 of 3"):
        compare("sums", np.array([2, 2, 2.1], np.float32), old, old + 1)


def test_samples_have_the_most_frequent_row_and_untouched_ones():
    case = Case("padded", 5000, 2, 600, "padded")
    workload = Workload.of(case)
    ids = np.where(np.arange(600) < 30, 77, workload.batches[0].ids)
    sample = sampled_rows(TimedBatch(ids, workload.batches[0].grads), workload)
    assert 77 in sample and (sample >= 0).all()
    assert (np.diff(sample) > 0).all()
    assert len(np.setdiff1d(sample, ids)) > 10


def test_restricted_batches_are_renumbered():
    batch = TimedBatch(np.array([5, -1, 9, 5, 7]), np.arange(5.0)[:, None])
    ids, grads = restricted(batch, np.array([5, 9]))
    assert ids.tolist() == [0, 1, 0] and grads.ravel().tolist() == [0, 2, 3]
