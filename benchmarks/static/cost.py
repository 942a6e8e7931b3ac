"""`python -m benchmarks bundles`: the figures by which the package chooses its sweep.

`sparse_adam/kernels/sweep/cost.py` compares the TensorCore's row kernel with the sweep.
What both issue is counted here, in programs that libtpu compiles for each generation,
and written to a file that the package reads. No TPU is needed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from benchmarks.options import (
    WIDTH,
    choices_option,
    package_file_options,
    require_writable,
    timeout_option,
)
from benchmarks.results import ROOT, WrongFileError
from benchmarks.static.chips import CHIPS
from benchmarks.static.compiler import StaticCase, count_all, require_libtpu
from benchmarks.static.result import StaticReport

BUNDLES = ROOT / "sparse_adam" / "kernels" / "sweep" / "bundles.json"
ROWS, IDS = 2**20, 2**16
# Rows of 128 lanes, wider ones, and rows of which 8 share a line when packed.
DIM, WIDE, SHARED = 128, 256, 16
PROGRAMS = (
    *(("tensorcore", DIM), ("tensorcore", WIDE)),
    *(("packed_tensorcore", DIM), ("packed_tensorcore", WIDE)),
    *(("packed_tensorcore", SHARED), ("packed_sweep", SHARED)),
    *(("sweep", DIM), ("sweep", WIDE), ("packed_sweep", DIM)),
    *(("sweep_bfloat16", DIM), ("packed_sweep_bfloat16", DIM)),
)
TOLERANCE = 0.01  # of a figure: a change below it is none
Figures = dict[str, Any]  # numbers by name; those of two widths are a list
Reports = Mapping[tuple[str, int], StaticReport]  # by program and width


@click.command()
@choices_option("--chip", "chips", CHIPS, "With --check: a TPU to compare")
@package_file_options(BUNDLES)
@timeout_option(300.0, "Seconds for one of the programs.")
def bundles(chips: tuple[str, ...], check: bool, out: Path, timeout: float) -> None:
    """Count what the row kernel and the sweep issue, for the choice between them.

    Eleven programs are compiled for each of five TPU generations, which takes some
    minutes on any host. With --check, a figure that differs from the file's by more
    than 1 % is printed and the exit status is 1.
    """
    if chips and not check:
        raise click.UsageError(
            "--chip goes with --check only: the file has the figures of all chips, "
            "counted by one compiler"
        )
    require_libtpu("bundles")
    committed = read(out) if check else {}
    if not check:
        require_writable(out)
    found = measure(chips or tuple(CHIPS), timeout)
    for line in table(found):
        click.echo(line)
    if not check:
        out.write_text(as_text(found))
        click.echo(f"Wrote {out}")
        return
    for name in ("jax", "libtpu"):
        if committed[name] != found[name]:
            click.echo(f"{name} {found[name]} here, {committed[name]} in {out}")
    changed = list(differences(committed, found))
    for line in changed:
        click.echo(line)
    if changed:
        raise click.ClickException(
            f"{len(changed)} figures differ from those in {out}; `python -m benchmarks "
            "bundles` writes new ones"
        )
    click.echo(f"All figures are those in {out}, to {TOLERANCE:.0%}.")


def measure(chips: Sequence[str], timeout: float = 300.0) -> dict[str, Any]:
    """Compiles the programs for the chips, and returns what the file is to hold."""
    cases = [
        StaticCase(program, chip, ROWS, dim, IDS)
        for chip in chips
        for program, dim in PROGRAMS
    ]
    reports: dict[str, dict[tuple[str, int], StaticReport]] = {c: {} for c in chips}
    versions: Mapping[str, str] = {}
    with tqdm(total=len(cases), leave=False, disable=None, ncols=WIDTH) as bar:
        for case, report in zip(cases, count_all(cases, timeout=timeout), strict=True):
            if report.error is not None:
                raise click.ClickException(
                    f"{case.program} with D = {case.dim} did not compile for "
                    f"{case.chip}: {report.error}"
                )
            reports[case.chip][case.program, case.dim] = report
            versions = report.versions
            bar.set_description(f"{case.chip}: {case.program}")
            bar.update()
    return {
        "jax": versions["jax"],
        "libtpu": versions["libtpu"],
        "rows": ROWS,
        "ids": IDS,
        "row_kernel": {chip: row_kernel(found) for chip, found in reports.items()},
        "sweep": {chip: sweep(found) for chip, found in reports.items()},
    }


def row_kernel(reports: Reports) -> Figures:
    """Counts the bundles of the TensorCore's row kernel.

    "plain" and "packed" fetch, update and write back a row, or a group of packed rows;
    "gradient" fetches a gradient, which "repeated" adds to another of its row. Those
    "shared" do so where rows share lines, and put it into its place of the line. Lists
    are for `DIM` and `WIDE`.
    """
    moved, packed = ("fetch rows", "update", "write back"), "packed_tensorcore"
    return {
        "plain": [_bundles(reports, "tensorcore", d, *moved) for d in (DIM, WIDE)],
        "packed": [_bundles(reports, packed, d, *moved) for d in (DIM, WIDE)],
        "gradient": [_bundles(reports, packed, d, "gradients") for d in (DIM, WIDE)],
        "gradient_shared": _bundles(reports, packed, SHARED, "gradients", "mark"),
        "repeated": [_bundles(reports, packed, d, "sums") for d in (DIM, WIDE)],
        "repeated_shared": _bundles(reports, packed, SHARED, "sums"),
    }


def sweep(reports: Reports) -> Figures:
    """Counts the bundles of the sweep.

    "fetched" fetches a gradient and "added" adds it; "added_shared" adds one of a row
    that shares its line. The others update 128 weights with their slots, of each
    storage and dtype. Lists are for `DIM` and `WIDE`.
    """

    def updated(program: str) -> float:
        # The sweep updates all rows of the table, for so many ids.
        return round(reports[program, DIM].phases["update"] * IDS / ROWS, 3)

    return {
        "fetched": [_bundles(reports, "sweep", d, "gradients") for d in (DIM, WIDE)],
        "added": [_bundles(reports, "sweep", d, "add") for d in (DIM, WIDE)],
        "added_shared": _bundles(reports, "packed_sweep", SHARED, "add"),
        "updated_plain": updated("sweep"),
        "updated_packed": updated("packed_sweep"),
        "updated_plain_bfloat16": updated("sweep_bfloat16"),
        "updated_packed_bfloat16": updated("packed_sweep_bfloat16"),
    }


def _bundles(reports: Reports, program: str, dim: int, *phases: str) -> float:
    """Adds up phases of a program, in bundles for each id; each of them must be there.

    A phase without bundles means that its loop was not recognised.
    """
    found = reports[program, dim]
    for phase in phases:
        if not found.phases.get(phase):
            raise click.ClickException(
                f"no loop of {program} with D = {dim} for {found.chip} was recognised "
                f"as {phase!r}: the rules in benchmarks/static/programs.py must follow "
                f"the kernel. It has {', '.join(found.phases)}"
            )
    return round(sum(found.phases[phase] for phase in phases), 2)


def read(path: Path) -> dict[str, Any]:
    """Reads the file; anything else is a `WrongFileError`."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WrongFileError(f"{path} cannot be read: {error}") from error
    keys = {"jax", "libtpu", "row_kernel", "sweep"}
    if not isinstance(found, dict) or not found.keys() >= keys:
        raise WrongFileError(
            f"{path} was not written by `python -m benchmarks bundles`"
        )
    return found


def as_text(found: Mapping[str, Any]) -> str:
    """Writes JSON with a line for each chip, for people and for diffs."""
    parts = []
    for name, value in found.items():
        text = json.dumps(value)
        if isinstance(value, dict):
            lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
            text = "{\n" + ",\n".join(lines) + "\n }"
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Describes the figures of `new` that are others in `old`, or not there."""
    for kernel in ("row_kernel", "sweep"):
        for chip, figures in new[kernel].items():
            before = _flat(old[kernel].get(chip, {}))
            for name, value in _flat(figures).items():
                was = before.get(name)
                if was is None or abs(value - was) > TOLERANCE * was:
                    yield f"{chip}, {kernel}, {name}: {value} here, {was} in the file"


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """Yields the figures as lines: one for each figure, a column for each chip."""
    for kernel, title in (("row_kernel", "row kernel"), ("sweep", "sweep")):
        columns = {chip: _flat(each) for chip, each in found[kernel].items()}
        yield f"{title + ', bundles':<30}" + "".join(f"{chip:>9}" for chip in columns)
        for name in next(iter(columns.values())):
            cells = (f"{figures[name]:9.2f}" for figures in columns.values())
            yield f"  {name:<28}" + "".join(cells)


def _flat(figures: Figures) -> dict[str, float]:
    """Gives each number a name of its own, with the width where there are two."""
    flat: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, list):
            for dim, each in zip((DIM, WIDE), value, strict=True):
                flat[f"{name}, D = {dim}"] = each
        else:
            flat[name] = value
    return flat
