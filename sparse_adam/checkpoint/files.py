"""A list of the files of an item, so that it is seen if one is changed or missing.

Orbax has checksums in some of its files and none in others. Here the sizes of all of
them are put down, and a checksum of each that describes arrays. What the arrays hold is
in folders named `d`; it may be large, and is checked by the sums of its numbers.
"""

import json
import zlib
from collections.abc import Iterator
from typing import Any

from sparse_adam.checkpoint.errors import corrupt

LIST = "files.json"


def write_list(directory: Any) -> None:
    """Puts down all files of an item, when all of them are written."""
    files = {
        str(path.relative_to(directory)): (_size(path), _checksum(path))
        for path in _below(directory)
    }
    (directory / LIST).write_text(json.dumps(files, indent=1))


def check_list(directory: Any) -> None:
    """Raises CorruptCheckpointError if a file is not as it was written.

    Checkpoints of others have no list.
    """
    path = directory / LIST
    if not path.exists():
        return
    try:
        files = {
            name: (int(size), checksum)
            for name, (size, checksum) in json.loads(path.read_text()).items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise corrupt(
            directory, f"has a file {LIST!r} that is no list of files"
        ) from error
    for name, (size, checksum) in files.items():
        file = directory / name
        if not file.exists():
            raise corrupt(directory, f"lacks the file {name!r}")
        if _size(file) != size:
            raise corrupt(
                directory,
                f"has a file {name!r} of {_size(file)} bytes, of which {size} were "
                "written",
            )
        if _checksum(file) != checksum:
            raise corrupt(
                directory, f"has a file {name!r} with other bytes than were written"
            )


def _below(directory: Any) -> Iterator[Any]:
    """Yields all files; a path of `epath` has no `rglob`."""
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            yield from _below(path)
        else:
            yield path


def _size(path: Any) -> int:
    return int(path.stat().length)


def _checksum(path: Any) -> int | None:
    """Returns a checksum of a file that describes arrays, None of what they hold."""
    return None if path.parent.name == "d" else zlib.crc32(path.read_bytes())
