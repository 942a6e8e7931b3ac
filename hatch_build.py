"""Builds the CPU kernel's library into wheels, where there is a C++ compiler.

Without one, or if it fails, the wheel is pure Python and the package runs on its
portable path: an installation never fails here. The library knows neither Python nor
NumPy, so one wheel of a platform serves every Python.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = Path("sparse_adam", "kernels", "cpu")  # from the root of the repository
LIBRARY = SOURCES / "sparse_adam_cpu.so"
HEADERS = "jaxlib>=0.10.2"  # all that it needs, in `jaxlib/include`
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


def find_compiler() -> list[str] | None:
    """The command of a C++ compiler: that in `CXX`, or a usual one; None: no such."""
    if sys.platform == "win32":
        return None  # nobody has tried
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]
    return next((c for c in candidates if c and shutil.which(c[0])), None)


def compile_library(root: Path, output: Path) -> str | None:
    """Makes the library `output`, at once or not at all; returns why it could not."""
    compiler, jaxlib = find_compiler(), importlib.util.find_spec("jaxlib")
    if compiler is None:
        return "there is no C++ compiler"
    if jaxlib is None or not jaxlib.submodule_search_locations:
        return "there is no jaxlib, whose headers it needs"
    include = Path(jaxlib.submodule_search_locations[0], "include")
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        made = Path(folder, output.name)
        command = [
            *(*compiler, *FLAGS, "-shared", "-fPIC", "-fvisibility=hidden"),
            *("-isystem", str(include)),
            *map(str, sorted((root / SOURCES).rglob("*.cc"))),
            *("-o", str(made)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"{shlex.join(command)} failed:\n{done.stderr}"
        made.replace(output)
    return None


class BuildHook(BuildHookInterface):
    """What hatchling calls around the making of a wheel."""

    def dependencies(self) -> list[str]:
        """The headers, where there is something to be compiled."""
        return [HEADERS] if find_compiler() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles; an editable package finds the library among its sources."""
        root = Path(self.root)
        editable = version == "editable"
        self.folder = tempfile.TemporaryDirectory()
        output = root / LIBRARY if editable else Path(self.folder.name, LIBRARY.name)
        try:
            objection = compile_library(root, output)
        except OSError as error:
            objection = str(error)
        if objection is not None:
            output.unlink(missing_ok=True)  # not an old one beside new sources
            self.app.display_warning(f"The CPU kernel was left out: {objection}")
            return
        if not editable:
            build_data["force_include"][str(output)] = str(LIBRARY)
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], path: str) -> None:
        """Drops the library that the wheel has a copy of."""
        del version, build_data, path
        self.folder.cleanup()


if __name__ == "__main__":
    here = Path(__file__).parent
    print(compile_library(here, here / LIBRARY) or f"made {LIBRARY}")
