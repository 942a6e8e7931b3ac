"""Compile programs for a named TPU on a host without one, and count what they issue."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import click

from benchmarks.static.attribution import attribute
from benchmarks.static.bundles import BundledKernel, parse_tensorcore
from benchmarks.static.chips import CHIPS, AnalyzedChip
from benchmarks.static.programs import find
from benchmarks.static.result import KernelReport, Memory, StaticReport
from benchmarks.static.subcore import parse_subcore

# What libtpu needs to compile where no TPU and no metadata server is.
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Its lock guards a TPU, and there is none to guard.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_TENSORCORE_DUMP = re.compile(r"^\d+-(.+)-\d+-final_bundles\.txt$")
_SUBCORE_DUMP = re.compile(r"^(.+)_\d+_bundles\.txt$")


@dataclass(frozen=True, slots=True)
class StaticCase:
    """One program, for one chip, at one shape."""

    program: str
    chip: str
    rows: int
    dim: int
    ids: int


def require_libtpu(command: str) -> None:
    """Ends a command with a sentence where there is no libtpu to compile with."""
    # JAX looks for it in this variable, too.
    if find_spec("libtpu") or os.environ.get("TPU_LIBRARY_PATH"):
        return
    raise click.ClickException(
        f"`python -m benchmarks {command}` compiles by libtpu, which is not "
        "installed: pip install '.[bench,tpu]'. It needs no TPU."
    )


def count(program: str, chip: str, *, rows: int, dim: int, ids: int) -> StaticReport:
    """Compile one program and count; a failure is a report with its `error` set."""
    (report,) = count_all([StaticCase(program, chip, rows, dim, ids)])
    return report


def count_all(
    cases: Sequence[StaticCase],
    *,
    timeout: float = 300.0,
    keep_dumps: Path | None = None,
) -> Iterator[StaticReport]:
    """Compile many cases in one process, since libtpu is slow to start.

    Reports come in the order of the cases, each as soon as it is there. A case that
    kills the compiler, or takes longer than `timeout` seconds, is an error; those after
    it go on in a new process. `keep_dumps`, a folder to be made, keeps the dumps.
    """
    for case, record, dumps in compile_all(
        cases, timeout=timeout, keep_dumps=keep_dumps
    ):
        yield _report(case, record, dumps)


def compile_all(
    cases: Sequence[StaticCase], *, timeout: float, keep_dumps: Path | None = None
) -> Iterator[tuple[StaticCase, dict[str, Any], Path]]:
    """Yields each case with what was found, and the folder of the compiler's dumps.

    A record with an "error" has no others. The program is the file `hlo.FILE` of the
    folder. It is kept until the next case is asked for, with `keep_dumps` for good.
    """
    waiting = list(enumerate(cases))
    with TemporaryDirectory() as scratch:
        cased = (keep_dumps or Path(scratch, "cases")).absolute()
        cased.mkdir(parents=True)  # must be new: dumps of two runs do not mix
        while waiting:
            # A folder for each child: one that died leaves dumps of half a case.
            live = Path(scratch, f"live_{waiting[0][0]}")
            live.mkdir()
            for number, record in _run(tuple(waiting), live, cased, timeout):
                del waiting[0]
                dumps = cased / f"case_{number}"
                yield cases[number], record, dumps
                if keep_dumps is None and dumps.exists():
                    shutil.rmtree(dumps)


def _run(
    numbered: Sequence[tuple[int, StaticCase]], live: Path, cased: Path, timeout: float
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Results of one child, the last of them an error if the child dies."""
    command = [sys.executable, "-m", "benchmarks.static.child", str(live), str(cased)]
    with TemporaryFile("w+") as work, TemporaryFile("w+") as errors:
        json.dump([(number, asdict(case)) for number, case in numbered], work)
        work.seek(0)
        child = subprocess.Popen(
            command,
            stdin=work,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_environment(live),
            text=True,
        )
        with child:
            try:
                for number, _ in numbered:
                    line, expired = _line(child, timeout)
                    if not line:
                        yield number, {"error": _last_words(child, errors, expired)}
                        return
                    yield json.loads(line)
            finally:
                child.kill()


def _line(child: subprocess.Popen[str], timeout: float) -> tuple[str, bool]:
    """The next line, empty if the child is dead, and whether it was too late."""
    assert child.stdout is not None
    timer = threading.Timer(timeout, child.kill)
    timer.start()
    line = child.stdout.readline()
    expired = not timer.is_alive()
    timer.cancel()
    return line, expired


def _last_words(child: subprocess.Popen[str], errors: Any, expired: bool) -> str:
    if expired:
        return "the compiler took too long"
    code = child.wait()
    errors.seek(0)
    lines = [line.strip() for line in errors if line.strip()]
    fatal = [line for line in lines if re.match(r"F\d{4} ", line)]
    words = (fatal or lines[-1:] or ["no message"])[0]
    return f"the compiler died with status {code}: {words[:300]}"


def _environment(dumps: Path) -> dict[str, str]:
    """The environment of a child, whose dumps go to a folder."""
    flags = {
        "xla_jf_dump_to": dumps,
        "xla_jf_dump_llo_text": "true",
        "xla_jf_dump_llo_pass_label_regex": "final_bundles",
        "xla_sc_dump_bundles_to": dumps,
        "xla_mosaic_enable_llo_source_annotations": "true",
    }
    return (
        os.environ
        | WITHOUT_TPU
        | {
            "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
            "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": " ".join(
                f"--{flag}={it}" for flag, it in flags.items()
            ),
        }
    )


def _report(case: StaticCase, record: dict[str, Any], dumps: Path) -> StaticReport:
    known: dict[str, Any] = asdict(case) | {
        "versions": record.get("versions", {}),
        "seconds": record.get("seconds", 0.0),
    }
    if "error" in record:
        return StaticReport(**known, error=record["error"])
    known |= {
        "memory": Memory(**record["memory"]),
        "table_bytes": record["table_bytes"],
        "table_copies": tuple(record["table_copies"]),
    }
    program = find(case.program)
    known |= {name: getattr(program, name) for name in ("streamed_rows", "passes")}
    known["repeats"] = program.repeats
    known["cores"] = CHIPS[case.chip].cores if program.shared else 1
    try:
        kernels = tuple(_kernel_reports(case, dumps, record))
    except ValueError as error:
        return StaticReport(**known, error=str(error))
    pattern = program.kernels
    missing = not any(kernel.counted for kernel in kernels)
    error = f"no kernel's name matches {pattern!r}" if missing else None
    return StaticReport(**known, kernels=kernels, error=error)


def _kernel_reports(
    case: StaticCase, dumps: Path, record: Mapping[str, Any]
) -> Iterator[KernelReport]:
    program, chip = find(case.program), CHIPS[case.chip]
    kernels = list(kernels_in(dumps, chip))
    for kernel in [*kernels, *_reused(kernels, record["instructions"])]:
        found = attribute(
            kernel,
            work=program.share(kernel, chip, case.ids, case.dim, case.rows),
            phases=program.phases,
            tables=program.tables,
            granule=chip.granule,
            block_bytes=program.block_bytes,
            counted=bool(re.search(program.kernels, kernel.name)),
        )
        yield replace(found, vmem_bytes=record["vmem"].get(kernel.name, 0))


def _reused(
    kernels: Sequence[BundledKernel], instructions: Sequence[str]
) -> Iterator[BundledKernel]:
    """Kernels without a dump: the compiler saw that it has compiled the same before.

    Which one is not said; the shortest of those named alike keeps a lower bound one.
    """
    dumped = {kernel.name for kernel in kernels}
    for name in instructions:
        base = re.sub(r"\.\d+$", "", name)
        alike = [each for each in kernels if re.sub(r"\.\d+$", "", each.name) == base]
        if name not in dumped and alike:
            shortest = min(alike, key=lambda kernel: kernel.bundles)
            yield replace(shortest, name=f"{name} as {shortest.name}")


def kernels_in(dumps: Path, chip: AnalyzedChip) -> Iterator[BundledKernel]:
    """Yields the kernels that the compiler dumped into a folder."""
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
