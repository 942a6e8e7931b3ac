"""The command line explains itself, and its commands run."""

import json

import pytest
from click.testing import CliRunner

from benchmarks import scale, update
from benchmarks.__main__ import COMMANDS, main
from benchmarks.cases import Case


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
