"""The CPU kernel without Python around it: sanitizers, thread counts, far addresses.

`driver.cc` runs each update with every instruction set that the processor has and
on pools of 1 to 8 threads, and insists on the same bits; here its result is compared
with the reference.
"""

import dataclasses
import itertools
import shutil
import struct
import subprocess
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import hatch_build
from sparse_adam import reference
from sparse_adam.kernels import cpu
from tests import cases, helpers, strategies
from tests.cases import CASES, MIXED, Case
from tests.helpers import assert_bitwise_equal
from tests.kernels import stored
from tests.ways import Way

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / hatch_build.SOURCES
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


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def driver(request, tmp_path_factory):
    """The driver, sanitized if this machine can."""
    binary = tmp_path_factory.mktemp("driver") / "driver"
    for sanitizer in ([f"-fsanitize={request.param}"], []):
        command = [
            *(*hatch_build.find_compiler(), *hatch_build.FLAGS, *sanitizer),
            *("-O1", "-g", "-fno-sanitize-recover=all", "-Wall", "-Wextra"),
            *("-I", str(SOURCES), str(HERE / "driver.cc")),
            *(str(SOURCES / name) for name in ("loops.cc", "sort.cc", "update.cc")),
            *("-o", str(binary)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 and subprocess.run([binary], input=b"").returncode == 0:
            return binary
    raise AssertionError(done.stderr)


# Rows that share lines and rows of several, in every pair of halves.
LAYOUTS = tuple(
    Case("layout", 50, dim, 40, "wild", (*dtypes, "float32"), options=options)
    for dim in (3, 17, 32, 100, 128, 300)
    for dtypes in itertools.product(("float32", "bfloat16"), repeat=3)
    for options in ({}, {"lazy_adam": False})
)


def run(driver, updates):
    done = subprocess.run([driver], input=b"".join(updates), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def encoded(case, arrays, packed=False, seeds=None):
    """An update as the driver reads it."""
    problem = helpers.problem(case, arrays, packed)
    attributes = cpu.attributes(problem)
    state, ids, grads, weights = arrays
    sources = weights.get("sample_ids", np.arange(case.num_ids))
    inside = (ids >= 0) & (ids < case.num_rows)
    numbers = [
        *(case.num_rows, case.dim, case.num_ids, len(grads)),
        *(attributes[name] for name in ("rows_per_group", "stride", "group_stride")),
        *(*attributes["first"], *attributes["encodings"]),
        *(x.nbytes for x in state_of(state, packed)),
        *([0, 0] if packed else []),
        *(grads.dtype != np.float32, case.weighted, seeds is not None),
        *(attributes[name] for name in ("lazy", "accumulate", "sum_inside_sqrt")),
    ]
    floats = [
        *(RATE, *(attributes[name] for name in ("beta_1", "beta_2", "epsilon"))),
        attributes["decay"] * (np.float32(RATE) if attributes["decay_by_rate"] else 1),
        *(attributes[f"{what}_{side}"] for what, side in _BOUNDS),
    ]
    wild = np.where(inside, ids, [-1, case.num_rows, 2**31 - 1, -(2**31)][len(ids) % 4])
    given = [*state_of(state, packed), grads, np.int32(wild), np.int32(sources)]
    given += [weights["gains"]] if case.weighted else []
    given += [np.int32(seeds)] if seeds is not None else []
    header = struct.pack("22q10f", *map(int, numbers), *floats, 0)
    return header + b"".join(x.tobytes() for x in given)


_BOUNDS = [(what, side) for what in ("gradient", "weight") for side in ("min", "max")]


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
    results = memoryview(run(driver, updates))
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
    run(driver, updates)


def test_tables_beyond_32_bits(driver):
    done = subprocess.run([driver, "large"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_prefetches_are_there():
    # A compiler may take a function that only prefetches for one without effects.
    disassembler = shutil.which("objdump")
    if disassembler is None or not cpu.LIBRARY.exists():
        assert "__builtin_prefetch" in (SOURCES / "update.cc").read_text()
        return
    code = subprocess.check_output([disassembler, "-d", cpu.LIBRARY], text=True)
    assert "prefetch" in code or "prfm" in code
