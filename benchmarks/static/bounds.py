"""`python -m benchmarks bounds`: the bounds that `python -m sparse_adam.check` shows.

They are those of a result file of `static`, without what they are derived from, in a
file of the package.
"""

import json
from pathlib import Path
from typing import Any

import click

from benchmarks.options import package_file_options, require_writable
from benchmarks.results import COMMITTED, ROOT, WrongFileError, read_records
from benchmarks.static.chips import CHIPS

BOUNDS = ROOT / "sparse_adam" / "check" / "bounds.json"
PROGRAMS = (
    *("sparsecore", "tensorcore", "sweep"),
    *("packed_sparsecore", "packed_tensorcore", "packed_sweep", "xla_sorted"),
)


@click.command()
@click.argument(
    "results",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=COMMITTED / "static.json",
)
@package_file_options(BOUNDS)
def bounds(results: Path, check: bool, out: Path) -> None:
    """Keep the least times of RESULTS, a file of `static`, in the package.

    Without RESULTS those that are committed. With --check, the exit status is 1 if the
    package has others.
    """
    text = as_text(collect(read_records(results)))
    if not check:
        require_writable(out)
        out.write_text(text)
        click.echo(f"Wrote {out}")
    elif not out.exists() or out.read_text() != text:
        raise click.ClickException(
            f"{out} has other bounds than {results}: `python -m benchmarks bounds` "
            "writes them"
        )


def collect(found: dict[str, Any]) -> dict[str, Any]:
    """Returns what the file is to hold: of each program and chip the bound of an id."""
    records = [
        r for r in found["records"] if r["program"] in PROGRAMS and r["roofline"]
    ]
    sizes = {(r["rows"], r["dim"], r["ids"]) for r in records}
    if len(sizes) != 1:
        raise WrongFileError(f"the programs must be of one size, and are of {sizes}")
    ((rows, dim, ids),) = sizes
    programs: dict[str, Any] = {name: {} for name in PROGRAMS}
    for record in sorted(records, key=lambda r: list(CHIPS).index(r["chip"])):
        roofline = record["roofline"]
        programs[record["program"]][record["chip"]] = {
            "ns": round(roofline["bound_ns"], 4),
            "limit": roofline["limit"],
        }
    versions = records[0]["versions"]
    return {
        "jax": versions["jax"],
        "libtpu": versions["libtpu"],
        "commit": found["commit"],
        "rows": rows,
        "dim": dim,
        "ids": ids,
        "programs": programs,
    }


def as_text(found: dict[str, Any]) -> str:
    """Writes JSON with a line for each program."""
    programs = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(chips)}"
        for name, chips in found["programs"].items()
    )
    head = {name: value for name, value in found.items() if name != "programs"}
    text = json.dumps(head, indent=1).removesuffix("\n}")
    return f'{text},\n "programs": {{\n{programs}\n }}\n}}\n'
