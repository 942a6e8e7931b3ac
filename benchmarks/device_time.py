"""On a TPU: time on the device by the profiler, and what was predicted for it.

It was never run on a TPU. Its parts are tested on a CPU, with profiles made by hand.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

from benchmarks.cases import Case
from benchmarks.results import COMMITTED, read_records
from benchmarks.static.chips import CHIPS
from benchmarks.static.tables import records_of

_PACKED = ("packed_sparsecore", "packed_tensorcore")  # the best first


def device_clock(call: Callable[[], object]) -> float:
    """Makes a call under the profiler: the seconds of its programs on the TPU."""
    with TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        (path,) = Path(folder).rglob("*.xplane.pb")
        return module_seconds(jax.profiler.ProfileData.from_file(str(path)).planes)


def module_seconds(planes: Iterable[Any]) -> float:
    """Of the compiled programs in a profile, those of the busiest device."""
    devices = []
    for plane in planes:
        if not plane.name.startswith("/device:TPU"):
            continue
        modules = (line for line in plane.lines if line.name == "XLA Modules")
        events = (event for line in modules for event in line.events)
        devices.append(sum(event.duration_ns for event in events) / 1e9)
    if not devices:
        raise RuntimeError("the profile has no TPU in it")
    return max(devices)


def predicted_ms(
    impl: str, case: Case, unique: float, kind: str, folder: Path = COMMITTED
) -> float | None:
    """The static lower bound of an update on a device of this kind, if there is one.

    The bound is of a distinct row, at the D of the committed results and no other;
    that of a sweep is of its V and N, too.
    """
    chip = next((chip.name for chip in CHIPS.values() if kind in chip.kinds), None)
    path = folder / "static.json"
    if chip is None or not path.exists():
        return None
    records = records_of(read_records(path))
    programs = _PACKED if impl == "packed" else (impl,)
    found = (records.get((program, chip)) for program in programs)
    record = next((record for record in found if record and not record["error"]), None)
    if record is None or record["dim"] != case.dim:
        return None
    rows = unique
    if record["passes"]:
        if (record["rows"], record["ids"]) != (case.num_rows, case.num_ids):
            return None
        rows = case.num_ids
    return record["roofline"]["bound_ns"] * rows / 1e6
