"""The campaign draws the same cases from a seed, finds faults, keeps them, goes on."""

import dataclasses
import json
import os
from typing import Any

import jax
import numpy as np
import pytest
from click.testing import CliRunner

import hatch_build
from sparse_adam.check import run
from sparse_adam.check.case import Case
from sparse_adam.check.compare import compare
from sparse_adam.ops import dispatch
from tests.campaign import __main__ as command
from tests.campaign import draws, sanitize, wrong_calls
from tests.campaign.record import TRIES, Progress, Record

SMALL = Case("xla", num_rows=6, dim=8, num_ids=5)


def test_a_seed_draws_the_same_group_and_one_that_can_be_run():
    drawn = [draws.group(seed) for seed in range(60)]
    assert drawn[:9] == [draws.group(seed) for seed in range(9)]
    for group in drawn:
        case = group.base
        assert case.objection() is None
        assert case.num_rows % case.unit == 0
        assert not case.spread or case.num_ids % case.devices == 0
    first, again = (list(drawn[0].cases()) for _ in range(2))
    assert first == again and len(set(first)) == len(first) == drawn[0].size
    assert {case.but(ids="zipf", steps=1, seed=0) for case in first} == {drawn[0].base}


def test_only_one_implementation():
    bases = [draws.group(seed, "cpu").base for seed in range(60)]
    assert {case.implementation for case in bases} == {None, "cpu"}
    assert {case.kind for case in bases} == {"update", "lookup"}


def test_groups_are_of_every_kind():
    bases = [draws.group(seed).base for seed in range(300)]
    ways = {(case.implementation, case.storage) for case in bases}
    names = (None, *dispatch.NAMES)
    assert ways == {
        (name, storage) for name in names for storage in ("plain", "packed")
    }
    assert {case.devices for case in bases} == {1, 2, 4, 8}
    assert {type(case.rule).__name__ for case in bases} == {
        *("AdamRule", "SGDRule", "AdagradRule", "AdagradMomentumRule"),
        *("FTRLRule", "RowWiseAdagradRule"),
    }
    options = {name for case in bases for name, _ in case.options}
    assert {"lazy", "use_gradient_accumulation", "rounding", "clipvalue"} <= options
    kinds = {(case.kind, case.weighted, case.planned, case.spread) for case in bases}
    assert len(kinds) >= 7


@pytest.fixture
def one_small_group(monkeypatch):
    monkeypatch.setattr(draws, "group", lambda seed, only: draws.Group(seed, SMALL, 4))
    run._program.cache_clear()
    yield
    run._program.cache_clear()


def with_a_fault(monkeypatch: Any) -> None:
    """The portable update never writes the last row."""

    def faulty(update: Any) -> Any:
        def broken(state: Any, *others: Any) -> Any:
            new = update(state, *others)
            return tuple(x.at[-1].set(y[-1]) for x, y in zip(new, state, strict=True))

        return broken

    broken = tuple(
        dataclasses.replace(x, update=faulty(x.update)) if x.name == "xla" else x
        for x in dispatch.IMPLEMENTATIONS
    )
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", broken)


def campaign(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(command.main, list(arguments))
    assert isinstance(done.exception, SystemExit | None), done.exception
    return done.exit_code, done.output


def test_it_goes_on_where_it_ended(one_small_group, tmp_path):
    for groups in (1, 2):
        status, text = campaign("--groups", "1", "--out", str(tmp_path))
        assert status == 0 and f"{4 * groups} cases" in text
        assert Record(tmp_path).load().next == groups
    assert not Record(tmp_path).failures.exists()


def test_a_fault_is_found_shrunk_and_kept(one_small_group, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        with_a_fault(patch)
        status, text = campaign("--groups", "1", "--out", str(tmp_path))
    assert status == 1 and "FAILED" in text
    lines = Record(tmp_path).failures.read_text().splitlines()
    first = json.loads(lines[0])
    assert first["seed"] == 0 and "xla plain" in first["case"]
    assert "num_rows=1," in first["smallest"] and first["smallest_ids"] == "[0]"
    run._program.cache_clear()
    jax.clear_caches()
    assert campaign("--groups", "1", "--out", str(tmp_path))[0] == 1  # it stays known
    assert campaign("--seed", "0", "--out", str(tmp_path))[0] == 0  # and is mended


def test_a_seed_that_ends_the_process_is_told_and_passed_over(tmp_path):
    record, progress = Record(tmp_path), Progress(next=5)
    for _ in range(TRIES + 1):
        record.load()
        record.begin(progress)
        progress = record.load()
    assert (progress.next, progress.tries, progress.failures) == (6, 1, 1)
    assert json.loads(record.failures.read_text())["seed"] == 5


def test_stochastic_rounding_may_give_either_neighbour():
    old = np.ones((1, 3), jax.numpy.bfloat16)
    exact = 1 + np.array([[0.0, 0.25, 0.75]]) * 2.0**-7
    up = np.array([[1, 1 + 2.0**-7, 1 + 2.0**-7]]).astype(old.dtype)
    bounds, stepped = np.full((1, 3), 1e-9), np.ones(1, bool)
    arguments: Any = ("x", up, old, exact, bounds, stepped)
    assert "x[0, 1] went" in str(compare(*arguments).fault)
    assert compare(*arguments, stochastic=True).fault is None
    further = ("x", (up + old * 2.0**-6).astype(old.dtype), *arguments[2:])
    assert "3 of 3" in str(compare(*further, stochastic=True).fault)


def test_wrong_calls_are_counted_and_failures_kept(tmp_path, monkeypatch):
    arguments = ("--calls", "--groups", "1", "--out", str(tmp_path))
    monkeypatch.setattr(wrong_calls, "CALLS", 6)
    status, text = campaign(*arguments)
    assert status == 0 and "6 cases" in text and "refused" in text
    last = (tmp_path / "calls" / "last_call.txt").read_text()
    assert last.startswith("drawn(5): Call(sparse_adam_cpu")

    def fail(call: object) -> None:
        raise AssertionError("it wrote beside the rows")

    monkeypatch.setattr(wrong_calls.calls, "check", fail)
    status, text = campaign(*arguments)
    assert status == 1 and "6 failures" in text
    line = json.loads(
        (tmp_path / "calls" / "failures.jsonl").read_text().split("\n")[0]
    )
    assert line["seed"] == 1 and line["case"].startswith("drawn(6): Call(")
    assert "it wrote beside the rows" in line["text"]


def test_a_sanitizer_gets_a_process_of_its_own(tmp_path, monkeypatch):
    ran: list[Any] = []
    monkeypatch.setattr(sanitize, "run", lambda *given: ran.append(given) or 7)
    arguments = ("--sanitize", "thread", "--calls", "--out", str(tmp_path))
    assert campaign(*arguments, "--groups", "2")[0] == 7
    ((sanitizer, command),) = ran
    assert sanitizer == "thread" and command[:2] == ["-m", "tests.campaign"]
    assert "--sanitize" not in " ".join(command) and "--only=cpu" in command
    assert f"--out={tmp_path}/thread" in command
    assert {"--groups=2", "--calls"} < set(command)


@pytest.mark.parametrize("sanitizer", sanitize.CHECKS)
def test_what_a_sanitizer_needs_before_python(sanitizer, tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\necho "/lib/${1#*=}"\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(hatch_build, "find_compiler", lambda: [str(compiler)])
    given = sanitize.environment(sanitizer)
    needed = {"address": "asan", "thread": "tsan"}[sanitizer]
    assert given["LD_PRELOAD"] == f"/lib/lib{needed}.so /lib/libstdc++.so"
    assert given.keys() >= {*os.environ, "ASAN_OPTIONS", "TSAN_OPTIONS"}
    monkeypatch.setattr(hatch_build, "find_compiler", lambda: ["echo"])
    with pytest.raises(RuntimeError, match="set CXX to a g"):
        sanitize.environment(sanitizer)
