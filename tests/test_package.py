"""The rules of the house: who imports whom, what an import does, how long files are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_adam

PACKAGE = Path(sparse_adam.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# A folder may import from itself and from those named here.
MAY_IMPORT = {
    "check": {"ops", "kernels", "rules", "reference"},
    "embedding": {"ops", "kernels", "rules"},
    "ops": {"kernels", "rules"},
    "kernels": {"rules"},
    "rules": set(),
    "reference": set(),
}


def imported_modules(file: Path) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute here"
            modules.append(node.module or "")
    return modules


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_run_one_way(folder):
    for file in sorted((PACKAGE / folder).rglob("*.py")):
        for module in imported_modules(file):
            top, *inner = module.split(".")
            if top == "sparse_adam" and inner and inner[0] != "_types":
                assert inner[0] in {folder} | MAY_IMPORT[folder], f"{file}: {module}"


def test_reference_knows_numpy_only():
    for file in (PACKAGE / "reference").rglob("*.py"):
        for module in imported_modules(file):
            allowed = ("numpy", "sparse_adam.reference")
            standard = module.split(".")[0] in sys.stdlib_module_names
            assert standard or module.startswith(allowed), f"{file}: {module}"


def test_files_are_short_and_so_is_what_is_in_a_kernel():
    for file in FILES:
        source = file.read_text()
        assert len(source.splitlines()) <= 400, file
        if PACKAGE / "kernels" not in file.parents:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno:
                assert node.end_lineno - node.lineno < 60, f"{file}: {node.name}"


def test_kernels_do_not_ask_how_they_are_run():
    for file in (PACKAGE / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("kernel"):
                names = [a.arg for a in node.args.args + node.args.kwonlyargs]
                assert "interpret" not in names, f"{file}: {node.name}"


IMPORT_PROBE = """
import os, sys

class Blocker:
    blocked = ("jaxtyping", "beartype", "hypothesis", "libtpu", "optax", "flax",
               "equinox", "keras", "orbax")
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.blocked:
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Blocker())
import jax
import jax.experimental.pallas.tpu
flags = dict(jax.config.values)
environment = dict(os.environ)
import sparse_adam
from jax._src import xla_bridge
assert not xla_bridge._backends, "the import started a backend"
assert dict(jax.config.values) == flags, "the import set a flag"
assert dict(os.environ) == environment, "the import changed the environment"
import jax.numpy as jnp
print(sparse_adam.sparse_adam_update(
    *[jnp.ones((2, 2))] * 3, jnp.array([1]), jnp.ones((1, 2))).table.shape)
"""


def test_import_starts_nothing_and_needs_only_jax_and_numpy():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_PROBE], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(2, 2)\n"


def test_package_reads_no_environment_and_sets_no_flag():
    for file in FILES:
        source = file.read_text()
        for forbidden in ("os.environ", "getenv", "jax.config", "sys.argv"):
            assert forbidden not in source, f"{file} uses {forbidden}"


def test_public_names_are_documented():
    for name in dir(sparse_adam):
        value = getattr(sparse_adam, name)
        if name.startswith("_") or not callable(value):
            continue
        assert value.__doc__ and not value.__doc__.startswith(f"{name}("), name
