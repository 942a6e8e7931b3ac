"""The CPU kernel without Python around it: sanitizers, thread counts, far addresses.

`driver.cc` runs each update with every instruction set that the processor has and
on pools of 1 to 8 threads, and insists on the same bits; here its result is compared
with the reference.
"""

import dataclasses
import itertools
import shutil
import subprocess

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_adam import reference
from sparse_adam.kernels import cpu
from tests import cases, helpers, strategies
from tests.cases import CASES, MIXED, Case
from tests.helpers import assert_bitwise_equal
from tests.kernels import stored
from tests.kernels.cpu.driver import SANITIZERS, SOURCES, Driver, driver_input
from tests.ways import Way

RATE = 0.01
EACH = {"use_gradient_accumulation": False}
# Many blocks, hot rows across them, a parallel sort; and the sweep beside it.
LARGE = (
    Case("zipf", 500, 48, 4000, "zipf"),
    Case("hot", 3, 33, 3000),
    Case("equal", 40, 128, 1500, "equal", weighted=True),
    Case("each_occurrence", 100, 16, 3000, "wild", options=EACH | {"beta_2": 0.9}),
    Case("sort", 70_000, 3, 40_000, "padded"),
    Case("sorted", 5000, 17, 20_000, "sorted"),
    Case("sweep", 5000, 40, 3000, "wild", MIXED, options={"lazy_adam": False}),
)


# Rows that share lines and rows of several, in every pair of halves.
LAYOUTS = tuple(
    Case("layout", 50, dim, 40, "wild", (w, m, v, "float32"), options=options)
    for dim in (3, 17, 32, 100, 128, 300)
    for w, m, v in itertools.product(("float32", "bfloat16"), repeat=3)
    for options in ({}, {"lazy_adam": False})
)


def encoded(case, arrays, packed=False, seeds=None):
    """A case as the driver reads it."""
    problem = helpers.spec(case, arrays, packed)
    state, ids, grads, weights = arrays
    inside = (ids >= 0) & (ids < case.num_rows)
    wild = np.where(inside, ids, [-1, case.num_rows, 2**31 - 1, -(2**31)][len(ids) % 4])
    decay = np.float32(case.options.get("weight_decay_factor", 0))
    if case.options.get("multiply_weight_decay_factor_by_learning_rate"):
        decay *= np.float32(RATE)
    return driver_input(
        state_of(state, packed),
        grads,
        wild,
        weights.get("sample_ids", np.arange(case.num_ids)),
        weights.get("gains"),
        np.array([RATE, decay, 1], np.float32),
        seeds,
        cpu.attributes(problem),
    )


def state_of(state, packed):
    """The arrays that the kernel is given."""
    return (stored.pack(state),) if packed else state


def assert_matches_reference(driver, drawn):
    """Runs the driver once for all (case, seed, packed)."""
    updates, expected = [], []
    for case, seed, packed in drawn:
        arrays = cases.arrays(case, seed)
        updates.append(encoded(case, arrays, packed))
        state, ids, grads, weights = arrays
        options = {"learning_rate": RATE, **case.options, **weights}
        expected.append(
            reference.sparse_adam_update(
                *helpers.as_float32(state), ids, grads, **options
            )
        )
    results = memoryview(driver(updates))
    for (case, seed, packed), right in zip(drawn, expected, strict=True):
        state, ids, _, _ = cases.arrays(case, seed)
        new = []
        for x in state_of(state, packed):
            new.append(np.frombuffer(results[: x.nbytes], x.dtype).reshape(x.shape))
            results = results[x.nbytes :]
        if packed:
            (lines,) = new
            new = stored.unpack(lines, state)
            # What is no weight is as it was.
            assert_bitwise_equal(lines, stored.pack(new))
        assert_untouched(case, ids, new, state)
        each = not case.options.get("use_gradient_accumulation", True)
        helpers.assert_close_states(
            new,
            state,
            right,
            learning_rate=RATE,
            beta_2=case.options.get("beta_2", 0.999),
            steps=np.unique(ids, return_counts=True)[1].max() if each else 1,
        )
    assert not results


def assert_untouched(case, ids, new, old):
    if case.options.get("lazy_adam", True):
        untouched = ~np.isin(np.arange(case.num_rows), ids)
        for x, before in zip(new, old, strict=True):
            assert_bitwise_equal(x[untouched], before[untouched])


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("named", [CASES, LARGE], ids=["small", "large"])
def test_cases(driver, named, packed):
    assert_matches_reference(driver, [(case, 0, packed) for case in named])


def test_packed_layouts(driver):
    assert_matches_reference(driver, [(case, 0, True) for case in LAYOUTS])


def test_any_case(driver):
    some_case = strategies.supported_cases(Way("plain", "xla", 128))

    @hypothesis.given(some_case, strategies.SEEDS, st.booleans())
    def check(case, seed, packed):
        assert_matches_reference(driver, [(case, seed, packed)])

    check()


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(
    ("dtypes", "seeds"),
    [(cases.FLOAT32, None), (cases.BFLOAT16, (1, -2, 3))],
    ids=["float32", "stochastic"],
)
def test_threads_do_not_change_sums_that_are_rounded(driver, dtypes, seeds, packed):
    updates = []
    for case in LARGE:
        arrays = cases.arrays(dataclasses.replace(case, dtypes=dtypes))
        grads = np.random.default_rng(0).standard_normal(arrays.grads.shape)
        grads = grads.astype(arrays.grads.dtype)
        updates.append(encoded(case, arrays._replace(grads=grads), packed, seeds))
    driver(updates)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_each_part_of_a_loop_is_run_once(sanitizer, tmp_path):
    # Building runs it, too; a loop that waits for ever must not.
    Driver.build(tmp_path, sanitizer, "parallel_driver.cc", [], seconds=60)


def test_tables_beyond_32_bits(driver):
    driver.run_large()


def test_prefetches_are_there():
    # A compiler may take a function that only prefetches for one without effects.
    disassembler = shutil.which("objdump")
    if disassembler is None or not cpu.library.LIBRARY.exists():
        assert "__builtin_prefetch" in (SOURCES / "update.cc").read_text()
        return
    code = subprocess.check_output([disassembler, "-d", cpu.library.LIBRARY], text=True)
    assert "prefetch" in code or "prfm" in code
