"""The figures that the package chooses its sweep by: counted, written and compared."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from benchmarks.results import WrongFileError
from benchmarks.static import cost
from benchmarks.static.attribution import KernelTotals
from benchmarks.static.bundles import Counts, Loop
from benchmarks.static.chips import CHIPS
from benchmarks.static.programs import find
from benchmarks.static.result import KernelReport, LoopReport, StaticReport

BUNDLES = {"fetch rows": 9, "write back": 10, "gradients": 4, "add": 8}
BUNDLES |= {"mark": 3, "sums": 7}
UPDATE = 2


def report(case, missing="", factor=1.0):
    """A program that takes so many bundles for each phase, and more if D is wide."""
    phases = BUNDLES | {"update": UPDATE}
    wide = 1 + (case.dim > 128)
    if "sweep" in case.program:
        phases["update"] *= case.rows / case.ids  # of all rows, for each id
    loops = tuple(
        LoopReport(
            Loop(
                *(1, 0, 1, 0, 9, round(1e4 * wide * factor * bundles), 0, 0, 0),
                *(None, True, Counts(), ""),
            ),
            phase,
            rows=1e4,
        )
        for phase, bundles in phases.items()
        if phase != missing
    )
    kernel = KernelReport("kernel", "tensorcore", True, 99, 0, 32, loops)
    versions = {"jax": "1", "libtpu": "2"}
    sizes = (case.program, case.chip, case.rows, case.dim, case.ids)
    return StaticReport(*sizes, kernels=(kernel,), versions=versions)


@pytest.fixture
def compiled(monkeypatch):
    """Stands in for the compiler; a test may change what it reports."""
    changes = {"missing": "", "factor": 1.0, "error": None}

    def count_all(cases, timeout):
        options = {name: changes[name] for name in ("missing", "factor")}
        for case in cases:
            yield replace(report(case, **options), error=changes["error"])

    monkeypatch.setattr(cost, "count_all", count_all)
    return changes


def invoke(*arguments):
    done = CliRunner().invoke(cost.bundles, arguments)
    return done.exit_code, done.output


def test_figures_are_sums_of_phases(compiled, tmp_path):
    path = tmp_path / "bundles.json"
    code, text = invoke("--out", str(path))
    assert code == 0 and f"Wrote {path}" in text
    found = json.loads(path.read_text())
    assert (found["jax"], found["libtpu"]) == ("1", "2")
    assert list(found["row_kernel"]) == list(found["sweep"]) == list(CHIPS)
    assert found["row_kernel"]["v6e"] == {
        "plain": [21.0, 42.0],
        "packed": [21.0, 42.0],
        "gradient": [4.0, 8.0],
        "gradient_shared": 7.0,
        "repeated": [7.0, 14.0],
        "repeated_shared": 7.0,
    }
    assert found["sweep"]["v4"] == {
        "fetched": [4.0, 8.0],
        "added": [8.0, 16.0],
        "added_shared": 8.0,
        "updated_plain": 2.0,
        "updated_packed": 2.0,
        "updated_plain_bfloat16": 2.0,
        "updated_packed_bfloat16": 2.0,
    }
    assert path.read_text().count("\n  ") == 2 * len(CHIPS)  # a line for each
    assert max(map(len, text.splitlines()[:-1])) <= 80


def test_check_compares_and_writes_nothing(compiled, tmp_path):
    path = tmp_path / "bundles.json"
    invoke("--out", str(path))
    before = path.read_text()
    code, text = invoke("--out", str(path), "--check")
    assert code == 0 and "All figures are those in" in text
    compiled["factor"] = 1.008
    assert invoke("--out", str(path), "--check", "--chip", "v6e")[0] == 0
    compiled["factor"] = 1.02
    code, text = invoke("--out", str(path), "--check", "--chip", "v6e")
    assert code == 1 and "v6e, row_kernel, plain, D = 256: 42.84 here, 42.0" in text
    assert "v4" not in text and "19 figures differ" in text
    assert path.read_text() == before


def test_another_compiler_is_named(compiled, tmp_path):
    path = tmp_path / "bundles.json"
    invoke("--out", str(path))
    path.write_text(path.read_text().replace('"libtpu": "2"', '"libtpu": "3"'))
    code, text = invoke("--out", str(path), "--check")
    assert code == 0 and f"libtpu 2 here, 3 in {path}" in text


def test_a_loop_that_is_not_recognised_is_an_error(compiled, tmp_path):
    compiled["missing"] = "gradients"
    code, text = invoke("--out", str(tmp_path / "bundles.json"))
    assert code == 1 and "was recognised as 'gradients'" in text
    assert "benchmarks/static/programs.py must follow" in text
    compiled |= {"missing": "", "error": "ValueError: no"}
    code, text = invoke("--out", str(tmp_path / "bundles.json"))
    assert code == 1 and "did not compile for v4: ValueError: no" in text
    assert list(tmp_path.iterdir()) == []


def test_wrong_options_and_files_are_said(tmp_path):
    code, text = invoke("--chip", "v6e")
    assert code == 2 and "--chip goes with --check only" in text
    code, text = invoke("--check", "--out", str(tmp_path / "none.json"))
    assert code == 1 and "none.json cannot be read" in text
    path = tmp_path / "wrong.json"
    path.write_text("{}")
    with pytest.raises(WrongFileError, match="was not written by"):
        cost.read(path)


def test_the_committed_file_has_all_chips_and_the_programs_are_known():
    found = cost.read(cost.BUNDLES)
    assert list(found["row_kernel"]) == list(found["sweep"]) == list(CHIPS)
    assert list(cost.differences(found, found)) == []
    assert cost.BUNDLES.read_text() == cost.as_text(found)
    for program, _ in cost.PROGRAMS:
        assert find(program).name == program


def test_groups_of_packed_rows_are_those_that_share_lines():
    rule = find("packed_sweep").phases["update"]
    update = report(cost.StaticCase("packed_sweep", "v6e", 2**20, 16, 2**16)).kernels[0]
    loop = replace(update.loops[0].loop, counts=Counts(eup=64))
    for dim, rows in ((3, 42), (16, 8), (40, 3), (64, 2), (128, 1)):
        # 64 roots update 512 groups.
        covered = rule(loop, KernelTotals(2**16, dim, 2**20))
        assert covered == pytest.approx(512 * rows / 16), dim
    assert rule(loop, KernelTotals(1, 128, 1)) == 512
