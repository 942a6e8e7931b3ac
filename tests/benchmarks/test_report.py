"""The tables of the README and the docs are those of the committed results."""

import pytest

from benchmarks.report import ROOT, TABLES, with_table


@pytest.mark.parametrize("path", TABLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_table_is_up_to_date(path):
    assert with_table(path) == path.read_text(), "run `python -m benchmarks report`"
