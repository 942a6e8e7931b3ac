"""Checkpoints of embedding tables by Orbax, which fit any storage and any devices.

`SaveTables` and `RestoreTables` are arguments of `orbax.checkpoint.CheckpointManager`,
as those of `orbax.checkpoint.args` are, for the item that holds an `EmbeddingState`;
`SaveArrays` and `RestoreArrays` are for an item of all other arrays. The manager writes
in the background, makes each checkpoint whole or not at all, and keeps the last ones;
`docs/checkpoints.md` shows a whole training loop.

A checkpoint holds tables by name, in logical order: `{"user": {"parameters": ...,
"momenta": ..., "velocities": ...}}`. How they were stored, stacked and spread over
devices is not in it.
"""

try:
    import orbax.checkpoint as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        "sparse_adam.checkpoint needs Orbax: pip install sparse_adam[checkpoint]"
    ) from error

from sparse_adam.checkpoint.arrays import RestoreArrays, SaveArrays
from sparse_adam.checkpoint.errors import (
    CheckpointMismatchError,
    CorruptCheckpointError,
)
from sparse_adam.checkpoint.latest import Latest, restore_latest
from sparse_adam.checkpoint.tables import RestoreTables, SaveTables

__all__ = [
    "CheckpointMismatchError",
    "CorruptCheckpointError",
    "Latest",
    "RestoreArrays",
    "RestoreTables",
    "SaveArrays",
    "SaveTables",
    "restore_latest",
]
