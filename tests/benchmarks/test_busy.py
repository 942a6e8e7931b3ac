"""A machine that other programs keep busy is warned of."""

import time

import pytest

from benchmarks import busy
from benchmarks.busy import Clock


def test_what_others_took_is_told():
    before, after = Clock(100, 50, 5), Clock(110, 68, 8)
    assert busy.cores_of_others(before, after) == 1.5
    assert busy.cores_of_others(before, Clock(110, 52, 8)) == 0
    assert busy.cores_of_others(before, before) is None
    assert busy.cores_of_others(None, after) is None


def test_the_clock_counts_busy_ticks_of_all_cores(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 4000 500 6 7 8 99 0\ncpu0 1 1 1 1\n")
    monkeypatch.setattr(busy, "STAT", stat)
    monkeypatch.setattr(busy.os, "sysconf", lambda name: 100)
    clock = busy.read_clock()
    # User, nice, system, interrupts and stolen time; neither idle nor waiting, and
    # guests are in user time already.
    assert clock is not None and clock.everybody == pytest.approx(1.71)


def test_a_system_that_does_not_tell_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(busy, "STAT", tmp_path / "none")
    monkeypatch.setattr(busy, "LONG_ENOUGH", 0)
    assert busy.read_clock() is None and busy.sample() is None
    assert busy.warning(None, "before the run") is None


def test_own_work_is_counted_apart():
    before = busy.read_clock()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    after = busy.read_clock()
    assert before is not None and after is not None
    assert 0.2 < after.own - before.own < 5


def test_a_warning_names_the_cores(monkeypatch):
    monkeypatch.setattr(busy.os, "cpu_count", lambda: 2)
    text = busy.warning(1.234, "during the run")
    assert text is not None
    assert "during the run other programs took 1.2 of 2 cores" in text
    assert "quiet machine" in text
    assert busy.warning(0.2, "during the run") is None
    monkeypatch.setattr(busy.os, "cpu_count", lambda: 64)
    assert busy.warning(1.234, "during the run") is None
    assert busy.warning(7.0, "during the run") is not None
