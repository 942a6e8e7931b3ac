"""Builds the CPU kernel's library into wheels, where there is a C++ compiler.

Without one, or if it fails, the wheel is pure Python and the package runs on its
portable path: an installation never fails here. The wheel then holds a note of why, for
the package to tell. The library knows neither Python nor NumPy, so one wheel of a
platform serves every Python.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = Path("sparse_adam", "kernels", "cpu")  # from the root of the repository
LIBRARY = SOURCES / "sparse_adam_cpu.so"
NOTE = SOURCES / "sparse_adam_cpu.txt"  # why the library is not there
# Without errno and traps, a root and a comparison become vector instructions; results
# stay those of IEEE. Contraction would make them depend on the instruction set.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-pthread",
)


NO_COMPILER = "there is no C++ compiler"  # `kernels/cpu/library.py` knows it too


def headers() -> str:
    """Returns what has the headers of XLA's FFI, all that the library needs.

    A library runs with the XLA whose headers it was built with and with later ones, and
    is refused by earlier ones. So these are of the oldest jax that the package runs
    with, whichever is in use; but a Python that is younger than them needs others.
    """
    oldest = sys.version_info < (3, 15)
    return "jaxlib==0.10.2" if oldest else "jaxlib>=0.10.2"


def find_compiler() -> list[str] | None:
    """Returns the command of a C++ compiler: that in `CXX`, or a usual one; or None."""
    if sys.platform == "win32":
        return None  # nobody has tried
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]
    return next((c for c in candidates if c and shutil.which(c[0])), None)


def compile_library(root: Path, output: Path, flags: Sequence[str] = ()) -> str | None:
    """Makes the library `output`, at once or not at all; returns why it could not.

    `flags` follow the compiler's usual ones.
    """
    compiler, jaxlib = find_compiler(), importlib.util.find_spec("jaxlib")
    if compiler is None:
        return NO_COMPILER
    if jaxlib is None or not jaxlib.submodule_search_locations:
        return "there is no jaxlib, whose headers it needs"
    include = Path(jaxlib.submodule_search_locations[0], "include")
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        made = Path(folder, output.name)
        command = [
            *(*compiler, *FLAGS, "-shared", "-fPIC", "-fvisibility=hidden", *flags),
            *("-isystem", str(include)),
            *map(str, sorted((root / SOURCES).rglob("*.cc"))),
            *("-o", str(made)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            words = f"{shlex.join(compiler)} failed: {done.stderr.strip()}"
            return f"{words}\nThe command was {shlex.join(command)}"
        made.replace(output)
    return None


def make_library(root: Path, output: Path) -> str | None:
    """Makes the library `output`, or a note beside it of why that failed.

    Never leaves an old one of either beside new sources. Returns what the note says.
    """
    note = output.with_name(NOTE.name)
    try:
        objection = compile_library(root, output)
    except OSError as error:
        objection = str(error)
    if objection is None:
        note.unlink(missing_ok=True)
    else:
        output.unlink(missing_ok=True)
        note.write_text(objection, encoding="utf-8")
    return objection


class BuildHook(BuildHookInterface):
    """What hatchling calls around the making of a wheel."""

    def dependencies(self) -> list[str]:
        """Returns the headers, where there is something to be compiled."""
        return [headers()] if find_compiler() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles; an editable package finds the library among its sources."""
        root = Path(self.root)
        editable = version == "editable"
        self.folder = tempfile.TemporaryDirectory()
        output = root / LIBRARY if editable else Path(self.folder.name, LIBRARY.name)
        objection = make_library(root, output)
        if not editable:
            kept = LIBRARY if objection is None else NOTE
            made = output.with_name(kept.name)
            build_data["force_include"][str(made)] = str(kept)
        if objection is not None:
            self.app.display_warning(f"The CPU kernel was left out: {objection}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], path: str) -> None:
        """Drops what the wheel has a copy of."""
        del version, build_data, path
        self.folder.cleanup()


if __name__ == "__main__":
    here = Path(__file__).parent
    failure = make_library(here, here / LIBRARY)
    print(failure or f"made {LIBRARY}")
    sys.exit(failure is not None)
