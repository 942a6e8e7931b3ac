"""The options that several commands share, and how their words are printed."""

import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

WIDTH = 80  # columns of a printed line
RUNS = Path("runs", "bench")  # ignored by git


def rounds_option(what: str) -> Callable[[Any], Any]:
    """Makes the option `--rounds`, a number of timed calls of at least 1."""
    return click.option("--rounds", type=click.IntRange(1), help=what)


def out_option(name: str) -> Callable[[Any], Any]:
    """Makes the option `--out`, a result file that this command can write."""
    return click.option(
        "--out",
        type=click.Path(dir_okay=False, path_type=Path),
        callback=_writable,
        default=RUNS / name,
        show_default=True,
        help="The result file.",
    )


def _writable(context: click.Context, parameter: click.Parameter, path: Path) -> Path:
    return require_writable(path)


def require_writable(path: Path) -> Path:
    """Refuses a file that cannot be written, before anything has been timed for it."""
    # Folders that are missing will be made; the nearest one that exists must allow it.
    target = path if path.exists() else path.absolute().parent
    while not target.exists():
        target = target.parent
    reason = None
    if target != path and not target.is_dir():
        reason = f"'{path}' cannot be made, since '{target}' is a file and no folder"
    elif not os.access(target, os.W_OK):
        reason = f"'{target}' is not writable"
    if reason is not None:
        raise click.BadParameter(reason, param_hint="'--out'")
    return path


def missing_extra(command: str, error: ModuleNotFoundError) -> str:
    """Says which extra installs the module that a command did not find."""
    return (
        f"`python -m benchmarks {command}` needs {error.name}, which is not "
        "installed: pip install '.[bench]' installs what the benchmarks need"
    )


def wrapped(text: str, indent: int = 4, first: int = 0) -> str:
    """Breaks a text into lines of `WIDTH` columns, all but the first indented."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=" " * first,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )
