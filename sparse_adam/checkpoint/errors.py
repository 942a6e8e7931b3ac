"""What may be wrong with a checkpoint."""

from typing import Any


class CheckpointMismatchError(ValueError):
    """A whole checkpoint does not fit the state that it is to be restored into."""


class CorruptCheckpointError(ValueError):
    """A checkpoint cannot be read, or has other numbers than were saved."""


def corrupt(directory: Any, fault: str) -> CorruptCheckpointError:
    """Returns the error of an item in a directory, which says what to do."""
    return CorruptCheckpointError(
        f"the checkpoint in {directory} {fault}: restore one before, as "
        "restore_latest does"
    )
