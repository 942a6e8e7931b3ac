"""The kernel as libtpu compiles it for each generation that has SparseCores.

No TPU is needed; libtpu compiles on any host. The counts are exact for the libtpu they
were read with and do not drift; another libtpu must stay within the limits.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.static import StaticCase, count_all
from benchmarks.static.programs import find
from sparse_adam import AdamState, sparse_adam_update
from sparse_adam.kernels.sparsecore import Config, bytes_moved
from sparse_adam.ops.plan import UpdatePlan
from tests import cases, helpers, programs
from tests.kernels.sparsecore.subcore_loops import (
    Loops,
    assert_in_place,
    check_counts,
    check_no_spills,
)
from tests.kernels.topology import AXIS, four_chips

CHIPS = ("v5p", "v6e", "7x")
V = 1_000_000
DIMS = (128, 256, 384, 1024)
# Then as large as fits: three tables of 16 V rows are 24 GB, and v6e has 31 GiB.
LARGE = ((16 * V, 128, 1), (16 * V, 128, 1_000_000), (8 * V, 256, 65_536))
COUNTED = (V, 128, 65_536)
CHUNK = {"v5p": 80, "v6e": 40, "7x": 80}

# At D = 128, bundles on one subcore: the update of a row, the sum of an occurrence, and
# a whole chunk of distinct ids, per row. Limits for any libtpu, counts for one.
LIMITS = {"v5p": (140, 33, 200), "v6e": (80, 33, 150), "7x": (40, 17, 80)}
COUNTS = {
    "v5p": (127, 18, 156.8),
    "v6e": (78, 18, 116.7),
    "7x": (39, 10, 59.2),
}
# The last of these in each safe form, and in all of them.
FORMS = (*Config.SAFE_FORMS, "all")
FORM_COUNTS = {
    "v5p": (156.2, 156.9, 156.2, 159.8, 160.9, 661.7, 290.0, 762.5),
    "v6e": (115.4, 116.8, 115.4, 121.0, 122.5, 488.2, 244.4, 589.1),
    "7x": (58.8, 59.2, 58.8, 58.4, 59.8, 301.1, 234.9, 430.2),
}
# Gathers of a chunk.
FORM_GATHERS = (4, 8, 4, 8, 8, 8, 0, 0)


def shapes(rows, dim, ids):
    """Tables, gradients, and a plan: XLA's sort alone would compile for a minute."""
    table = jax.ShapeDtypeStruct((rows, dim), jnp.float32)
    indices = jax.ShapeDtypeStruct((ids,), jnp.int32)
    return table, jax.ShapeDtypeStruct((ids, dim), jnp.float32), indices


def build(rows, dim, ids, implementation=None, **options):
    """One update; with None for the implementation, so that dispatch is tested too."""

    def update(table, momenta, velocities, grads, ids, order, rate):
        plan = UpdatePlan(ids, order, rows)
        gains = jnp.ones(ids.shape, jnp.float32) if options else None
        return sparse_adam_update(
            *(table, momenta, velocities, ids, grads),
            learning_rate=rate,
            gains=gains,
            plan=plan,
            implementation=implementation,
            **options,
        )

    table, grads, indices = shapes(rows, dim, ids)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    return update, (table,) * 3 + (grads, indices, indices, rate), (0, 1, 2)


def build_six(rows, dim, ids):
    """Six tables, one program."""
    update, arguments, _ = build(rows, dim, ids)
    one = len(arguments)

    def updates(*arguments):
        calls = (arguments[at : at + one] for at in range(0, 6 * one, one))
        return [update(*call) for call in calls]

    donated = tuple(at for at in range(6 * one) if at % one < 3)
    return updates, arguments * 6, donated


def build_scan(rows, dim, ids, constant_rate=False):
    """Three batches, one after the other."""
    update, arguments, donated = build(rows, dim, ids)
    state, batch = arguments[:3], arguments[3:]

    def updates(*arguments):
        def step(state, batch):
            if constant_rate:
                batch = (*batch[:-1], 0.5)
            return tuple(update(*state, *batch)), None

        return lax.scan(step, arguments[:3], arguments[3:])[0]

    batches = (jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in batch)
    return updates, (*state, *batches), donated


KERNEL = "sparse_adam_sparsecore"
SAFE = "benchmarks.static.safe"


def program(name, build):
    return dataclasses.replace(find("sparsecore"), name=name, build=build)


one = program("one", build)
six = program("six tables", build_six)
scan = program("scan", build_scan)
constant = program("constant", functools.partial(build_scan, constant_rate=True))
named = program("named", functools.partial(build, implementation="sparsecore"))
all_options = program(
    "all options",
    functools.partial(
        build,
        sum_inside_sqrt=False,
        clipvalue=(-2.0, 3.0),
        clip_weight_min=-1.0,
        clip_weight_max=1.0,
        weight_decay_factor=0.1,
        multiply_weight_decay_factor_by_learning_rate=True,
    ),
)
STEPS = {"use_gradient_accumulation": False}
steps = program("steps", functools.partial(build, **STEPS))
steps_in_all_forms = program(
    "steps in all forms",
    functools.partial(build, **STEPS, config=Config(**Config.SAFE_FORMS)),
)
steps_filled = program(
    "steps, filled",
    functools.partial(build, **STEPS, config=Config(filled_lists=True)),
)


def shapes_of(chip):
    """Each width with each number of ids on one of the chips, and what is counted.

    A fault shows at a width, a number of ids or a chip, or at two of them together:
    every two are here.
    """
    number = CHIPS.index(chip)
    batches = (1, 1000, 65_536, V)
    shapes = {
        (V, dim, ids)
        for (i, dim), (j, ids) in itertools.product(enumerate(DIMS), enumerate(batches))
        if (i + j) % len(CHIPS) == number
    }
    return sorted(shapes | {COUNTED, LARGE[number]})


def reports(program, chip, *shapes):
    cases = [StaticCase(f"{__name__}:{program}", chip, *shape) for shape in shapes]
    return count_all(cases)


@pytest.mark.parametrize("chip", CHIPS)
def test_updates_in_place_at_every_shape(chip):
    shapes = shapes_of(chip)
    for shape, report in zip(shapes, reports("one", chip, *shapes), strict=True):
        assert_in_place(report, tables=3)
        loops = Loops(report)
        if shape == COUNTED:
            check_no_spills(loops, 128, planes=3)
            counts = loops.counts(CHUNK[chip])
            assert counts[2] <= 1.25 * (counts[0] + counts[1])
            check_counts(counts, LIMITS[chip], COUNTS[chip], chip)
        assert loops.streams == {"indirect.gather": 8, "indirect.scatter": 6}


@pytest.mark.parametrize("chip", CHIPS)
def test_safe_forms(chip):
    cases = [StaticCase(f"{SAFE}:sparsecore_{form}", chip, *COUNTED) for form in FORMS]
    counts = []
    for report, gathers in zip(count_all(cases), FORM_GATHERS, strict=True):
        assert_in_place(report, tables=3)
        loops = Loops(report)
        assert loops.streams.get("indirect.gather", 0) == gathers
        counts.append(loops.counts(CHUNK[chip])[2])
    pinned = FORM_COUNTS[chip]
    check_counts(tuple(counts), [1.3 * count for count in pinned], pinned, chip)


def test_safe_forms_of_steps():
    names = "steps_in_all_forms", "steps_filled"
    in_all, filled = (next(reports(name, "v6e", (V, 256, 1000))) for name in names)
    assert_in_place(in_all, tables=3)
    assert Loops(in_all).streams == {}
    assert "filled_lists=True needs use_grad" in str(filled.error)


@pytest.mark.parametrize(("chip", "dim"), [("v5p", 128), ("v6e", 1024), ("7x", 256)])
def test_all_options(chip, dim):
    (report,) = reports("all_options", chip, (V, dim, 1000))
    assert_in_place(report, tables=3)


@pytest.mark.parametrize(("chip", "limit"), [("v5p", 180), ("v6e", 160), ("7x", 90)])
def test_a_step_for_each_occurrence(chip, limit):
    for report in reports("steps", chip, (V, 128, 65_536), (V, 256, 1000)):
        assert_in_place(report, tables=3)
        loops = Loops(report)
        assert loops.update <= limit
        assert loops.streams == {"indirect.gather": 8, "indirect.scatter": 6}


def test_six_tables():
    (report,) = reports("six", "v6e", (V, 128, 1000))
    assert_in_place(report, tables=18)


@pytest.mark.parametrize("name", ["scan", "constant"])
def test_scan(name):
    """Of a constant operand in a loop the compiler dies."""
    (report,) = reports(name, "v6e", (V, 256, 1000))
    assert_in_place(report, tables=3)
    assert report.counted


def test_work_does_not_grow_with_the_table():
    small, large = reports("one", "v6e", (V, 128, 1000), (16 * V, 128, 1000))
    assert small.error is None and large.error is None
    assert small.memory and large.memory
    assert small.memory.temp == large.memory.temp

    def loops(report):
        return [[entry.loop.bundles for entry in k.loops] for k in report.counted]

    assert loops(small) == loops(large)


def test_named_for_a_tpu_without_sparsecores():
    (report,) = reports("named", "v5e", (V, 128, 1000))
    assert "cannot run this update: v5e has no SparseCore" in str(report.error)


def test_traffic_of_a_distinct_row():
    case = cases.Case("", 40, 128, 8)
    problem = helpers.spec(case, cases.arrays(case))
    assert bytes_moved(65_536, 65_536, problem) / 65_536 <= 4200


# Whether jax knows which arrays vary, and which references it would therefore refuse.
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_table_in_shards(monkeypatch, check_vma):
    """Four chips, a quarter of the rows each, every chip the updates of its own."""
    rows, dim, ids = V, 128, 1000
    mesh, spec = four_chips(monkeypatch, "v6e:2x2", AxisType.Auto), PartitionSpec(AXIS)

    def update(state: AdamState, grads, ids):
        first = lax.axis_index(AXIS) * rows
        return sparse_adam_update(*state, ids - first, grads)

    sharded = jax.shard_map(
        update,
        in_specs=(spec, PartitionSpec(), PartitionSpec()),
        out_specs=spec,
        check_vma=check_vma,
    )

    def placed(shape, dtype, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    table: Any = placed((4 * rows, dim), jnp.float32, spec)
    arguments = (
        AdamState(table, table, table),
        placed((ids, dim), jnp.float32, PartitionSpec()),
        placed((ids,), jnp.int32, PartitionSpec()),
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(sharded, donate_argnums=0).lower(*arguments).compile()
    memory = programs.memory(compiled)
    assert memory.alias_size_in_bytes == 3 * 4 * rows * dim
    assert memory.temp_size_in_bytes < 2**22
    assert KERNEL in programs.text(compiled)
