"""The command line explains itself, and its commands run."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from benchmarks import scale, update
from benchmarks.__main__ import COMMANDS, main
from benchmarks.cases import Case
from benchmarks.results import ROOT
from benchmarks.static import report as static_report
from benchmarks.static.attribution import KernelTotals, attribute, mesh_loop
from benchmarks.static.result import Memory, StaticReport
from benchmarks.static.subcore import parse_subcore
from tests.benchmarks import fakes


def invoke(*arguments):
    done = CliRunner().invoke(main, arguments)
    return done.exit_code, done.output


def test_help_lists_every_command():
    code, text = invoke("--help")
    assert code == 0 and all(name in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    code, text = invoke(command, "--help")
    assert code == 0 and "Usage" in text and len(text.splitlines()) > 5


def test_axes_change_one_size_each():
    sizes = {"V": "num_rows", "N": "num_ids", "D": "dim", "duplicates": "repeats"}
    for quick in (True, False):
        for axis, swept in scale.cases(quick).items():
            values = [getattr(case, sizes[axis]) for case in swept]
            assert len(values) >= 2 and values == sorted(set(values))
            assert [case.name for case in swept] == [f"{axis}={v}" for v in values]


def test_update_writes_what_it_prints(tmp_path, monkeypatch):
    tiny = Case("quick", 200, 8, 50, "zipf")
    monkeypatch.setitem(update.CASES, "quick", tiny)
    monkeypatch.setattr("benchmarks.workload.ROTATED", 1)
    out = tmp_path / "update.json"
    arguments = ["--case", "quick", "--impl", "xla", "--impl", "tensorcore"]
    code, text = invoke("update", *arguments, "--rounds", "2", "--out", str(out))
    assert code == 0, text
    found = json.loads(out.read_text())
    assert [row["status"] for row in found["rows"]] == ["ok", "skipped"]
    assert len(found["rows"][0]["ms"]) == 2
    assert found["config"]["cases"] == {"quick": ["xla", "tensorcore"]}
    assert "sparse_adam, xla" in text and "compiled for a TPU only" in text
    assert max(map(len, text.splitlines())) <= 80 + len(str(out))
    for line in text.splitlines():
        assert len(line) <= 80 or line.startswith("Wrote "), line


def test_a_loaded_machine_is_warned_of(tmp_path, monkeypatch):
    tiny = Case("quick", 200, 8, 50, "zipf")
    monkeypatch.setitem(update.CASES, "quick", tiny)
    monkeypatch.setattr("benchmarks.workload.ROTATED", 1)
    arguments = ["--case", "quick", "--impl", "xla", "--rounds", "1"]
    arguments += ["--out", str(tmp_path / "update.json")]
    monkeypatch.setattr("benchmarks.busy.sample", lambda: 1.5)
    monkeypatch.setattr("benchmarks.busy.cores_of_others", lambda a, b: 0.0)
    code, text = invoke("update", *arguments)
    assert code == 0 and "Warning: before the run other programs took 1.5" in text
    assert "during the run" not in text
    monkeypatch.setattr("benchmarks.busy.sample", lambda: 0.0)
    monkeypatch.setattr("benchmarks.busy.cores_of_others", lambda a, b: 1.5)
    code, text = invoke("update", *arguments)
    assert code == 0 and "Warning: during the run other programs took 1.5" in text
    assert "before the run" not in text


@pytest.mark.parametrize("command", ["update", "scale"])
@pytest.mark.parametrize("rounds", ["-1", "0"])
def test_rounds_are_at_least_one(command, rounds):
    code, text = invoke(command, "--rounds", rounds)
    assert code == 2 and f"{rounds} is not in the range x>=1" in text


@pytest.mark.parametrize("command", ["update", "scale", "static"])
def test_a_result_file_that_cannot_be_written_is_refused_at_once(command, tmp_path):
    code, text = invoke(command, "--out", str(tmp_path))
    assert code == 2 and "is a directory" in text
    (tmp_path / "file").touch()
    code, text = invoke(command, "--out", str(tmp_path / "file" / "new" / "out.json"))
    assert code == 2 and "cannot be made" in text and "is a file and no folder" in text


@pytest.mark.parametrize(
    "option", [("--rows", "0"), ("--dim", "-1"), ("--ids", "0"), ("--timeout", "0")]
)
def test_sizes_of_static_are_positive(option):
    code, text = invoke("static", *option)
    assert code == 2 and "is not in the range" in text


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("nonsense", "program 'nonsense' is not one of"),
        ("nonsense:build", "No module named 'nonsense'"),
        ("json:build", "module 'json' has no attribute 'build'"),
    ],
)
def test_a_program_that_is_not_there_is_said_at_once(program, words):
    code, text = invoke("static", "--program", program)
    assert code == 2 and words in text


def test_static_says_that_libtpu_is_missing(monkeypatch):
    monkeypatch.setattr("benchmarks.static.compiler.find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    code, text = invoke("static")
    assert code == 1 and "pip install '.[bench,tpu]'" in text
    assert "It needs no TPU" in text


def test_a_missing_extra_is_said(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr("importlib.import_module", absent)
    code, text = invoke("plot")
    assert code == 1 and "needs matplotlib, which is not installed" in text
    assert "pip install '.[bench]'" in text


def test_without_click_a_sentence_is_said():
    blocked = (
        "import runpy, sys; sys.modules['click'] = None; "
        "runpy.run_module('benchmarks', run_name='__main__')"
    )
    command = [sys.executable, "-c", blocked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "`python -m benchmarks` needs click, which is not installed: pip install "
        "'.[bench]' installs what the benchmarks need\n"
    )


@pytest.mark.parametrize("command", ["plot", "report"])
def test_an_empty_folder_and_a_wrong_file_are_said(command, tmp_path):
    code, text = invoke(command, str(tmp_path))
    assert code == 1 and "has no result file" in text and "make bench" in text
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "update.json").write_text("V,D,N")
    code, text = invoke(command, str(tmp_path))
    assert code == 1 and "update.json is not a result file" in text
    (tmp_path / "file").touch()
    code, text = invoke(command, str(tmp_path / "file"))
    assert code == 2 and "is a file" in text


def test_results_without_times_cannot_be_drawn(tmp_path):
    row = replace(fakes.ROW, status="skipped", reason="no")
    fakes.results(row).write(tmp_path / "update.json")
    code, text = invoke("plot", str(tmp_path))
    assert code == 1 and "have no times to draw" in text


def test_static_prints_80_columns():
    loops = subcore_loops()
    memory = Memory(argument=2**40, output=2**40, alias=2**40, temp=2**41)
    report = StaticReport(
        *("xla_unsorted_offloaded", "v6e", 10**9, 4096, 2**20),
        memory=memory,
        table_bytes=2**40,
        table_copies=("%copy.1 = f32[1000000000,4096]{1,0:T(8,128)} " * 3,),
        kernels=(loops, loops),
        streamed_rows=29,
    )
    failed = replace(report, error="ValueError: it cannot run this update " * 9)
    text = io.StringIO()
    console = Console(file=text, soft_wrap=True)
    for each in (report, failed):
        static_report._print(console, each, loops=True, verbose=True)
    found = text.getvalue().splitlines()
    assert len(found) > 30 and max(map(len, found)) <= 80
    assert any("vld" in line for line in found)


def subcore_loops():
    text = (Path(__file__).parent / "data" / "subcore_7x.txt").read_text()
    kernel = parse_subcore(text, name="sparse_adam_" * 8, delay_slots=2)
    assert kernel is not None
    return attribute(
        kernel,
        work=KernelTotals(1024, 128, 1000),
        phases={"mesh": mesh_loop},
        tables=0,
        granule=32,
        counted=True,
    )
