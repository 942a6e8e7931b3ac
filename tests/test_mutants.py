"""The list of mutants is alive: each fault can still be made, and its test exists."""

import collections
import re

import pytest

from tests.mutants import __main__ as command
from tests.mutants import results
from tests.mutants.lists import AREAS, mutants
from tests.mutants.mutant import ROOT, Mutant
from tests.mutants.results import Result, Results
from tests.mutants.tree import included

ALL = [mutant for own in mutants().values() for mutant in own]


@pytest.mark.parametrize("area", AREAS)
def test_each_fault_can_be_made(area):
    for mutant in mutants()[area]:
        assert mutant.applied() != (ROOT / mutant.file).read_text(), mutant


def test_each_test_exists():
    texts = {name: (ROOT / name).read_text() for name in {m.test_file for m in ALL}}
    for mutant in ALL:
        found = re.search(rf"^def {mutant.test_function}\(", texts[mutant.test_file], 8)
        assert mutant.test_function and found, mutant.test


def test_there_are_many_and_none_twice():
    assert len(ALL) >= 120
    counts = collections.Counter((m.file, m.search, m.replace) for m in ALL)
    assert max(counts.values()) == 1
    assert len({mutant.key for mutant in ALL}) == len(ALL)


def test_what_is_not_there_or_there_twice_is_refused():
    for search, times in (("no such text", 0), ("return", r"\d+")):
        with pytest.raises(ValueError, match=f"has {times} times '{search}'"):
            Mutant("sparse_adam/ops/plan.py", search, "", "").applied()


def test_outcomes():
    mutant = Mutant("a", "b", "c", "d")
    hanging = Mutant("a", "b", "c", "d", hangs=True)
    statuses = {0: "survived", 1: "failed", 2: "broken", 5: "broken", -11: "failed"}
    for status, outcome in statuses.items():
        assert command.outcome_of(status, mutant) == outcome
    assert command.outcome_of(None, mutant) == "hung"
    assert command.outcome_of(None, hanging) == "failed"
    said = "1 failed\nFAILED tests/a.py::test_b[c-d] - assert 1 == 2\n"
    assert command.failed_in(said) == ["tests/a.py::test_b[c-d]"]
    assert command.failed_in("FAILED a.py::b[('c', 'd')]") == ["a.py::b[('c', 'd')]"]
    assert command.failed_in("1 passed") == []


def test_a_changed_header_compiles_what_includes_it():
    folder = ROOT / "sparse_adam/kernels/cpu"
    assert {"rule.h", "loops.h", "rule.inc"} <= included(folder / "rules/sgd.cc")
    assert "parallel.h" in included(folder / "update.cc")
    assert "update.h" not in included(folder / "lookup.cc")


def test_results_are_kept_and_counted(tmp_path):
    file, mutant = tmp_path / "results.json", mutants()["plan"][0]
    found = Results.load(file)
    found.add(mutant.key, Result("plan", "a -> b", "test", "killed", 1.0, ""))
    found.add("of no mutant", Result("plan", "a -> b", "test", "killed", 1.0, ""))
    again = Results.load(file)
    assert mutant.key in again and len(again.by_key) == 1
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{results.BEGIN}\n{results.END}\n\nafter\n")
    results.write_table(again, page)
    text, count = page.read_text(), len(mutants()["plan"])
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert f"| plan and sorting | {count} | 1 | 1 | 100% |\n" in text
    assert f"| all | {len(ALL)} | 1 | 1 | 100% |\n" in text


def test_the_table_of_the_docs_is_that_of_the_results():
    assert results.table(Results.load()) in results.PAGE.read_text()
