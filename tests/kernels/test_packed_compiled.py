"""Packing and unpacking as libtpu compiles them: no table on the way."""

import re

import pytest

from benchmarks.static import StaticCase, count_all
from benchmarks.static.chips import CHIPS

V = 1_000_000


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_no_table_on_the_way(chip):
    cases = [
        StaticCase(f"tests.kernels.packing:{program}", chip, V, dim, 1)
        for program in ("pack", "unpack")
        for dim in (16, 128)
    ]
    for case, report in zip(cases, count_all(cases), strict=True):
        assert report.error is None, f"{case}: {report.error}"
        assert report.memory and report.memory.temp < 4 * V * case.dim // 50, case


@pytest.mark.parametrize("chip", CHIPS)
def test_two_are_rounded_by_the_instruction_of_xla(chip, tmp_path):
    # What rounds to the nearest and keeps a NaN where XLA converts does so in a kernel.
    programs = ("pair_by_kernel", "pair_by_xla")
    cases = [
        StaticCase(f"tests.kernels.packing:{p}", chip, 64, 128, 1) for p in programs
    ]
    reports = list(count_all(cases, keep_dumps=tmp_path / "dumps"))
    packs = []
    for number, report in enumerate(reports):
        assert report.error is None, report.error
        dumps = (tmp_path / "dumps" / f"case_{number}").glob("*-final_bundles.txt")
        text = "".join(x.read_text() for x in dumps if "schedule" not in x.name)
        packs.append(re.findall(r"= (vpack\S*|vcvt\S*)", text))
    by_kernel, by_xla = packs
    assert len(by_kernel) == 8 and set(by_kernel) == set(by_xla)
    # The longer name is that of libtpu 0.0.50.1.
    assert set(by_kernel) in ({"vpack.i.bf16"}, {"vpack.i.f32.bf16"})
