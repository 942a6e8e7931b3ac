"""The two-tower example in a process of its own: notes, all or some, its options.

It puts down each step before which it is; "all" keeps all checkpoints.
"""

import importlib
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[2]
FLAGS = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # compiles sooner
SMALL_DISK = 2**28  # bytes; one that is larger is not filled


class Life:
    """Goes on where the last one ended, until it is killed or at its end."""

    def __init__(self, out: Path, folder: Path, steps: int, keep: str = "some") -> None:
        self._notes, self._output = out / "notes.txt", out / "output.txt"
        self._notes.write_text("")
        command = [sys.executable, "-m", "tests.soak.life", str(self._notes), keep]
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "--quick", f"--steps={steps}", f"--out={folder}"],
                cwd=ROOT,
                env=os.environ | FLAGS | {"JAX_PLATFORMS": "cpu"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def first(self) -> int | None:
        """The step at which it began; None if it did not come so far."""
        return self._steps[0] if self._steps else None

    @property
    def made(self) -> int:
        """How many steps it has made for certain."""
        return self._steps[-1] - self._steps[0] if self._steps else 0

    @property
    def _steps(self) -> list[int]:
        return [int(line) for line in self._notes.read_text().split()]

    @property
    def output(self) -> str:
        """What it printed."""
        return self._output.read_text()

    def wait(self, seconds: float, until: Callable[[], object] = lambda: None) -> None:
        """Waits until something is so, or the process has ended."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end and not until():
            time.sleep(0.002)

    def kill(self) -> int | None:
        """Ends it as `kill -9` does; returns its status if it had ended already."""
        status = self.process.poll()
        self.process.kill()
        self.process.wait()
        return status

    def limit(self, what: int, size: int) -> None:
        """Sets a limit of the process, if it is alive."""
        if self.process.poll() is None:
            resource.prlimit(self.process.pid, what, (size, size))

    def limit_memory(self, spare: int) -> None:
        """Gives it no more memory than it has and so many bytes."""
        if self.process.poll() is None:
            pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[0]
            self.limit(resource.RLIMIT_AS, int(pages) * resource.getpagesize() + spare)

    def fill_disk(self, folder: Path) -> Path:
        """Leaves no room on a small disk; else lets the process write no large file."""
        ballast = folder / "ballast"
        if shutil.disk_usage(folder).total > SMALL_DISK:
            self.limit(resource.RLIMIT_FSIZE, 2**16)
            return ballast
        with ballast.open("wb", buffering=0) as file:
            for size in (2**16, 2**12, 1):
                try:
                    while file.write(bytes(size)):
                        pass
                except OSError:  # there is no more room for so many
                    continue
        return ballast


def main(notes: Path, keep: str, options: list[str]) -> None:
    """Runs the example."""
    sys.path.insert(0, str(ROOT / "examples"))
    example: Any = importlib.import_module("train_two_tower")
    train_steps = example.train_steps

    def noted(model: Any, data: Any, steps: Any, **how: Any) -> Any:
        with notes.open("a") as file:
            file.write(f"{steps[0]}\n")
        return train_steps(model, data, steps, **how)

    example.train_steps = noted
    if keep == "all":
        example.open_checkpoints = lambda folder, *_: ocp.CheckpointManager(
            folder.absolute() / "checkpoints-all"
        )
    example.main(options)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
