"""Rows of results: timed, skipped with a reason, failed with an error."""

from functools import partial

import pytest

from benchmarks import contenders, timing
from benchmarks.contenders import COPY
from tests.benchmarks import fakes


def measure(*field, rounds=3, clock=None):
    """Times with a clock that reads 4 ms for every call."""
    return timing.measure(
        fakes.SMALL, field, rounds, clock=clock or fixed(0.004), rest=0
    )


def fixed(seconds):
    def clock(call):
        call()
        return seconds

    return clock


def missing(workload):
    raise ModuleNotFoundError("no", name="nowhere")


def test_a_row_says_what_was_done_and_what_it_is_worth():
    copy = fakes.contender(COPY, expected=None, moves=1e6)
    row, other = measure(fakes.contender("cpu"), copy)
    assert (row.status, row.impl, row.rows, row.dim, row.ids) == (
        "ok",
        "cpu",
        60,
        8,
        40,
    )
    assert row.ms == (4.0, 4.0, 4.0) and row.p50_ms == row.p20_ms == row.least_ms == 4.0
    assert row.compile_s == 0.5 and row.ratio == 1
    assert row.bytes == 4 * 40 + 40 * 32 + 2 * row.unique * 96
    assert row.gb_per_s == pytest.approx(row.bytes / 1e9 / 0.004, abs=1e-3)
    assert row.share_of_copy == pytest.approx(row.bytes / 1e6, abs=1e-4)
    assert other.ratio is None and other.share_of_copy == 1


def test_what_cannot_run_is_skipped_and_what_breaks_is_a_row():
    ours, wrong, late, absent, refused = measure(
        fakes.contender("cpu"),
        fakes.contender("wrong", start=partial(fakes.Reference, factor=2)),
        fakes.contender("late", start=partial(fakes.Reference, breaks_at=4)),
        fakes.contender("absent", start=missing),
        fakes.contender("refused", unsupported=lambda case: "no such mood"),
    )
    assert ours.status == "ok"
    assert wrong.status == "failed" and "sampled numbers are wrong" in wrong.reason
    assert (late.status, late.reason) == ("failed", "RuntimeError: out of order")
    assert (absent.status, absent.reason) == ("skipped", "nowhere is not installed")
    assert (refused.status, refused.reason) == ("skipped", "no such mood")
    assert all(row.ms == () for row in (wrong, late, absent, refused))


def test_the_slow_are_given_few_rounds():
    (row,) = measure(fakes.contender(), rounds=9, clock=fixed(2 * timing.PATIENCE))
    assert len(row.ms) == timing.FEW


def test_without_one_of_ours_there_is_no_ratio():
    (row,) = measure(fakes.contender("torch"))
    assert row.status == "ok" and row.ratio is None


def test_every_contender_has_a_name_and_a_title_of_its_own():
    everybody = contenders.CONTENDERS.values()
    assert list(contenders.CONTENDERS) == [each.name for each in everybody]
    assert len({each.title for each in everybody}) == len(contenders.CONTENDERS)
    assert tuple(contenders.CONTENDERS)[: len(contenders.OURS)] == contenders.OURS
