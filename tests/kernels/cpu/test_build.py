"""Wheels with the CPU kernel and without: what is in them, and that both work."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hatch_build

ROOT = Path(__file__).parents[3]
UPDATE = """
import jax, jax.numpy as jnp, sparse_adam
one = jnp.ones((2, 2))
arguments = one, one, one, jnp.array([1]), one[:1]
print(sparse_adam.__file__)
print(sparse_adam.explain(*arguments))
print(sparse_adam.sparse_adam_update(*arguments, learning_rate=1.0).table.tolist())
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
    done = subprocess.run(
        [sys.executable, "-c", UPDATE],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder / "installed")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, *words, table = done.stdout.splitlines()
    assert where.startswith(str(folder))
    assert table == "[[1.0, 1.0], [0.0, 0.0]]"
    return "\n".join(words)


@pytest.mark.parametrize("compiler", ["none-such", "false"])
def test_without_a_compiler_the_wheel_is_pure(compiler, tmp_path):
    wheel, said = make_wheel(tmp_path, compiler)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "The CPU kernel was left out" in said
    assert str(hatch_build.LIBRARY) not in zipfile.ZipFile(wheel).namelist()
    words = run(wheel, tmp_path)
    assert "cpu: xla, compiled" in words
    assert "was not built" in words


def test_with_a_compiler_one_wheel_serves_every_python(tmp_path):
    compiler = hatch_build.find_compiler()
    if compiler is None:  # then only the other test says something
        return
    wheel, said = make_wheel(tmp_path, " ".join(compiler))
    assert "left out" not in said
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert str(hatch_build.LIBRARY) in names
    assert not [name for name in names if "test" in name]
    assert "cpu: cpu, compiled" in run(wheel, tmp_path)
