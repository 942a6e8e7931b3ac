"""The options that several commands share, and how their words are printed."""

import os
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

WIDTH = 80  # columns of a printed line
RUNS = Path("runs", "bench")  # ignored by git
_FILE: Any = click.Path(dir_okay=False, path_type=Path)
Option = Callable[[Any], Any]  # a decorator of a command


def choices_option(
    flag: str,
    into: str,
    values: Iterable[str],
    what: str,
    *,
    default: Sequence[str] = (),
    otherwise: str = "all",
) -> Option:
    """Makes an option that takes one of some values, again and again for more of them.

    Args:
        flag: as it is typed, `--case`.
        into: the argument of the command, a tuple of strings.
        values: that may be given.
        what: a value is, for `--help`.
        default: the values if none is given.
        otherwise: says for `--help` what the command takes if none is given and there
            is no `default`.
    """
    return click.option(
        flag,
        into,
        multiple=True,
        type=click.Choice(list(values)),
        default=default,
        help=f"{what}; again for more. Default: {', '.join(default) or otherwise}.",
    )


def rounds_option(what: str, default: int | None = None) -> Option:
    """Makes the option `--rounds`, a number of timed calls of at least 1."""
    return click.option(
        "--rounds",
        type=click.IntRange(1),
        default=default,
        show_default=default is not None,
        help=what,
    )


def timeout_option(seconds: float, what: str) -> Option:
    """Makes the option `--timeout`, of seconds, for one compile or more."""
    return click.option(
        "--timeout",
        type=click.FloatRange(0, min_open=True),
        default=seconds,
        show_default=True,
        help=what,
    )


def out_option(name: str) -> Option:
    """Makes the option `--out`, a result file that this command can write."""
    return click.option(
        "--out",
        type=_FILE,
        callback=lambda context, parameter, path: require_writable(path),
        default=RUNS / name,
        show_default=True,
        help="The result file.",
    )


def chosen_out_option(names: str) -> Option:
    """Makes the option `--out` of a command that chooses its result file: or None."""
    return click.option(
        "--out", type=_FILE, help=f"The result file. Default: {RUNS}/{names}."
    )


def package_file_options(path: Path) -> Option:
    """Makes `--check` and `--out`, of a command that writes a file of the package."""

    def add(command: Any) -> Any:
        out = click.option(
            "--out",
            type=_FILE,
            default=path,
            show_default="the file in the package",
            help="The file to write, or to compare with.",
        )
        check = click.option(
            "--check", is_flag=True, help="Write nothing; compare with the file."
        )
        return check(out(command))

    return add


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
