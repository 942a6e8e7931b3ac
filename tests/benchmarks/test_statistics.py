"""Quantiles, ratios within a round, and a bootstrap's interval."""

import numpy as np
import pytest

from benchmarks.statistics import interleaved_ratio, ratio_of_medians, spread


def test_spread():
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0]) == pytest.approx((1.8, 3.0, 4.2, 1.0))


def test_a_slow_moment_that_hits_both_does_not_change_the_ratio():
    ours = np.array([1.0, 1.0, 9.0, 9.0, 9.0])
    assert interleaved_ratio(list(3 * ours), list(ours)) == pytest.approx(3)


def test_who_has_fewer_rounds_is_compared_with_the_first_of_the_other():
    assert interleaved_ratio([4.0, 4.0], [2.0, 2.0, 100.0, 100.0]) == 2


def test_the_interval_holds_the_ratio_and_is_the_same_every_time():
    rng = np.random.default_rng(0)
    old, new = (rng.normal(mean, 0.5, 30).tolist() for mean in (10, 12))
    found = ratio_of_medians(new, old)
    assert found == ratio_of_medians(new, old)
    assert found.low < found.ratio < found.high
    assert found.low > 1.1 and found.high < 1.3


def test_nothing_is_sure_of_noise():
    rng = np.random.default_rng(1)
    new, old = rng.exponential(1, (2, 9)).tolist()
    low, _, high = ratio_of_medians(new, old)
    assert low < 1 < high
