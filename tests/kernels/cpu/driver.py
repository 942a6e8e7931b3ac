"""The CPU kernels without Python and XLA: the drivers, their input and output."""

import dataclasses
import struct
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import hatch_build
from sparse_adam.kernels.cpu import MOST_ARRAYS

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / hatch_build.SOURCES
SANITIZERS = ("address,undefined", "thread")
# All but the handlers, which need XLA.
LOOKUP_SOURCES = [SOURCES / f"{x}.cc" for x in ("loops", "lookup", "lookup_loops")]
UPDATE_SOURCES = [
    x
    for x in sorted(SOURCES.rglob("*.cc"))
    if not x.name.startswith("lookup") and x.name != "handler.cc"
]
# As `Header` there.
_HEADER = struct.Struct(f"32s{15 + 4 * MOST_ARRAYS}q16f")
_BOUNDS = ("gradient_min", "gradient_max", "weight_min", "weight_max", "ema_share")


@dataclasses.dataclass(frozen=True)
class Driver:
    """A driver that was built, sanitized if this machine can."""

    binary: Path

    @classmethod
    def build(
        cls,
        folder: Path,
        sanitizer: str,
        main: str,
        sources: Sequence[Path],
        seconds: float | None = None,
    ) -> "Driver":
        """Compiles some of the library's sources with the driver `main`.

        It must run without input, in so many seconds.
        """
        binary = folder / "driver"
        compiler = hatch_build.find_compiler()
        assert compiler is not None
        errors = ""
        for flags in ([f"-fsanitize={sanitizer}"], []):
            command = [
                *(*compiler, *hatch_build.FLAGS, *flags),
                *("-O1", "-g1", "-fno-sanitize-recover=all", "-Wall", "-Wextra"),
                *("-I", str(SOURCES), str(HERE / main), *map(str, sources)),
                *("-o", str(binary)),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            runs = done.returncode == 0 and (
                subprocess.run([binary], input=b"", timeout=seconds).returncode == 0
            )
            if runs:
                return cls(binary)
            errors += done.stderr
        raise AssertionError(errors)

    def __call__(self, calls: Iterable[bytes]) -> bytes:
        """Runs calls; returns their results, one after the other."""
        given = b"".join(calls)
        done = subprocess.run([self.binary], input=given, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def run_large(self) -> None:
        """Runs calls on tables of 2**32 weights."""
        done = subprocess.run([self.binary, "large"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def driver_input(
    state: Sequence[np.ndarray],
    grads: np.ndarray,
    ids: np.ndarray,
    sources: np.ndarray,
    gains: np.ndarray | None,
    numbers: np.ndarray,
    seeds: Sequence[int] | None,
    attributes: Mapping[str, Any],
) -> bytes:
    """Returns an update as the driver reads it: what `cpu.call` takes, as bytes."""

    def padded(values: Iterable[Any], size: int = MOST_ARRAYS) -> list[Any]:
        values = list(values)
        return values + [0] * (size - len(values))

    constants = attributes["constants"]
    decays, scales = attributes["decays"], attributes["scales"]
    integers = [
        *(attributes["num_rows"], grads.shape[1], len(ids), len(grads)),
        *(attributes[name] for name in ("rows_per_group", "stride", "group_stride")),
        *(len(attributes["first"]), len(constants)),
        *(grads.dtype != np.float32, gains is not None, seeds is not None),
        *(attributes["lazy"], attributes["accumulate"], decays),
        *(
            x
            for name in ("first", "encodings", "per_row")
            for x in padded(attributes[name])
        ),
        *padded(x.nbytes for x in state),
    ]
    floats = [
        *(*numbers[:2], numbers[2] if scales else 1),
        *(attributes[name] for name in _BOUNDS),
        *padded(constants, 8),
    ]
    header = _HEADER.pack(attributes["rule"].encode(), *map(int, integers), *floats)
    arrays = [*state, grads, np.int32(ids), np.int32(sources)]
    arrays += [] if gains is None else [np.float32(gains)]
    arrays += [] if seeds is None else [np.array(seeds, np.int32)]
    return header + b"".join(x.tobytes() for x in arrays)
