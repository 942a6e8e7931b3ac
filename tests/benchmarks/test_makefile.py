"""The Makefile runs the demo and the benchmarks on the TPU of a host that has one."""

import os
import shutil
import subprocess

import pytest

from benchmarks.results import ROOT

TPU = ("GOOGLE_PCI=0000:00:04.0", "TPU_NODES=/dev/accel0")
PYTHON = """#!/bin/sh
echo "platforms=$JAX_PLATFORMS"
"""


def platforms(folder, target, *variables, **environment):
    """Runs a target with programs that only print where they would run."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("python", "pytest", "ruff", "pyright"):
        (programs / name).write_text(PYTHON)
        (programs / name).chmod(0o755)
    for stamp in ("demo", "bench", "test"):
        (folder / f".{stamp}").touch()
    clean = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    make = shutil.which("make")
    assert make is not None, "the project is built by make"
    done = subprocess.run(
        [make, target, f"VENV={folder}", *variables],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("platforms=")]
    return {line.removeprefix("platforms=") for line in lines}


@pytest.mark.parametrize("target", ["demo", "bench", "chip"])
def test_a_tpu_is_used_where_there_is_one(target, tmp_path):
    assert platforms(tmp_path, target, *TPU) == {"tpu,cpu"}
    assert platforms(tmp_path, target, "GOOGLE_PCI=", "TPU_NODES=") == {"cpu"}


def test_it_takes_the_vendor_and_the_device_node(tmp_path):
    assert platforms(tmp_path, "demo", TPU[0], "TPU_NODES=") == {"cpu"}
    assert platforms(tmp_path, "demo", "GOOGLE_PCI=", TPU[1]) == {"cpu"}


@pytest.mark.parametrize("target", ["check", "static", "campaign", "mutants"])
def test_the_tests_look_for_no_tpu(target, tmp_path):
    assert platforms(tmp_path, target, *TPU) == {"cpu"}
    assert platforms(tmp_path, "test", "TPU_NODES=") <= {"cpu", ""}


def test_the_kernels_are_checked_on_a_tpu_after_the_tests(tmp_path):
    assert platforms(tmp_path, "test", *TPU) - {""} == {"cpu", "tpu,cpu"}


@pytest.mark.parametrize("target", ["demo", "bench", "check", "static"])
def test_the_users_platform_is_kept(target, tmp_path):
    kept = platforms(tmp_path, target, *TPU, JAX_PLATFORMS="cuda")
    assert kept == {"cuda"}


def test_the_demo_installs_libtpu_where_there_is_a_tpu(tmp_path):
    def command(*variables):
        make = ["make", "-n", "demo", f"VENV={tmp_path}", *variables]
        return subprocess.run(
            make, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout

    assert "'.[bench,examples,tpu]'" in command(*TPU)
    assert "'.[bench,examples]'" in command("TPU_NODES=")
