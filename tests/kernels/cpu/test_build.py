"""Wheels with the CPU kernel and without: what is in them, and that both work."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jax
import pytest

import hatch_build
from sparse_adam.kernels.cpu import library

ROOT = Path(__file__).parents[3]
UPDATE = """
import jax, jax.numpy as jnp, sparse_adam
one = jnp.ones((2, 2))
arguments = one, one, one, jnp.array([1]), one[:1]
print(sparse_adam.__file__)
print(sparse_adam.explain(*arguments))
print(sparse_adam.sparse_adam_update(*arguments, learning_rate=1.0).table.tolist())
"""

WARN = """
import warnings
from sparse_adam.kernels import cpu
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    cpu.warn_of_fallback()
    cpu.warn_of_fallback()
for one in caught:
    print(one.category.__name__, str(one.message).replace(chr(10), " "))
"""


def make_wheel(folder, compiler):
    """Builds a wheel of the working tree; returns it and what the build said."""
    tree = folder / "tree"
    # The library of an editable installation must not slip in.
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "sparse_adam", tree / "sparse_adam", ignore=ignored)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copy(ROOT / ".gitignore", tree)
    (tree / hatch_build.LIBRARY).write_text("a stale one")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=tree,
        env=os.environ | {"CXX": compiler},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel, done.stdout + done.stderr


def run(wheel, folder):
    """What a Python says that finds the package in the wheel only."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    where, *words, table = python(UPDATE, folder, folder / "installed").splitlines()
    assert where.startswith(str(folder))
    assert table == "[[1.0, 1.0], [0.0, 0.0]]"
    return "\n".join(words)


def python(code, folder, *paths):
    """What a Python prints that finds packages in these folders first."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("compiler", "reason", "warns"),
    [
        ("none-such", "there is no C++ compiler", False),
        ("false", "false failed", True),
    ],
)
def test_without_a_compiler_the_wheel_is_pure(compiler, reason, warns, tmp_path):
    wheel, said = make_wheel(tmp_path, compiler)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "The CPU kernel was left out" in said
    names = zipfile.ZipFile(wheel).namelist()
    assert str(hatch_build.LIBRARY) not in names
    assert str(hatch_build.NOTE) in names
    words = run(wheel, tmp_path)
    assert "cpu: xla, compiled" in words
    assert re.search(
        f"was not built when .*installed/sparse_adam was .*{re.escape(reason)}", words
    )
    warnings = python(WARN, tmp_path, tmp_path / "installed").splitlines()
    assert len(warnings) == (1 if warns else 0)
    assert all("by its portable path" in x and "failed" in x for x in warnings)


def test_with_a_compiler_one_wheel_serves_every_python(tmp_path):
    compiler = hatch_build.find_compiler()
    if compiler is None:  # then only the other test says something
        return
    # The last option counts: what a compiler makes of -O3 is tested elsewhere.
    quick = tmp_path / "quick"
    quick.write_text(f'#!/bin/sh\nexec {shlex.join(compiler)} "$@" -O0\n')
    quick.chmod(0o755)
    wheel, said = make_wheel(tmp_path, str(quick))
    assert "left out" not in said
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert str(hatch_build.LIBRARY) in names
    assert str(hatch_build.NOTE) not in names
    assert all(name.startswith("sparse_adam") for name in names)  # no tests
    assert "cpu: cpu, compiled" in run(wheel, tmp_path)


def test_headers_are_those_of_the_oldest_jax_that_is_supported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (jax_needed,) = (x for x in project["dependencies"] if x.startswith("jax>="))
    assert hatch_build.headers() == "jaxlib==" + jax_needed.removeprefix("jax>=")
    code = "from hatchling import build; print(build.get_requires_for_build_wheel())"
    needed = python(code, ROOT) if hatch_build.find_compiler() else ""
    assert not needed or hatch_build.headers() in needed


def test_a_clone_says_that_it_hides_the_installed_package(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", "sparse_adam_cpu.*")
    for name in ("clone", "site"):
        target = tmp_path / name / "sparse_adam"
        shutil.copytree(ROOT / "sparse_adam", target, ignore=ignored)
    shutil.copy(ROOT / "hatch_build.py", tmp_path / "clone")
    (tmp_path / "site" / hatch_build.LIBRARY).write_text("a library")
    metadata = tmp_path / "site" / "sparse_adam-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Name: sparse-adam\nVersion: 0.1.0\n")

    code = "from sparse_adam.kernels.cpu import library; print(library.load())"
    words = python(code, tmp_path, tmp_path / "clone", tmp_path / "site")
    clone = tmp_path / "clone"
    assert f"imported, which is in {clone / 'sparse_adam'}:" in words
    assert f"there is no {clone / hatch_build.LIBRARY}." in words
    assert f"Run `python {clone / 'hatch_build.py'}`" in words
    assert f"take {clone} off Python's path" in words
    assert f"the package in {tmp_path / 'site' / 'sparse_adam'}, which has one" in words
    # There is a compiler now, so this is slow without need.
    if hatch_build.find_compiler():
        assert "there is no" in python(WARN, tmp_path, clone)
    # Without the sources there is nothing to run.
    (clone / "hatch_build.py").unlink()
    words = python(code, tmp_path, clone, tmp_path / "site")
    assert "Install the package again where there is a C++17 compiler" in words


def test_a_library_that_does_not_load_breaks_nothing_and_is_warned_of(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", "sparse_adam_cpu.*")
    shutil.copytree(ROOT / "sparse_adam", tmp_path / "sparse_adam", ignore=ignored)
    (tmp_path / hatch_build.LIBRARY).write_text("no library")
    *words, table = python(UPDATE, tmp_path, tmp_path).splitlines()
    assert table == "[[1.0, 1.0], [0.0, 0.0]]"
    assert f"{tmp_path / hatch_build.LIBRARY} does not load" in "\n".join(words)
    assert "--no-build-isolation" in python(WARN, tmp_path, tmp_path)


LATER_LIBRARY = """
#include "xla/ffi/api/ffi.h"

extern "C" const char* sparse_adam_cpu_rules() { return "AdamRule "; }
extern "C" XLA_FFI_Error* sparse_adam_cpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    sparse_adam_cpu, +[] { return xla::ffi::Error::Success(); }, xla::ffi::Ffi::Bind());
"""


def test_a_library_for_a_later_xla_does_not_stop_the_backend(tmp_path):
    compiler = hatch_build.find_compiler()
    if compiler is None:
        return
    ignored = shutil.ignore_patterns("__pycache__", "sparse_adam_cpu.*")
    shutil.copytree(ROOT / "sparse_adam", tmp_path / "sparse_adam", ignore=ignored)
    # The headers of an XLA that is younger than any.
    header = Path("xla", "ffi", "api", "c_api.h")
    text = (Path(jax.ffi.include_dir()) / header).read_text()
    text, count = re.subn(r"(define XLA_FFI_API_MINOR) \d+", r"\1 999", text)
    assert count == 1
    (tmp_path / "later" / header).parent.mkdir(parents=True)
    (tmp_path / "later" / header).write_text(text)
    (tmp_path / "library.cc").write_text(LATER_LIBRARY)
    command = [*compiler, "-std=c++17", "-shared", "-fPIC", "library.cc"]
    command += ["-I", "later", "-I", jax.ffi.include_dir(), "-o", hatch_build.LIBRARY]
    subprocess.run(command, cwd=tmp_path, check=True)
    # XLA refuses it when it is registered, not when the backend starts.
    words = python(UPDATE, tmp_path, tmp_path)
    assert "does not load: INVALID_ARGUMENT: " in words
    assert "handler's API version (0.999) is incompatible" in words
    assert "cpu: xla, compiled" in words
    assert "0.999" in python(WARN, tmp_path, tmp_path)


IMPORT = """
import jax
import sparse_adam
jax.config.update("jax_num_cpu_devices", 3)  # refused once a backend has started
assert len(jax.devices()) == 3
"""


def test_importing_starts_no_backend():
    python(IMPORT, ROOT, ROOT)


SAVE = """
import pickle, sys, jax, jax.numpy as jnp
from jax.experimental import serialize_executable
from sparse_adam import sparse_adam_update

table = jax.ShapeDtypeStruct((4, 2), jnp.float32)
ids = jax.ShapeDtypeStruct((1,), jnp.int32)
grads = jax.ShapeDtypeStruct((1, 2), jnp.float32)
run = jax.jit(lambda *xs: sparse_adam_update(*xs, learning_rate=1.0))
compiled = run.lower(table, table, table, ids, grads).compile()
assert "sparse_adam_cpu" in compiled.as_text()
with open("saved", "wb") as file:
    pickle.dump(serialize_executable.serialize(compiled), file)
"""
LOAD = """
import pickle, jax.numpy as jnp
from jax.experimental import serialize_executable
import sparse_adam  # and no more of it

with open("saved", "rb") as file:
    run = serialize_executable.deserialize_and_load(*pickle.load(file))
one = jnp.ones((4, 2))
print(run(one, one, one, jnp.array([1], jnp.int32), one[:1])[0].tolist())
"""


def test_a_process_that_only_imports_the_package_runs_a_saved_program(tmp_path):
    if not library.LIBRARY.exists():  # then there is nothing to be registered
        return
    python(SAVE, tmp_path, ROOT)
    table = python(LOAD, tmp_path, ROOT)
    assert table == "[[1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]\n"
