"""The code of the documentation runs, and prints what it says."""

import doctest
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs" / "embedding.md"


def test_embedding():
    failed, run = doctest.testfile(str(DOCS), module_relative=False)
    assert run > 20
    assert not failed
