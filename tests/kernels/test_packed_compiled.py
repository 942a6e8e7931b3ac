"""Packing and unpacking as libtpu compiles them: no table on the way."""

import pytest

from benchmarks.static import Case, count_all

V = 1_000_000


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_no_table_on_the_way(chip):
    cases = [
        Case(f"tests.kernels.packing:{program}", chip, V, dim, 1)
        for program in ("pack", "unpack")
        for dim in (16, 128)
    ]
    for case, report in zip(cases, count_all(cases), strict=True):
        assert report.error is None, f"{case}: {report.error}"
        assert report.memory.temp < 4 * V * case.dim // 50, case
