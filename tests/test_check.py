"""The check of an installation finds what is broken on purpose, and nothing else."""

import dataclasses
import functools
import json
import os
import re
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam.check import __main__ as command
from sparse_adam.check import compare, report, run, shrink, times
from sparse_adam.check.case import Case
from sparse_adam.check.cases import LIMITS, OUTSIDE, all_cases
from sparse_adam.check.report import Report
from sparse_adam.kernels import sparsecore, sweep, tensorcore
from sparse_adam.ops import dispatch
from sparse_adam.ops.xla import xla_update

SMALL = Case("xla", num_rows=6, dim=8, num_ids=5)


@pytest.fixture
def break_one(monkeypatch):
    """Puts a faulty update in the place of an implementation's."""

    def install(name, fault):
        broken = tuple(
            dataclasses.replace(one, update=fault(one.update))
            if one.name == name
            else one
            for one in dispatch.IMPLEMENTATIONS
        )
        monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", broken)
        run._program.cache_clear()

    yield install
    run._program.cache_clear()


@pytest.fixture
def break_xla(break_one):
    """Puts a faulty update in the place of the portable one."""
    return functools.partial(break_one, "xla")


def other_rows(update):
    """Each row's gradient goes to the next one."""

    def broken(state, batch, scalars, spec):
        ids = jnp.where(batch.ids + 1 < spec.num_rows, batch.ids + 1, batch.ids)
        return update(state, batch._replace(ids=ids), scalars, spec)

    return broken


def last_not_written(update):
    """The last row of the table is never written."""

    def broken(state, batch, scalars, spec):
        new = update(state, batch, scalars, spec)
        return tuple(x.at[-1].set(y[-1]) for x, y in zip(new, state, strict=True))

    return broken


def neighbour_touched(update):
    """Row 0 changes by one bit, whatever is in the batch."""

    def broken(state, batch, scalars, spec):
        new = update(state, batch, scalars, spec)
        return (new[0].at[0].multiply(np.float32(1 + 2**-23)), *new[1:])

    return broken


def not_a_number(update):
    """One weight in a row that is updated becomes NaN."""

    def broken(state, batch, scalars, spec):
        new = update(state, batch, scalars, spec)
        return (new[0].at[batch.ids[0], 3].set(jnp.nan), *new[1:])

    return broken


def rate_doubled_with_decay(update):
    """Only updates with weight decay are wrong."""

    def broken(state, batch, scalars, spec):
        if spec.decays:
            numbers = scalars.numbers * jnp.array([2, 1, 1], jnp.float32)
            scalars = scalars._replace(numbers=numbers)
        return update(state, batch, scalars, spec)

    return broken


def refused(update):
    """The compiler refuses it."""

    def broken(state, batch, scalars, spec):
        raise RuntimeError("no such instruction")

    return broken


def test_a_clean_run_passes(tmp_path, capsys):
    path = tmp_path / "report.txt"
    only = ["--only", "D=8 "]
    assert command.main(["--quick", "--no-times", "--report", str(path), *only]) == 0
    written, printed = path.read_text(), capsys.readouterr().out
    assert re.search(r"PASSED: all 6 cases are right", written)
    assert "wrong" not in written and "raised" not in written
    for line in written.splitlines():
        assert line in printed


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (other_rows, r"table\[\d, 0\] is of a row that is to keep its bits"),
        (last_not_written, r"table\[5, \d\] went from"),
        (not_a_number, r"table\[0, 3\] went from \S+ to nan"),
    ],
)
def test_a_broken_kernel_is_found(break_xla, fault, says):
    assert run.run(SMALL.but(ids="distinct", num_ids=6)).status == "ok"
    break_xla(fault)
    case = SMALL.but(ids="distinct", num_ids=6 - (fault is other_rows))
    outcome = run.run(case)
    assert outcome.status == "wrong" and re.match(says, outcome.text)


def test_one_bit_of_an_untouched_row_is_found(break_xla):
    break_xla(neighbour_touched)
    outcome = run.run(SMALL.but(num_ids=1))
    assert outcome.status == "wrong"
    assert "table[0, 0] is of a row that is to keep its bits" in outcome.text


def test_a_fault_is_reported_made_small_and_avoided(
    break_xla, monkeypatch, tmp_path, capsys
):
    break_xla(rate_doubled_with_decay)
    path = tmp_path / "report.json"
    monkeypatch.setattr(command, "SHRINK_SECONDS", {True: 300.0})
    asked = ["--quick", "--no-times", "--report", str(path)]
    asked += ["--only", "xla plain V=40"]
    for skipped in ("D=8", "D=1024", "lazy", "bfloat16", "gains"):
        asked += ["--skip", skipped]
    assert command.main(asked) == 1
    found = json.loads(path.read_text())
    assert found["verdict"].startswith("FAILED: 1 of ")
    ((title, smallest, ids, fault, around),) = found["failures"]
    assert title.startswith("xla plain: V=40 D=128") and "clipvalue" in title
    assert re.search(
        r"fails: V=\d D=8 N=1 ids=\w+ weight_decay_factor=0.125$", smallest
    ), smallest
    assert re.fullmatch(r"    ids=\[\d\]", ids) and "table[" in fault
    assert around == "  avoided by implementation='cpu'"
    assert title in capsys.readouterr().out


def test_an_exception_is_a_failure_and_the_rest_goes_on(break_xla, tmp_path):
    break_xla(refused)
    path = tmp_path / "report.txt"
    only = ["--only", "xla plain V=40 D=8", "--only", "cpu plain V=40 D=8"]
    assert command.main(["--quick", "--no-times", "--report", str(path), *only]) == 1
    written = path.read_text()
    assert "RuntimeError: no such instruction" in written
    assert re.search(r"^ok +cpu plain +V=40 D=8 ", written, re.MULTILINE)
    assert "FAILED: 1 of 2 cases failed" in written


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        ("sparsecore", {"semaphores": 4}),
        ("sparsecore", {"filled_lists": True}),
        ("sparsecore", {"aligned_lists": True, "row_copies": True}),
        ("tensorcore", {"checks": True}),
        ("sweep", {"checks": True}),
    ],
)
def test_the_form_that_avoids_a_fault_is_named(break_one, name, forms):
    def without(update):
        """Stands for a kernel on a chip that has not what all other forms need."""

        def broken(state, batch, scalars, spec, config, interpret):
            new = xla_update(state, batch, scalars, spec)
            fine = config and all(getattr(config, n) == v for n, v in forms.items())
            return new if fine else state

        return broken

    break_one(name, without)
    case = Case(name, num_rows=6, num_ids=5)
    assert run.run(case).status == "wrong"
    config, implementation = shrink.ways_around(case)
    kind = {"sparsecore": sparsecore, "tensorcore": tensorcore, "sweep": sweep}[name]
    safe = kind.Config.SAFE_FORMS
    named = forms if len(forms) == 1 else safe
    assert config.startswith("config=Config(") and implementation.endswith("'cpu'")
    for form, value in safe.items():
        assert (f"{form}={value}" in config) == (form in named)


def test_a_broken_lookup_is_found(monkeypatch):
    case = Case(kind="lookup", num_rows=7, dim=8, num_ids=9, ids="wild")
    assert run.run(case).status == "ok"
    monkeypatch.setattr(run, "lookup", lambda table, ids: table[ids % table.shape[0]])
    outcome = run.run(case)
    assert outcome.status == "wrong" and outcome.text.startswith("rows[")


def test_rounding_that_is_biased_is_found(break_xla):
    rounding = (("rounding", "stochastic"),)
    case = SMALL.but(kind="mean", num_rows=16, num_ids=16, dim=128, ids="distinct")
    case = case.but(dtypes=("bfloat16",) * 3, options=rounding)
    assert run.run(case).status == "ok"

    def to_nearest(update):
        def broken(state, batch, scalars, spec):
            return update(state, batch, scalars._replace(seeds=None), spec)

        return broken

    break_xla(to_nearest)
    outcome = run.run(case)
    assert outcome.status == "wrong" and "the mean of table is" in outcome.text


def test_a_case_that_never_ends_is_told(monkeypatch, tmp_path, capsys):
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    path = tmp_path / "report.txt"
    made = Report(path, quick=True)
    with command.watched(made, "tensorcore plain V=8", 0.05):
        assert "running  tensorcore plain V=8" in path.read_text()
        assert ended.wait(10)
    assert "--skip 'tensorcore plain V=8'" in path.read_text()
    ended.clear()
    with command.watched(made, "sweep plain V=8", 0.05):
        pass
    time.sleep(0.1)
    assert not ended.is_set()


def test_bounds_are_roundings():
    """A step that is wrong by a thousandth is outside of them, one rounding inside."""
    old = np.ones((2, 4), np.float32)
    want = np.full((2, 4), 0.99, np.float64)
    bounds, rows = np.full((2, 4), 4e-7), np.array([True, False])
    new = np.where(rows[:, None], want, old).astype(np.float32)
    assert compare.compare("table", new, old, want, bounds, rows).fault is None
    wrong = new - np.float32(1e-5) * rows[:, None].astype(np.float32)
    found = compare.compare("table", wrong, old, want, bounds, rows)
    assert found.fault is not None and "table[0, 0]" in found.fault
    assert found.error == pytest.approx(1e-5, rel=0.01) and found.bound == 4e-7


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_bfloat16_is_a_rounding_of_a_number_within_the_bounds(off):
    exact = np.full((1, 1), 1 + 0.3 / 128)
    steps = np.float32(1 + off / 128)
    new = np.full((1, 1), steps).astype(jnp.bfloat16)
    rows, bounds = np.array([True]), np.full((1, 1), 1e-5)
    fault = compare.compare("table", new, new, exact, bounds, rows).fault
    assert (fault is None) == (off == 0)


def test_shrinking_keeps_to_the_fault():
    case = SMALL.but(rule=OUTSIDE, options=LIMITS)
    smaller = set(shrink.simplifications(case))
    assert {SMALL, SMALL.but(options=LIMITS), case.but(num_ids=1)} <= smaller
    assert case not in smaller
    mean = SMALL.but(kind="mean")
    assert {case.num_ids for case in shrink.simplifications(mean)} <= {mean.num_ids}
    safer, smallest = (one.config for one in shrink.other_configs(Case("sweep")))
    assert safer == sweep.Config(64, 32, checks=True)
    assert smallest == sweep.Config(16, 16, 1)


def test_every_implementation_storage_and_width_is_checked_on_a_tpu(monkeypatch):
    monkeypatch.setattr(dispatch.Implementation, "compiled_on", lambda *_: True)
    cases = list(all_cases("tpu", 4, quick=False))
    ways = {(case.implementation, case.storage) for case in cases}
    assert ways >= {(n, s) for n in dispatch.NAMES for s in ("plain", "packed")}
    for storage in ("plain", "packed"):
        own = [c for c in cases if c.way == f"sparsecore {storage}"]
        assert {8, 128, 1024} <= {case.dim for case in own}
        assert {"hot", "wild", "padded", "nan"} <= {case.ids for case in own}
        assert {case.kind for case in own} == {"update", "mean"}
    assert {case.devices for case in cases} == {1, 4}
    assert len(list(all_cases("tpu", 4, quick=True))) < len(cases) / 1.5


def test_tables_over_devices_are_checked():
    devices = min(4, jax.device_count())
    for spread in (False, True):
        case = Case(devices=devices, num_rows=16, num_ids=8, dim=8, spread=spread)
        assert run.run(case.but(ids="wild")).status == "ok"


def test_times_stand_beside_bounds(monkeypatch):
    small: Any = times.static_bounds() | {"rows": 512, "ids": 64}
    monkeypatch.setattr(times, "static_bounds", lambda: small)
    found = list(times.timings("cpu", quick=False))
    assert [one.name for one in found] == [
        *("cpu plain", "cpu packed", "xla plain", "xla packed"),
    ]
    assert all(one.microseconds > 0 and one.bound for one in found)
    assert "times" in str(found[0]) and "copying its bytes" in str(found[0])
    programs = {times.PROGRAMS[key] for key in times.PROGRAMS}
    assert programs == set(small["programs"])


def test_the_report_names_no_host_and_no_home(monkeypatch):
    monkeypatch.setattr(report.platform, "node", lambda: "host-of-somebody")
    monkeypatch.setattr(report.Path, "home", lambda: "/home/somebody")
    text = report.own_text("cannot open /home/somebody/x on host-of-somebody")
    assert text == "cannot open ~/x on host"
    assert len(report.own_text("x" * 10_000)) < 5_000
