"""The bounds in the package are those of the committed results."""

import json

from click.testing import CliRunner

from benchmarks.results import COMMITTED, read_records
from benchmarks.static import bounds
from benchmarks.static.chips import CHIPS


def invoke(*arguments):
    done = CliRunner().invoke(bounds.bounds, arguments)
    return done.exit_code, done.output


def test_the_package_has_the_committed_bounds():
    assert invoke("--check") == (0, "")
    found = json.loads(bounds.BOUNDS.read_text())
    assert list(found["programs"]) == list(bounds.PROGRAMS)
    assert list(found["programs"]["tensorcore"]) == list(CHIPS)
    records = read_records(COMMITTED / "static.json")["records"]
    (one,) = (
        r for r in records if (r["program"], r["chip"]) == ("packed_sweep", "v6e")
    )
    kept = found["programs"]["packed_sweep"]["v6e"]
    assert abs(kept["ns"] - one["roofline"]["bound_ns"]) < 1e-4
    assert kept["limit"] == one["roofline"]["limit"]


def test_other_bounds_are_found_and_written_anew(tmp_path):
    path = tmp_path / "bounds.json"
    code, text = invoke("--check", "--out", str(path))
    assert code == 1 and "`python -m benchmarks bounds` writes them" in text
    assert invoke("--out", str(path)) == (0, f"Wrote {path}\n")
    assert path.read_text() == bounds.BOUNDS.read_text()
    path.write_text(path.read_text().replace('"hbm"', '"issue"', 1))
    assert invoke("--check", "--out", str(path))[0] == 1
