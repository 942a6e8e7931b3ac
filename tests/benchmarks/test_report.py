"""The README's tables are those of the committed results."""

from benchmarks.report import README, with_tables


def test_readme_is_up_to_date():
    text = README.read_text()
    assert with_tables(text) == text, "run `python -m benchmarks report`"
