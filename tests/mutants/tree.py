"""A copy of the repository in which faults are made, and the library of C++ in it."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

# Imported for the children that are forked.
import jax.experimental.pallas.tpu
import jax.experimental.pallas.tpu_sc  # noqa: F401
import pytest

import hatch_build
from tests.mutants.mutant import ROOT, Mutant

COPIED = ("sparse_adam", "tests", "benchmarks", "hatch_build.py", "pyproject.toml")
# A library that is compiled for each mutant: values do not depend on this.
FLAGS = (*hatch_build.FLAGS, "-O1", "-fPIC", "-fvisibility=hidden")


class Tree:
    """A copy of the repository.

    C++ is compiled file by file, and a file again only if what it includes changed.
    """

    def __init__(self, folder: Path) -> None:
        """Copies the repository to a folder, which must not be there yet."""
        self.folder = folder
        folder.mkdir(parents=True)
        ignored = shutil.ignore_patterns("__pycache__", ".*_cache", "build")
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=ignored)
            else:
                shutil.copy2(ROOT / name, folder / name)
        self._objects = folder / "build" / "objects"
        self._objects.mkdir(parents=True)

    @contextlib.contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[None]:
        """Has the fault in the copy while the block runs.

        Raises:
            ValueError: the text is not there, or does not compile.
        """
        changed = self.folder / mutant.file
        sources = self._affected(changed)
        if sources:
            self._compile_all()
        made = [self._object(source) for source in sources]
        made += [self.folder / hatch_build.LIBRARY] * bool(sources)
        kept = {file: file.read_bytes() for file in (changed, *made)}
        try:
            changed.write_text(mutant.applied(self.folder))
            if sources:
                self._compile(sources)
            yield
        finally:
            for file, content in kept.items():
                file.unlink(missing_ok=True)  # a library may be loaded
                file.write_bytes(content)

    def _affected(self, changed: Path) -> list[Path]:
        """Returns the sources of the library that a file is part of."""
        return [x for x in self._sources() if changed.name in {x.name, *included(x)}]

    def _sources(self) -> list[Path]:
        return sorted((self.folder / hatch_build.SOURCES).rglob("*.cc"))

    def _compile_all(self) -> None:
        """Makes the library and all that it is linked of, once."""
        missing = [x for x in self._sources() if not self._object(x).exists()]
        if missing:
            self._compile(missing)

    def _compile(self, sources: list[Path]) -> None:
        for source in sources:
            self._call("-c", str(source), "-o", str(self._object(source)))
        library = self.folder / hatch_build.LIBRARY
        library.unlink(missing_ok=True)
        objects = (str(self._object(source)) for source in self._sources())
        self._call("-shared", *objects, "-o", str(library))

    def _object(self, source: Path) -> Path:
        return self._objects / f"{source.stem}.o"

    def _call(self, *arguments: str) -> None:
        compiler = hatch_build.find_compiler()
        jaxlib = importlib.util.find_spec("jaxlib")
        assert compiler and jaxlib and jaxlib.submodule_search_locations
        include = Path(jaxlib.submodule_search_locations[0], "include")
        command = [*compiler, *FLAGS, "-isystem", str(include), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"it does not compile: {done.stderr[-1500:]}")

    def test(
        self, *tests: str, seconds: float, all_of_them: bool = False
    ) -> tuple[int | None, str]:
        """Runs tests in the copy until one fails; returns pytest's status and text.

        The status is None if they take longer, and below 0 after a signal. A child that
        is forked need not import JAX again, which takes longer than most tests.
        """
        with tempfile.TemporaryFile("w+") as said:
            child = os.fork()
            if child == 0:
                options = () if all_of_them else ("-x",)
                _become_pytest(self.folder, (*options, *tests), said.fileno())
            try:
                status = _waited_for(child, seconds)
            except BaseException:  # such as the user's wish to end this
                os.killpg(child, signal.SIGKILL)
                raise
            said.seek(0)
            text = said.read()[-3000:]
        if status is None:
            text = f"it took more than {seconds:.0f} s: {text}"
        return status, text


def _become_pytest(folder: Path, arguments: Sequence[str], output: int) -> NoReturn:
    """Runs pytest in a folder, and ends the process with its status."""
    status = 1
    try:
        os.setsid()  # so that it can be ended with its own children
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        ours = ("tests", "benchmarks", "sparse_adam", "hatch_build")
        for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
            del sys.modules[name]
        options = ("-q", "--no-header", "-p", "no:cacheprovider")
        status = int(pytest.main([*options, *arguments]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _waited_for(child: int, seconds: float) -> int | None:
    """Returns the status of a process; ends it after some seconds and returns None."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def included(source: Path) -> set[str]:
    """Returns the names of all files that a source includes, directly or not."""
    folder = source.parents[1] if source.parent.name == "rules" else source.parent
    found: set[str] = set()
    waiting = [source]
    while waiting:
        text = waiting.pop().read_text()
        names = re.findall(r'(?:include|LEVEL_BODY) "(?:\.\./)?([^"]+)"', text)
        new = [name for name in names if (folder / name).exists() and name not in found]
        found.update(new)
        waiting += [folder / name for name in new]
    return found
