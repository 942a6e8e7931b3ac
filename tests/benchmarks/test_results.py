"""Result files: written, read, and refused."""

import json
from dataclasses import fields, replace

import pytest

from benchmarks import results
from benchmarks.results import COMMITTED, Results, Row
from tests.benchmarks import fakes


def test_what_is_written_is_read(tmp_path):
    row = replace(fakes.ROW, ms=(1.0, 2.0), options={"clipvalue": 1.0}, ratio=1.5)
    found = fakes.results(row, fakes.ROW, machine={"cores": 2}, commit="abc+")
    path = tmp_path / "new" / "update.json"
    found.write(path)
    assert Results.read(path) == found
    assert path.read_text().count("\n  {") == 2  # a line for each row


def test_another_schema_is_refused(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"schema": 0, "rows": []}))
    with pytest.raises(ValueError, match="not a result file"):
        Results.read(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a result file"):
        Results.read(path)


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
    machine = results.describe_machine(load_before=0.5)
    assert machine["cores"] >= 1 and machine["load_before"] == 0.5
    assert "jax" in results.package_versions()


def test_a_folder_without_git_has_no_commit(tmp_path):
    assert results.commit(tmp_path) == ""
