"""The tables of the README and the docs are those of the committed results."""

import shutil

import pytest

from benchmarks.report import PAGES, TABLES, page, with_tables
from benchmarks.results import COMMITTED, ROOT


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
