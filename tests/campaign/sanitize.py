"""The campaign with the C++ library built under a sanitizer, in a process of its own.

The sanitizer's own library is loaded before Python. So it sees all memory that Python
and XLA ask for, whose borders the address sanitizer then guards, though they were not
compiled with it. The thread sanitizer takes no notice of them: `kernels/cpu/xla.h` says
where the library then does for itself what else XLA does for it.

The library is cut as finely as `SPARSE_ADAM_FINENESS` says: small cases have as many
parts, and as many threads, as large ones else have.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import hatch_build

ROOT = Path(__file__).parents[2]
# What must be named beside the sanitizer, since it looks for C++ exceptions there.
STANDARD_LIBRARY = "libstdc++.so"
CHECKS: Mapping[str, str] = {
    "address": "address,undefined,float-cast-overflow",
    "thread": "thread",
}
PRELOADED: Mapping[str, str] = {"address": "libasan.so", "thread": "libtsan.so"}
FLAGS = ("-O1", "-g", "-fno-sanitize-recover=all", "-DSPARSE_ADAM_FINENESS=64")
OPTIONS = {
    # Python and XLA keep some of their memory to the end.
    "ASAN_OPTIONS": "detect_leaks=0",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def run(sanitizer: str, command: Sequence[str]) -> int:
    """Runs Python with a sanitized library; returns its exit status.

    Args:
        sanitizer: "address", with that of undefined behaviour, or "thread".
        command: of Python, such as `["-m", "tests.campaign"]`.

    Raises:
        RuntimeError: the library cannot be built, or not by GCC.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        make_tree(tree, sanitizer)
        done = subprocess.run(
            [sys.executable, *command], cwd=tree, env=environment(sanitizer)
        )
    return done.returncode


def make_tree(tree: Path, sanitizer: str) -> None:
    """Makes a copy of the package in a folder, with a sanitized library."""
    ignored = shutil.ignore_patterns("__pycache__", "sparse_adam_cpu.*")
    shutil.copytree(ROOT / "sparse_adam", tree / "sparse_adam", ignore=ignored)
    for name in ("tests", "hatch_build.py"):
        (tree / name).symlink_to(ROOT / name)
    flags = (f"-fsanitize={CHECKS[sanitizer]}", *FLAGS)
    objection = hatch_build.compile_library(tree, tree / hatch_build.LIBRARY, flags)
    if objection is not None:
        raise RuntimeError(f"no library for sanitizer={sanitizer!r}: {objection}")


def environment(sanitizer: str) -> dict[str, str]:
    """Returns the environment of a Python that loads such a library."""
    names = (PRELOADED[sanitizer], STANDARD_LIBRARY)
    return {**os.environ, **OPTIONS, "LD_PRELOAD": " ".join(map(_path, names))}


def _path(name: str) -> str:
    """Returns where the compiler finds a library."""
    compiler = hatch_build.find_compiler() or ["c++"]
    command = [*compiler, f"-print-file-name={name}"]
    path = subprocess.check_output(command, text=True).strip()
    if not Path(path).is_absolute():
        raise RuntimeError(
            f"{compiler[0]} has no {name}, which a sanitizer needs: set CXX to a g++ "
            "that has it"
        )
    return path
