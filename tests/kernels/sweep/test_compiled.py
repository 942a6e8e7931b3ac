"""The sweep as libtpu compiles it, for every generation: in place, and how fast.

No TPU is needed; libtpu compiles on any host. The counts are exact for the libtpu they
were read with and do not drift; another libtpu must stay within the limits.
"""

import re
from importlib.metadata import version

import jax
import jax.numpy as jnp
import pytest

from benchmarks.static import StaticCase, count_all
from benchmarks.static.chips import CHIPS
from sparse_adam import UpdatePlan, sparse_adam_update
from sparse_adam.kernels.sweep import Config
from tests import cases as cases_
from tests import helpers

V, N = 2**20, 65_536
# Of 1,000,003 rows the last block is not full, nor its last tile.
ODD = 1_000_003
PLAIN_BFLOAT16 = f"{__name__}:plain_bfloat16"
CHECKED = "benchmarks.static.safe:sweep_checks"
COUNTED = [
    ("sweep", V, 128, N),
    ("packed_sweep", V, 16, N),
    ("packed_sweep", V, 128, N),
    ("packed_sweep_bfloat16", V, 128, N),
    (PLAIN_BFLOAT16, V, 128, N),
]
# No counts are taken of these, so every other chip will do: a fault of a shape shows on
# more than one, and a fault of a chip at more than one.
ALSO = [
    ("sweep", ODD, 256, 1000),
    ("packed_sweep", ODD, 100, 1),
    ("packed_sweep_bfloat16", ODD, 3, 1000),
    (PLAIN_BFLOAT16, ODD, 384, 1000),
    ("sweep", 50_000, 4096, 100),
]
TINY = [("sweep", 1, 128, 1), ("sweep", 13, 256, 1), (PLAIN_BFLOAT16, 3, 128, 5)]
# Of the tables of COUNTED.
BYTES_PER_ROW = (3 * 512, 3 * 64, 3 * 512, 2 * 512, 3 * 256)

# Bundles at D = 128: to fetch and to add a gradient, and to add one of D = 16 to a line
# that 8 rows share; to update a row of plain float32, of packed float32, of packed
# bfloat16, of plain bfloat16. Limits for any libtpu, counts for the one named.
COUNTED_WITH = "0.0.42.1"
COUNTS = {
    "v4": (3.75, 8.5, 10.88, 1.6, 1.61, 1.73, 2.14),
    "v5e": (4.94, 7.38, 9.5, 0.78, 0.78, 0.88, 1.21),
    "v5p": (5.0, 7.44, 9.56, 0.78, 0.79, 0.88, 1.19),
    "v6e": (5.0, 7.44, 9.38, 0.53, 0.57, 0.63, 0.87),
    "7x": (4.88, 7.44, 9.56, 0.53, 0.57, 0.63, 0.67),
}
LIMITS = {
    "v4": (6, 10, 13, 2.1, 2.1, 2.3, 2.8),
    "v5e": (6, 9, 12, 1.0, 1.0, 1.2, 1.6),
    "v5p": (6, 9, 12, 1.0, 1.0, 1.2, 1.6),
    "v6e": (6, 9, 12, 0.7, 0.8, 0.9, 1.2),
    "7x": (6, 9, 12, 0.7, 0.8, 0.9, 0.9),
}
# The time of those updates by their bundles, on all cores of a device, over that of the
# DMAs at full bandwidth: where it is below 1, memory is the limit. A plain row in
# bfloat16 has half the bytes of one in float32 and all of its arithmetic.
SHARES = {
    "v4": (0.3, 0.31, 0.49, 0.82),
    "v5e": (0.14, 0.14, 0.23, 0.43),
    "v5p": (0.2, 0.2, 0.34, 0.61),
    "v6e": (0.16, 0.17, 0.29, 0.53),
    "7x": (0.29, 0.31, 0.52, 0.74),
}


def plain_bfloat16(rows, dim, ids):
    """A program for `benchmarks.static`."""

    def update(table, momenta, velocities, ids, grads, order, rate):
        state = (table, momenta, velocities)
        plan = UpdatePlan(ids, order, rows)
        options = {"plan": plan, "learning_rate": rate, "implementation": "sweep"}
        return sparse_adam_update(*state, ids, grads, **options)

    table = jax.ShapeDtypeStruct((rows, dim), jnp.bfloat16)
    batch = jax.ShapeDtypeStruct((ids,), jnp.int32)
    grads = jax.ShapeDtypeStruct((ids, dim), jnp.float32)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    return update, (table, table, table, batch, grads, batch, rate), (0, 1, 2)


@pytest.mark.parametrize("chip", CHIPS)
def test_in_place_at_the_speed_of_memory(chip, tmp_path):
    first = list(CHIPS).index(chip) % 2
    chosen = COUNTED + ALSO[first::2] + TINY[first::2]
    cases = [StaticCase(program, chip, *sizes) for program, *sizes in chosen]
    checked_case = StaticCase(CHECKED, chip, V, 128, N)
    *reports, checked = count_all([*cases, checked_case], keep_dumps=tmp_path / "dumps")
    assert checked.error is None and checked.checks > 0
    for case, report in zip(cases, reports, strict=True):
        assert report.error is None, f"{case}: {report.error}"
        own = [k for k in report.kernels if k.name.startswith("sparse_adam_sweep")]
        assert own, case
        assert all(k.checks == 0 for k in own), f"{case}: bounds checks in a loop"
    for case, report in zip(cases, reports, strict=True):
        if case.rows < case.dim:
            continue  # as small as the gradients, and smaller than a block
        # All that goes out but the tuple that holds it.
        assert report.memory is not None
        assert report.memory.output - report.memory.alias <= 512, case
        assert report.memory.alias >= report.table_bytes, case
        # Besides the table: gradients as lines, made in two steps, and their indices.
        lines = max(case.dim, 128) * 4 * case.ids
        assert report.memory.temp < 2.1 * lines + 2**21 < report.table_bytes, case
        assert report.table_copies == (), case
    small = cases_.Case("", 8, 128, 8)
    problem = helpers.changed(
        helpers.spec(small, cases_.arrays(small)), num_rows=V, num_ids=N, num_grads=N
    )
    config = Config.choose(problem)
    config.check(problem)
    assert 0 <= reports[0].counted[0].vmem_bytes - config.vmem_bytes(problem) < 2**20
    counted = list(zip(reports, BYTES_PER_ROW, strict=False))
    for number, (report, bytes_per_row) in enumerate(counted[:4]):
        check_pipeline(tmp_path / "dumps" / f"case_{number}", report, bytes_per_row)
    check_counts(chip, counted)


def check_pipeline(dumps, report, bytes_per_row):
    """A grid step starts the next block, updates its own, and only then writes it."""
    dump = next(
        path.read_text()
        for path in dumps.glob("*-sparse_adam_sweep*-final_bundles.txt")
        if "schedule-analysis" not in path.name
    )
    # In the order of the program: DMAs with their sizes, and roots.
    found = re.findall(
        r"= dma\.(\w+_to_\w+)|size_in_granules=\*/(\d+)|= (vrsqrt)", dump
    )
    events = []
    for route, granules, root in found:
        if route or root:
            events.append([route or root, 0])
        elif not events[-1][1]:
            events[-1][1] = int(granules) * CHIPS[report.chip].granule
    # A block is 1,024 groups, so its arrays are larger than anything else that moves.
    block = bytes_per_row * 1024 * (8 if report.dim == 16 else 1)
    events = [
        (name, size) for name, size in events if size >= block // 3 or name == "vrsqrt"
    ]
    names = [name for name, _ in events]
    assert names == sorted(names, key=["hbm_to_vmem", "vrsqrt", "vmem_to_hbm"].index)
    # Each once, so all of the table once: well within 1.25 times that.
    for route in ("hbm_to_vmem", "vmem_to_hbm"):
        assert sum(size for name, size in events if name == route) == block, route


def bundles_of_update(report):
    """For each row of D = 128; 8 of them take one reciprocal root."""
    (kernel,) = (k for k in report.counted if k.name.startswith("sparse_adam_sweep"))
    (loop,) = (each.loop for each in kernel.loops if each.loop.counts.eup)
    return loop.bundles / (8 * loop.counts.eup)


def check_counts(chip, counted):
    sized = [(report, size) for report, size in counted if report.dim == 128]
    (plain, _), (shared, _), *_ = counted
    updates = [bundles_of_update(report) for report, _ in sized]
    counts = (
        *(plain.phases["gradients"], plain.phases["add"], shared.phases["add"]),
        *updates,
    )
    # A looked-up row has as many of them as the table has rows for it.
    assert plain.phases["update"] == pytest.approx(updates[0] * V / N)
    for count, limit in zip(counts, LIMITS[chip], strict=True):
        assert count <= limit, counts
    of = CHIPS[chip]
    shares = [
        update / of.clock / of.cores / (2 * size / of.bandwidth)
        for update, (_, size) in zip(updates, sized, strict=True)
    ]
    assert max(shares[:2]) < 0.8, "the arithmetic of float32 must hide behind memory"
    assert max(shares) < 1, "arithmetic must hide behind memory"
    counts, shares = (tuple(round(x, 2) for x in y) for y in (counts, shares))
    if version("libtpu") == COUNTED_WITH:
        assert counts == COUNTS[chip]
        assert shares == SHARES[chip]
    else:
        print(
            f"{chip}: {counts} bundles, {shares} of the DMAs' time with libtpu "
            f"{version('libtpu')}; {COUNTS[chip]}, {SHARES[chip]} with {COUNTED_WITH}"
        )
