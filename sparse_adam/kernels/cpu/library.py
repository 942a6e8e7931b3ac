"""The C++ library: where it is looked for, how it is loaded, why it may be missing."""

import ctypes
import functools
import importlib.metadata
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
from jaxlib import xla_client

LIBRARY = Path(__file__).with_name("sparse_adam_cpu.so")
# The handlers that it has, by the names that XLA knows them by.
UPDATE = "sparse_adam_cpu"
LOOKUP = "sparse_adam_cpu_lookup"
COMBINE = "sparse_adam_cpu_combine"
# What the note beside it says when nothing could be compiled; as in `hatch_build.py`.
_NO_COMPILER = "there is no C++ compiler"


@functools.cache
def load() -> frozenset[str] | str:
    """Loads the library and registers its handlers with XLA; starts no backend.

    Returns:
        The names of the rules that it has loops for; or why it cannot be used.
    """
    if not LIBRARY.exists():
        return _why_missing()
    try:
        library = ctypes.CDLL(str(LIBRARY))
        library.sparse_adam_cpu_rules.restype = ctypes.c_char_p
        names = library.sparse_adam_cpu_rules().decode().split()
        for target in (UPDATE, LOOKUP, COMBINE):
            _register(target, jax.ffi.pycapsule(getattr(library, target)))
    except Exception as error:  # of the linker, or of another version of XLA
        return (
            f"its C++ library {LIBRARY} does not load: {error}. Build it again for the "
            "jaxlib in use: install hatchling, then the sources with `pip install "
            "--no-build-isolation`"
        )
    return frozenset(names)


def missing() -> str | None:
    """Says why the library cannot be used, or returns None when it can."""
    loaded = load()
    return loaded if isinstance(loaded, str) else None


def _register(target: str, handler: Any) -> None:
    """Registers a handler with XLA at once.

    The public function only keeps it until the backend starts. If XLA refused it then,
    the whole backend would not start; so jaxlib is asked directly, where it still has
    this function.

    Raises:
        RuntimeError: the library was built for another version of XLA.
    """
    register = getattr(
        getattr(xla_client, "_xla", None), "register_custom_call_target", None
    )
    if register is None:
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
    else:
        traits = xla_client.CustomCallTargetTraits.DEFAULT
        register(target, handler, "cpu", 1, traits)  # 1 is the typed FFI


@functools.cache
def warn_of_fallback() -> None:
    """Warns that updates on a CPU take the portable path, once in a process.

    Says nothing where the library is used, and where there was no compiler to make it:
    a pure Python package is then what was installed.
    """
    reason = missing()
    if reason is not None and _was_to_be_there():
        warnings.warn(
            "sparse_adam updates tables on this CPU by its portable path, which takes "
            f"about ten times as long as its CPU kernel: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )


def _why_missing() -> str:
    """Says why there is no library, with the paths that matter and the way out."""
    package, note = LIBRARY.parents[2], _note()
    if note is not None:
        way = "Install it again where there is a C++17 compiler"
        if note != _NO_COMPILER:
            way = "Mend that and install it again"
        return (
            f"its C++ library was not built when the package in {package} was "
            f"installed: {note}. {way}"
        )
    words = (
        f"its C++ library was not built for the package that was imported, which is in "
        f"{package}: there is no {LIBRARY}. "
    )
    script = package.parent / "hatch_build.py"
    if not script.exists():
        return words + "Install the package again where there is a C++17 compiler"
    words += f"Run `python {script}`, with hatchling installed"
    installed = _installed()
    if installed is not None:
        words += (
            f"; or take {package.parent} off Python's path (start Python in another "
            f"folder), and the package in {installed}, which has one, is imported"
        )
    return words


def _was_to_be_there() -> bool:
    """Tells whether there was, or is, a compiler for the library."""
    if LIBRARY.exists():
        return True
    note = _note()
    if note is not None:
        return note != _NO_COMPILER
    return any(map(shutil.which, ("c++", "g++", "clang++")))


def _note() -> str | None:
    """Returns what the build said when it left the library out, or None."""
    path = LIBRARY.with_suffix(".txt")
    if not path.exists():
        return None
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    # The errors of a compiler are long; the first lines tell most.
    return " ".join(lines[:3])[:600]


def _installed() -> Path | None:
    """Returns the folder of another sparse_adam, an installed one with a library."""
    for distribution in importlib.metadata.distributions(name="sparse-adam"):
        library = Path(str(distribution.locate_file("sparse_adam")))
        library = library / LIBRARY.relative_to(LIBRARY.parents[2])
        if library.exists() and not (LIBRARY.exists() and library.samefile(LIBRARY)):
            return library.parents[2]
    return None
