"""Compile cases for a TPU that is not there; run by `compiler`, never by hand.

libtpu reads its dump flags once, when it loads: hence a process of its own. Cases come
as JSON on standard input; each result goes out as one line of JSON when it is done.
"""

import json
import math
import os
import re
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.static.chips import CHIPS
from benchmarks.static.hlo import FILE as HLO
from benchmarks.static.programs import find


class Times(NamedTuple):
    """Seconds that have passed, and those that this process has run."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> "Times":
        """Reads both clocks."""
        return cls(time.perf_counter(), time.process_time())


def main(live: Path, cased: Path) -> None:
    """Compile the cases on standard input; move their dumps from `live` to `cased`."""
    # The compiler may print to standard output, which carries the results.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for number, case in json.load(sys.stdin):
        started = time.perf_counter()
        record: dict[str, Any]
        try:
            record, hlo = _compile(**case)
            (live / HLO).write_text(hlo)
        except Exception as error:
            words = " ".join(str(error).split())
            record = {"error": f"{type(error).__name__}: {words}"[:500]}
        record["versions"] = _versions()
        record["seconds"] = round(time.perf_counter() - started, 2)
        _collect(live, cased / f"case_{number}")
        print(json.dumps([number, record]), file=results, flush=True)


def _compile(
    program: str, chip: str, rows: int, dim: int, ids: int
) -> tuple[dict[str, Any], str]:
    chosen = find(program)
    topology = topologies.get_topology_desc(
        CHIPS[chip].topology, platform="tpu", **CHIPS[chip].topology_options
    )
    mesh = Mesh(np.array(topology.devices[:1]), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    # The mesh in scope is what tells Pallas which TPU it compiles for.
    with jax.set_mesh(mesh):
        function, arguments, donated = chosen.build(rows, dim, ids)
        placed = [
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arguments
        ]
        began = Times.now()
        lowered = jax.jit(function, donate_argnums=donated).lower(*placed)
        traced = Times.now()
        compiled = lowered.compile(compiler_options=dict(chosen.compiler_options))
        ended = Times.now()
    memory = compiled.memory_analysis()
    hlo = compiled.as_text() or ""
    tables = [arguments[at] for at in donated]
    sizes = [math.prod(table.shape) * table.dtype.itemsize for table in tables]
    record = {
        "trace_seconds": round(traced.wall - began.wall, 2),
        "trace_processor_seconds": round(traced.processor - began.processor, 2),
        "compile_seconds": round(ended.wall - traced.wall, 2),
        "compile_processor_seconds": round(ended.processor - traced.processor, 2),
        "memory": {
            name: getattr(memory, f"{name}_size_in_bytes")
            for name in ("argument", "output", "alias", "temp")
        },
        "table_bytes": min(sizes, default=0),
        "table_copies": _copies(hlo, {table.shape for table in tables}),
        "vmem": _vmem(hlo),
        "instructions": re.findall(
            r"^\s*(?:ROOT )?%(\S+) = [^\n]*? (?:fusion|custom-call|sort)\(",
            hlo.partition("\nENTRY")[2],
            re.MULTILINE,
        ),
    }
    return record, hlo


def _vmem(hlo: str) -> dict[str, int]:
    """Bytes of vector memory (memory space 1) that each instruction has for itself."""
    found = {}
    for line in hlo.splitlines():
        name = re.match(r"\s*(?:ROOT )?%(\S+) = ", line)
        used = re.search(r'used_scoped_memory_configs":\[([^\]]*)\]', line)
        if name and used:
            sizes = re.findall(r'"memory_space":"1",[^}]*"size":"(\d+)"', used[1])
            found[name[1]] = sum(map(int, sizes))
    return found


def _copies(hlo: str, shapes: set[tuple[int, ...]]) -> list[str]:
    """The instructions that copy or transpose an array of one of the shapes."""
    dims = {f"[{','.join(map(str, shape))}]" for shape in shapes}
    found = []
    for line in hlo.splitlines():
        copy = re.match(
            r"\s*(?:ROOT )?(%\S+ = .*?) (copy|copy-start|transpose)\(", line
        )
        if copy and any(each in copy[1] for each in dims):
            found.append(f"{copy[1]} {copy[2]}"[:200])
    return found


def _collect(live: Path, into: Path) -> None:
    """Move what this compile dumped to a folder of its own."""
    into.mkdir()
    for path in live.iterdir():
        shutil.move(path, into / path.name)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("jax", "jaxlib", "libtpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
