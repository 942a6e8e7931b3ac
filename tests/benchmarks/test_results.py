"""Result files: written, read, and refused."""

import json
from dataclasses import fields, replace

import pytest

from benchmarks import results
from benchmarks.results import COMMITTED, Results, Row, WrongFileError, read_records
from tests.benchmarks import fakes


def test_what_is_written_is_read(tmp_path):
    row = replace(fakes.ROW, ms=(1.0, 2.0), options={"clipvalue": 1.0}, ratio=1.5)
    found = fakes.results(row, fakes.ROW, machine={"cores": 2}, commit="abc+")
    path = tmp_path / "new" / "update.json"
    found.write(path)
    assert Results.read(path) == found
    assert path.read_text().count("\n  {") == 2  # a line for each row


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema": 0, "rows": []}', "is a result file of schema 0, and must be one"),
        ("[]", "is not a result file of `update`, `scale` or `step`"),
        ('{"schema": 1, "records": []}', "it has no list 'rows'"),
        ("V,D,N", "is not a result file: Expecting value"),
        ('{"schema": 1, "rows": [{}]}', "of another version: 'dtypes'"),
        ('{"schema": 1, "rows": [], "mood": 1}', "of another version.*'mood'"),
    ],
)
def test_what_is_no_result_file_is_refused(tmp_path, text, words):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as refused:
        Results.read(path)
    assert str(path) in refused.value.args[0]


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(WrongFileError, match="Is a directory"):
        Results.read(tmp_path)
    with pytest.raises(WrongFileError, match="No such file"):
        read_records(tmp_path / "none.json")
    path = tmp_path / "binary.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(WrongFileError, match="is not a result file"):
        Results.read(path)


def test_records_of_another_command_are_refused(tmp_path):
    with pytest.raises(WrongFileError, match="of `static`: it has no list 'records'"):
        read_records(COMMITTED / "update.json")
    path = tmp_path / "static.json"
    path.write_text(json.dumps({"schema": 1, "records": [{"program": "sweep"}]}))
    with pytest.raises(WrongFileError, match="each of its records must have program"):
        read_records(path)
    assert read_records(COMMITTED / "static.json")["records"]


@pytest.mark.parametrize("name", ["update.json", "scale.json"])
def test_committed_results_are_whole(name):
    found = Results.read(COMMITTED / name)
    assert {"device", "processor", "cores", "load_before"} <= found.machine.keys()
    assert {"jax", "numpy"} <= found.versions.keys()
    assert found.commit and found.started and found.config["rounds"] > 0
    assert not [row.reason for row in found.rows if row.status == "failed"]
    for row in found.rows:
        assert (row.status == "ok") == bool(row.ms) == (not row.reason)
        assert row.p20_ms <= row.p50_ms <= row.p80_ms


def test_a_row_is_json():
    record = json.loads(json.dumps([fakes.ROW.__dict__]))[0]
    assert set(record) == {each.name for each in fields(Row)}


def test_the_machine_and_its_packages_are_described():
    machine = results.describe_machine(load_before=0.5, others=0.25)
    assert machine["cores"] >= 1 and machine["load_before"] == 0.5
    assert machine["cores_of_others"] == 0.25
    assert "cores_of_others" not in results.describe_machine(0.5, None)
    assert "jax" in results.package_versions()


def test_a_folder_without_git_has_no_commit(tmp_path):
    assert results.commit(tmp_path) == ""
