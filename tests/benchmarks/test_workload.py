"""The cases of the benchmarks, their batches and their bytes."""

import ast
import dataclasses

import numpy as np
import pytest

from benchmarks.cases import BENCHMARKS, Case
from benchmarks.check import check
from benchmarks.contenders import jax_programs
from benchmarks.contenders.base import adam
from benchmarks.results import ROOT
from benchmarks.workload import ROTATED, Workload, row_bytes
from sparse_adam.kernels.cpu import bytes_moved
from tests import cases
from tests.benchmarks import fakes


def small(case: Case) -> Case:
    """The same in the small, with ids that repeat where those of the case do."""
    return dataclasses.replace(case, num_rows=300, dim=16, num_ids=100)


@pytest.mark.parametrize("case", BENCHMARKS, ids=lambda case: case.name)
def test_every_benchmark_case_is_right_in_the_small(case):
    workload = Workload.of(small(case))
    update = jax_programs.ours("xla", workload.case)
    states = jax_programs.States(workload, lambda state: state)
    running = jax_programs.Jitted(update, workload, states)
    check(fakes.contender(expected=adam), running, workload)


def test_benchmarks_import_nothing_from_the_tests():
    files = sorted((ROOT / "benchmarks").rglob("*.py"))
    assert len(files) > 20
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            assert "tests" not in [name.split(".")[0] for name in modules], file


def test_names_of_cases_are_unique():
    for group in (BENCHMARKS, cases.CASES):
        names = [case.name for case in group]
        assert len(names) == len(set(names))


def test_batches_are_the_same_every_time_and_differ_from_one_another():
    first, again = Workload.of(fakes.SMALL), Workload.of(fakes.SMALL)
    for one, other in zip(first.batches, again.batches, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.grads, other.grads)
    assert not np.array_equal(first.batches[0].ids, first.batches[1].ids)


def test_repeated_ids_repeat():
    case = Case("repeated", 1000, 8, 64, "repeated", repeats=16)
    for ids, _ in Workload.of(case).batches:
        assert set(np.unique(ids, return_counts=True)[1]) == {16}
    assert Workload.of(case).unique == 4


def test_least_bytes_are_those_that_the_kernel_states():
    workload = Workload.of(Case("distinct", 200, 32, 100, "distinct"))
    assert workload.unique == 100 * 100 / 100 or workload.unique <= 100
    stated = bytes_moved(100, round(workload.unique), 32)
    assert workload.least_bytes() == pytest.approx(stated, rel=0.01)


def test_least_bytes_count_dtypes_slots_and_dense_updates():
    case = Case("padded", 50, 4, 40, "padded", dtypes=cases.BFLOAT16)
    workload = Workload.of(case)
    batch = 4 * 40 + 2 * 40 * 4
    assert workload.least_bytes() == batch + 2 * workload.unique * 4 * 6
    assert workload.least_bytes(slots=0) == batch + 2 * workload.unique * 4 * 2
    dense = dataclasses.replace(case, options={"lazy_adam": False})
    assert Workload.of(dense).least_bytes() == batch + 2 * 50 * 4 * 6


def test_small_tables_take_turns():
    workload = Workload.of(fakes.SMALL)
    size = row_bytes(fakes.SMALL) * fakes.SMALL.num_rows
    assert (workload.copies - 1) * size < ROTATED <= workload.copies * size
    assert Workload.of(Case("large", 10**6, 128, 8)).copies == 1


def test_weighted_cases_are_refused():
    with pytest.raises(ValueError, match="weighted"):
        Workload.of(Case("weighted", 10, 4, 4, weighted=True))
