"""All mutants, by area: one file of TOML each in `areas/`."""

import functools
import tomllib
from pathlib import Path

from tests.mutants.mutant import Mutant

# The file of an area, and what the table calls it.
AREAS = {
    "cpp": "C++",
    "plan": "plan and sorting",
    "updates": "updates, shards, lookups",
    "layouts": "layouts and packing",
    "routing": "routing",
    "rules": "rules and rounding",
    "embedding": "embedding",
    "checkpoints": "checkpoints and imports",
    "kernels": "TPU kernels",
}


@functools.cache
def mutants() -> dict[str, tuple[Mutant, ...]]:
    """Returns the mutants of each area, by the names of the files."""
    folder = Path(__file__).with_name("areas")
    return {
        area: tuple(
            Mutant(**fields)
            for fields in tomllib.loads((folder / f"{area}.toml").read_text())[
                "mutants"
            ]
        )
        for area in AREAS
    }
