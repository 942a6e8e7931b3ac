"""Two result files side by side."""

from dataclasses import replace

import pytest
from click.testing import CliRunner

from benchmarks import compare
from tests.benchmarks import fakes

FAST = replace(fakes.ROW, ms=(1.0, 1.01, 0.99, 1.0), p50_ms=1.0)
SLOW = replace(fakes.ROW, ms=(2.0, 2.02, 1.98, 2.0), p50_ms=2.0)
OTHER = replace(FAST, case="other")


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [(FAST, SLOW, "slower"), (SLOW, FAST, "faster"), (FAST, FAST, "same")],
)
def test_verdicts(old, new, verdict):
    (change,) = compare.changes(fakes.results(old), fakes.results(new))
    assert change.verdict == verdict


def test_a_sure_change_below_the_noise_is_none():
    slightly = replace(FAST, ms=tuple(1.03 * ms for ms in FAST.ms))
    (change,) = compare.changes(fakes.results(FAST), fakes.results(slightly))
    assert change.interval.low > 1 and change.verdict == "same"


def test_rows_without_times_or_without_a_fellow_are_left_out():
    failed = replace(fakes.ROW, case="other", status="failed")
    old, new = fakes.results(FAST, failed), fakes.results(SLOW, OTHER)
    assert [c.new.case for c in compare.changes(old, new)] == ["small"]


def test_runs_are_merged():
    merged = compare.merged([fakes.results(FAST), fakes.results(SLOW)])
    (row,) = merged.rows
    assert row.ms == FAST.ms + SLOW.ms and row.p50_ms == pytest.approx(1.495)


def test_files_are_compared_on_the_command_line(tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    fakes.results(FAST, machine={"cores": 2}).write(a)
    fakes.results(SLOW, machine={"cores": 4}).write(b)
    done = CliRunner().invoke(compare.compare, [str(a), str(b)])
    assert done.exit_code == 0, done.output
    assert "slower" in done.output and "2.00" in done.output
    assert "not taken on the same machine" in done.output


def test_what_is_neither_file_nor_commit_is_said(tmp_path):
    done = CliRunner().invoke(compare.compare, ["no-such-commit", "HEAD"])
    assert done.exit_code == 1
    assert "no-such-commit is no result file and no commit" in done.output


@pytest.mark.parametrize(
    ("text", "words"),
    [("{}", "is not a result file"), ('{"schema": 3, "rows": []}', "of schema 3")],
)
def test_a_wrong_file_is_said(tmp_path, text, words):
    right, wrong = tmp_path / "right.json", tmp_path / "wrong.json"
    fakes.results(FAST).write(right)
    wrong.write_text(text)
    done = CliRunner().invoke(compare.compare, [str(right), str(wrong)])
    assert done.exit_code == 1 and "wrong.json" in done.output and words in done.output


def test_a_file_and_a_commit_are_not_compared(tmp_path):
    path = tmp_path / "a.json"
    fakes.results(FAST).write(path)
    done = CliRunner().invoke(compare.compare, ["HEAD", str(path)])
    assert done.exit_code == 1
    assert "compare two result files, or two commits" in done.output


@pytest.mark.parametrize(
    "option", [("--times", "0"), ("--rounds", "-1"), ("--case", "x"), ("--impl", "y")]
)
def test_options_for_commits_are_checked_at_once(option):
    done = CliRunner().invoke(compare.compare, ["HEAD", "HEAD", *option])
    assert done.exit_code == 2 and "Invalid value" in done.output
