"""The arithmetic of the bounds, with numbers that a reader can check."""

import pytest

from benchmarks.static.chips import CHIPS
from benchmarks.static.roofline import Roofline, estimate

V6E = CHIPS["v6e"]


def test_bytes_bound_a_lean_program():
    found = estimate([("subcore", 78.0, {"vld": 65, "vst": 48})], 3584, V6E)
    assert found.issue_ns == pytest.approx(78 / 32 / 1.75)
    assert found.compute_ns == pytest.approx(65 / 32 / 1.75)
    assert found.hbm_ns == pytest.approx(3584 / 1638)
    assert (found.limit, found.bound_ns) == ("hbm", found.hbm_ns)


def test_bundles_bound_a_program_of_many_dmas():
    found = estimate([("tensorcore", 25.0, {"valu": 6, "vld": 3})], 3584, V6E)
    assert found.compute_ns == pytest.approx(1 / 1.75)
    assert (found.limit, found.bound_ns) == ("issue", pytest.approx(25 / 1.75))


def test_full_bundles_are_a_limit_of_arithmetic():
    assert Roofline(issue_ns=10, compute_ns=9.5, hbm_ns=1).limit == "compute"
    assert Roofline(issue_ns=10, compute_ns=8, hbm_ns=1).limit == "issue"


def test_engines_run_one_after_the_other():
    kernels = [("tensorcore", 10.0, {}), ("subcore", 64.0, {})]
    assert estimate(kernels, 0, V6E).issue_ns == pytest.approx((10 + 2) / 1.75)


def test_no_device_kind_names_two_chips():
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds)) and all(c.kinds for c in CHIPS.values())
