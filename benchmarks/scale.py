"""`python -m benchmarks scale`: how the cost of an update grows, one size at a time."""

from dataclasses import replace
from pathlib import Path

import click

from benchmarks.cases import Case
from benchmarks.contenders import CONTENDERS, COPY, OURS
from benchmarks.options import choices_option, out_option, rounds_option
from benchmarks.update import QUICK_ROUNDS, run_and_write

ROUNDS = 9
# Who is drawn; of each framework the usual way.
IMPLS = (*OURS, "at_set", "torch", "optax", COPY)
# Ids are distinct, for every size of table to have as many rows updated.
_ROWS = Case("V", 0, 32, 16_384, "distinct")
_IDS = Case("N", 500_000, 128, 0)
_DIM = Case("D", 250_000, 0, 65_536)
_REPEATS = Case("duplicates", 500_000, 128, 65_536, "repeated")


def cases(quick: bool) -> dict[str, tuple[Case, ...]]:
    """For each axis, its cases from small to large."""
    if quick:
        small = {"num_rows": 65_536, "num_ids": 4096}
        return {
            "V": _sweep(replace(_ROWS, num_ids=4096), "num_rows", 16_384, 262_144),
            "N": _sweep(replace(_IDS, num_rows=65_536), "num_ids", 1024, 16_384),
            "D": _sweep(replace(_DIM, **small), "dim", 16, 128),
            "duplicates": _sweep(replace(_REPEATS, **small), "repeats", 1, 64),
        }
    return {
        "V": _sweep(_ROWS, "num_rows", *(2**n for n in range(14, 23, 2))),
        "N": _sweep(_IDS, "num_ids", *(2**n for n in range(8, 19, 2))),
        "D": _sweep(_DIM, "dim", 16, 32, 64, 128, 256),
        "duplicates": _sweep(_REPEATS, "repeats", 1, 4, 16, 256, 65_536),
    }


def _sweep(case: Case, field: str, *values: int) -> tuple[Case, ...]:
    return tuple(
        replace(case, name=f"{case.name}={value}", **{field: value}) for value in values
    )


@click.command()
@choices_option("--axis", "axes", cases(quick=True), "What grows")
@choices_option(
    "--impl", "impls", CONTENDERS, "A contender", otherwise=", ".join(IMPLS)
)
@click.option("--quick", is_flag=True, help="Two small sizes on each axis.")
@rounds_option("Timed calls of each contender at a size.")
@out_option("scale.json")
def scale(
    axes: tuple[str, ...],
    impls: tuple[str, ...],
    quick: bool,
    rounds: int | None,
    out: Path,
) -> None:
    """Time updates while V, N, D or the duplicates grow and all else stays.

    An update that touches only its rows costs the same at every V, and grows with N
    and D as its bytes do. "duplicates" says how often each id of a batch occurs.
    """
    swept = cases(quick)
    chosen = [case for axis in axes or swept for case in swept[axis]]
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    entered = [(case, impls or IMPLS) for case in chosen]
    run_and_write("scale", entered, rounds, out)
