"""The C++ library refuses wrong calls, and says why, or does what they say."""

import collections

import hypothesis
from hypothesis import strategies as st

from tests.kernels.cpu import calls


def test_any_call_is_refused_or_right():
    counts = collections.Counter()

    @hypothesis.settings(max_examples=60)
    @hypothesis.given(st.data())
    def check(data):
        counts[calls.check(calls.drawn(data.draw))] += 1

    check()
    assert min(counts["refused"], counts["right"]) > 10
