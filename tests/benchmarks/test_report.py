"""The tables of the docs are those of the committed results."""

import shutil
from dataclasses import replace

import pytest

from benchmarks.report import PAGES, TABLES, headline_table, page, with_tables
from benchmarks.results import COMMITTED, ROOT
from benchmarks.static.tables import sorts_table
from tests.benchmarks import fakes


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_up_to_date(path):
    text = path.read_text()
    assert with_tables(text) == text, "run `python -m benchmarks report`"
    assert text.count("<!-- table: ") == text.count("<!-- end of table -->") > 0


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_lines_and_as_many_cells_in_each(name):
    source, make = TABLES[name]
    lines = make(COMMITTED / source).splitlines()
    assert len(lines) > 2
    assert len({line.count("|") for line in lines}) == 1


def test_a_page_is_made_of_whatever_results_there_are(tmp_path):
    shutil.copy(COMMITTED / "scale.json", tmp_path)
    text = page(tmp_path)
    assert "## How cost grows" in text and "cost_by_rows.png" in text
    assert "## One update" not in text and (tmp_path / "cost_by_rows.png").exists()


def test_the_page_of_a_quick_run_has_full_tables_and_titles_in_words(tmp_path):
    timed = replace(fakes.ROW, ms=(2.0,), p50_ms=2.0, ratio=1.0)
    rows = [
        replace(timed, case=case, distribution=ids)
        for case, ids in (("quick", "zipf"), ("quick_uniform", "uniform"))
    ]
    fakes.results(*rows, machine={"cores": 2}).write(tmp_path / "update.json")
    text = page(tmp_path)
    assert "|  | zipf: ms | times ours | of copy | uniform: ms |" in text
    assert "| ours | **2.0** | 1.0 |" in text
    assert "![Milliseconds of one update](times.png)" in text
    for part in text.split("\n\n"):
        if part.startswith("|"):
            assert len(part.splitlines()) > 2, part


def test_a_contender_that_has_one_case_leaves_the_other_empty(tmp_path):
    timed = replace(fakes.ROW, ms=(2.0,), p50_ms=2.0, ratio=1.0)
    rows = (
        *(replace(timed, case="zipf"), replace(timed, case="uniform")),
        replace(timed, case="zipf", impl="torch", title="torch"),
    )
    path = tmp_path / "update.json"
    fakes.results(*rows).write(path)
    assert "| torch | **2.0** | 1.0 |  |  |  |  |" in headline_table(path)


def test_sorts_are_shown_by_their_bundles():
    def record(by, chip, error=None):
        name = f"benchmarks.static.sorts:{by}_pairs"
        return {"program": name, "chip": chip, "error": error, "ids": 1000} | {
            "engines": {} if error else {"tensorcore": 0.5}
        }

    found = {"records": [record("kernel", "7x"), record("xla", "7x", "too long")]}
    header, lines = sorts_table(found)
    assert header == ["", "7x"]
    assert lines == [["pairs: the kernel", "500"], ["pairs: XLA", "not compiled"]]
