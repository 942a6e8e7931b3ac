"""Compile programs for a named TPU on a host without one, and count what they issue."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from benchmarks.static.attribution import attribute
from benchmarks.static.bundles import Kernel, parse_tensorcore
from benchmarks.static.chips import CHIPS, Chip
from benchmarks.static.programs import find
from benchmarks.static.result import Memory, StaticReport
from benchmarks.static.subcore import parse_subcore

_TENSORCORE_DUMP = re.compile(r"^\d+-(.+)-\d+-final_bundles\.txt$")
_SUBCORE_DUMP = re.compile(r"^(.+)_\d+_bundles\.txt$")


@dataclass(frozen=True, slots=True)
class Case:
    """One program, for one chip, at one shape."""

    program: str
    chip: str
    rows: int
    dim: int
    ids: int


def count(program: str, chip: str, *, rows: int, dim: int, ids: int) -> StaticReport:
    """Compile one program and count; a failure is a report with its `error` set."""
    (report,) = count_all([Case(program, chip, rows, dim, ids)])
    return report


def count_all(
    cases: Sequence[Case], *, timeout: float = 300.0, keep_dumps: Path | None = None
) -> Iterator[StaticReport]:
    """Compile many cases in one process, since libtpu is slow to start.

    Reports come in the order of the cases, each as soon as it is there. A case that
    kills the compiler, or takes longer than `timeout` seconds, is an error; those after
    it go on in a new process.
    """
    waiting = list(enumerate(cases))
    place = TemporaryDirectory() if keep_dumps is None else nullcontext(keep_dumps)
    with place as folder:
        dumps = Path(folder).absolute()
        dumps.mkdir(parents=True, exist_ok=True)
        while waiting:
            for number, record in _run(tuple(waiting), dumps, timeout):
                del waiting[0]
                yield _report(cases[number], record, dumps / f"case_{number}")


def _run(
    numbered: Sequence[tuple[int, Case]], dumps: Path, timeout: float
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Results of one child, the last of them an error if the child dies."""
    command = [sys.executable, "-m", "benchmarks.static.child", str(dumps)]
    with (
        TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_environment(dumps),
            text=True,
        ) as child,
    ):
        assert child.stdin is not None and child.stdout is not None
        json.dump([(number, asdict(case)) for number, case in numbered], child.stdin)
        child.stdin.close()
        done = 0
        try:
            while done < len(numbered):
                timer = threading.Timer(timeout, child.kill)
                timer.start()
                line = child.stdout.readline()
                expired = not timer.is_alive()
                timer.cancel()
                if not line:
                    number = numbered[done][0]
                    yield number, {"error": _last_words(child, errors, expired)}
                    return
                done += 1
                yield json.loads(line)
        finally:
            child.kill()


def _last_words(child: subprocess.Popen[str], errors: Any, expired: bool) -> str:
    if expired:
        return "the compiler took too long"
    code = child.wait()
    errors.seek(0)
    lines = [line.strip() for line in errors if line.strip()]
    fatal = [line for line in lines if re.match(r"F\d{4}|\w*Error|E\d{4}", line)]
    words = (fatal or lines or ["no message"])[-1]
    return f"the compiler died with status {code}: {words[:300]}"


def _environment(dumps: Path) -> dict[str, str]:
    """What libtpu needs to compile where no TPU and no metadata server is."""
    flags = {
        "xla_jf_dump_to": dumps,
        "xla_jf_dump_llo_text": "true",
        "xla_jf_dump_llo_pass_label_regex": "final_bundles",
        "xla_sc_dump_bundles_to": dumps,
        "xla_mosaic_enable_llo_source_annotations": "true",
    }
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # Its lock guards a TPU, and there is none to guard.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": " ".join(f"--{flag}={it}" for flag, it in flags.items()),
    }


def _report(case: Case, record: dict[str, Any], dumps: Path) -> StaticReport:
    facts = asdict(case) | {
        "versions": record.get("versions", {}),
        "seconds": record.get("seconds", 0.0),
    }
    if "error" in record:
        return StaticReport(**facts, error=record["error"])
    program, chip = find(case.program), CHIPS[case.chip]
    kernels = tuple(
        attribute(
            kernel,
            rows=_rows_of(kernel, case, chip),
            phases=program.phases,
            tables=program.tables,
            granule=chip.granule,
            counted=bool(re.search(program.kernels, kernel.name)),
        )
        for kernel in _kernels(dumps, chip)
    )
    missing = not any(kernel.counted for kernel in kernels)
    return StaticReport(
        **facts,
        error=f"no kernel matches {program.kernels!r}" if missing else None,
        memory=Memory(**record["memory"]),
        table_bytes=record["table_bytes"],
        table_copies=tuple(record["table_copies"]),
        kernels=kernels,
    )


def _rows_of(kernel: Kernel, case: Case, chip: Chip) -> float:
    """The rows that one engine updates: a chip's subcores share them."""
    return case.ids / chip.subcores if kernel.engine == "subcore" else case.ids


def _kernels(dumps: Path, chip: Chip) -> Iterator[Kernel]:
    for path in sorted(dumps.iterdir()):
        if found := _TENSORCORE_DUMP.match(path.name):
            # Some dumps share the suffix and hold a summary instead.
            if "schedule-analysis" not in found[1]:
                yield parse_tensorcore(
                    path.read_text(), name=found[1], delay_slots=chip.delay_slots
                )
        elif found := _SUBCORE_DUMP.match(path.name):
            kernel = parse_subcore(
                path.read_text(), name=found[1], delay_slots=chip.subcore_delay_slots
            )
            if kernel is not None:
                yield kernel
