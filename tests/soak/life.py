"""A life of the training: a process, what harms it, and what it leaves on the disk."""

import contextlib
import errno
import hashlib
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[2]
EVERY = 100  # steps between checkpoints, as the example has with --quick
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "PYTHONUNBUFFERED": "1",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles sooner
}
SMALL_DISK = 2**28  # bytes; one that is larger is not filled


class Life:
    """The example in a process of its own, which goes on where the last one ended."""

    def __init__(self, out: Path, folder: Path, steps: int, keep: str = "some") -> None:
        self._notes, self._output = out / "notes.txt", out / "output.txt"
        self._notes.write_text("")
        command = [sys.executable, "-m", "tests.soak.child", str(self._notes), keep]
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "--quick", f"--steps={steps}", f"--out={folder}"],
                cwd=ROOT,
                env=os.environ | ENVIRONMENT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def steps(self) -> list[int]:
        """Before which steps it was."""
        return [int(line) for line in self._notes.read_text().split()]

    @property
    def made(self) -> int:
        """How many steps it has made for certain."""
        steps = self.steps
        return steps[-1] - steps[0] if steps else 0

    @property
    def output(self) -> str:
        """What it printed."""
        return self._output.read_text()

    def wait(self, seconds: float, until: Callable[[], object] = lambda: None) -> bool:
        """Waits until something is so, or the process has ended; tells if so."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            if until():
                return True
            time.sleep(0.002)
        return self.process.poll() is not None

    def kill(self) -> None:
        """Ends it as `kill -9` does, if it has not ended."""
        self.process.kill()
        self.process.wait()

    def fill_disk(self, folder: Path) -> Path:
        """Leaves no room on a small disk; else lets the process write no large file."""
        ballast = folder / "ballast"
        if shutil.disk_usage(folder).total > SMALL_DISK:
            limit = (2**16, 2**16)
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, limit)
            return ballast
        with ballast.open("wb", buffering=0) as file:
            for size in (2**16, 2**12, 1):
                try:
                    while file.write(bytes(size)):
                        pass
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
        return ballast

    def limit_memory(self, spare: int) -> None:
        """Gives it no more memory than it has and so many bytes."""
        with contextlib.suppress(ProcessLookupError):
            pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[0]
            limit = int(pages) * resource.getpagesize() + spare
            resource.prlimit(self.process.pid, resource.RLIMIT_AS, (limit, limit))


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints that have their names, the last one first.

    A folder may have lost some of its files: the manager deletes the oldest last.
    """
    names = (path.name for path in folder.glob("checkpoints-*/*"))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def begun(folder: Path) -> list[Path]:
    """Returns the checkpoints that are being written, or were."""
    return [x for x in folder.glob("checkpoints-*/*") if "tmp" in x.name]


def path_of(folder: Path, step: int) -> Path:
    """Returns where the checkpoint of a step is."""
    (found,) = folder.glob(f"checkpoints-*/{step}")
    return found.absolute()


def digest(folder: Path, step: int) -> str:
    """Returns what tells all bits of a checkpoint; reads them by Orbax alone."""
    hashed = hashlib.sha256()
    with ocp.StandardCheckpointer() as reader:
        for item in ("others", "tables"):
            try:
                tree = reader.restore(path_of(folder, step) / item)
            except Exception as error:  # whatever Orbax meets in a broken file
                return f"unreadable: {error}"
            for path, array in jax.tree.leaves_with_path(tree):
                hashed.update(f"{path}{array.dtype}{array.shape}".encode())
                hashed.update(np.asarray(array).tobytes())
    return hashed.hexdigest()


def harm(checkpoint: Path, rng: np.random.Generator) -> str:
    """Truncates or deletes a file of a checkpoint, or turns a bit; tells which."""
    files = sorted(x for x in checkpoint.glob("*/**/*") if x.is_file())
    file = files[int(rng.integers(len(files)))]
    data = bytearray(file.read_bytes())
    kind = ("truncated", "deleted", "a bit turned")[int(rng.integers(3))]
    if kind == "truncated":
        os.truncate(file, int(rng.integers(len(data))))
    elif kind == "deleted":
        file.unlink()
    else:
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
    return f"{kind}: {checkpoint.name}/{file.relative_to(checkpoint)}"
