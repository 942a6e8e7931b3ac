"""The kernels as libtpu compiles them, for every generation: in place, and how fast.

No TPU is needed; libtpu compiles on any host. The counts are exact for the libtpu they
were read with and do not drift; another libtpu must stay within the limits.
"""

import dataclasses
import functools
from importlib.metadata import version

import jax
import jax.numpy as jnp
import pytest

from benchmarks.static import StaticCase, count_all
from benchmarks.static.programs import find
from sparse_adam import UpdatePlan, sparse_adam_update
from sparse_adam.kernels.layout import PackedLayout

CHIPS = ("v4", "v5e", "v5p", "v6e", "7x")
V = 1_000_000
N = 65_536
DIMS = (128, 256, 512)
COUNTED = (128, N)
CHECKED = "benchmarks.static.safe:tensorcore_checks"
ROW_PHASES = ("fetch rows", "write back")
PHASES = (*ROW_PHASES, "gradients", "update")

# Bundles per row at D = 128: rows fetched and written back, and everything that runs
# per row when the ids are distinct. Limits for any libtpu, counts for the one named.
LIMITS = {"v5e": (22, 33), "v5p": (20, 30), "v6e": (20, 30), "7x": (20, 30)}
COUNTED_WITH = "0.0.42.1"
COUNTS = {
    "v4": (14.81, 20.5),
    "v5e": (21.31, 27.75),
    "v5p": (19.06, 25.44),
    "v6e": (19.06, 24.69),
    "7x": (18.75, 24.31),
}


def shapes_of(chip):
    """Each number of ids, with another width on the next chip, and what is counted.

    A fault shows at a width, a number of ids or a chip, or at two of them together:
    every two are here.
    """
    first = CHIPS.index(chip)
    shapes = {
        (DIMS[(first + j) % len(DIMS)], ids) for j, ids in enumerate((1, 1000, N))
    }
    return sorted(shapes | {COUNTED})


@pytest.mark.parametrize("chip", CHIPS)
def test_updates_in_place_at_every_shape(chip):
    shapes = shapes_of(chip)
    cases = [StaticCase("tensorcore", chip, V, dim, ids) for dim, ids in shapes]
    *reports, checked = count_all([*cases, StaticCase(CHECKED, chip, V, 128, N)])
    assert checked.error is None and checked.checks > 0
    for case, report in zip(cases, reports, strict=True):
        check_in_place(case, report, 3 * 4 * V * case.dim)
        assert report.memory and report.memory.temp < 4 * V * case.dim // 50, case
    check_counts(
        chip,
        reports[shapes.index(COUNTED)],
        LIMITS.get(chip, (22, 33)),
        COUNTS[chip],
    )


def check_in_place(case, report, state_bytes):
    assert report.error is None, f"{case}: {report.error}"
    assert report.memory.alias == state_bytes, case
    assert report.table_copies == (), case
    assert report.checks == 0, f"{case}: bounds checks in a loop"


def check_counts(name, report, limits, counts):
    assert set(PHASES) <= set(report.phases)
    rows = sum(report.phases[phase] for phase in ROW_PHASES)
    everything = sum(report.phases[phase] for phase in PHASES)
    assert rows <= limits[0], name
    assert everything <= limits[1], name
    if version("libtpu") == COUNTED_WITH:
        assert (round(rows, 2), round(everything, 2)) == counts, name
    else:
        print(
            f"{name}: {rows:.2f} and {everything:.2f} bundles a row with libtpu "
            f"{version('libtpu')}; {counts} with {COUNTED_WITH}"
        )


# Packed: of each row one DMA in and one out, whatever D and the dtypes. Each chip has
# every other one: what sets a chip apart, its compiler, shows in any of them.
PACKED = {
    ("packed_tensorcore", 16): (jnp.float32,) * 3,
    ("packed_tensorcore", 64): (jnp.float32,) * 3,
    ("packed_tensorcore", 128): (jnp.float32,) * 3,
    ("packed_tensorcore", 256): (jnp.float32,) * 3,
    ("packed_tensorcore_bfloat16_slots", 128): (jnp.float32, *(jnp.bfloat16,) * 2),
    ("packed_tensorcore_bfloat16", 128): (jnp.bfloat16,) * 3,
    ("packed_tensorcore_stochastic", 16): (jnp.bfloat16,) * 3,
    ("packed_tensorcore_steps", 128): (jnp.float32,) * 3,
}
# Fetch and write back; and with gradients and update, which grow with D.
PACKED_LIMITS = {"v5e": (12, 24), "v5p": (11, 24), "v6e": (11, 24), "7x": (11, 24)}
PACKED_COUNTS = {
    "v4": ((7.62, 13.62), (7.62, 13.5), (7.62, 13.5), (7.62, 24.69)),
    "v5e": ((10.12, 16.81), (10.0, 23.81), (9.94, 16.56), (10.56, 21.38)),
    "v5p": ((9.12, 15.81), (9.12, 15.56), (9.06, 15.5), (9.06, 16.44)),
    "v6e": ((9.12, 15.0), (9.12, 21.88), (9.06, 14.94), (9.56, 19.06)),
    "7x": ((9.0, 14.81), (9.0, 14.75), (8.81, 14.5), (8.81, 16.06)),
}


@pytest.mark.parametrize("chip", CHIPS)
def test_packed_updates_in_place(chip):
    chosen = list(PACKED)[CHIPS.index(chip) % 2 :: 2]
    cases = [StaticCase(program, chip, V, dim, N) for program, dim in chosen]
    counted = zip(count_all(cases), PACKED_COUNTS[chip], strict=True)
    for case, (report, counts) in zip(cases, counted, strict=True):
        dtypes = PACKED[case.program, case.dim]
        layout = PackedLayout(V, case.dim, tuple(map(jnp.dtype, dtypes)))
        check_in_place(case, report, layout.num_bytes)
        # Gradients in lines of their own, at most twice; and indices.
        assert report.memory and report.memory.temp < 3 * N * 512 * layout.blocks, case
        assert round(report.dmas_per_row) == 3, case
        limits = PACKED_LIMITS.get(chip, (12, 27))
        check_counts(f"{case}", report, limits, counts)


def test_the_widest_rows_compile():
    shapes = [
        ("packed_tensorcore", 4096),
        ("packed_tensorcore_stochastic", 1000),
        ("packed_tensorcore_steps", 1000),
        ("lookup_bfloat16", 4096),
    ]
    cases = [StaticCase(name, "v4", 10_000, dim, 4096) for name, dim in shapes]
    for case, report in zip(cases, count_all(cases), strict=True):
        assert report.error is None, f"{case}: {report.error}"


# Bundles a row: fetched, and put into place.
LOOKUPS = {("lookup", 128): (5.5, 1), ("lookup_bfloat16", 16): (5.5, 2)}
LOOKUP_COUNTS = {
    "v4": (
        (3.75, 0.56),
        (3.75, 1.81),
    ),
    "v5e": (
        (5.0, 0.62),
        (5.06, 1.62),
    ),
    "v5p": (
        (4.44, 0.62),
        (4.44, 1.62),
    ),
    "v6e": (
        (4.44, 0.62),
        (4.44, 1.62),
    ),
    "7x": (
        (4.56, 0.56),
        (4.44, 1.69),
    ),
}


@pytest.mark.parametrize("chip", CHIPS)
def test_lookup(chip):
    cases = [StaticCase(program, chip, V, dim, N) for program, dim in LOOKUPS]
    for case, report, limits, counts in zip(
        cases,
        count_all(cases),
        LOOKUPS.values(),
        LOOKUP_COUNTS[chip],
        strict=True,
    ):
        assert report.error is None, f"{case}: {report.error}"
        assert report.checks == 0
        assert round(report.dmas_per_row) == 1
        found = (report.phases["fetch"], report.phases["put"])
        assert found <= limits
        if version("libtpu") == COUNTED_WITH:
            assert tuple(round(x, 2) for x in found) == counts, case


@pytest.mark.parametrize("program", ["tensorcore", "packed_tensorcore", "lookup"])
def test_work_does_not_grow_with_the_table(program):
    small, large = count_all(
        [StaticCase(program, "v6e", v, 128, 1000) for v in (V, 16 * V)]
    )
    assert small.error is None and large.error is None
    assert small.memory and large.memory
    assert small.memory.temp == large.memory.temp
    assert loops(small) == loops(large)


def loops(report):
    return [[entry.loop.bundles for entry in k.loops] for k in report.counted]


TABLES = 4


def tables(rates, rows, dim, ids):
    """Tables under `jax.vmap`, with one rate or with some."""

    def update(table, momenta, velocities, ids, grads, order, rate):
        state = (table, momenta, velocities)
        plan = UpdatePlan(ids, order, rows)
        options = {"plan": plan, "learning_rate": rate, "implementation": "tensorcore"}
        return sparse_adam_update(*state, ids, grads, **options)

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    table = array(TABLES, rows, dim)
    batch = array(TABLES, ids, dtype=jnp.int32)
    gradients = array(TABLES, ids, dim)
    arguments = (table, table, table, batch, gradients, batch, array(*rates))
    axes = (0,) * 6 + (0 if rates else None,)
    return jax.vmap(update, axes), arguments, (0, 1, 2)


def program(name, *rates):
    build = functools.partial(tables, rates)
    return dataclasses.replace(find("tensorcore"), name=name, build=build)


# Programs for `benchmarks.static`: as one tall table, and one table after the other.
tall, in_turn = program("tall"), program("in turn", TABLES)


@pytest.mark.parametrize("chip", ["v5p", "v6e"])  # of two cores, and of one
def test_tables_under_vmap(chip):
    """One tall table is updated in place; in turn, tables pass through copies."""
    rows, dim = 8000, 128
    cases = [
        StaticCase(f"{__name__}:{name}", chip, rows, dim, 1000)
        for name in ("tall", "in_turn")
    ]
    reports = list(count_all(cases))
    check_in_place(cases[0], reports[0], 3 * 4 * TABLES * rows * dim)
    assert reports[1].error is None and reports[1].counted, reports[1].error
