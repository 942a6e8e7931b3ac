"""Result files: what was timed, on what, by which code."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from benchmarks.statistics import interval_of_rounds, spread

SCHEMA = 1
ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "benchmarks" / "results"
PACKAGES = (
    *("jax", "jaxlib", "libtpu", "numpy", "optax", "keras"),
    *("torch", "fbgemm-gpu-cpu", "jax-tpu-embedding"),
)


class WrongFileError(click.ClickException, ValueError):
    """A file that is no result file of the command which should have written it."""


@dataclass(frozen=True)
class Row:
    """One contender in one case: its times, or why there are none."""

    case: str
    rows: int  # V
    dim: int  # D
    ids: int  # N
    distribution: str
    dtypes: tuple[str, ...]
    options: dict[str, Any]
    impl: str
    title: str
    unique: float = 0.0  # distinct rows of a batch
    repeats: int = 0  # of each id, where that is what the case is about
    status: str = "ok"  # or "skipped", or "failed"
    reason: str = ""
    compile_s: float = 0.0
    ms: tuple[float, ...] = ()  # every timed call
    p20_ms: float = 0.0
    p50_ms: float = 0.0
    p80_ms: float = 0.0
    least_ms: float = 0.0
    bytes: float = 0.0  # that must be moved at least
    gb_per_s: float = 0.0  # those bytes by the median
    share_of_copy: float | None = None  # of the machine's own copy, round by round
    ratio: float | None = None  # to the first of ours, round by round
    ratio_bounds: Sequence[float] | None = None  # that hold it nine times in ten
    predicted_ms: float | None = None  # the static lower bound, where there is one

    def skipped(self, reason: str) -> "Row":
        """Returns the row of a contender that cannot do the case here."""
        return replace(self, status="skipped", reason=reason)

    def failed(self, error: Exception) -> "Row":
        """Returns the row of a contender that broke: the error in one line."""
        words = " ".join(str(error).split())
        reason = f"{type(error).__name__}: {words}"[:300]
        return replace(self, status="failed", reason=reason)

    def timed(self, seconds: Sequence[float], compile_seconds: float) -> "Row":
        """Returns the row with the times of its calls, and their quantiles."""
        middle = spread(seconds)
        return replace(
            self,
            compile_s=round(compile_seconds, 3),
            ms=tuple(round(1e3 * t, 4) for t in seconds),
            p20_ms=round(1e3 * middle.p20, 4),
            p50_ms=round(1e3 * middle.p50, 4),
            p80_ms=round(1e3 * middle.p80, 4),
            least_ms=round(1e3 * middle.least, 4),
        )

    def compared(self, seconds: Sequence[float], base: Sequence[float]) -> "Row":
        """Returns the row with the ratio of its times to those of ours, and bounds."""
        low, ratio, high = interval_of_rounds(seconds, base)
        bounds = round(low, 3), round(high, 3)
        return replace(self, ratio=round(ratio, 3), ratio_bounds=bounds)


@dataclass(frozen=True)
class Results:
    """A run of a command."""

    command: str
    config: dict[str, Any]
    rows: tuple[Row, ...]
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    started: str = ""
    schema: int = SCHEMA

    def write(self, path: Path) -> None:
        """As JSON."""
        head = asdict(self)
        write(path, head, "rows", head.pop("rows"))

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Reads what `write` wrote; anything else is a `WrongFileError`."""
        found = _read(path, "rows", "update`, `scale` or `step")
        try:
            rows = tuple(
                Row(**row | {"dtypes": tuple(row["dtypes"]), "ms": tuple(row["ms"])})
                for row in found.pop("rows")
            )
            return cls(**found, rows=rows)
        except (TypeError, KeyError) as error:
            raise WrongFileError(
                f"{path} was written by `update`, `scale` or `step` of another "
                f"version: {error}"
            ) from error


def read_records(path: Path) -> dict[str, Any]:
    """Reads a result file of `static`; anything else is a `WrongFileError`."""
    found = _read(path, "records", "static")
    keys = ("program", "chip", "error", "dim", "rows", "ids", "roofline", "engines")
    for record in found["records"]:
        if not isinstance(record, dict) or not record.keys() >= set(keys):
            raise WrongFileError(
                f"{path} was written by `static` of another version: each of its "
                f"records must have {', '.join(keys)}"
            )
    return found


def read_steps(path: Path) -> dict[str, Any]:
    """Reads a result file of `step --static`; anything else is a `WrongFileError`."""
    return _read(path, "records", "step --static")


def read_routing(path: Path) -> dict[str, Any]:
    """Reads a result file of `routing`; anything else is a `WrongFileError`."""
    return _read(path, "records", "routing")


def _read(path: Path, rows: str, commands: str) -> dict[str, Any]:
    """Reads a JSON file with a schema and with a list under the name `rows`."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise WrongFileError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise WrongFileError(f"{path} is not a result file: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get(rows), list):
        raise WrongFileError(
            f"{path} is not a result file of `{commands}`: it has no list {rows!r}"
        )
    if found.get("schema") != SCHEMA:
        raise WrongFileError(
            f"{path} is a result file of schema {found.get('schema')!r}, and must be "
            f"one of schema {SCHEMA}: run the command again"
        )
    return found


def write(path: Path, head: dict[str, Any], name: str, rows: Sequence[Any]) -> None:
    """Writes JSON with a line for each row, for people and for diffs."""
    text = json.dumps(head, indent=1).removesuffix("\n}")
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{text},\n "{name}": [\n  {lines}\n ]\n}}\n')


def write_records(
    path: Path, command: str, started: str, records: Sequence[Any]
) -> None:
    """Writes the result file of a command that compiles: a line for each record."""
    head = {
        "schema": SCHEMA,
        "command": command,
        "commit": commit(),
        "started": started,
    }
    write(path, head, "records", records)


def now() -> str:
    """The time of day, to be put down before a run."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def load() -> float:
    """Processes that want a core, averaged over a minute."""
    return round(os.getloadavg()[0], 2)


def describe_machine(load_before: float, others: float | None) -> dict[str, Any]:
    """Describes what the numbers depend on.

    Args:
        load_before: what `load` gave before the run.
        others: how many cores other programs took during the run, where known.
    """
    import jax

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return {
        "device": jax.devices()[0].device_kind,
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_before": load_before,
        "load_after": load(),
    } | ({} if others is None else {"cores_of_others": others})


def package_versions() -> dict[str, str]:
    """Of what is installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit(root: Path = ROOT) -> str:
    """The commit of the sources, with "+" if they have changed; "" without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "sparse_adam", "benchmarks")
        return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)
    except OSError:
        return ""
