"""The C++ library refuses wrong calls, and says why, or does what they say."""

import collections

from tests.kernels.cpu import call_draws, calls


def test_any_call_is_refused_or_right():
    counts = collections.Counter(calls.check(call_draws.drawn(s)) for s in range(40))
    assert set(counts) == {"refused", "right"}
    assert min(counts.values()) > 10
