"""Every contender that is installed gives the numbers that it should."""

import importlib.util

import jax
import numpy as np
import pytest

from benchmarks import contenders
from benchmarks.cases import BFLOAT16, Case
from benchmarks.check import check
from benchmarks.contenders import CONTENDERS
from benchmarks.contenders.bare_loop import BareLoop
from benchmarks.timing import measure
from benchmarks.workload import Workload, valid

NEEDS = {
    "keras": "keras",
    "torch": "torch",
    "torch_rows": "torch",
    "fbgemm": "fbgemm_gpu",
    "fbgemm_rows": "fbgemm_gpu",
}
ABSENT = {
    name: module
    for name, module in NEEDS.items()
    if importlib.util.find_spec(module) is None
}
UPDATES = [name for name, each in CONTENDERS.items() if each.expected is not None]
CASES = [
    Case(distribution, 300, 8, 200, distribution)
    for distribution in ("zipf", "padded", "equal")
]
CASE = CASES[0]


@pytest.mark.filterwarnings("ignore")  # FBGEMM warns when it is imported
@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case.name}")
        for name in UPDATES
        for case in CASES
        if name not in ABSENT and CONTENDERS[name].unsupported(case) is None
    ],
)
def test_a_first_update_is_the_references(name, case, monkeypatch):
    monkeypatch.setattr("benchmarks.workload.ROTATED", 30_000)  # two or three states
    contender = CONTENDERS[name]
    workload = Workload.of(case)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        running = contender.start(workload)
        check(contender, running, workload)
        for turn in range(1, 5):  # the states take turns, and none is lost
            running.step(turn)()
    assert running.compile_seconds >= 0


def test_one_that_is_not_installed_is_a_row_that_says_so():
    rows = measure(CASE, [CONTENDERS[name] for name in ABSENT], rounds=1)
    for row, (name, module) in zip(rows, ABSENT.items(), strict=True):
        assert (row.impl, row.status) == (name, "skipped")
        assert module in row.reason or "torch" in row.reason
        assert "is not installed" in row.reason


def test_reasons_to_leave_a_case_out():
    def reason(name: str, **changes: object) -> str | None:
        case = Case("other", 300, 8, 200, **changes)  # type: ignore[arg-type]
        return CONTENDERS[name].unsupported(case)

    assert reason("at_set") is None
    assert reason("at_set", dtypes=BFLOAT16) == "written for float32"
    assert reason("torch", options={"clipvalue": 1.0}) == "written without clipvalue"
    assert "padding" in (reason("torch", distribution="padded") or "")
    assert reason("optax", options={"lazy_adam": False}) is None
    assert "TPU only" in (reason("tensorcore") or "")
    assert reason("xla", options={"use_gradient_accumulation": False}) is None


@pytest.mark.parametrize("name", [contenders.COPY])
def test_the_copy_copies(name, monkeypatch):
    monkeypatch.setattr("benchmarks.contenders.memory_copy.COPIED", 4096)
    running = CONTENDERS[name].start(Workload.of(CASE))
    check(CONTENDERS[name], running, Workload.of(CASE))


def test_the_bare_loop_touches_the_rows_of_the_batch_and_no_others():
    case = CASES[1]  # with padding
    running = CONTENDERS["bare_loop"].start(workload := Workload.of(case))
    assert isinstance(running, BareLoop)
    state, (ids, grads) = workload.first_state(), workload.batches[0]
    running.step(0)()
    sums = np.zeros_like(state[0])
    np.add.at(sums, ids[valid(ids, case)], grads[valid(ids, case)])
    for old, new in zip(state, running.states[0], strict=True):
        np.testing.assert_allclose(new, old + sums, rtol=1e-5, atol=1e-5)
