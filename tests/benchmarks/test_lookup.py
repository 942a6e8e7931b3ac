"""`lookup` times bags of ids, writes a result file, and has a table in the report."""

import json

import pytest
from click.testing import CliRunner

from benchmarks import lookup
from benchmarks.__main__ import main
from benchmarks.lookup import CONTENDERS, Case
from benchmarks.report import lookup_table, page

TINY = Case("tiny", "zipf", rows=50, dim=8, samples=6, places=3)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(lookup, "QUICK", (TINY,))


def test_the_command_writes_rows_that_the_report_shows(tiny, tmp_path):
    out = tmp_path / "lookup.json"
    arguments = ["--quick", "--impl", "ours", "--impl", "xla", "--rounds", "2"]
    done = CliRunner().invoke(main, ["lookup", *arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    ours, xla = json.loads(out.read_text())["rows"]
    assert (ours["impl"], ours["status"], len(ours["ms"])) == ("ours", "ok", 2)
    assert (ours["rows"], ours["dim"], ours["ids"]) == (50, 8, 18)
    assert ours["ratio"] == 1 and xla["ratio"] > 0 and len(xla["ratio_bounds"]) == 2
    assert "sparse_adam, C++" in done.output
    header, _, line = lookup_table(out).splitlines()
    assert header == "| case | V | D | bags | ms | sparse_adam, XLA |"
    assert line.startswith("| `tiny` | 50 | 8 | 6 of 3 | ")
    assert "## Bags of ids" in page(tmp_path)


@pytest.mark.parametrize("form", ["padded", "sparse"])
def test_all_give_the_same_sums(form):
    case = Case("tiny", "uniform", rows=50, dim=8, samples=6, places=3, form=form)
    rows = lookup.measure(case, ["ours", "xla"], rounds=1)
    assert [row.status for row in rows] == ["ok", "ok"], [row.reason for row in rows]


def test_other_sums_are_a_failure_and_so_is_the_command(tiny, tmp_path, monkeypatch):
    def doubled(workload):
        right = workload.expected()
        return lambda turn: 2 * right

    monkeypatch.setitem(CONTENDERS, "xla", ("other", doubled))
    out = tmp_path / "lookup.json"
    arguments = ["--quick", "--impl", "ours", "--impl", "xla", "--rounds", "1"]
    done = CliRunner().invoke(main, ["lookup", *arguments, "--out", str(out)])
    assert done.exit_code == 1 and "AssertionError" in done.output
    ours, other = json.loads(out.read_text())["rows"]
    assert (ours["status"], other["status"]) == ("ok", "failed")
    assert other["ms"] == []
