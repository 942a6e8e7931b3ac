"""The kernel as libtpu compiles it, for every generation: in place, and how fast.

No TPU is needed; libtpu compiles on any host. The counts are exact for the libtpu they
were read with and do not drift; another libtpu must stay within the limits.
"""

from importlib.metadata import version

import pytest

from benchmarks.static import Case, count_all

CHIPS = ("v4", "v5e", "v5p", "v6e", "7x")
V = 1_000_000
SHAPES = [(dim, ids) for dim in (128, 256, 512) for ids in (1, 1000, 65_536)]
ROW_PHASES = ("fetch rows", "write back")
PHASES = (*ROW_PHASES, "gradients", "update")

# Bundles per row at D = 128: rows fetched and written back, and everything that runs
# per row when the ids are distinct. Limits for any libtpu, counts for the one named.
LIMITS = {"v5e": (22, 33), "v5p": (20, 30), "v6e": (20, 30), "7x": (20, 30)}
COUNTED_WITH = "0.0.42.1"
COUNTS = {
    "v4": (14.81, 20.56),
    "v5e": (21.25, 27.81),
    "v5p": (19.06, 25.62),
    "v6e": (19.06, 25.0),
    "7x": (18.69, 24.44),
}


@pytest.mark.parametrize("chip", CHIPS)
def test_updates_in_place_at_every_shape(chip):
    cases = [Case("tensorcore", chip, V, dim, ids) for dim, ids in SHAPES]
    reports = list(count_all(cases))
    for case, report in zip(cases, reports, strict=True):
        assert report.error is None, f"{case}: {report.error}"
        assert report.memory.alias == 3 * 4 * V * case.dim, case
        assert report.memory.temp < 4 * V * case.dim // 50, case
        assert report.table_copies == (), case
        assert report.checks == 0, f"{case}: bounds checks in a loop"
    check_counts(chip, reports[SHAPES.index((128, 65_536))])


def check_counts(chip, report):
    assert set(PHASES) <= set(report.phases)
    rows = sum(report.phases[phase] for phase in ROW_PHASES)
    everything = sum(report.phases[phase] for phase in PHASES)
    if chip in LIMITS:
        assert rows <= LIMITS[chip][0]
        assert everything <= LIMITS[chip][1]
    if version("libtpu") == COUNTED_WITH:
        assert (round(rows, 2), round(everything, 2)) == COUNTS[chip]
    else:
        print(
            f"{chip}: {rows:.2f} and {everything:.2f} bundles a row with libtpu "
            f"{version('libtpu')}; {COUNTS[chip]} with {COUNTED_WITH}"
        )


def test_work_does_not_grow_with_the_table():
    small, large = count_all(
        [Case("tensorcore", "v6e", v, 128, 1000) for v in (V, 16 * V)]
    )
    assert small.error is None and large.error is None
    assert small.memory.temp == large.memory.temp
    assert loops(small) == loops(large)


def loops(report):
    return [[entry.loop.bundles for entry in k.loops] for k in report.counted]
