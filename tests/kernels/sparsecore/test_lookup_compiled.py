"""The lookup as libtpu compiles it for each generation that has SparseCores."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks.static import StaticCase, count_all
from benchmarks.static.lookups import combined
from benchmarks.static.programs import find
from tests.kernels.sparsecore.subcore_loops import Loops, check_counts

V, N = 1_000_000, 65_520
CHUNK = 128
# At D = 128, bundles on one subcore: the sum of an occurrence, and a whole chunk, per
# occurrence. Where rows are only copied no chunk runs the sum. Limits, and counts.
PROGRAMS = ("combine_1", "packed_combine_20")
LIMITS = {"v5p": (20, 4, 22), "v6e": (20, 4, 22), "7x": (12, 4, 14)}
COUNTS = {
    "v5p": (17, 2.4, 18.9),
    "v6e": (17, 2.4, 18.9),
    "7x": (9, 2.1, 10.4),
}


def build_scan(rows, dim, ids):
    """Three batches, one after the other, of constant samples and gains."""
    run, (stored, batch, owners, gains), _ = combined(
        rows, dim, ids, places=3, weighted=True
    )

    def looked_up(stored, batches, owners, gains):
        def step(total, ids):
            gains = jnp.full(ids.shape, 0.5)
            return total + run(stored, ids, owners, gains).sum(), None

        return lax.scan(step, jnp.float32(0), batches)[0]

    batches = jax.ShapeDtypeStruct((3, *batch.shape), batch.dtype)
    return looked_up, (stored, batches, owners, gains), ()


scan = dataclasses.replace(find("combine_3"), name="scan", build=build_scan)


def reports(chip, *cases):
    given = [StaticCase(name, chip, V, dim, ids) for name, dim, ids in cases]
    found = list(count_all(given))
    for report in found:
        assert report.error is None, f"{report.program} for {chip}: {report.error}"
    return found


@pytest.mark.parametrize("chip", COUNTS)
def test_bundles_of_an_id(chip):
    copied, added = map(Loops, reports(chip, *((p, 128, N) for p in PROGRAMS)))
    for loops in (copied, added):
        assert loops.streams == {"indirect.gather": 2, "indirect.scatter": 2}
        memory = loops.report.memory
        assert memory is not None
        assert memory.temp < 16 * N  # the words alone: no rows before they are added
    (add,) = added.named("add")
    vectors = add.counts.vst
    assert add.counts.vld == vectors + 1  # no spills
    counts = add.cycles, copied.lookup(CHUNK, sums=False), added.lookup(CHUNK)
    check_counts(counts, LIMITS[chip], COUNTS[chip], chip)


OTHERS = (
    ("packed_combine_3_weighted", 32, 3000),
    ("packed_combine_20_ragged", 200, 2000),
    ("combine_3_weighted", 256, 3000),
    (f"{__name__}:scan", 128, 3000),
)


def test_other_batches_and_a_loop():
    for report in reports("v6e", *OTHERS):
        assert report.counted


@pytest.mark.parametrize("chip", COUNTS)
def test_samples_in_any_order_are_sorted_and_no_row_is_written(chip):
    (report,) = reports(chip, ("packed_combine_20_sparse", 128, N))
    assert report.memory is not None
    assert report.memory.temp < 64 * N  # some words an id; a row is 512 bytes
