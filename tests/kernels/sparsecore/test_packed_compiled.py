"""The kernel on packed storage as libtpu compiles it, for each chip with SparseCores.

No TPU is needed. The counts are exact for one libtpu; others stay within the limits.
"""

import itertools

import pytest

from benchmarks.static import StaticCase, count_all
from tests.kernels.sparsecore.subcore_loops import (
    Loops,
    assert_in_place,
    check_counts,
    check_no_spills,
)

CHIPS = ("v5p", "v6e", "7x")
V = 1_000_000
N = 65_536
CHUNK = {
    "v5p": {16: 128, 32: 128, 64: 128, 128: 80},
    "v6e": {16: 128, 32: 128, 64: 80, 128: 40},
    "7x": {16: 128, 32: 128, 64: 128, 128: 80},
}
# By D, bundles on one subcore: the update of a row, the sum of an occurrence, and a
# whole chunk of distinct ids, per row. Limits for any libtpu, counts for one.
LIMITS = {
    "v5p": {16: (18, 8, 40), 32: (35, 8, 60), 64: (75, 12, 100), 128: (140, 20, 200)},
    "v6e": {16: (14, 8, 40), 32: (24, 8, 50), 64: (48, 12, 80), 128: (80, 20, 150)},
    "7x": {16: (8, 8, 30), 32: (12, 8, 35), 64: (24, 8, 45), 128: (40, 12, 80)},
}
COUNTS = {
    "v5p": {
        16: (15, 7, 26.6),
        32: (29, 6, 40.3),
        64: (61, 10, 77.7),
        128: (127, 18, 157.2),
    },
    "v6e": {
        16: (10, 7, 21.7),
        32: (18, 6, 29.5),
        64: (40, 10, 62.3),
        128: (78, 18, 117.0),
    },
    "7x": {16: (7, 6, 17.4), 32: (10, 7, 22.7), 64: (18, 7, 31.3), 128: (39, 10, 59.4)},
}
# Update loops of D = 128, in the order of `VARIANTS`.
VARIANTS = ("bfloat16_slots", "bfloat16", "stochastic", "steps")
VARIANT_LIMITS = {
    "v5p": (160, 170, 380, 150),
    "v6e": (110, 120, 330, 110),
    "7x": (60, 60, 170, 70),
}


def reports(name, chip, *shapes):
    return count_all([StaticCase(f"packed_sparsecore{name}", chip, *s) for s in shapes])


@pytest.mark.parametrize("chip", CHIPS)
def test_counts(chip):
    widths = LIMITS[chip]
    shapes = [(V, dim, N) for dim in widths]
    for dim, report in zip(widths, reports("", chip, *shapes), strict=True):
        assert_in_place(report, width=dim)
        loops = Loops(report)
        assert loops.streams == {"indirect.gather": 8, "indirect.scatter": 6}
        check_no_spills(loops, dim, planes=3)
        counts = loops.counts(CHUNK[chip][dim])
        check_counts(counts, widths[dim], COUNTS[chip][dim], f"{chip}, D={dim}")


# What depends on a shape does not depend on the chip as well: each has some of them.
@pytest.mark.parametrize("chip", CHIPS)
def test_other_shapes(chip):
    shapes = [
        *((V, 25, 1), (V, 60, 1000), (V, 100, 1000), (V, 16, V)),
        *((V, 256, 1000), (V // 10, 4096, 1000), (9 * V, 128, 1000)),
    ]
    for report in reports("", chip, *shapes[CHIPS.index(chip) :: len(CHIPS)]):
        assert_in_place(report, width=64 if report.dim <= 64 else 128)
        streams = Loops(report).streams
        assert streams == {"indirect.gather": 8, "indirect.scatter": 6}


@pytest.mark.parametrize("chip", CHIPS)
def test_dtypes_rounding_and_steps(chip):
    # Each variant in both widths, and each chip, but not all three.
    widths = itertools.cycle((128, 32) if chip == "v6e" else (32, 128))
    cases = [
        StaticCase(f"packed_sparsecore_{name}", chip, V, dim, 1000)
        for name, dim in zip(VARIANTS, widths, strict=False)
    ]
    counted = zip(VARIANTS, VARIANT_LIMITS[chip], count_all(cases), strict=True)
    for name, limit, report in counted:
        assert_in_place(report, width=report.dim)
        loops = Loops(report)
        assert loops.update <= limit * min(128, report.dim) / 128 + 4
        planes = 3 if name == "steps" else 2
        streams = {"indirect.gather": 2 + 2 * planes, "indirect.scatter": 2 * planes}
        assert loops.streams == streams


@pytest.mark.parametrize("dim", [16, 128])
def test_work_does_not_grow_with_the_table(dim):
    large = 16 * V if dim == 16 else 9 * V
    few, many = reports("", "v6e", (V, dim, 1000), (large, dim, 1000))
    assert few.error is None and many.error is None
    assert few.memory and many.memory
    assert abs(few.memory.temp - many.memory.temp) < 2**17  # its code, more or less

    def loops(report):
        return [[entry.loop.bundles for entry in k.loops] for k in report.counted]

    assert loops(few) == loops(many)


def test_records_narrower_than_a_vector():
    first, second = (next(reports("", chip, (V, 8, 1000))) for chip in ("v6e", "7x"))
    assert_in_place(first, width=8)
    assert "D=8 stand 8 words apart, fewer than the 16 that" in str(second.error)
